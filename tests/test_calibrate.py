"""Calibration: planted structure is found, no leaf gets a bad block, and errors name the leaf."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax import _codebook
from gefen_jax._axis_rule import _evidence
from gefen_jax._blocks import block_size, check_block, runs_divide
from gefen_jax._candidates import block_by_shape, candidate_blocks
from gefen_jax._constants import MAX_BLOCK, MIN_BLOCK, NARROW_BLOCK, SMALL_LEAF
from gefen_jax._histogram import _count

pytestmark = pytest.mark.once

RULES = ["axis", "reference"]


@pytest.fixture
def histograms(monkeypatch) -> list[np.ndarray]:
    """Collects what codebooks would be learned from, and learns none: that takes a second."""
    seen = []

    def collect(histogram):
        seen.append(histogram)

    monkeypatch.setattr(_codebook, "learn", collect)
    monkeypatch.setattr(_codebook, "learn_reference", collect)
    return seen


# For tests that look at blocks only.
blocks_only = pytest.mark.usefixtures("histograms")


def _planted(shape: tuple[int, ...], block: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Normal numbers, times one size per block."""
    random = np.random.default_rng(seed)  # NumPy's: JAX would compile it for every shape
    blocks = [n // b for n, b in zip(shape, block, strict=True)]
    # Of |g|, a normal number alone has a variance of 1 - 2 / pi of its mean square. With k the mean
    # square of the sizes by the square of their mean, the true blocks explain 2 / pi * (k - 1) /
    # (k - 2 / pi): 61 % with k = exp(1.5^2), 47 % with k = 2, less than 64 % with any. Blocks of
    # twice the size explain half of that.
    sizes = np.kron(np.exp(1.5 * random.standard_normal(blocks)), np.ones(block))
    return jnp.asarray(sizes * random.standard_normal(shape), jnp.float32)


def _noise(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Structure --------------------------------------------------------------------------------------

# Leaf and planted block; the block found is the planted one.
PLANTED = {
    "rows": ((64, 512), (1, 512)),
    "columns": ((512, 64), (512, 1)),
    "runs of 256 along the last axis": ((8, 2048), (1, 256)),
    "runs of 512 along the first axis": ((2048, 16), (512, 1)),
    "two rows": ((64, 128), (2, 128)),
    "narrow rows": ((96, 144), (1, 144)),
    "narrow columns": ((144, 96), (144, 1)),
    "runs of a stacked leaf's middle axis": ((3, 144, 40), (1, 144, 1)),
    "output filters of a convolution": ((3, 3, 64, 64), (3, 3, 64, 1)),
    "heads": ((64, 4, 256), (1, 1, 256)),
    "a vector": ((16384,), (512,)),
}


@blocks_only
@pytest.mark.parametrize("name", PLANTED)
def test_planted_structure_is_found(name):
    shape, block = PLANTED[name]
    grads = {"w": _planted(shape, block)}
    leaf = gx.calibrate(grads, grads)["w"]
    assert leaf.kind == gx.SharedBlocks(block)
    share = int(leaf.reason.split(":")[1].split("%")[0])
    # Some dozens of sizes have a k from 2 on; where a block is small, its mean is not exact.
    assert leaf.reason.startswith("peak at ") and 45 <= share <= 66


@blocks_only
def test_what_a_batch_does_not_hold_is_no_evidence_for_sharing():
    # Rows of an embedding: most of the logarithm's variance is whether they are seen at all, which
    # boxes of two rows explain nearly as well as rows, where neighbours are seen together.
    random = np.random.default_rng(0)
    seen = np.repeat(random.random(128) < 0.3, 2)[:, None]
    sizes = np.exp(random.standard_normal((256, 1)))
    grads = {"w": jnp.asarray(seen * sizes * random.standard_normal((256, 144)), jnp.float32)}
    assert gx.calibrate(grads, grads)["w"].kind == gx.SharedBlocks((1, 144))


@blocks_only
def test_tokens_of_an_output_layer_share_nothing():
    # A tenth of the tokens have large gradients, all others small ones, whose inputs differ: that
    # is most of the logarithm's variance, and next to nothing of what the sizes are.
    random = np.random.default_rng(0)
    tokens = np.where(np.arange(512) % 10 == 0, 1.0, 0.01)
    inputs = np.exp(1.6 * random.standard_normal((144, 1)))
    g = np.where(tokens == 1, 1, inputs) * tokens * random.standard_normal((144, 512))
    grads = {"w": jnp.asarray(g, jnp.float32)}
    assert gx.calibrate(grads, grads)["w"].kind == gx.SharedBlocks((144, 1))


@blocks_only
def test_structure_in_larger_blocks_gets_blocks_of_the_target_size():
    # Any block inside of the planted one explains as much; 1024 is the size aimed for.
    grads = {"w": _planted((16, 4096), (1, 4096))}
    assert gx.calibrate(grads, grads)["w"].kind == gx.SharedBlocks((1, 1024))


# Leaf, planted flat period, and what the reference finds: the period, capped at the smallest
# divisor above 1024.
REFERENCE = {
    "rows": ((64, 128), 128, 128),
    "runs of 256": ((16, 1024), 256, 256),
    "beyond the cap": ((32, 8192), 8192, 2048),
}


@blocks_only
@pytest.mark.parametrize("name", REFERENCE)
def test_planted_periods_are_found_by_the_reference(name):
    shape, period, found = REFERENCE[name]
    flat = _planted((np.prod(shape).item() // period, period), (1, period))
    grads = {"w": flat.reshape(shape)}
    leaf = gx.calibrate(grads, grads, rule="reference")["w"]
    assert leaf.kind == gx.FlatPeriods(found, found)
    assert leaf.reason == f"reference: peak at {found}"


@blocks_only
def test_without_structure_blocks_follow_the_shape():
    grads = {"w": _noise(64, 512), "conv": _noise(3, 3, 64, 64), "long": _noise(8, 2048)}
    plan, by_shape = gx.calibrate(grads, grads), gx.plan_by_shape(grads, kind="shared_blocks")
    for leaf in plan.leaves:
        assert leaf.kind == by_shape[leaf.path].kind
        assert leaf.reason.startswith("no structure: ")


@blocks_only
def test_reasons():
    params = {
        "zero": jnp.zeros((64, 512)),
        "absent": jnp.zeros((64, 128)),
        "small": jnp.zeros((64, 64)),
        "bias": jnp.zeros(100),
        "planted": _planted((64, 512), (1, 512)),
        "prime": _noise(2, 4099),
        "integer": jnp.zeros(3, jnp.int32),
        "norm": jnp.zeros(5000),
        "large": jnp.zeros((1000, 1000)),
    }
    grads = {**params, "absent": None, "integer": None, "large": None}
    reasons = {
        "axis": {
            "zero": "zero gradient: by shape, ",
            "absent": "no gradient: by shape, ",
            "small": "small: at most 4096 elements",
            "bias": "small: at most 4096 elements",
            "planted": "peak at 512 along the last axis: ",
            "prime": "no run divides (2, 4099): ",
            "integer": "not a float: no state",
            "norm": "vectors are 0.47% of the model",
            "large": "no gradient: by shape, ",
        },
        "reference": {
            "zero": "reference: no peak",
            "absent": "reference: no peak",
            "small": "reference: no peak",
            "bias": "reference: no peak",
            "planted": "reference: peak at 512",
            "prime": "reference: ",
            "integer": "not a float: no state",
            "norm": "reference: no peak",
            "large": "reference: no peak",
        },
    }
    for rule, expected in reasons.items():
        plan = gx.calibrate(params, grads, rule=rule)
        assert {leaf.path for leaf in plan.leaves} == set(expected)
        for path, start in expected.items():
            assert plan[path].reason.startswith(start), (rule, path, plan[path].reason)


@blocks_only
@pytest.mark.parametrize("missing", [None, jnp.zeros((64, 512))])
def test_without_evidence_blocks_follow_the_shape(missing):
    params = {"w": jnp.ones((64, 512)), "v": jnp.ones((64, 512))}
    plan = gx.calibrate(params, {"w": missing, "v": _planted((64, 512), (64, 1))})
    assert plan["w"].kind == gx.plan_by_shape(params, kind="shared_blocks")["w"].kind


# Every shape gets a block of a sane size -------------------------------------------------------

_AXES = st.lists(st.integers(1, 400), min_size=1, max_size=4)
_LARGE = _AXES.map(tuple).filter(lambda s: SMALL_LEAF < np.prod(s, dtype=np.int64) < 10**8)


@given(_LARGE)
@settings(max_examples=150, deadline=None)
def test_any_large_leaf_gets_blocks_of_256_to_4096_or_of_a_short_axis(shape):
    blocks = candidate_blocks(shape)
    assert block_by_shape(shape) in blocks
    least = min([n for n in shape[-2:] if NARROW_BLOCK <= n], default=MIN_BLOCK)
    for block in blocks:
        check_block(shape, block)
        # The bounds hold for all; where no run divides, only the last one of an axis is shorter.
        assert min(least, MIN_BLOCK) <= block_size(block) <= MAX_BLOCK


@given(st.integers(SMALL_LEAF + 1, 10**9))
@settings(max_examples=100, deadline=None)
def test_any_long_vector_gets_blocks_of_256_to_4096(size):
    for shape in ((size,), (size, 1), (1, size)):
        block = block_by_shape(shape)
        check_block(shape, block)
        assert MIN_BLOCK <= block_size(block) <= MAX_BLOCK


ODD_SHAPES = [(100_003,), (101, 997), (67, 67), (2, 4099), (17, 17, 17), (1, 5000)]


@blocks_only
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_odd_shapes_calibrate(shape, rule):
    grads = {"w": _noise(*shape)}
    leaf = gx.calibrate(grads, grads, rule=rule)["w"]
    leaf.kind.check(shape)
    assert leaf.reason
    if rule == "axis":
        assert leaf.kind.block in candidate_blocks(shape)
        assert runs_divide(shape, leaf.kind.block) != leaf.reason.startswith("no run divides")


# Several gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_equal_gradients_count_as_one(histograms, rule):
    grads = {"w": _planted((64, 512), (1, 512)), "b": _noise(10)}
    one = gx.calibrate(grads, grads, rule=rule)
    for several in ([grads, grads], (grads, grads)):
        assert gx.calibrate(grads, several, rule=rule).leaves == one.leaves
        np.testing.assert_array_equal(histograms[-1], 2 * histograms[0])


@blocks_only
def test_squared_gradients_are_averaged():
    # Either gradient shows half of the rows; a small one beside a large one does not matter.
    rows = _planted((64, 512), (1, 512))
    top = rows.at[32:].set(0)
    halves = [{"w": top}, {"w": rows - top}]
    assert gx.calibrate(halves[0], halves)["w"].kind == gx.SharedBlocks((1, 512))
    other = {"w": 1e-4 * _planted((64, 512), (64, 4))}
    assert gx.calibrate(other, [{"w": rows}, other])["w"].kind == gx.SharedBlocks((1, 512))


@blocks_only
def test_a_gradient_may_be_none_in_some():
    rows = _planted((64, 512), (1, 512))
    params = {"w": rows, "b": jnp.zeros(3)}
    grads = [{"w": None, "b": None}, {"w": rows, "b": jnp.zeros(3)}]
    assert gx.calibrate(params, grads)["w"].kind == gx.SharedBlocks((1, 512))


_A, _B = _planted((64, 512), (1, 512)), _planted((512, 64), (512, 1))
# Parameters, gradients, and the blocks by path.
SEQUENCES = {
    "a list is a tree": ([_A, _B], [_A, _B], {"0": (1, 512), "1": (512, 1)}),
    "a tuple is a tree": ((_A, _B), (_A, _B), {"0": (1, 512), "1": (512, 1)}),
    "a list of one": ([_A], [_A], {"0": (1, 512)}),
    "several of a list": ([_A, _B], [[_A, _B], [_A, _B]], {"0": (1, 512), "1": (512, 1)}),
    "a tuple of lists": ([_A, _B], ([_A, _B],), {"0": (1, 512), "1": (512, 1)}),
    "equal leaves": ([_A, _A], [_A, _A], {"0": (1, 512), "1": (1, 512)}),
    "with None": ([_A, None], [_A, None], {"0": (1, 512)}),
    "an absent gradient": ([_A, _A], [_A, None], {"0": (1, 512), "1": (1, 512)}),
    "an array": (_A, _A, {".": (1, 512)}),
    "several of an array": (_A, [_A, _A, _A], {".": (1, 512)}),
}


@blocks_only
@pytest.mark.parametrize("case", SEQUENCES)
def test_what_counts_as_several_gradients(case):
    params, grads, blocks = SEQUENCES[case]
    plan = gx.calibrate(params, grads)
    assert {leaf.path: leaf.kind.block for leaf in plan.leaves} == blocks


# Invariance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_deterministic(rule):
    grads = {"w": _planted((64, 128), (2, 128)), "b": _noise(10)}
    one, two = (gx.calibrate(grads, grads, rule=rule) for _ in range(2))
    assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize("factor", [2.0**-66, 2.0**33], ids=["1.4e-20", "8.6e9"])
def test_scale_invariant(histograms, factor):
    # Powers of two, so that not even rounding differs.
    grads = {"w": _planted((64, 512), (1, 512)), "v": _noise(64, 512), "b": _noise(10)}
    scaled = jax.tree.map(lambda g: factor * g, grads)
    assert gx.calibrate(scaled, scaled) == gx.calibrate(grads, grads)
    np.testing.assert_array_equal(*histograms)


@blocks_only
@pytest.mark.parametrize("factor", [1e-20, 1e10])
def test_blocks_are_scale_invariant(factor):
    grads = {"w": _planted((64, 512), (1, 512)), "v": _noise(64, 512)}
    scaled = jax.tree.map(lambda g: factor * g, grads)
    assert gx.calibrate(scaled, scaled).leaves == gx.calibrate(grads, grads).leaves


@blocks_only
def test_order_of_rows_and_of_leaves_does_not_matter():
    rows = _planted((64, 512), (1, 512))
    shuffled = rows[np.random.default_rng(5).permutation(64)]
    tree, other = {"a": rows, "b": _noise(64, 512)}, {"b": _noise(64, 512), "a": shuffled}
    assert gx.calibrate(other, other)["a"].kind == gx.calibrate(tree, tree)["a"].kind


def test_parameters_count_by_shape_alone(histograms):
    grads = {"w": _planted((64, 512), (1, 512)), "b": _noise(10)}
    structs = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, jnp.bfloat16), grads)
    expected = gx.calibrate(grads, grads)
    assert gx.calibrate(structs, grads) == expected
    as_numpy = jax.tree.map(np.asarray, grads)
    assert gx.calibrate(as_numpy, as_numpy) == expected
    np.testing.assert_array_equal(histograms[0], histograms[-1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", RULES)
def test_narrow_gradients_count_as_their_values(histograms, dtype, rule):
    narrow = {"w": _planted((64, 512), (1, 512)).astype(dtype), "b": _noise(10).astype(dtype)}
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    assert gx.calibrate(narrow, narrow, rule=rule) == gx.calibrate(wide, wide, rule=rule)
    np.testing.assert_array_equal(*histograms)


def test_strict_promotion(histograms, strict_promotion):
    grads = {"w": _planted((64, 512), (1, 512)).astype(jnp.bfloat16), "b": _noise(10)}
    for rule in RULES:
        gx.calibrate(grads, [grads, grads], rule=rule)


SPECS = {"fsdp": P("x", None), "tensor": P(None, ("x", "y")), "both": P("y", "x")}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_gradients_give_the_same_plan(histograms, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    grads = {name: _planted((64, 512), (1, 512), i) for i, name in enumerate(SPECS)}
    grads["bias"] = _noise(16)
    specs = {**SPECS, "bias": P("x")}
    sharding = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    spread = jax.device_put(grads, sharding)
    plan = gx.calibrate(spread, [spread, spread])
    expected = gx.calibrate(grads, [grads, grads], specs=specs, mesh=mesh)
    # Sums over devices round differently; counts do not.
    assert [leaf.kind for leaf in plan.leaves] == [leaf.kind for leaf in expected.leaves]
    np.testing.assert_array_equal(*histograms)


def test_sharded_gradients_give_the_same_reference(histograms):
    mesh = jax.make_mesh((8,), ("x",))
    grads = {"w": _planted((64, 128), (1, 128))}
    spread = jax.device_put(grads, NamedSharding(mesh, P("x")))
    plans = [gx.calibrate(g, g, rule="reference") for g in (grads, spread)]
    assert plans[0] == plans[1]
    np.testing.assert_array_equal(*histograms)


def test_reference_refuses_arrays_of_other_processes():
    class Elsewhere(np.ndarray):
        is_fully_addressable = False

    grads = {"w": np.zeros((64, 128), np.float32).view(Elsewhere)}
    with pytest.raises(ValueError, match="`w` lies on devices of other processes.*allgather"):
        gx.calibrate(grads, grads, rule="reference")


# The codebook -----------------------------------------------------------------------------------


def test_learned_codebook():
    grads = {"w": _planted((64, 512), (1, 512))}
    plan = gx.calibrate(grads, grads)
    codebook = np.asarray(plan.codebook)
    assert plan.codebook_reason == "learned from the gradients"
    assert {-1.0, 0.0, 1.0} <= set(plan.codebook)
    assert np.all(np.diff(codebook) > 0) and plan.exact_lookup
    assert plan.codebook != gx.plan_by_shape(grads).codebook
    # It fits these gradients at least as well as the one for all.
    x = np.ravel(grads["w"] / jnp.max(jnp.abs(grads["w"]), axis=1, keepdims=True))

    def error(codebook):
        middles = (codebook[1:] + codebook[:-1]) / 2
        return np.mean((x - codebook[np.searchsorted(middles, x)]) ** 2)

    # Values count at the centres of their bins: up to half a bin, 1 / 4096, is lost of each.
    half_bin = 1 / 4096
    builtin = np.asarray(gx.plan_by_shape(grads).codebook)
    assert error(codebook) <= error(builtin) + half_bin**2


def test_reference_codebook():
    grads = {"w": _planted((64, 512), (1, 512))}
    plan = gx.calibrate(grads, grads, rule="reference")
    assert plan.codebook_reason == "reference: from the gradients"
    assert plan.codebook[0] == -1 and plan.codebook[-1] == 1 and 0.0 not in plan.codebook


# Gradients with few values once they are divided by their block's largest, and how many bins.
FEW = {
    "signs": (jnp.sign(_noise(64, 128)), 2),
    "three values": (jnp.round(jnp.clip(_noise(64, 128), -1, 1)), 2),  # zeros do not count
    "zero": (jnp.zeros((64, 128)), 0),
    "small leaves only": (_noise(8, 8), 0),
}


@pytest.mark.parametrize("name", FEW)
def test_few_values_get_the_builtin_codebook(name):
    grads, bins = FEW[name]
    plan = gx.calibrate({"w": grads}, {"w": grads})
    assert plan.codebook == gx.plan_by_shape({"w": grads}).codebook
    assert plan.codebook_reason == f"built in: the gradients fill only {bins} of 4096 bins"


# Errors -----------------------------------------------------------------------------------------

_LEAVES = {"large": (64, 128), "small": (8, 8), "bias": (5,)}


@blocks_only
@pytest.mark.parametrize("path", _LEAVES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", RULES)
def test_nan_and_inf_name_the_leaf(path, value, rule):
    good = {name: _noise(*shape) for name, shape in _LEAVES.items()}
    before = gx.calibrate(good, good, rule=rule)
    bad = {**good, path: good[path].at[(-1,) * good[path].ndim].set(value)}
    for grads in (bad, [good, bad]):
        with pytest.raises(ValueError, match=f"`{path}` holds NaN or inf"):
            gx.calibrate(good, grads, rule=rule)
    # Nothing is kept of a failed calibration.
    assert gx.calibrate(good, good, rule=rule) == before


class Refusal(NamedTuple):
    """Gradients that do not fit, and the message."""

    grads: Any
    error: type[Exception]
    match: str


_W, _V = jnp.ones((64, 128)), jnp.ones(4)
_PARAMS = {"a": {"w": _W}, "b": _V, "c": jnp.zeros(2, jnp.int32), "n": None}
_GOOD = {"a": {"w": _W}, "b": _V, "c": None, "n": None}
REFUSALS = {
    "renamed": Refusal(
        {"a": {"v": _W}, "b": _V, "c": None, "n": None}, ValueError, "expected `a/w`, found `a/v`"
    ),
    "lacks the last": Refusal({"a": {"w": _W}, "b": _V, "c": None}, ValueError, "it lacks `n`"),
    "lacks one": Refusal({"a": {"w": _W}, "c": None, "n": None}, ValueError, "expected `b`.*`c`"),
    "has one more": Refusal({**_GOOD, "z": _V}, ValueError, "it has `z`"),
    "shape": Refusal(
        {**_GOOD, "b": jnp.ones(5)}, ValueError, r"at `b`: expected shape \(4,\), found \(5,\)"
    ),
    "transposed": Refusal(
        {**_GOOD, "a": {"w": _W.T}}, ValueError, r"`a/w`.*\(64, 128\), found \(128, 64\)"
    ),
    "the first of two": Refusal({**_GOOD, "a": {"w": _V}, "b": _W}, ValueError, "`a/w`"),
    "integer": Refusal({**_GOOD, "b": jnp.ones(4, int)}, TypeError, "at `b`.*real and floating"),
    "complex": Refusal({**_GOOD, "b": _V + 0j}, TypeError, "at `b`.*real and floating.*complex"),
    "a gradient of None": Refusal({**_GOOD, "n": _V}, ValueError, "for `n`, which is None"),
    "in the second": Refusal([_GOOD, {**_GOOD, "b": _W}], ValueError, r"grads\[1\].*`b`"),
    "an empty list": Refusal([], ValueError, "`grads` is empty"),
}


@blocks_only
@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("rule", RULES)
def test_mismatches_name_the_first_difference(case, rule):
    grads, error, match = REFUSALS[case]
    with pytest.raises(error, match=match):
        gx.calibrate(_PARAMS, grads, rule=rule)
    gx.calibrate(_PARAMS, _GOOD, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_inside_jit(rule):
    with pytest.raises(TypeError, match="outside of `jit`"):
        jax.jit(lambda g: gx.calibrate({"w": _W}, g, rule=rule).bytes_per_param)({"w": _W})


@pytest.mark.parametrize("rule", RULES)
def test_complex_parameters(rule):
    params = {"w": _W, "phase": jnp.zeros(3, jnp.complex64)}
    with pytest.raises(TypeError, match=r"params\[phase\].*complex64"):
        gx.calibrate(params, params, rule=rule)


def test_unknown_rule():
    # Past the annotation's own check.
    with pytest.raises((ValueError, TypeError), match="rule"):
        gx.calibrate({"w": _W}, {"w": _W}, rule="flat")


_FLOAT0 = np.zeros((), jax.dtypes.float0)


@blocks_only
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grad", [None, _FLOAT0, np.int32(0)], ids=["None", "float0", "int"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_leaves_that_are_not_trained_are_skipped(rule, grad, dtype):
    params = {"w": _W, "n": jnp.zeros((), dtype)}
    plan = gx.calibrate(params, {"w": _W, "n": grad}, rule=rule)
    assert plan["n"].kind == gx.Untrained() and plan["n"].nbytes == 0


# Memory -----------------------------------------------------------------------------------------

_LEAF = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
_PASSES = {
    "evidence": functools.partial(_evidence, blocks=tuple(candidate_blocks(_LEAF.shape))),
    "histogram, rows": functools.partial(_count, block=(1, 1024)),
    "histogram, columns": functools.partial(_count, block=(1024, 1)),
    "histogram, boxes": functools.partial(_count, block=(2, 2048)),
}


@pytest.mark.parametrize("name", _PASSES)
def test_a_pass_needs_one_leaf_of_memory(name):
    analysis = jax.jit(_PASSES[name]).lower(_LEAF).compile().memory_analysis()
    # The leaf's logarithm, or bins and weights of a piece of 2^20 elements, whatever the leaf's
    # size; a tenth for everything small.
    assert analysis.temp_size_in_bytes <= 1.1 * 4 * 2048 * 2048
