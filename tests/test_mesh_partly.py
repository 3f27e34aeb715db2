"""Steps inside a `jax.shard_map` over some axes of a mesh, and ensembles under `vmap`.

The other axes are Auto or Explicit as before: there, too, every device steps its own shard, if the
plan or the types say how leaves are cut.
"""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from simulate_mesh import collectives

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._fused_leaf import _step_jitted
from gefen_jax._transform import _update_leaf

_IS_NEW = jax.__version_info__ >= (0, 11)
_AUTO, _EXPLICIT = AxisType.Auto, AxisType.Explicit
_SHAPE, _LOCAL = (64, 512), (32, 512)
# Of the axes x, which is to be Manual, and y.
_TYPES = [(_AUTO, _AUTO), (_EXPLICIT, _EXPLICIT), (_AUTO, _EXPLICIT), (_EXPLICIT, _AUTO)]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Shards of these tests are a few thousand elements."""

    def forget() -> None:
        for jitted in (_update_leaf, _step_jitted):  # they know the leaves with other pieces
            jitted.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "CHUNK", 1024)
        forget()
        yield
    forget()


def _mesh(types: tuple[AxisType, AxisType], shape: tuple[int, int] = (2, 4)) -> Mesh:
    return jax.make_mesh(shape, ("x", "y"), axis_types=types)


def _grads() -> Any:
    return {"w": np.random.default_rng(0).standard_normal(_SHAPE).astype(np.float32)}


def _plan(mesh: Mesh) -> gx.Plan:
    """Of what a device has along x, cut over y."""
    return gx.plan_by_shape(_struct(), specs=P(None, "y"), mesh=mesh)


def _struct() -> Any:
    return {"w": jax.ShapeDtypeStruct(_LOCAL, jnp.float32)}


def _step(tx: Any, grads: Any) -> jax.Array:
    """The first updates, which the new state decides; or parameters, which start as gradients."""
    state = tx.init(grads)
    if isinstance(tx, gx.FusedGefen):
        return tx.step(grads, state, grads)[0]["w"]
    return tx.update(grads, state, grads)[0]["w"]


def _over_x(function: Any, mesh: Mesh) -> Any:
    """In a `shard_map` over x."""
    return jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"})


def _compiled(tx: Any, mesh: Mesh) -> Any:
    """A step over x, and its argument."""
    grads = jax.device_put(_grads(), NamedSharding(mesh, P("x", "y")))
    return jax.jit(_over_x(functools.partial(_step, tx), mesh)).lower(grads).compile(), grads


@functools.cache
def _adamw(types: tuple[AxisType, AxisType]) -> list[Any]:
    """The collectives of optax.adamw."""
    return collectives(_compiled(optax.adamw(1e-2), _mesh(types))[0].as_text())


@functools.cache
def _on_one_device(make: Any, plan: gx.Plan) -> np.ndarray:
    """Of each half along x. In dual code pieces give the bits of the whole."""
    step = jax.jit(functools.partial(_step, make(1e-2, plan=plan)))
    return np.concatenate([step({"w": part}) for part in np.split(_grads()["w"], 2)])


_MAKE = [(gx.gefen, types) for types in _TYPES] + [(gx.fused_gefen, _TYPES[2])]


@pytest.mark.parametrize("make, types", _MAKE)
def test_shard_map_over_one_axis_of_two(make, types):
    mesh = _mesh(types)
    plan = _plan(mesh)
    step, grads = _compiled(make(1e-2, plan=plan), mesh)
    # None of its own: jax gathers around a `shard_map` that leaves out an Explicit axis.
    assert collectives(step.as_text()) == _adamw(types)
    assert " while(" in step.as_text()
    np.testing.assert_array_equal(step(grads), _on_one_device(make, plan))


@pytest.mark.parametrize("make", [gx.gefen, gx.fused_gefen, gx.gefen_muon])
def test_made_inside_of_a_shard_map_that_is_not_jitted(make):
    """There, all that jnp makes of numbers is a tracer; so the codebook is looked at without it."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(_AUTO,))

    def state(params: Any) -> Any:
        return make(1e-2).init(params)

    found = jax.shard_map(state, mesh=mesh, in_specs=P("x"), out_specs=P())({"w": np.ones((4, 16))})
    assert jax.tree.structure(found) == jax.tree.structure(state({"w": np.ones((2, 16))}))


@pytest.mark.parametrize("types", _TYPES[:2], ids=str)
def test_whole_where_blocks_cross_shards(types):
    plan = gx.plan_by_shape(_struct())  # rows of 256, of which y cuts 128
    step, grads = _compiled(gx.gefen(1e-2, plan=plan), _mesh(types))
    assert " while(" not in step.as_text()
    np.testing.assert_array_equal(step(grads), _on_one_device(gx.gefen, plan))


def test_an_axis_of_one_device_is_no_cut():
    mesh = _mesh((_AUTO, _AUTO), (2, 1))
    # Traced: the loops of a CPU and of a GPU, and the whole leaf for others.
    tx = gx.gefen(1e-2, plan=gx.plan_by_shape(_struct()))
    step = _over_x(functools.partial(_step, tx), mesh)
    assert "while" in str(jax.make_jaxpr(step)(_grads()))


@pytest.mark.parametrize("types", _TYPES, ids=str)
def test_plans_made_of_tracers_know_what_types_say(types):
    """On a mesh where Auto axes may cut what they do not see, and inside a `shard_map`."""
    mesh, plans = _mesh(types), []

    def see(grads: Any) -> Any:
        plans.append(gx.plan_by_shape(grads))
        return grads

    grads = jax.device_put(_grads(), NamedSharding(mesh, P("x", "y")))
    jax.eval_shape(jax.jit(see), grads)
    jax.eval_shape(jax.jit(_over_x(see, mesh)), grads)
    outside, inside = (plan["w"] for plan in plans)
    # Runs of 128 where y, which cuts 512 columns in 4, is in the type.
    block = gx.DualCode((1, 128 if types[1] == _EXPLICIT else 256))
    assert (outside.kind, inside.kind, inside.shape) == (block, block, _LOCAL)
    axes = (("x", 2), ("y", 4))
    assert outside.partition == ((axes, ("x", "y")) if types == (_EXPLICIT, _EXPLICIT) else None)
    assert inside.partition == ((axes, (None, "y")) if types[1] == _EXPLICIT else None)


def test_an_ensemble_on_axes_of_two_types():
    """Under `vmap` nobody knows where the mapped axis lies on Auto axes: whole leaves."""
    mesh = _mesh((_EXPLICIT, _AUTO))
    at = NamedSharding(mesh, P(None, None, "y"))
    one = jax.ShapeDtypeStruct(_LOCAL, jnp.float32, sharding=NamedSharding(mesh, P(None, "y")))
    plan = gx.plan_by_shape({"w": one})
    assert plan == _plan(mesh)
    grads = {"w": jax.device_put(_grads()["w"].reshape(2, *_LOCAL), at)}
    step = functools.partial(_step, gx.gefen(1e-2, plan=plan))
    compiled = jax.jit(jax.vmap(step)).lower(grads).compile()
    assert " while(" not in compiled.as_text() and collectives(compiled.as_text()) == []
    expected = _on_one_device(gx.gefen, plan)
    np.testing.assert_array_equal(compiled(grads), expected.reshape(2, *_LOCAL))


@pytest.mark.parametrize("types", [(_EXPLICIT, _AUTO), (_EXPLICIT, _EXPLICIT)], ids=str)
def test_an_ensemble_over_an_explicit_axis(types):
    """`vmap` of the members that a device has, in a `shard_map` over the axis that cuts them."""
    mesh = _mesh(types)
    tx = gx.scale_by_gefen(plan=_plan(mesh))
    grads = _grads()["w"].reshape(2, *_LOCAL)
    cut = {"w": jax.device_put(grads, NamedSharding(mesh, P("x", None, "y")))}
    init = jax.jit(_over_x(jax.vmap(tx.init), mesh))
    over_x = jax.shard_map(
        jax.vmap(tx.update),
        mesh=mesh,
        in_specs=(P("x"), P("x")),
        out_specs=P("x"),
        axis_names={"x"},
    )
    with jax.set_mesh(mesh):
        state = init(cut)
        step = jax.jit(over_x).lower(cut, state).compile()
        for _ in range(2):
            updates, state = step(cut, jax.device_put(state, step.input_shardings[0][1]))
    assert types[1] == _EXPLICIT or collectives(step.as_text()) == []
    alone, alone_step = jax.vmap(tx.init)({"w": grads}), jax.jit(jax.vmap(tx.update))
    for _ in range(2):
        expected, alone = alone_step({"w": grads}, alone)
    chex.assert_trees_all_equal(*jax.device_get(((updates, state), (expected, alone))))


@pytest.mark.parametrize("types", [(_EXPLICIT, _AUTO), (_EXPLICIT, _EXPLICIT)], ids=str)
@pytest.mark.parametrize("name", ["adam", "gefen", "gefen across shards"])
def test_vmap_alone_over_an_explicit_axis(name, types):
    """As with Adam, once the state is cut as the members are: its counts, too."""
    mesh = _mesh(types)
    plan = gx.plan_by_shape(_struct()) if name == "gefen across shards" else _plan(mesh)
    tx = optax.scale_by_adam() if name == "adam" else gx.scale_by_gefen(plan=plan)
    grads = _grads()["w"].reshape(2, *_LOCAL)
    cut = {"w": jax.device_put(grads, NamedSharding(mesh, P("x", None, "y")))}
    update = jax.jit(jax.vmap(tx.update))
    with jax.set_mesh(mesh):
        state = jax.jit(jax.vmap(tx.init), out_shardings=NamedSharding(mesh, P("x")))(cut)
        step = update.lower(cut, state).compile()
        for _ in range(2):
            updates, state = step(cut, jax.device_put(state, step.input_shardings[0][1]))
    assert updates["w"].sharding.spec[0] == "x"
    # Only jax 0.10 gathers around a `shard_map` that leaves out an Explicit axis.
    if name == "adam" or (name == "gefen" and (types[1] == _AUTO or _IS_NEW)):
        assert collectives(step.as_text()) == []
    alone = jax.vmap(tx.init)({"w": grads})
    for _ in range(2):
        expected, alone = update({"w": grads}, alone)
    chex.assert_trees_all_equal(*jax.device_get(((updates, state), (expected, alone))))
