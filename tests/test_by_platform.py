"""Forms for platforms: only the one at hand is traced, and all of JAX's transformations work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._by_platform import by_platform, of_default


@pytest.fixture(name="traced")
def _traced():
    """The names of the forms that were traced."""
    return []


@pytest.fixture(name="step")
def _step(traced):
    """x * table + y and x + y, or on other platforms than a CPU twice that."""

    def form(name, factor, tree, table):
        traced.append(name)
        product = tree["x"] * table * factor
        return {"x": product + factor * tree["y"], "y": (tree["y"] + tree["x"]) * factor}

    def step(tree, table):
        forms = {
            name: functools.partial(form, name, factor)
            for name, factor in (("cpu", 1), ("cuda", 2), ("default", 3))
        }
        return by_platform(tree, tree, table, **forms)

    return step


def _arguments(*shape):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    return {"x": x, "y": x + 1}, jnp.float32(3)


def _expected(tree, table):
    return {"x": tree["x"] * table + tree["y"], "y": tree["y"] + tree["x"]}


def _assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_form_at_hand_is_traced(step, traced):
    args = _arguments(4)
    _assert_equal(jax.jit(step)(*args), _expected(*args))
    assert traced == ["cpu"]


@pytest.mark.parametrize("platform, form", [("cuda", "cuda"), ("tpu", "default")])
def test_lowering_for_another_platform(step, traced, platform, form):
    text = jax.jit(step).trace(*_arguments(4)).lower(lowering_platforms=(platform,)).as_text()
    assert traced == [form] and "case" not in text


def test_shapes_need_no_form(step, traced):
    shapes = jax.eval_shape(step, *_arguments(4))
    assert shapes["x"].shape == (4,) and shapes["y"].dtype == jnp.float32 and not traced


def test_exported_for_two_platforms_it_keeps_both_forms(step, traced):
    args = _arguments(4)
    exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda"))(*args)
    assert sorted(traced) == ["cpu", "cuda"]
    _assert_equal(exported.call(*args), _expected(*args))


def test_vmap_of_what_is_mapped_and_what_is_not(step):
    tree, table = _arguments(2, 4)
    found = jax.jit(jax.vmap(step, in_axes=({"x": 1, "y": None}, None)))(
        {"x": tree["x"].T, "y": tree["y"][0]}, table
    )
    _assert_equal(found, _expected({"x": tree["x"], "y": tree["y"][:1]}, table))


def test_derivatives_are_those_of_the_form(step):
    tree, table = _arguments(4)
    gradient = jax.jit(jax.grad(lambda t: step(tree, t)["x"].sum()))(table)
    np.testing.assert_allclose(gradient, tree["x"].sum())


def test_a_derivative_beside_integers():
    def form(x, codes):
        return x * codes.astype(x.dtype)

    def step(x, codes):
        return by_platform(x, x, codes, cpu=form, default=form).sum()

    codes = jnp.arange(4)
    np.testing.assert_array_equal(jax.jit(jax.grad(step))(jnp.ones(4), codes), codes)


def test_without_jit(step):
    args = _arguments(4)
    _assert_equal(step(*args), _expected(*args))
    with jax.disable_jit():
        _assert_equal(step(*args), _expected(*args))


def test_in_a_loop_and_a_checkpoint(step):
    tree, table = _arguments(4)

    @jax.jit
    def twice(tree):
        return jax.lax.fori_loop(0, 2, lambda _, tree: jax.checkpoint(step)(tree, table), tree)

    _assert_equal(twice(tree), _expected(_expected(tree, table), table))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_inside_a_shard_map(step, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    tree, table = _arguments(16)
    # The table does not vary over the mesh, and the tree does.
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(tree, NamedSharding(mesh, P("data")))
        found = jax.jit(mapped)(placed, table)
    _assert_equal(jax.device_get(found), _expected(tree, table))


_LARGE = {k: jnp.ones((520 + 8 * i, 512)) for i, k in enumerate("ab")} | {"c": jnp.ones((600, 514))}
_OPTIMIZERS = {
    "dual codes": lambda: gx.gefen(1e-3),
    "shared blocks": lambda: gx.gefen(1e-3, plan=gx.plan_by_shape(_LARGE, kind="shared_blocks")),
    "fused": lambda: gx.fused_gefen(1e-3),
    "fused, split weights": lambda: gx.with_split_weights(gx.fused_gefen(1e-3)),
    "flash": lambda: gx.flash_adamw(1e-3),
}


@pytest.mark.once
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_no_tracer_outlives_its_trace(name):
    """Leaves that are worked through in pieces, together and alone."""
    tx, weights = _OPTIMIZERS[name](), _LARGE
    state = tx.init(weights)
    if "split" in name:
        weights = gx.split_weights(weights)[0]
    step = tx.step if "fused" in name else tx.update
    with jax.checking_leaks():
        jax.jit(step).lower(weights, state, weights)


def test_a_form_of_other_results_is_found_out():
    def wrong(x):
        return x[:2]

    x = jnp.ones(4)
    with pytest.raises(AssertionError):
        jax.jit(lambda x: by_platform(x, x, cpu=wrong, default=wrong))(x)


def test_the_default_form_can_be_looked_into(step):
    jaxpr = jax.make_jaxpr(step)(*_arguments(4)).jaxpr
    (inner,) = filter(None, map(of_default, jaxpr.eqns))
    assert [x.aval for x in inner.invars] == [x.aval for x in jaxpr.invars]
    assert "mul" in {equation.primitive.name for equation in inner.eqns}
