"""Nearest code of a normalised momentum, exactly: a lookup table and one compare.

The rule, for a sorted codebook c and x in [-1, 1]: ``i = searchsorted(c, x)`` (left), then
``i - 1`` if ``|x - c[i - 1]| <= |x - c[i]|`` in float32, else ``i``. Monotone in x, so it is a row
of thresholds: ``t[j]`` is the largest float32 whose code is at most j, and

    code(x) = #{j : t[j] < x}.

Cut [-1, 1] into 8192 bins: with at most one threshold in each, that is one table read by bin and
one compare. Every codebook learned with a fixed 0 is of that kind: its thresholds are at least
0.75 of a histogram bin apart, but for the pair around 0, which the bin edge at 0 separates, and the
lookup's bins are half a histogram bin. `lookup_is_exact` checks it all the same, on the host, when
a plan is made. Where it fails (the reference's codebooks can hold duplicates), eight branch-free
halving steps over the codebook and the rule itself give the same codes, ten times more slowly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, UInt8

from gefen_jax._constants import CODES, HISTOGRAM_BINS

_LOOKUP_BINS = 2 * HISTOGRAM_BINS
_HALF = _LOOKUP_BINS // 2
# The closed form of a threshold starts at the midpoint; rounding can move it by this many ulps.
_ULPS = 2
_BEYOND = np.finfo(np.float32).max


class Encoder(NamedTuple):
    """Tables that follow from a codebook; made once per step, read by every leaf.

    Invariants: ``count_below[b] = #{j : bin(t[j]) < b}``, ``next_threshold[b] =
    t[count_below[b]]`` (a number beyond all past the last).
    """

    codebook: Float[Array, "codes"]
    count_below: UInt8[Array, "lookup_bins"]
    next_threshold: Float[Array, "lookup_bins"]


def _lookup_bin(x: Float[Array, "..."]) -> Array:
    # 16-bit integers, clamped as integers: the vector units convert them four times faster than
    # 32-bit ones here, and a NaN cannot index outside the table.
    return jnp.minimum(((x + 1) * _HALF).astype(jnp.uint16), _LOOKUP_BINS - 1)


def take(table: Float[Array, "n"] | UInt8[Array, "n"], index: Array) -> Array:
    """Entries of a small table; every index must be in range."""
    # On a mesh with Explicit axes a gather does not guess that its result lies like its indices.
    sharding = jax.typeof(index).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    # In range by construction. To say that none is negative, too, makes XLA on a GPU run one kernel
    # more in every turn of a dual code's loop.
    return table.at[index].get(
        mode="promise_in_bounds", out_sharding=sharding if explicit else None
    )


def thresholds(codebook: Any, xp: Any = jnp) -> Any:
    """The largest float32 that still takes the lower of two neighbouring codes.

    With ``xp=numpy`` on the host, where the same operations round alike.
    """
    lower, upper = codebook[:-1], codebook[1:]
    best = middle = lower + (upper - lower) * 0.5
    for direction in (-2.0, 2.0):  # no inf, which `jax_debug_infs` would find
        x = middle
        for _ in range(_ULPS):
            x = xp.nextafter(x, xp.full_like(x, direction))
            takes_lower = xp.abs(x - lower) <= xp.abs(x - upper)
            if direction > 0:
                best = xp.where(takes_lower, x, best)
            else:
                first_fails = xp.abs(best - lower) > xp.abs(best - upper)
                best = xp.where(first_fails, x, best)
    return best


def make_encoder(codebook: Float[Array, "codes"]) -> Encoder:
    """Builds the tables from the codebook in the state (traceable)."""
    t = thresholds(codebook)
    count_below = _count_below(_lookup_bin(t).astype(jnp.int32))
    padded = jnp.concatenate([t, jnp.full((1,), _BEYOND, t.dtype)])
    return Encoder(codebook, count_below, take(padded, count_below))


def _count_below(bins: Int[Array, "n"]) -> UInt8[Array, "lookup_bins"]:
    """For every lookup bin, how many of ``bins`` lie below it."""
    # An exclusive prefix sum as two small matrix products: XLA's cumsum is slow on a CPU. Counts
    # up to 255 are exact in whatever precision the backend multiplies (8 bits suffice).
    side = 64
    marks = jnp.zeros(_LOOKUP_BINS, jnp.float32).at[bins].add(1).reshape(-1, side)
    strictly_upper = np.triu(np.ones((max(marks.shape), max(marks.shape)), np.float32), 1)
    within = marks @ strictly_upper[:side, :side]
    before = marks.sum(1) @ strictly_upper[: len(marks), : len(marks)]
    return (within + before[:, None]).reshape(-1).astype(jnp.uint8)


def encode(
    encoder: Encoder, x: Float[Array, "*shape"], *, exact_lookup: bool
) -> UInt8[Array, "*shape"]:
    """The code of each x in [-1, 1]; ``exact_lookup`` says what `lookup_is_exact` found."""
    if exact_lookup:
        bins = _lookup_bin(x)
        above = x > take(encoder.next_threshold, bins)
        return take(encoder.count_below, bins) + above.astype(jnp.uint8)
    return _search(encoder.codebook, x)


def _search(codebook: Float[Array, "codes"], x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """searchsorted (left) in eight halving steps, then the rule's own comparison."""
    i = jnp.zeros(x.shape, jnp.int32)
    step = CODES // 2
    while step:
        i = jnp.where(x > take(codebook, i + (step - 1)), i + step, i)
        step //= 2
    below = jnp.maximum(i - 1, 0)
    take_lower = jnp.abs(x - take(codebook, below)) <= jnp.abs(x - take(codebook, i))
    return jnp.where(take_lower, below, i).astype(jnp.uint8)


def decode(encoder: Encoder, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entries of the codebook, float32 in [-1, 1]."""
    return take(encoder.codebook, codes)


def _ordered(x: Float[np.ndarray, "n"]) -> np.ndarray:
    """float32 as integers in the same order (and back: it is its own inverse)."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordered(order: np.ndarray) -> Float[np.ndarray, "n"]:
    bits = np.where(order < 0, (-order) | 0x80000000, order)
    return bits.astype(np.uint32).view(np.float32)


def exact_thresholds(codebook: Float[np.ndarray, "codes"]) -> Float[np.ndarray, "codes_less_1"]:
    """The thresholds by bisection over all float32 between two codes (host, NumPy)."""
    lower, upper = codebook[:-1], codebook[1:]
    good, bad = _ordered(lower), _ordered(upper) + 1
    while np.any(bad - good > 1):
        middle = (good + bad) // 2
        x = _from_ordered(middle)
        takes_lower = np.abs(x - lower) <= np.abs(x - upper)
        good, bad = np.where(takes_lower, middle, good), np.where(takes_lower, bad, middle)
    return _from_ordered(good)


def lookup_is_exact(codebook: Float[np.ndarray, "codes"]) -> bool:
    """Whether the lookup table gives the rule's code for every float32 in [-1, 1].

    It does if no bin holds two thresholds and the closed form finds each of them.
    """
    if np.any(np.diff(codebook) <= 0):
        return False
    exact = exact_thresholds(codebook)
    bins = np.minimum(
        ((exact + np.float32(1)) * np.float32(_HALF)).astype(np.int64), _LOOKUP_BINS - 1
    )
    if len(np.unique(bins)) < len(bins):
        return False
    # On the host: inside of a `shard_map` that is not jitted, all that jnp makes is a tracer.
    return bool(np.array_equal(thresholds(codebook, np), exact))
