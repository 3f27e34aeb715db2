"""The step of a leaf with coded momentum, in plain jnp: the specification of every backend.

With g the gradient in float32, c the codebook, and per block of a leaf a scale and nu:

    nu    <- b2 * nu + (1 - b2) * mean_block(g^2)
    m      = c[codes] * scale
    m      = m + (1 - b1) * (g - m)
    scale <- max_block |m|
    codes <- nearest(c, m / scale)             (m / 0 counts as 0)
    m_hat  = c[codes] * scale / (1 - b1^t)
    update = m_hat / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

(Gefen, arXiv 2606.13894; the reference writes sqrt(nu) / sqrt(1 - b2^t), which is the same number
but for rounding.) A nu with one entry per element instead of one per block takes g^2 itself.

`advance` does the first five lines and writes the state only; `direction` the last two, as one
elementwise expression of the new state. Kept apart, XLA fuses `direction` with whatever follows
(weight decay, learning rate, `apply_updates`), and no array of updates is ever stored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from gefen_jax._blocks import (
    Shape,
    equal_parts,
    flat_view,
    read_cut,
    runs_divide,
    split,
    split_stats,
    spread,
    stats_shape,
    times_stats,
)
from gefen_jax._chunks import Chunk, map_pieces
from gefen_jax._encoder import Encoder, decode, encode
from gefen_jax._pieces import Piece
from gefen_jax._types import Codebooks, Decay, Moments, Step


def _next_nu(
    g: Float[Array, "..."], nu: Float[Array, "..."], inside: tuple[int, ...], decay: Decay
) -> Float[Array, "..."]:
    """The second moment of blocks that are the axes ``inside``, or of every element."""
    square = jnp.square(g)
    if nu.shape != square.shape:
        square = jnp.mean(square, axis=inside, keepdims=True)
    return decay.b2 * nu + decay.one_minus_b2 * square


def _code_mu(
    m: Float[Array, "..."], inside: tuple[int, ...], encoder: Encoder, exact_lookup: bool
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """The nearest codes and the scales of a first moment in blocks that are the axes ``inside``."""
    scale = jnp.max(jnp.abs(m), axis=inside, keepdims=True)
    x = m / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return encode(encoder, x, exact_lookup=exact_lookup), scale


def _next(g: Float[Array, "..."], state: Moments, inside: tuple[int, ...], step: Step) -> Moments:
    """The state of blocks that are the axes ``inside``, a step later."""
    decay: Decay = step.decay
    g = step.gradient(g)
    m = decode(step.encoder, state.mu) * state.scale
    m = m + decay.one_minus_b1 * (g - m)
    codes, scale = _code_mu(m, inside, step.encoder, step.exact_lookup)
    return Moments(codes, scale, _next_nu(g, state.nu, inside, decay))


def advance(
    g: Float[Array, "*shape"],
    state: Moments,
    block: Shape,
    step: Step,
    *,
    chunk: Chunk | None = None,
) -> Moments:
    """Takes the gradient into the state. Runs must divide their axis.

    With ``chunk``, the leaf is worked through in pieces, in place: the same result, with
    temporaries of one piece.
    """
    if chunk is None:
        blocked, inside = split(g, block)

        def seen(x: Array) -> Array:
            return (
                x.reshape(blocked.shape) if x.shape == g.shape else split_stats(x, g.shape, block)
            )

        new = _next(blocked, Moments(*map(seen, state)), inside, step)
        return Moments(*(x.reshape(old.shape) for x, old in zip(new, state, strict=True)))

    def in_piece(piece: Piece, g: Array, state: Moments) -> Moments:
        return _next(g, state, (1,), step)

    return map_pieces(in_piece, g, state, flat_view(g.shape, block), chunk)


def by_equal_runs(
    of_part: Callable[[Array, Any, Shape], Any], x: Array, others: Any, block: Shape
) -> Any:
    """Applies a function that wants equal blocks to a leaf whose last run may be shorter.

    The others, and what the function returns, are any trees of arrays in blocks like the leaf or
    its statistics; what it returns is joined.
    """
    if runs_divide(x.shape, block):
        return of_part(x, others, block)
    axis = read_cut(x.shape, block).axis
    run, size = block[axis], x.shape[axis]

    def part(x: Array, low: int, high: int) -> Array:
        if x.shape[axis] != size:  # statistics
            low, high = low // run, -(-high // run)
        return jax.lax.slice_in_dim(x, low, high, axis=axis)

    parts = [
        of_part(
            part(x, low, high),
            jax.tree.map(lambda y: part(y, low, high), others),  # noqa: B023 (used at once)
            part_block,
        )
        for low, high, part_block in equal_parts(x.shape, block)
    ]
    return jax.tree.map(lambda *both: jnp.concatenate(both, axis=axis), *parts)


def direction(
    g: Float[Array, "*shape"], state: Moments, block: Shape, step: Step
) -> Float[Array, "*shape"]:
    """The update's direction from the state that `advance` wrote."""
    decay: Decay = step.decay
    root = jnp.sqrt(state.nu / decay.correction2 + decay.eps_root) + decay.eps
    # A square that overflowed would freeze its block for ever (x / inf = 0, as in AdamW): inf * 0
    # makes its updates NaN instead, which nobody overlooks.
    root = root + root * 0
    # A block that never saw a gradient stays where it is, with eps = 0 too.
    root = jnp.where(root == 0, jnp.inf, root)
    per_element = root.shape == g.shape
    c = decode(step.encoder, state.mu)
    if not step.nesterov and not per_element:
        # One factor per block: the elementwise part is a lookup and a product.
        factor = state.scale / decay.correction1 / root
        return times_stats(c, factor, block)
    m_hat = times_stats(c, state.scale, block)
    if step.nesterov:
        now = step.gradient(g) / decay.correction1
        m_hat = decay.b1 * (m_hat / decay.next_correction1) + decay.one_minus_b1 * now
    else:
        m_hat = m_hat / decay.correction1
    return m_hat / root if per_element else times_stats(m_hat, 1 / root, block)


def read_moments(
    state: Moments, block: Shape, codebooks: Codebooks
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The moments of every element."""
    mu = times_stats(decode(codebooks.encoder, state.mu), state.scale, block)
    per_element = state.nu.shape == mu.shape
    return mu, state.nu if per_element else spread(state.nu, mu.shape, block)


def write_moments(
    mu: Float[Array, "*shape"],
    nu: Float[Array, "*shape"],
    block: Shape,
    codebooks: Codebooks,
    *,
    per_element: bool = False,
) -> Moments:
    """The state nearest to the moments of every element. Runs must divide their axis."""
    blocked, inside = split(mu, block)
    codes, scale = _code_mu(blocked, inside, codebooks.encoder, codebooks.exact_lookup)
    stats = stats_shape(mu.shape, block)
    if not per_element:
        blocked, inside = split(nu, block)
        mean = jnp.mean(blocked, axis=inside)
        # A mean lies between the extremes; where a block's numbers are equal, so that it is theirs.
        nu = jnp.clip(mean, jnp.min(blocked, axis=inside), jnp.max(blocked, axis=inside))
        nu = nu.reshape(stats)
    return Moments(codes.reshape(mu.shape), scale.reshape(stats), nu)
