r"""The step of a leaf with codes of both moments, in plain jnp: the specification.

Elements come in pairs: the i-th of the first half of a block's run, and the i-th of its second
half. They hold a code k of 4 bits of each first moment, and codes h of 8 bits of second moments:
one that the two share, or one of each (`gefen_jax._packing`). Per block there are an exponent e and
a scale s. With c a codebook of 16,

    nu = level(e, h)            (256 levels, from 2^e at h = 255 down to 17 * 2^(e - 20) at h = 0)
    m  = c[k] * s * sqrt(nu)

    m  <- m + (1 - b1) * (g - m)
    nu <- b2 * nu + (1 - b2) * g^2             (where it is shared, of the pair's mean of g^2)
    e  <- the exponent of max_block nu, rounded up
    h  <- nu, rounded to one of the two levels around it, so that it is right on average
    s  <- max_block |m / sqrt(level(e, h))|
    k  <- m / sqrt(level(e, h)) / s, rounded to one of the two entries of c around it, too

and then, with m and nu as the new codes have them,

    update = (m / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

Rounding to the nearest would leave nu where it is for ever (one step changes it by a thousandth),
and small parts of m; rounding by a fraction (`gefen_jax._dither`) moves them by as much on average.
But a nu that jumps between two levels is off from what it should be, for as long as it remembers,
1 / (1 - b2) steps: with half a byte for either that costs more than sharing a byte, which buys
levels a sixteenth apart instead of a factor of 1.5 or 2 (the numbers:
`examples/benchmarks/research.md`).

The first moment is coded relative to the root of the second, which makes the elements of a block
alike whatever their size: what is coded is nearly the update itself.

As in `gefen_jax._step`, `advance_dual` writes the state only and `direction_dual` is one
elementwise expression of it, which XLA fuses with what follows. (Using the moments as they were
before coding needs an array of updates and gained nothing in validation loss.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from gefen_jax._blocks import Shape, flat_view, split
from gefen_jax._chunks import Chunk, map_pieces
from gefen_jax._dither import Place, dither, positions, strides_at
from gefen_jax._levels import Levels, level, round_to_level
from gefen_jax._nu_levels import NEAREST, nu_level, round_nu
from gefen_jax._packing import Codes, Packing
from gefen_jax._paired_pieces import PairedPiece, Pairs, Route
from gefen_jax._pairs import Halves, Layout, blocked, halves, paired_axis, stretches
from gefen_jax._types import Decay, Moments, Move, Step


def _code(
    m: Halves,
    nu: tuple[Array, ...],
    fractions: tuple[tuple[Array, ...], Halves],
    inside: tuple[int, ...],
    levels: Levels,
    packing: Packing,
) -> Moments:
    """The state of pairs: their two m, their nu, and the fractions that round each."""
    nu_fractions, m_fractions = fractions
    exponent, codes = round_nu(nu, nu_fractions, inside)
    roots = (jnp.sqrt(nu_level(exponent, code)) for code in codes)
    inverses = _of_both(tuple(1 / jnp.where(root == 0, jnp.inf, root) for root in roots))
    x1, x2 = (part * inverse for part, inverse in zip(m, inverses, strict=True))
    # XLA's maximum on a CPU passes over NaN; an infinite scale makes the block's updates NaN.
    largest = jnp.where(jnp.isnan(x1 + x2), jnp.inf, jnp.maximum(jnp.abs(x1), jnp.abs(x2)))
    scale = packing.rounded(jnp.max(largest, axis=inside, keepdims=True))
    divisor = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    first, second = (
        round_to_level(levels, x / divisor, fraction)
        for x, fraction in zip((x1, x2), m_fractions, strict=True)
    )
    return packing.pack(Codes((first, second), codes, scale, exponent))


def _of_both(x: tuple[Array, ...]) -> Halves:
    """What the two elements of a pair have, or share."""
    return x[0], x[-1]


def _next(
    g: Halves,
    state: Moments,
    position: Halves,
    inside: tuple[int, ...],
    step: Step,
    packing: Packing,
) -> Moments:
    """The state of blocks, a step later; of either, mu are halves."""
    decay: Decay = step.decay
    g1, g2 = (step.gradient(x) for x in g)
    (m1, m2), nu = _read_halves(state, step.levels, packing)
    m = m1 + decay.one_minus_b1 * (g1 - m1), m2 + decay.one_minus_b1 * (g2 - m2)
    squares = packing.average((jnp.square(g1), jnp.square(g2)))
    nu = tuple(
        decay.b2 * x + decay.one_minus_b2 * square for x, square in zip(nu, squares, strict=True)
    )
    (nu1, first), (nu2, second) = (dither(step.phase, p) for p in position)
    fractions = (nu1, nu2)[: len(nu)], (first, second)
    return _code(m, nu, fractions, inside, step.levels, packing)


def _read_halves(
    state: Moments, levels: Levels, packing: Packing
) -> tuple[Halves, tuple[Array, ...]]:
    """The first moments of pairs and their second ones; the state's mu are halves."""
    codes = packing.unpack(state)
    nu = tuple(nu_level(codes.exponent, code) for code in codes.nu)
    units = _of_both(tuple(codes.scale * jnp.sqrt(x) for x in nu))
    m1, m2 = (level(levels, c & 15) * unit for c, unit in zip(codes.mu, units, strict=True))
    return (m1, m2), nu


def _joined(state: Moments, like: Moments, layout: Layout) -> Moments:
    """The state in the shapes that a leaf's has; its mu are halves."""
    state = state._replace(mu=jnp.concatenate(state.mu, axis=layout.paired))
    return Moments(*(x.reshape(old.shape) for x, old in zip(state, like, strict=True)))


def advance_dual(
    g: Float[Array, "*shape"],
    state: Moments,
    block: Shape,
    step: Step,
    *,
    packing: Packing,
    chunk: Chunk | None = None,
) -> Moments:
    """Takes the gradient into the state.

    With ``chunk``, the leaf is worked through in pieces, in place: the same result, with
    temporaries of one piece.
    """
    if chunk is None:
        layout, parts = blocked(g.shape, block), split(g, block)[0].shape
        of_elements = (g, state.mu, positions(g.shape, step.place))
        g_halves, mu, position = (halves(x.reshape(parts), layout.paired) for x in of_elements)
        old = packing.in_blocks(state, g.shape, block)._replace(mu=mu)
        return _joined(_next(g_halves, old, position, layout.inside, step, packing), state, layout)
    view, route = flat_view(g.shape, block), _route(g.shape, block, step.place)

    def in_piece(piece: PairedPiece, g: Pairs, state: Moments) -> Moments:
        state = state._replace(mu=state.mu.halves)
        new = _next(g.halves, state, piece.positions(route), _PIECE.inside, step, packing)
        return new._replace(mu=piece.joined(new.mu))

    return map_pieces(in_piece, g, state, view, chunk, stretches=stretches(block))


def fused_dual(
    g: Float[Array, "*shape"],
    both: tuple[Any, Moments],
    block: Shape,
    step: Step,
    *,
    packing: Packing,
    move: Move,
    chunk: Chunk | None = None,
) -> tuple[Any, Moments]:
    """`advance_dual` and what ``move`` makes of the weight; ``both`` are it and the state."""
    weight, state = both
    if chunk is None:
        new = advance_dual(g, state, block, step, packing=packing)
        direction = direction_dual(g, new, block, step, packing)
        return move(weight, direction, positions(g.shape, step.place), step), new
    view, route = flat_view(g.shape, block), _route(g.shape, block, step.place)

    def in_piece(piece: PairedPiece, g: Pairs, both: tuple[Any, Moments]) -> Any:
        weight, state = both
        position = piece.positions(route)
        state = state._replace(mu=state.mu.halves)
        new = _next(g.halves, state, position, _PIECE.inside, step, packing)
        read = packing.unpack(new)
        nu = tuple(nu_level(read.exponent, code) for code in read.nu)
        stored = new._replace(mu=piece.joined(new.mu))
        if len(nu) == 1 and all(x.both.dtype == jnp.float32 for x in _read(weight)):
            # What a pair shares is computed once for both.
            shape = nu[0].shape
            scale = jnp.broadcast_to(read.scale, (*shape[:2], *read.scale.shape[2:]))
            shared = piece.per_stretch(scale), piece.per_stretch(*nu)
            first, second = (jnp.broadcast_to(x, shape) for x in position)
            direction = _direction(g.both, stored.mu, *shared, step)
            whole = _each(weight, lambda x: x.both)
            weight = move(whole, direction, piece.joined((first, second)), step)
            return weight, stored
        # By halves, which are stored, and behind a barrier: XLA on a CPU copies an array of 16 bits
        # that it computes from, this or its correction, and writes to in place.
        moved = []
        for i in range(2):
            direction = _direction(g.halves[i], new.mu[i], read.scale, _of_both(nu)[i], step)
            half = _each(weight, lambda x: x.halves[i])  # noqa: B023 (used at once)
            moved.append(move(half, direction, position[i], step))
        weight = jax.tree.map(lambda *parts: piece.joined(parts), *moved)
        return jax.lax.optimization_barrier(weight), stored

    return map_pieces(in_piece, g, both, view, chunk, stretches=stretches(block))


def _is_read(x: Any) -> bool:
    return isinstance(x, Pairs)


def _read(weight: Any) -> list[Pairs]:
    """What was read of a weight's arrays."""
    return jax.tree.leaves(weight, is_leaf=_is_read)


def _each(weight: Any, part: Callable[[Pairs], Array]) -> Any:
    return jax.tree.map(part, weight, is_leaf=_is_read)


# A piece has blocks, stretches of each that are halved for themselves, and their elements.
_PIECE = Layout((1, 2), 2)


def _route(shape: Shape, block: Shape, place: Place | None) -> Route:
    """The way of paired pieces through the leaf that the array is, or has its place in."""
    paired, start = paired_axis(block), 0 if place is None else place.offset
    assert paired is not None, "checked when the plan was made"
    return Route.through(shape, block, paired, strides_at(shape, place), start)


def _stats_of_elements(state: Moments, block: Shape, packing: Packing) -> tuple[Array, Array]:
    """The scale and the second moment of every element."""
    code, scale, exponent = packing.unpack_elements(state, block)
    return scale, nu_level(exponent, code)


def read_dual(
    state: Moments, block: Shape, levels: Levels, packing: Packing
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The moments of every element."""
    scale, nu = _stats_of_elements(state, block, packing)
    return level(levels, state.mu & 15) * (scale * jnp.sqrt(nu)), nu


def write_dual(
    mu: Float[Array, "*shape"],
    nu: Float[Array, "*shape"],
    block: Shape,
    levels: Levels,
    packing: Packing,
) -> Moments:
    """The state nearest to the moments of every element: nu that is shared is the pair's mean.

    The nearest level of nu is that in nu itself, not in its logarithm: nu is an average, and so is
    right on average over elements, as the step's rounding is over steps.
    """
    layout = blocked(mu.shape, block)
    m, of_nu = (halves(split(x, block)[0], layout.paired) for x in (mu, nu))
    averages, nearest = packing.average(of_nu), jnp.full(m[0].shape, NEAREST)
    fractions = (nearest,) * len(averages), (nearest, nearest)
    new = _code(m, averages, fractions, layout.inside, levels, packing)
    return _joined(new, jax.eval_shape(lambda: packing.init(mu.shape, block)), layout)


def direction_dual(
    g: Float[Array, "*shape"], state: Moments, block: Shape, step: Step, packing: Packing
) -> Float[Array, "*shape"]:
    """The update's direction from the state that `advance_dual` wrote."""
    return _direction(g, state.mu, *_stats_of_elements(state, block, packing), step)


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
