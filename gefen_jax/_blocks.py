"""Geometry of blocks: boxes of an array that share one number.

A block of a leaf is a box with the leaf's rank: one axis is cut into runs of p, the axes after it
are whole up to some axis and 1 from there on, the axes before it are 1. For a leaf ``(a, b, c)``:
``(1, p, 1)``, ``(1, p, c)``, ``(1, 1, p)``, ``(p, b, 1)``, and so on. Hence

- a statistic per block is an array of the leaf's rank, ``ceil(shape / block)``, and the leaf's
  PartitionSpec fits it too;
- blocks are split off by reshaping one axis, which every sharding rule understands;
- in memory a leaf is ``[blocks, period, inner]``, whatever its rank.

Where p does not divide its axis, the last run is shorter: such a leaf is two, in turn.
"""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """A block read as a cut: ``axis`` in runs of ``run``, the axes up to ``end`` whole."""

    axis: int
    end: int  # last axis that the block spans, >= axis
    run: int


class FlatView(NamedTuple):
    """A leaf as ``[blocks, period, inner]``: what loops and kernels work on."""

    blocks: int
    period: int
    inner: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the inner axis where it is 1: XLA gives such axes layouts that cost copies."""
        return (self.blocks, self.period) + ((self.inner,) if self.inner > 1 else ())

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """Statistics', without the period: a 1 in its place would cost copies too."""
        return (self.blocks,) + self.shape[2:]


class Axis(NamedTuple):
    """Some axes of a leaf as one; what is at hand of the leaf may be a part, with gaps between."""

    sizes: Shape
    strides: Shape  # how far apart neighbours along each are in the leaf

    @property
    def size(self) -> int:
        """Elements along the axis."""
        return math.prod(self.sizes)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Sizes and strides of as few axes as will do, the slowest first."""
        steps: list[tuple[int, int]] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if size == 1:
                continue
            # Two axes with no gap between them are one.
            if steps and steps[-1][1] == size * stride:
                size *= steps.pop()[0]
            steps.append((size, stride))
        return tuple(steps)

    def distances(self, index: UInt32[Array, "n"]) -> UInt32[Array, "n"]:
        """How far from its first element those at these indices are."""
        total = jnp.zeros_like(index)
        for i, (size, stride) in reversed(list(enumerate(self.steps))):
            # The slowest has what is left of the index: no division where nothing has a gap.
            index, here = jnp.divmod(index, np.uint32(size)) if i else (index, index)
            total += here * np.uint32(stride & 0xFFFFFFFF)
        return total


def row_major(shape: Shape) -> Shape:
    """How far apart neighbours along every axis are in a row-major array of this shape."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def block_size(block: Shape) -> int:
    """Elements of one block."""
    return math.prod(block)


def stats_shape(shape: Shape, block: Shape) -> Shape:
    """Shape of a statistic with one entry per block."""
    return tuple(-(-d // b) for d, b in zip(shape, block, strict=True))


def as_block(block: Any) -> Shape:
    """A block as plain data; TypeError for what is no row of integers."""
    try:
        return tuple(operator.index(b) for b in block)
    except TypeError:
        raise TypeError(
            f"`block` must be integers, one for every axis, e.g. (1, 256); got {block!r}"
        ) from None


def check_block(shape: Shape, block: Shape) -> None:
    """Raises ValueError unless ``block`` is a box of the kind described above."""
    if len(shape) != len(block):
        raise ValueError(f"`block` {block} must have the rank of the leaf, {shape}")
    if not shape or any(not 1 <= b <= d for d, b in zip(shape, block, strict=True)):
        raise ValueError(f"`block` {block} must lie between 1 and the leaf's shape, {shape}")
    cut = read_cut(shape, block)
    if make_block(shape, cut) != block:
        raise ValueError(
            f"`block` {block} of a leaf {shape} must cut one axis into runs, span the axes after"
            " it whole up to some axis, and be 1 elsewhere"
        )


def read_cut(shape: Shape, block: Shape) -> Cut:
    """The cut that a block stands for; the inverse of `make_block`."""
    spanned = [i for i, b in enumerate(block) if b > 1]
    axis = spanned[0] if spanned else len(shape) - 1
    end = spanned[-1] if spanned else axis
    return Cut(axis, end, block[axis])


def make_block(shape: Shape, cut: Cut) -> Shape:
    """The block of a cut."""
    before, after = (1,) * cut.axis, (1,) * (len(shape) - cut.end - 1)
    return before + (cut.run,) + tuple(shape[cut.axis + 1 : cut.end + 1]) + after


def flat_view(shape: Shape, block: Shape) -> FlatView:
    """The leaf as ``[blocks, period, inner]``; runs must divide the cut axis."""
    axis, end, run = read_cut(shape, block)
    return FlatView(
        math.prod(shape[:axis]) * (shape[axis] // run),
        math.prod(block),
        math.prod(shape[end + 1 :]),
    )


def runs_divide(shape: Shape, block: Shape) -> bool:
    """Whether all blocks of a leaf have the same size."""
    return all(d % b == 0 for d, b in zip(shape, block, strict=True))


def fits_shards(shape: Shape, block: Shape, local: Shape) -> bool:
    """Whether no block of a leaf crosses shards of the shape ``local``."""
    # Along an axis that is not cut the last run may be shorter.
    return all(s == d or s % b == 0 for d, s, b in zip(shape, local, block, strict=True))


def equal_parts(shape: Shape, block: Shape) -> list[tuple[int, int, Shape]]:
    """The leaf in parts along the cut axis in which runs divide: (low, high, the part's block)."""
    axis, _, run = read_cut(shape, block)
    size = shape[axis]
    whole = size - size % run
    rest = block[:axis] + (size - whole,) + block[axis + 1 :]
    return [(0, whole, block)] + ([(whole, size, rest)] if whole < size else [])


def split(x: Array, block: Shape) -> tuple[Array, tuple[int, ...]]:
    """Splits the cut axis in two, ``(runs, run)``, where there are several runs of several.

    Returns the array and the axes that lie inside a block, to reduce over. Runs must divide.
    """
    axis, end, run = read_cut(x.shape, block)
    if run == x.shape[axis]:
        return x, tuple(range(axis, end + 1))
    shape = x.shape[:axis] + (x.shape[axis] // run, run) + x.shape[axis + 1 :]
    return x.reshape(shape), tuple(range(axis + 1, end + 2))


def split_stats(stats: Array, shape: Shape, block: Shape) -> Array:
    """Statistics of a leaf of this shape, with the rank of the split leaf: 1 inside a block."""
    axis, _, run = read_cut(shape, block)
    return stats if run == shape[axis] else jnp.expand_dims(stats, axis + 1)


def spread(stats: Array, shape: Shape, block: Shape) -> Array:
    """Statistics repeated over their blocks: an array of the leaf's shape, fused into its use."""
    if not runs_divide(shape, block):
        axis, _, run = read_cut(shape, block)
        repeated = jnp.repeat(stats, run, axis=axis)
        return jax.lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)
    axis, _, run = read_cut(shape, block)
    stats = split_stats(stats, shape, block)
    whole = shape if run == shape[axis] else shape[:axis] + (-1, run) + shape[axis + 1 :]
    whole = tuple(shape[axis] // run if d == -1 else d for d in whole)
    return jnp.broadcast_to(stats, whole).reshape(shape)


def times_stats(x: Array, stats: Array, block: Shape) -> Array:
    """``x`` times its block's number, elementwise."""
    if runs_divide(x.shape, block):
        blocked, _ = split(x, block)
        return (blocked * split_stats(stats, x.shape, block)).reshape(x.shape)
    axis, _, run = read_cut(x.shape, block)
    repeated = jnp.repeat(stats, run, axis=axis)
    return x * jax.lax.slice_in_dim(repeated, 0, x.shape[axis], axis=axis)
