r"""The step of a leaf with both moments in a byte per element, in plain jnp: the specification.

Elements come in pairs: the i-th of the first half of a block's run, and the i-th of its second
half. Two bytes per pair hold a code k of 4 bits of each first moment, in the low halves, and a code
h of 8 bits of the second moment that the two share, its high bits in the first byte. Per block
there are an exponent e and a scale s. With c a codebook of 16,

    nu = level(e, h)            (256 levels, from 2^e at h = 255 down to 17 * 2^(e - 20) at h = 0)
    m  = c[k] * s * sqrt(nu)

    m  <- m + (1 - b1) * (g - m)
    nu <- b2 * nu + (1 - b2) * mean_pair(g^2)
    e  <- the exponent of max_block nu, rounded up
    h  <- nu, rounded to one of the two levels around it, so that it is right on average
    s  <- max_block |m / sqrt(level(e, h))|
    k  <- m / sqrt(level(e, h)) / s, rounded to one of the two entries of c around it, too

and then, with m and nu as the new codes have them,

    update = (m / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

Rounding to the nearest would leave nu where it is for ever (one step changes it by a thousandth),
and small parts of m; rounding by a fraction (`gefen_jax._dither`) moves them by as much on average.
But a nu that jumps between two levels is off from what it should be, for as long as it remembers,
1 / (1 - b2) steps: that costs more than sharing it with a neighbour, which buys levels a sixteenth
apart instead of a factor of 1.5 or 2 (the numbers: `examples/benchmarks/research.md`).

The levels of nu are the floats with 4 bits of mantissa, of 16 octaves. So rounding is one integer
addition: a float32's lower bits say how far it is on its way to the next level, and adding as many
bits of the fraction carries with just that probability. Exponents are those of float32, biased by
127. A nu below the lowest level takes it: the steps of its pair are shorter.

The first moment is coded relative to the root of the second, which makes the elements of a block
alike whatever their size: what is coded is nearly the update itself.

As in `gefen_jax._step`, `advance_dual` writes the state only and `direction_dual` is one
elementwise expression of it, which XLA fuses with what follows. (Using the moments as they were
before coding needs an array of updates and gained nothing in validation loss.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from gefen_jax._blocks import (
    Shape,
    flat_view,
    read_cut,
    split,
    split_stats,
    spread,
    stats_shape,
)
from gefen_jax._chunks import PairedPiece, Pairs, Route, map_pieces
from gefen_jax._dither import Place, dither, positions, strides_at
from gefen_jax._levels import Levels, level, round_to_level
from gefen_jax._types import Decay, Moments, Move, Step

_MANTISSA = 23  # bits of a float32's mantissa
_KEPT = 4  # of them in a code of nu; the other bits of a byte are 4 of the exponent
_DROPPED = _MANTISSA - _KEPT
_INFINITE = 255  # the biased exponent of inf
_NEAREST = np.uint32(1 << 31)  # the fraction by which rounding takes the nearest


class _Layout(NamedTuple):
    """How the blocks of a leaf lie in an array."""

    inside: tuple[int, ...]  # the axes of a block
    paired: int  # of them, the one whose halves are paired


Halves = tuple[Array, Array]  # of the paired axis: the two elements of every pair


def paired_axis(block: Shape) -> int | None:
    """The axis of a block whose halves are paired: the last with an even run."""
    return next((i for i in reversed(range(len(block))) if block[i] % 2 == 0), None)


def _halves(x: Array, axis: int) -> Halves:
    half = x.shape[axis] // 2
    first, second = (jax.lax.slice_in_dim(x, i * half, (i + 1) * half, axis=axis) for i in (0, 1))
    return first, second


def _nu_code(first: UInt8[Array, "..."], second: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
    """The code of nu from the bytes of a pair."""
    return (first & 0xF0) | (second >> 4)


def _nu_level(exponent: UInt8[Array, "..."], code: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The levels that exponents and codes stand for; 0 where they fall below the floats."""
    place = (exponent.astype(jnp.int32) << _KEPT) + code.astype(jnp.int32) - 255
    return jax.lax.bitcast_convert_type(jnp.maximum(place, 0) << _DROPPED, jnp.float32)


def _bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _round_nu(
    nu: Float[Array, "..."], fraction: UInt32[Array, "..."], inside: tuple[int, ...]
) -> tuple[UInt8[Array, "..."], UInt8[Array, "..."]]:
    """The blocks' exponents and the pairs' codes."""
    largest = _bits(jnp.max(nu, axis=inside, keepdims=True))
    exponent = (largest + ((1 << _MANTISSA) - 1)) >> _MANTISSA
    exponent = jnp.minimum(exponent, _INFINITE).astype(jnp.int32)
    place = ((_bits(nu) + (fraction >> (32 - _DROPPED))) >> _DROPPED).astype(jnp.int32)
    code = jnp.clip(place - (exponent << _KEPT) + 255, 0, 255)
    return exponent.astype(jnp.uint8), code.astype(jnp.uint8)


def _code(
    m: tuple[Float[Array, "..."], Float[Array, "..."]],
    nu: Float[Array, "..."],
    fractions: tuple[Array, tuple[Array, Array]],
    layout: _Layout,
    levels: Levels,
) -> Moments:
    """The state of pairs: their two m, their nu, and the fractions that round nu and each m."""
    nu_fraction, m_fractions = fractions
    exponent, code = _round_nu(nu, nu_fraction, layout.inside)
    root = jnp.sqrt(_nu_level(exponent, code))
    inverse = 1 / jnp.where(root == 0, jnp.inf, root)
    x1, x2 = (part * inverse for part in m)
    # XLA's maximum on a CPU passes over NaN; an infinite scale makes the block's updates NaN.
    largest = jnp.where(jnp.isnan(x1 + x2), jnp.inf, jnp.maximum(jnp.abs(x1), jnp.abs(x2)))
    scale = jnp.max(largest, axis=layout.inside, keepdims=True)
    divisor = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    codes = [
        round_to_level(levels, x / divisor, fraction) | bits
        for x, fraction, bits in zip((x1, x2), m_fractions, (code & 0xF0, code << 4), strict=True)
    ]
    return Moments(tuple(codes), scale, exponent)


def _next(g: Halves, state: Moments, position: Halves, layout: _Layout, step: Step) -> Moments:
    """The state of blocks, a step later; of either, mu are halves."""
    decay: Decay = step.decay
    g1, g2 = (step.gradient(x) for x in g)
    (m1, m2), nu = _read_halves(state, step.levels)
    m = m1 + decay.one_minus_b1 * (g1 - m1), m2 + decay.one_minus_b1 * (g2 - m2)
    nu = decay.b2 * nu + decay.one_minus_b2 * (0.5 * (jnp.square(g1) + jnp.square(g2)))
    (nu_fraction, first), (_, second) = (dither(step.phase, p) for p in position)
    return _code(m, nu, (nu_fraction, (first, second)), layout, step.levels)


def _read_halves(state: Moments, levels: Levels) -> tuple[Halves, Array]:
    """The first moments of pairs and their second one; the state's mu are halves."""
    nu = _nu_level(state.nu, _nu_code(*state.mu))
    unit = state.scale * jnp.sqrt(nu)
    m1, m2 = (level(levels, c & 15) * unit for c in state.mu)
    return (m1, m2), nu


def _joined(state: Moments, like: Moments, layout: _Layout) -> Moments:
    """The state in the shapes that a leaf's has; its mu are halves."""
    state = state._replace(mu=jnp.concatenate(state.mu, axis=layout.paired))
    return Moments(*(x.reshape(old.shape) for x, old in zip(state, like, strict=True)))


def _blocked(shape: Shape, block: Shape) -> _Layout:
    """The layout of what `split` returns."""
    axis, end, run = read_cut(shape, block)
    new = int(run < shape[axis])  # axes
    paired = paired_axis(block)
    assert paired is not None, "checked when the plan was made"
    return _Layout(tuple(range(axis + new, end + new + 1)), paired + new)


def advance_dual(
    g: Float[Array, "*shape"],
    state: Moments,
    block: Shape,
    step: Step,
    *,
    chunk: int | None = None,
) -> Moments:
    """Takes the gradient into the state.

    With ``chunk``, the leaf is worked through in pieces of about so many elements, in place: the
    same result, with temporaries of one piece.
    """
    if chunk is None:
        layout = _blocked(g.shape, block)
        blocked, _ = split(g, block)
        parts = (
            _halves(x.reshape(blocked.shape), layout.paired)
            for x in (g, state.mu, positions(g.shape, step.place))
        )
        g_halves, mu, position = parts
        scale, exponent = (split_stats(x, g.shape, block) for x in (state.scale, state.nu))
        new = _next(g_halves, Moments(mu, scale, exponent), position, layout, step)
        return _joined(new, state, layout)
    view, route = flat_view(g.shape, block), _route(g.shape, block, step.place)

    def in_piece(piece: PairedPiece, g: Pairs, state: Moments) -> Moments:
        state = state._replace(mu=state.mu.halves)
        new = _next(g.halves, state, piece.positions(route), _PIECE, step)
        return new._replace(mu=piece.joined(new.mu))

    return map_pieces(in_piece, g, state, view, chunk, stretches=_stretches(block))


def fused_dual(
    g: Float[Array, "*shape"],
    both: tuple[Any, Moments],
    block: Shape,
    step: Step,
    *,
    move: Move,
    chunk: int | None = None,
) -> tuple[Any, Moments]:
    """`advance_dual` and what ``move`` makes of the weight; ``both`` are it and the state."""
    weight, state = both
    if chunk is None:
        new = advance_dual(g, state, block, step)
        direction = direction_dual(g, new, block, step)
        return move(weight, direction, positions(g.shape, step.place), step), new
    view, route = flat_view(g.shape, block), _route(g.shape, block, step.place)

    def in_piece(piece: PairedPiece, g: Pairs, both: tuple[Any, Moments]) -> Any:
        weight, state = both
        position = piece.positions(route)
        new = _next(g.halves, state._replace(mu=state.mu.halves), position, _PIECE, step)
        # What a pair shares is computed once for both.
        nu = _nu_level(new.nu, _nu_code(*new.mu))
        codes = piece.joined(new.mu)
        if all(x.both.dtype == jnp.float32 for x in _read(weight)):
            scale = jnp.broadcast_to(new.scale, (*nu.shape[:2], *new.scale.shape[2:]))
            shared = piece.per_stretch(scale), piece.per_stretch(nu)
            first, second = (jnp.broadcast_to(x, nu.shape) for x in position)
            direction = _direction(g.both, codes, *shared, step)
            whole = _each(weight, lambda x: x.both)
            weight = move(whole, direction, piece.joined((first, second)), step)
            return weight, new._replace(mu=codes)
        # Narrow weights by halves, which are stored, and behind a barrier: XLA on a CPU copies an
        # array of bfloat16 that it computes from, this or its correction, and writes to in place.
        moved = []
        for i in range(2):
            direction = _direction(g.halves[i], new.mu[i], new.scale, nu, step)
            half = _each(weight, lambda x: x.halves[i])  # noqa: B023 (used at once)
            moved.append(move(half, direction, position[i], step))
        weight = jax.tree.map(lambda *parts: piece.joined(parts), *moved)
        return jax.lax.optimization_barrier(weight), new._replace(mu=codes)

    return map_pieces(in_piece, g, both, view, chunk, stretches=_stretches(block))


def _is_read(x: Any) -> bool:
    return isinstance(x, Pairs)


def _read(weight: Any) -> list[Pairs]:
    """What was read of a weight's arrays."""
    return jax.tree.leaves(weight, is_leaf=_is_read)


def _each(weight: Any, part: Callable[[Pairs], Array]) -> Any:
    return jax.tree.map(part, weight, is_leaf=_is_read)


# A piece has blocks, stretches of each that are halved for themselves, and their elements.
_PIECE = _Layout((1, 2), 2)


def _stretches(block: Shape) -> int:
    return math.prod(block[: paired_axis(block)])


def _route(shape: Shape, block: Shape, place: Place | None) -> Route:
    """The way of paired pieces through the leaf that the array is, or has its place in."""
    paired, start = paired_axis(block), 0 if place is None else place.offset
    assert paired is not None, "checked when the plan was made"
    return Route.through(shape, block, paired, strides_at(shape, place), start)


def _stats_of_elements(state: Moments, block: Shape) -> tuple[Array, Array]:
    """The scale and the second moment of every element."""
    shape = state.mu.shape
    blocked, _ = split(state.mu, block)
    axis = _blocked(shape, block).paired
    # The two halves as an axis of their own, along which a code of nu is repeated: one elementwise
    # expression, where two halves put together would be stored.
    half = blocked.shape[axis] // 2
    pairs = blocked.reshape(*blocked.shape[:axis], 2, half, *blocked.shape[axis + 1 :])
    code = jnp.broadcast_to(_nu_code(*_halves(pairs, axis)), pairs.shape).reshape(shape)
    scale, exponent = (spread(x, shape, block) for x in (state.scale, state.nu))
    return scale, _nu_level(exponent, code)


def read_dual(
    state: Moments, block: Shape, levels: Levels
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The moments of every element."""
    scale, nu = _stats_of_elements(state, block)
    return level(levels, state.mu & 15) * (scale * jnp.sqrt(nu)), nu


def write_dual(
    mu: Float[Array, "*shape"], nu: Float[Array, "*shape"], block: Shape, levels: Levels
) -> Moments:
    """The state nearest to the moments of every element: a pair has the mean of its two nu.

    The nearest level of nu is that in nu itself, not in its logarithm: nu is an average, and so is
    right on average over elements, as the step's rounding is over steps.
    """
    layout = _blocked(mu.shape, block)
    m, (nu1, nu2) = (_halves(split(x, block)[0], layout.paired) for x in (mu, nu))
    half = jnp.full(nu1.shape, _NEAREST)
    new = _code(m, 0.5 * (nu1 + nu2), (half, (half, half)), layout, levels)
    stats = jnp.zeros(stats_shape(mu.shape, block))
    return _joined(new, Moments(mu, stats, stats), layout)


def direction_dual(
    g: Float[Array, "*shape"], state: Moments, block: Shape, step: Step
) -> Float[Array, "*shape"]:
    """The update's direction from the state that `advance_dual` wrote."""
    return _direction(g, state.mu, *_stats_of_elements(state, block), step)


def _direction(
    g: Float[Array, "..."],
    codes: UInt8[Array, "..."],
    scale: Float[Array, "..."],
    nu: Float[Array, "..."],
    step: Step,
) -> Float[Array, "..."]:
    """Elementwise; ``scale`` and ``nu`` may be those of pairs."""
    decay: Decay = step.decay
    c, unit = level(step.levels, codes & 15), jnp.sqrt(nu)
    root = jnp.sqrt(nu * (1 / decay.correction2) + decay.eps_root) + decay.eps
    # An element that never saw a gradient stays where it is, with eps = 0 too.
    root = jnp.where(root == 0, jnp.inf, root)
    # A square that overflowed does not freeze its element for ever, as in AdamW: inf / inf is NaN,
    # which nobody overlooks.
    if not step.nesterov:
        # One factor per pair: the elementwise part is a lookup and a product.
        return c * (scale / decay.correction1 * unit / root)
    now = step.gradient(g) / decay.correction1
    m_hat = decay.b1 * (c * (scale * unit) / decay.next_correction1) + decay.one_minus_b1 * now
    return m_hat / root
