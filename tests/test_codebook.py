"""The codebook: an optimum, with its fixed entries, from a histogram that loses nothing.

Costs are sums of ``w (x - c)^2`` with x and c in [-1, 1], so at most 4 sum(w). Two roundings
separate the solver's cost from the optimum: entries are float32, which moves a centre by 2**-25 at
most and the cost by its square; interval costs are differences of float64 prefix sums, each of them
off by n 2**-53 of its size. Below 1e-12 sum(w) in all, for the n here.
"""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gefen_jax as gx
from gefen_jax import _histogram
from gefen_jax._builtin import builtin_codebook, derive
from gefen_jax._codebook import bin_centers, learn, learn_reference, solve
from gefen_jax._encoder import lookup_is_exact

pytestmark = pytest.mark.once

_COST_RTOL = 1e-12
_CODES = 256
_BINS = 4096
_GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "codebooks.npz")
# Enough filled bins for `learn`, of every character.
_RICH = ["laplace_sparse_p96", "lognormal_p384", "exactly_256_active"]


def _grid(size: int) -> np.ndarray:
    """Points as the bins have them: symmetric, and none at 0."""
    return ((np.arange(size) + 0.5) / (size / 2) - 1).astype(np.float32)


@st.composite
def _weighted_points(draw, least: int, most: int, grid: int = 40):
    """Distinct ascending points with weights of very different size."""
    where = draw(st.sets(st.integers(0, grid - 1), min_size=least, max_size=most))
    weight = st.one_of(st.integers(1, 9), st.integers(1, 10**6))
    w = draw(st.lists(weight, min_size=len(where), max_size=len(where)))
    return _grid(grid)[sorted(where)], np.asarray(w, np.int64)


def _nearest_cost(x: np.ndarray, w: np.ndarray, centers: np.ndarray) -> float:
    x, centers = x.astype(np.float64), centers.astype(np.float64)
    return float(np.sum(w * np.min((x[:, None] - centers) ** 2, axis=1)))


def _partitions(n: int, clusters: int, may_be_empty: list[bool]):
    """All ways to cut n points into consecutive clusters."""
    for cuts in itertools.combinations_with_replacement(range(n + 1), clusters - 1):
        edges = list(itertools.pairwise((0, *cuts, n)))
        if all(i < j or empty for (i, j), empty in zip(edges, may_be_empty, strict=True)):
            yield edges


def _partition_cost(x: np.ndarray, w: np.ndarray, centers: list[float | None], zero: bool) -> float:
    """The least cost of any partition; a centre None is its cluster's mean, and owns a point.

    Without ``zero`` the fixed centres own points as well.
    """
    x = x.astype(np.float64)
    best = np.inf
    for edges in _partitions(len(x), len(centers), [zero and c is not None for c in centers]):
        cost = 0.0
        for (i, j), center in zip(edges, centers, strict=True):
            if i < j:
                c = np.average(x[i:j], weights=w[i:j]) if center is None else center
                cost += float(np.sum(w[i:j] * (x[i:j] - c) ** 2))
        best = min(best, cost)
    return best


def _optimum(x: np.ndarray, w: np.ndarray, codes: int, zero: bool) -> float:
    free: list[float | None] = [None] * (codes - 2 - zero)
    ranks = range(len(free) + 1) if zero else [None]
    middles = [free if rank is None else free[:rank] + [0.0] + free[rank:] for rank in ranks]
    return min(_partition_cost(x, w, [-1.0, *middle, 1.0], zero) for middle in middles)


@settings(max_examples=60, deadline=None)
@given(_weighted_points(least=5, most=7), st.integers(3, 5))
def test_is_optimal_with_zero(points, codes):
    x, w = points
    centers = solve(x, w, codes, zero=True)
    assert len(centers) == codes
    assert np.all(np.diff(centers) > 0)
    assert centers[0] == -1 and centers[-1] == 1 and 0 in centers
    # Fixed centres may own nothing, so every assignment is allowed, the nearest too.
    best = _optimum(x, w, codes, zero=True)
    assert abs(_nearest_cost(x, w, centers) - best) <= _COST_RTOL * w.sum()


@settings(max_examples=60, deadline=None)
@given(_weighted_points(least=5, most=8), st.integers(2, 5))
def test_is_optimal_without_zero(points, codes):
    """As the reference has it: the clusters of -1 and 1 own at least one point each."""
    x, w = points
    centers = solve(x, w, codes, zero=False)
    assert len(centers) == codes
    assert np.all(np.diff(centers) > 0)
    assert centers[0] == -1 and centers[-1] == 1
    # The solver's centres with the best assignment that gives every one of them a point.
    x64 = x.astype(np.float64)
    cost = min(
        sum(
            float(np.sum(w[i:j] * (x64[i:j] - c) ** 2))
            for (i, j), c in zip(edges, centers.astype(np.float64), strict=True)
        )
        for edges in _partitions(len(x), codes, [False] * codes)
    )
    assert abs(cost - _optimum(x, w, codes, zero=False)) <= _COST_RTOL * w.sum()


def _lloyd(x: np.ndarray, w: np.ndarray, centers: np.ndarray, rounds: int) -> np.ndarray:
    """Moves all centres but -1, 0 and 1 to the means of what they own."""
    centers = centers.astype(np.float64)
    for _ in range(rounds):
        nearest = np.argmin(np.abs(x[:, None] - centers), axis=1)
        weight = np.bincount(nearest, w, len(centers))
        means = np.bincount(nearest, w * x, len(centers)) / np.where(weight == 0, 1, weight)
        moves = (weight > 0) & ~np.isin(centers, (-1, 0, 1))
        centers = np.where(moves, means, centers)
    return centers


@settings(max_examples=60, deadline=None)
@given(
    _weighted_points(least=20, most=120, grid=200),
    st.integers(4, 16),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 20]),
)
def test_no_codebook_with_the_same_fixed_entries_is_better(points, codes, seed, rounds):
    """Against candidates drawn at random, and such that k-means has improved."""
    x, w = points
    free = np.random.default_rng(seed).choice(x, codes - 3, replace=False)
    candidate = _lloyd(x, w, np.concatenate([free, [-1, 0, 1]]), rounds)
    cost = _nearest_cost(x, w, solve(x, w, codes, zero=True))
    assert cost <= _nearest_cost(x, w, candidate) + _COST_RTOL * w.sum()


@pytest.mark.parametrize("name", _RICH)
def test_learned_codebook(name):
    """256 entries, sorted, distinct, with -1, 0 and 1; the cost of the 0 is small."""
    histogram = _GOLDEN[f"hist__{name}"].astype(np.int64)
    codebook = learn(histogram)
    assert codebook is not None and codebook.dtype == np.float32 and codebook.shape == (_CODES,)
    assert np.all(np.diff(codebook) > 0)
    assert np.isin([-1, 0, 1], codebook).all()
    # One entry of 256 is bound: as good as the best codebook of 255 entries without a fixed 0,
    # which with a 0 added is one of those that `solve` chose from.
    active = np.flatnonzero(histogram)
    x, w = bin_centers()[active], histogram[active]
    without = solve(x, w, _CODES - 1, zero=False)
    bound = _nearest_cost(x, w, np.union1d(without, np.float32(0)))
    assert _nearest_cost(x, w, codebook) <= bound + _COST_RTOL * w.sum()


def test_too_few_bins_give_no_codebook():
    histogram = np.zeros(_BINS, np.int64)
    histogram[: _CODES - 1] = 10**9
    assert learn(histogram) is None
    assert learn(np.zeros(_BINS, np.int64)) is None
    histogram[_BINS - 1] = 1
    assert learn(histogram) is not None


_PADDED = {
    # filled bins: (distinct entries below the padding's, what pads)
    "none": ([], 0.0),
    "one, above 0": ([3000], 3000),
    "both ends": ([0, 4095], 4095),
    "a run": (list(range(100, 200)), 199),
}


@pytest.mark.parametrize("case", _PADDED)
def test_reference_pads_with_its_last_centre(case):
    filled, padding = _PADDED[case]
    histogram = np.zeros(_BINS, np.int64)
    histogram[filled] = 7
    padding = bin_centers()[padding] if filled else np.float32(padding)
    # Of the centres the first gives way to -1, of the padding the last to 1.
    inside = bin_centers()[filled[1:]]
    rest = np.full(_CODES - 2 - len(inside), padding)
    expected = np.sort(np.concatenate([[-1], inside, rest, [1]]).astype(np.float32))
    assert np.array_equal(learn_reference(histogram), expected)


def test_large_counts_keep_ones():
    """Points of weight 1 to 9 beside one of 2**26: a float32 prefix sum would not see them.

    The heavy one takes an entry for itself, whether it weighs 2**26 or 2**12, and the light ones
    decide the others. What float64 prefix sums lose, n 2**-53 of their size, bounds the difference.
    """
    # The first point, which every prefix sum contains, and far from the others.
    x = np.delete(_grid(64), np.arange(1, 16))
    light = np.random.default_rng(0).integers(1, 10, len(x))
    costs = []
    for weight in (2**12, 2**26):
        centers = solve(x, np.concatenate([[weight], light[1:]]), 16)
        assert x[0] in centers
        costs.append(_nearest_cost(x[1:], light[1:], centers))
    assert abs(costs[0] - costs[1]) <= len(x) * 2.0**-53 * 2**26


def test_builtin_codebook_is_what_its_derivation_gives():
    codebook = np.asarray(builtin_codebook(), np.float32)
    assert np.array_equal(codebook, derive())
    assert np.all(np.diff(codebook) > 0)
    assert codebook[0] == -1 and codebook[-1] == 1 and 0 in codebook
    assert lookup_is_exact(codebook)


# The histogram. Gradients are i / 1024 times a power of two that differs from block to block, with
# a largest magnitude of 1024 / 1024: normalised they are i / 1024 whatever the division's rounding,
# and bins of 1 / 2048 are exact. Shape, block, dtype, pieces of how many elements.
_COUNTED = {
    "vector": ((4096,), (256,), np.float32, 1 << 20),
    "rows": ((24, 128), (1, 128), np.float32, 1 << 20),
    "columns": ((96, 40), (32, 1), np.float32, 1 << 20),
    "boxes": ((6, 8, 10), (1, 4, 10), np.float32, 1 << 20),
    "middle": ((6, 8, 10), (2, 8, 1), np.float32, 1 << 20),
    "bfloat16": ((24, 128), (1, 128), jnp.bfloat16, 1 << 20),
    "float16": ((24, 128), (1, 128), np.float16, 1 << 20),
    "pieces": ((24, 128), (1, 128), np.float32, 300),
    "pieces, inner axis": ((96, 200), (16, 1), np.float32, 100),
    "pieces smaller than a block": ((4096,), (1024,), np.float32, 10),
    "ragged vector": ((1003,), (256,), np.float32, 1 << 20),
    "ragged rows": ((5, 300), (1, 128), np.float32, 1 << 20),
    "ragged columns": ((300, 5), (128, 1), np.float32, 1 << 20),
    "ragged, in pieces": ((5, 300), (1, 128), np.float32, 100),
}


def _blocks_of(shape: tuple[int, ...], block: tuple[int, ...]):
    """Slices of all blocks, the last of an axis perhaps shorter."""
    starts = itertools.product(*(range(0, d, b) for d, b in zip(shape, block, strict=True)))
    for start in starts:
        yield tuple(slice(i, i + b) for i, b in zip(start, block, strict=True))


@pytest.mark.parametrize("case", _COUNTED)
def test_counts(case, monkeypatch):
    """Every element that is not 0 is counted once, in the bin of its share of the largest."""
    shape, block, dtype, chunk = _COUNTED[case]
    rng = np.random.default_rng(len(case))
    # 256ths where bfloat16 must hold them.
    i = rng.integers(-256, 257, shape) * 4
    g = np.zeros(shape)
    for n, at in enumerate(_blocks_of(shape, block)):
        share = i[at] / 1024
        share.flat[n % share.size] = (-1) ** n
        g[at] = share * 2.0 ** (n % 5 - 2) * (n % 7 != 3)  # some blocks are all 0
    share = np.zeros(shape)
    for at in _blocks_of(shape, block):
        share[at] = g[at] / max(np.abs(g[at]).max(), 2.0**-20)
    bins = np.minimum((share[g != 0] + 1) * (_BINS // 2), _BINS - 1).astype(int)
    monkeypatch.setattr(_histogram, "_CHUNK", chunk)
    # Not `count_normalised`: what it compiles for a shape it keeps, with the pieces of the first.
    counts = np.asarray(_histogram._count(jnp.asarray(g, dtype), block))
    assert counts.sum() == np.count_nonzero(g)
    assert np.array_equal(counts, np.bincount(bins, minlength=_BINS))


def test_counts_beyond_float32():
    """2**24 + 2**20 ones and a half: every one of them counts."""
    g = jnp.ones((17, 2**20), jnp.bfloat16).at[0, 0].set(0.5)
    counts = _histogram.count_normalised(g, (1, 2**20))
    assert counts.dtype == np.int64
    assert counts[-1] == 17 * 2**20 - 1 and counts[3072] == 1 and counts.sum() == g.size


def test_zeros_say_nothing():
    counts = _histogram.count_normalised(jnp.zeros((8, 64)), (1, 64))
    assert counts.sum() == 0


@pytest.mark.parametrize("shape", [(16411,), (16411, 3), (3, 16411)], ids=str)
def test_calibrate_with_blocks_that_do_not_divide(shape):
    """16411 is prime: any block of it leaves a shorter one."""
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)}
    plan = gx.calibrate(g, g)
    assert plan.codebook_reason == "learned from the gradients"
