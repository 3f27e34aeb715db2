"""The emulator of `examples/benchmarks/ptx.py` computes, and finds a missing barrier."""

import numpy as np
import pytest
from ptx import run

_HEAD = """\
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 64, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.b32 %r4, [%rd4];
"""
_TAIL = """\
    st.global.b32 [%rd5], %r9;
    ret;
}
"""
# Of x, where it is positive the sum with the neighbour's, else 1 / x.
_BRANCHES = """\
    setp.gt.f32 %p1, %r4, 0f00000000;
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    @!%p1 bra $L__BB0_2;
    add.rn.f32 %r9, %r4, %r5;
    bra $L__BB0_3;
$L__BB0_2:
    rcp.approx.f32 %r9, %r4;
$L__BB0_3:
"""
# What the other warp's thread has in memory of the block.
_EXCHANGE = """\
    shl.b32 %r5, %r1, 2;
    xor.b32 %r6, %r5, 128;
    st.shared.b32 [%r5], %r4;
    BARRIER
    ld.shared.b32 %r9, [%r6];
"""


def _run(body: str, x: np.ndarray, seed: int) -> np.ndarray:
    out = np.zeros_like(x)
    run(_HEAD + body + _TAIL, [x, out], len(x) // 64, 64, seed)
    return out


def test_branches_and_exchanges():
    x = np.random.default_rng(0).normal(size=128).astype(np.float32)
    neighbour = x.reshape(-1, 2)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(_run(_BRANCHES, x, 0), np.where(x > 0, x + neighbour, 1 / x))


def test_a_missing_barrier_is_found():
    x = np.arange(1, 65, dtype=np.float32)
    expected = x.reshape(2, 32)[::-1].reshape(-1)
    for seed in range(3):
        found = _run(_EXCHANGE.replace("BARRIER", "bar.sync 0;"), x, seed)
        np.testing.assert_array_equal(found, expected)
    assert np.any(_run(_EXCHANGE.replace("BARRIER", ""), x, 0) != expected)


def test_addresses_are_checked():
    with pytest.raises(AssertionError):
        run(_HEAD + _BRANCHES + _TAIL, [np.ones(60, np.float32), np.ones(64, np.float32)], 1, 64, 0)
