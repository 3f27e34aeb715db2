"""A leaf worked through in pieces that stay in the cache.

XLA on a CPU writes the intermediate arrays of a step to memory; over a whole leaf that costs
several leaves of temporaries and more time. Here a leaf, seen as ``[blocks, period, inner]``, is
worked through in pieces of whole blocks. Arrays are updated in place (`dynamic_update_slice` on the
loop's carry), so donated state is never copied.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._blocks import FlatView
from gefen_jax._paired_pieces import PairedPiece
from gefen_jax._pieces import Carry, Piece, over_pieces
from gefen_jax._varying import varying_alike


class Chunk(NamedTuple):
    """How a leaf is worked through."""

    size: int  # elements of a piece, about
    # Whether floats of 16 bits, too, are updated in place. XLA on a CPU cannot write to a part of
    # an array of bfloat16: it converts the whole one to float32 and back, for every piece; one of
    # float16 it copies where the weight is split. There such arrays are only read, new ones are
    # written as integers, and these are converted once.
    narrow_in_place: bool = True


def map_pieces(
    function: Callable[[Any, Any, Any], Any],
    constant: Any,
    carry: Carry,
    view: FlatView,
    chunk: Chunk,
    *,
    stretches: int | None = None,
) -> Carry:
    """The carry, with ``function(piece, constant, carry)`` in the place of every piece of it.

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

    fixed, (flat_carry, treedef) = jax.tree.map(flat, constant), jax.tree.flatten(carry)
    flat_carry = [flat(x) for x in flat_carry]
    # The numbers of arrays that are not written to; they are read from as the constant is.
    narrow = () if chunk.narrow_in_place else (jnp.bfloat16, jnp.float16)
    apart = [i for i, x in enumerate(flat_carry) if x.dtype in narrow]

    def work_through(old: list[Array]) -> list[Array]:
        kept = {i: old[i] for i in apart}
        start = [jax.lax.empty(x.shape, jnp.uint16) if i in kept else x for i, x in enumerate(old)]
        start, _ = varying_alike((start, old))

        def body(piece: Piece, arrays: list[Array]) -> list[Array]:
            tied, (part, kept_part) = piece.tied((fixed, kept))
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

            values = [
                fixed_at.read(kept_part[i]) if i in kept else read(x) for i, x in enumerate(arrays)
            ]
            new = function(at, jax.tree.map(fixed_at.read, part), treedef.unflatten(values))
            new = treedef.flatten_up_to(new)
            for i in kept:
                new[i] = jax.lax.bitcast_convert_type(new[i], jnp.uint16)
            return list(map(write, arrays, new))

        new = over_pieces(view, body, start, chunk.size)
        for i, x in kept.items():
            new[i] = jax.lax.bitcast_convert_type(new[i], x.dtype)
        return new

    new = _alone(work_through, flat_carry) if apart else work_through(flat_carry)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), treedef.unflatten(new), carry)


def _alone(function: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """``function(carry)``, with temporaries that no other leaf's are beside.

    In a loop of one turn, of which XLA does not know the number: otherwise it makes the new arrays
    of all leaves first, and converts them at last.
    """
    turns = jax.lax.optimization_barrier(jnp.uint32(1))
    return jax.lax.fori_loop(jnp.uint32(0), turns, lambda _, x: function(x), carry)
