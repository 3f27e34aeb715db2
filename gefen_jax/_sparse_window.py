"""The step of a leaf of MicroAdam: sparse gradients in a window, and what they left out in 4 bits.

A leaf is cut into n blocks of B elements, at most 2^15 of them, so that an index has two bytes; the
last block is padded by zeros. With e the error and k the share of a block that is kept, at step t:

    a      = g + e
    I, V   = the k largest |a| of every block, their places and their values in bfloat16
    window[(t - 1) mod m] = I, V
    e      = a without what was taken, in 4 bits, between the least and the largest of a group
    z1     = sum over the window of b1^age V,    z2 = sum over the window of b2^age V^2
    update = ((1 - b1) z1 / (1 - b1^t)) / (sqrt((1 - b2) z2 / (1 - b2^t)) + eps)

(MicroAdam, arXiv 2405.15593, algorithm 1.) The age of a row counts steps, so the count is part of
the state, and a run resumes with the right ages.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int16, UInt8

from gefen_jax._blocks import Shape
from gefen_jax._four_bits import pack, unpack
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._types import Decay

_MAX_BLOCK = 1 << 15
GROUP = 64  # elements of the error between one pair of bounds: 4 bytes for 64 elements
_STEPS = 15  # of the codes of 4 bits
# Blocks that are worked on at once: their float32 intermediates are temporaries.
_AT_ONCE = 16


class Geometry(NamedTuple):
    """How a leaf is cut."""

    size: int  # elements of the leaf
    blocks: int
    block: int  # elements of a block, a multiple of GROUP
    kept: int  # of them
    window: int  # steps


class Sparse(NamedTuple):
    """The state of a leaf."""

    error: UInt8[Array, "blocks half"]
    low: BFloat16[Array, "blocks groups"]
    high: BFloat16[Array, "blocks groups"]
    place: Int16[Array, "blocks window kept"]
    value: BFloat16[Array, "blocks window kept"]


class Scalars(NamedTuple):
    """What a step needs beside the leaf; t is the number of this step, from 1."""

    eps: Any
    row: Int[Array, ""]  # of the window, that this step writes
    weight1: Float[Array, "window"]  # of every row in z1 and z2, over 1 - b^t
    weight2: Float[Array, "window"]


def geometry(shape: Shape, density: float, window: int) -> Geometry:
    """As few blocks as there can be, of equal size."""
    size = math.prod(shape)
    blocks = -(-size // _MAX_BLOCK)
    block = -(-size // (blocks * GROUP)) * GROUP
    return Geometry(size, blocks, block, max(1, math.ceil(density * block)), window)


def init(cut: Geometry) -> Sparse:
    """No error, and a window without anything in it."""
    bounds = (cut.blocks, cut.block // GROUP)
    rows = (cut.blocks, cut.window, cut.kept)
    return Sparse(
        jnp.zeros((cut.blocks, cut.block // 2), jnp.uint8),
        jnp.zeros(bounds, jnp.bfloat16),
        jnp.zeros(bounds, jnp.bfloat16),
        jnp.zeros(rows, jnp.int16),
        jnp.zeros(rows, jnp.bfloat16),
    )


def scalars(decay: Decay, window: int, count: Int[Array, ""]) -> Scalars:
    """The weights of the window's rows in the step number ``count``."""
    row = (count - 1) % window
    age = ((row - jnp.arange(window, dtype=jnp.int32)) % window).astype(jnp.float32)
    weight1 = jnp.power(decay.b1, age) * (decay.one_minus_b1 / decay.correction1)
    weight2 = jnp.power(decay.b2, age) * (decay.one_minus_b2 / decay.correction2)
    return Scalars(decay.eps, row, weight1, weight2)


def _bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What bfloat16 can hold, in float32: XLA may take a cast and its reverse for the identity."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _read_error(state: Sparse, block: int) -> Float[Array, "blocks block"]:
    codes = unpack(state.error, (state.error.shape[0], block), 1)
    low, high = (x.astype(jnp.float32)[..., None] for x in (state.low, state.high))
    codes = codes.reshape(*low.shape[:2], GROUP).astype(jnp.float32)
    return (low + codes * ((high - low) / _STEPS)).reshape(-1, block)


def _write_error(a: Float[Array, "blocks block"]) -> tuple[Array, Array, Array]:
    """Codes of 4 bits and the bounds between which they lie; NaN stays one, in the bounds."""
    groups = a.reshape(a.shape[0], -1, GROUP)
    low, high = (_bfloat16(f(groups, axis=-1, keepdims=True)) for f in (jnp.min, jnp.max))
    step = (high - low) / _STEPS
    # A group of one value: code 0, which stands for it.
    places = (groups - low) / jnp.where(step == 0, 1, step)
    codes = jnp.floor(jnp.clip(places, 0, _STEPS) + 0.5).astype(jnp.uint8)
    low, high = (x[..., 0].astype(jnp.bfloat16) for x in (low, high))
    return pack(codes.reshape(a.shape), 1), low, high


def _take(a: Float[Array, "block"], kept: int) -> tuple[Array, Array, Array]:
    """The places and values of the largest, and what is left."""
    _, places = jax.lax.top_k(jnp.abs(a), kept)
    return places, a[places], a.at[places].set(0)


def _sums(
    place: Int[Array, "window kept"], value: Float[Array, "window kept"], block: int, s: Scalars
) -> tuple[Array, Array]:
    """z1 and z2, with their corrections."""
    at = place.reshape(-1)
    z = jnp.zeros(block, jnp.float32)
    z1 = z.at[at].add((s.weight1[:, None] * value).reshape(-1))
    return z1, z.at[at].add((s.weight2[:, None] * jnp.square(value)).reshape(-1))


def divided(mu: Float[Array, "*shape"], root: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An update; what has no gradient stays where it is, with eps = 0 too."""
    return mu / jnp.where(root == 0, jnp.inf, root)


def step(
    g: Float[Array, "*shape"], state: Sparse, cut: Geometry, s: Scalars
) -> tuple[Float[Array, "*shape"], Sparse]:
    """The update, float32, and the state after it."""
    g, state = not_differentiable((g, state), _NO_DERIVATIVE)
    flat = jnp.pad(g.astype(jnp.float32).reshape(-1), (0, cut.blocks * cut.block - cut.size))

    def of_block(args: tuple[Array, Sparse]) -> tuple[Array, Sparse]:
        g, old = jax.tree.map(lambda x: x[None], args)
        places, values, left = _take((g + _read_error(old, cut.block))[0], cut.kept)
        error, low, high = (x[0] for x in _write_error(left[None]))
        old = jax.tree.map(lambda x: x[0], old)
        place = old.place.at[s.row].set(places.astype(jnp.int16))
        value = old.value.at[s.row].set(_bfloat16(values).astype(jnp.bfloat16))
        z1, z2 = _sums(place.astype(jnp.int32), value.astype(jnp.float32), cut.block, s)
        return divided(z1, jnp.sqrt(z2) + s.eps), Sparse(error, low, high, place, value)

    blocks = flat.reshape(cut.blocks, cut.block)
    updates, new = jax.lax.map(of_block, (blocks, state), batch_size=_AT_ONCE)
    return updates.reshape(-1)[: cut.size].reshape(g.shape), new


_NO_DERIVATIVE = (
    "a window of the largest gradients has no useful derivative: microadam's update cannot be"
    " differentiated with respect to gradients or state. Use optax.adamw where you need it."
)
