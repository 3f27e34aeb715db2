"""Four operations that Mosaic GPU lacks, each beside plain jnp that stands for it when interpreted.

A program has T threads: warpgroups of 128, each of which runs the kernel on vectors of its own. Of
all that the program works on, thread i holds elements i, i + T, i + 2 T and so on, so that
neighbouring threads read neighbours in memory. Mosaic has no loads and stores at computed
addresses, no lookups, and no maxima of parts of such a vector: here they are written for its
compiler.

With `interpret`, True for Pallas' interpreter or the parameters of Mosaic's, there is no GPU.
"""

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf, vector
from jaxtyping import Array, Float, Int

WARPGROUP = 128
MAXIMA = 2  # how often `largest` may be called in a kernel
_WARP = 32
_PROGRAM, _WARPGROUPS = "program", "warpgroup"
_inline: Any = plgpu.inline_mgpu  # its type knows nothing of the context, the first argument


def kernel(
    body: Any, out: Any, size: int, warpgroups: int, programs: int, name: str, interpret: Any
) -> Any:
    """A kernel whose programs work on so many elements, with so many warpgroups."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[plgpu.SMEM((size,), jnp.int32)] * MAXIMA,
        grid=(programs,),
        grid_names=(_PROGRAM,),
        num_threads=warpgroups,
        thread_name=_WARPGROUPS,
        kernel_name=name,
        interpret=interpret or None,
    )


def program_id(interpret: Any) -> Int[Array, ""]:
    """The number of this program."""
    return pl.program_id(0) if interpret is True else jax.lax.axis_index(_PROGRAM)


def iota(n: int, warpgroups: int, interpret: Any) -> Int[Array, "own"]:
    """Of 0, 1, ..., n - 1 what a warpgroup holds. Interpreted, there is one."""
    if interpret:
        return jax.lax.iota(jnp.int32, n)
    own = n // warpgroups
    i = plgpu.broadcasted_iota(jnp.int32, (own,), 0, layout=_vector(own))
    if warpgroups == 1:
        return i
    first = jax.lax.axis_index(_WARPGROUPS) * WARPGROUP
    return (i & -WARPGROUP) * warpgroups + first + (i & (WARPGROUP - 1))


def _vector(n: int) -> Any:
    return plgpu.Layout.WG_STRIDED((n,), vec_size=1)


def _result(n: int, dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((n,), dtype, layout=_vector(n))


def _i32(value: int) -> Any:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _index(x: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), x)


def _elements(array: Any) -> list[Any]:
    """What a thread holds of an array."""
    return [vector.extract(x, dynamic_position=[], static_position=[0]) for x in array.registers]


def _array(elements: list[Any], like: Any, signed: bool | None) -> Any:
    """An array of what each thread holds; ``signed`` is None of floats."""
    registers = np.empty(len(elements), dtype=object)
    for i, x in enumerate(elements):
        registers[i] = vector.broadcast(ir.VectorType.get((1,), x.type), x)
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=signed)


def gather(ref: Any, at: Int[Array, "n"], interpret: Any) -> Array:
    """The elements of a ref at these indices."""
    if interpret:
        return ref[...][at]
    (n,) = at.shape
    signed = {"i": True, "u": False}.get(jnp.dtype(ref.dtype).kind)

    @_inline(arg_types=(plgpu.RefType(), _vector(n)), return_type=_result(n, ref.dtype))
    def run(_: Any, ref: Any, at: Any) -> Any:
        return _array([memref.load(ref, [_index(i)]) for i in _elements(at)], at, signed)

    return run(ref, at)


def scatter(ref: Any, at: Int[Array, "n"], value: Array, mask: Array, interpret: Any) -> None:
    """Writes where the mask is True."""
    value = value.astype(ref.dtype)
    if interpret:
        whole = ref[...]
        ref[...] = whole.at[jnp.where(mask, at, whole.size)].set(value, mode="drop")
        return
    layout = _vector(at.size)

    @_inline(arg_types=(plgpu.RefType(), layout, layout, layout))
    def run(_: Any, ref: Any, at: Any, value: Any, mask: Any) -> None:
        for i, x, write in zip(*map(_elements, (at, value, mask)), strict=True):
            with ir.InsertionPoint(scf.IfOp(write).then_block):
                memref.store(x, ref, [_index(i)])
                scf.yield_([])

    run(ref, at, value, mask)


def lookup(table: Float[Array, "128"], index: Int[Array, "n"], interpret: Any) -> Array:
    """Entries of a table, at indices from 0 to 15; lane i of every warp holds entry i mod 16."""
    if interpret:
        return table[index]
    (n,) = index.shape

    @_inline(arg_types=(_vector(WARPGROUP), _vector(n)), return_type=_result(n, table.dtype))
    def run(_: Any, table: Any, index: Any) -> Any:
        (entry,) = _elements(table)
        assembly = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        found = [
            llvm.inline_asm(entry.type, [entry, i], assembly, "=f,f,r", has_side_effects=True)
            for i in _elements(index)
        ]
        return _array(found, index, None)

    # An array of one number, repeated, would be held otherwise.
    return run(table, plgpu.layout_cast(index, _vector(n)))


def largest(
    x: Int[Array, "n"], scratch: Any, pairs: int, columns: int, warpgroups: int, interpret: Any
) -> Int[Array, "n"]:
    """For every element of ``[rows, pairs, columns]``, all powers of two, the largest of its pairs.

    The bits of an element's number are, from the lowest, those of its lane, of its warp and of its
    register. So pairs are exchanged between lanes, through memory, and within a thread. The
    scratch has all elements of a program, and is for this call alone.
    """
    (n,) = x.shape
    if interpret:
        blocks = x.reshape(n // (pairs * columns), pairs, columns)
        return jnp.broadcast_to(blocks.max(1, keepdims=True), blocks.shape).reshape(n)
    threads = WARPGROUP * warpgroups
    bits = [1 << i for i in range(32) if columns <= 1 << i < pairs * columns]
    lanes = [bit for bit in bits if bit < _WARP]
    warps = [bit for bit in bits if _WARP <= bit < threads]
    registers = [bit // threads for bit in bits if bit >= threads]

    @_inline(arg_types=(_vector(n), plgpu.RefType()), return_type=_result(n, x.dtype))
    def run(_: Any, x: Any, scratch: Any) -> Any:
        values = _elements(x)
        for bit in registers:
            values = [arith.maxsi(value, values[i ^ bit]) for i, value in enumerate(values)]
        if len(lanes) == _WARP.bit_length() - 1:  # the whole warp
            kind = mgpu.utils.ReductionKind.MAX
            values = [mgpu.utils.redux(value, _i32(-1), kind) for value in values]
        else:
            for bit in lanes:
                values = [arith.maxsi(x, mgpu.utils.shfl_bfly(x, bit)) for x in values]
        if warps:
            values = _over_warps(values, scratch, warps, threads)
        return _array(values, x, True)

    return run(x, scratch)


def _over_warps(values: list[Any], scratch: Any, bits: list[int], threads: int) -> list[Any]:
    """The largest of the elements whose numbers differ in these bits."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    for register, value in enumerate(values):
        memref.store(value, scratch, [_index(arith.addi(thread, _i32(register * threads)))])
    gpu.barrier()
    others = [sum(chosen) for k in range(len(bits)) for chosen in combinations(bits, k + 1)]
    new = []
    for register, largest_yet in enumerate(values):
        for other in others:
            at = arith.addi(arith.xori(thread, _i32(other)), _i32(register * threads))
            largest_yet = arith.maxsi(largest_yet, memref.load(scratch, [_index(at)]))
        new.append(largest_yet)
    return new
