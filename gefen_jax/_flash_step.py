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

from gefen_jax._backend import in_best_form, laid_out_like
from gefen_jax._blocks import Shape, flat_view, split, split_stats, stats_shape
from gefen_jax._chunks import Piece, map_pieces
from gefen_jax._companding import FIRST, SECOND, Coded, decode, encode, round_scale
from gefen_jax._dither import dither, positions
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._types import Decay, Step

GROUP = 32

Real = tuple[Float[Array, "..."], ...]
Kept = tuple[Coded, ...]
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


def _next(
    rule: Rule, g: Array, kept: Kept, position: Array, inside: tuple[int, ...], step: Step
) -> tuple[Array, Kept]:
    """The update, in the gradient's dtype, and the moments of groups; ``position``, theirs."""
    update, moments = rule(g.astype(jnp.float32), tuple(map(decode, kept)), step.decay)
    # The first moment gets the second fraction, as in `gefen_jax._dual_step`.
    words = reversed(dither(step.phase, position))
    new = []
    for x, old, word in zip(moments, kept, words, strict=False):
        code, scale = encode(x, old.code.dtype, inside)
        new.append(Coded(code, round_scale(scale, old.scale.dtype, word)))
    return update.astype(g.dtype), tuple(new)


def _advance(
    rule: Rule,
    g: Array,
    state: tuple[Kept, Array],
    block: Shape,
    step: Step,
    *,
    chunk: int | None = None,
) -> tuple[Array, Kept]:
    """Update and moments of a leaf a step later. Runs must divide their axis."""
    kept, position = state
    if chunk is not None:
        return _advance_in_pieces(rule, g, kept, position.reshape(-1)[0], block, step, chunk)
    blocked, inside = split(g, block)

    def seen(x: Array) -> Array:
        is_leaf = x.shape == g.shape
        return x.reshape(blocked.shape) if is_leaf else split_stats(x, g.shape, block)

    update, new = _next(rule, blocked, *jax.tree.map(seen, state), inside, step)
    new = jax.tree.map(lambda x, old: x.reshape(old.shape), new, kept)
    return update.reshape(g.shape), new


def _advance_in_pieces(
    rule: Rule, g: Array, kept: Kept, first: Array, block: Shape, step: Step, chunk: int
) -> tuple[Array, Kept]:
    """The same with temporaries of one piece: codes in place, the update in the gradient's."""
    view = flat_view(g.shape, block)

    def in_piece(piece: Piece, _, both: tuple[Array, Kept]) -> tuple[Array, Kept]:
        g, kept = both
        position = first + piece.row + jnp.arange(piece.rows, dtype=jnp.uint32)[:, None]
        return jax.lax.optimization_barrier(_next(rule, g, kept, position, (1,), step))

    return map_pieces(in_piece, None, (g, kept), view, chunk)


_NO_TABLE: Any = None  # `in_best_form` hands a `Step` on; these codes are looked up nowhere


def _update(
    rule: Rule, g: Array, kept: Kept, decay: Decay, phase: UInt32[Array, "two"]
) -> tuple[Array, Kept]:
    shape, block = groups_of(g.shape)
    step = Step(decay, _NO_TABLE, _NO_TABLE, phase, False, False, None)
    g, kept = not_differentiable((g, kept), _NO_DERIVATIVE)
    seen = tuple(Coded(x.code.reshape(shape), x.scale) for x in kept)
    state = seen, positions(stats_shape(shape, block))
    update, new = in_best_form(functools.partial(_advance, rule), g.reshape(shape), state, block, step)
    stored = tuple(Coded(x.code.reshape(g.shape), x.scale) for x in new)
    return update.reshape(g.shape), stored


@functools.partial(jax.jit, static_argnames="rule")
def update_leaf(g, kept, decay, phase, *, rule):
    """Update, in the gradient's dtype, and new moments of one leaf, on any mesh.

    Jitted so that leaves of equal shape are traced and lowered once.
    """
    return laid_out_like(g, functools.partial(_update, rule), g, kept, decay, phase)


_NO_DERIVATIVE = (
    "companded moments have no useful derivative: the update cannot be differentiated with"
    " respect to gradients or state. Use optax's own optimizer where you need it."
)
