"""`backend="jax_triton"`: the kernels in the Triton language fulfil the contracts of the steps.

On a CPU it runs in Triton's interpreter, in the place of `jax_triton.triton_call`; the one thing
that the interpreter has not, a few lines of assembly, becomes a load there. For CUDA it is compiled
to PTX by Triton itself, without a GPU.
"""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_backends
import test_kernels
import test_shared_kernels
from test_kernels import CASES, Case, DualStepConfig, StepContract, kernel_step
from test_shared_kernels import SharedStepContract

import gefen_jax as gx
from gefen_jax._split import merge

jax_triton = pytest.importorskip(
    "jax_triton", reason="the extra `triton` is not installed; it needs Python 3.12 or newer"
)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pallas_kernels import _jax_triton, _jax_triton_common, _jax_triton_shared  # noqa: E402


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


def _pointer(tables_ptr, table: tl.constexpr):
    return tables_ptr + table * 16


def _load_entry(table, index):
    return tl.load(table + index)


# Triton's own is not a function that the interpreter runs, unless the environment said so before
# Triton was imported.
def _max(x, axis, keep_dims):
    return tl.reduce(x, axis, tl.standard._elementwise_max, keep_dims=keep_dims)


def _sum(x, axis, keep_dims):
    return tl.reduce(x, axis, tl.standard._sum_combine, keep_dims=keep_dims)


def _split_and_merge(
    theta_ptr,
    words_ptr,
    param_ptr,
    correction_ptr,
    store_param: tl.constexpr,
    load_param: tl.constexpr,
    size: tl.constexpr,
    bits: tl.constexpr,
    stochastic: tl.constexpr,
):
    at = tl.arange(0, size)
    mask = at < size
    theta = tl.load(theta_ptr + at)
    fraction = None
    if stochastic:
        fraction = tl.load(words_ptr + at)
    store_param(param_ptr, correction_ptr, at, mask, theta, fraction, bits)
    tl.store(theta_ptr + at, load_param(param_ptr, correction_ptr, at, mask, bits))


class _Interpreted(NamedTuple):
    """Once more what is compiled, of functions that Triton's interpreter runs."""

    common: Any  # the module
    kernels: dict[Any, Any]  # by what they stand for
    max: Any
    sum: Any
    split_and_merge: Any


def _once_more(module: Any) -> Any:
    spec = importlib.util.spec_from_file_location("interpreted", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


@pytest.fixture(scope="module")
def interpreted():
    """The kernels, made once more."""
    with triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.runtime.interpret = True
        common = _once_more(_jax_triton_common)
        patch.setitem(sys.modules, _jax_triton_common.__name__, common)
        dual, shared = _once_more(_jax_triton), _once_more(_jax_triton_shared)
        dual._read, dual._lookup = triton.jit(_pointer), triton.jit(_load_entry)
        kernels = {
            _jax_triton.dual_step_kernel: dual.dual_step_kernel,
            _jax_triton_shared.shared_step_kernel: shared.shared_step_kernel,
        }
        return _Interpreted(common, kernels, *map(triton.jit, (_max, _sum, _split_and_merge)))


@pytest.fixture(scope="class")
def on_cpu(interpreted):
    """What the interpreter makes of a kernel, where `jax_triton.triton_call` is called."""
    calls = []

    def triton_call(
        *inputs, kernel, out_type, grid, num_warps, num_stages, name, backend_options=None, **others
    ):
        signature, stands_for_it = inspect.signature(kernel.fn), interpreted.kernels[kernel]
        calls.append(name)
        bound = signature.bind_partial(*inputs, **others).arguments
        refs = {k: x for k, x in bound.items() if isinstance(x, jax.Ref)}
        static = {k: x for k, x in bound.items() if not isinstance(x, jax.Array | jax.Ref)}
        arrays = {k: refs[k][...] if k in refs else x for k, x in bound.items() if k not in static}
        # The pointer that nobody gave is the output's.
        (out_name,) = signature.parameters.keys() - bound.keys() or [None]
        written = [*out_type, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in refs.values())]

        def run(**arrays: Any) -> list[np.ndarray]:
            memory = {k: np.array(x) for k, x in arrays.items()}
            if out_name:
                memory[out_name] = np.zeros(out_type[0].shape, out_type[0].dtype)
            pointers = {k: _Memory(x) for k, x in memory.items()}
            with np.errstate(all="ignore"):
                stands_for_it[(grid,)](**pointers, **static)
            return [memory[k] for k in ([out_name] if out_name else []) + list(refs)]

        new = jax.pure_callback(run, written, **arrays)
        for ref, x in zip(refs.values(), new[len(out_type) :], strict=True):
            ref[...] = x
        return new[: len(out_type)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl, "max", interpreted.max)
        patch.setattr(tl, "sum", interpreted.sum)
        patch.setattr(jax_triton, "triton_call", triton_call)
        yield calls


@functools.cache
def _step(case: Case, config: DualStepConfig | None = None) -> Any:
    step = functools.partial(kernel_step(case, config, interpret=False), backend="jax_triton")
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.usefixtures("on_cpu")
class TestJaxTriton(StepContract):
    """The Triton language's kernel, interpreted."""

    step = staticmethod(_step)

    # Hundreds of programs, or dozens of runs: the interpreter takes milliseconds for each.
    test_any_numbers = test_how_programs_are_cut_does_not_matter = None
    test_zero_stays_whatever_the_fraction_is = None
    test_is_the_step_of_fused_gefen_with_split_weights = None

    def test_a_part_of_a_leaf(self):
        """Has the fractions of its place in the whole."""
        case = CASES["rows"]
        data = test_kernels.data_of(case, 0)
        whole = _step(case)(data)
        part = data._replace(g=data.g[2:], state=jax.tree.map(lambda x: x[2:], data.state))
        rows = case._replace(layout=dataclasses.replace(case.layout, blocks=3))
        found = _step(rows)(part, offset=2 * case.layout.period)
        for ours, wanted in zip(found[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(ours, wanted[2:])

    def test_an_ensemble_by_vmap(self):
        """One after the other, with what they share."""
        case = CASES["rows, fused"]
        data, other = (test_kernels.data_of(case, seed) for seed in (0, 1))

        def step(g, param):
            return _step(case)(data._replace(g=g, param=param))

        found = jax.vmap(step)(
            *(jnp.stack([getattr(x, k) for x in (data, other)]) for k in ("g", "param"))
        )
        for i, x in enumerate((data, other)):
            for ours, wanted in zip(found[:4], step(x.g, x.param)[:4], strict=True):
                np.testing.assert_array_equal(ours[i], wanted)

    def test_is_a_backend(self, on_cpu, monkeypatch):
        """Clipped, and with a mask, as in tests/test_backends.py, whose bounds these are."""

        def run_what_is_for_cuda(*args, cuda, cpu=None, **_):
            return (cpu or cuda)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", run_what_is_for_cuda)
        on_cpu.clear()
        test_backends.test_fused("jax_triton")
        # Of dual codes there are two, and of shared blocks four leaves, one of which is a part.
        kinds = {f"gefen_{step}_step_fused": on_cpu.count for step in ("dual", "shared")}
        assert [count(name) for name, count in kinds.items()] == [2, 4]


@functools.cache
def _shared_step(case: test_shared_kernels.Case, config: Any = None) -> Any:
    step = test_shared_kernels.kernel_step(case, config, interpret=False)
    step = functools.partial(step, backend="jax_triton")
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.usefixtures("on_cpu")
class TestSharedJaxTriton(SharedStepContract):
    """The Triton language's kernel of shared blocks, interpreted."""

    step = staticmethod(_shared_step)

    # As above.
    test_any_numbers = test_any_shape = None


# The arithmetic of split weights, which is exact --------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("stochastic", [False, True])
def test_weights_are_split_and_merged_as_in_the_plain_form(dtype, bits, stochastic, interpreted):
    common, split_and_merge = interpreted.common, interpreted.split_and_merge
    theta = test_kernels.float32s()
    theta = np.resize(theta, 1 << (theta.size - 1).bit_length())  # as blocks of Triton are
    words = np.random.default_rng(1).integers(0, 1 << 32, theta.shape, np.uint32)

    @jax.jit
    def plain(theta: Any, words: Any) -> Any:
        parts = test_kernels.plain_parts(theta, bits, jnp.dtype(dtype), words)
        return *parts, merge(*parts)

    wanted = plain(theta, words if stochastic else None)
    found = [None if x is None else np.zeros(x.shape, x.dtype) for x in wanted[:2]]
    found += [theta.copy()]
    memory = [None if x is None else _Memory(x) for x in (found[2], words, *found[:2])]
    static = {"size": theta.size, "bits": bits, "stochastic": stochastic}
    with np.errstate(all="ignore"):
        split_and_merge[(1,)](
            *memory, store_param=common.store_param, load_param=common.load_param, **static
        )
    test_kernels.same_weights(found[:2], wanted[:2])
    test_kernels._same_bits(found[2], wanted[2])


# Lowered, not run --------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The kernels that are compiled, as jax's plugin for GPUs would get them; none is needed."""
    compiled = []

    def kernel(name, num_warps, num_ctas, shared_bytes, ptx, *_):
        compiled.append(SimpleNamespace(name=name, shared_bytes=shared_bytes, ptx=ptx))

    plugin = SimpleNamespace(
        get_compute_capability=lambda device: 90,
        TritonKernel=kernel,
        TritonKernelCall=lambda *_: SimpleNamespace(to_proto=lambda *_: b""),
        create_array_parameter=lambda *_: None,
    )
    monkeypatch.setattr(jax_triton.triton_lib, "triton_kernel_call_lib", plugin)
    # Or what is compiled here would be taken elsewhere.
    for kernel in (_jax_triton.dual_step_kernel, _jax_triton_shared.shared_step_kernel):
        monkeypatch.setattr(kernel, "_jT_kernel_cache", {}, raising=False)
    return compiled


@pytest.mark.parametrize("name", ["rows", "stretches", "split, 24 bits", "split, float16, 24 bits"])
def test_lowers_for_cuda_in_place(name, kernels):
    """One custom call, which writes all state, and the parameter, where it was."""
    case = CASES[name]
    shapes = jax.eval_shape(
        lambda: test_kernels.data_of(case, 0)._replace(phase=jnp.zeros(2, jnp.uint32))
    )
    written = {name: getattr(shapes, name) for name in ("state", "param", "correction")}
    step = functools.partial(kernel_step(case, interpret=False), backend="jax_triton")
    jitted = jax.jit(lambda written, rest: step(rest._replace(**written)), donate_argnums=0)
    traced = jitted.trace(written, shapes._replace(**dict.fromkeys(written)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 1
    arrays = len(jax.tree.leaves(written))
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays

    (kernel,) = kernels
    assert ".version 8.7" in kernel.ptx and ".target sm_90a" in kernel.ptx
    # The two maxima of a block may cross warps; entries of tables never do.
    assert kernel.ptx.count("bar.sync") <= 3
    assert kernel.ptx.count("shfl.sync.idx") >= 14


@pytest.mark.parametrize("bits, threads, registers", [(0, 1024, 64), (24, 512, 128)])
def test_threads_of_long_blocks_have_registers(bits, threads, registers, kernels):
    """All of a multiprocessor's, so that none is spilled (`gpu_compile.py` counts)."""
    dtype = "bfloat16" if bits else "float32"
    case = test_kernels.Case(test_kernels.DualLayout(2, 1, 2048), dtype, dtype, bits=bits)
    data = jax.eval_shape(lambda: test_kernels.data_of(case, 0))
    step = functools.partial(kernel_step(case, interpret=False), backend="jax_triton")
    jax.jit(step).trace(data).lower(lowering_platforms=("cuda",))
    (kernel,) = kernels
    assert f".reqntid {threads}\n" in kernel.ptx and f".maxnreg {registers}\n" in kernel.ptx


@pytest.mark.parametrize(
    "name", ["rows", "16384 in turns", "columns", "searched", "a nu per element", "split, 24 bits"]
)
def test_shared_blocks_lower_for_cuda_in_place(name, kernels):
    """As the dual code's."""
    case = test_shared_kernels.CASES[name]
    step = test_shared_kernels.kernel_step(case, interpret=False)
    text, arrays = test_shared_kernels.lowered(functools.partial(step, backend="jax_triton"), case)
    assert text.count("@triton_kernel_call_ffi") == 1
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays
    # The two reductions of a block may cross warps; entries of tables never do.
    (kernel,) = kernels
    assert kernel.ptx.count("bar.sync") <= 7


def test_devices_other_than_cuda_are_refused():
    tx = gx.scale_by_gefen(plan=test_backends._PLAN, backend="jax_triton")
    traced = jax.jit(tx.update).trace(test_backends._GRADS[0], tx.init(test_backends._PARAMS))
    for platform in ("cpu", "tpu", "rocm"):
        with pytest.raises(NotImplementedError, match=f"platform {platform}"):
            traced.lower(lowering_platforms=(platform,))
