"""The kernel of `pallas_kernels._dual_step` once more, in the Triton language, for `jax_triton`.

JAX deprecates the Triton dialect of Pallas, and sends its users there. Names, order and numbers are
those of that module and of `pallas_kernels._split_weight`, where the reasons are. Only `_lookup` is
not plain Triton: it is assembly, for the same reason as there.

Importing this module imports Triton: `pallas_kernels._jax_triton_launch` does when it is called.
"""

# Triton's language has Python's syntax, but not its types; and it is an extra.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import inspect
from typing import Any

import triton
import triton.language as tl

from pallas_kernels._dual_step import LEVELS
from pallas_kernels._triton import LANES, lookup_assembly

_ENTRIES = tl.constexpr(LANES)
_LAST = tl.constexpr(LEVELS - 1)
_ASSEMBLY = tl.constexpr(lookup_assembly())
_CONSTRAINTS = tl.constexpr("=f,r" + ",f" * LANES)
_SIGN = tl.constexpr(-(1 << 31))
_NAN = tl.constexpr(0x7FC00000)
_NAN16 = tl.constexpr(0x7E000000)
_INF16 = tl.constexpr(0x7C000000)
_REBASE = tl.constexpr(112 << 23)
_FIRST_BEYOND = tl.constexpr(143 << 23)
_ONE = tl.constexpr(127 << 23)
_INFINITE = tl.constexpr(255)  # the biased exponent of inf
_TINY = tl.constexpr(2.0**-126)


def _jit(function: Any) -> Any:
    """``triton.jit`` of the function itself, whose source and globals Triton reads."""
    return triton.jit(inspect.unwrap(function))  # a checker of types may have wrapped it


@_jit
def _read(tables_ptr, table: tl.constexpr):
    """A table for `_lookup`."""
    entries = ()
    for i in tl.static_range(_ENTRIES):
        entries += (tl.load(tables_ptr + table * _ENTRIES + i),)
    return entries


@_jit
def _lookup(table, index):
    """Entries of a table at indices from 0 to 15: see `pallas_kernels._triton.lookup`."""
    return tl.inline_asm_elementwise(
        _ASSEMBLY, _CONSTRAINTS, (index,) + table, dtype=tl.float32, is_pure=True, pack=1
    )


@_jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@_jit
def _position(start, index, faster: tl.constexpr, strides: tl.constexpr):
    """Where elements lie in the whole leaf."""
    position = start
    for i in tl.static_range(len(faster)):
        position = position + (index % faster[i]).to(tl.uint32) * strides[i]
        index = index // faster[i]
    return position + index.to(tl.uint32) * strides[len(faster)]


@_jit
def _dither(word0, word1, position):
    """The two fractions of the elements at these positions, in units of 2^-32."""
    word = position ^ word0
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word + word1, (word ^ (word >> 16)) * 0x9C8F2D35 + word1


@_jit
def _nu_level(exponent, code):
    return _float(tl.maximum((exponent << 4) + code - 255, 0) << 19)


@_jit
def _round_nu(nu, fraction):
    """The blocks' exponents and the pairs' codes."""
    bits = nu.to(tl.uint32, bitcast=True)
    largest = tl.max(bits.to(tl.int32), axis=1, keep_dims=True).to(tl.uint32)
    exponent = tl.minimum(((largest + 0x7FFFFF) >> 23).to(tl.int32), _INFINITE)
    place = ((bits + (fraction >> 13)) >> 19).to(tl.int32)
    return exponent, tl.minimum(tl.maximum(place - (exponent << 4) + 255, 0), 255)


@_jit
def _round_to_level(codebook, offset, slope, x, fraction):
    """A code of each x in [-1, 1]; the fraction decides between two."""
    # Divisions of a GPU are approximations: a block's largest may come out beyond 1.
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    gap = tl.full(x.shape, 0, tl.int32)
    for i in tl.static_range(4):
        higher = gap | (8 >> i)
        gap = tl.where(x >= _lookup(codebook, higher), higher, gap)
    place = _lookup(offset, gap) + _lookup(slope, gap) * x
    one_and_fraction = _float(((fraction >> 13) << 4) | _ONE)
    return ((place + (15 + one_and_fraction)).to(tl.int32, bitcast=True) >> 19) & _LAST


@_jit
def _code(codebook, offset, slope, m1, m2, nu, nu_fraction, fraction1, fraction2):
    """The new state: codes of m and of nu, and per block the scale and the exponent."""
    exponent, h = _round_nu(nu, nu_fraction)
    root = tl.sqrt(_nu_level(exponent, h))
    inverse = 1 / tl.where(root == 0, float("inf"), root)
    x1, x2 = m1 * inverse, m2 * inverse
    bits1 = tl.abs(x1).to(tl.int32, bitcast=True)
    bits2 = tl.abs(x2).to(tl.int32, bitcast=True)
    largest = tl.max(tl.maximum(bits1, bits2), axis=1, keep_dims=True)
    scale = _float(tl.minimum(largest, _INFINITE << 23))
    inverse = 1 / tl.maximum(scale, _TINY)
    k1 = _round_to_level(codebook, offset, slope, x1 * inverse, fraction1)
    k2 = _round_to_level(codebook, offset, slope, x2 * inverse, fraction2)
    return k1, k2, h, scale, exponent


@_jit
def _from_float32(theta, dtype: tl.constexpr):
    """A number as an integer, of which the weight is the upper half."""
    b = theta.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        b = tl.where(theta != theta, _NAN, b)
    else:
        size = tl.abs(theta)
        tiny = (size + 2.0**-17).to(tl.int32, bitcast=True) - (110 << 23)
        small = (size * 2.0**40).to(tl.int32)
        magnitude = (tl.minimum(b & ~_SIGN, _FIRST_BEYOND) - _REBASE) << 3
        magnitude = tl.where(size < 2.0**-14, small, magnitude)
        magnitude = tl.where(size < 2.0**-17, tiny, magnitude)
        b = tl.where(theta != theta, _NAN16, magnitude) | (b & _SIGN)
    return b


@_jit
def _to_float32(b, dtype: tl.constexpr):
    """The inverse of `_from_float32`."""
    if dtype == tl.float16:
        magnitude = b & ~_SIGN
        rebase = tl.where(magnitude >= _INF16, 2 * _REBASE, _REBASE)
        fixed = (magnitude.to(tl.float32) * 2.0**-40).to(tl.int32, bitcast=True)
        b = (b & _SIGN) | tl.where(magnitude < 1 << 26, fixed, (magnitude >> 3) + rebase)
    return _float(b)


@_jit
def _load_param(param_ptr, correction_ptr, at, mask, bits: tl.constexpr):
    """The parameter in float32, merged with its correction if it has one."""
    param = tl.load(param_ptr + at, mask=mask, other=0)
    if bits is None:
        theta = param.to(tl.float32)
    else:
        merged = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
        if bits > 16:
            correction = tl.load(correction_ptr + at, mask=mask, other=0)
            merged += correction.to(tl.int32) << (32 - bits)
        theta = _to_float32(merged, param.dtype)
    return theta


@_jit
def _store_param(param_ptr, correction_ptr, at, mask, out, fraction, bits: tl.constexpr):
    """Writes the update or the parameter, split if it has so many bits."""
    if bits is None:
        tl.store(param_ptr + at, out.to(param_ptr.dtype.element_ty), mask=mask)
    else:
        dtype: tl.constexpr = param_ptr.dtype.element_ty
        drop: tl.constexpr = 32 - bits
        keep: tl.constexpr = bits - 16
        t = _from_float32(out, dtype)
        if drop > 0:
            if fraction is None:
                up = (1 << (drop - 1)) - 1 + ((t >> drop) & 1)
            else:
                up = (fraction >> (32 - drop)).to(tl.int32)
            t = (t + up) >> drop
        high = (t + ((1 << keep) >> 1)) >> keep
        tl.store(param_ptr + at, high.to(tl.int16).to(dtype, bitcast=True), mask=mask)
        if keep > 0:
            low = (t - (high << keep)).to(correction_ptr.dtype.element_ty)
            tl.store(correction_ptr + at, low, mask=mask)


@_jit
def dual_step_kernel(
    scalars_ptr,
    phase_ptr,
    tables_ptr,
    g_ptr,
    param_ptr,  # what the update is written to, where there is no parameter
    codes_ptr,
    scale_ptr,
    exponent_ptr,
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
    # In the order of `pallas_kernels._dual_step.SCALARS`.
    gradient_factor = tl.load(scalars_ptr)
    one_minus_b1 = tl.load(scalars_ptr + 1)
    b2 = tl.load(scalars_ptr + 2)
    one_minus_b2 = tl.load(scalars_ptr + 3)
    eps = tl.load(scalars_ptr + 4)
    eps_root = tl.load(scalars_ptr + 5)
    inverse_correction2 = tl.load(scalars_ptr + 6)
    m_factor = tl.load(scalars_ptr + 7)
    g_factor = tl.load(scalars_ptr + 8)
    learning_rate = tl.load(scalars_ptr + 9)
    weight_decay = tl.load(scalars_ptr + 10)

    g1 = tl.load(g_ptr + at1, mask=mask, other=0).to(tl.float32) * gradient_factor
    g2 = tl.load(g_ptr + at2, mask=mask, other=0).to(tl.float32) * gradient_factor
    old1 = tl.load(codes_ptr + at1, mask=mask, other=0).to(tl.int32)
    old2 = tl.load(codes_ptr + at2, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + stats, mask=stats_mask, other=0)
    exponent = tl.load(exponent_ptr + stats, mask=stats_mask, other=0).to(tl.int32)

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

    start = tl.load(phase_ptr + 2)
    word0, word1 = tl.load(phase_ptr), tl.load(phase_ptr + 1)
    position1 = _position(start, at1, faster, strides)
    position2 = _position(start, at2, faster, strides)
    nu_fraction, fraction1 = _dither(word0, word1, position1)
    _, fraction2 = _dither(word0, word1, position2)
    k1, k2, h, scale, exponent = _code(
        codebook, offset, slope, m1, m2, nu, nu_fraction, fraction1, fraction2
    )
    tl.store(codes_ptr + at1, ((h & 0xF0) | k1).to(tl.uint8), mask=mask)
    tl.store(codes_ptr + at2, (((h & 15) << 4) | k2).to(tl.uint8), mask=mask)
    tl.store(scale_ptr + stats, scale, mask=stats_mask)
    tl.store(exponent_ptr + stats, exponent.to(tl.uint8), mask=stats_mask)

    nu = _nu_level(exponent, h)
    root = tl.sqrt(nu * inverse_correction2 + eps_root) + eps
    # An element that never saw a gradient stays where it is, with eps = 0 too.
    inverse = 1 / tl.where(root == 0, float("inf"), root)
    # Before the product with a codebook's entry: of a nu that overflowed, inf * 0 is NaN.
    rate = scale * tl.sqrt(nu) * m_factor * inverse
    for i in tl.static_range(2):
        at, position, k, g = (at1, position1, k1, g1) if i == 0 else (at2, position2, k2, g2)
        out = _lookup(codebook, k) * rate
        if nesterov:
            out = out + g * g_factor * inverse
        if fused:
            theta = _load_param(param_ptr, correction_ptr, at, mask, bits)
            change = learning_rate * (out + weight_decay * theta)
            # Not theta - 0, which is no identity for -0, nor where subnormals are flushed.
            out = tl.where(change == 0, theta, theta - change)
        fraction = None
        if stochastic:
            fraction, _ = _dither(tl.load(phase_ptr + 3), tl.load(phase_ptr + 4), position)
        _store_param(param_ptr, correction_ptr, at, mask, out, fraction, bits)
