"""Leaves worked through in one loop, for a compiler whose time grows with the number of loops.

XLA on a CPU optimizes the body of every loop for itself, and that of a step has hundreds of
operations. So leaves in blocks of equal runs share a loop. In every turn it takes some blocks of
each leaf, more of a larger one, so that all are through at the same time, and steps them as one
leaf: with the phases of their leaves and at their places (`gefen_jax._dither`), so that the results
are those of every leaf alone, bit for bit. What is put together for that, and taken apart
afterwards, is in the cache.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from gefen_jax._chunks import Chunk
from gefen_jax._dither import Place
from gefen_jax._types import Step


class _Rows(NamedTuple):
    """How a loop goes through leaves of so many rows: ``parts[i]`` rows of leaf i in every turn.

    Where that many do not divide a leaf, its last turns reach back over rows that are done.
    """

    sizes: tuple[int, ...]
    turns: int

    @classmethod
    def of(cls, sizes: Sequence[int], most: int) -> "_Rows":
        """About ``most`` rows in a turn, and as few as can be that are taken twice."""
        fewest = -(-sum(sizes) // most)
        choices = (cls(tuple(sizes), turns) for turns in range(fewest, max(2, 2 * fewest)))
        return min(choices, key=lambda rows: rows.turns * rows.number)

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(-(-size // self.turns) for size in self.sizes)

    @property
    def number(self) -> int:
        """How many rows a turn takes."""
        return sum(self.parts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where those of every leaf begin among them."""
        return tuple(itertools.accumulate(self.parts, initial=0))[:-1]

    @property
    def lasts(self) -> tuple[int, ...]:
        """Where the last turn begins in every leaf."""
        return tuple(size - part for size, part in zip(self.sizes, self.parts, strict=True))

    @property
    def are_new(self) -> bool:
        """Whether no row is taken twice."""
        return self.turns * self.number == sum(self.sizes)

    def spread(self, numbers: Sequence[int]) -> UInt32[Array, "rows"]:
        """A number of every leaf, for each of its rows in a turn."""
        return jnp.asarray(np.repeat(np.array(numbers, np.uint32), self.parts))

    def of_leaf(self, x: Array, leaf: int) -> Array:
        """An array of a leaf in its rows; without an axis of 1, which would cost copies."""
        size = self.sizes[leaf]
        return x.reshape(size, x.size // size) if x.size > size else x.reshape(size)


def advance_joined(
    advance: Callable[..., Any],
    gradients: Sequence[Array],
    states: Sequence[Any],
    run: int,
    step: Step,
    phases: UInt32[Array, "leaves two"],
    size: int,
) -> list[Any]:
    """The states of leaves in blocks of ``run`` consecutive elements, a step later.

    ``advance`` is that of a leaf, a `gefen_jax._backend.Advance`, with ``step``, but for its phase,
    of which every leaf has its own. A turn takes about ``size`` elements.
    """
    rows = _Rows.of([g.size // run for g in gradients], max(1, size // run))
    leaves, treedef = range(len(gradients)), jax.tree.structure(states[0])
    grads = [rows.of_leaf(g, i) for i, g in enumerate(gradients)]
    flat = [[rows.of_leaf(x, i) for x in jax.tree.leaves(states[i])] for i in leaves]
    of_rows = phases[np.repeat(np.array(leaves), rows.parts)].T.reshape(2, rows.number, 1, 1)
    part, last, offset = map(rows.spread, (rows.parts, rows.lasts, rows.offsets))
    # Behind a barrier, or what a turn computes of them is computed, and stored, in front of all.
    of_rows, part, last, offset = jax.lax.optimization_barrier((of_rows, part, last, offset))
    # Where a leaf's rows are in a turn is read from an array, at an index that only looks as if it
    # varied: a constant would make kernels of leaves of one shape differ, and each be compiled.
    offsets = [np.array([x, 0], np.uint32) for x in rows.offsets]

    def turn(n: Array, arrays: list[list[Array]]) -> list[list[Array]]:
        # As `gefen_jax._pieces.Piece.tied` does, for gradients in bfloat16.
        n, constant = jax.lax.optimization_barrier((n, grads))
        starts = [
            jnp.minimum(n * np.uint32(p), np.uint32(end))
            for p, end in zip(rows.parts, rows.lasts, strict=True)
        ]

        at = [jax.lax.dynamic_slice(jnp.asarray(x), (n >> 31,), (1,))[0] for x in offsets]

        def read(xs: Sequence[Array]) -> Array:
            together = jax.lax.empty((rows.number, *xs[0].shape[1:]), xs[0].dtype)
            for x, start, p, to in zip(xs, starts, rows.parts, at, strict=True):
                piece = jax.lax.dynamic_slice_in_dim(x, start, p)
                together = jax.lax.dynamic_update_slice_in_dim(together, piece, to, 0)
            return together.reshape(rows.number, -1)

        begin = jnp.minimum(n * part, last)
        place = Place(((begin - offset) * np.uint32(run)).reshape(-1, 1, 1), (run, 1))
        here = step._replace(phase=of_rows, place=place)
        old = [read(xs) for xs in zip(*arrays, strict=True)]
        new = advance(
            read(constant), treedef.unflatten(old), (1, run), here, chunk=Chunk(run * rows.number)
        )
        new = treedef.flatten_up_to(new)
        if not rows.are_new:
            row = jnp.arange(rows.number, dtype=jnp.uint32) - offset + begin
            is_new = (row >= n * part).reshape(-1, 1)
            new = [jnp.where(is_new, x, y) for x, y in zip(new, old, strict=True)]
        # Stored, or every leaf would compute its rows once more.
        new = jax.lax.optimization_barrier(new)

        def write(x: Array, value: Array, leaf: int) -> Array:
            value = value.reshape(rows.number, *x.shape[1:])
            piece = jax.lax.dynamic_slice_in_dim(value, at[leaf], rows.parts[leaf])
            return jax.lax.dynamic_update_slice_in_dim(x, piece, starts[leaf], 0)

        return [[write(x, v, i) for x, v in zip(arrays[i], new, strict=True)] for i in leaves]

    flat = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(rows.turns), turn, flat)
    return [
        jax.tree.map(lambda x, old: x.reshape(old.shape), treedef.unflatten(xs), state)
        for xs, state in zip(flat, states, strict=True)
    ]
