"""One step of a leaf whose moments are companded, for any rule that needs one or two of them.

Groups are 32 neighbours in row-major order, in a leaf of any shape; the last may be shorter. Where
32 divides the last axis, that is a block of 32 along it: scales have the leaf's rank, and lie on a
mesh as it does. Other leaves are taken as vectors, and so are their scales.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from gefen_jax._backend import apart, in_best_form
from gefen_jax._blocks import Shape, flat_view, split, split_stats, stats_shape
from gefen_jax._chunks import Chunk, map_pieces
from gefen_jax._companding import FIRST, SECOND, Coded, decode, encode, round_scale
from gefen_jax._dither import Place, dither, positions
from gefen_jax._laid_out import laid_out_like
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._pieces import Piece, over_pieces
from gefen_jax._types import Decay, Step
from gefen_jax._varying import varying_alike

GROUP = 32

Real = tuple[Float[Array, "..."], ...]
Kept = tuple[Coded, ...]
Position = UInt32[Array, "..."]  # of groups, row-major in the whole leaf
# From gradient and moments, float32, to the update and the new moments.
Rule = Callable[[Array, Real, Decay], tuple[Array, Real]]


class Groups(NamedTuple):
    """A leaf in groups: the shape that it is taken in, and the block of a group in it."""

    shape: Shape
    block: Shape


def groups_of(shape: Shape) -> Groups:
    """The groups of a leaf.

    Examples:
      >>> groups_of((8, 64))
      Groups(shape=(8, 64), block=(1, 32))
      >>> groups_of((8, 5))
      Groups(shape=(40,), block=(32,))
    """
    if shape and shape[-1] % GROUP == 0:
        return Groups(shape, (1,) * (len(shape) - 1) + (GROUP,))
    size = math.prod(shape)
    return Groups((size,), (max(1, min(size, GROUP)),))


def init(shape: Shape, dtypes: tuple[np.dtype, ...], scale_dtype: DTypeLike) -> Kept:
    """Moments of 0, each in buffers of its own: the state may be donated."""
    scales = stats_shape(*groups_of(shape))
    return tuple(Coded(jnp.zeros(shape, d), jnp.zeros(scales, scale_dtype)) for d in dtypes)


def _describe(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    return ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves) or "nothing"


def check_leaf(path: str, g: Any, kept: Any, scale_dtype: DTypeLike) -> None:
    """The gradient and the moments must be those of one parameter."""
    shape = jnp.shape(kept[0].code)
    if jnp.shape(g) != shape or not jnp.issubdtype(jnp.result_type(g), jnp.floating):
        raise ValueError(
            f"`updates[{path}]` must be a real floating array of shape {shape}, as at `init`;"
            f" found {_describe(g)}"
        )
    dtypes = (FIRST, SECOND)[: len(kept)]
    expected = jax.eval_shape(lambda: init(shape, dtypes, scale_dtype))
    if _describe(expected) != _describe(kept):
        raise ValueError(
            f"the moments of `{path}` must be {_describe(expected)}; found {_describe(kept)}. Use"
            " the `scale_dtype` that the state was made with, and keep its dtypes (no tree.cast)."
        )


def check_layer(path: str, shape: Shape) -> None:
    """No group of a layer of stacked leaves, ``[1, ...]``, may reach into the next one."""
    if shape[-1] % GROUP and math.prod(shape) % GROUP:
        raise ValueError(
            f"`{path}` has layers of shape {shape[1:]} stacked in one array, where groups of"
            f" {GROUP} neighbours cross layers: give the layers as a list, or this leaf to another"
            " optimizer by `optax.partition`"
        )


def _moments(rule: Rule, g: Array, kept: Kept, decay: Decay) -> tuple[Array, Real]:
    """Update and moments of a step, float32, before they are rounded."""
    return rule(g.astype(jnp.float32), tuple(map(decode, kept)), decay)


def _encoded(moments: Real, kept: Kept, inside: tuple[int, ...]) -> Kept:
    """Moments in the place of those that are kept, with scales in float32."""
    pairs = zip(moments, kept, strict=True)
    return tuple(encode(x, old.code.dtype, inside) for x, old in pairs)


def _rounded(new: Kept, kept: Kept, position: Position, phase: UInt32[Array, "two"]) -> Kept:
    """The same with scales in the dtype that they are kept in."""
    # The first moment gets the second fraction, as in `gefen_jax._dual_step`.
    words = reversed(dither(phase, position))
    return tuple(
        x._replace(scale=round_scale(x.scale, old.scale.dtype, word))
        for x, old, word in zip(new, kept, words, strict=False)
    )


def _advance(
    rule: Rule,
    g: Array,
    state: tuple[Kept, Position],
    block: Shape,
    step: Step,
    *,
    chunk: Chunk | None = None,
) -> tuple[Array, Kept]:
    """Update and moments of a leaf a step later. Runs must divide their axis."""
    kept, position = state
    blocked, inside = split(g, block)

    def seen(x: Array) -> Array:
        is_leaf = x.shape == g.shape
        return x.reshape(blocked.shape) if is_leaf else split_stats(x, g.shape, block)

    old = jax.tree.map(seen, kept)
    update, moments = _moments(rule, blocked, old, step.decay)
    if chunk is None:
        new = _encoded(moments, old, inside)
        new = jax.tree.map(lambda x, old: x.reshape(old.shape), new, kept)
    else:
        # The moments are computed once more: an update that the loop had to write would be a leaf
        # of its own, where XLA fuses this one with what follows.
        new = _encoded_in_pieces(rule, g, kept, block, step.decay, chunk)
    update = update.astype(g.dtype).reshape(g.shape)
    return update, _rounded(new, kept, position, step.phase)


def _advance_in_place(
    rule: Rule,
    g: Array,
    state: tuple[Kept, Position],
    block: Shape,
    step: Step,
    *,
    chunk: Chunk | None = None,
) -> tuple[Array, Kept]:
    """The same in pieces, with the update in the gradient's place: no array of a leaf's size.

    For GPUs, whose kernels have several results. On a CPU every result is a loop of its own, and
    XLA would copy, at every turn, what one of them replaces and another reads.
    """
    assert chunk is not None
    kept, position = state
    view, first = flat_view(g.shape, block), position.reshape(-1)[0]

    def in_piece(piece: Piece, _: None, both: tuple[Array, Kept]) -> tuple[Array, Kept]:
        g, old = both
        update, moments = _moments(rule, g, old, step.decay)
        rows = first + piece.row + jnp.arange(piece.rows, dtype=jnp.uint32)[:, None]
        new = _rounded(_encoded(moments, old, (1,)), old, rows, step.phase)
        # All of a piece before any of it is written: else XLA copies whole arrays at every turn,
        # for the kernels that still read what another one replaces.
        return jax.lax.optimization_barrier((update.astype(g.dtype), new))

    return map_pieces(in_piece, None, (g, kept), view, chunk)


def _encoded_in_pieces(
    rule: Rule, g: Array, kept: Kept, block: Shape, decay: Decay, chunk: Chunk
) -> Kept:
    """The moments of a leaf a step later, in pieces: temporaries of one, and the codes in place."""
    view = flat_view(g.shape, block)

    def flat(x: Array) -> Array:
        return x.reshape(view.shape if x.size == g.size else view.stats_shape)

    flat_g, scales = flat(g), [flat(x.scale) for x in kept]

    def body(piece: Piece, arrays: Kept) -> Kept:
        def old_scale(x: Array) -> Array:
            tied, x = piece.tied(x)
            return tied.read_stats(x)

        old = tuple(
            Coded(piece.read(x.code), old_scale(s)) for x, s in zip(arrays, scales, strict=True)
        )
        tied, fixed = piece.tied(flat_g)
        new = _encoded(_moments(rule, tied.read(fixed), old, decay)[1], old, (1,))
        return tuple(
            Coded(piece.write(x.code, n.code), piece.write_stats(x.scale, n.scale))
            for x, n in zip(arrays, new, strict=True)
        )

    # New scales are arrays of their own. If they replaced those that are read, XLA would copy them
    # at every turn, to have the old ones while it computes the codes.
    start = tuple(Coded(flat(x.code), jnp.zeros(view.stats_shape, jnp.float32)) for x in kept)
    new = over_pieces(view, body, varying_alike((start, flat_g))[0], chunk.size)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), new, kept)


_NO_TABLE: Any = None  # `in_best_form` hands a `Step` on; these codes are looked up nowhere


def _update(
    rule: Rule,
    g: Array,
    kept: Kept,
    decay: Decay,
    phase: UInt32[Array, "two"],
    place: Place | None,
) -> tuple[Array, Kept]:
    shape, block = groups_of(g.shape)
    step = Step(decay, _NO_TABLE, _NO_TABLE, phase, False, False, None)
    g, kept = apart(not_differentiable((g, kept), _NO_DERIVATIVE))
    seen = tuple(Coded(x.code.reshape(shape), x.scale) for x in kept)
    # Positions travel with the moments: where the leaf is cut, a part has those of its groups.
    state = seen, positions(stats_shape(shape, block), place)
    advance, in_place = (functools.partial(f, rule) for f in (_advance, _advance_in_place))
    # An update in float32 is fused with what follows; gradients may be the caller's, to keep, and
    # in their place it would cost a copy. A narrow one is rounded first, and XLA stores it.
    on_gpu = in_place if g.dtype.itemsize < 4 else advance
    how = {"on_gpu": on_gpu, "results": lambda g, state: (g, state[0])}
    update, new = in_best_form(advance, g.reshape(shape), state, block, step, **how)
    stored = tuple(Coded(x.code.reshape(g.shape), x.scale) for x in new)
    return update.reshape(g.shape), stored


@functools.partial(jax.jit, static_argnames="rule")
def update_leaf(g, kept, decay, phase, place, *, rule):
    """Update, in the gradient's dtype, and new moments of one leaf, on any mesh.

    ``place`` is that of its groups, where the leaf is a layer of stacked ones.
    Jitted so that leaves of equal shape are traced and lowered once.
    """
    return laid_out_like(g, functools.partial(_update, rule), g, kept, decay, phase, place)


_NO_DERIVATIVE = (
    "companded moments have no useful derivative: the update cannot be differentiated with"
    " respect to gradients or state. Use optax's own optimizer where you need it."
)
