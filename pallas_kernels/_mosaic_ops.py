"""Operations that Mosaic GPU lacks, each beside plain jnp that stands for it when interpreted.

A program has T threads: warpgroups of 128, each of which runs the kernel on vectors of its own. Of
all that the program works on, thread i holds elements i, i + T, i + 2 T and so on, so that
neighbouring threads read neighbours in memory. Mosaic has no loads and stores at computed
addresses, no lookups, and no maxima or sums of parts of such a vector: here they are written for
its compiler.

With `interpret`, True for Pallas' interpreter or the parameters of Mosaic's, there is no GPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
REDUCTIONS = 2  # how often `largest` and `total` may be called in a kernel
_WARP = 32
_PROGRAM, _WARPGROUPS = "program", "warpgroup"
_inline: Any = plgpu.inline_mgpu  # its type knows nothing of the context, the first argument


class Blocks(NamedTuple):
    """How what shares a number lies in a program's elements, ``[rows, items, columns]``.

    All are powers of two.
    """

    items: int
    columns: int
    warpgroups: int


def scratch_size(size: int, columns: int) -> int:
    """Words that `largest` and `total` need, of so many elements: see `_over_warps`."""
    return size // _WARP * min(columns, _WARP)


def kernel(
    body: Any, out: Any, scratch: int, warpgroups: int, programs: int, name: str, interpret: Any
) -> Any:
    """A kernel of so many warpgroups, with so many words of memory for every reduction."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[plgpu.SMEM((scratch,), jnp.int32)] * REDUCTIONS,
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

    # An array of one number, repeated, would be held otherwise.
    return run(ref, plgpu.layout_cast(at, _vector(n)))


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

    return run(table, plgpu.layout_cast(index, _vector(n)))


def largest(x: Int[Array, "n"], scratch: Any, blocks: Blocks, interpret: Any) -> Int[Array, "n"]:
    """For every element the largest of its block. The scratch is for this call alone."""
    if interpret:
        return _spread(x, blocks, jnp.max)
    kind = mgpu.utils.ReductionKind.MAX

    def of_warp(value: Any) -> Any:
        return mgpu.utils.redux(value, _i32(-1), kind)

    return _reduced(x, scratch, blocks, arith.maxsi, of_warp)


def total(x: Float[Array, "n"], scratch: Any, blocks: Blocks, interpret: Any) -> Float[Array, "n"]:
    """For every element the sum of its block. The scratch is for this call alone."""
    if interpret:
        return _spread(x, blocks, jnp.sum)
    return _reduced(x, scratch, blocks, arith.addf, None)


def _spread(x: Array, blocks: Blocks, reduce: Callable[..., Array]) -> Array:
    whole = x.reshape(-1, blocks.items, blocks.columns)
    reduced = reduce(whole, axis=1, keepdims=True)
    return jnp.broadcast_to(reduced, whole.shape).reshape(x.shape)


def _subsets(bits: list[int]) -> list[int]:
    """All sums of some of these bits, in ascending order."""
    return functools.reduce(lambda sums, bit: sums + [bit | x for x in sums], sorted(bits), [0])


def _reduced(
    x: Array,
    scratch: Any,
    blocks: Blocks,
    combine: Callable[[Any, Any], Any],
    of_warp: Callable[[Any], Any] | None,
) -> Array:
    """For every element what its block's are combined to, all of them in the same order.

    The bits of an element's number are, from the lowest, those of its lane, of its warp and of its
    register. So elements are combined within a thread, exchanged between lanes, which give the same
    whichever of two comes first, and through memory. ``of_warp`` does it for all of a warp at once.
    """
    (n,), threads = x.shape, WARPGROUP * blocks.warpgroups
    ends = blocks.columns, blocks.items * blocks.columns
    bits = [1 << i for i in range(32) if ends[0] <= 1 << i < ends[1]]
    lanes = [bit for bit in bits if bit < _WARP]
    warps = [bit // _WARP for bit in bits if _WARP <= bit < threads]
    registers = _subsets([bit // threads for bit in bits if bit >= threads])

    @_inline(arg_types=(_vector(n), plgpu.RefType()), return_type=_result(n, x.dtype))
    def run(_: Any, x: Any, scratch: Any) -> Any:
        own = _elements(x)
        # Of registers of one block the first stands for all: what follows is computed once.
        firsts = [i & ~registers[-1] for i in range(len(own))]
        values = {
            i: functools.reduce(combine, [own[i | other] for other in registers])
            for i in sorted(set(firsts))
        }
        for i, value in values.items():
            if of_warp is not None and len(lanes) == _WARP.bit_length() - 1:
                values[i] = of_warp(value)
                continue
            for bit in lanes:
                value = combine(value, mgpu.utils.shfl_bfly(value, bit))
            values[i] = value
        if warps:
            values = _over_warps(values, scratch, _subsets(warps), blocks, combine)
        return _array([values[i] for i in firsts], x, x.is_signed)

    return run(x, scratch)


def _over_warps(
    values: dict[int, Any],
    scratch: Any,
    warps: list[int],
    blocks: Blocks,
    combine: Callable[[Any, Any], Any],
) -> dict[int, Any]:
    """The values of warps whose numbers differ in the bits of these numbers, combined in order.

    In memory every warp has a word for each of its columns, in which its lanes agree.
    """
    i32, lanes = ir.IntegerType.get_signless(32), min(blocks.columns, _WARP)
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(lanes - 1))
    first_warp = arith.andi(warp, _i32(~warps[-1]))

    def place(number: int, warp: Any) -> list[Any]:
        in_turn = arith.addi(arith.muli(warp, _i32(lanes)), lane)
        words = number * blocks.warpgroups * (WARPGROUP // _WARP) * lanes
        return [_index(arith.addi(in_turn, _i32(words)))]

    for number, value in enumerate(values.values()):
        memref.store(arith.bitcast(i32, value), scratch, place(number, warp))
    gpu.barrier()
    combined = {}
    for number, (register, value) in enumerate(values.items()):
        places = [place(number, arith.ori(first_warp, _i32(other))) for other in warps]
        read = [arith.bitcast(value.type, memref.load(scratch, at)) for at in places]
        combined[register] = functools.reduce(combine, read)
    return combined
