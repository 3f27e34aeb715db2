"""Pairs: the i-th element of the first half of a block's run, and the i-th of its second half."""

import math
from typing import NamedTuple

import jax
from jaxtyping import Array

from gefen_jax._blocks import Shape, read_cut, split

Halves = tuple[Array, Array]  # of the paired axis: the two elements of every pair


class Layout(NamedTuple):
    """How the blocks of a leaf lie in an array."""

    inside: tuple[int, ...]  # the axes of a block
    paired: int  # of them, the one whose halves are paired


def paired_axis(block: Shape) -> int | None:
    """The axis of a block whose halves are paired: the last with an even run."""
    return next((i for i in reversed(range(len(block))) if block[i] % 2 == 0), None)


def halves(x: Array, axis: int) -> Halves:
    """The two halves of an axis."""
    half = x.shape[axis] // 2
    first, second = (jax.lax.slice_in_dim(x, i * half, (i + 1) * half, axis=axis) for i in (0, 1))
    return first, second


def half_of(shape: Shape, block: Shape) -> Shape:
    """A shape, of the leaf or of its block, with one entry per pair."""
    axis = _paired(block)
    return (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def blocked(shape: Shape, block: Shape) -> Layout:
    """The layout of what `split` returns."""
    axis, end, run = read_cut(shape, block)
    new = int(run < shape[axis])  # axes
    return Layout(tuple(range(axis + new, end + new + 1)), _paired(block) + new)


def stretches(block: Shape) -> int:
    """How many runs of a block are halved, each for itself."""
    return math.prod(block[: _paired(block)])


def as_pairs(x: Array, block: Shape) -> tuple[Array, int]:
    """A leaf in blocks, with the two halves as an axis of their own, and which that is."""
    parts, _ = split(x, block)
    axis = blocked(x.shape, block).paired
    half = parts.shape[axis] // 2
    return parts.reshape(*parts.shape[:axis], 2, half, *parts.shape[axis + 1 :]), axis


def _paired(block: Shape) -> int:
    axis = paired_axis(block)
    assert axis is not None, "checked when the plan was made"
    return axis
