"""The kernel of `pallas_kernels._dual_step` once more, in the Triton language, for `jax_triton`.

JAX deprecates the Triton dialect of Pallas, and sends its users there. Names, order and numbers are
those of that module, where the reasons are. Only `_lookup` is
not plain Triton: it is assembly, for the same reason as there.

Importing this module imports Triton: `pallas_kernels._jax_triton_launch` does when it is called.
"""

# Triton's language has Python's syntax, but not its types; and it is an extra.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton.language as tl

from pallas_kernels._dual_step import LEVELS
from pallas_kernels._jax_triton_common import (
    dither,
    float_of,
    inverse_of,
    jit,
    move,
    position_of,
    read_scalars,
    root_of,
)
from pallas_kernels._triton import LANES, lookup_assembly

_ENTRIES = tl.constexpr(LANES)
_LAST = tl.constexpr(LEVELS - 1)
_ASSEMBLY = tl.constexpr(lookup_assembly())
_CONSTRAINTS = tl.constexpr("=f,r" + ",f" * LANES)
_ONE = tl.constexpr(127 << 23)
_INFINITE = tl.constexpr(255)  # the biased exponent of inf
_TINY = tl.constexpr(2.0**-126)


@jit
def _read(tables_ptr, table: tl.constexpr):
    """A table for `_lookup`."""
    entries = ()
    for i in tl.static_range(_ENTRIES):
        entries += (tl.load(tables_ptr + table * _ENTRIES + i),)
    return entries


@jit
def _lookup(table, index):
    """Entries of a table at indices from 0 to 15: see `pallas_kernels._triton.lookup`."""
    return tl.inline_asm_elementwise(
        _ASSEMBLY, _CONSTRAINTS, (index,) + table, dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def _nu_level(exponent, code):
    return float_of(tl.maximum((exponent << 4) + code - 255, 0) << 19)


@jit
def _round_nu(nu, fraction):
    """The blocks' exponents and the pairs' codes."""
    bits = nu.to(tl.uint32, bitcast=True)
    largest = tl.max(bits.to(tl.int32), axis=1, keep_dims=True).to(tl.uint32)
    exponent = tl.minimum(((largest + 0x7FFFFF) >> 23).to(tl.int32), _INFINITE)
    place = ((bits + (fraction >> 13)) >> 19).to(tl.int32)
    return exponent, tl.minimum(tl.maximum(place - (exponent << 4) + 255, 0), 255)


@jit
def _round_to_level(codebook, offset, slope, x, fraction):
    """A code of each x in [-1, 1]; the fraction decides between two."""
    # Divisions of a GPU are approximations: a block's largest may come out beyond 1.
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    gap = tl.full(x.shape, 0, tl.int32)
    for i in tl.static_range(4):
        higher = gap | (8 >> i)
        gap = tl.where(x >= _lookup(codebook, higher), higher, gap)
    place = _lookup(offset, gap) + _lookup(slope, gap) * x
    one_and_fraction = float_of(((fraction >> 13) << 4) | _ONE)
    return ((place + (15 + one_and_fraction)).to(tl.int32, bitcast=True) >> 19) & _LAST


@jit
def _code(codebook, offset, slope, m1, m2, nu, nu_fraction, fraction1, fraction2):
    """The new state: codes of m and of nu, and per block the scale and the exponent."""
    exponent, h = _round_nu(nu, nu_fraction)
    root = tl.sqrt(_nu_level(exponent, h))
    inverse = 1 / tl.where(root == 0, float("inf"), root)
    x1, x2 = m1 * inverse, m2 * inverse
    bits1 = tl.abs(x1).to(tl.int32, bitcast=True)
    bits2 = tl.abs(x2).to(tl.int32, bitcast=True)
    largest = tl.max(tl.maximum(bits1, bits2), axis=1, keep_dims=True)
    scale = float_of(tl.minimum(largest, _INFINITE << 23))
    inverse = 1 / tl.maximum(scale, _TINY)
    k1 = _round_to_level(codebook, offset, slope, x1 * inverse, fraction1)
    k2 = _round_to_level(codebook, offset, slope, x2 * inverse, fraction2)
    return k1, k2, h, scale, exponent


@jit
def dual_step_kernel(
    scalars_ptr,
    leaf_ptr,
    step_ptr,
    tables_ptr,
    g_ptr,
    param_ptr,  # what the update is written to, where there is no parameter
    codes_ptr,
    scale_ptr,
    nu_ptr,
    correction_ptr,
    layout: tl.constexpr,  # blocks, stretches, half, inner
    faster: tl.constexpr,  # of the axes that the leaf has in another one: see `DualLayout`
    strides: tl.constexpr,
    tile: tl.constexpr,  # rows, pairs as a power of two, columns
    fused: tl.constexpr,
    nesterov: tl.constexpr,
    bits: tl.constexpr,
    stochastic: tl.constexpr,
):
    """One step of the blocks of a tile. What is behind the pointers is written in place."""
    blocks: tl.constexpr = layout[0]
    half: tl.constexpr = layout[2]
    inner: tl.constexpr = layout[3]
    pairs: tl.constexpr = layout[1] * half
    across: tl.constexpr = (inner + tile[2] - 1) // tile[2]
    row = tl.program_id(0) // across * tile[0] + tl.arange(0, tile[0])[:, None, None]
    pair = tl.arange(0, tile[1])[None, :, None]
    column = tl.program_id(0) % across * tile[2] + tl.arange(0, tile[2])[None, None, :]
    stats_mask = (row < blocks) & (column < inner)
    mask = stats_mask & (pair < pairs)
    stats = row * inner + column
    # Pairs of a stretch are half a stretch apart; so are stretches, behind the second halves.
    at1 = (row * (2 * pairs) + pair + pair // half * half) * inner + column
    at2 = at1 + half * inner

    codebook, offset, slope = _read(tables_ptr, 0), _read(tables_ptr, 1), _read(tables_ptr, 2)
    (
        gradient_factor,
        one_minus_b1,
        b2,
        one_minus_b2,
        eps,
        eps_root,
        inverse_correction2,
        m_factor,
        g_factor,
        learning_rate,
        weight_decay,
    ) = read_scalars(scalars_ptr)

    g1 = tl.load(g_ptr + at1, mask=mask, other=0).to(tl.float32) * gradient_factor
    g2 = tl.load(g_ptr + at2, mask=mask, other=0).to(tl.float32) * gradient_factor
    old1 = tl.load(codes_ptr + at1, mask=mask, other=0).to(tl.int32)
    old2 = tl.load(codes_ptr + at2, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + stats, mask=stats_mask, other=0)
    exponent = tl.load(nu_ptr + stats, mask=stats_mask, other=0).to(tl.int32)

    nu = _nu_level(exponent, (old1 & 0xF0) | (old2 >> 4))
    if pairs != tile[1]:
        # A code of 0 stands for -1 times the scale: what pads a block must not be its maximum.
        nu = tl.where(mask, nu, 0)
    unit = scale * tl.sqrt(nu)
    m1 = _lookup(codebook, old1 & 15) * unit
    m2 = _lookup(codebook, old2 & 15) * unit
    m1 = m1 + one_minus_b1 * (g1 - m1)
    m2 = m2 + one_minus_b1 * (g2 - m2)
    nu = b2 * nu + one_minus_b2 * (0.5 * (g1 * g1 + g2 * g2))

    start = tl.load(leaf_ptr + (2 if stochastic else 1))
    word0, word1 = tl.load(leaf_ptr), tl.load(step_ptr)
    position1 = position_of(start, at1, faster, strides)
    position2 = position_of(start, at2, faster, strides)
    nu_fraction, fraction1 = dither(word0, word1, position1)
    _, fraction2 = dither(word0, word1, position2)
    k1, k2, h, scale, exponent = _code(
        codebook, offset, slope, m1, m2, nu, nu_fraction, fraction1, fraction2
    )
    tl.store(codes_ptr + at1, ((h & 0xF0) | k1).to(tl.uint8), mask=mask)
    tl.store(codes_ptr + at2, (((h & 15) << 4) | k2).to(tl.uint8), mask=mask)
    tl.store(scale_ptr + stats, scale, mask=stats_mask)
    tl.store(nu_ptr + stats, exponent.to(tl.uint8), mask=stats_mask)

    nu = _nu_level(exponent, h)
    inverse = inverse_of(root_of(nu, inverse_correction2, eps_root, eps))
    # Before the product with a codebook's entry: of a nu that overflowed, inf * 0 is NaN.
    rate = scale * tl.sqrt(nu) * m_factor * inverse
    for i in tl.static_range(2):
        at, position, k, g = (at1, position1, k1, g1) if i == 0 else (at2, position2, k2, g2)
        out = _lookup(codebook, k) * rate
        if nesterov:
            out = out + g * g_factor * inverse
        args = (at, position, mask, out, learning_rate, weight_decay)
        move(param_ptr, correction_ptr, leaf_ptr + 1, step_ptr + 1, *args, fused, bits, stochastic)
