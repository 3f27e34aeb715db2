"""The shape of a dual code's step, and how it is cut into programs."""

import dataclasses

from pallas_kernels._layout import MAX_WARPS, WARP, InAnother, StepConfig, next_power_of_two

# Of a thread: one 16-byte load of float32 per half of a run, and its codes in one word. With more,
# Triton lays bytes and float32 out differently and moves one of them through shared memory.
_PAIRS_PER_THREAD = 4
# Of a program. Blocks of 256 are 128 pairs, a warp each: their maxima need no shared memory.
_TARGET_PAIRS = 512
# Larger programs have all the threads that there can be, with fewer pairs each: 64 registers for
# each of 1,024 are all of a multiprocessor's. Two programs of 512 threads, with four, spilled some.
_FEW_PAIRS = 1024
# Of an inner axis: 8 float32 are a sector of memory.
_COLUMNS = 8
_MAX_PAIRS = 2048  # of a program; longer blocks get fewer columns
MAX_PERIOD = 2 * _PAIRS_PER_THREAD * WARP * MAX_WARPS


@dataclasses.dataclass(frozen=True)
class DualLayout(InAnother):
    """A leaf in memory: row-major ``[blocks, stretches, 2 * half, inner]``.

    What shares a scale is all of ``[i, :, :, j]``: ``period`` elements. A pair is elements k and
    k + half of one stretch. The leaf may be a part of another one: see `InAnother`.
    """

    blocks: int
    stretches: int
    half: int
    inner: int = 1
    axes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        self.check(("blocks", "stretches", "half", "inner"), self.size)

    @property
    def items(self) -> int:
        """Pairs of what shares a scale."""
        return self.stretches * self.half

    @property
    def period(self) -> int:
        """Elements that share a scale."""
        return 2 * self.items

    @property
    def size(self) -> int:
        """Elements of the leaf."""
        return self.blocks * self.period * self.inner


@dataclasses.dataclass(frozen=True)
class DualStepConfig(StepConfig):
    """What a program takes: `StepConfig`; and all pairs of a block."""


def dual_step_config(layout: DualLayout) -> DualStepConfig:
    """The config for a layout, by rule; from compiled code, not yet from measurements."""
    pairs = next_power_of_two(layout.items)
    most = max(1, _MAX_PAIRS // pairs)
    columns = min(next_power_of_two(layout.inner), _COLUMNS, most)
    rows = min(next_power_of_two(layout.blocks), max(1, _TARGET_PAIRS // (pairs * columns)))
    in_all = rows * columns * pairs
    warps = in_all // (_PAIRS_PER_THREAD * WARP) if in_all <= _FEW_PAIRS else MAX_WARPS
    return DualStepConfig(rows, columns, max(warps, 1))
