"""A weight in two parts, inside a kernel: merged and split again by a few integer operations.

The specification is `gefen_jax._split`, here for bfloat16 alone, whose bits are the upper half of a
float32's. With 16, 24 or 32 bits in all, k = bits - 16 of them are the correction's. Of a float32's
bits as a signed integer B,

    merge:  B = (weight << 16) + (correction << (16 - k))
    split:  t = (B + up) >> (16 - k),  weight = (t + 2^(k-1)) >> k,  correction = t - (weight << k)

where up < 2^(16 - k) decides the rounding: a fraction, or what gives the nearest, ties to even. The
sign stays where it is, as the highest bit: shifts keep it, and no sum of these carries into it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# Of a correction's dtype; without one, 16.
BITS = {None: 16, np.dtype(np.int8): 24, np.dtype(np.int16): 32}
_NAN = 0x7FC00000


def merge(
    weight: Float[Array, "*shape"], correction: Int[Array, "*shape"] | None
) -> Float[Array, "*shape"]:
    """The float32 that a weight in bfloat16 and its correction stand for."""
    # The bits, not the number: a conversion is what a compiler may take for the identity.
    bits = jax.lax.bitcast_convert_type(weight, jnp.int16).astype(jnp.int32) << 16
    if correction is not None:
        unused = 32 - BITS[correction.dtype]
        bits = bits + (correction.astype(jnp.int32) << unused)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def split(
    theta: Float[Array, "*shape"], bits: int, fraction: UInt32[Array, "*shape"] | None
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"] | None]:
    """A float32 as a weight and its correction, an int32; by a fraction, or to the nearest."""
    drop, keep = 32 - bits, bits - 16
    # Not a NaN's own bits, which could carry into the sign.
    t = jnp.where(jnp.isnan(theta), _NAN, jax.lax.bitcast_convert_type(theta, jnp.int32))
    if drop:
        if fraction is None:
            up = (1 << (drop - 1)) - 1 + ((t >> drop) & 1)
        else:
            up = (fraction >> (32 - drop)).astype(jnp.int32)
        t = (t + up) >> drop
    high = (t + ((1 << keep) >> 1)) >> keep
    weight = jax.lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16)
    return weight, t - (high << keep) if keep else None
