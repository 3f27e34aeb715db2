"""Parameters that Flax places on a mesh, by nnx's metadata and by linen's boxes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

_AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
_SHAPE = (64, 256)
_NAMES = {"both": ("x", "y"), "columns": (None, ("x", "y"))}  # runs of 256 cross these shards


def _mesh(axis_type: AxisType) -> Any:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type, axis_type))


def _model(names: Any) -> nnx.Linear:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return nnx.Linear(*_SHAPE, use_bias=False, rngs=nnx.Rngs(0), kernel_init=init)


def test_nnx_optimizer():
    names = _NAMES["columns"]
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        model = _model(names)
        params = nnx.state(model, nnx.Param)
        plan = gx.plan_by_shape(params)
        assert plan.across_shards(params) == {}
        optimizer = nnx.Optimizer(model, gx.gefen(1e-2, plan=plan), wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
        step(model, optimizer, params)
    state, kernel = nnx.as_pure(optimizer.opt_state)[0], model.kernel.get_value()
    at = NamedSharding(kernel.sharding.mesh, P(*names))
    for x in (kernel, state.mu["kernel"], state.scale["kernel"], state.nu["kernel"]):
        assert x.sharding.is_equivalent_to(at, 2)


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
