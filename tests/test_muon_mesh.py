"""Muon on a mesh: the momentum of one device, and the communication of `optax.contrib.muon`.

Newton-Schulz needs the whole matrix, so something has to travel in every step. With a plan for the
mesh that is what travels in Optax's Muon, and nothing for the momentum's blocks.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Dims
from simulate_mesh import collectives

import gefen_jax as gx
from gefen_jax._momentum import storage_for

_AUTO, _EXPLICIT = AxisType.Auto, AxisType.Explicit
_STEPS, _RATE = 20, 1e-2


class Layout(NamedTuple):
    """A mesh of 8 devices, a leaf, where it lies and where its momentum does, and its blocks."""

    axes: dict[str, int]
    params: P
    state: P
    blocks: dict[int, tuple[int, ...]]  # by bits, those that share a scale
    shape: tuple[int, ...] = (32, 256)
    dims: Dims | None = None


_BOTH, _STACK = P("fsdp", "tensor"), P("expert", "fsdp", None)
_LAYOUTS = {
    # A group of 64 would cross shards of 32 columns.
    "tensor": Layout({"tensor": 8}, P(None, "tensor"), P(None, "tensor"), {4: (1, 32)}),
    "both": Layout({"fsdp": 2, "tensor": 4}, _BOTH, _BOTH, {8: (1, 64), 4: (1, 64)}),
    "zero-1": Layout({"data": 8}, P(None, None), P(None, "data"), {8: (1, 32), 4: (1, 32)}),
    "experts": Layout(
        {"expert": 4, "fsdp": 2}, _STACK, _STACK, {8: (1, 2, 128)}, (4, 16, 128), Dims(1, 2)
    ),
}
_CASES = [("tensor", 4, _AUTO), ("both", 8, _AUTO), ("both", 4, _EXPLICIT)]
_CASES += [("zero-1", 8, _AUTO), ("zero-1", 4, _EXPLICIT), ("experts", 8, _AUTO)]


def _mesh(layout: Layout, axis_type: AxisType) -> Mesh:
    sizes, names = tuple(layout.axes.values()), tuple(layout.axes)
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def _leaf(layout: Layout, seed: int) -> Any:
    return {"w": np.random.default_rng(seed).standard_normal(layout.shape).astype(np.float32)}


def _struct(layout: Layout, mesh: Mesh) -> Any:
    at = NamedSharding(mesh, layout.state)
    return {"w": jax.ShapeDtypeStruct(layout.shape, jnp.float32, sharding=at)}


def _step(tx: Any) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def _muon(name: str, bits: int | None, plan: gx.Plan | None) -> Any:
    dims = {"muon_weight_dimension_numbers": _LAYOUTS[name].dims}
    if bits is None:
        return optax.contrib.muon(_RATE, **dims)
    return gx.gefen_muon(_RATE, bits=bits, plan=plan, **dims)


def _compiled(name: str, tx: Any, axis_type: AxisType) -> Any:
    """A step, and where parameters and state lie."""
    layout = _LAYOUTS[name]
    mesh = _mesh(layout, axis_type)
    at = {"w": NamedSharding(mesh, layout.params)}
    where = gx.state_sharding(tx, _struct(layout, mesh))
    args = jax.eval_shape(lambda p: (p, tx.init(p), p), _leaf(layout, 0))
    args = jax.tree.map(lambda x, s: x.update(sharding=s), args, (at, where, at))
    step = jax.jit(_step(tx), out_shardings=(at, where, at))
    return step.lower(*args).compile(), at, where


@functools.cache
def _bytes_of_optax(name: str) -> int:
    # On Auto axes: it refuses Explicit ones.
    step, _, _ = _compiled(name, _muon(name, None, None), _AUTO)
    return sum(c.nbytes for c in collectives(step.as_text()))


def _codes_and_scale(state: Any) -> Any:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, gx.ScaleByGefenMuonState))
    (muon,) = (x for x in nodes if isinstance(x, gx.ScaleByGefenMuonState))
    return muon.mu["w"], muon.scale["w"]


# As in test_muon.py: two programs of the iteration differ by up to 500 ulps of the largest update.
_ULPS, _ULP = 500, 2.0**-23


@pytest.mark.parametrize("name, bits, axis_type", _CASES)
def test_as_on_one_device_and_no_more_communication_than_optax(name, bits, axis_type):
    layout = _LAYOUTS[name]
    plan = gx.plan_by_shape(_struct(layout, _mesh(layout, axis_type)))
    tx = _muon(name, bits, plan)
    step, at, where = _compiled(name, tx, axis_type)
    assert sum(c.nbytes for c in collectives(step.as_text())) <= _bytes_of_optax(name)
    params = _leaf(layout, 0)
    here = params, tx.init(params)
    there = jax.device_put(here, (at, where))
    alone, largest = jax.jit(_step(tx)), 0.0
    for i in range(_STEPS):
        grads = _leaf(layout, 1 + i)
        *here, updates = alone(*here, grads)
        *there, _ = step(*there, jax.device_put(grads, at))
        largest = max(largest, float(jnp.abs(updates["w"]).max()))
    # What is remembered depends on gradients alone, so to the last bit.
    found = _codes_and_scale(there[1])
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(_codes_and_scale(here[1])))
    expected = NamedSharding(_mesh(layout, axis_type), layout.state)
    assert all(x.sharding.is_equivalent_to(expected, x.ndim) for x in found)
    blocks = tuple(d // n for d, n in zip(layout.shape, found[1].shape, strict=True))
    assert blocks == layout.blocks[bits]
    bound = _STEPS * _ULP * (_ULPS * largest + np.abs(here[0]["w"]).max())
    np.testing.assert_allclose(there[0]["w"], here[0]["w"], rtol=0, atol=bound)


# A leaf's columns, what a device has of them, and the group of 4 bits.
_GROUPS = {
    "uncut": (256, 256, 64),
    "as many as a group": (512, 64, 64),
    "fewer": (256, 32, 32),
    "no multiple": (192, 96, 48),
    "an odd group": (148, 74, 37),
    "bytes cross shards": (74, 37, 64),
    "only smaller ones divide": (508, 254, 64),
}


@pytest.mark.parametrize("case", _GROUPS)
def test_groups_of_four_bits_cross_no_shards(case):
    columns, here, group = _GROUPS[case]
    kind = gx.SharedBlocks((1, columns))
    storage = storage_for(kind, (8, columns), 4, (8, here))
    assert storage.block is not None and math.prod(storage.block) == group
