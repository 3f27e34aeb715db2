"""The dual code: its levels, its roundings, its fractions, its step, and what training sees of it.

``u = 2**-24`` is the relative rounding error of float32.

A fraction decides between two levels. Where it lies within rounding of the point at which it would
decide otherwise, two programs (of which XLA may contract products and sums in either) may take
different ones. How near is derived per element, at `_check_step`; with fractions that are as good
as uniform, at most the sum of twice those distances of all codes are expected to differ, about one
in 30,000. Comparisons of two programs start from one state, so that such a code has no sequel.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._builtin import builtin_codebook
from gefen_jax._candidates import dual_block
from gefen_jax._constants import DUAL_BLOCK, DUAL_MAX, DUAL_MIN, OUTPUT_LAYER
from gefen_jax._dither import dither, leaf_phases, positions
from gefen_jax._dual_step import read_dual, write_dual
from gefen_jax._levels import level, make_levels, on_grid, round_to_level
from gefen_jax._nu_levels import nu_level, round_nu
from gefen_jax._packing import OWN, SHARED
from gefen_jax._paths import LeafSpec
from gefen_jax._transform import _update_leaf
from gefen_jax._types import Moments

U = 2.0**-24
FLOAT_MIN = 2.0**-126  # below, XLA on a CPU takes floats for 0
BUILTIN = np.asarray(builtin_codebook(16), np.float32)
_EXTREMES = np.asarray([0, 1, 2**31, 2**32 - 2**12, 2**32 - 1], np.uint32)


def _even_fractions(n: int) -> np.ndarray:
    """n fractions in the middle of n equal cells."""
    return ((np.arange(n) + 0.5) * (2.0**32 / n)).astype(np.uint32)


# The levels of nu --------------------------------------------------------------------------------


def _levels_of(exponent: int) -> np.ndarray:
    """From the module's docstring, in float64: 256 sixteenths of octaves, the highest a power."""
    octaves = 2.0 ** (exponent - 127 - np.arange(16, 0, -1))
    sixteenths = np.outer(octaves, 1 + np.arange(16) / 16).ravel()
    levels = np.append(sixteenths, 2.0 ** (exponent - 127))[1:]
    if exponent == 0:
        return np.zeros(256)  # the exponent of 0
    # Below the normal floats the steps of the lowest octave go on, down to 0.
    below = int((levels < FLOAT_MIN).sum())
    levels[:below] = np.maximum(FLOAT_MIN * (1 - np.arange(below, 0, -1) / 16), 0)
    if exponent == 255:
        levels[-1] = np.inf
    return levels


@jax.jit
def _stored(nu, fraction):
    """Exponent, code and level of every nu of one group, for every fraction."""
    nu = jnp.broadcast_to(nu, (fraction.size, nu.size))
    fractions = jnp.broadcast_to(fraction[:, None], nu.shape)
    exponent, (code,) = round_nu((nu,), (fractions,), (1,))
    return exponent[0, 0], code, nu_level(exponent, code)


@pytest.mark.parametrize("exponent", [0, 1, 2, 15, 16, 17, 18, 100, 254, 255])
def test_256_levels_of_nu(exponent):
    """As documented for every exponent, increasing where none falls below the floats."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    found = np.asarray(nu_level(jnp.uint8(exponent), codes), np.float64)
    np.testing.assert_array_equal(found, _levels_of(exponent))
    positive = found[found > 0]
    assert np.all(np.diff(positive) > 0)
    assert positive.size == 256 or exponent < 16
    normal = found[(found >= FLOAT_MIN) & np.isfinite(found)]
    assert np.all(np.diff(normal) <= normal[:-1] / 16) and np.all(
        np.diff(normal) > normal[:-1] / 32
    )


_ANY_NU = st.floats(0, width=32, allow_nan=False, allow_infinity=True)
_NEAR = st.tuples(st.floats(0.5, 1, width=32), st.integers(-15, 0)).map(lambda x: math.ldexp(*x))
_GRID = 1 << 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_ANY_NU, min_size=3, max_size=3),
    st.lists(_NEAR, min_size=4, max_size=4),
    st.sampled_from([2.0**k for k in (-149, -127, -126, -120, -60, 0, 1, 100, 127)]),
)
def test_nu_takes_a_level_around_it_and_is_right_on_average(anything, near, factor):
    """Two groups: one anywhere in float32, one within the levels of its largest.

    Over n even fractions the share that rounds up is off by at most one of them, so the average is
    off by at most a gap / n. That the upper level is inf excludes an average.
    """
    with np.errstate(over="ignore"):
        groups = [anything + [0.0] * 2, [factor * x for x in near] + [0.0]]
        groups = [np.asarray(group, np.float32) for group in groups]
    fractions = np.concatenate([_EXTREMES, _even_fractions(_GRID)])
    for nu in groups:
        exponent, codes, levels = (np.asarray(x, np.float64) for x in _stored(nu, fractions))
        largest = nu.max()
        if largest < FLOAT_MIN:
            assert levels.max() <= FLOAT_MIN  # below the floats, as if there were no gradient
            continue
        # The smallest power of two that covers the largest.
        mantissa, power = np.frexp(np.float64(largest))
        assert exponent == (127 + power - (mantissa == 0.5) if np.isfinite(largest) else 255)
        expected = _levels_of(int(exponent))
        assert np.array_equal(levels, expected[codes.astype(int)]) and np.all(expected[-1] >= nu)
        lower = np.array([expected[expected <= x].max(initial=expected[0]) for x in nu])
        upper = np.array([expected[expected >= x].min() for x in nu])
        assert np.all((levels == lower) | (levels == upper))
        between = np.isfinite(upper) & (nu >= expected[0])
        average = levels[len(_EXTREMES) :].mean(axis=0)
        gap = upper[between] - lower[between]
        assert np.all(np.abs(average[between] - nu[between]) <= gap / _GRID)


# The levels of the first moment ------------------------------------------------------------------

_CODEBOOKS = {
    "built in": BUILTIN,
    "even, without 0": on_grid(np.linspace(-1, 1, 16)),
    "as near as bins allow": on_grid(np.concatenate([[-1], np.arange(-7, 7) / 1024, [1]])),
}
_round = jax.jit(round_to_level)


def _place_error(codebook: np.ndarray) -> float:
    """How far rounding may move a place.

    Two products of up to the slope, and a sum of up to 16 plus the slope: each rounded, from a
    slope that is rounded twice; and the fraction has 20 bits.
    """
    return 6 * U * (1 / np.diff(codebook.astype(np.float64)).min() + 16) + 2.0**-20


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_rounding_to_levels(name):
    """Entries stay, others take one of two levels, monotonically, right on average, inside."""
    codebook = _CODEBOOKS[name]
    levels, error = make_levels(jnp.asarray(codebook)), _place_error(codebook)
    edges = np.arange(-1024, 1025) / 1024  # every entry is one; between them, anything
    x = np.sort(np.concatenate([edges, edges[:-1] + 0.37 / 1024])).astype(np.float32)
    fractions = np.concatenate([_EXTREMES, _even_fractions(_GRID)])
    codes = np.asarray(_round(levels, *np.broadcast_arrays(x, fractions[:, None])), int)
    assert codes.min() == 0 and codes.max() == 15
    # Edges are further apart than rounding reaches.
    assert np.all(np.diff(codes[:, ::2], axis=1) >= 0)
    assert np.all(np.diff(codes[-_GRID:], axis=0) >= 0)

    place = np.interp(x.astype(np.float64), codebook.astype(np.float64), np.arange(16))
    u = fractions[:, None] / 2.0**32
    assert np.all(codes >= np.floor(place + u - error))
    assert np.all(codes <= np.floor(place + u + error))
    assert np.all(np.abs(codes[-_GRID:].mean(axis=0) - place) <= 1 / _GRID + error)
    np.testing.assert_array_equal(level(levels, jnp.arange(16, dtype=jnp.uint8)), codebook)


def test_zero_stays_whatever_the_fraction_is():
    """Not but for rounding, as other entries: elements without gradient must not move, ever.

    The fractions next to 1 are those that a sum with a place could round up.
    """
    nearly_one = np.uint32(2**32 - 1) - np.arange(1 << 14, dtype=np.uint32)
    fractions = np.concatenate([_EXTREMES, nearly_one, _even_fractions(1 << 14)])
    codes = _round(
        make_levels(jnp.asarray(BUILTIN)), np.zeros(fractions.size, np.float32), fractions
    )
    assert np.all(BUILTIN[np.asarray(codes)] == 0)


def test_on_grid_moves_to_the_nearest_bin_edge():
    anywhere = np.sort(np.random.default_rng(0).uniform(-1, 1, 100))
    moved = on_grid(anywhere)
    assert moved.dtype == np.float32 and np.all(moved * 1024 % 1 == 0)
    assert np.abs(moved - anywhere).max() <= 2.0**-11
    np.testing.assert_array_equal(on_grid(moved), moved)
    np.testing.assert_array_equal(on_grid(BUILTIN), BUILTIN)


# The fractions -----------------------------------------------------------------------------------


_MANY = 1 << 14


@jax.jit
def _words(phase, position):
    return dither(phase, position)


def _uniform(path: str, count: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nu's and mu's fractions of up to _MANY positions."""
    padded = np.resize(position.astype(np.uint32), _MANY)
    words = _words(leaf_phases([path], jnp.int32(count))[0], padded)
    nu, mu = (np.asarray(x)[: position.size].reshape(position.shape) / 2.0**32 for x in words)
    return nu, mu


def test_fractions_never_change():
    """A state goes on with the fractions that it began with, in every version of the package."""
    phases = leaf_phases(["w", "a/b"], jnp.int32(7))
    nu, mu = dither(phases[0], jnp.asarray([0, 1, 255, 2**31], jnp.uint32))
    assert nu.tolist() == [1104492163, 1472909229, 246197422, 3548208640]
    assert mu.tolist() == [1951738755, 2755511239, 4198212594, 2053188535]
    assert phases.tolist() == [[476252946, 1401181199], [133447708, 1401181199]]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5), (1, 7, 1)])
def test_positions_are_row_major(shape):
    expected = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    np.testing.assert_array_equal(positions(shape), expected)


def _chi_square(x: np.ndarray, y: np.ndarray) -> float:
    """Of 16 x 16 cells against a uniform square, in standard deviations from what is expected."""
    counts, _, _ = np.histogram2d(x, y, 16, ((0, 1), (0, 1)))
    expected = x.size / 256
    return (((counts - expected) ** 2 / expected).sum() - 255) / math.sqrt(2 * 255)


_STRIDES = [1, 2, 256, 1000, 2048, 50257, 2**16]


@pytest.mark.parametrize("count", [1, 2**31 - 1])
@pytest.mark.parametrize("stride", _STRIDES)
def test_fractions_of_positions_are_uniform(stride, count):
    """Nu's and mu's, and those of two leaves: in the square, so alone and together.

    A chi-square of 255 degrees at most 5 standard deviations above what is expected of random
    numbers (more even ones are welcome); correlations within 5 / sqrt(n).
    """
    position = np.arange(_MANY) * stride
    nu, mu = _uniform("layer/w", count, position)
    others = _uniform("layer/v", count, position)
    for x, y in [(nu, mu), *zip((nu, mu), others, strict=True)]:
        assert _chi_square(x, y) < 5
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(x.size)


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("stride", _STRIDES)
def test_fractions_of_neighbours_are_independent(word, stride):
    """Along a row, and down the columns of a leaf with rows of ``stride``; bounds as above."""
    u = _uniform("layer/w", 1, np.arange(_MANY) * stride)[word]
    assert _chi_square(u[:-1], u[1:]) < 5


@pytest.mark.parametrize("start", [1, 10**6, 2**31 - 4000])
def test_fractions_over_steps_visit_every_interval(start):
    """N consecutive ones leave no gap above (1 + 2 / sqrt(5)) / N: golden rotation's constant.

    So every interval of length w is visited within 1.9 / w steps. Nor is any visited too often:
    with partial quotients of 1, n times the discrepancy is at most 3 + 3.6 log n (Kuipers and
    Niederreiter, Uniform Distribution of Sequences, 1974, theorem 2.3.4), and 1 is for the ranks'
    own. 2^-32 is the resolution.
    """
    steps = jnp.asarray(start + np.arange(4000), jnp.int32)
    over_steps = jax.jit(jax.vmap(lambda t: dither(leaf_phases(["w"], t)[0], positions((3,)))))
    for fractions in over_steps(steps):
        for u, n in itertools.product(np.asarray(fractions).T / 2.0**32, (2, 10, 100, 999, 4000)):
            visited = np.sort(u[:n])
            gaps = np.diff(visited, append=visited[0] + 1)
            assert gaps.max() <= (1 + 2 / math.sqrt(5)) / n + 2.0**-32
            ranks = (np.arange(n) + 0.5) / n
            assert np.ptp(visited - ranks) <= (4 + 3.6 * math.log(n)) / n


# Blocks and pairs --------------------------------------------------------------------------------

_REFUSED = {
    "a shorter last run": ((33, 6), (16, 1), r"\(16, 1\).*must divide the leaf, \(33, 6\)"),
    "longer than the axis": (
        (33, 6),
        (64, 1),
        r"\(64, 1\) must lie between 1 and the leaf's shape",
    ),
    "odd runs": ((6, 67), (3, 1), r"\(3, 1\).*even number of elements along one axis"),
    "odd boxes": ((4, 5, 9), (1, 5, 9), r"\(1, 5, 9\).*even number of elements along one axis"),
    "single elements": ((4, 4), (1, 1), r"\(1, 1\).*even number of elements along one axis"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_blocks_without_pairs_are_refused(name):
    """By the kind, and by the plan, which names the leaf."""
    shape, block, message = _REFUSED[name]
    with pytest.raises(ValueError, match=message):
        gx.DualCode(block).check(shape)
    with pytest.raises(ValueError, match="`a/b`.*" + message):
        gx.LeafPlan("a/b", shape, gx.DualCode(block), "test")


def test_a_wide_run_has_four_elements():
    """Of two, there would be as many pairs as blocks."""
    gx.DualCode((1, 2)).check((4, 4))
    with pytest.raises(ValueError, match=r"\(1, 2\) must have 4 elements at least along axis 1"):
        gx.WideDualCode((1, 2)).check((4, 4))
    gx.WideDualCode((1, 4)).check((4, 4))


def test_a_wide_code_by_shape_pairs_another_axis_than_one_of_two():
    params = {"w": jax.ShapeDtypeStruct((64, 150, 2), jnp.float32)}
    kind = gx.plan_by_shape(params, kind="wide_dual_code")["w"].kind
    assert kind == gx.WideDualCode((1, 150, 1))
    assert gx.plan_by_shape(params)["w"].kind == gx.DualCode((1, 150, 2))


def _boxes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """By trying all: runs of one axis, and boxes up to the last axis, of a dual code's sizes."""
    boxes = set()
    for axis, size in enumerate(shape):
        for run in (n for n in range(1, size + 1) if size % n == 0):
            for rest in {shape[axis + 1 :], (1,) * (len(shape) - axis - 1)}:
                box = (1,) * axis + (run, *rest)
                if DUAL_MIN <= math.prod(box) <= DUAL_MAX and any(n % 2 == 0 for n in box):
                    boxes.add(box)
    return boxes


_SIZES = st.one_of(
    st.integers(1, 20), st.integers(1, 2048), st.sampled_from([64, 96, 169, 256, 768, 1021, 4096])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_SIZES, min_size=1, max_size=4).map(tuple))
def test_every_leaf_that_has_pairs_gets_a_block(shape):
    """The first axis is cut only in a vector or an output layer, or if nothing else is left."""
    block, boxes = dual_block(LeafSpec("w", shape, True)), _boxes(shape)
    if block is None:
        assert not boxes
        return
    gx.DualCode(block).check(shape)
    assert block in boxes
    others = {box for box in boxes if box[0] == 1}
    output = len(shape) == 2 and shape[1] > OUTPUT_LAYER * shape[0]
    if output and (columns := {box for box in boxes if box[1] == 1}):
        assert block in columns
    elif len(shape) > 1 and block[0] > 1:
        assert not others
    # Of the same axes, the run that is nearest to the size aimed at.
    axis = next(i for i, n in enumerate(block) if n > 1)
    alike = [
        box for box in boxes if box[:axis] + box[axis + 1 :] == block[:axis] + block[axis + 1 :]
    ]
    far = [abs(math.log2(math.prod(box) / DUAL_BLOCK)) for box in (block, *alike)]
    assert far[0] == min(far)


# The step ----------------------------------------------------------------------------------------

# Runs along the last axis, of a number that pieces do not divide, and along the first; boxes whose
# pairs lie along their last axis, along one before it, and along the cut one; an inner axis that
# pieces cut with an overlap, and one under boxes.
LEAVES = {
    "rows": ((5, 256), (1, 256)),
    "many rows": ((11, 32), (1, 16)),
    "columns": ((256, 5), (256, 1)),
    "heads": ((3, 4, 64), (1, 4, 64)),
    "odd heads": ((6, 4, 9), (1, 4, 9)),
    "odd rows": ((12, 9), (4, 9)),
    "inner": ((8, 67), (4, 1)),
    "inner boxes": ((4, 6, 5), (2, 6, 1)),
}


class _Setting(NamedTuple):
    """How the optimizer is made, and from which leaf size on it works in pieces."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    nesterov: bool = False
    chunk: int = 1 << 18

    def make(self, plan: gx.Plan) -> optax.GradientTransformationExtraArgs:
        return gx.scale_by_gefen(
            **{k: v for k, v in self._asdict().items() if k != "chunk"}, plan=plan
        )


_SETTINGS = {
    "default": _Setting(),
    "nesterov, eps_root": _Setting(0.75, 0.875, 1e-3, 1e-4, True),
    "b1 = 0, in pieces": _Setting(b1=0.0, b2=0.95, chunk=100),
}
_STEPS = 20


def plan_of(leaves: dict[str, Any], kind: type[gx.DualCode] = gx.DualCode) -> gx.Plan:
    entries = (gx.LeafPlan(k, s, kind(b), "test") for k, (s, b) in leaves.items())
    return gx.Plan(tuple(entries), builtin_codebook(), "test", "shape")


def zeros_of(leaves: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.zeros(shape) for k, (shape, _) in leaves.items()}


def gradients(leaves: dict[str, Any], t: int, decades: float = 2.0) -> dict[str, np.ndarray]:
    """Elements of very different size, always the same ones; some 0, in some rows all of them."""
    grads = {}
    for i, (name, (shape, _)) in enumerate(leaves.items()):
        fixed, rng = np.random.default_rng(i), np.random.default_rng([i, t])
        size = 10 ** fixed.uniform(-decades, 0, shape)
        rows = fixed.random((shape[0],) + (1,) * (len(shape) - 1)) < 0.9
        g = (rng.normal(size=shape) + 0.5) * size * rows * (rng.random(shape) < 0.9)
        grads[name] = g.astype(np.float32)
    return grads


def moments_of(state: Any, name: str) -> Moments:
    return Moments(*(np.asarray(getattr(state, slot)[name]) for slot in Moments._fields))


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """Every block as (its number in the statistics, its slices)."""
    counts = (range(-(-d // b)) for d, b in zip(shape, block, strict=True))
    for i in itertools.product(*counts):
        yield i, tuple(slice(n * b, (n + 1) * b) for n, b in zip(i, block, strict=True))


def halves_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two elements of every pair of a block: halves of its last even axis."""
    axis = max(i for i, n in enumerate(x.shape) if n % 2 == 0)
    first, second = np.split(x, 2, axis)
    return first, second


def joined(first: np.ndarray, second: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """The block of these two elements of every pair."""
    return np.concatenate([first, second], max(i for i, n in enumerate(block) if n % 2 == 0))


def for_both(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """What every pair has, as a block in which both of its elements have it."""
    return joined(x, x, block)


def mean_of_pairs(x: np.ndarray) -> np.ndarray:
    """Of a block, pair by pair."""
    first, second = halves_of(x)
    return (first + second) / 2


def nu_codes_of(bytes_: np.ndarray) -> np.ndarray:
    """Of a block, pair by pair: high halves, of the first of a pair the code's higher bits."""
    first, second = halves_of(bytes_)
    return (first >> 4) * 16 + (second >> 4)


class Read(NamedTuple):
    """A block of a state: of every element the codes of mu and nu, the scale, the exponent."""

    k: np.ndarray
    h: np.ndarray
    scale: Any
    exponent: int


class Layout(NamedTuple):
    """How the bytes of a kind are read, from the docstring of the kind."""

    kind: Any
    read: Callable[..., Read]  # of moments, a number of a block and its slices
    average: Callable[[np.ndarray], np.ndarray]  # of a block: what nu averages of squares
    fraction: Callable[[np.ndarray], np.ndarray]  # of a block: that which decides about nu
    # Relative: a scale of 24 bits is rounded up, in steps of 2^-15 at most, but where it is less
    # than 16 units in the last place, 2^-19, above a step.
    scale_error: tuple[float, float]


def _read_shared(state: Moments, i: Any, at: Any) -> Read:
    bytes_ = state.mu[at]
    codes = for_both(nu_codes_of(bytes_), bytes_.shape)
    return Read(bytes_ & 15, codes, state.scale[i], int(state.nu[i]))


def _read_wide(state: Moments, i: Any, at: Any) -> Read:
    bytes_ = state.mu[at]
    axis = max(a for a, n in enumerate(bytes_.shape) if n % 2 == 0)
    half = tuple(slice(s.start // 2, s.stop // 2) if a == axis else s for a, s in enumerate(at))
    low = joined(state.nu[half] & 15, state.nu[half] >> 4, bytes_.shape)
    word = np.uint32(state.scale[i])
    scale = (word & np.uint32(0xFFFFFF00)).view(np.float32)
    return Read(bytes_ & 15, (bytes_ & 0xF0) | low, scale, int(word & np.uint32(255)))


LAYOUTS = {
    "shared": Layout(
        gx.DualCode,
        _read_shared,
        lambda x: for_both(mean_of_pairs(x), x.shape),
        lambda u: for_both(halves_of(u)[0], u.shape),
        (0.0, 0.0),
    ),
    "wide": Layout(gx.WideDualCode, _read_wide, lambda x: x, lambda u: u, (2.0**-19, 2.0**-15)),
}

_write, _read = (
    {
        name: jax.jit(functools.partial(f, packing=packing), static_argnames="block")
        for name, packing in (("shared", SHARED), ("wide", OWN))
    }
    for f in (write_dual, read_dual)
)


@pytest.mark.parametrize("name", LEAVES)
def test_two_bytes_hold_two_codes_and_a_shared_one(name):
    """Any codes, as moments that stand for them and that only the mean of a pair's nu does.

    Levels times 3/4 and 5/4 are floats, and so is their mean: nu is exact. A first moment is
    rounded once and its scale 4 times before it is read, with 3 roundings more.
    """
    shape, block = LEAVES[name]
    rng, levels = np.random.default_rng(0), _levels_of(127)
    expected, mu, nu = np.zeros(shape, np.uint8), np.zeros(shape), np.zeros(shape)
    for _, at in blocks_of(shape, block):
        k = rng.integers(0, 16, block)
        h = rng.integers(0, 256, halves_of(k)[0].shape)
        k.flat[0], h.flat[0] = 15, 255  # as a step leaves them: the largest
        expected[at] = k + 16 * joined(h // 16, h % 16, block)
        nu[at] = joined(0.75 * levels[h], 1.25 * levels[h], block)
        mu[at] = BUILTIN.astype(np.float64)[k] * 3 * np.sqrt(for_both(levels[h], block))
    tables = make_levels(jnp.asarray(BUILTIN))
    state = _write["shared"](
        jnp.asarray(mu, jnp.float32), jnp.asarray(nu, jnp.float32), block, tables
    )
    np.testing.assert_array_equal(state.mu, expected)
    np.testing.assert_array_equal(state.nu, np.full(state.nu.shape, 127))
    read_mu, read_nu = _read["shared"](state, block, tables)
    np.testing.assert_allclose(read_mu, mu, rtol=8 * U, atol=0)
    for _, at in blocks_of(shape, block):
        np.testing.assert_array_equal(read_nu[at], for_both(mean_of_pairs(nu[at]), block))


@pytest.mark.parametrize("name", LEAVES)
def test_three_bytes_hold_four_codes(name):
    """Any codes, as moments that stand for them."""
    shape, block = LEAVES[name]
    layout, rng, levels = LAYOUTS["wide"], np.random.default_rng(0), _levels_of(127)
    k, h = rng.integers(0, 16, shape), rng.integers(0, 256, shape)
    for _, at in blocks_of(shape, block):
        k[at].flat[0], h[at].flat[0] = 15, 255  # as a step leaves them: the largest
    nu = levels[h]
    mu = BUILTIN.astype(np.float64)[k] * 3 * np.sqrt(nu)
    tables = make_levels(jnp.asarray(BUILTIN))
    state = _write["wide"](
        jnp.asarray(mu, jnp.float32), jnp.asarray(nu, jnp.float32), block, tables
    )
    moments = Moments(*map(np.asarray, state))
    for i, at in blocks_of(shape, block):
        read = layout.read(moments, i, at)
        np.testing.assert_array_equal(read.k, k[at])
        np.testing.assert_array_equal(read.h, h[at])
        assert read.exponent == 127
        assert read.scale == 3  # it has few bits, and 4 roundings are less than 16 units
    read_mu, read_nu = _read["wide"](state, block, tables)
    np.testing.assert_allclose(read_mu, mu, rtol=8 * U, atol=0)
    np.testing.assert_array_equal(read_nu, nu)


class _Near(NamedTuple):
    """Codes of one block that differ from the reference's, and how many may."""

    differ: int
    expected: float


def _check_codes(codes: np.ndarray, place: Any, u: Any, error: Any, last: int) -> _Near:
    """floor(place + u), where the sum is not within the error of another integer."""
    low, exact, high = (np.clip(np.floor(place + u + e), 0, last) for e in (-error, 0, error))
    assert np.all((low <= codes) & (codes <= high))
    certain = error < 0.25  # else what a group kept of a difference is rounding itself
    return _Near(int((codes != exact)[certain].sum()), float(2 * error[certain].sum()))


def _check_step(g, old: Moments, new: Moments, block, u, s: _Setting, layout: Layout) -> Any:
    """One step of one leaf, block by block, in float64, from the docstring of the module.

    Rounding: nu is the sum of two products with rounded factors, one of them of a sum of rounded
    squares: five roundings of at most itself; as a place, divided by the gap above the level below
    it, a 16th to a 32nd of it, and the fraction has as many bits as a code drops, 19. m is three
    products and two sums, ten roundings of the larger of its parts; x another four of itself (the
    root, its inverse, and two products); its place by the slope, and what rounding to a level adds.
    """
    near, c = [], BUILTIN.astype(np.float64)
    slopes = 1 / np.diff(c)
    for i, at in blocks_of(g.shape, block):
        x = g[at].astype(np.float64)
        before, after = (layout.read(state, i, at) for state in (old, new))
        nu = _levels_of(before.exponent)[before.h]
        m = c[before.k] * before.scale * np.sqrt(nu)
        parts = np.maximum(np.abs(m), np.abs(x))
        m = m + (1 - s.b1) * (x - m)
        nu = s.b2 * nu + (1 - s.b2) * layout.average(x**2)

        mantissa, power = np.frexp(nu.max())
        assert after.exponent == (127 + power - (mantissa == 0.5) if nu.max() else 0)
        levels = _levels_of(after.exponent)
        if nu.max():
            clipped = np.maximum(nu, levels[0])
            place = np.interp(clipped, levels, np.arange(256))
            gap = np.diff(levels, append=np.inf)[np.floor(place).astype(int)]
            error = np.where(nu > levels[0], 5 * U * clipped / gap + 2.0**-19, 0)
            near.append(_check_codes(after.h, place, layout.fraction(u[0][at]), error, 255))

        root = np.sqrt(levels[after.h])
        divisor = np.where(root == 0, np.inf, root)
        scale = np.abs(m / divisor).max()
        error = (10 * U * parts / divisor).max() + 4 * U * scale
        down, up = (error + e * (scale + error) for e in layout.scale_error)
        assert -down <= after.scale - scale <= up

        if not after.scale:
            continue  # any code is 0
        divisor *= after.scale
        place = np.interp(m / divisor, c, np.arange(16))
        slope = slopes[np.minimum(np.floor(place).astype(int), 14)]
        error = slope * 14 * U * parts / divisor + _place_error(BUILTIN)
        error = np.where(parts == 0, 0, error)
        near.append(_check_codes(after.k, place, u[1][at], error, 15))
    return near


def _check_update(update, g, new: Moments, block, t: int, s: _Setting, layout: Layout) -> None:
    """The direction from the new state.

    24 roundings of the products, quotients and the root; a correction 1 - b^t has the error of the
    power, 4 roundings, divided by itself at t = 1, of which the root takes half.
    """
    bound = U * (24 + 4 / (1 - s.b1) + 2 / (1 - s.b2))
    for i, at in blocks_of(g.shape, block):
        read = layout.read(new, i, at)
        nu = _levels_of(read.exponent)[read.h]
        m = BUILTIN.astype(np.float64)[read.k] * read.scale * np.sqrt(nu)
        terms = [m / (1 - s.b1**t)]
        if s.nesterov:
            terms = [s.b1 * m / (1 - s.b1 ** (t + 1)), (1 - s.b1) * g[at] / (1 - s.b1**t)]
        root = np.sqrt(nu / (1 - s.b2**t) + s.eps_root) + s.eps
        error = bound * np.abs(terms).max(axis=0) / root
        assert np.all(np.abs(update[at] - sum(terms) / root) <= error)


@pytest.mark.once
@pytest.mark.parametrize("name", _SETTINGS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_step_is_what_the_docstring_says(name, kind, monkeypatch, request):
    """20 steps, each restated from our own last state: all but a counted handful of codes."""
    setting, layout = _SETTINGS[name], LAYOUTS[kind]
    monkeypatch.setattr(_backend, "CHUNK", setting.chunk)
    # It knows the leaves from the last setting, with its pieces; nor may others know these.
    _update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    request.addfinalizer(_update_leaf.clear_cache)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = setting.make(plan_of(LEAVES, layout.kind))
    step, state = jax.jit(optimizer.update), optimizer.init(zeros_of(LEAVES))
    near = []
    for t in range(1, _STEPS + 1):
        grads = gradients(LEAVES, t)
        updates, new = step(grads, state)
        for leaf, (shape, block) in LEAVES.items():
            old_moments, new_moments = (moments_of(s, leaf) for s in (state, new))
            u = _uniform(leaf, t, np.arange(math.prod(shape)).reshape(shape))
            g = grads[leaf]
            near += _check_step(g, old_moments, new_moments, block, u, setting, layout)
            _check_update(np.asarray(updates[leaf]), g, new_moments, block, t, setting, layout)
        state = new
    differ, expected = (sum(column) for column in zip(*near, strict=True))
    codes = 2 * _STEPS * sum(math.prod(shape) for shape, _ in LEAVES.values())
    assert differ <= expected + 5 * math.sqrt(expected) and expected < 1e-4 * codes
