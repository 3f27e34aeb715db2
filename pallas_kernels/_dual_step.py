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

from pallas_kernels._dual_step_config import DualLayout, DualStepConfig
from pallas_kernels._program import Program
from pallas_kernels._split_weight import merge, split

LEVELS = 16
_MANTISSA = 23  # bits of a float32's mantissa
_KEPT = 4  # of them in a code of nu; and of a float in [16, 32), the bits of its integer part
_DROPPED = _MANTISSA - _KEPT
_INFINITE = 255  # the biased exponent of inf
_INFINITY = _INFINITE << _MANTISSA
_ONE = np.uint32(127 << _MANTISSA)
_TINY = np.float32(2.0**-126)
_MIX1, _MIX2, _MIX3 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x9C8F2D35)

# What `scalars_ref` holds, in this order.
SCALARS = (
    "gradient_factor",
    "one_minus_b1",
    "b2",
    "one_minus_b2",
    "eps",
    "eps_root",
    "inverse_correction2",
    "m_factor",  # of m in the numerator of the update
    "g_factor",  # of the gradient there; 0 but for nesterov
    "learning_rate",
    "weight_decay",
)


class Form(NamedTuple):
    """What is compiled in."""

    fused: bool  # writes the new parameter, not the update
    nesterov: bool
    bits: int | None  # of a parameter that is a split weight
    stochastic: bool  # a fraction rounds it

    @property
    def name(self) -> str:
        """Of the kernel."""
        return "gefen_dual_step_fused" if self.fused else "gefen_dual_step"


class Call(NamedTuple):
    """What a launch gets: one step of a leaf."""

    layout: DualLayout
    config: DualStepConfig
    form: Form
    inputs: list[Array]  # scalars, phase, tables, g
    written: list[Array]  # in place: a `_Leaf`'s fields, without the parameter if it is not fused
    out: list[jax.ShapeDtypeStruct]  # the update, if it is not fused; the first of what is new
    interpret: Any  # see `dual_step`


class Tables(NamedTuple):
    """The codebook, and by gap the line ``offset + slope * x`` of places; so they lie in memory."""

    codebook: Any
    offset: Any
    slope: Any


class _Leaf(NamedTuple):
    """Refs of what a step reads, or of what it writes."""

    param: Any  # written without having been read, it is the update
    codes: Any
    scale: Any
    exponent: Any
    correction: Any = None  # of a split weight of more than 16 bits


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


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Int[Array, "..."] | UInt32[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _places(program: Program, layout: DualLayout) -> _Places:
    inside = program.pair
    if layout.stretches > 1:
        inside = inside + jax.lax.div(inside, jnp.int32(layout.half)) * layout.half
    first = (program.row * layout.period + inside) * layout.inner + program.column
    mask = (
        (program.row < layout.blocks)
        & (program.pair < layout.pairs)
        & (program.column < layout.inner)
    )
    block = program.block_row * layout.inner + program.block_column
    block_mask = (program.block_row < layout.blocks) & (program.block_column < layout.inner)
    return _Places(first, first + layout.half * layout.inner, mask, block, block_mask)


def _position(index: Int[Array, "..."], layout: DualLayout) -> UInt32[Array, "..."]:
    """Where elements lie in the whole leaf."""
    position, strides = np.uint32(0), tuple(map(np.uint32, layout.strides))
    for size, stride in zip(layout.faster, strides, strict=False):
        here = jax.lax.rem(index, jnp.int32(size)).astype(jnp.uint32)
        position, index = position + here * stride, jax.lax.div(index, jnp.int32(size))
    return position + index.astype(jnp.uint32) * strides[-1]


def _dither(
    words: tuple[Array, Array, Array], at: Int[Array, "..."], layout: DualLayout
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The two fractions of the elements there, in units of 2^-32."""
    word = (words[2] + _position(at, layout)) ^ words[0]
    word = (word ^ (word >> 16)) * _MIX1
    word = (word ^ (word >> 15)) * _MIX2
    return word + words[1], (word ^ (word >> 16)) * _MIX3 + words[1]


def _nu_level(exponent: Int[Array, "..."], code: Int[Array, "..."]) -> Float[Array, "..."]:
    return _float(jnp.maximum((exponent << _KEPT) + code - 255, 0) << _DROPPED)


def _round_nu(
    nu: Float[Array, "..."], fraction: UInt32[Array, "..."], program: Program
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """The blocks' exponents and the pairs' codes."""
    bits = _bits(nu)
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
    one_and_fraction = _float(((fraction >> 13) << 4) | _ONE)
    return (_bits(place + (15 + one_and_fraction)) >> _DROPPED) & (LEVELS - 1)


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
    largest = program.largest(jnp.maximum(_bits(jnp.abs(x1)), _bits(jnp.abs(x2))))
    # NaN becomes inf: an infinite scale makes the block's updates NaN.
    scale = _float(jnp.minimum(largest, _INFINITY))
    inverse = 1 / jnp.maximum(scale, _TINY)
    k1, k2 = (
        _round_to_level(tables, x * inverse, fraction, program)
        for x, fraction in ((x1, fractions[1]), (x2, fractions[2]))
    )
    return _Coded(k1, k2, h, scale, exponent)


def _load_param(
    refs: _Leaf, at: Any, mask: Array, form: Form, program: Program
) -> Float[Array, "..."]:
    param = program.load(refs.param, at, mask)
    if form.bits is None:
        return param.astype(jnp.float32)
    correction = None if refs.correction is None else program.load(refs.correction, at, mask)
    return merge(param, correction)


def _store_param(
    refs: _Leaf,
    at: Any,
    mask: Array,
    out: Array,
    form: Form,
    fraction: Array | None,
    program: Program,
) -> None:
    low = None
    if form.bits is not None:
        out, low = split(out, form.bits, refs.param.dtype, fraction)
    program.store(refs.param, at, out, mask)
    if low is not None:
        program.store(refs.correction, at, low, mask)


def dual_step_body(
    inputs: Sequence[Any],
    old: Sequence[Any],
    new: Sequence[Any],
    program: Program,
    layout: DualLayout,
    form: Form,
) -> None:
    """What a program does. Refs have one axis: leaves [blocks * period * inner], row-major.

    Inputs: scalars, phase, tables, g. Old: those fields of a `_Leaf` that are read. New: those
    that are written, which may lie in place. The words of the phase are two for the moments, the
    leaf's position, and two for the weight if a fraction rounds it.
    """
    scalars_ref, phase_ref, tables_ref, g_ref = inputs
    old_refs, new_refs = _Leaf(*([] if form.fused else [None]), *old), _Leaf(*new)
    places = _places(program, layout)
    at, mask = (places.first, places.second), places.mask
    scalars = {name: scalars_ref[i] for i, name in enumerate(SCALARS)}
    tables = Tables(*(program.table(tables_ref, i) for i in range(3)))
    load, lookup = program.load, program.lookup

    g = [load(g_ref, x, mask).astype(jnp.float32) for x in at]
    g = [x * scalars["gradient_factor"] for x in g]
    codes = [load(old_refs.codes, x, mask).astype(jnp.int32) for x in at]
    scale = program.load_of_blocks(old_refs.scale, places.block, places.block_mask)
    exponent = program.load_of_blocks(old_refs.exponent, places.block, places.block_mask)
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

    words, start = (phase_ref[0], phase_ref[1], phase_ref[2]), phase_ref[2]
    (nu_fraction, fraction1), (_, fraction2) = (_dither(words, x, layout) for x in at)
    fractions = nu_fraction, fraction1, fraction2
    coded = _code(_Pairs(m1, m2, nu), fractions, tables, program)
    program.store(new_refs.codes, at[0], (coded.h & 0xF0) | coded.k1, mask)
    program.store(new_refs.codes, at[1], ((coded.h & 15) << 4) | coded.k2, mask)
    for ref, value in ((new_refs.scale, coded.scale), (new_refs.exponent, coded.exponent)):
        program.store_of_blocks(ref, places.block, value, places.block_mask)

    nu = _nu_level(coded.exponent, coded.h)
    unit = coded.scale * jnp.sqrt(nu) * scalars["m_factor"]
    root = jnp.sqrt(nu * scalars["inverse_correction2"] + scalars["eps_root"]) + scalars["eps"]
    # An element that never saw a gradient stays where it is, with eps = 0 too.
    inverse = 1 / jnp.where(root == 0, jnp.inf, root)
    # Before the product with a codebook's entry: of a nu that overflowed, inf * 0 is NaN.
    rate = unit * inverse
    for x, k, gradient in zip(at, (coded.k1, coded.k2), g, strict=True):
        out = lookup(tables.codebook, k) * rate
        if form.nesterov:
            out = out + gradient * scalars["g_factor"] * inverse
        if form.fused:
            theta = _load_param(old_refs, x, mask, form, program)
            change = scalars["learning_rate"] * (out + scalars["weight_decay"] * theta)
            # Not theta - 0, which is no identity for -0, nor where subnormals are flushed.
            out = jnp.where(change == 0, theta, theta - change)
        fraction = None
        if form.stochastic:
            fraction, _ = _dither((phase_ref[3], phase_ref[4], start), x, layout)
        _store_param(new_refs, x, mask, out, form, fraction, program)
