r"""The first moment alone, in 8 bits, 4 bits or float32.

With c a codebook, per block of a leaf one float32 scale s and per element a code k:

    m <- beta c[k] s + (1 - beta) g
    s <- max_block |m|
    k <- m / s, rounded to an entry of c       (m / 0 counts as 0)

that is the first moment of `gefen_jax._step`, for an optimizer without a second one. The caller
gets m as it was before rounding: only what is remembered is rounded. Of an error the next steps
remember beta, beta^2 and so on: over a run at most beta / (1 - beta) times the largest of them.

8 bits round to the nearest entry: an error of at most s times half the largest gap. With 4 bits
that would be a trap. What lies nearer to an entry than half a gap, decay and gradient must move by
half a gap in one step, or it stays where it is for ever. So 4 bits round to one of the two entries
around m / s, by a fraction (`gefen_jax._dither`): off by up to a gap, but right on average, and
over a few steps.

0 is in every codebook, and rounds to itself: an element that never had a gradient has the momentum
0 exactly.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gefen_jax._blocks import Shape, block_size, read_cut, split, stats_shape, times_stats
from gefen_jax._candidates import block_by_shape
from gefen_jax._constants import SMALL_LEAF
from gefen_jax._dither import dither, positions
from gefen_jax._encoder import Encoder, decode, encode
from gefen_jax._exact import Exact
from gefen_jax._four_bits import group_block, pack, packed_shape, unpack
from gefen_jax._levels import Levels, level, round_to_level
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._types import Kind

BITS = (4, 8, 32)


class Dithered(NamedTuple):
    """What codes of 4 bits are made and read with."""

    levels: Levels
    phase: UInt32[Array, "two"]  # of the leaf at this step


Coder = Encoder | Dithered


class Momentum(NamedTuple):
    """The first moment of one leaf."""

    mu: Any  # uint8 codes, of 4 bits two in a byte; or float32; None for a leaf without state
    scale: Any  # float32 per block; None where mu is no code


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the first moment of one leaf is kept.

    Of a leaf of shape s: 8 bits, ``mu`` uint8[s]; 4 bits, ``mu`` uint8[s with the block's axis
    halved]; ``scale`` float32[s / block], of the leaf's rank. 32 bits: ``mu`` float32[s].

    Args:
      bits: 4, 8 or 32.
      block: The box that shares a scale; None for 32 bits.
    """

    bits: int
    block: Shape | None


def storage_for(kind: Kind, shape: Shape, bits: int, local: Shape | None = None) -> Storage:
    """The storage of a leaf from its kind in the plan and the wanted bits.

    Args:
      kind: The leaf's kind: `Exact` keeps float32, one with a block of its own lends it.
      shape: The leaf's shape.
      bits: 4, 8 or 32.
      local: What a device of the plan's mesh has of the leaf; None for all of it.

    Returns:
      Its `Storage`. 4 bits have groups of 64 along an axis of the block, or smaller ones that fit
      ``local``.

    Examples:
      >>> from gefen_jax import SharedBlocks
      >>> from gefen_jax._momentum import storage_for
      >>> storage_for(SharedBlocks((512, 1)), (512, 512), 8)
      Storage(bits=8, block=(512, 1))
      >>> storage_for(SharedBlocks((512, 1)), (512, 512), 4)
      Storage(bits=4, block=(64, 1))
    """
    block = kind.scale_block
    # A kind without a box (the reference's flat periods) says nothing of this moment's blocks.
    if bits == 32 or isinstance(kind, Exact) or (block is None and block_size(shape) <= SMALL_LEAF):
        return Storage(32, None)
    block = block_by_shape(shape) if block is None else block
    return Storage(bits, block if bits == 8 else group_block(shape, block, local or shape))


def init(shape: Shape, storage: Storage) -> Momentum:
    """The momentum 0 (with a scale of 0, any code is 0)."""
    if storage.block is None:
        return Momentum(jnp.zeros(shape, jnp.float32), None)
    if storage.bits == 4:
        codes = packed_shape(shape, read_cut(shape, storage.block).axis)
    else:
        codes = shape
    scale = jnp.zeros(stats_shape(shape, storage.block), jnp.float32)
    return Momentum(jnp.zeros(codes, jnp.uint8), scale)


def read(
    momentum: Momentum, shape: Shape, storage: Storage, coder: Coder | None
) -> Float[Array, "..."]:
    """The momentum in float32, of the leaf's shape."""
    if storage.block is None or coder is None:
        return momentum.mu
    if isinstance(coder, Dithered):
        codes = unpack(momentum.mu, shape, read_cut(shape, storage.block).axis)
        entries = level(coder.levels, codes)
    else:
        entries = decode(coder, momentum.mu)
    return times_stats(entries, momentum.scale, storage.block)


def _block_max(x: Float[Array, "..."], block: Shape) -> Float[Array, "..."]:
    """The largest magnitude of every block."""
    shape, (axis, _, run) = x.shape, read_cut(x.shape, block)
    short = -shape[axis] % run
    if short:
        x = jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])
    blocked, inside = split(jnp.abs(x), block)
    # XLA's maximum on a CPU passes over NaN. An infinite scale makes the block NaN for good, as a
    # float32 momentum would be.
    blocked = jnp.where(jnp.isnan(blocked), jnp.inf, blocked)
    return jnp.max(blocked, axis=inside).reshape(stats_shape(shape, block))


def _write(m: Float[Array, "..."], storage: Storage, coder: Coder, exact_lookup: bool) -> Momentum:
    """A momentum that codes and scales can stand for."""
    assert storage.block is not None
    scale = _block_max(m, storage.block)
    x = times_stats(m, 1 / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), storage.block)
    if isinstance(coder, Dithered):
        # The second fraction, as for the first moment in `gefen_jax._dual_step`.
        _, fraction = dither(coder.phase, positions(m.shape))
        codes = round_to_level(coder.levels, x, fraction)
        codes = pack(codes, read_cut(m.shape, storage.block).axis)
    else:
        codes = encode(coder, x, exact_lookup=exact_lookup)
    return Momentum(codes, scale)


def advance(
    g: Float[Array, "..."],
    momentum: Momentum,
    beta: Any,
    one_minus_beta: Any,
    storage: Storage,
    coder: Coder | None,
    *,
    exact_lookup: bool,
) -> tuple[Float[Array, "..."], Momentum]:
    r"""Takes a gradient into the momentum.

    .. math::
      m_t = \beta\, c[k_{t-1}] s_{t-1} + (1 - \beta) g_t, \quad
      s_t = \max_{block} |m_t|, \quad k_t = \mathrm{round}_c(m_t / s_t)

    Args:
      g: The gradient, float32.
      momentum: The momentum so far.
      beta: Its decay rate.
      one_minus_beta: 1 - beta, subtracted in float64 where beta is a plain number.
      storage: How the leaf is kept.
      coder: Of the codebook, and for 4 bits of this step; None if nothing is coded.
      exact_lookup: What `gefen_jax._encoder.lookup_is_exact` says of a codebook of 8 bits.

    Returns:
      m_t in float32, not rounded to codes, and the new momentum.

    Raises:
      NotImplementedError: When a coded momentum is differentiated.

    Examples:
      >>> from gefen_jax._encoder import make_encoder
      >>> from gefen_jax._builtin import builtin_codebook
      >>> storage, encoder = Storage(8, (1, 64)), make_encoder(jnp.asarray(builtin_codebook()))
      >>> g = jnp.linspace(-2, 2, 128).reshape(1, 128)
      >>> old = init((1, 128), storage)
      >>> m, new = advance(g, old, 0.5, 0.5, storage, encoder, exact_lookup=True)
      >>> error = jnp.abs(m - read(new, (1, 128), storage, encoder)).max()
      >>> print(new.mu.shape, new.scale, bool(error < 0.015))
      (1, 128) [[1. 1.]] True

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026
    """
    if storage.block is not None:
        g, momentum = not_differentiable((g, momentum), _NO_DERIVATIVE)
    # The order of `optax.tree.update_moment`, so that 32 bits are optax.contrib.muon.
    m = one_minus_beta * g + beta * read(momentum, g.shape, storage, coder)
    if storage.block is None or coder is None:
        return m, Momentum(m, None)
    return m, _write(m, storage, coder, exact_lookup)


_NO_DERIVATIVE = (
    "a quantised momentum has no useful derivative: the update cannot be differentiated with"
    " respect to gradients or state. Use `bits=32` where you need it."
)
