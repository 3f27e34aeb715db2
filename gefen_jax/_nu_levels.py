"""Second moments in eight bits: 256 levels below a block's largest, and rounding to them.

The levels are the floats with 4 bits of mantissa, of 16 octaves. So rounding is one integer
addition: a float32's lower bits say how far it is on its way to the next level, and adding as many
bits of a fraction carries with just that probability. Exponents are those of float32, biased by
127. A nu below the lowest level takes it: the steps of its elements are shorter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

_MANTISSA = 23  # bits of a float32's mantissa
_KEPT = 4  # of them in a code of nu; the other bits of a byte are 4 of the exponent
_DROPPED = _MANTISSA - _KEPT
_INFINITE = 255  # the biased exponent of inf
NEAREST = np.uint32(1 << 31)  # the fraction by which rounding takes the nearest


def nu_level(exponent: UInt8[Array, "..."], code: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The levels that exponents and codes stand for; 0 where they fall below the floats."""
    place = (exponent.astype(jnp.int32) << _KEPT) + code.astype(jnp.int32) - 255
    return jax.lax.bitcast_convert_type(jnp.maximum(place, 0) << _DROPPED, jnp.float32)


def round_nu(
    nu: tuple[Float[Array, "..."], ...],
    fractions: tuple[UInt32[Array, "..."], ...],
    inside: tuple[int, ...],
) -> tuple[UInt8[Array, "..."], tuple[UInt8[Array, "..."], ...]]:
    """The blocks' exponents, and codes of each of the arrays that they are made of."""
    largest = _bits(jnp.max(functools.reduce(jnp.maximum, nu), axis=inside, keepdims=True))
    exponent = (largest + ((1 << _MANTISSA) - 1)) >> _MANTISSA
    exponent = jnp.minimum(exponent, _INFINITE).astype(jnp.int32)

    def code(x: Array, fraction: Array) -> Array:
        place = ((_bits(x) + (fraction >> (32 - _DROPPED))) >> _DROPPED).astype(jnp.int32)
        return jnp.clip(place - (exponent << _KEPT) + 255, 0, 255).astype(jnp.uint8)

    codes = tuple(code(x, f) for x, f in zip(nu, fractions, strict=True))
    return exponent.astype(jnp.uint8), codes


def _bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
