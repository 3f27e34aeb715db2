"""What layouts and configs of all steps have in common."""

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

MAX_WARPS = 32  # of a program, by the hardware
WARP = 32


def next_power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << (n - 1).bit_length()


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@runtime_checkable
class Layout(Protocol):
    """A leaf in memory: blocks along one axis and along an inner one, row-major.

    What a program computes with are the items of a block: elements, or pairs of them.
    """

    @property
    def blocks(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def inner(self) -> int: ...


class InAnother:
    """A leaf that may be a part of another one, with gaps between.

    Then ``axes`` are the sizes of the part's axes and the strides that these have in the whole, the
    fastest first.
    """

    axes: tuple[tuple[int, int], ...]

    def check(self, names: tuple[str, ...], size: int) -> None:
        """Raises ValueError unless fields are positive, and the axes those of such a leaf."""
        for name in names:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` of a layout must be at least 1, got {value}")
        if self.axes and math.prod(size for size, _ in self.axes) != size:
            raise ValueError(f"`axes` of a layout of {size} elements have others: {self.axes}")

    @property
    def faster(self) -> tuple[int, ...]:
        """The sizes of all axes but the slowest."""
        return tuple(size for size, _ in self.axes[:-1])

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all axes, mod 2^32."""
        return tuple(stride % 2**32 for _, stride in self.axes) or (1,)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a program takes: ``rows`` of the axis of blocks, ``columns`` of the inner axis."""

    rows: int
    columns: int
    num_warps: int
    gathers: ClassVar[bool] = False  # whether the body reads tables in memory

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not _is_power_of_two(value):
                raise ValueError(f"`{name}` of a config must be a power of two, got {value}")
        if self.num_warps > MAX_WARPS:
            raise ValueError(f"`num_warps` must be at most {MAX_WARPS}, got {self.num_warps}")

    def tile(self, layout: Layout) -> tuple[int, int, int]:
        """Rows, items of a block and columns that a program works on at once, powers of two."""
        return self.rows, next_power_of_two(layout.items), self.columns

    def programs(self, layout: Layout) -> int:
        """How many of them a leaf takes."""
        return -(-layout.blocks // self.rows) * -(-layout.inner // self.columns)
