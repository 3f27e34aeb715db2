"""Loops over pieces of a leaf that stay in the cache.

XLA on a CPU writes the intermediate arrays of a step to memory; over a whole leaf that costs
several leaves of temporaries and more time. Here a leaf, seen as ``[blocks, period, inner]``, is
worked through in pieces of whole blocks. Every array is updated in place (`dynamic_update_slice`
on the loop's carry), so donated state is never copied.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from gefen_jax._blocks import Axis, FlatView, Shape, read_cut

# Elements of a piece: its few float32 intermediates fit in a CPU's second-level cache.
CHUNK = 1 << 18

# Where a block has an inner axis, a piece takes at least so many columns of it: consecutive in
# memory, and enough for the vector units.
_COLUMNS = 64

Carry = TypeVar("Carry")
Constant = TypeVar("Constant")


class Piece(NamedTuple):
    """Some blocks of a leaf: rows of its flat view, and columns where it has an inner axis."""

    row: Any
    rows: int
    column: Any
    columns: int
    # Whether the element is no other piece's too, broadcastable to the piece; True for all.
    is_new: Any

    def read(self, x: Array) -> Array:
        """This piece of the leaf."""
        size = (self.rows, x.shape[1], self.columns)[: x.ndim]
        return jax.lax.dynamic_slice(x, self._start(x), size)

    def tied(self, x: Constant) -> tuple["Piece", Constant]:
        """This piece and arrays that the loop does not change, to read from."""
        # Tied to the turn of the loop: on a CPU, XLA widens slices of bfloat16 to float32, and
        # would otherwise widen the whole array once, in front of the loop.
        x, row = jax.lax.optimization_barrier((x, self.row))
        return self._replace(row=row), x

    def read_stats(self, x: Array) -> Array:
        """This piece of statistics, one entry per block, with a 1 for the period."""
        size = (self.rows, self.columns)[: x.ndim]
        return jnp.expand_dims(jax.lax.dynamic_slice(x, self._stats_start(x), size), 1)

    def write(self, x: Array, value: Array) -> Array:
        """The array with this piece replaced."""
        if self.is_new is not True:
            value = jnp.where(self.is_new, value, self.read(x))
        return jax.lax.dynamic_update_slice(x, value, self._start(x))

    def write_stats(self, x: Array, value: Array) -> Array:
        """The statistics with this piece replaced."""
        if self.is_new is not True:
            value = jnp.where(self.is_new, value, self.read_stats(x))
        return jax.lax.dynamic_update_slice(x, jnp.squeeze(value, 1), self._stats_start(x))

    def _start(self, x: Array) -> tuple[Any, ...]:
        # Unsigned: a signed index would be tested for being negative at every turn.
        return (self.row, jnp.uint32(0), self.column)[: x.ndim]

    def _stats_start(self, x: Array) -> tuple[Any, ...]:
        return (self.row, self.column)[: x.ndim]


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


class _Tiles(NamedTuple):
    """An axis in tiles of ``step``; the last one reaches back over its neighbour."""

    size: int
    step: int

    @property
    def number(self) -> int:
        return -(-self.size // self.step)

    def start(self, n: Any) -> Any:
        """Where tile n begins."""
        start = n * jnp.uint32(self.step)
        if self.size % self.step == 0:
            return start
        return jnp.minimum(start, jnp.uint32(self.size - self.step))

    def is_new(self, n: Any) -> Any:
        """Which elements of tile n are in no tile before it; True for all."""
        if self.size % self.step == 0:
            return True
        index = self.start(n) + jnp.arange(self.step, dtype=jnp.uint32)
        return index >= n * jnp.uint32(self.step)


def _tiles(size: int, most: int) -> _Tiles:
    """Tiles of at most so many, of a divisor if there is a good one."""
    most = max(1, min(size, most))
    divisors = [d for d in range(most, most // 2, -1) if size % d == 0]
    return _Tiles(size, divisors[0] if divisors else most)


def over_pieces(
    view: FlatView, body: Callable[[Piece, Carry], Carry], carry: Carry, chunk: int = CHUNK
) -> Carry:
    """Folds ``body(piece, carry)`` over all pieces of a leaf, in order.

    Pieces have one size. Where it does not divide the leaf, the last ones overlap others: writing
    keeps what is there already (a rest of its own would be compiled once more, and copied).
    """
    columns = _tiles(view.inner, max(_COLUMNS, chunk // view.period))
    rows = _tiles(view.blocks, chunk // (view.period * columns.step))

    def at(n: Any, carry: Carry) -> Carry:
        row, column = n, jnp.uint32(0)
        if columns.number > 1:
            row, column = jnp.divmod(n, jnp.uint32(columns.number))
        new_row, new_column = rows.is_new(row), columns.is_new(column)
        is_new: Any = new_row
        if new_row is not True:
            is_new = new_row[:, *(None,) * (len(view.shape) - 1)]
        if new_column is not True:
            is_new = jnp.reshape(new_column, (1, 1, -1)) & is_new
        start = rows.start(row), columns.start(column)
        return body(Piece(start[0], rows.step, start[1], columns.step, is_new), carry)

    count = rows.number * columns.number
    if count == 1:
        return at(jnp.uint32(0), carry)
    return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(count), at, carry)


def map_pieces(
    function: Callable[[Any, Any, Any], Any],
    constant: Any,
    carry: Carry,
    view: FlatView,
    chunk: int,
    *,
    stretches: int | None = None,
) -> Carry:
    """The carry, with ``function(piece, constant, carry)`` in place of every piece of its arrays.

    Arrays of the carry, a tree, lie like the leaf or have a number per block, or with ``stretches``
    one per pair of elements; the constant lies like the leaf, or is None. The function is given
    what a `Piece` reads of each, or with ``stretches`` a `PairedPiece`, and returns what that
    writes.
    """
    shape = of_pairs = view.shape
    if stretches is not None:
        half = view.period // stretches // 2
        of_pairs = (view.blocks * stretches, half, *view.shape[2:])
        shape = (of_pairs[0], 2, *of_pairs[1:])
    # Of equal sizes the last one counts.
    shapes = {math.prod(s): s for s in (of_pairs, view.stats_shape, shape)}

    def flat(x: Array) -> Array:
        return x.reshape(shapes[x.size])

    fixed, arrays = jax.tree.map(flat, (constant, carry))

    def body(piece: Piece, arrays: Carry) -> Carry:
        tied, part = piece.tied(fixed)
        at, fixed_at = (
            p if stretches is None else PairedPiece(p, stretches) for p in (piece, tied)
        )

        def read(x: Array) -> Any:
            if x.ndim == len(shape):
                return at.read(x)
            if isinstance(at, PairedPiece) and x.ndim == len(of_pairs):
                return at.read_shared(x)
            return at.read_stats(x)

        def write(x: Array, value: Any) -> Array:
            if x.ndim == len(shape):
                return at.write(x, value)
            if isinstance(at, PairedPiece) and x.ndim == len(of_pairs):
                return at.write_shared(x, value)
            return at.write_stats(x, value)

        new = function(at, jax.tree.map(fixed_at.read, part), jax.tree.map(read, arrays))
        return jax.tree.map(write, arrays, new)

    new = over_pieces(view, body, arrays, chunk)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), new, carry)
