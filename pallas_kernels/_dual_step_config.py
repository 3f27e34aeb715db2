"""The shape of a dual code's step, and how it is cut into programs."""

import dataclasses
import math

# Of a thread: one 16-byte load of float32 per half of a run, and its codes in one word. With more,
# Triton lays bytes and float32 out differently and moves one of them through shared memory.
_PAIRS_PER_THREAD = 4
_WARP = 32
_MAX_WARPS = 32
# Of a program. Blocks of 256 are 128 pairs, a warp each: their maxima need no shared memory.
_TARGET_PAIRS = 512
# Of an inner axis: 8 float32 are a sector of memory. With 16, programs of blocks of 256 have 16
# warps, which ptxas holds to 64 registers, and one or two are spilled.
_COLUMNS = 8
_MAX_PAIRS = 2048  # of a program; longer blocks get fewer columns, the longest more warps than 16
MAX_PERIOD = 2 * _PAIRS_PER_THREAD * _WARP * _MAX_WARPS


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def next_power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class DualLayout:
    """A leaf in memory: row-major ``[blocks, stretches, 2 * half, inner]``.

    What shares a scale is all of ``[i, :, :, j]``: ``period`` elements. A pair is elements k and
    k + half of one stretch.

    The leaf may be a part of another one, with gaps between. Then ``axes`` are the sizes of the
    part's axes and the strides that these have in the whole, the fastest first.
    """

    blocks: int
    stretches: int
    half: int
    inner: int = 1
    axes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in ("blocks", "stretches", "half", "inner"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` of a layout must be at least 1, got {value}")
        if self.axes and math.prod(size for size, _ in self.axes) != self.size:
            raise ValueError(f"`axes` of a layout of {self.size} elements have others: {self.axes}")

    @property
    def faster(self) -> tuple[int, ...]:
        """The sizes of all axes but the slowest."""
        return tuple(size for size, _ in self.axes[:-1])

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all axes, mod 2^32."""
        return tuple(stride % 2**32 for _, stride in self.axes) or (1,)

    @property
    def pairs(self) -> int:
        """Of what shares a scale."""
        return self.stretches * self.half

    @property
    def period(self) -> int:
        """Elements that share a scale."""
        return 2 * self.pairs

    @property
    def size(self) -> int:
        """Elements of the leaf."""
        return self.blocks * self.period * self.inner


@dataclasses.dataclass(frozen=True)
class DualStepConfig:
    """What a program takes: ``rows`` of the axis of blocks, ``columns`` of the inner axis."""

    rows: int
    columns: int
    num_warps: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not _is_power_of_two(value):
                raise ValueError(f"`{name}` of a config must be a power of two, got {value}")
        if self.num_warps > _MAX_WARPS:
            raise ValueError(f"`num_warps` must be at most {_MAX_WARPS}, got {self.num_warps}")

    def programs(self, layout: DualLayout) -> int:
        """How many of them a leaf takes."""
        return -(-layout.blocks // self.rows) * -(-layout.inner // self.columns)


def dual_step_config(layout: DualLayout) -> DualStepConfig:
    """The config for a layout, by rule; from compiled code, not yet from measurements."""
    pairs = next_power_of_two(layout.pairs)
    most = max(1, _MAX_PAIRS // pairs)
    columns = min(next_power_of_two(layout.inner), _COLUMNS, most)
    rows = min(next_power_of_two(layout.blocks), max(1, _TARGET_PAIRS // (pairs * columns)))
    warps = rows * columns * pairs // (_PAIRS_PER_THREAD * _WARP)
    return DualStepConfig(rows, columns, min(max(warps, 1), _MAX_WARPS))
