"""`backend="jax_triton"`: the kernel in the Triton language against the plain step, as the other one.

On a CPU it runs in Triton's interpreter, in the place of `jax_triton.triton_call`; the one function
that the interpreter has not, a few lines of assembly, becomes a load there. For CUDA it is compiled
to PTX by Triton itself, without a GPU.
"""

import functools
import importlib.util
import inspect
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_backends
import test_kernels
from test_kernels import Case, DualStepConfig, StepContract, _kernel

import gefen_jax as gx
import pallas_kernels

jax_triton = pytest.importorskip(
    "jax_triton", reason="needs jax-triton, which is for Python 3.12 and newer", exc_type=ImportError
)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pallas_kernels import _jax_triton  # noqa: E402


class _Memory:
    """A numpy array as Triton's interpreter asks for it: as a tensor of torch on a CPU."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Memory":
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> "_Memory":
        return self

    def size(self) -> None:
        """Nothing asks what it is."""

    stride = storage_offset = size

    def set_(self, *_: Any) -> None:
        """It is the memory itself."""

    copy_ = set_


def _load_entry(tables_ptr, table: tl.constexpr, index):
    return tl.load(tables_ptr + table * 16 + index)


@pytest.fixture(scope="module")
def interpreted():
    """The kernel once more, of functions that Triton's interpreter runs."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec = importlib.util.spec_from_file_location("interpreted", _jax_triton.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module._lookup = triton.jit(_load_entry)
        yield module.dual_step_kernel, triton.jit(tl.max.fn)


@pytest.fixture(scope="class")
def on_cpu(interpreted):
    """What the interpreter makes of the kernel, where `jax_triton.triton_call` is called."""
    signature = inspect.signature(_jax_triton.dual_step_kernel.fn)
    interpreted_kernel, interpreted_max = interpreted

    def triton_call(
        *inputs, kernel, out_type, grid, num_warps, num_stages, name, backend_options=None, **others
    ):
        assert kernel is _jax_triton.dual_step_kernel
        bound = signature.bind_partial(*inputs, **others).arguments
        refs = {k: x for k, x in bound.items() if isinstance(x, jax.Ref)}
        static = {k: x for k, x in bound.items() if not isinstance(x, jax.Array | jax.Ref)}
        arrays = {k: refs[k][...] if k in refs else x for k, x in bound.items() if k not in static}
        # What nobody gave is the output's.
        (out_name,) = signature.parameters.keys() - bound.keys() or [None]
        written = [*out_type, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in refs.values())]

        def run(**arrays: Any) -> list[np.ndarray]:
            memory = {k: np.array(x) for k, x in arrays.items()}
            if out_name:
                memory[out_name] = np.zeros(out_type[0].shape, out_type[0].dtype)
            pointers = {k: _Memory(x) for k, x in memory.items()}
            with np.errstate(all="ignore"):
                interpreted_kernel[(grid,)](**pointers, **static)
            return [memory[k] for k in ([out_name] if out_name else []) + list(refs)]

        new = jax.pure_callback(run, written, **arrays)
        for ref, x in zip(refs.values(), new[len(out_type) :], strict=True):
            ref[...] = x
        return new[: len(out_type)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl, "max", interpreted_max)
        patch.setattr(jax_triton, "triton_call", triton_call)
        yield


@functools.cache
def _step(case: Case, config: DualStepConfig | None = None) -> Any:
    step = functools.partial(_kernel(case, config, interpret=False), backend="jax_triton")
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.usefixtures("on_cpu")
class TestJaxTriton(StepContract):
    """Triton's interpreter."""

    step = staticmethod(_step)
