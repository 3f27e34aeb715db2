"""The body of the kernel of a dual code's step: one pass over a leaf.

Its specification is `gefen_jax._dual_step`, in plain jnp, whose docstring has the equations. The
same numbers come out but for rounding; what is computed otherwise, and why:

- The codebook's entries, and the line of each gap, are read by shuffles between lanes. The gap is
  found by four halvings, not by a table of bins.
- Maxima are those of the floats' bits: what is not negative has the order of its bits, NaN comes
  last, and the hardware reduces integers of a warp in one instruction.
- A place plus its fraction is added to 16. Of floats in [16, 32) the integer part is four bits in
  one place, and no float is converted to an integer.

What every language of kernels does in its own way is a `pallas_kernels._program.Program`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels._dual_step_config import DualLayout
from pallas_kernels._program import Program
from pallas_kernels._step import (
    INFINITY,
    TINY,
    Form,
    Move,
    bits_of,
    dither,
    float_of,
    inverse_of,
    leaves,
    read_scalars,
    root_of,
)

LEVELS = 16
_MANTISSA = 23  # bits of a float32's mantissa
_KEPT = 4  # of them in a code of nu; and of a float in [16, 32), the bits of its integer part
_DROPPED = _MANTISSA - _KEPT
_INFINITE = 255  # the biased exponent of inf
_ONE = np.uint32(127 << _MANTISSA)


class Tables(NamedTuple):
    """The codebook, and by gap the line ``offset + slope * x`` of places; so they lie in memory."""

    codebook: Any
    offset: Any
    slope: Any


class _Places(NamedTuple):
    """Indices of a program's elements, and what of them there is."""

    first: Int[Array, "..."]  # of pairs
    second: Int[Array, "..."]
    mask: Bool[Array, "..."]
    block: Int[Array, "..."]
    block_mask: Bool[Array, "..."]


class _Pairs(NamedTuple):
    """Of every pair: the two m and the nu that they share."""

    m1: Float[Array, "..."]
    m2: Float[Array, "..."]
    nu: Float[Array, "..."]


class _Coded(NamedTuple):
    """The new state: the codes of m and of nu, and per block the scale and the exponent."""

    k1: Int[Array, "..."]
    k2: Int[Array, "..."]
    h: Int[Array, "..."]
    scale: Float[Array, "..."]
    exponent: Int[Array, "..."]


def _places(program: Program, layout: DualLayout) -> _Places:
    inside = program.item
    if layout.stretches > 1:
        inside = inside + jax.lax.div(inside, jnp.int32(layout.half)) * layout.half
    first = (program.row * layout.period + inside) * layout.inner + program.column
    mask = (
        (program.row < layout.blocks)
        & (program.item < layout.items)
        & (program.column < layout.inner)
    )
    block = program.block_row * layout.inner + program.block_column
    block_mask = (program.block_row < layout.blocks) & (program.block_column < layout.inner)
    return _Places(first, first + layout.half * layout.inner, mask, block, block_mask)


def _nu_level(exponent: Int[Array, "..."], code: Int[Array, "..."]) -> Float[Array, "..."]:
    return float_of(jnp.maximum((exponent << _KEPT) + code - 255, 0) << _DROPPED)


def _round_nu(
    nu: Float[Array, "..."], fraction: UInt32[Array, "..."], program: Program
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """The blocks' exponents and the pairs' codes."""
    bits = bits_of(nu)
    # Shifts of unsigned integers, which the sums of a NaN's bits need.
    largest = program.largest(bits).astype(jnp.uint32)
    exponent = ((largest + np.uint32((1 << _MANTISSA) - 1)) >> _MANTISSA).astype(jnp.int32)
    exponent = jnp.minimum(exponent, _INFINITE)
    place = (bits.astype(jnp.uint32) + (fraction >> (32 - _DROPPED))) >> _DROPPED
    code = place.astype(jnp.int32) - (exponent << _KEPT) + 255
    return exponent, jnp.minimum(jnp.maximum(code, 0), 255)


def _round_to_level(
    tables: Tables, x: Float[Array, "..."], fraction: UInt32[Array, "..."], program: Program
) -> Int[Array, "..."]:
    """A code of each x in [-1, 1]; the fraction decides between two."""
    # Divisions of a GPU are approximations: a block's largest may come out beyond 1.
    x = jnp.minimum(jnp.maximum(x, -1), 1)
    gap = jnp.zeros(x.shape, jnp.int32)
    for bit in (8, 4, 2, 1):
        higher = gap | bit
        gap = jnp.where(x >= program.lookup(tables.codebook, higher), higher, gap)
    place = program.lookup(tables.offset, gap) + program.lookup(tables.slope, gap) * x
    # 19 bits of the fraction: 16 + 15 + 1 - 2^-19 is a float32, so no entry rounds up.
    one_and_fraction = float_of(((fraction >> 13) << 4) | _ONE)
    return (bits_of(place + (15 + one_and_fraction)) >> _DROPPED) & (LEVELS - 1)


def _code(
    pairs: _Pairs,
    fractions: tuple[Array, Array, Array],
    tables: Tables,
    program: Program,
) -> _Coded:
    """The new state; the fractions round nu and each m."""
    exponent, h = _round_nu(pairs.nu, fractions[0], program)
    root = jnp.sqrt(_nu_level(exponent, h))
    inverse = 1 / jnp.where(root == 0, jnp.inf, root)
    x1, x2 = pairs.m1 * inverse, pairs.m2 * inverse
    largest = program.largest(jnp.maximum(bits_of(jnp.abs(x1)), bits_of(jnp.abs(x2))))
    # NaN becomes inf: an infinite scale makes the block's updates NaN.
    scale = float_of(jnp.minimum(largest, INFINITY))
    inverse = 1 / jnp.maximum(scale, TINY)
    k1, k2 = (
        _round_to_level(tables, x * inverse, fraction, program)
        for x, fraction in ((x1, fractions[1]), (x2, fractions[2]))
    )
    return _Coded(k1, k2, h, scale, exponent)


def dual_step_body(
    inputs: Sequence[Any],
    old: Sequence[Any],
    new: Sequence[Any],
    program: Program,
    layout: DualLayout,
    form: Form,
) -> None:
    """What a program does: see `pallas_kernels._step.Call`. Leaves are [blocks * period * inner].

    Inputs: scalars, the words of the leaf and of the step, tables, g. Of either words the first is
    for the moments, the next for the weight if a fraction rounds it; the leaf's last is its
    position.
    """
    scalars_ref, leaf_ref, step_ref, tables_ref, g_ref = inputs
    old_refs, new_refs = leaves(old, new, form)
    places = _places(program, layout)
    at, mask = (places.first, places.second), places.mask
    scalars = read_scalars(scalars_ref)
    tables = Tables(*(program.table(tables_ref, i) for i in range(3)))
    load, lookup = program.load, program.lookup

    g = [load(g_ref, x, mask).astype(jnp.float32) for x in at]
    g = [x * scalars["gradient_factor"] for x in g]
    codes = [load(old_refs.mu, x, mask).astype(jnp.int32) for x in at]
    scale = program.load_of_blocks(old_refs.scale, places.block, places.block_mask)
    exponent = program.load_of_blocks(old_refs.nu, places.block, places.block_mask)
    exponent = exponent.astype(jnp.int32)

    nu = _nu_level(exponent, (codes[0] & 0xF0) | (codes[1] >> 4))
    if program.padded:
        # A code of 0 stands for -1 times the scale: what pads a block must not be its maximum.
        nu = jnp.where(mask, nu, 0)
    unit = scale * jnp.sqrt(nu)
    m1, m2 = (lookup(tables.codebook, code & 15) * unit for code in codes)
    m1 = m1 + scalars["one_minus_b1"] * (g[0] - m1)
    m2 = m2 + scalars["one_minus_b1"] * (g[1] - m2)
    square = 0.5 * (g[0] * g[0] + g[1] * g[1])
    nu = scalars["b2"] * nu + scalars["one_minus_b2"] * square

    start = leaf_ref[2 if form.stochastic else 1]
    words = leaf_ref[0], step_ref[0], start
    (nu_fraction, fraction1), (_, fraction2) = (dither(words, x, layout) for x in at)
    fractions = nu_fraction, fraction1, fraction2
    coded = _code(_Pairs(m1, m2, nu), fractions, tables, program)
    program.store(new_refs.mu, at[0], (coded.h & 0xF0) | coded.k1, mask)
    program.store(new_refs.mu, at[1], ((coded.h & 15) << 4) | coded.k2, mask)
    for ref, value in ((new_refs.scale, coded.scale), (new_refs.nu, coded.exponent)):
        program.store_of_blocks(ref, places.block, value, places.block_mask)

    nu = _nu_level(coded.exponent, coded.h)
    unit = coded.scale * jnp.sqrt(nu) * scalars["m_factor"]
    inverse = inverse_of(root_of(nu, scalars))
    # Before the product with a codebook's entry: of a nu that overflowed, inf * 0 is NaN.
    rate = unit * inverse
    words = (leaf_ref[1], step_ref[1], start) if form.stochastic else None
    move = Move(old_refs, new_refs, scalars, words, program, layout, form)
    for x, k, gradient in zip(at, (coded.k1, coded.k2), g, strict=True):
        out = lookup(tables.codebook, k) * rate
        if form.nesterov:
            out = out + gradient * scalars["g_factor"] * inverse
        move(x, mask, out)
