r"""The step of a leaf with both moments in one byte, in plain jnp: the specification.

The low half of an element's byte is a code k of its first moment, the high half a code h of its
second. Per group of elements there are an exponent e and a scale s. With c a codebook of 16,

    nu = level(e, h)                  (16 levels, from 2^e at h = 15 down to 2^(e - 11) at h = 0)
    m  = c[k] * s * sqrt(nu)

    m  <- m + (1 - b1) * (g - m)
    nu <- b2 * nu + (1 - b2) * g^2             per element, as in Adam
    e  <- the exponent of max_group nu, rounded up
    h  <- nu, rounded to one of the two levels around it, so that it is right on average
    s  <- max_group |m / sqrt(level(e, h))|
    k  <- m / sqrt(level(e, h)) / s, rounded to one of the two entries of c around it, too

and then, with m and nu as the new codes have them,

    update = (m / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

The levels of nu are powers of two, and in the upper 4 octaves, where most elements are, the floats
half-way between them, too. An element below the lowest level takes it: its steps are shorter.

Rounding to the nearest would leave nu where it is for ever (one step changes it by a thousandth),
and small parts of m; rounding by a fraction (`gefen_jax._dither`) moves them by as much on average.
For nu that is one integer addition: a float32's lower bits say how far it is on its way to the next
level, and adding as many bits of the fraction carries with just that probability. Exponents are
those of float32, biased by 127; below, a *place* is twice an exponent, plus 1 for 1.5 times it.

The first moment is coded relative to the root of the second, which makes the elements of a group
alike whatever their size: what is coded is nearly the update itself.

As in `gefen_jax._step`, `advance_dual` writes the state only and `direction_dual` is one
elementwise expression of it, which XLA fuses with what follows. (Using the moments as they were
before coding needs an array of updates and gained nothing in validation loss.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from gefen_jax._blocks import Shape, flat_view, split, split_stats, spread, stats_shape
from gefen_jax._chunks import Piece, over_pieces
from gefen_jax._dither import dither, positions
from gefen_jax._levels import Levels, level, round_to_level
from gefen_jax._types import Decay, Moments, Step

_MANTISSA = 23  # bits of a float32's mantissa
_FINE = 8  # places below a group's largest that have levels at every place, further down every two
_INFINITE = 255  # the biased exponent of inf
_HALF = np.uint32(1 << 31)  # the fraction by which rounding takes the nearest


def _nu_level(exponent: UInt8[Array, "..."], high: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The levels that exponents and codes stand for; 0 where they fall below the floats."""
    below = 15 - high.astype(jnp.int32)
    below += jnp.maximum(below - _FINE, 0)
    place = jnp.maximum(2 * exponent.astype(jnp.int32) - below, 0)
    return jax.lax.bitcast_convert_type(place << (_MANTISSA - 1), jnp.float32)


def _bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _round_nu(
    nu: Float[Array, "..."], fraction: UInt32[Array, "..."], inside: tuple[int, ...]
) -> tuple[UInt8[Array, "..."], UInt8[Array, "..."]]:
    """The groups' exponents and the elements' codes."""
    largest = _bits(jnp.max(nu, axis=inside, keepdims=True))
    exponent = (largest + ((1 << _MANTISSA) - 1)) >> _MANTISSA
    exponent = jnp.minimum(exponent, _INFINITE).astype(jnp.int32)
    coarse = ((_bits(nu) + (fraction >> 9)) >> _MANTISSA).astype(jnp.int32)
    fine = ((_bits(nu) + (fraction >> 10)) >> (_MANTISSA - 1)).astype(jnp.int32)
    # Which of the two is decided by nu itself: what lies between two levels must round to them.
    place = (_bits(nu) >> (_MANTISSA - 1)).astype(jnp.int32)
    below_fine = place < 2 * exponent - _FINE
    below = jnp.where(below_fine, _FINE // 2 + exponent - coarse, 2 * exponent - fine)
    high = 15 - jnp.clip(below, 0, 15)
    return exponent.astype(jnp.uint8), high.astype(jnp.uint8)


def _moments(
    codes: UInt8[Array, "..."],
    scale: Float[Array, "..."],
    exponent: UInt8[Array, "..."],
    levels: Levels,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """m and nu of every element."""
    nu = _nu_level(exponent, codes >> 4)
    return level(levels, codes & 15) * (scale * jnp.sqrt(nu)), nu


def _code(
    m: Float[Array, "..."],
    nu: Float[Array, "..."],
    fractions: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    inside: tuple[int, ...],
    levels: Levels,
) -> Moments:
    """The codes of groups that are the axes ``inside``; the fractions round nu and m."""
    nu_fraction, mu_fraction = fractions
    exponent, high = _round_nu(nu, nu_fraction, inside)
    root = jnp.sqrt(_nu_level(exponent, high))
    x = m / jnp.where(root == 0, jnp.inf, root)
    # XLA's maximum on a CPU passes over NaN; an infinite scale makes the group's updates NaN.
    scale = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), axis=inside, keepdims=True)
    x = x / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    codes = round_to_level(levels, x, mu_fraction) | (high << 4)
    return Moments(codes, scale, exponent)


def _next(
    g: Float[Array, "..."],
    state: Moments,
    position: UInt32[Array, "..."],
    inside: tuple[int, ...],
    step: Step,
) -> Moments:
    """The state of groups that are the axes ``inside``, a step later."""
    decay: Decay = step.decay
    g = g.astype(jnp.float32)
    m, nu = _moments(state.mu, state.scale, state.nu, step.levels)
    m = m + decay.one_minus_b1 * (g - m)
    nu = decay.b2 * nu + decay.one_minus_b2 * jnp.square(g)
    return _code(m, nu, dither(step.phase, position), inside, step.levels)


def advance_dual(
    g: Float[Array, "*shape"],
    state: Moments,
    block: Shape,
    step: Step,
    *,
    chunk: int | None = None,
) -> Moments:
    """Takes the gradient into the state. Runs must divide their axis.

    With ``chunk``, the leaf is worked through in pieces of about so many elements, in place: the
    same result, with temporaries of one piece.
    """
    if chunk is None:
        blocked, inside = split(g, block)
        old = Moments(
            state.mu.reshape(blocked.shape),
            split_stats(state.scale, g.shape, block),
            split_stats(state.nu, g.shape, block),
        )
        new = _next(blocked, old, positions(blocked.shape), inside, step)
    else:
        view = flat_view(g.shape, block)
        flat_g = g.reshape(view.shape)

        def body(piece: Piece, carry: Moments) -> Moments:
            part = piece.read_constant(flat_g)
            old = Moments(
                piece.read(carry.mu), piece.read_stats(carry.scale), piece.read_stats(carry.nu)
            )
            new = _next(part, old, piece.positions(view), (1,), step)
            return Moments(
                piece.write(carry.mu, new.mu),
                piece.write_stats(carry.scale, new.scale),
                piece.write_stats(carry.nu, new.nu),
            )

        carry = Moments(
            state.mu.reshape(view.shape),
            state.scale.reshape(view.stats_shape),
            state.nu.reshape(view.stats_shape),
        )
        new = over_pieces(view, body, carry, chunk)
    return Moments(*(x.reshape(old.shape) for x, old in zip(new, state, strict=True)))


def read_dual(
    state: Moments, block: Shape, levels: Levels
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The moments of every element."""
    scale, exponent = (spread(x, state.mu.shape, block) for x in (state.scale, state.nu))
    return _moments(state.mu, scale, exponent, levels)


def write_dual(
    mu: Float[Array, "*shape"], nu: Float[Array, "*shape"], block: Shape, levels: Levels
) -> Moments:
    """The state nearest to the moments of every element. Runs must divide their axis.

    The nearest level of nu is that in nu itself, not in its logarithm: nu is an average, and so is
    right on average over elements, as the step's rounding is over steps.
    """
    blocked_mu, inside = split(mu, block)
    blocked_nu, _ = split(nu, block)
    half = jnp.full(blocked_mu.shape, _HALF)
    codes, scale, exponent = _code(blocked_mu, blocked_nu, (half, half), inside, levels)
    stats = stats_shape(mu.shape, block)
    return Moments(codes.reshape(mu.shape), scale.reshape(stats), exponent.reshape(stats))


def direction_dual(
    g: Float[Array, "*shape"], state: Moments, block: Shape, step: Step
) -> Float[Array, "*shape"]:
    """The update's direction from the state that `advance_dual` wrote, in the gradient's dtype."""
    decay: Decay = step.decay
    m, nu = read_dual(state, block, step.levels)
    if step.nesterov:
        now = g.astype(jnp.float32) / decay.correction1
        m_hat = decay.b1 * (m / decay.next_correction1) + decay.one_minus_b1 * now
    else:
        m_hat = m / decay.correction1
    root = jnp.sqrt(nu / decay.correction2 + decay.eps_root) + decay.eps
    # A square that overflowed does not freeze its element for ever, as in AdamW: its m has the code
    # of 0, and 0 * sqrt(inf) is NaN, which nobody overlooks.
    # An element that never saw a gradient stays where it is, with eps = 0 too.
    return (m_hat / jnp.where(root == 0, jnp.inf, root)).astype(g.dtype)
