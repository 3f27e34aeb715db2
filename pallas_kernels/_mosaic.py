"""Programs and launches in Mosaic GPU, Pallas' compiler for NVIDIA GPUs that is to stay."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _mosaic_ops as ops
from pallas_kernels._dual_step import LEVELS
from pallas_kernels._in_place import call_in_place
from pallas_kernels._layout import Layout, StepConfig
from pallas_kernels._one_after_another import one_after_another
from pallas_kernels._step import Call

# Items of a thread of up to four warpgroups; and of four, at most: with more, 512 threads would
# need more registers than there are.
_PER_THREAD, _MOST_PER_THREAD = 4, 8
_MAX_WARPGROUPS = 4


class MosaicProgram:
    """A `pallas_kernels._program.Program`, whose items lie in one axis.

    They are ``[rows, items, columns]``, all powers of two, row-major. What belongs to a block,
    every item has.
    """

    def __init__(self, layout: Layout, config: StepConfig, scratch: Any, interpret: Any):
        self._interpret, self._scratch = interpret, list(scratch)
        tile = rows, self.items, columns = config.tile(layout)
        warpgroups = warpgroups_of(math.prod(tile))
        self._blocks = ops.Blocks(self.items, columns, warpgroups)
        self.number = program = ops.program_id(interpret)
        across = jnp.int32(-(-layout.inner // columns))
        first_row = jax.lax.div(program, across) * rows
        first_column = jax.lax.rem(program, across) * columns
        element = ops.iota(math.prod(tile), warpgroups, interpret)
        column_bits, item_bits = (n.bit_length() - 1 for n in (columns, self.items))
        self.row = first_row + (element >> (item_bits + column_bits))
        self.item = (element >> column_bits) & (self.items - 1)
        self.column = first_column + (element & (columns - 1))
        self.block_row, self.block_column = self.row, self.column
        self.turns = -(-layout.items // self.items)
        self.padded = layout.items % self.items != 0

    def load(self, ref: Any, at: Array, mask: Array) -> Array:
        # Element 0 is always there.
        x = ops.gather(ref, jnp.where(mask, at, 0), self._interpret)
        # Mosaic selects no bytes.
        return jnp.where(mask, x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def store(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        ops.scatter(ref, at, value, mask, self._interpret)

    load_of_blocks = load

    def store_of_blocks(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        self.store(ref, at, value, mask & (self.item == 0))

    def largest(self, x: Array) -> Array:
        return ops.largest(x, self._own_scratch(), self._blocks, self._interpret)

    def total(self, x: Array) -> Array:
        return ops.total(x, self._own_scratch(), self._blocks, self._interpret)

    def _own_scratch(self) -> Any:
        return None if self._interpret else self._scratch.pop()

    def gather(self, ref: Any, at: Array) -> Array:
        return ops.gather(ref, at, self._interpret)

    def table(self, ref: Any, number: int) -> Array:
        # By lane: see `ops.lookup`.
        at = number * LEVELS + (ops.iota(ops.WARPGROUP, 1, self._interpret) & (LEVELS - 1))
        return ops.gather(ref, at, self._interpret)

    def lookup(self, table: Array, index: Array) -> Array:
        return ops.lookup(table, index, self._interpret)


def warpgroups_of(size: int) -> int:
    """Of a program of so many items."""
    return min(max(1, size // (_PER_THREAD * ops.WARPGROUP)), _MAX_WARPGROUPS)


def of_warpgroups(config: StepConfig, layout: Layout) -> StepConfig:
    """A config with at least an item for every thread."""
    _, items, columns = config.tile(layout)
    rows = max(config.rows, ops.WARPGROUP // (items * columns))
    return dataclasses.replace(config, rows=rows)


def launch(call: Call) -> Sequence[Array]:
    """What the call writes."""
    layout, interpret = call.layout, call.interpret
    config = of_warpgroups(call.config, layout)
    tile = config.tile(layout)
    size, most = math.prod(tile), _MOST_PER_THREAD * ops.WARPGROUP * _MAX_WARPGROUPS
    if size > most:
        raise NotImplementedError(
            f"`backend` 'mosaic' works on at most {most} items of blocks at once, got {layout} in"
            f" programs of {tile}: use a smaller `config`"
        )
    programs = config.programs(layout)

    def kernel(inputs: Any, old: Any, new: Any, *scratch: Any) -> None:
        program = MosaicProgram(layout, config, scratch, interpret)
        call.body(inputs, old, new, program, layout, call.form)

    inputs, written = call.inputs, call.written
    if interpret is True:
        return call_in_place(kernel, inputs, written, call.out, programs, interpret=True)

    def body(*refs: Any) -> None:
        given = len(inputs) + len(written)
        old, new = refs[len(inputs) : given], refs[given : -ops.REDUCTIONS]
        kernel(refs[: len(inputs)], old, (*new, *old), *refs[-ops.REDUCTIONS :])

    warpgroups = 1 if interpret else warpgroups_of(size)
    scratch = ops.scratch_size(size, tile[2])
    kernel_call = ops.kernel(body, call.out, scratch, warpgroups, programs, call.name, interpret)

    @one_after_another
    def run(inputs: list[Array], written: list[Array]) -> list[Array]:
        refs = [jax.new_ref(x) for x in written]
        return [*kernel_call(*inputs, *refs), *map(jax.freeze, refs)]

    return run(inputs, written)
