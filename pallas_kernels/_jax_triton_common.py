"""What the kernels in the Triton language have in common: dither, and how weights move.

Names, order and numbers are those of `pallas_kernels._step` and `pallas_kernels._split_weight`,
where the reasons are.
"""

# Triton's language has Python's syntax, but not its types; and it is an extra.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import inspect
from typing import Any

import triton
import triton.language as tl

from pallas_kernels._step import SCALARS

_NUMBER = tl.constexpr(len(SCALARS))
_SIGN = tl.constexpr(-(1 << 31))
_NAN = tl.constexpr(0x7FC00000)
_NAN16 = tl.constexpr(0x7E000000)
_INF16 = tl.constexpr(0x7C000000)
_REBASE = tl.constexpr(112 << 23)
_FIRST_BEYOND = tl.constexpr(143 << 23)


def jit(function: Any) -> Any:
    """``triton.jit`` of the function itself, whose source and globals Triton reads."""
    return triton.jit(inspect.unwrap(function))  # a checker of types may have wrapped it


@jit
def float_of(bits):
    """The floats of these bits."""
    return bits.to(tl.float32, bitcast=True)


@jit
def position_of(start, index, faster: tl.constexpr, strides: tl.constexpr):
    """Where elements lie in the whole leaf."""
    position = start
    for i in tl.static_range(len(faster)):
        position = position + (index % faster[i]).to(tl.uint32) * strides[i]
        index = index // faster[i]
    return position + index.to(tl.uint32) * strides[len(faster)]


@jit
def dither(word0, word1, position):
    """The two fractions of the elements at these positions, in units of 2^-32."""
    word = position ^ word0
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word + word1, (word ^ (word >> 16)) * 0x9C8F2D35 + word1


@jit
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


@jit
def _to_float32(b, dtype: tl.constexpr):
    """The inverse of `_from_float32`."""
    if dtype == tl.float16:
        magnitude = b & ~_SIGN
        rebase = tl.where(magnitude >= _INF16, 2 * _REBASE, _REBASE)
        fixed = (magnitude.to(tl.float32) * 2.0**-40).to(tl.int32, bitcast=True)
        b = (b & _SIGN) | tl.where(magnitude < 1 << 26, fixed, (magnitude >> 3) + rebase)
    return float_of(b)


@jit
def load_param(param_ptr, correction_ptr, at, mask, bits: tl.constexpr):
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


@jit
def store_param(param_ptr, correction_ptr, at, mask, out, fraction, bits: tl.constexpr):
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


@jit
def read_scalars(scalars_ptr):
    """What a kernel's first input holds: see `pallas_kernels._step.SCALARS`."""
    scalars = ()
    for i in tl.static_range(_NUMBER):
        scalars += (tl.load(scalars_ptr + i),)
    return scalars


@jit
def root_of(nu, inverse_correction2, eps_root, eps):
    """sqrt(nu / (1 - b2^t) + eps_root) + eps."""
    return tl.sqrt(nu * inverse_correction2 + eps_root) + eps


@jit
def inverse_of(root):
    """1 / root, and 0 of 0."""
    return 1 / tl.where(root == 0, float("inf"), root)


@jit
def move(
    param_ptr,
    correction_ptr,
    leaf_ptr,  # this and the next: the words of the weight's dither, if a fraction rounds it
    step_ptr,
    at,
    position,
    mask,
    out,
    learning_rate,
    weight_decay,
    fused: tl.constexpr,
    bits: tl.constexpr,
    stochastic: tl.constexpr,
):
    """Writes the update, or of the fused form the parameter that it gives."""
    if fused:
        theta = load_param(param_ptr, correction_ptr, at, mask, bits)
        change = learning_rate * (out + weight_decay * theta)
        # Not theta - 0, which is no identity for -0, nor where subnormals are flushed.
        out = tl.where(change == 0, theta, theta - change)
    fraction = None
    if stochastic:
        fraction, _ = dither(tl.load(leaf_ptr), tl.load(step_ptr), position)
    store_param(param_ptr, correction_ptr, at, mask, out, fraction, bits)
