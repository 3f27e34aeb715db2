"""The kernel of `pallas_kernels._shared_step` once more, in the Triton language, for `jax_triton`.

Names, order and numbers are those of that module, where the reasons are. Importing this one imports
Triton, as with `pallas_kernels._jax_triton`.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton.language as tl

from pallas_kernels._jax_triton_common import (
    float_of,
    inverse_of,
    jit,
    move,
    position_of,
    read_scalars,
    root_of,
)
from pallas_kernels._shared_step import CODES

_HALF = tl.constexpr(CODES // 2)
_INFINITY = tl.constexpr(255 << 23)
_TINY = tl.constexpr(2.0**-126)


@jit
def _encode(x, codebook_ptr, count_below_ptr, next_threshold_ptr, bins: tl.constexpr):
    """The nearest code of each x."""
    if bins > 0:
        number = tl.minimum(tl.maximum(((x + 1) * (bins // 2)).to(tl.int32), 0), bins - 1)
        code = tl.load(count_below_ptr + number).to(tl.int32)
        code = tl.where(x > tl.load(next_threshold_ptr + number), code + 1, code)
    else:
        i = tl.full(x.shape, 0, tl.int32)
        for k in tl.static_range(8):
            middle = i + ((_HALF >> k) - 1)
            i = tl.where(x > tl.load(codebook_ptr + middle), middle + 1, i)
        below = tl.maximum(i - 1, 0)
        lower = tl.abs(x - tl.load(codebook_ptr + below))
        code = tl.where(lower <= tl.abs(x - tl.load(codebook_ptr + i)), below, i)
    return code


@jit
def _read(
    g_ptr,
    codes_ptr,
    codebook_ptr,
    scale,
    gradient_factor,
    one_minus_b1,
    first,  # where a block begins
    item,
    stats_mask,
    period: tl.constexpr,
    inner: tl.constexpr,
    padded: tl.constexpr,
):
    """A turn's elements: where they are, gradients, and the first moments that these give."""
    at, mask = first + item * inner, stats_mask & (item < period)
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32) * gradient_factor
    codes = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int32)
    m = tl.load(codebook_ptr + codes) * scale
    m = m + one_minus_b1 * (g - m)
    if padded:
        # A code of 0 stands for -1 times the scale: what pads a block must not be its maximum.
        m = tl.where(mask, m, 0)
    return at, mask, g, m


@jit
def _inverse_root(nu, inverse_correction2, eps_root, eps):
    root = root_of(nu, inverse_correction2, eps_root, eps)
    # A square that overflowed would freeze its block for ever: inf * 0 makes its updates NaN.
    return inverse_of(root + root * 0)


@jit
def shared_step_kernel(
    scalars_ptr,
    leaf_ptr,
    step_ptr,
    g_ptr,
    codebook_ptr,
    count_below_ptr,  # this and the next None where there is no lookup
    next_threshold_ptr,
    param_ptr,  # what the update is written to, where there is no parameter
    codes_ptr,
    scale_ptr,
    nu_ptr,
    correction_ptr,
    layout: tl.constexpr,  # blocks, period, inner
    nu_per_element: tl.constexpr,
    bins: tl.constexpr,  # of the lookup, or 0
    faster: tl.constexpr,  # of the axes that the leaf has in another one: see `InAnother`
    strides: tl.constexpr,
    tile: tl.constexpr,  # rows, elements of a block, columns
    fused: tl.constexpr,
    nesterov: tl.constexpr,
    bits: tl.constexpr,
    stochastic: tl.constexpr,
):
    """One step of the blocks of a tile. What is behind the pointers is written in place."""
    blocks: tl.constexpr = layout[0]
    period: tl.constexpr = layout[1]
    inner: tl.constexpr = layout[2]
    turns: tl.constexpr = (period + tile[1] - 1) // tile[1]
    padded: tl.constexpr = period % tile[1] != 0
    across: tl.constexpr = (inner + tile[2] - 1) // tile[2]
    # A 0, of which Triton does not know: see `pallas_kernels._triton.TritonProgram`.
    unknown = tl.program_id(0) >> 31
    row = tl.program_id(0) // across * tile[0] + tl.arange(0, tile[0])[:, None, None]
    item = (tl.arange(0, tile[1]) ^ unknown)[None, :, None]
    column = (tl.arange(0, tile[2]) ^ unknown)[None, None, :]
    column = tl.program_id(0) % across * tile[2] + column
    stats_mask = (row < blocks) & (column < inner)
    stats = row * inner + column
    first = row * (period * inner) + column
    # Before the reductions, for which all threads of a block wait: one of them writes these.
    scale = tl.load(scale_ptr + stats, mask=stats_mask, other=0)
    nu = 0.0
    if not nu_per_element:
        nu = tl.load(nu_ptr + stats, mask=stats_mask, other=0)
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

    reading = (g_ptr, codes_ptr, codebook_ptr, scale, gradient_factor, one_minus_b1, first)
    if turns == 1:
        at, mask, g, m = _read(*reading, item, stats_mask, period, inner, padded)
        largest, squares = tl.abs(m).to(tl.int32, bitcast=True), g * g
    else:
        largest, squares = tl.full(tile, 0, tl.int32), tl.full(tile, 0, tl.float32)
        for turn in range(turns):
            here = item + turn * tile[1]
            _, _, g, m = _read(*reading, here, stats_mask, period, inner, padded)
            largest = tl.maximum(largest, tl.abs(m).to(tl.int32, bitcast=True))
            squares += g * g
    scale = float_of(tl.minimum(tl.max(largest, axis=1, keep_dims=True), _INFINITY))
    inverse_scale, inverse = 1 / tl.maximum(scale, _TINY), 0.0
    if not nu_per_element:
        nu = b2 * nu + one_minus_b2 * (tl.sum(squares, axis=1, keep_dims=True) * (1 / period))
        inverse = _inverse_root(nu, inverse_correction2, eps_root, eps)
        tl.store(nu_ptr + stats, nu, mask=stats_mask)
    tl.store(scale_ptr + stats, scale, mask=stats_mask)

    start = tl.load(leaf_ptr + (1 if stochastic else 0))
    for turn in range(turns):
        if turns > 1:
            here = item + turn * tile[1]
            at, mask, g, m = _read(*reading, here, stats_mask, period, inner, padded)
        code = _encode(m * inverse_scale, codebook_ptr, count_below_ptr, next_threshold_ptr, bins)
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=mask)
        own = inverse
        if nu_per_element:
            own_nu = tl.load(nu_ptr + at, mask=mask, other=0)
            own_nu = b2 * own_nu + one_minus_b2 * (g * g)
            own = _inverse_root(own_nu, inverse_correction2, eps_root, eps)
            tl.store(nu_ptr + at, own_nu, mask=mask)
        out = tl.load(codebook_ptr + code) * (scale * m_factor * own)
        if nesterov:
            out = out + g * g_factor * own
        position = at
        if stochastic:
            position = position_of(start, at, faster, strides)
        args = (at, position, mask, out, learning_rate, weight_decay)
        move(param_ptr, correction_ptr, leaf_ptr, step_ptr, *args, fused, bits, stochastic)
