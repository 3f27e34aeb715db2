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
from jaxtyping import Array

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

    def read(self, x: Array) -> Array:
        """This piece of the leaf."""
        size = (self.rows, x.shape[1], self.columns)[: x.ndim]
        return jax.lax.dynamic_slice(x, self._start(x), size)

    def read_constant(self, x: Array) -> Array:
        """`read` of an array that the loop does not change."""
        # Tied to the turn of the loop: on a CPU, XLA widens slices of bfloat16 to float32, and
        # would otherwise widen the whole array once, in front of the loop.
        x, row = jax.lax.optimization_barrier((x, self.row))
        return self._replace(row=row).read(x)

    def read_stats(self, x: Array) -> Array:
        """This piece of statistics, one entry per block, with a 1 for the period."""
        size = (self.rows, self.columns)[: x.ndim]
        return jnp.expand_dims(jax.lax.dynamic_slice(x, self._stats_start(x), size), 1)

    def write(self, x: Array, value: Array) -> Array:
        """The array with this piece replaced."""
        return jax.lax.dynamic_update_slice(x, value, self._start(x))

    def write_stats(self, x: Array, value: Array) -> Array:
        """The statistics with this piece replaced."""
        return jax.lax.dynamic_update_slice(x, jnp.squeeze(value, 1), self._stats_start(x))

    def _start(self, x: Array) -> tuple[Any, ...]:
        # Unsigned: a signed index would be tested for being negative at every turn.
        return (self.row, jnp.uint32(0), self.column)[: x.ndim]

    def _stats_start(self, x: Array) -> tuple[Any, ...]:
        return (self.row, self.column)[: x.ndim]


def _tiles(size: int, most: int) -> list[tuple[int, int, int]]:
    """Cuts ``size`` into (start, step, count), equal ones if there is a good divisor."""
    most = max(1, min(size, most))
    divisors = [d for d in range(most, most // 2, -1) if size % d == 0]
    step = divisors[0] if divisors else most
    full, rest = divmod(size, step)
    return [(0, step, full)] + ([(full * step, rest, 1)] if rest else [])


def over_pieces(
    view: FlatView, body: Callable[[Piece, Carry], Carry], carry: Carry, chunk: int = CHUNK
) -> Carry:
    """Folds ``body(piece, carry)`` over all pieces of a leaf, in order."""
    columns = _tiles(view.inner, max(_COLUMNS, chunk // view.period))
    rows = _tiles(view.blocks, chunk // (view.period * columns[0][1]))
    for row_start, row_step, row_count in rows:
        for column_start, column_step, column_count in columns:

            def at(
                n: Any,
                carry: Carry,
                row_start=row_start,
                row_step=row_step,
                column_start=column_start,
                column_step=column_step,
                column_count=column_count,
            ) -> Carry:
                row, column = (
                    (n, jnp.uint32(0))
                    if column_count == 1
                    else jnp.divmod(n, jnp.uint32(column_count))
                )
                piece = Piece(
                    row * jnp.uint32(row_step) + jnp.uint32(row_start),
                    row_step,
                    column * jnp.uint32(column_step) + jnp.uint32(column_start),
                    column_step,
                )
                return body(piece, carry)

            count = row_count * column_count
            if count == 1:
                carry = at(jnp.uint32(0), carry)
            else:
                carry = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(count), at, carry)
    return carry
