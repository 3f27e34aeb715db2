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


class _Turn(NamedTuple):
    """Where the rows of one turn are."""

    rows: _Rows
    starts: list[Array]  # in every leaf
    offsets: list[Array]  # in what is put together

    @classmethod
    def at(cls, n: Array, rows: _Rows) -> "_Turn":
        # Offsets are read from arrays, at an index that only looks as if it varied: constants would
        # make the kernels of leaves of one shape differ, and each be compiled.
        parts = zip(rows.parts, rows.lasts, rows.offsets, strict=True)
        starts, offsets = [], []
        for part, last, offset in parts:
            starts.append(jnp.minimum(n * np.uint32(part), np.uint32(last)))
            table = jnp.asarray(np.array([offset, 0], np.uint32))
            offsets.append(jax.lax.dynamic_slice(table, (n >> 31,), (1,))[0])
        return cls(rows, starts, offsets)

    def read(self, leaves: Sequence[Array]) -> Array:
        """The rows of all leaves, put together."""
        together = jax.lax.empty((self.rows.number, *leaves[0].shape[1:]), leaves[0].dtype)
        where = zip(leaves, self.starts, self.rows.parts, self.offsets, strict=True)
        for x, start, part, offset in where:
            piece = jax.lax.dynamic_slice_in_dim(x, start, part)
            together = jax.lax.dynamic_update_slice_in_dim(together, piece, offset, 0)
        # XLA's simplifier would move the new axis in front of all of these, one in each of its
        # runs, and log after 50 that it seems to be stuck.
        return jax.lax.optimization_barrier(together).reshape(self.rows.number, -1)

    def write(self, leaves: Sequence[Array], value: Array) -> list[Array]:
        """The leaves with their rows replaced."""
        value = value.reshape(self.rows.number, *leaves[0].shape[1:])
        where = zip(leaves, self.starts, self.rows.parts, self.offsets, strict=True)
        return [
            jax.lax.dynamic_update_slice_in_dim(
                x, jax.lax.dynamic_slice_in_dim(value, offset, part), start, 0
            )
            for x, start, part, offset in where
        ]


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
    treedef, leaf_of = jax.tree.structure(states[0]), np.arange(len(gradients))
    grads = [rows.of_leaf(g, i) for i, g in enumerate(gradients)]
    # Of every slot of the state the arrays of all leaves.
    slots = zip(*(jax.tree.leaves(state) for state in states), strict=True)
    flat = [[rows.of_leaf(x, i) for i, x in enumerate(slot)] for slot in slots]
    phase = phases[np.repeat(leaf_of, rows.parts)].T.reshape(2, rows.number, 1, 1)
    numbers = tuple(map(rows.spread, (rows.parts, rows.lasts, rows.offsets)))
    # Behind a barrier, or what a turn computes of them is computed, and stored, in front of all.
    phase, (part, last, offset) = jax.lax.optimization_barrier((phase, numbers))

    def turn(n: Array, slots: list[list[Array]]) -> list[list[Array]]:
        # As `gefen_jax._pieces.Piece.tied` does, for gradients in bfloat16.
        n, constant = jax.lax.optimization_barrier((n, grads))
        here, start = _Turn.at(n, rows), jnp.minimum(n * part, last)
        place = Place(((start - offset) * np.uint32(run)).reshape(-1, 1, 1), (run, 1))
        old, whole = [here.read(slot) for slot in slots], Chunk(run * rows.number)
        args = here.read(constant), treedef.unflatten(old), (1, run)
        new = advance(*args, step._replace(phase=phase, place=place), chunk=whole)
        new = treedef.flatten_up_to(new)
        if not rows.are_new:
            row = start + (jnp.arange(rows.number, dtype=jnp.uint32) - offset)
            is_new = (row >= n * part).reshape(-1, 1)
            new = [jnp.where(is_new, x, y) for x, y in zip(new, old, strict=True)]
        # Stored, or every leaf would compute its rows once more.
        new = jax.lax.optimization_barrier(new)
        return [here.write(slot, x) for slot, x in zip(slots, new, strict=True)]

    flat = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(rows.turns), turn, flat)
    return [
        jax.tree.map(lambda x, old: x.reshape(old.shape), treedef.unflatten(xs), state)
        for xs, state in zip(zip(*flat, strict=True), states, strict=True)
    ]
