"""The histogram that the codebook is learned from: gradients divided by their block's largest."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from gefen_jax._blocks import Shape, equal_parts, flat_view, read_cut
from gefen_jax._constants import HISTOGRAM_BINS
from gefen_jax._pieces import Piece, over_pieces
from gefen_jax._replicated import replicated

# Elements per piece: bins and weights of a piece are its only temporaries.
_CHUNK = 1 << 20


def _count(g: Float[Array, "*shape"], block: Shape) -> UInt32[Array, "bins"]:
    axis = read_cut(g.shape, block).axis
    counts = jnp.zeros(HISTOGRAM_BINS, jnp.uint32)
    for low, high, part_block in equal_parts(g.shape, block):
        counts += _count_equal(jax.lax.slice_in_dim(g, low, high, axis=axis), part_block)
    return counts


def _count_equal(g: Float[Array, "*shape"], block: Shape) -> UInt32[Array, "bins"]:
    view = flat_view(g.shape, block)
    flat = g.reshape(view.shape)

    def body(piece: Piece, counts: UInt32[Array, "bins"]) -> UInt32[Array, "bins"]:
        x = piece.read(flat).astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        x = x / jnp.where(largest == 0, 1, largest)
        bins = jnp.clip((x + 1) * (HISTOGRAM_BINS // 2), 0, HISTOGRAM_BINS - 1).astype(jnp.int32)
        return counts.at[bins].add(((x != 0) & piece.is_new).astype(jnp.uint32))

    return over_pieces(view, body, jnp.zeros(HISTOGRAM_BINS, jnp.uint32), _CHUNK)


def count_normalised(g: Float[Array, "*shape"], block: Shape) -> Int[np.ndarray, "bins"]:
    """Counts g / max_block |g| in 4096 equal bins on [-1, 1].

    Elements that are exactly 0 do not count: with a fixed code for 0 they have nothing to say.

    Args:
      g: A gradient of fewer than 2**32 elements.
      block: The elements that share one momentum scale.

    Returns:
      The counts, int64 (float32 sums would lose ones beyond 2**24).
    """
    return replicated(_count, g, block=block).astype(np.int64)


def count_reference(g: Float[np.ndarray, "n"], period: int) -> Int[np.ndarray, "bins"]:
    """The reference's counts, over flat periods, on the host: zeros count, in bin 2048.

    NumPy, because XLA's float32 division may be off by one ulp, which moves an element now and
    then to the next bin and with it entries of the codebook.
    """
    blocks = g.astype(np.float32).reshape(-1, period)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    x = blocks / np.where(largest == 0, np.float32(1), largest)
    bins = np.floor((x + np.float32(1)) * np.float32(HISTOGRAM_BINS // 2)).astype(np.int64)
    return np.bincount(np.clip(bins, 0, HISTOGRAM_BINS - 1).ravel(), minlength=HISTOGRAM_BINS)
