"""The shape of the step of shared blocks, and how it is cut into programs."""

import dataclasses
from typing import ClassVar

from pallas_kernels._layout import (
    MAX_WARPS,
    WARP,
    InAnother,
    Layout,
    StepConfig,
    next_power_of_two,
)

_PER_THREAD = 4  # elements: one 16-byte load of float32
_TARGET = 512  # of a program
# Of an inner axis: 8 float32 are a sector of memory, and so are the 32 codes of four programs next
# to each other. Blocks that do not fit with 8 of them may do so with 4.
_COLUMNS, _FEWEST_COLUMNS = 8, 4
# Of a block that is held whole, with its columns. What is longer is read twice, in turns of so many
# elements of a program.
_MAX_WHOLE, _TURN = 4096, 2048


@dataclasses.dataclass(frozen=True)
class SharedLayout(InAnother):
    """A leaf in memory: row-major ``[blocks, period, inner]``.

    What shares a scale is all of ``[i, :, j]``. With ``nu_per_element``, every element has a second
    moment of its own. The leaf may be a part of another one: see `InAnother`.
    """

    blocks: int
    period: int
    inner: int = 1
    axes: tuple[tuple[int, int], ...] = ()
    nu_per_element: bool = False

    def __post_init__(self):
        self.check(("blocks", "period", "inner"), self.size)

    @property
    def items(self) -> int:
        """Elements that share a scale."""
        return self.period

    @property
    def size(self) -> int:
        """Elements of the leaf."""
        return self.blocks * self.period * self.inner


@dataclasses.dataclass(frozen=True)
class SharedStepConfig(StepConfig):
    """What a program takes: `StepConfig`, and ``items`` of a block at once; all, or in turns."""

    items: int
    gathers: ClassVar[bool] = True

    def tile(self, layout: Layout) -> tuple[int, int, int]:
        """Rows, elements of a block and columns that a program works on at once."""
        return self.rows, self.items, self.columns


def shared_step_config(layout: SharedLayout) -> SharedStepConfig:
    """The config for a layout, by rule; from compiled code, not yet from measurements."""
    items = next_power_of_two(layout.period)
    columns = min(next_power_of_two(layout.inner), _COLUMNS)
    if items * min(columns, _FEWEST_COLUMNS) > _MAX_WHOLE:
        items = _TURN // columns
    columns = min(columns, max(1, _MAX_WHOLE // items))
    rows = min(next_power_of_two(layout.blocks), max(1, _TARGET // (items * columns)))
    if items < layout.period:
        rows = 1
    warps = rows * columns * items // (_PER_THREAD * WARP)
    return SharedStepConfig(rows, columns, min(max(warps, 1), MAX_WARPS), items)
