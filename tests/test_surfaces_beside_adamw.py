"""Every surface where an Optax optimizer is used, with `optax.adamw` in the same place.

Most are traced only: what breaks on a surface is a structure, a shape or a dtype that changes. That
gefen computes there what it computes elsewhere is for `test_surfaces.py`. `docs/surfaces.md` lists
all.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

_MAKE: dict[str, Callable[..., Any]] = {"gefen": gx.gefen, "adamw": optax.adamw}


def _params(dtype: Any = jnp.float32) -> Any:
    w = np.random.default_rng(0).standard_normal((17, 256))
    return {"w": jnp.asarray(w, dtype), "b": jnp.ones(8, dtype)}


@pytest.fixture(params=_MAKE)
def make(request) -> Callable[..., Any]:
    return _MAKE[request.param]


def _step(tx: Any) -> Callable[..., Any]:
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _stable(tx: Any, params: Any) -> None:
    """One step changes no structure, shape or dtype."""
    before = jax.eval_shape(lambda p: (p, tx.init(p)), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(_step(tx), *before), before)


# Transformations around it ----------------------------------------------------------------------

_WRAPPERS: dict[str, Callable[..., Any]] = {
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(1e-2)),
    "masked": lambda make: optax.masked(make(1e-2), {"w": True, "b": False}),
    "partition": lambda make: optax.partition(
        {"a": make(1e-2), "z": optax.set_to_zero()}, {"w": "a", "b": "z"}
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(learning_rate=1e-2),
    "MultiSteps": lambda make: optax.MultiSteps(make(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(1e-2), 3),
    "schedule_free": lambda make: optax.contrib.schedule_free(make(1e-2), 1e-2),
    "mechanize": lambda make: optax.contrib.mechanize(make(1e-2)),
}


@pytest.mark.parametrize("name", _WRAPPERS)
def test_wrapped(make, name):
    _stable(_WRAPPERS[name](make), _params())


# Uses -------------------------------------------------------------------------------------------


def _map_params(tx):
    state = tx.init(_params())
    same = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(same, state)
    assert optax.tree.get(state, "count") == 0


def _abstract(tx):
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), _params())
    assert jax.eval_shape(tx.init, structs) == jax.eval_shape(jax.jit(tx.init), _params())


def _scan(tx):
    def run(params):
        carry = params, tx.init(params)  # the first step, too, is inside
        return jax.lax.scan(lambda carry, _: (_step(tx)(*carry), None), carry, length=3)[0]

    jax.eval_shape(jax.jit(run), _params())


def _cond(tx):
    def skip(params, state):
        spike = optax.tree.norm(params) > 1e6
        return jax.lax.cond(spike, lambda *now: now, _step(tx), params, state)

    jax.eval_shape(skip, _params(), jax.eval_shape(tx.init, _params()))


def _vmap(tx):
    members = jax.tree.map(lambda p: jnp.stack([p, p]), _params())
    state = jax.eval_shape(jax.vmap(tx.init), members)
    after = jax.eval_shape(jax.vmap(_step(tx)), members, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (members, state))


def _donation(tx):
    params = _params()
    state = tx.init(params)
    donated = jax.jit(lambda *now: jax.tree.map(jnp.copy, now), donate_argnums=(0, 1))
    after = donated(params, state)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    chex.assert_trees_all_equal(after[1], tx.init(after[0]))


def _linen(tx):
    model = nn.Dense(256)

    def run(key):
        train = TrainState.create(
            apply_fn=model.apply, params=model.init(key, jnp.ones((2, 17))), tx=tx
        )
        return train, train.apply_gradients(grads=train.params)

    before, after = jax.eval_shape(run, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(after.opt_state, before.opt_state)


def _linen_boxes(tx):
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "x"))

    def run(key):
        params = nn.Dense(256, kernel_init=init).init(key, jnp.ones((2, 17)))
        return params, tx.init(params)

    params, state = jax.eval_shape(run, jax.random.key(0))
    after = jax.eval_shape(_step(tx), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))
    # The moments carry the names.
    specs = nn.get_partition_spec(after[1][0])
    assert all(s["params"]["kernel"] == P(None, "x") for s in (specs.mu, specs.nu))


def _nnx(tx):
    def run():
        model = nnx.Linear(17, 256, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        before = nnx.state(optimizer)
        optimizer.update(model, nnx.state(model, nnx.Param))
        return before, nnx.state(optimizer)

    chex.assert_trees_all_equal_shapes_and_dtypes(*nnx.eval_shape(run))


def _nnx_on_a_mesh(tx):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", None))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        model = nnx.Linear(32, 256, use_bias=False, rngs=nnx.Rngs(0), kernel_init=init)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
        step(model, optimizer, nnx.state(model, nnx.Param))
    state = nnx.as_pure(optimizer.opt_state)[0]
    for x in (model.kernel.get_value(), state.mu["kernel"], state.nu["kernel"]):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)


def _equinox(tx):
    model = eqx.nn.Linear(17, 256, key=jax.random.key(0))
    _stable(tx, eqx.filter(model, eqx.is_inexact_array))


def _msgpack(tx):
    state = tx.init(_params())
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)


def _extra_args(tx):
    def step(params):
        tx_with_extra = optax.with_extra_args_support(tx)
        return tx_with_extra.update(params, tx.init(params), params, loss=1.0)

    jax.eval_shape(step, _params())


def _none_leaf(tx):
    _stable(tx, {**_params(), "frozen": None})


def _empty_and_scalar(tx):
    _stable(tx, {"empty": jnp.zeros((0, 3)), "scalar": jnp.zeros(())})


def _half(dtype):
    def use(tx):
        _stable(tx, _params(dtype))
        _stable(tx, {"w": _params()["w"], "b": _params(dtype)["b"]})

    return use


def _schedule(tx):
    del tx  # it has a constant rate
    for make in _MAKE.values():
        _stable(make(optax.linear_schedule(1e-2, 0.0, 10)), _params())


_USES: dict[str, Callable[[Any], None]] = {
    "tree.map_params, tree.get": _map_params,
    "eval_shape(init), jit(init)": _abstract,
    "scan": _scan,
    "skip by cond": _cond,
    "vmap": _vmap,
    "donation": _donation,
    "linen TrainState": _linen,
    "linen's boxes": _linen_boxes,
    "nnx.Optimizer": _nnx,
    "nnx on a mesh": _nnx_on_a_mesh,
    "equinox": _equinox,
    "msgpack": _msgpack,
    "extra args": _extra_args,
    "None": _none_leaf,
    "empty, scalar": _empty_and_scalar,
    "bfloat16": _half(jnp.bfloat16),
    "float16": _half(jnp.float16),
    "schedule": _schedule,
}


@pytest.mark.parametrize("name", _USES)
def test_used(make, name):
    _USES[name](make(1e-2))


def test_gradients_of_zero(make):
    tx, params = make(1e-2, weight_decay=0.0), _params()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    now = params, tx.init(params)
    for _ in range(3):
        now = step(*now)
    chex.assert_trees_all_equal(now[0], params)


# Many devices -----------------------------------------------------------------------------------


def _rows() -> Any:
    """Enough for a leaf whose eighth is coded, and its gradient."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((32, 2048)), jnp.float32)


def _block_optimizer(make: Callable[..., Any], shape: tuple[int, ...]) -> Any:
    if make is optax.adamw:
        return make(1e-2)
    # Blocks that no cut crosses and that round without dither: the same anywhere.
    plan = gx.plan_by_shape({"w": jnp.zeros(shape)}, kind="shared_blocks")
    return make(1e-2, plan=plan.with_kind("w", gx.SharedBlocks((1, 256))))


# A compiled sum may be fused with a product: a few ulps of an update of at most 1e-2.
_ATOL = 1e-2 * 2.0**-20


def test_shard_map(make):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = _block_optimizer(make, (4, 2048))  # made from the local shapes

    def first(params):
        return tx.update(params, tx.init(params), params)[0]

    spread = jax.jit(jax.shard_map(first, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    whole = _block_optimizer(make, (32, 2048))
    params = {"w": _rows()}
    expected, _ = whole.update(params, whole.init(params), params)
    np.testing.assert_allclose(spread(params)["w"], expected["w"], rtol=0, atol=_ATOL)


def test_a_plan_of_global_shapes_in_shard_map_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = _block_optimizer(gx.gefen, (32, 2048))
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P("x"), out_specs=P())
    with pytest.raises(
        ValueError, match=r"`w` of shape \(32, 2048\), found \(4, 2048\).*shard_map"
    ):
        jax.eval_shape(init, {"w": _rows()})


def test_pmap(make):
    tx, params = _block_optimizer(make, (32, 2048)), {"w": _rows()}
    two = jax.tree.map(lambda p: jnp.stack([p, p]), params)

    def first(params):
        return tx.update(jax.lax.pmean(params, "i"), tx.init(params), params)[0]

    updates = jax.pmap(first, axis_name="i", devices=jax.devices()[:2])(two)["w"]
    expected, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates[0], updates[1])
    np.testing.assert_allclose(updates[0], expected["w"], rtol=0, atol=_ATOL)


def test_pinned_host(make):
    tx, params = _block_optimizer(make, (17, 256)), {"w": _params()["w"]}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device")
    host = device.with_memory_kind("pinned_host")

    @jax.jit
    def step(params, state):
        params, state = _step(tx)(params, jax.device_put(state, device))
        return params, jax.device_put(state, host)

    state = jax.device_put(tx.init(params), host)
    new, after = step(params, state)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(after)} == {"pinned_host"}
    expected = jax.jit(_step(tx))(params, tx.init(params))
    np.testing.assert_allclose(new["w"], expected[0]["w"], rtol=0, atol=_ATOL)


# Where they differ ------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What gefen refuses, and what adamw makes of it."""

    use: Callable[[Any], Any]
    error: type[Exception]
    match: str
    adamw: Callable[[Any], bool]  # of the use's result


def _cast(tx):
    state = optax.tree.cast(tx.init(_params()), jnp.bfloat16)
    return jax.eval_shape(_step(tx), _params(), state)[1]


def _complex(tx):
    return jax.eval_shape(tx.init, {"w": jnp.zeros(3, complex)})


def _derivative(tx):
    def total(grads):
        updates, _ = tx.update(grads, tx.init(grads), grads)
        return jnp.sum(updates["w"])

    return jax.eval_shape(jax.grad(total), _params())


_DIFFERENCES = {
    # AdamW goes on, with moments and a count of 8 bits' precision: it stops at 256.
    "tree.cast": Difference(
        _cast,
        ValueError,
        r"tree\.cast",
        lambda state: optax.tree.get(state, "count").dtype == jnp.bfloat16,
    ),
    "complex": Difference(_complex, TypeError, r"`params\[w\]` is complex64", lambda state: True),
    "jax.grad": Difference(
        _derivative, NotImplementedError, "Exact", lambda grads: grads["w"].shape == (17, 256)
    ),
}


@pytest.mark.parametrize("name", _DIFFERENCES)
def test_difference(name):
    difference = _DIFFERENCES[name]
    with pytest.raises(difference.error, match=difference.match):
        difference.use(gx.gefen(1e-2))
    assert difference.adamw(difference.use(optax.adamw(1e-2)))


def test_integer_leaves():
    # AdamW makes float moments of an integer leaf's: its state changes its dtype at once.
    params = {"w": _params()["w"], "steps": jnp.arange(3)}
    grads = {"w": params["w"], "steps": jnp.zeros(3, jnp.int32)}

    def dtypes(tx):
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, grads, state, params)
        return [[x.dtype for x in jax.tree.leaves(s)] for s in (state, after)]

    before, after = dtypes(gx.gefen(1e-2))
    assert before == after
    before, after = dtypes(optax.adamw(1e-2))
    assert before != after


# The list ---------------------------------------------------------------------------------------


def test_the_list_names_tests_that_exist():
    root = Path(__file__).parent.parent
    rows = (root / "docs" / "surfaces.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)", rows))
    assert len(named) > 20
    for file, test in named:
        source = (root / "tests" / file).read_text()
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
    for table in (_WRAPPERS, _USES, _DIFFERENCES):
        for name in table:
            assert f"[{name}]" in rows, name
