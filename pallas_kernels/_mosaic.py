"""The dual code's step in Mosaic GPU, Pallas' compiler for NVIDIA GPUs that is to stay."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _mosaic_ops as ops
from pallas_kernels._dual_step import LEVELS, Call, dual_step_body
from pallas_kernels._dual_step_config import DualLayout, DualStepConfig, next_power_of_two
from pallas_kernels._in_place import call_in_place
from pallas_kernels._one_after_another import one_after_another

# Of a thread: with more, 512 threads would need more registers than there are.
_PAIRS = 4
_MAX_WARPGROUPS = 4
_MAX_PAIRS = _PAIRS * ops.WARPGROUP * _MAX_WARPGROUPS


class MosaicProgram:
    """A `pallas_kernels._program.Program`, whose pairs lie in one axis.

    They are ``[rows, pairs, columns]``, all powers of two, row-major. What belongs to a block,
    every pair has.
    """

    def __init__(self, layout: DualLayout, config: DualStepConfig, scratch: Any, interpret: Any):
        self._interpret, self._scratch = interpret, list(scratch)
        self._pairs, self._columns = next_power_of_two(layout.pairs), config.columns
        size = config.rows * self._pairs * self._columns
        self._warpgroups = _warpgroups(size)
        program = ops.program_id(interpret)
        across = jnp.int32(-(-layout.inner // config.columns))
        first_row = jax.lax.div(program, across) * config.rows
        first_column = jax.lax.rem(program, across) * config.columns
        element = ops.iota(size, self._warpgroups, interpret)
        column_bits = self._columns.bit_length() - 1
        pair_bits = self._pairs.bit_length() - 1
        self.row = first_row + (element >> (pair_bits + column_bits))
        self.pair = (element >> column_bits) & (self._pairs - 1)
        self.column = first_column + (element & (self._columns - 1))
        self.block_row, self.block_column = self.row, self.column
        self.padded = layout.pairs != self._pairs

    def load(self, ref: Any, at: Array, mask: Array) -> Array:
        # Element 0 is always there.
        x = ops.gather(ref, jnp.where(mask, at, 0), self._interpret)
        # Mosaic selects no bytes.
        return jnp.where(mask, x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def store(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        ops.scatter(ref, at, value, mask, self._interpret)

    load_of_blocks = load

    def store_of_blocks(self, ref: Any, at: Array, value: Array, mask: Array) -> None:
        self.store(ref, at, value, mask & (self.pair == 0))

    def largest(self, x: Array) -> Array:
        scratch = None if self._interpret else self._scratch.pop()
        return ops.largest(
            x, scratch, self._pairs, self._columns, self._warpgroups, self._interpret
        )

    def table(self, ref: Any, number: int) -> Array:
        # By lane: see `ops.lookup`.
        at = number * LEVELS + (ops.iota(ops.WARPGROUP, 1, self._interpret) & (LEVELS - 1))
        return ops.gather(ref, at, self._interpret)

    def lookup(self, table: Array, index: Array) -> Array:
        return ops.lookup(table, index, self._interpret)


def _warpgroups(size: int) -> int:
    """Of a program of so many pairs."""
    return max(1, size // (_PAIRS * ops.WARPGROUP))


def _of_warpgroups(config: DualStepConfig, layout: DualLayout) -> tuple[DualStepConfig, int]:
    """A config with at least a pair for every thread, and the pairs of its programs."""
    pairs = next_power_of_two(layout.pairs) * config.columns
    rows = max(config.rows, ops.WARPGROUP // pairs)
    return dataclasses.replace(config, rows=rows), rows * pairs


def launch(call: Call) -> Sequence[Array]:
    """What the call writes."""
    layout, config, form, inputs, written, out, interpret = call
    config, size = _of_warpgroups(config, layout)
    if size > _MAX_PAIRS:
        raise NotImplementedError(
            f"`backend` 'mosaic' takes blocks of at most {2 * _MAX_PAIRS} elements, got {layout}:"
            " use the XLA backend for this leaf"
        )
    programs = config.programs(layout)

    def kernel(inputs: Any, old: Any, new: Any, *scratch: Any) -> None:
        program = MosaicProgram(layout, config, scratch, interpret)
        dual_step_body(inputs, old, new, program, layout, form)

    if interpret is True:
        return call_in_place(kernel, inputs, written, out, programs, interpret=True)

    def body(*refs: Any) -> None:
        given = len(inputs) + len(written)
        old, new = refs[len(inputs) : given], refs[given : -ops.MAXIMA]
        kernel(refs[: len(inputs)], old, (*new, *old), *refs[-ops.MAXIMA :])

    warpgroups = 1 if interpret else _warpgroups(size)
    kernel_call = ops.kernel(body, out, size, warpgroups, programs, form.name, interpret)

    @one_after_another
    def run(inputs: list[Array], written: list[Array]) -> list[Array]:
        refs = [jax.new_ref(x) for x in written]
        return [*kernel_call(*inputs, *refs), *map(jax.freeze, refs)]

    return run(inputs, written)
