"""Programs and launches in Pallas' Triton dialect, and all that is taken from there.

The dialect is deprecated since jax 0.11 and will be removed: where it is missing, this package
still imports, and a launch raises.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels._in_place import call_in_place
from pallas_kernels._layout import Layout, StepConfig
from pallas_kernels._step import Call

try:
    from jax.experimental.pallas import triton
except ImportError:  # a jax after the dialect's removal
    triton: Any = None

LANES = 16  # entries of a table that `lookup` reads: a half-warp holds each of them once


def is_available() -> bool:
    """Whether this jax has the Triton dialect of Pallas."""
    return triton is not None


def compiler_params(num_warps: int) -> Any:
    """The parameters of a launch; NotImplementedError where the dialect is missing."""
    if triton is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton dialect of Pallas"
            " (jax.experimental.pallas.triton): use the XLA backend, or an older jax"
        )
    # One stage: the loops that there are, of long blocks, read nothing ahead.
    return triton.CompilerParams(num_warps=num_warps, num_stages=1)


def lookup_assembly() -> str:
    """PTX: the lane's own entry by four levels of selections, and one shuffle.

    Only the shuffle is left per lookup: the selections are the same for all of a table, and ptxas
    keeps one copy. Inside one piece of assembly all the same: what holds one value per lane must
    never be an array that Triton may hand from lane to lane.
    """
    lines = [
        f".reg .b32 lane, bit, t<{LANES - 1}>;",
        ".reg .pred p<4>;",
        "mov.u32 lane, %laneid;",
    ]
    entries, used = [f"${i + 2}" for i in range(LANES)], 0
    for level in range(4):
        lines += [f"and.b32 bit, lane, {1 << level};", f"setp.ne.b32 p{level}, bit, 0;"]
        chosen = []
        for low, high in zip(entries[::2], entries[1::2], strict=True):
            lines.append(f"selp.b32 t{used}, {high}, {low}, p{level};")
            chosen.append(f"t{used}")
            used += 1
        entries = chosen
    # Lanes 16 to 31 hold the entries once more; an index takes them from the first half.
    lines.append(f"shfl.sync.idx.b32 $0, {entries[0]}, $1, 0x1f, 0xffffffff;")
    return "{ " + " ".join(lines) + " }"


class TritonProgram:
    """A `pallas_kernels._program.Program` of ``[rows, items, columns]``, all powers of two."""

    def __init__(self, layout: Layout, config: StepConfig, interpret: bool):
        # One axis of programs, whose number no limit of the hardware's other axes touches;
        # neighbours in memory are neighbours in time.
        self.number = program = pl.program_id(0)
        across = jnp.int32(pl.cdiv(layout.inner, config.columns))
        first_row = jax.lax.div(program, across) * config.rows
        first_column = jax.lax.rem(program, across) * config.columns
        shape = config.tile(layout)
        blocks = shape[::2]
        # Triton lays loads at computed addresses out one element per thread, and others by what it
        # knows of their addresses: up to 16 bytes. Between the two, arrays go through shared memory
        # and its barriers. So where there are tables, it is told nothing: this 0 is not known.
        unknown = (program >> 31) if config.gathers else jnp.int32(0)
        self.row, self.item = first_row + _iota(shape, 0), _iota(shape, 1) ^ unknown
        self.column = first_column + (_iota(shape, 2) ^ unknown)
        self.block_row = first_row + _iota(blocks, 0)
        self.block_column = first_column + _iota(blocks, 1)
        self.items = shape[1]
        self.turns = -(-layout.items // self.items)
        self.padded = layout.items % self.items != 0
        self._interpret = interpret

    def load(self, ref: Any, at: Array, mask: Array) -> Array:
        return triton.load(ref.at[at], mask=mask, other=0)

    def store(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)

    def load_of_blocks(self, ref: Any, at: Array, mask: Array) -> Array:
        return self.load(ref, at, mask)[:, None, :]

    def store_of_blocks(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        self.store(ref, at, jnp.squeeze(value, 1), mask)

    def largest(self, x: Array) -> Array:
        return jnp.max(x, axis=1)[:, None, :]

    def total(self, x: Array) -> Array:
        return jnp.sum(x, axis=1)[:, None, :]

    def gather(self, ref: Any, at: Array) -> Array:
        return triton.load(ref.at[at])

    def table(self, ref: Any, number: int) -> Any:
        at = range(number * LANES, (number + 1) * LANES)
        # Interpreted, one vector: programs of many small operations take long to compile.
        return ref[...][at.start : at.stop] if self._interpret else [ref[i] for i in at]

    def lookup(self, table: Any, index: Array) -> Array:
        # A load at computed addresses would do, but Triton lays such loads out one element per
        # thread and moves addresses and results through shared memory: 29 barriers in a kernel
        # that needs 3.
        if self._interpret:  # which has no assembly
            return table[index]
        entries = (jnp.broadcast_to(entry, index.shape) for entry in table)
        (result,) = triton.elementwise_inline_asm(
            lookup_assembly(),
            args=[index, *entries],
            constraints="=f,r" + ",f" * LANES,
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(index.shape, jnp.float32)],
        )
        return result


def launch(call: Call) -> Sequence[Array]:
    """What the call writes."""
    layout, config = call.layout, call.config

    def kernel(inputs: Any, old: Any, new: Any) -> None:
        program = TritonProgram(layout, config, call.interpret)
        call.body(inputs, old, new, program, layout, call.form)

    return call_in_place(
        kernel,
        call.inputs,
        call.written,
        call.out,
        config.programs(layout),
        compiler_params=compiler_params(config.num_warps),
        interpret=call.interpret,
        name=call.name,
    )


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
