"""Pieces of a leaf whose elements are paired (`gefen_jax._pairs`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from gefen_jax._blocks import Axis, Shape, read_cut
from gefen_jax._pieces import Piece


class Pairs(NamedTuple):
    """A piece of a leaf whose elements are paired."""

    halves: tuple[Array, Array]  # [blocks, stretches, half, inner]
    both: Array  # [blocks * stretches, 2, half, inner]


class Route(NamedTuple):
    """Where the elements of paired pieces are in a leaf, of which the array may be a part."""

    axes: tuple[Axis, ...]  # blocks, stretches, halves, and the inner one if there is one
    second: int  # how far it is from an element to the other of its pair
    start: Any  # the position of the array's first element

    @classmethod
    def through(
        cls, shape: Shape, block: Shape, paired: int, strides: Shape, start: Any
    ) -> "Route":
        """Of an array of this shape; ``strides`` are the leaf's."""
        end, half = read_cut(shape, block).end + 1, block[paired] // 2
        counts = tuple(d // b for d, b in zip(shape, block, strict=True))
        from_block = tuple(s * b for s, b in zip(strides, block, strict=True))
        axes = (
            Axis(counts[:end], from_block[:end]),
            Axis(block[:paired], strides[:paired]),
            Axis((half, *block[paired + 1 :]), strides[paired:]),
            Axis(shape[end:], strides[end:]),
        )
        return cls(axes if axes[-1].size > 1 else axes[:-1], half * strides[paired], start)


class PairedPiece(NamedTuple):
    """A piece in which every block is a number of stretches, and each of them two halves.

    Leaves lie as ``[blocks * stretches, 2, half, inner]``; statistics are read as ``[blocks, 1, 1,
    inner]``.
    """

    piece: Piece
    number: int

    def read(self, x: Array) -> Pairs:
        """This piece of the leaf."""
        rows, columns = self.piece.rows * self.number, self.piece.columns

        def part(start: int, size: int) -> Array:
            sizes = (rows, size, x.shape[2], columns)[: x.ndim]
            return jax.lax.dynamic_slice(x, self._start(x, start), sizes)

        # Two slices: one, cut in two once more, does not get to the vector units.
        first, second = (self.per_block(part(i, 1)) for i in (0, 1))
        return Pairs((first, second), part(0, 2))

    def per_block(self, x: Array) -> Array:
        """[blocks * stretches, 1, half, inner] as [blocks, stretches, half, inner]."""
        return x.reshape(self.piece.rows, self.number, *x.shape[2:])

    def per_stretch(self, x: Array) -> Array:
        """The reverse."""
        return x.reshape(self.piece.rows * self.number, 1, *x.shape[2:])

    def joined(self, halves: tuple[Array, Array]) -> Array:
        """Halves as `Pairs.both`."""
        # Along an axis that they have: so XLA stores the halves of new codes, and does not compute
        # them again for each of their uses.
        both = jnp.concatenate(halves, axis=2)
        return both.reshape(-1, 2, *halves[0].shape[2:])

    def read_stats(self, x: Array) -> Array:
        """This piece of statistics."""
        return jnp.expand_dims(self.piece.read_stats(x), 1)

    def read_shared(self, x: Array) -> Array:
        """This piece of an array with one entry per pair, ``[blocks * stretches, half, inner]``."""
        rows, columns, middle = self.piece.rows * self.number, self.piece.columns, x.shape[1] // 2

        def part(low: int, high: int) -> Array:
            size = (rows, high - low, columns)[: x.ndim]
            return jax.lax.dynamic_slice(x, self._shared_start(x, low), size)

        # Put together of two parts, which XLA on a CPU stores. It may compute what depends on an
        # array that the loop writes to a second time, after that: then it copies the array, whole.
        both = jnp.concatenate([part(0, middle), part(middle, x.shape[1])], axis=1)
        return both.reshape(self.piece.rows, self.number, *both.shape[1:])

    def write_shared(self, x: Array, value: Array) -> Array:
        """The array with this piece replaced."""
        if self.piece.is_new is not True:
            is_new = jnp.expand_dims(self.piece.is_new, 1)
            value = jnp.where(is_new, value, self.read_shared(x))
        value = value.reshape(-1, *value.shape[2:])
        return jax.lax.dynamic_update_slice(x, value, self._shared_start(x, 0))

    def write(self, x: Array, value: Array) -> Array:
        """The array with both halves of this piece replaced."""
        if self.piece.is_new is not True:
            rows, _, *columns = self.piece.is_new.shape
            is_new = jnp.broadcast_to(self.piece.is_new, (rows, self.number, *columns))
            is_new = is_new.reshape(-1, 1, 1, *columns)
            value = jnp.where(is_new, value, self.read(x).both)
        return jax.lax.dynamic_update_slice(x, value, self._start(x, 0))

    def write_stats(self, x: Array, value: Array) -> Array:
        """The statistics with this piece replaced."""
        return self.piece.write_stats(x, jnp.squeeze(value, 1))

    def positions(self, route: Route) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
        """The row-major positions in the leaf of the first and the second elements."""
        # Added up from one vector per axis: whole arrays of indices, the same at every turn, would
        # be stored in front of the loop.
        piece, half = self.piece, route.axes[2].size
        parts = (
            (piece.row, piece.rows),
            (0, self.number),
            (0, half),
            (piece.column, piece.columns),
        )
        total = jnp.zeros((1,) * len(route.axes), jnp.uint32)
        for i, (axis, (start, size)) in enumerate(zip(route.axes, parts, strict=False)):
            index = start + jnp.arange(size, dtype=jnp.uint32)
            others = tuple(j for j in range(len(route.axes)) if j != i)
            total += jnp.expand_dims(axis.distances(index), others)
        total += route.start
        return total, total + np.uint32(route.second & 0xFFFFFFFF)

    def _shared_start(self, x: Array, entry: int) -> tuple[Any, ...]:
        row = self.piece.row * np.uint32(self.number)
        return (row, jnp.uint32(entry), self.piece.column)[: x.ndim]

    def _start(self, x: Array, half: int) -> tuple[Any, ...]:
        row = self.piece.row * np.uint32(self.number)
        return (row, jnp.uint32(half), jnp.uint32(0), self.piece.column)[: x.ndim]
