"""Dither: the fractions by which stochastic rounding decides, with nothing to thread or store.

The fraction of an element at step t is

    u_t = frac(hash(leaf, position) + t * (sqrt(5) - 1) / 2).

Over positions it is as good as random; over steps it visits every interval of length w about every
1 / w steps. So rounding up when u_t is below the fraction above the lower level is unbiased, like
independent random numbers, but its errors cancel within a few steps instead of adding up to a
random walk (what that gave: `examples/benchmarks/research.md`).

Leaf, step and row-major position decide the fraction alone (in a leaf whose last run is shorter,
that run counts from 0 again). So training resumes bit for bit, and a mesh, or a loop over pieces,
sees what one device sees: a part of a leaf is stepped with its `Place`. The hash is the 32-bit
finaliser "lowbias32" (Chris Wellons, `Hash Prospector <https://github.com/skeeto/hash-prospector>`_,
2018) but for its last shift: only high bits of its result are used. Additive recurrences: Weyl
1916.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from gefen_jax._blocks import Shape, row_major

_GOLDEN = np.uint32(0x9E3779B9)  # (sqrt(5) - 1) / 2, in units of 2^-32
_MIX1, _MIX2, _MIX3 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x9C8F2D35)


def leaf_phases(paths: Sequence[str], count: Int[Array, ""]) -> UInt32[Array, "leaves two"]:
    """Two words per leaf: its name's, and the step's."""
    names = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    step = jnp.broadcast_to(count.astype(jnp.uint32) * _GOLDEN, names.shape)
    # What is stacked has to lie alike, under `vmap` over an Explicit axis, too.
    return jnp.stack([jnp.asarray(names) + 0 * step, step], axis=-1)


def dither(
    phase: UInt32[Array, "two *rows"], position: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Two independent fractions per element, in units of 2^-32.

    Positions of a leaf beyond 2^32 elements wrap around.
    """
    word = position ^ phase[0]
    word = (word ^ (word >> 16)) * _MIX1
    word = (word ^ (word >> 15)) * _MIX2
    return word + phase[1], (word ^ (word >> 16)) * _MIX3 + phase[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part of a leaf lies in the whole one: a layer, or what one device has of it."""

    offset: Any  # uint32: the row-major position of its first element
    strides: Shape = dataclasses.field(metadata={"static": True})  # the whole leaf's


def strides_at(shape: Shape, place: Place | None) -> Shape:
    """How far apart in its leaf neighbours of an array are; without a place it is the leaf."""
    return row_major(shape) if place is None else place.strides


def positions(shape: Shape, place: Place | None = None) -> UInt32[Array, "*shape"]:
    """The row-major position in its leaf of every element."""
    total = jnp.zeros(shape, jnp.uint32)
    for axis, (size, stride) in enumerate(zip(shape, strides_at(shape, place), strict=True)):
        if size > 1:
            index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            total += index * np.uint32(stride & 0xFFFFFFFF)
    return total if place is None else total + place.offset
