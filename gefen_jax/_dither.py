"""Dither: the fractions by which stochastic rounding decides, with nothing to thread or store.

The fraction of an element at step t is

    u_t = frac(hash(leaf, position) + t * (sqrt(5) - 1) / 2).

Over positions it is as good as random; over steps it visits every interval of length w about every
1 / w steps. So rounding up when u_t is below the fraction above the lower level is unbiased, like
independent random numbers, but its errors cancel within a few steps instead of adding up to a
random walk (what that gave: `examples/benchmarks/research.md`).

Leaf, step and row-major position decide the fraction alone (in a leaf whose last run is shorter,
that run counts from 0 again). So training resumes bit for bit, and a mesh, or a loop over pieces,
sees what one device sees. The hash is the 32-bit finaliser "lowbias32" (Chris Wellons, `Hash
Prospector <https://github.com/skeeto/hash-prospector>`_, 2018) but for its last shift: only high
bits of its result are used. Additive recurrences: Weyl 1916.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

_GOLDEN = np.uint32(0x9E3779B9)  # (sqrt(5) - 1) / 2, in units of 2^-32
_MIX1, _MIX2, _MIX3 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x9C8F2D35)


def leaf_phases(paths: Sequence[str], count: Int[Array, ""]) -> UInt32[Array, "leaves two"]:
    """Two words per leaf: its name's, and the step's."""
    names = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    step = jnp.broadcast_to(count.astype(jnp.uint32) * _GOLDEN, names.shape)
    return jnp.stack([jnp.asarray(names), step], axis=-1)


def dither(
    phase: UInt32[Array, "two"], position: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Two independent fractions per element, in units of 2^-32.

    Positions of a leaf beyond 2^32 elements wrap around.
    """
    word = position ^ phase[0]
    word = (word ^ (word >> 16)) * _MIX1
    word = (word ^ (word >> 15)) * _MIX2
    return word + phase[1], (word ^ (word >> 16)) * _MIX3 + phase[1]


def positions(shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """The row-major position of every element."""
    total = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        stride = np.uint32(math.prod(shape[axis + 1 :]) & 0xFFFFFFFF)
        if size > 1:
            total += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return total
