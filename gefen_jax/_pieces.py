"""Pieces of a leaf, seen as ``[blocks, period, inner]``, and the loop over them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._blocks import FlatView

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
    view: FlatView, body: Callable[[Piece, Carry], Carry], carry: Carry, size: int
) -> Carry:
    """Folds ``body(piece, carry)`` over all pieces of a leaf, of about ``size`` elements, in order.

    Pieces have one size. Where it does not divide the leaf, the last ones overlap others: writing
    keeps what is there already (a rest of its own would be compiled once more, and copied).
    """
    columns = _tiles(view.inner, max(_COLUMNS, size // view.period))
    rows = _tiles(view.blocks, size // (view.period * columns.step))

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
