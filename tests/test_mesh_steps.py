"""Steps on a mesh: the bits of one device, no communication, updates that lie where parameters do.

Plans are made for the mesh, so no block crosses a shard and every device works through its own in
pieces, which are small here. Beside it optax.adamw, where the same is true.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_memory import whole
from simulate_mesh import collectives, placed

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._blocks import Axis, row_major
from gefen_jax._dither import Place, positions
from gefen_jax._fused_leaf import _step_jitted
from gefen_jax._shards import shards_of
from gefen_jax._specs import Partition
from gefen_jax._transform import _update_leaf
from gefen_jax._types import Moments

_STEPS = 20
_RATE = 1e-2
_FOR_NONE = 1 << 30  # elements of a piece that no leaf here has


@contextlib.contextmanager
def _pieces(size: int) -> Iterator[None]:
    def forget() -> None:
        for jitted in (_update_leaf, _step_jitted):  # they know the leaves with other pieces
            jitted.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "CHUNK", size)
        forget()
        yield
    forget()


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Shards of these tests are a few thousand elements."""
    with _pieces(1024):
        yield


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


# Of all axes, or of each.
_AxisTypes = AxisType | tuple[AxisType, ...]


def _mesh(axes: dict[str, int], types: _AxisTypes) -> Mesh:
    types = (types,) * len(axes) if isinstance(types, AxisType) else types
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


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
def _plan(rank: int) -> gx.Plan:
    """With a leaf in dual code, one in shared blocks, and one of exact moments."""
    layout = _LAYOUTS[_FINEST[rank]]
    params, where = _tree(layout, 0), _where(layout)
    shared = gx.plan_by_shape(params, kind="shared_blocks", **where)["shared"]
    plan = gx.plan_by_shape(params, **where).with_kind("shared", shared.kind)
    assert [plan[k].kind.name for k in params] == ["dual_code", "shared_blocks", "exact"]
    return plan


def _plan_here(layout: Layout) -> gx.Plan:
    """The same, which knows this mesh, too."""
    plan, params, where = _plan(len(layout.shape)), _tree(layout, 0), _where(layout)
    assert plan.across_shards(params, **where) == {}
    here = gx.plan_by_shape(params, **where)
    leaves = (dataclasses.replace(x, partition=here[x.path].partition) for x in plan.leaves)
    return dataclasses.replace(plan, leaves=tuple(leaves))


_OPTIMIZERS = {
    "adamw": lambda plan: optax.adamw(_RATE, weight_decay=0.1),
    "gefen": lambda plan: gx.gefen(_RATE, weight_decay=0.1, plan=plan),
    "gefen, whole": lambda plan: gx.gefen(_RATE, weight_decay=0.1, plan=whole(plan)),
    "split": lambda plan: gx.with_split_weights(
        gx.fused_gefen(_RATE, weight_decay=0.1, nesterov=True, plan=plan), bits=16
    ),
}


def _start(optimizer: str, layout: Layout) -> Any:
    params = _tree(layout, 0)
    return gx.split_weights(params)[0] if optimizer == "split" else params


def _only_init(tx: Any) -> optax.GradientTransformation:
    """What `state_sharding` asks for, of a `FusedGefen`, too."""
    return optax.GradientTransformation(tx.init, optax.identity().update)


def _step(tx):
    if isinstance(tx, gx.FusedGefen):
        return lambda params, state, grads: (*tx.step(grads, state, params), None)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


@functools.cache
def _on_one_device(optimizer: str, rank: int, in_one: bool) -> Any:
    """Parameters and state after all steps, of leaves as a whole or in pieces."""
    if in_one:
        # The mean of a shared block may be summed in another order there.
        with _pieces(_FOR_NONE):
            return _on_one_device.__wrapped__(optimizer, rank, False)
    layout = _LAYOUTS[_FINEST[rank]]
    tx = _OPTIMIZERS[optimizer](_plan(rank))
    step, state = jax.jit(_step(tx)), tx.init(_tree(layout, 0))
    params = _start(optimizer, layout)
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


def _compiled(optimizer: str, name: str, types: _AxisTypes) -> Compiled:
    layout = _LAYOUTS[name]
    mesh = _mesh(layout.axes, types)
    # Explicit axes say themselves how leaves are cut.
    plan = _plan_here(layout) if mesh.auto_axes else _plan(len(layout.shape))
    tx = _OPTIMIZERS[optimizer](plan)

    def on_mesh(spec):
        return {k: NamedSharding(mesh, s) for k, s in _specs(spec).items()}

    at = on_mesh(layout.spec)
    params = jax.device_put(_start(optimizer, layout), at)
    where = gx.state_sharding(_only_init(tx), params, on_mesh(layout.state or layout.spec))
    state = jax.device_put(tx.init(_tree(layout, 0)), where)
    jitted = jax.jit(_step(tx), out_shardings=(at, where, None), donate_argnums=(0, 1))
    step = jitted.lower(params, state, jax.device_put(_tree(layout, 0), at)).compile()
    return Compiled(step, params, state, at, where)


_AUTO, _EXPLICIT, _MANUAL = AxisType.Auto, AxisType.Explicit, AxisType.Manual
_MIXED = (_AUTO, _EXPLICIT)

# (optimizer, layout, types of axes)
_CASES = [("gefen", name, types) for name in _LAYOUTS for types in (_AUTO, _EXPLICIT)]
_CASES += [("gefen", "stages", _MIXED)]
_CASES += [("gefen, whole", "fsdp", _AUTO), ("adamw", "zero-1", _AUTO)]
_CASES += [("split", "fsdp 4 x tensor 2", types) for types in (_AUTO, _MIXED[::-1])]
_CASES += [("split", "zero-1", _EXPLICIT)]


@pytest.mark.parametrize("optimizer, name, types", _CASES)
def test_same_bits_and_no_communication(optimizer, name, types):
    step, params, state, at, where = _compiled(optimizer, name, types)
    layout = _LAYOUTS[name]
    found = collectives(step.as_text())
    in_one = optimizer in ("adamw", "gefen, whole")
    assert in_one != (" while(" in step.as_text())
    if layout.state is None:
        assert found == []
    else:
        # The state alone is cut, so something has to travel: the updates of two leaves, or their
        # parameters. (A CPU gathers bfloat16 as float32.)
        assert found and sum(c.nbytes for c in found) <= 2 * 4 * np.prod(layout.shape)
    updates = None
    for i in range(_STEPS):
        grads = jax.device_put(_tree(layout, 1 + i), at)
        params, state, updates = step(params, state, grads)
    for x, s in zip(jax.tree.leaves((params, state)), jax.tree.leaves((at, where)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    if layout.state is None and updates is not None:
        for key, update in updates.items():
            assert update.sharding.is_equivalent_to(at[key], update.ndim)
    # To the last bit: the same sums over the same elements, in whichever place they are.
    optimizer = optimizer.removesuffix(", whole")
    expected_params, expected_state = _on_one_device(optimizer, len(layout.shape), in_one)
    chex.assert_trees_all_equal(jax.device_get(state), expected_state)
    if layout.state is None:
        chex.assert_trees_all_equal(jax.device_get(params), expected_params)
        return
    # An update that travels is rounded before it is added, others may be fused with the addition:
    # an ulp per step of a parameter that was at most _STEPS * _RATE larger (weight decay included).
    for key, expected in expected_params.items():
        bound = _STEPS * 2.0**-23 * (np.abs(expected) + 2 * _STEPS * _RATE)
        assert np.all(np.abs(np.asarray(params[key]) - expected) <= bound)


# What a device steps alone ----------------------------------------------------------------------

_DUAL, _SHARED = gx.DualCode((1, 256)), gx.SharedBlocks((64, 1))
_XY = (("x", 2), ("y", 4))


class Known(NamedTuple):
    """What is known of a leaf on axes x and y, and what a device steps of it."""

    local: tuple[int, ...] | None
    kind: Any = _DUAL
    partition: Partition | None = Partition(_XY, ("x",))
    spec: P = P(None, None)  # in the gradient's type
    held: P = P(None, None)  # in the state's
    types: tuple[AxisType, AxisType] = (_AUTO, _AUTO)


_KNOWN = {
    "Auto axes, in the plan": Known((64, 512)),
    "both axes": Known((64, 128), _SHARED, Partition(_XY, ("x", "y"))),
    "replicated": Known((128, 512), partition=Partition(_XY, ())),
    "nothing": Known(None, partition=None),
    "another mesh": Known(None, partition=Partition((("x", 2), ("y", 2)), ("x",))),
    "axes in another order": Known(None, partition=Partition(_XY[::-1], ("x",))),
    "blocks cross": Known(None, partition=Partition(_XY, (None, "y"))),
    "no blocks": Known(None, gx.Exact()),
    "flat periods": Known(None, gx.FlatPeriods(1024, 1024)),
    "Explicit axes, in the types": Known(
        (64, 512), spec=P("x", None), held=P("x", None), types=(_EXPLICIT, _EXPLICIT)
    ),
    "a state that nobody placed": Known((64, 512), spec=P("x", None), types=(_EXPLICIT,) * 2),
    "a state that is cut further": Known(
        (16, 512), spec=P("x", None), held=P(("x", "y"), None), types=(_EXPLICIT, _EXPLICIT)
    ),
    "a state elsewhere": Known(
        None, spec=P("y", None), held=P("x", None), types=(_EXPLICIT, _EXPLICIT)
    ),
    "a state that is cut less": Known(
        None, spec=P(("x", "y"), None), held=P("x", None), types=(_EXPLICIT, _EXPLICIT)
    ),
    "blocks cross, Explicit": Known(
        None, spec=P(None, "y"), held=P(None, "y"), types=(_EXPLICIT, _EXPLICIT)
    ),
    "axes of two types": Known(
        (64, 128), _SHARED, Partition(_XY, ("x", "y")), P(None, "y"), P(None, "y"), _MIXED
    ),
    "axes of two types, cut over one": Known((64, 512), types=_MIXED),
    "axes of two types, the state alone cut": Known(
        (64, 128), _SHARED, Partition(_XY, ("x", "y")), held=P(None, "y"), types=_MIXED
    ),
    "a plan that says otherwise than types": Known(
        None, _SHARED, Partition(_XY, ("x",)), P(None, "y"), P(None, "y"), _MIXED
    ),
    "axes of two types, not in the plan": Known(None, partition=None, types=_MIXED),
    "an axis that is Manual": Known(
        (32, 512), partition=Partition(_XY, ("y",)), types=(_MANUAL, _AUTO)
    ),
    "a plan for what is Manual": Known(None, types=(_MANUAL, _AUTO)),
    "an axis that is Manual, one that is Explicit": Known(
        (32, 512), partition=None, spec=P("y", None), held=P("y", None), types=(_MANUAL, _EXPLICIT)
    ),
    "both Manual": Known(None, types=(_MANUAL, _MANUAL)),
}


@pytest.mark.parametrize("case", _KNOWN)
def test_what_a_device_steps_alone(case):
    known, found = _KNOWN[case], []
    mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=known.types)

    def see(g, mu):
        moments = Moments(mu, None, None)
        found.append(shards_of(known.kind, known.partition, g, moments))

    def struct(spec):
        return jax.ShapeDtypeStruct((128, 512), jnp.float32, sharding=NamedSharding(mesh, spec))

    jax.eval_shape(see, struct(known.spec), struct(known.held))
    assert (found[0] and found[0].local) == known.local


def test_an_uneven_leaf_is_not_cut():
    mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=(_AUTO, _AUTO))
    assert Partition(_XY, ("x",)).local((129, 512), mesh) is None
    assert Partition(_XY, ("x",)).local((1, 128, 512), mesh) is None  # a layer of cut layers
    assert Partition(_XY, (None, "x")).local((1, 128, 512), mesh) == (1, 64, 512)


@pytest.mark.parametrize("local", [(3, 5, 8), (6, 5, 2), (2, 5, 4), (1, 1, 1), (6, 5, 8)])
def test_positions_of_a_part(local):
    shape = (6, 5, 8)
    expected = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    start = tuple(d - s for d, s in zip(shape, local, strict=True))
    part = expected[tuple(slice(a, None) for a in start)]
    place = Place(jnp.uint32(part.flat[0]), row_major(shape))
    np.testing.assert_array_equal(positions(local, place), part)
    index = jnp.arange(math.prod(local), dtype=jnp.uint32)
    distances = Axis(local, row_major(shape)).distances(index)
    np.testing.assert_array_equal(distances, part.ravel() - part.flat[0])


@pytest.mark.parametrize("cut", ["across blocks", "between blocks"])
@pytest.mark.parametrize("make", [gx.gefen, gx.fused_gefen])
def test_zero_1_on_explicit_axes_leaves_everything_where_it_is(make, cut):
    """Stepped by every device or, where blocks cross shards, by the compiler."""
    mesh = _mesh({"data": 8}, _EXPLICIT)
    spec = P("data", None) if cut == "between blocks" else P(None, "data")

    def struct(spec):
        return jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, spec))

    params = {"w": struct(P(None, None))}
    tx = make(_RATE, plan=gx.plan_by_shape(params))
    where = gx.state_sharding(_only_init(tx), {"w": struct(spec)})
    state = jax.tree.map(
        lambda x, s: x.update(sharding=s),
        jax.eval_shape(tx.init, {"w": np.zeros((64, 512))}),
        where,
    )
    new_params, new_state, _ = jax.eval_shape(jax.jit(_step(tx)), params, state, params)
    assert new_params["w"].sharding.spec == P(None, None)
    for x, s in zip(jax.tree.leaves(new_state), jax.tree.leaves(where), strict=True):
        assert x.sharding.spec == s.spec


@pytest.mark.parametrize("name", ["gefen", "fused"])
def test_temporaries_are_those_of_a_leaf_like_the_shard(name):
    def temporaries(params, plan):
        tx = (gx.gefen if name == "gefen" else gx.fused_gefen)(_RATE, plan=plan)
        state = jax.eval_shape(tx.init, params)
        if params["w"].sharding is not None:
            state = placed(_only_init(tx), params)
        # Without the updates, which nobody needs afterwards.
        step = jax.jit(lambda *args: _step(tx)(*args)[:2], donate_argnums=(0, 1))
        return step.lower(params, state, params).compile().memory_analysis().temp_size_in_bytes

    at = NamedSharding(_mesh({"x": 4, "y": 2}, AxisType.Auto), P("x", "y"))
    params = {"w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32, sharding=at)}
    local = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    plan, alone = gx.plan_by_shape(params), temporaries(local, gx.plan_by_shape(local))
    # A few scalars more: the shard's place.
    assert temporaries(params, plan) <= alone + 1024
    # The whole form needs an array of float32, and more.
    assert temporaries(params, whole(plan)) > alone + 4 * 512 * 512


def test_an_ensemble_over_its_own_axis():
    """Under `vmap` nobody knows where the mapped axis lies: whole leaves, and no communication."""
    mesh = _mesh({"member": 4, "fsdp": 2}, AxisType.Auto)
    one = jax.ShapeDtypeStruct((32, 512), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    plan = gx.plan_by_shape({"w": one})
    tx, alone = gx.scale_by_gefen(plan=plan), gx.scale_by_gefen(plan=whole(plan))
    grads = {"w": np.random.default_rng(0).standard_normal((4, 32, 512)).astype(np.float32)}

    def put(x):
        spec = P("member", "fsdp") if x.ndim == 3 else P("member")
        return jax.device_put(x, NamedSharding(mesh, spec))

    state = jax.vmap(alone.init)(grads)
    args = jax.tree.map(put, (grads, state))
    step = jax.jit(jax.vmap(tx.update)).lower(*args).compile()
    assert collectives(step.as_text()) == []
    expected = jax.jit(jax.vmap(alone.update))(grads, state)
    chex.assert_trees_all_equal(jax.device_get(step(*args)), jax.device_get(expected))


def test_in_the_users_own_shard_map():
    """Arrays are local: stepped in pieces, each as a leaf of its own."""
    mesh = _mesh({"x": 8}, AxisType.Auto)
    local = {"w": jax.ShapeDtypeStruct((16, 512), jnp.float32)}
    tx = gx.scale_by_gefen(plan=gx.plan_by_shape(local))
    grads = {"w": np.random.default_rng(0).standard_normal((128, 512)).astype(np.float32)}
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), jax.eval_shape(tx.init, local))
    specs = specs._replace(codebook=P(), codebook4=P())

    def two_steps(grads):
        state = tx.init(grads)
        _, state = tx.update(grads, state)
        return tx.update(grads, state)

    first = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P("x"), out_specs=specs))(grads)
    in_specs = (P("x"), specs)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=in_specs, out_specs=in_specs)
    step = jax.jit(update).lower(grads, first).compile()
    assert " while(" in step.as_text() and collectives(step.as_text()) == []
    _, state = step(*jax.device_put((grads, first), step.input_shardings[0]))
    updates, state = step(*jax.device_put((grads, state), step.input_shardings[0]))
    expected = [jax.jit(two_steps)({"w": part}) for part in np.split(grads["w"], 8)]
    for i, (direction, new) in enumerate(expected):
        part = slice(16 * i, 16 * (i + 1))
        np.testing.assert_array_equal(updates["w"][part], direction["w"])
        np.testing.assert_array_equal(state.mu["w"][part], new.mu["w"])


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


@pytest.mark.parametrize("axis_type", [_AUTO, _EXPLICIT])
def test_wide_codes(axis_type):
    """What two elements share a byte of lies on their shard."""
    grads = {"w": jax.random.normal(jax.random.key(0), (32, 512))}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    cut = jax.device_put(grads, NamedSharding(mesh, P("x", "y")))
    plan = gx.plan_by_shape(cut, kind="wide_dual_code")
    assert plan["w"].kind == gx.WideDualCode((1, 256))
    tx = gx.scale_by_gefen(plan=plan)
    expected = jax.jit(tx.update)(grads, tx.init(grads))
    step = jax.jit(tx.update).lower(cut, jax.jit(tx.init)(cut)).compile()
    assert collectives(step.as_text()) == []
    chex.assert_trees_all_equal(*jax.device_get((step(cut, jax.jit(tx.init)(cut)), expected)))
