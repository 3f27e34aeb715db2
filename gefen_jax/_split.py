"""Weight splitting: a float32 as a narrow weight and a small integer beside it.

A magnitude is written as an integer M whose upper 15 bits are the narrow format's own, and whose
lower 16 continue them. For bfloat16 that is the float32's bits. For float16 exponents are rebased,
and below 2^-14, where its numbers are evenly spaced, M counts multiples of 2^-40. M is monotone and
piecewise linear in the magnitude, so rounding it rounds the number, and unbiased rounding of the
one is unbiased rounding of the other.

With 16, 24 or 32 bits in all, k = bits - 16 of them are the correction's:

    t = round(M / 2^(16 - k)),  weight = (t + 2^(k-1)) >> k,  correction = t - (weight << k),

and back, M = ((weight << k) + correction) << (16 - k). The weight is the nearest to t, so the
correction has k bits with its sign. Only integers decide: no dtype is widened or narrowed here that
XLA, which may keep excess precision, could take for the identity.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from gefen_jax._not_differentiable import not_differentiable

BITS = (16, 24, 32)

_FLOAT32_INF = 0x7F800000
_FLOAT32_NAN = 0x7FC00000


class _Format(NamedTuple):
    """A narrow format: the bits of its infinity and of a NaN."""

    inf: int
    nan: int


_FORMATS = {
    jnp.dtype(jnp.bfloat16): _Format(0x7F80, 0x7FC0),
    jnp.dtype(jnp.float16): _Format(0x7C00, 0x7E00),
}
NARROW = tuple(_FORMATS)

# float16: 2^-14, its smallest normal number, and 2^16, where its infinity would lie, in the bits of
# a float32; and how far apart the exponents begin.
_MIN_NORMAL, _FIRST_BEYOND, _REBASE = 113 << 23, 143 << 23, 112 << 23


def correction_dtype(bits: int) -> np.dtype | None:
    """int8, int16, or None where there is no correction."""
    return {16: None, 24: np.dtype(np.int8), 32: np.dtype(np.int16)}[bits]


def _bits(x: Array, dtype: Any) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, dtype)


def _sign_and_bits(x: Array, dtype: Any) -> tuple[Bool[Array, "..."], Int32[Array, "..."]]:
    """Whether the sign bit is set, and the other bits."""
    bits = _bits(x, dtype)
    return bits < 0, (bits & np.iinfo(dtype).max).astype(np.int32)


def _from_float32(theta: Float32[Array, "..."], dtype: np.dtype) -> tuple[Any, Int32[Array, "..."]]:
    """Whether a number is negative, and its magnitude as M."""
    negative, bits = _sign_and_bits(theta, np.int32)
    magnitude = bits
    if dtype == jnp.float16:
        # In float32 a product with a power of two is exact, and so is the rounded integer.
        fixed = jax.lax.round(jnp.abs(theta) * np.float32(2.0**40), _TO_EVEN).astype(np.int32)
        rebased = (jnp.minimum(bits, _FIRST_BEYOND) - _REBASE) << 3
        magnitude = jnp.where(bits < _MIN_NORMAL, fixed, rebased)
    # Not a NaN's own bits: adding to them could carry into the sign.
    return negative, jnp.where(bits > _FLOAT32_INF, _FORMATS[dtype].nan << 16, magnitude)


_TO_EVEN = jax.lax.RoundingMethod.TO_NEAREST_EVEN


def _to_float32(negative: Any, magnitude: Int32[Array, "..."], dtype: np.dtype) -> Any:
    """The inverse of `_from_float32`."""
    bits = magnitude
    if dtype == jnp.float16:
        inf = _FORMATS[dtype].inf << 16
        bits = (magnitude >> 3) + _REBASE
        bits = jnp.where(magnitude >= inf, _FLOAT32_INF, bits)
        bits = jnp.where(magnitude > inf, _FLOAT32_NAN, bits)
        # Here, too, the integer is exact: it has 24 significant bits.
        fixed = magnitude.astype(jnp.float32) * np.float32(2.0**-40)
        bits = jnp.where(magnitude < (_MIN_NORMAL - _REBASE) << 3, _bits(fixed, np.int32), bits)
    bits = jnp.where(negative, bits | np.int32(-(1 << 31)), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _round(magnitude: Int32[Array, "..."], drop: int, dither: Any) -> Int32[Array, "..."]:
    """Without the lowest bits: to the nearest, ties to even; or, with dither, right on average."""
    if not drop:
        return magnitude
    if dither is None:
        up = (1 << (drop - 1)) - 1 + ((magnitude >> drop) & 1)
    else:
        up = (dither >> (32 - drop)).astype(np.int32)  # below 2^drop: exact values stay
    return (magnitude + up) >> drop


def _weight(
    negative: Any, rounded: Int32[Array, "..."], bits: int, dtype: np.dtype
) -> Float[Array, "..."]:
    keep = bits - 16
    high = (rounded + ((1 << keep) >> 1)) >> keep
    high = high | jnp.where(negative, 0x8000, 0)
    return jax.lax.bitcast_convert_type(high.astype(jnp.uint16), dtype)


def _correction(
    negative: Any, rounded: Int32[Array, "..."], weight: Float[Array, "..."], bits: int
) -> Int[Array, "..."] | None:
    """What makes up for the weight, or the most of it that there is room for."""
    dtype = correction_dtype(bits)
    if dtype is None:
        return None
    keep = bits - 16
    weight_negative, high = _sign_and_bits(weight, np.int16)
    most = (1 << (keep - 1)) - 1
    # Below a weight of 0 lie the numbers of the other sign.
    least = jnp.where(high == 0, 0, -most - 1)
    low = jnp.clip(rounded - (high << keep), least, most)
    low = jnp.where(negative == weight_negative, low, least)
    return jnp.where(high > _FORMATS[weight.dtype].inf, 0, low).astype(dtype)


def _split(theta: Any, bits: int, dtype: np.dtype, dither: Any) -> tuple[Any, Any, Any]:
    negative, magnitude = _from_float32(theta, dtype)
    rounded = _round(magnitude, 32 - bits, dither)
    return negative, rounded, _weight(negative, rounded, bits, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def split(
    theta: Float32[Array, "*shape"], bits: int, dtype: np.dtype
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"] | None]:
    """A number as a weight and its correction; like a cast, one to look through for derivatives."""
    negative, rounded, weight = _split(theta, bits, dtype, None)
    return weight, _correction(negative, rounded, weight, bits)


@split.defjvp
def _split_jvp(bits: int, dtype: np.dtype, primals: Any, tangents: Any) -> Any:
    out = split(*primals, bits, dtype)
    no_tangent = None if out[1] is None else np.zeros(out[1].shape, jax.dtypes.float0)
    return out, (tangents[0].astype(dtype), no_tangent)


@jax.custom_jvp
def merge(
    weight: Float[Array, "*shape"], correction: Int[Array, "*shape"] | None
) -> Float32[Array, "*shape"]:
    """The number that a weight and its correction stand for; a cast, for derivatives."""
    negative, high = _sign_and_bits(weight, np.int16)
    magnitude = high << 16
    if correction is not None:
        low = correction.astype(np.int32) << (16 - 8 * correction.dtype.itemsize)
        magnitude = jnp.where(high > _FORMATS[weight.dtype].inf, magnitude, magnitude + low)
    return _to_float32(negative, magnitude, weight.dtype)


@merge.defjvp
def _merge_jvp(primals: Any, tangents: Any) -> Any:
    return merge(*primals), tangents[0].astype(jnp.float32)


def advance(
    weight: Float[Array, "*shape"],
    correction: Int[Array, "*shape"] | None,
    update: Float32[Array, "*shape"],
    bits: int,
    dither: UInt32[Array, "*shape"] | None = None,
) -> tuple[Float32[Array, "*shape"], Int[Array, "*shape"] | None]:
    """What to add to the weight in float32, and the correction that then goes with it.

    The sum ``weight + delta``, cast to the weight's dtype, is the new weight wherever float32 can
    say so (see `gefen_jax.with_split_weights`). The correction is that of the sum, whatever it is.
    """
    update = not_differentiable(update, _NO_DERIVATIVE)
    theta = merge(weight, correction)
    # Not `theta + 0`, which is no identity for -0, nor for subnormals where they are flushed.
    theta = jnp.where(update == 0, theta, theta + update)
    negative, rounded, wanted = _split(theta, bits, weight.dtype, dither)
    same = _bits(wanted, np.int16) == _bits(weight, np.int16)
    old = merge(weight, None)
    # x + -0 is x, for x = -0, too.
    delta = jnp.where(same, np.float32(-0.0), merge(wanted, None) - old)
    applied = (old + delta).astype(weight.dtype)
    return delta, _correction(negative, rounded, applied, bits)


_NO_DERIVATIVE = (
    "rounding has no useful derivative: the update of `with_split_weights` cannot be"
    " differentiated. Use the wrapped transformation with float32 parameters where you need it."
)
