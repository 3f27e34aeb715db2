"""Loops over pieces of a leaf that stay in the cache.

XLA on a CPU writes the intermediate arrays of a step to memory; over a whole leaf that costs
several leaves of temporaries and more time. Here a leaf, seen as ``[blocks, period, inner]``, is
worked through in pieces of whole blocks. Every array is updated in place (`dynamic_update_slice`
on the loop's carry), so donated state is never copied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from gefen_jax._blocks import FlatView

# Elements of a piece: its few float32 intermediates fit in a CPU's second-level cache.
CHUNK = 1 << 18

# Where a block has an inner axis, a piece takes at least so many columns of it: consecutive in
# memory, and enough for the vector units.
_COLUMNS = 64

Carry = TypeVar("Carry")


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

    def tied(self, x: Array) -> tuple["Piece", Array]:
        """This piece and an array that the loop does not change, to read from."""
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

    def stretches(self, number: int) -> "Piece":
        """This piece of the leaf seen with its blocks in so many stretches, a row each."""
        return self._replace(row=self.row * np.uint32(number), rows=self.rows * number)

    def read_halves(self, x: Array) -> tuple[Array, Array]:
        """The first and the second half of every row."""
        # Two slices: one, cut in two once more, does not get to the vector units.
        half = x.shape[1] // 2
        row, _, *column = self._start(x)
        size = (self.rows, half, self.columns)[: x.ndim]
        first, second = (
            jax.lax.dynamic_slice(x, (row, jnp.uint32(start), *column), size) for start in (0, half)
        )
        return first, second

    def positions(self, view: FlatView) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
        """The row-major positions in the leaf of what `read_halves` reads."""
        # Added up from one vector per axis: whole arrays of indices, the same at every turn, would
        # be stored in front of the loop.
        half = view.period // 2
        starts, sizes = (self.row, 0, self.column), (self.rows, half, self.columns)
        strides = (view.period * view.inner, view.inner, 1)
        shape = sizes[: len(view.shape)]
        total = jnp.zeros((1,) * len(shape), jnp.uint32)
        for axis, size in enumerate(shape):
            index = starts[axis] + jnp.arange(size, dtype=jnp.uint32)
            others = tuple(i for i in range(len(shape)) if i != axis)
            total += jnp.expand_dims(index * np.uint32(strides[axis] & 0xFFFFFFFF), others)
        return total, total + np.uint32(half * view.inner & 0xFFFFFFFF)

    def _start(self, x: Array) -> tuple[Any, ...]:
        # Unsigned: a signed index would be tested for being negative at every turn.
        return (self.row, jnp.uint32(0), self.column)[: x.ndim]

    def _stats_start(self, x: Array) -> tuple[Any, ...]:
        return (self.row, self.column)[: x.ndim]


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
        is_new = rows.is_new(row)
        if is_new is not True:
            is_new = is_new[:, *(None,) * (len(view.shape) - 1)]
        if columns.is_new(column) is not True:
            is_new &= columns.is_new(column)
        start = rows.start(row), columns.start(column)
        return body(Piece(start[0], rows.step, start[1], columns.step, is_new), carry)

    count = rows.number * columns.number
    if count == 1:
        return at(jnp.uint32(0), carry)
    return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(count), at, carry)
