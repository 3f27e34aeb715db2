"""`backend="mosaic"`: the kernel in Mosaic GPU fulfils the contract of the step.

On a CPU it runs in Pallas' interpreter, where plain jnp stands for the operations that are written
for Mosaic's compiler; and once in Mosaic's own, which has a GPU's memory. For CUDA it is lowered as
far as jax does without a GPU; `examples/benchmarks/gpu_compile.py` goes on to machine code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_kernels
import test_shared_kernels
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_kernels import (
    CASES,
    H200,
    Case,
    DualLayout,
    DualStepConfig,
    StepContract,
    check_equal,
    data_of,
    plain_step,
)
from test_shared_kernels import Case as SharedCase
from test_shared_kernels import SharedStepContract

from pallas_kernels import SharedLayout, SharedStepConfig

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="`backend` 'mosaic' needs jax 0.11.2 or newer"
)


def _kernel(case: Case, config: DualStepConfig | None = None, interpret: Any = False) -> Any:
    return functools.partial(test_kernels.kernel_step(case, config, interpret), backend="mosaic")


@functools.cache
def _interpreted(case: Case, config: DualStepConfig | None = None) -> Any:
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(_kernel(case, config, interpret=True), compiler_options=options)


class TestMosaicInterpreted(StepContract):
    """The kernel in Pallas' interpreter."""

    step = staticmethod(_interpreted)

    # The arithmetic is that of the Triton dialect, line by line: its numbers are tested there.
    test_any_numbers = test_zero_stays_whatever_the_fraction_is = None
    test_is_the_step_of_fused_gefen_with_split_weights = None


def _shared_kernel(case: SharedCase, config: Any = None, interpret: Any = False) -> Any:
    step = test_shared_kernels.kernel_step(case, config, interpret)
    return functools.partial(step, backend="mosaic")


@functools.cache
def _shared_interpreted(case: SharedCase, config: Any = None) -> Any:
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(_shared_kernel(case, config, interpret=True), compiler_options=options)


class TestSharedMosaicInterpreted(SharedStepContract):
    """The kernel of shared blocks in Pallas' interpreter."""

    step = staticmethod(_shared_interpreted)

    # As above.
    test_any_numbers = test_any_shape = None
    test_splits_bit_for_bit = test_a_change_of_zero_leaves_split_weights = None


@pytest.mark.parametrize(
    "case",
    [SharedCase(SharedLayout(3, 96), param="float32"), SharedCase(SharedLayout(1, 4999))],
    ids=["fused", "updates, in turns"],
)
def test_shared_blocks_in_the_interpreter_of_mosaic(case):
    """As below."""
    data = test_shared_kernels.data_of(case, 0)
    found = jax.jit(_shared_kernel(case, interpret=plgpu.InterpretGPUParams()))(data)
    wanted = test_shared_kernels.plain_step(case)(data)
    test_shared_kernels.check_equal(case, data, wanted, found)


@pytest.mark.parametrize(
    "case",
    [
        Case(DualLayout(3, 1, 80), "bfloat16", "bfloat16", bits=32),
        Case(DualLayout(3, 1, 80), "bfloat16", nesterov=True),
    ],
    ids=["split weights", "updates"],
)
def test_in_the_interpreter_of_mosaic(case):
    """One program, in place: references as a GPU gets them, what is new first."""
    data = data_of(case, 0)
    found = jax.jit(_kernel(case, interpret=plgpu.InterpretGPUParams()))(data)
    check_equal(case, data, plain_step(case)(data), found)


def test_an_ensemble_by_vmap():
    """Lowered, as the kernel has no rule of its own: one call in a loop."""
    case = CASES["rows, fused"]
    data = [data_of(case, seed) for seed in (0, 1)]

    def step(g, param):
        return _kernel(case)(data[0]._replace(g=g, param=param))

    stacked = [jnp.stack([getattr(x, name) for x in data]) for name in ("g", "param")]
    assert _lowered(jax.vmap(step), *stacked).count(f"@{_CALL}") == 1


# Lowered, not run --------------------------------------------------------------------------------

_CALL = "mosaic_gpu_v2"


def _lowered(function: Any, *args: Any, **options: Any) -> str:
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(function, **options).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "gradient"),
    [(name, case.gradient) for name, case in CASES.items()] + [("rows, fused", "float16")],
)
def test_lowers_for_cuda_in_place(name, gradient):
    """One custom call, which writes all state, and the parameter, where it was."""
    case = CASES[name]._replace(gradient=gradient)
    shapes = jax.eval_shape(lambda: data_of(case, 0)._replace(phase=jnp.zeros(2, jnp.uint32)))
    written = {name: getattr(shapes, name) for name in ("state", "param", "correction")}
    text = _lowered(
        lambda written, rest: _kernel(case)(rest._replace(**written)),
        written,
        shapes._replace(**dict.fromkeys(written)),
        donate_argnums=0,
    )
    assert text.count(f"@{_CALL}") == 1
    arrays = len(jax.tree.leaves(written))
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays


@pytest.mark.parametrize("gradient", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["rows", "rows, fused", "16384 in turns", "searched", "columns", "split, 24 bits"]
)
def test_shared_blocks_lower_for_cuda_in_place(name, gradient):
    """As the dual code's."""
    case = test_shared_kernels.CASES[name]._replace(gradient=gradient)
    text, arrays = test_shared_kernels.lowered(_shared_kernel(case), case)
    assert text.count(f"@{_CALL}") == 1
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays


def test_programs_too_large_are_refused():
    case = SharedCase(SharedLayout(1, 9000))
    step = _shared_kernel(case, SharedStepConfig(1, 1, 32, 8192))
    with pytest.raises(NotImplementedError, match="in programs of .1, 8192, 1.: use a smaller"):
        jax.eval_shape(step, test_shared_kernels.data_of(case, 0))
