"""Stochastic rounding to the levels of a small codebook.

For a sorted codebook c and x between c[i] and c[i + 1], let

    P(x) = i + (x - c[i]) / (c[i + 1] - c[i]),

a monotone line of pieces. With a fraction u, floor(P(x) + u) is i + 1 for the share P(x) - i of all
u: right on average. Cut [-1, 1] into 2048 bins: where the codebook lies on their edges, P is one
line in each, and two numbers from a table are all it takes. An entry maps to itself whatever u is
where it is 0, and but for rounding everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from gefen_jax._encoder import take

_BINS = 2048
_HALF = _BINS // 2


class Levels(NamedTuple):
    """A codebook and the tables that follow from it; made once per step, read by every leaf."""

    codebook: Float[Array, "levels"]
    offset: Float[Array, "bins"]
    slope: Float[Array, "bins"]


def on_grid(codebook: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "levels"]:
    """The codebook with its entries moved to the nearest bin edges, as `make_levels` wants it."""
    return (np.round(np.asarray(codebook) * _HALF) / _HALF).astype(np.float32)


def make_levels(codebook: Float[Array, "levels"]) -> Levels:
    """Builds the tables from the codebook in the state (traceable)."""
    edges = np.arange(_BINS, dtype=np.float32) / _HALF - 1
    below = jnp.sum(codebook[None, :-1] <= edges[:, None], axis=1, dtype=jnp.int32) - 1
    slope = take(1 / jnp.diff(codebook), below)
    start = below.astype(jnp.float32)
    return Levels(codebook, start - take(codebook, below) * slope, slope)


def round_to_level(
    levels: Levels, x: Float[Array, "*shape"], fraction: UInt32[Array, "*shape"]
) -> UInt8[Array, "*shape"]:
    """A code of each x in [-1, 1]; ``fraction`` in units of 2^-32 decides between two."""
    # Bins and codes are read off the bits of floats: conversions are slow where vectors have to
    # saturate them, as XLA defines them to. In [2, 4), the upper 11 bits of the mantissa are bins.
    bins = (_bits(x + 3) >> 12) - (0x40000000 >> 12)
    bins = jnp.clip(bins, 0, _BINS - 1)  # a NaN too
    place = take(levels.offset, bins) + take(levels.slope, bins) * x
    # 20 bits: the sum of a place below 16 and 1 - 2^-20 is a float32, so no entry rounds up. As
    # signed integers: vector units convert those.
    u = (fraction >> 12).astype(jnp.int32).astype(jnp.float32) * 2.0**-20
    # From 2^23 on, floats are consecutive integers, and so are their bits.
    code = _bits(jnp.floor(place + u) + 2.0**23) - 0x4B000000
    return jnp.clip(code, 0, levels.codebook.size - 1).astype(jnp.uint8)


def _bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def level(levels: Levels, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entries of the codebook, float32 in [-1, 1]."""
    return take(levels.codebook, codes.astype(jnp.int32))
