r"""Companded codes: a moment in eight bits per element, in groups that share a scale.

A first moment m becomes int8, a second moment v uint8. Per group, with s its scale,

    s = max |m|,       c = round(127 y),  y = 2 x / (1 + |x|),  x = m / s
    s = max sqrt(v),   c = round(255 x),                        x = sqrt(v) / s

and back, x = y / (2 - |y|) for a first moment. (FlashOptim, arXiv 2602.23349.) The curve spends
codes on what is small beside its group's largest, which comes back as it was. Errors, beside s:

    |x' - x| <= (1 + max(|x|, |x'|))^2 / 508     from 1/508 at 0 to 1/127 at 1, for m
    |x' - x| <= 1 / 510                          for v, whose root this is

One rule is ours: a second moment that is not 0 has no code 0, so the error is up to 1/255 below
1/510. Published, such a one is forgotten in a step. If then the gradient is 0 and a first moment
has survived, the update is m / eps, a hundred million times m.

A scale is float32, or bfloat16. In bfloat16 numbers are up to 0.8 % apart: under a decay of 0.992
or more the nearest one is the same again, for ever. So it is rounded up or down, right on average
(`gefen_jax._dither`). float16, as published, has 0 for what is below 3e-8, and infinity beyond
65519.

What is not finite makes its group NaN, which stays. So does a first moment beyond 1.7e38.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Integer, UInt8, UInt32

FIRST, SECOND = np.dtype(np.int8), np.dtype(np.uint8)


class Coded(NamedTuple):
    """A moment in groups: ``code`` int8 for a first one, uint8 for a second one, and scales."""

    code: Integer[Array, "..."]
    scale: Float[Array, "..."]


def _scale(x: Float[Array, "..."], inside: tuple[int, ...]) -> Float[Array, "..."]:
    # XLA's maximum on a CPU passes over NaN.
    scale = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x), axis=inside, keepdims=True)
    # inf * 0 is NaN. Twice the scale, because that is what `_encode_first` divides by.
    return scale + (scale + scale) * 0


def _encode_first(
    m: Float[Array, "..."], inside: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Array]:
    magnitude = jnp.abs(m)
    scale = _scale(magnitude, inside)
    # 2 x / (1 + |x|) with one division. The sum is 0 where the whole group is.
    y = 2 * m / jnp.maximum(scale + magnitude, jnp.finfo(jnp.float32).tiny)
    return _rounded(127 * y, FIRST), scale


def _encode_second(
    v: Float[Array, "..."], inside: tuple[int, ...]
) -> tuple[UInt8[Array, "..."], Array]:
    root = jnp.sqrt(v)
    scale = _scale(root, inside)
    y = root * (255 / jnp.where(scale == 0, jnp.inf, scale))
    return _rounded(jnp.where(root > 0, jnp.maximum(y, 1), 0), SECOND), scale


def _rounded(y: Float[Array, "..."], dtype: np.dtype) -> Integer[Array, "..."]:
    # The integer of a NaN differs between devices.
    return jnp.where(jnp.isnan(y), 0, jnp.round(y)).astype(dtype)


def encode(x: Float[Array, "..."], dtype: np.dtype, inside: tuple[int, ...]) -> Coded:
    """Codes of a moment, and its scales in float32.

    Args:
      x: The moment, float32; a second one is >= 0.
      dtype: `FIRST`, int8, or `SECOND`, uint8: which moment it is.
      inside: The axes that lie inside a group.

    Returns:
      ``code`` of the moment's shape, ``scale`` with 1 for the axes inside.

    Examples:
      >>> m = jnp.array([[1.0, -0.5, 0.01, 0.0]])
      >>> coded = encode(m, FIRST, (1,))
      >>> print(coded.code, coded.scale, decode(coded))
      [[127 -85   3   0]] [[1.]] [[ 1.         -0.5029586   0.01195219  0.        ]]
      >>> coded = encode(m**2, SECOND, (1,))
      >>> print(coded.code, coded.scale)
      [[255 128   3   0]] [[1.]]

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026
    """
    return Coded(*(_encode_first if dtype == FIRST else _encode_second)(x, inside))


def decode(coded: Coded) -> Float[Array, "..."]:
    """The moment that codes and scales, which broadcast, stand for, in float32."""
    code, scale = coded.code.astype(jnp.float32), coded.scale.astype(jnp.float32)
    if coded.code.dtype == FIRST:
        # y / (2 - |y|) for y = c / 127, with integers: 127 and -127 are the scale exactly.
        return code / (254 - jnp.abs(code)) * scale
    return jnp.square(code / 255 * scale)


def round_scale(
    scale: Float[Array, "..."], dtype: DTypeLike, word: UInt32[Array, "..."]
) -> Float[Array, "..."]:
    """A scale in float32 as it is stored: in bfloat16 the number below it or the one above.

    Args:
      scale: Scales, float32, >= 0 or NaN.
      dtype: float32 or bfloat16.
      word: Fractions in units of 2^-32, independent of the scale.

    Returns:
      The scales in ``dtype``. The next larger number with the probability that makes them right on
      average, or what ``dtype`` can hold exactly.

    Examples:
      >>> scale, words = jnp.float32([1 + 2**-9] * 4), jnp.uint32([0, 2**30, 2**31, 3 * 2**30])
      >>> print(round_scale(scale, jnp.bfloat16, words))
      [1 1 1 1.00781]
    """
    if jnp.dtype(dtype) == jnp.float32:
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) + (word >> 16)
    high = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    # A NaN's own bits could carry into the sign.
    return jnp.where(jnp.isnan(scale), jnp.nan, high).astype(jnp.bfloat16)
