"""A weight in two parts, inside a kernel: merged and split again by a few integer operations.

The specification is `gefen_jax._split`. A number is an integer B in two's complement: its sign is
the highest bit, the 31 below are the M of that module. For bfloat16 B is the float32's bits. With
16, 24 or 32 bits in all, k = bits - 16 of them are the correction's:

    merge:  B = (weight << 16) + (correction << (16 - k))
    split:  t = (B + up) >> (16 - k),  weight = (t + 2^(k-1)) >> k,  correction = t - (weight << k)

where up < 2^(16 - k) decides the rounding: a fraction, or what gives the nearest, ties to even. The
sign stays where it is: shifts keep it, and no sum of these carries into it.

For float16 M is the float32's bits with the exponent rebased, shifted by the three bits that the
exponent is shorter; below 2^-14 it is the magnitude in units of 2^-40, rounded to the nearest. Not
by a rounding of floats, which Pallas' Triton dialect lacks: from 2^-17 on a float32 is a multiple
of the unit; below, in [2^-17, 2^-16] after 2^-17 is added, its last bit is one unit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt32

# Of a correction's dtype; without one, 16.
BITS = {None: 16, np.dtype(np.int8): 24, np.dtype(np.int16): 32}
DTYPES = (jnp.bfloat16, jnp.float16)  # of weights

_SIGN = -(1 << 31)
_NAN, _NAN16 = 0x7FC00000, 0x7E000000  # as B, for bfloat16 and for float16
_INF16 = 0x7C000000
# Of float16: how far its exponents begin from a float32's, where its infinity would lie, and B of
# its smallest normal number.
_REBASE, _FIRST_BEYOND, _NORMAL16 = 112 << 23, 143 << 23, 1 << 26
_NORMAL, _UNIT = np.float32(2.0**-14), np.float32(2.0**-40)
_EVEN = np.float32(2.0**-17)  # from here to twice as much, float32s are one unit apart
_EVEN_BITS = 110 << 23


def _bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _from_float32(theta: Float[Array, "*shape"], dtype: Any) -> Int32[Array, "*shape"]:
    """B of a number."""
    bits = _bits(theta)
    # Not a NaN's own bits, which could carry into the sign.
    if dtype == jnp.bfloat16:
        return jnp.where(jnp.isnan(theta), _NAN, bits)
    size = jnp.abs(theta)
    tiny = _bits(size + _EVEN) - _EVEN_BITS
    small = (size * (1 / _UNIT)).astype(jnp.int32)
    magnitude = (jnp.minimum(bits & ~_SIGN, _FIRST_BEYOND) - _REBASE) << 3
    magnitude = jnp.where(size < _NORMAL, small, magnitude)
    magnitude = jnp.where(size < _EVEN, tiny, magnitude)
    return jnp.where(jnp.isnan(theta), _NAN16, magnitude) | (bits & _SIGN)


def _to_float32(b: Int32[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """The number of a B."""
    if dtype == jnp.float16:
        magnitude = b & ~_SIGN
        # Once more, and the exponent of float16's infinity is that of float32's: 31 + 2 * 112.
        rebase = jnp.where(magnitude >= _INF16, 2 * _REBASE, _REBASE)
        fixed = _bits(magnitude.astype(jnp.float32) * _UNIT)
        b = (b & _SIGN) | jnp.where(magnitude < _NORMAL16, fixed, (magnitude >> 3) + rebase)
    return jax.lax.bitcast_convert_type(b, jnp.float32)


def merge(
    weight: Float[Array, "*shape"], correction: Int[Array, "*shape"] | None
) -> Float[Array, "*shape"]:
    """The float32 that a weight, in bfloat16 or float16, and its correction stand for."""
    # The bits, not the number: a conversion is what a compiler may take for the identity.
    b = jax.lax.bitcast_convert_type(weight, jnp.int16).astype(jnp.int32) << 16
    if correction is not None:
        unused = 32 - BITS[correction.dtype]
        b = b + (correction.astype(jnp.int32) << unused)
    return _to_float32(b, weight.dtype)


def split(
    theta: Float[Array, "*shape"], bits: int, dtype: Any, fraction: UInt32[Array, "*shape"] | None
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"] | None]:
    """A float32 as a weight and its correction, an int32; by a fraction, or to the nearest."""
    drop, keep = 32 - bits, bits - 16
    t = _from_float32(theta, dtype)
    if drop:
        if fraction is None:
            up = (1 << (drop - 1)) - 1 + ((t >> drop) & 1)
        else:
            up = (fraction >> (32 - drop)).astype(jnp.int32)
        t = (t + up) >> drop
    high = (t + ((1 << keep) >> 1)) >> keep
    weight = jax.lax.bitcast_convert_type(high.astype(jnp.int16), dtype)
    return weight, t - (high << keep) if keep else None
