"""Codes of four bits: two in a byte, sixteen levels, groups of 64 elements.

A group has one float32 scale: 1/2 + 4/64 = 0.5625 bytes per element. (A bfloat16 scale moves in
steps of 0.4 %: under a decay of 0.998 or more it would round back to where it was, for ever.)

The levels are the built-in codebook's. With 0 fixed, sixteen of them cannot be symmetric: there are
seven below 0 without -1, and six above without 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from gefen_jax._blocks import Cut, Shape, make_block

GROUP = 64
_LEAST = 16  # with a scale for fewer elements, 4 bits would be hardly less than 8


def group_block(shape: Shape, block: Shape, local: Shape) -> Shape:
    """The group of a leaf: a run of 64 along that axis of a block which costs the fewest bytes.

    Where ``local``, what a device has of the leaf, is not so many times 64, the largest group that
    divides it, if there is one of 16 or more; and no byte has codes of two devices.
    """

    def run(axis: int) -> int:
        d, here = shape[axis], local[axis]
        fitting = [n for n in range(_LEAST, GROUP + 1) if here % n == 0 and here % 2 == 0]
        return fitting[-1] if here < d and fitting else min(GROUP, d)

    def cost(axis: int) -> tuple[float, int]:
        d = shape[axis]
        return (-(-d // 2) + 4 * -(-d // run(axis))) / d, -axis  # of equal ones the last

    axis = min((a for a, b in enumerate(block) if b > 1), key=cost)
    return make_block(shape, Cut(axis, axis, run(axis)))


def packed_shape(shape: Shape, axis: int) -> Shape:
    """The shape of a leaf's bytes: half of one axis, rounded up."""
    return shape[:axis] + (-(-shape[axis] // 2),) + shape[axis + 1 :]


def pack(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Two neighbours along an axis in one byte, the first in its low half."""
    # Neighbours, not one from each half of the axis: those would lie on different shards.
    odd = codes.shape[axis] % 2
    codes = jnp.pad(codes, [(0, odd if a == axis else 0) for a in range(codes.ndim)])
    shape = packed_shape(codes.shape, axis)
    pairs = codes.reshape(shape[: axis + 1] + (2,) + shape[axis + 1 :])
    low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def unpack(packed: UInt8[Array, "..."], shape: Shape, axis: int) -> UInt8[Array, "..."]:
    """The inverse of `pack`, for a leaf of this shape."""
    pairs = jnp.stack([packed & 15, packed >> 4], axis=axis + 1)
    codes = pairs.reshape(shape[:axis] + (2 * packed.shape[axis],) + shape[axis + 1 :])
    return jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)
