"""A checkpoint of one mesh goes on on another, with fewer devices, finer shards, another plan.

What is computed there is compared with the same on one device, from the same checkpoint: bits.
"""

import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from simulate_mesh import collectives

import gefen_jax as gx

_AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
_SHAPES = {"w": (64, 512), "b": (8,)}
_RATE = 1e-2
# Of 8 devices, and of 4, whose shards are half as wide as the blocks of a plan for the former.
_OLD, _NEW = ({"x": 4, "y": 2}, P("x", "y")), ({"z": 4}, P(None, "z"))


def _tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in _SHAPES.items()}


def _at(where: tuple[dict[str, int], P], axis_type: AxisType) -> Any:
    axes, spec = where
    devices = jax.devices()[: int(np.prod([*axes.values()]))]
    types = (axis_type,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
    return {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P(None))}


def _placed_like(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state as structs with shardings: what orbax restores into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        gx.state_sharding(tx, params),
    )


def _through_orbax(path: Path, state: Any, like: Any) -> Any:
    with ocp.CheckpointManager(path) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(path) as manager:
        restored = manager.restore(0, args=ocp.args.StandardRestore(like))
    _assert_placed(restored, like)
    return restored


def _assert_placed(state: Any, like: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(expected.sharding, x.ndim)


def _assert_same(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal(*jax.device_get((a, b)))
    chex.assert_trees_all_equal_dtypes(a, b)


def _two_steps(tx: optax.GradientTransformation, params: Any, at: Any) -> Any:
    """The state after two steps, placed as `state_sharding` says."""
    where = gx.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=where)(params)
    step = jax.jit(tx.update, out_shardings=(at, where))
    for i in range(2):
        _, state = step(jax.device_put(_tree(1 + i), at), state, params)
    return state


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_another_mesh_then_another_plan(tmp_path, axis_type):
    old_at, at = _at(_OLD, axis_type), _at(_NEW, axis_type)
    old_params, params = jax.device_put(_tree(0), old_at), jax.device_put(_tree(0), at)
    old, new = gx.plan_by_shape(old_params), gx.plan_by_shape(params)
    assert list(old.across_shards(params)) == ["w"] and new.across_shards(params) == {}
    tx, new_tx = (gx.scale_by_gefen(plan=plan) for plan in (old, new))
    saved = _two_steps(tx, old_params, old_at)
    host = jax.device_get(saved)
    restored = _through_orbax(tmp_path / "run", saved, _placed_like(tx, params))
    _assert_same(restored, host)
    # The plan that the state was saved with works here: it only communicates.
    step, grads = jax.jit(tx.update), jax.device_put(_tree(3), at)
    _assert_same(step(grads, restored), step(_tree(3), host))
    # And another one, whose statistics lie as the parameters do.
    moved, host_moved = (
        gx.replan(*args, old, new) for args in ((restored, params), (host, _tree(0)))
    )
    _assert_same(moved, host_moved)
    _assert_placed(moved, _placed_like(new_tx, params))
    new_step = jax.jit(new_tx.update).lower(grads, moved).compile()
    assert collectives(new_step.as_text()) == []
    _assert_same(new_step(grads, moved), jax.jit(new_tx.update)(_tree(3), host_moved))


def _mesh_of_one(device: jax.Device) -> NamedSharding:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=[device])
    return NamedSharding(mesh, P())


_ONTO_ONE = {
    "sharding": lambda x, device: jax.device_put(x, jax.sharding.SingleDeviceSharding(device)),
    "mesh of one": lambda x, device: jax.device_put(x, _mesh_of_one(device)),
    "NumPy": lambda x, device: jax.device_put(jax.device_get(x), device),
}


@functools.cache
def _placed_and_stepped(optimizer: str, axis_type: AxisType) -> tuple[Any, Any, Any]:
    """Arguments of a step on the old mesh, the step, and what it gives on one device."""
    params = jax.device_put(_tree(0), _at(_OLD, axis_type))
    tx = optax.scale_by_adam()
    if optimizer == "gefen":
        tx = gx.scale_by_gefen(plan=gx.plan_by_shape(params))
    step = jax.jit(tx.update)
    return (params, tx.init(params)), step, step(_tree(0), tx.init(_tree(0)))


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
@pytest.mark.parametrize("optimizer", ["gefen", "adam"])
@pytest.mark.parametrize("way", _ONTO_ONE)
def test_from_a_mesh_onto_one_of_its_devices(way, optimizer, axis_type):
    """With the plan for the mesh."""
    placed, step, expected = _placed_and_stepped(optimizer, axis_type)
    device = jax.devices()[3]
    updates, state = step(*_ONTO_ONE[way](placed, device))
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == {device}
    _assert_same((updates, state), expected)


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
@pytest.mark.parametrize("optimizer", ["gefen", "adam"])
def test_after_device_put_types_still_name_the_mesh(optimizer, axis_type):
    """Only Adam, from Auto axes, goes on from there."""
    (params, state), step, expected = _placed_and_stepped(optimizer, axis_type)
    device = jax.devices()[3]
    placed = jax.device_put((params, state), device)
    step = jax.jit(functools.partial(step))  # which was not compiled for arrays on one device
    if (optimizer, axis_type) == ("adam", AxisType.Auto):
        _assert_same(step(*placed), expected)
        return
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)):
        jax.block_until_ready(step(*placed))


def test_a_checkpoint_of_adamw_and_back(tmp_path):
    old_at, at = _at(_OLD, AxisType.Explicit), _at(_NEW, AxisType.Explicit)
    params, host_params = jax.device_put(_tree(0), at), _tree(0)
    adamw, plan = optax.adamw(_RATE, weight_decay=0.1), gx.plan_by_shape(params)
    saved = _two_steps(adamw, jax.device_put(_tree(0), old_at), old_at)
    adam = _through_orbax(tmp_path / "adamw", saved, _placed_like(adamw, params))
    host_adam = jax.device_get(saved)

    tx = gx.gefen(_RATE, weight_decay=0.1, plan=plan)
    state, host = gx.from_adam(adam, params, plan), gx.from_adam(host_adam, host_params, plan)
    _assert_same(state, host)
    _assert_placed(state, _placed_like(tx, params))

    grads, step = jax.device_put(_tree(3), at), jax.jit(tx.update)
    (_, state), (_, host) = step(grads, state, params), step(_tree(3), host, host_params)
    _assert_same(state, host)
    saved = gx.to_adam(state, params, plan)
    back = _through_orbax(tmp_path / "back", saved, _placed_like(adamw, params))
    _assert_same(back, gx.to_adam(host, host_params, plan))
    updates, _ = jax.jit(adamw.update)(grads, back, params)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))
