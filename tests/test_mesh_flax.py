"""Parameters that Flax places on a mesh, by nnx's metadata and by linen's boxes.

Stepped with a plan for the mesh they have the state's bits of the same program on one device.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

_AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
_SHAPE = (64, 256)
_NAMES = {"both": ("x", "y"), "columns": (None, ("x", "y"))}  # runs of 256 cross these shards


_STEPS = 5
_RATE = 1e-2


def _assert_same(ours: tuple[Any, Any], alone: tuple[Any, Any]) -> None:
    """The bits of states; and parameters, for which XLA may round a product before it is added.

    Or not: that is half an ulp, of the largest, for each of two sums in every step.
    """
    (params, state), (expected, expected_state) = jax.device_get((ours, alone))
    chex.assert_trees_all_equal(state, expected_state)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(params, expected, rtol=0, atol=_STEPS * 2 * 2.0**-24 * largest)


def _mesh(axis_type: AxisType) -> Any:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type, axis_type))


def _model(names: Any) -> nnx.Linear:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return nnx.Linear(*_SHAPE, use_bias=False, rngs=nnx.Rngs(0), kernel_init=init)


@functools.cache
def _grads(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(_SHAPE).astype(np.float32)


def _nnx_run(model: nnx.Linear, plan: gx.Plan) -> tuple[Any, Any]:
    """Kernel and state after all steps, which change the model in place."""
    optimizer = nnx.Optimizer(model, gx.gefen(_RATE, plan=plan), wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    params, at = nnx.state(model, nnx.Param), model.kernel.get_value().sharding
    for i in range(_STEPS):
        grads = jax.device_put(_grads(i), at)
        step(model, optimizer, jax.tree.map(lambda _, grads=grads: grads, params))
    return model.kernel.get_value(), nnx.as_pure(optimizer.opt_state)


@functools.cache
def _nnx_alone(plan: gx.Plan) -> tuple[Any, Any]:
    """On one device, without metadata."""
    return jax.device_get(_nnx_run(_model(None), plan))


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_nnx_optimizer(axis_type):
    names = _NAMES["columns"]
    with jax.set_mesh(_mesh(axis_type)):
        model = _model(names)
        params = nnx.state(model, nnx.Param)
        plan = gx.plan_by_shape(params)
        assert plan.across_shards(params) == {}
        kernel, state = _nnx_run(model, plan)
    at = NamedSharding(kernel.sharding.mesh, P(*names))
    for x in (kernel, state[0].mu["kernel"], state[0].scale["kernel"], state[0].nu["kernel"]):
        assert x.sharding.is_equivalent_to(at, 2)
    _assert_same((kernel, state), _nnx_alone(plan))


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_nnx_optimizer_whose_blocks_cross_shards(axis_type):
    """JAX refuses it, since nnx asks for shards of one entry; `across_shards` names the leaf."""
    with jax.set_mesh(_mesh(axis_type)):
        model = _model(_NAMES["columns"])
        plan = gx.plan_by_shape({"kernel": jax.ShapeDtypeStruct(_SHAPE, jnp.float32)})
        crossing = plan.across_shards(nnx.state(model, nnx.Param))
        assert crossing == {"kernel": "blocks of 1x256 cross shards of (64, 32)"}
        with pytest.raises(ValueError, match="divi"):
            nnx.Optimizer(model, gx.gefen(1e-2, plan=plan), wrt=nnx.Param)


@pytest.mark.parametrize("names", _NAMES.values(), ids=_NAMES)
def test_linen_boxes(names):
    """What `nn.get_partition_spec` says of boxed shapes gives the plan of the boxes and of the
    arrays in them.
    """
    init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
    model, mesh = nn.Dense(_SHAPE[1], kernel_init=init), _mesh(AxisType.Auto)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, _SHAPE[0])))
    specs = nn.get_partition_spec(boxed)
    plan = gx.plan_by_shape(boxed, specs=specs, mesh=mesh)
    assert plan["params/kernel"].kind == gx.DualCode((1, 64) if names[0] else (1, 32))
    assert plan == gx.plan_by_shape(nn.unbox(boxed), specs=specs, mesh=mesh)
    tx = gx.gefen(1e-2, plan=plan)
    where = gx.state_sharding(tx, boxed, specs, mesh=mesh)[0]
    for tree in (where.mu, where.scale, where.nu):
        assert nn.unbox(tree)["params"]["kernel"].spec == P(*names)


_RULES = (("embed", "x"), ("mlp", "y"))  # logical names of axes, and the mesh's


def _boxed() -> tuple[nn.Dense, Any]:
    """A model with `LogicallyPartitioned` parameters, and their shapes."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model = nn.Dense(_SHAPE[1], use_bias=False, kernel_init=init)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, _SHAPE[0])))


def _on_mesh(tree: Any, mesh: Any) -> Any:
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(tree), mesh, _RULES)


def _optimizer(plan: gx.Plan | None) -> optax.GradientTransformation:
    """With a plan gefen, without one what it is compared with."""
    return optax.adamw(_RATE) if plan is None else gx.gefen(_RATE, plan=plan)


def _linen_train_state(plan: gx.Plan | None) -> tuple[TrainState, Any]:
    """Before the first step, on one device; and a step."""
    model, _ = _boxed()
    params = model.init(jax.random.key(0), jnp.zeros((1, _SHAPE[0])))
    tx = _optimizer(plan)
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(train, grads):
        return train.apply_gradients(grads=jax.tree.map(lambda _: grads, train.params))

    return train, step


@functools.cache
def _linen_alone(plan: gx.Plan | None) -> tuple[Any, Any]:
    train, step = _linen_train_state(plan)
    for i in range(_STEPS):
        train = step(train, _grads(i))
    return jax.device_get((train.params, train.opt_state))


@pytest.mark.parametrize("is_gefen", [True, False], ids=["gefen", "adamw"])
@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_linen_train_state_of_logical_boxes(axis_type, is_gefen):
    """Boxes and all lie where Flax's own rules say."""
    mesh, (_, shapes) = _mesh(axis_type), _boxed()
    plan = gx.plan_by_shape(shapes, specs=_on_mesh(shapes, mesh)) if is_gefen else None
    assert plan is None or plan["params/kernel"].kind == gx.DualCode((1, 64))
    train, step = _linen_train_state(plan)
    where = _on_mesh(jax.eval_shape(lambda: train), mesh)
    at = nn.unbox(where.params)["params"]["kernel"]
    assert at.spec == P("x", "y")
    on_mesh = jax.device_put(train, where)
    for i in range(_STEPS):
        on_mesh = step(on_mesh, jax.device_put(_grads(i), at))
    for x, s in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    _assert_same((on_mesh.params, on_mesh.opt_state), _linen_alone(plan))


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_linen_boxes_whose_blocks_cross_shards(axis_type):
    """JAX refuses Flax's shardings of the statistics; `gx.state_sharding` gives others."""
    mesh, (_, shapes) = _mesh(axis_type), _boxed()
    at = _on_mesh(shapes, mesh)
    plan = gx.plan_by_shape(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes))
    assert list(plan.across_shards(shapes, at)) == ["params/kernel"]
    tx = gx.gefen(_RATE, plan=plan)
    state = jax.eval_shape(tx.init, shapes)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    with pytest.raises(ValueError, match="divi"):
        jax.device_put(zeros, _on_mesh(state, mesh))
    jax.device_put(zeros, gx.state_sharding(tx, shapes, at))
