"""Plans for a mesh: no block crosses a shard, whoever says where the parameters lie."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from simulate_mesh import MESHES, MODELS, bytes_per_device, placed, structs

import gefen_jax as gx
from gefen_jax._blocks import runs_divide, stats_shape
from gefen_jax._candidates import block_by_shape, candidate_blocks, dual_block
from gefen_jax._paths import LeafSpec

_KINDS = ["dual_code", "shared_blocks"]


def _mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _structs(shapes: Any) -> Any:
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


# The rule ---------------------------------------------------------------------------------------

# (path, shape, what a device holds, block of the dual code, shared block); None: exact moments.
_BLOCKS = {
    "uncut": ("w", (512, 1024), (512, 1024), (1, 256), (1, 1024)),
    "rows": ("w", (512, 1024), (128, 1024), (1, 256), (1, 1024)),
    "columns": ("w", (512, 1024), (512, 128), (1, 128), (512, 1)),
    "narrow columns": ("w", (512, 1024), (512, 32), (1, 32), (512, 1)),
    "columns too narrow": ("w", (512, 64), (512, 8), (256, 1), (512, 1)),
    "both": ("w", (512, 1024), (128, 128), (1, 128), (1, 128)),
    "narrow both": ("w", (512, 256), (64, 32), (1, 32), (1, 32)),
    "narrower than any": ("w", (64, 128), (8, 8), None, None),
    "an output layer": ("w", (256, 4096), (256, 512), (256, 1), (256, 1)),
    "an output layer's rows": ("w", (256, 4096), (32, 4096), (32, 1), (1, 1024)),
    "experts": ("w", (8, 64, 512), (1, 64, 512), (1, 1, 256), (1, 1, 512)),
    "experts' columns": ("w", (8, 64, 512), (1, 64, 128), (1, 1, 128), (1, 1, 128)),
    "heads": ("w", (64, 16, 64), (64, 2, 64), (1, 2, 64), (1, 1, 64)),
    "odd columns": ("w", (512, 8 * 37), (512, 37), (256, 1), (512, 1)),
    "a long vector": ("w", (100_000,), (12_500,), (250,), (1250,)),
}


@pytest.mark.parametrize("case", _BLOCKS)
def test_blocks(case):
    path, shape, local, dual, shared = _BLOCKS[case]
    names = tuple(f"axis{i}" for i in range(len(shape)))
    mesh = _mesh(**{n: d // s for n, d, s in zip(names, shape, local, strict=True)})
    params = _structs({path: shape})
    for kind, expected in zip(_KINDS, (dual, shared), strict=True):
        leaf = gx.plan_by_shape(params, kind=kind, specs=P(*names), mesh=mesh)[path]
        assert getattr(leaf.kind, "block", None) == expected
        assert str(local) in leaf.reason or local == shape


_SIZES = st.sampled_from([1, 2, 3, 8, 12, 16, 37, 64, 96, 128, 250, 256, 640, 1000])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(_SIZES, st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=4))
def test_blocks_fit_and_are_those_of_one_device_where_nothing_is_cut(axes):
    local, shape = tuple(n for n, _ in axes), tuple(n * k for n, k in axes)
    spec = LeafSpec("w", shape, True)
    blocks = candidate_blocks(shape, local)
    for block in blocks:
        cut = [d != s for d, s in zip(shape, local, strict=True)]
        # Uncut axes may have a shorter last run.
        assert all(s % b == 0 for s, b, c in zip(local, block, cut, strict=True) if c)
        if runs_divide(local, block):
            counts = zip(stats_shape(shape, block), stats_shape(local, block), axes, strict=True)
            assert all(whole == part * k for whole, part, (_, k) in counts)
    dual = dual_block(spec, None, local)
    if dual is not None:
        assert runs_divide(local, dual)
    if local[-1] < shape[-1] and local[-1] % 2 == 0 and 16 <= local[-1] <= 256:
        assert dual is not None
    if math.prod(shape) > 4096:
        assert candidate_blocks(shape, shape) == candidate_blocks(shape)
        assert block_by_shape(shape, shape) == block_by_shape(shape)
        assert dual_block(spec, None, shape) == dual_block(spec)


# Who says where the parameters lie --------------------------------------------------------------

_SHAPES = {"up": (128, 1024), "down": (1024, 128), "bias": (1024,)}
_SPECS = {"up": P("x", "y"), "down": P("y", "x"), "bias": P("y")}


def _sharded(axis_type=AxisType.Auto) -> Any:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type, axis_type))
    return mesh, {k: NamedSharding(mesh, s) for k, s in _SPECS.items()}


@pytest.mark.parametrize("kind", _KINDS)
def test_all_ways_to_say_it_are_one(kind):
    mesh, at = _sharded()
    bare = {k: np.zeros(s, np.float32) for k, s in _SHAPES.items()}
    expected = gx.plan_by_shape(bare, kind=kind, specs=_SPECS, mesh=mesh)
    assert expected["up"].kind.block == (1, 256)
    assert expected != gx.plan_by_shape(bare, kind=kind)
    structs = {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=at[k]) for k, s in _SHAPES.items()}
    explicit_mesh, explicit = _sharded(AxisType.Explicit)
    assert explicit_mesh != mesh
    arrays = jax.device_put(bare, explicit)
    plans = []
    jax.jit(lambda params: plans.append(gx.plan_by_shape(params, kind=kind)))(arrays)
    plans += [
        gx.plan_by_shape(params, kind=kind)
        for params in (structs, arrays, jax.device_put(bare, at))
    ]
    plans.append(gx.plan_by_shape(bare, kind=kind, specs=at))
    plans.append(gx.plan_by_shape(bare, kind=kind, specs=_SPECS, mesh=_mesh(x=2, y=4)))
    assert plans == [expected] * len(plans)
    # A spec for a part of the tree; a leaf that lies nowhere.
    whole = gx.plan_by_shape({"model": bare}, kind=kind, specs=P(), mesh=mesh)
    assert whole["model/up"].kind == gx.plan_by_shape(bare, kind=kind)["up"].kind
    mixed = gx.plan_by_shape({**structs, "down": bare["down"]}, kind=kind)
    assert mixed["up"] == expected["up"]
    assert mixed["down"] == gx.plan_by_shape(bare, kind=kind)["down"]


_AXES = (("x", 2), ("y", 4))


def test_plans_say_how_leaves_are_cut(tmp_path):
    mesh, at = _sharded()
    grads = {k: np.ones(s, np.float32) for k, s in _SHAPES.items()}
    spread = jax.device_put(grads, at)
    several = {"up": P(("y", "x"), None), "down": P(), "bias": P("y")}
    partitions = {
        "by shape": (gx.plan_by_shape(spread), [("x", "y"), ("y", "x"), ("y",)]),
        "calibrated": (gx.calibrate(grads, spread), [("x", "y"), ("y", "x"), ("y",)]),
        "several axes": (
            gx.plan_by_shape(grads, specs=several, mesh=mesh),
            [(("y", "x"),), (), ("y",)],
        ),
        "nowhere": (gx.plan_by_shape(grads), [None, None, None]),
    }
    for name, (plan, specs) in partitions.items():
        expected = [None if spec is None else (_AXES, spec) for spec in specs]
        assert [plan[k].partition for k in _SHAPES] == expected, name
        assert plan.with_kind("up", gx.Exact())["up"].partition == expected[0]
        plan.save(tmp_path / "plan.json")
        loaded = gx.Plan.load(tmp_path / "plan.json")
        assert loaded == plan and hash(loaded) == hash(plan)
        assert loaded["up"].partition == plan["up"].partition
    assert '"mesh"' not in (tmp_path / "plan.json").read_text()  # of the last one, as ever


def test_tracers_on_auto_axes_say_nothing():
    _, at = _sharded()
    bare, plans = {k: np.zeros(s, np.float32) for k, s in _SHAPES.items()}, []
    jax.jit(lambda params: plans.append(gx.plan_by_shape(params)))(jax.device_put(bare, at))
    assert plans == [gx.plan_by_shape(bare)]


def test_pairs_of_another_axis_fit_too():
    params, mesh = _structs({"w": (1024, 512)}), _mesh(x=8)
    plan = gx.plan_by_shape(params, pair_axis={"w": 0}, specs=P("x"), mesh=mesh)
    assert plan["w"].kind == gx.DualCode((128, 1))
    assert plan["w"].reason == "as asked: 128 along axis 0, in shards of (128, 512)"


_REFUSED = {
    "does not divide": (P("x"), _mesh(x=8), r"`params\[w\]` of shape \(12, 1024\) cannot be cut"),
    "rank": (P(None, None, "x"), _mesh(x=8), r"`params\[w\]` of shape \(12, 1024\) cannot be cut"),
    "no mesh": (P("x"), None, "`mesh` must be given"),
    "logical names": (P("embed"), _mesh(x=8), r"`params\[w\]` by .*no axis 'embed', only \('x',\)"),
    "other specs": ({"v": P()}, _mesh(x=8), "`specs` must be a tree like `params`"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refused_by_name(case):
    specs, mesh, match = _REFUSED[case]
    params = _structs({"w": (12, 1024)})
    plan, grads = gx.plan_by_shape(params), {"w": np.zeros((12, 1024), np.float32)}
    for ask in (
        lambda: gx.plan_by_shape(params, specs=specs, mesh=mesh),
        lambda: gx.calibrate(params, grads, specs=specs, mesh=mesh),
        lambda: plan.across_shards(params, specs, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=match):
            ask()


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_llama_on_many_devices(model, devices):
    """Two layers of the full width, beside embedding and head; every device has its share."""
    axes = MESHES[devices]
    params = structs(MODELS[model], _mesh(**axes), 2)
    assert math.prod(axes.values()) == devices
    plan = gx.plan_by_shape(params)
    assert plan.across_shards(params) == {}
    # At worst, shards of 16 columns in dual code.
    assert plan.bytes_per_param < (1.021 if devices < 4096 else 1 + 5 / 16)
    state = placed(gx.gefen(1e-3, plan=plan), params)
    share = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / devices
    # Codebooks are on every device, norms on all along the axis tensor: about a thousandth.
    assert share <= bytes_per_device(state) <= 1.002 * share


# Calibration ------------------------------------------------------------------------------------


def _gradient(seed: int, shape: tuple[int, int], by: int) -> np.ndarray:
    """Noise whose size varies along one axis."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal([n if i == by else 1 for i, n in enumerate(shape)]))
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def test_calibrated_blocks_fit():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    at = NamedSharding(mesh, P(None, "x"))
    grads = {"w": _gradient(0, (32, 512), by=0)}
    # Its structure is that of rows of 512, of which a device holds a half.
    fitting = gx.calibrate(grads, grads, specs=P(None, "x"), mesh=mesh)
    assert fitting["w"].kind.block == (1, 256)
    assert "in shards of (32, 256)" in fitting["w"].reason
    assert fitting.across_shards(grads, at) == {}
    spread = jax.device_put(grads, at)
    replicated = jax.device_put(grads, NamedSharding(mesh, P()))
    assert gx.calibrate(spread, grads) == fitting  # where parameters lie
    assert gx.calibrate(replicated, [spread]) == fitting  # if they are not cut, where gradients do
    flat = gx.calibrate(spread, grads, rule="reference")  # knows nothing of meshes
    assert list(flat.across_shards(spread)) == ["w"]


def test_calibration_without_evidence_fits_too():
    params = _structs({"zero": (128, 1024), "none": (128, 1024), "narrow": (64, 128)})
    grads = {"zero": np.zeros((128, 1024), np.float32), "none": None}
    grads["narrow"] = np.ones((64, 128), np.float32)
    specs = {"zero": P(None, "x"), "none": P("x", None), "narrow": P("y", "x")}
    plan = gx.calibrate(params, grads, specs=specs, mesh=_mesh(x=16, y=8))
    assert plan["zero"].kind.block == (128, 1)
    assert plan["zero"].reason.endswith("128 along axis 0, in shards of (128, 64)")
    assert plan["none"].kind.block == (1, 1024) and plan["none"].reason.startswith("no gradient")
    assert plan["narrow"].kind == gx.Exact()
    assert plan["narrow"].reason == "no block fits shards of (8, 8)"
    grads["narrow"][3, 5] = np.nan
    with pytest.raises(ValueError, match="the gradient of `narrow` holds NaN"):
        gx.calibrate(params, grads, specs=specs, mesh=_mesh(x=16, y=8))


# A plan on another mesh -------------------------------------------------------------------------


def test_across_shards_names_every_kind():
    params = _structs({k: (128, 1024) for k in ("dual", "shared", "flat", "exact", "fits")})
    params["steps"] = jax.ShapeDtypeStruct((128, 1024), jnp.int32)
    plan = gx.plan_by_shape(params)
    plan = plan.with_kind("shared", gx.SharedBlocks((1, 1000))).with_kind("exact", gx.Exact())
    plan = plan.with_kind("flat", gx.FlatPeriods(64, 64)).with_kind("fits", gx.DualCode((64, 1)))
    assert plan.across_shards(params) == {}
    assert plan.across_shards(params, P(), mesh=_mesh(x=8)) == {}
    assert plan.across_shards(params, P(None, "x"), mesh=_mesh(x=8)) == {
        "dual": "blocks of 1x256 cross shards of (128, 128)",
        "shared": "blocks of 1x1000 cross shards of (128, 128)",
        "flat": "blocks of 64 flat cross shards of (128, 128)",
    }
    # Runs of another axis do not mind that the last of them is shorter.
    assert "shared" not in plan.across_shards(params, P("x"), mesh=_mesh(x=8))
    with pytest.raises(ValueError, match="the plan has no leaf `w`"):
        plan.across_shards(_structs({"w": (128, 1024)}))
    with pytest.raises(ValueError, match=r"the plan expects `dual` of shape \(128, 1024\)"):
        plan.across_shards(_structs({"dual": (64, 512)}))


def test_a_plan_fits_meshes_with_coarser_shards():
    params = _structs(_SHAPES)
    plan = gx.plan_by_shape(params, specs=_SPECS, mesh=_mesh(x=4, y=8))
    for axes in ({"x": 2, "y": 4}, {"x": 1, "y": 8}, {"x": 4, "y": 1}):
        assert plan.across_shards(params, _SPECS, mesh=_mesh(**axes)) == {}
    assert plan.across_shards(params, _SPECS, mesh=_mesh(x=8, y=16))


def test_replan_takes_a_state_to_the_mesh():
    """The bounds that `replan` states: nu within 1/32 of the mean of its new pair; mu within half
    the largest gap between the codebook's entries, times the scale and nu's root.
    """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, P(None, "x"))
    grads = {"w": _gradient(3, (64, 256), by=0)}
    old = gx.plan_by_shape(grads)
    assert list(old.across_shards(grads, at)) == ["w"]
    tx = gx.gefen(1e-2, plan=old)
    _, state = tx.update(grads, tx.init(grads), grads)
    new = gx.plan_by_shape(grads, specs=at)
    assert new.across_shards(grads, at) == {} and new["w"].kind.block == (1, 32)
    moved = gx.replan(state, grads, old, new)
    before, after = (gx.to_adam(s, grads, plan=p)[0] for s, p in ((state, old), (moved, new)))
    blocks = (64, 8, 2, 16)  # halves of runs of 32
    nu = np.asarray(before.nu["w"], np.float64).reshape(blocks).mean(axis=2, keepdims=True)
    moved_nu = np.asarray(after.nu["w"], np.float64).reshape(blocks)
    kept = nu > 2.0**-15 * nu.max(axis=(2, 3), keepdims=True)  # levels are of 16 octaves
    assert np.mean(kept) > 0.99
    assert np.all((np.abs(moved_nu - nu) <= nu / 32 * (1 + 2**-20)) | ~kept)
    scale = np.asarray(moved[0].scale["w"], np.float64)[:, :, None, None]
    gap = np.diff(np.sort(np.asarray(moved[0].codebook4))).max()
    error = np.abs(np.asarray(before.mu["w"], np.float64) - after.mu["w"]).reshape(blocks)
    assert np.all(error <= gap / 2 * scale * np.sqrt(moved_nu) * (1 + 2**-20))
    # And it lies as the parameters do, every statistic of it.
    tx, params = gx.gefen(1e-2, plan=new), jax.device_put(grads, at)
    where = gx.state_sharding(tx, params)
    assert {x["w"].spec for x in (where[0].mu, where[0].scale, where[0].nu)} == {P(None, "x")}
    jax.device_put(moved, where)
