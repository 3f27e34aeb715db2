"""On an NVIDIA GPU: kernels fulfil their contracts, and the plain code gives what a CPU's gives.

    python -m pytest tests/test_on_gpu.py  # with jax[cuda13]; `step_time.py` measures them

Where there is no such GPU, kernels are interpreted instead, in the files that the contracts are of,
and what is here is skipped. **None of it ever ran on one**: its programs were compiled for an H200,
and its bounds hold for interpreted kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_backends
from test_exact_kernel import ExactStepContract
from test_exact_kernel import kernel_step as exact_step
from test_kernels import StepContract
from test_kernels import kernel_step as dual_step
from test_shared_kernels import SharedStepContract
from test_shared_kernels import kernel_step as shared_step

import gefen_jax as gx
import pallas_kernels
from pallas_kernels import _jax_triton_launch

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

_IS_THERE = {
    "mosaic": jax.__version_info__ >= (0, 11, 2),
    "triton": pallas_kernels.is_available(),
    "jax_triton": _jax_triton_launch.is_available(),
}


def _needs(backend: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not _IS_THERE[backend], reason=f"{backend!r} is not installed")


_with_every_kernel = pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=_needs(backend)) for backend in _IS_THERE]
)


# The kernels -------------------------------------------------------------------------------------


def _compiled(contract: type, kernel_step: Callable[..., Any], backend: str) -> type:
    """A contract's tests of a kernel that is compiled for the GPU."""

    @functools.cache
    def step(case: Any, config: Any = None) -> Any:
        kernel = kernel_step(case, config, interpret=False)
        return jax.jit(functools.partial(kernel, backend=backend))

    tests = type(f"On{backend}", (contract,), {"step": staticmethod(step)})
    return _needs(backend)(tests)


def _exact(case: Any, config: None, interpret: bool) -> Any:
    def step(*args: Any, backend: str, **others: Any) -> Any:
        return exact_step(case, backend, interpret)(*args, **others)

    return step


TestMosaic = _compiled(StepContract, dual_step, "mosaic")
TestSharedMosaic = _compiled(SharedStepContract, shared_step, "mosaic")
TestExactMosaic = _compiled(ExactStepContract, _exact, "mosaic")
TestTriton = _compiled(StepContract, dual_step, "triton")
TestSharedTriton = _compiled(SharedStepContract, shared_step, "triton")
TestExactTriton = _compiled(ExactStepContract, _exact, "triton")
TestJaxTriton = _compiled(StepContract, dual_step, "jax_triton")
TestSharedJaxTriton = _compiled(SharedStepContract, shared_step, "jax_triton")


# The plain code ----------------------------------------------------------------------------------

_RATE, _STEPS = 1e-3, 3
# Stepped at once, in pieces, in pieces whose blocks lie along columns; and exact ones.
_SHAPES = {"once": (512, 1024), "pieces": (2304, 2048), "columns": (2048, 2, 1111), "bias": (7,)}
_KINDS = ("dual_code", "wide_dual_code", "shared_blocks")


def _plan(kind: Any) -> gx.Plan:
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in _SHAPES.items()}
    kinds = gx.DualCode, gx.WideDualCode, gx.SharedBlocks
    columns = next(x for x in kinds if x.name == kind)((256, 1, 1))
    return gx.plan_by_shape(shapes, kind=kind).with_kind("columns", columns)


def _tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(0.1 * rng.standard_normal(shape, dtype=np.float32), dtype)
        for name, shape in _SHAPES.items()
    }


def _update_and_apply(kind: str, **how: Any) -> Any:
    tx = gx.gefen(_RATE, plan=_plan(kind), **how)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def _fused(kind: str, **how: Any) -> Any:
    tx = gx.fused_gefen(_RATE, plan=_plan(kind), max_norm=1.0, **how)
    return tx.init, tx.step


def _split(kind: str, **how: Any) -> Any:
    tx = gx.with_split_weights(gx.fused_gefen(_RATE, plan=_plan(kind), **how))
    return tx.init, tx.step


def _run(make: Any, kind: str, device: Any, dtype: Any, **how: Any) -> tuple[Any, Any]:
    """The parameters, merged if they are split, and the state after a few steps."""
    init, step = make(kind, **how)
    step = jax.jit(step, donate_argnums=(1, 2))
    with jax.default_device(device):
        params = jax.tree.map(jnp.asarray, _tree(0, dtype))
        state = jax.jit(init)(params)
        for i in range(_STEPS):
            params, state = step(jax.tree.map(jnp.asarray, _tree(i + 1, dtype)), state, params)
        whole = gx.merge_weights(params, state) if make is _split else params
    return jax.tree.map(np.asarray, (whole, state))


def _assert_alike(found: Any, wanted: Any) -> None:
    """But for roundings, and for elements of which a rounding decided a code otherwise.

    That happens to one in 30,000 per step (tests/test_kernels.py), and its pair, or in shared
    blocks none, goes along. The code is then the next one: a gap of the codebook, 0.27 of a block's
    largest update, of a few rates.
    """
    (params, state), (wanted, wanted_state) = found, wanted
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    for name, x in params.items():
        apart = np.abs(x - wanted[name])
        # Besides, weights of 24 bits may round to the other side: an ulp of theirs.
        near = apart <= 1e-3 * _RATE + 2.0**-15 * np.abs(x)
        assert np.mean(~near) <= 1e-3, name
        assert np.all(apart <= _STEPS * 5 * _RATE), name


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("make", [_update_and_apply, _fused, _split])
def test_plain_code_gives_what_a_cpu_gives(make, kind):
    dtype = jnp.bfloat16 if make is _split else jnp.float32
    gpu, cpu = (_run(make, kind, jax.devices(x)[0], dtype) for x in ("gpu", "cpu"))
    _assert_alike(gpu, cpu)


@_with_every_kernel
@pytest.mark.parametrize("kind", [k for k in _KINDS if k != "wide_dual_code"])
@pytest.mark.parametrize("make", [_update_and_apply, _fused, _split])
def test_kernels_give_what_the_plain_code_gives(make, kind, backend):
    """Of large leaves, whose programs are thousands, and in place: parameters are donated."""
    dtype = jnp.bfloat16 if make is _split else jnp.float32
    ours, plain = (
        _run(make, kind, jax.devices("gpu")[0], dtype, backend=b) for b in (backend, "xla")
    )
    _assert_alike(ours, plain)


@_with_every_kernel
@pytest.mark.parametrize(
    "test", [test_backends.test_updates, test_backends.test_fused, test_backends.test_split_weights]
)
def test_every_kind_of_leaf(test, backend):
    test(backend)
