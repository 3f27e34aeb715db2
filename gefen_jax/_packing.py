"""How the codes of a pair of elements lie in bytes: the one difference between two kinds of leaf.

Both have four bits of every first moment in the low half of its element's byte, and per block a
scale and an exponent. What the high halves hold is a second moment's code of eight bits:

- `SHARED`, 1 byte per element: the pair's, four of its bits in either byte;
- `OWN`, 1.5 bytes: of every element its own, the upper four bits. The lower ones of both elements
  share a third byte, which takes the exponents' place in the state; those are the lower bytes of
  the scales' words.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from gefen_jax._blocks import Shape, split, split_stats, spread, stats_shape
from gefen_jax._pairs import as_pairs, half_of, halves
from gefen_jax._types import Moments

_EXPONENT = 0xFF  # the bits of a scale's word that are the block's exponent
_SLACK = 16  # units in the last place of a float32 that rounding a scale up takes for none


class Codes(NamedTuple):
    """What the state of blocks says; ``mu`` and ``nu`` of the two halves, or one ``nu`` of both."""

    mu: tuple[UInt8[Array, "..."], ...]  # in their low halves; the high ones are not cleared
    nu: tuple[UInt8[Array, "..."], ...]
    scale: Float[Array, "..."]  # per block
    exponent: UInt8[Array, "..."]


@runtime_checkable
class Packing(Protocol):
    """A way to keep codes in a leaf's state. In `Moments` of blocks, mu are halves."""

    smallest_run: int  # of the paired axis

    def init(self, shape: Shape, block: Shape) -> Moments:
        """The state in which all is 0."""
        ...

    def rounded(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale that will be read, not below this one but for rounding."""
        ...

    def average(self, x: tuple[Array, Array]) -> tuple[Array, ...]:
        """What second moments are made of, of squares or others."""
        ...

    def pack(self, codes: Codes) -> Moments:
        """The state of blocks; codes of mu are below 16."""
        ...

    def unpack(self, state: Moments) -> Codes:
        """The inverse."""
        ...

    def in_blocks(self, state: Moments, shape: Shape, block: Shape) -> Moments:
        """A leaf's state, all but its mu in blocks, as `gefen_jax._blocks.split` lays them out."""
        ...

    def unpack_elements(
        self, state: Moments, block: Shape
    ) -> tuple[UInt8[Array, "*shape"], Array, Array]:
        """Of every element the code of nu, the scale and the exponent; elementwise expressions."""
        ...


class _Shared:
    smallest_run = 2

    def init(self, shape: Shape, block: Shape) -> Moments:
        stats = stats_shape(shape, block)
        codes = jnp.zeros(shape, jnp.uint8)
        return Moments(codes, jnp.zeros(stats, jnp.float32), jnp.zeros(stats, jnp.uint8))

    def rounded(self, scale: Array) -> Array:
        return scale

    def average(self, x: tuple[Array, Array]) -> tuple[Array, ...]:
        return (0.5 * (x[0] + x[1]),)

    def pack(self, codes: Codes) -> Moments:
        (first, second), (nu,) = codes.mu, codes.nu
        return Moments((first | (nu & 0xF0), second | (nu << 4)), codes.scale, codes.exponent)

    def unpack(self, state: Moments) -> Codes:
        return Codes(state.mu, (_nu_of_pair(*state.mu),), state.scale, state.nu)

    def in_blocks(self, state: Moments, shape: Shape, block: Shape) -> Moments:
        scale, exponent = (split_stats(x, shape, block) for x in (state.scale, state.nu))
        return state._replace(scale=scale, nu=exponent)

    def unpack_elements(self, state: Moments, block: Shape) -> tuple[Array, Array, Array]:
        shape = state.mu.shape
        # Repeated along the axis of halves: one elementwise expression, where two halves put
        # together would be stored.
        pairs, axis = as_pairs(state.mu, block)
        code = jnp.broadcast_to(_nu_of_pair(*halves(pairs, axis)), pairs.shape).reshape(shape)
        return code, spread(state.scale, shape, block), spread(state.nu, shape, block)


def _nu_of_pair(first: UInt8[Array, "..."], second: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
    return (first & 0xF0) | (second >> 4)


class _Own:
    smallest_run = 4  # of two, there would be as many pairs as blocks

    def init(self, shape: Shape, block: Shape) -> Moments:
        words = jnp.zeros(stats_shape(shape, block), jnp.uint32)
        low = jnp.zeros(half_of(shape, block), jnp.uint8)
        return Moments(jnp.zeros(shape, jnp.uint8), words, low)

    def rounded(self, scale: Array) -> Array:
        # So that a state that was read, and written again, is the same.
        word = jax.lax.bitcast_convert_type(scale, jnp.uint32) + np.uint32(_EXPONENT - _SLACK)
        return _scale(word)

    def average(self, x: tuple[Array, Array]) -> tuple[Array, ...]:
        return x

    def pack(self, codes: Codes) -> Moments:
        (first, second), (nu1, nu2) = codes.mu, codes.nu
        word = jax.lax.bitcast_convert_type(codes.scale, jnp.uint32)
        low = (nu1 & 15) | (nu2 << 4)
        mu = first | (nu1 & 0xF0), second | (nu2 & 0xF0)
        return Moments(mu, word | codes.exponent.astype(jnp.uint32), low)

    def unpack(self, state: Moments) -> Codes:
        first, second = state.mu
        nu = (first & 0xF0) | (state.nu & 15), (second & 0xF0) | (state.nu >> 4)
        return Codes(state.mu, nu, _scale(state.scale), _exponent(state.scale))

    def in_blocks(self, state: Moments, shape: Shape, block: Shape) -> Moments:
        low, _ = split(state.nu, half_of(block, block))
        return state._replace(scale=split_stats(state.scale, shape, block), nu=low)

    def unpack_elements(self, state: Moments, block: Shape) -> tuple[Array, Array, Array]:
        shape = state.mu.shape
        pairs, axis = as_pairs(state.mu, block)
        low = jnp.expand_dims(split(state.nu, half_of(block, block))[0], axis)
        half = jax.lax.broadcasted_iota(jnp.uint8, pairs.shape, axis)
        code = (pairs & 0xF0) | ((low >> (4 * half)) & 15)
        word = spread(state.scale, shape, block)
        return code.reshape(shape), _scale(word), _exponent(word)


def _scale(word: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(word & np.uint32(~_EXPONENT & 0xFFFFFFFF), jnp.float32)


def _exponent(word: UInt32[Array, "..."]) -> UInt8[Array, "..."]:
    return (word & np.uint32(_EXPONENT)).astype(jnp.uint8)


SHARED: Packing = _Shared()
OWN: Packing = _Own()
