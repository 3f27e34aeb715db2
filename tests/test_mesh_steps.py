"""Steps on a mesh: the bits of one device, no communication, updates that lie where parameters do.

Plans are made for the mesh, so no block crosses a shard and every number of a step is made of what
one device holds. Beside it optax.adamw, where the same is true.
"""

import functools
from typing import Any, NamedTuple

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

_STEPS = 20
_RATE = 1e-2


class Layout(NamedTuple):
    """A mesh of 8 devices, the shape of two leaves, and their spec there."""

    axes: dict[str, int]
    shape: tuple[int, ...]
    spec: P
    state: P | None = None  # where the state lies, if not as the parameters


_LAYOUTS = {
    "fsdp": Layout({"fsdp": 8}, (64, 512), P("fsdp", None)),
    "tensor": Layout({"tensor": 8}, (64, 512), P(None, "tensor")),
    "fsdp 2 x tensor 4": Layout({"fsdp": 2, "tensor": 4}, (64, 512), P("fsdp", "tensor")),
    "fsdp 4 x tensor 2": Layout({"fsdp": 4, "tensor": 2}, (64, 512), P("tensor", "fsdp")),
    "data parallel": Layout({"data": 8}, (64, 512), P(None, None)),
    "zero-1": Layout({"data": 8}, (64, 512), P(None, None), state=P("data", None)),
    "experts": Layout({"expert": 4, "fsdp": 2}, (4, 32, 256), P("expert", None, "fsdp")),
    "stages": Layout({"stage": 4, "tensor": 2}, (4, 32, 256), P("stage", "tensor", None)),
}
# By rank, the layouts with the narrowest shards: a plan for them fits the others.
_FINEST = {2: "tensor", 3: "experts"}


def _mesh(axes: dict[str, int], axis_type: AxisType) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def _tree(layout: Layout, seed: int) -> Any:
    """On the host: what is donated is gone."""
    rng = np.random.default_rng(seed)
    shapes = {"dual": layout.shape, "shared": layout.shape, "bias": layout.shape[-1:]}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _specs(spec: P) -> Any:
    return {"dual": spec, "shared": spec, "bias": P(None)}


def _where(layout: Layout) -> Any:
    """The layout of a state, as the arguments of what makes plans."""
    mesh = _mesh(layout.axes, AxisType.Auto)
    return {"specs": _specs(layout.state or layout.spec), "mesh": mesh}


@functools.cache
def _gefen(rank: int) -> tuple[gx.Plan, optax.GradientTransformation]:
    """With a leaf in dual code, one in shared blocks, and one of exact moments."""
    layout = _LAYOUTS[_FINEST[rank]]
    params, where = _tree(layout, 0), _where(layout)
    shared = gx.plan_by_shape(params, kind="shared_blocks", **where)["shared"]
    plan = gx.plan_by_shape(params, **where).with_kind("shared", shared.kind)
    assert [plan[k].kind.name for k in params] == ["dual_code", "shared_blocks", "exact"]
    return plan, gx.gefen(_RATE, weight_decay=0.1, plan=plan)


def _optimizer(name: str, layout: Layout) -> optax.GradientTransformation:
    if name == "adamw":
        return optax.adamw(_RATE, weight_decay=0.1)
    plan, tx = _gefen(len(layout.shape))
    assert plan.across_shards(_tree(layout, 0), **_where(layout)) == {}
    return tx


def _step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


@functools.cache
def _on_one_device(optimizer: str, rank: int) -> Any:
    """Parameters and state after all steps."""
    layout = _LAYOUTS[_FINEST[rank]]
    tx = _optimizer(optimizer, layout)
    params, step = _tree(layout, 0), jax.jit(_step(tx))
    state = tx.init(params)
    for i in range(_STEPS):
        params, state, _ = step(params, state, _tree(layout, 1 + i))
    return jax.device_get((params, state))


class Compiled(NamedTuple):
    """A step on a mesh, its first arguments, and where parameters and state lie."""

    step: Any
    params: Any
    state: Any
    at: Any
    where: Any


def _compiled(optimizer: str, name: str, axis_type: AxisType) -> Compiled:
    layout = _LAYOUTS[name]
    tx, mesh = _optimizer(optimizer, layout), _mesh(layout.axes, axis_type)

    def on_mesh(spec):
        return {k: NamedSharding(mesh, s) for k, s in _specs(spec).items()}

    at = on_mesh(layout.spec)
    params = jax.device_put(_tree(layout, 0), at)
    where = gx.state_sharding(tx, params, on_mesh(layout.state or layout.spec))
    state = jax.device_put(tx.init(_tree(layout, 0)), where)
    jitted = jax.jit(_step(tx), out_shardings=(at, where, None), donate_argnums=(0, 1))
    step = jitted.lower(params, state, params).compile()
    return Compiled(step, params, state, at, where)


# (optimizer, layout, type of axes)
_CASES = [("gefen", name, AxisType.Auto) for name in _LAYOUTS]
_CASES += [("gefen", name, AxisType.Explicit) for name in ("fsdp 2 x tensor 4", "zero-1")]
_CASES += [("adamw", "zero-1", AxisType.Auto)]


@pytest.mark.parametrize("optimizer, name, axis_type", _CASES)
def test_same_bits_and_no_communication(optimizer, name, axis_type):
    step, params, state, at, where = _compiled(optimizer, name, axis_type)
    layout = _LAYOUTS[name]
    found = collectives(step.as_text())
    if layout.state is None:
        assert found == []
    else:
        # The state alone is cut, so something has to travel: the updates of two leaves, 4 bytes per
        # element. On Explicit axes they come out as the gradient lies, and the codes travel, too.
        per_element = 4 + (axis_type == AxisType.Explicit)
        assert found and sum(c.nbytes for c in found) <= 2 * per_element * np.prod(layout.shape)
    updates = None
    for i in range(_STEPS):
        grads = jax.device_put(_tree(layout, 1 + i), at)
        params, state, updates = step(params, state, grads)
    for x, s in zip(jax.tree.leaves((params, state)), jax.tree.leaves((at, where)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    if layout.state is None:
        for key, update in updates.items():
            assert update.sharding.is_equivalent_to(at[key], update.ndim)
    # To the last bit: the same sums over the same elements, in whichever place they are.
    expected_params, expected_state = _on_one_device(optimizer, len(layout.shape))
    chex.assert_trees_all_equal(jax.device_get(state), expected_state)
    if layout.state is None:
        chex.assert_trees_all_equal(jax.device_get(params), expected_params)
        return
    # An update that travels is rounded before it is added, others may be fused with the addition:
    # an ulp per step of a parameter that was at most _STEPS * _RATE larger (weight decay included).
    for key, expected in expected_params.items():
        bound = _STEPS * 2.0**-23 * (np.abs(expected) + 2 * _STEPS * _RATE)
        assert np.all(np.abs(np.asarray(params[key]) - expected) <= bound)


# Gradients computed on the mesh -----------------------------------------------------------------

_MLP = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"] - y))


def _train(tx: Any, params: Any, batch: Any) -> tuple[Any, list[float]]:
    """Parameters and losses."""

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(_loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(_STEPS):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return jax.device_get(params), losses


def test_training_on_a_mesh():
    """The gradient's sums are taken in another order; a code near a threshold then falls otherwise.

    That moves an element's update by less than the learning rate, for as long as the moment
    remembers, 10 steps. If it happens to a thousandth of the codes per step (as in
    test_state_sharding.py), parameters are a fifth of the rate apart after 20 steps, on average.
    """
    rate = _RATE / 10
    mesh, rng = _mesh({"fsdp": 2, "tensor": 4}, AxisType.Auto), np.random.default_rng(0)
    shapes = {"up": (64, 128), "down": (128, 16)}  # in dual code, and with exact moments
    params = {k: (rng.standard_normal(s) / 16).astype(np.float32) for k, s in shapes.items()}
    batch = [rng.standard_normal((32, n)).astype(np.float32) for n in (64, 16)]
    at = {k: NamedSharding(mesh, s) for k, s in _MLP.items()}
    spread = jax.device_put(params, at), jax.device_put(batch, NamedSharding(mesh, P("fsdp")))
    for name, tx in {
        "adamw": optax.adamw(rate),
        "gefen": gx.gefen(rate, plan=gx.plan_by_shape(spread[0])),
    }.items():
        (alone, losses), (got, on_mesh) = _train(tx, params, batch), _train(tx, *spread)
        assert losses[-1] < 0.6 * losses[0], name
        np.testing.assert_allclose(on_mesh, losses, rtol=1e-3, err_msg=name)
        for key, expected in alone.items():
            assert np.mean(np.abs(got[key] - expected)) < 0.2 * rate, (name, key)


def test_blocks_that_cross_shards_communicate():
    """What a plan for the mesh saves; and that collectives are found where there are some."""
    mesh, layout = _mesh({"tensor": 8}, AxisType.Auto), _LAYOUTS["tensor"]
    at = NamedSharding(mesh, layout.spec)
    struct = jax.ShapeDtypeStruct(layout.shape, jnp.float32)
    plan = gx.plan_by_shape({"w": struct})
    assert plan.across_shards({"w": struct}, at) == {
        "w": "blocks of 1x256 cross shards of (64, 64)"
    }
    tx, params = gx.scale_by_gefen(plan=plan), {"w": struct.update(sharding=at)}
    state = jax.tree.map(
        lambda x, s: x.update(sharding=s),
        jax.eval_shape(tx.init, params),
        gx.state_sharding(tx, params),
    )
    found = collectives(jax.jit(tx.update).lower(params, state).compile().as_text())
    assert max(c.nbytes for c in found) > plan["w"].nbytes - struct.size  # the leaf's statistics


def test_collectives_in_the_text_of_a_program():
    text = """
      %a.1 = f32[64,512]{1,0} all-gather(%x), channel_id=2, replica_groups=[1,8]<=[8]
      %b = (bf16[4]{0}, pred[3]{0}) all-reduce(%y, %z), to_apply=%add
      %c = (u8[8]{0}, u8[64]{0}) all-gather-start(%v), dimensions={0}
      %d = u8[64]{0} all-gather-done(%c)
      %e = f32[] fusion(%a.1), metadata={op_name="all-gather(x)"}
    """
    assert collectives(text) == [("all-gather", 131072), ("all-reduce", 11), ("all-gather", 72)]
