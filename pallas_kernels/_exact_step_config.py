"""How small leaves with exact moments are cut into programs."""

import dataclasses
import itertools

from pallas_kernels._layout import InAnother, StepConfig

# Of a program: four elements a thread, as those of the other steps have.
_ELEMENTS, _WARPS = 1024, 8


@dataclasses.dataclass(frozen=True)
class ExactLayout(InAnother):
    """Leaves of these sizes, as one in memory: ``[1, 1, inner]``.

    Each begins where a program does. They are whole leaves, not parts of others.
    """

    sizes: tuple[int, ...]
    axes: tuple[tuple[int, int], ...] = dataclasses.field(default=(), init=False)
    blocks: int = dataclasses.field(default=1, init=False)
    items: int = dataclasses.field(default=1, init=False)

    @property
    def programs(self) -> tuple[int, ...]:
        """The number of every leaf's first program, and how many there are."""
        counts = (-(-size // _ELEMENTS) for size in self.sizes)
        return tuple(itertools.accumulate(counts, initial=0))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where every leaf begins."""
        return tuple(number * _ELEMENTS for number in self.programs[:-1])

    @property
    def inner(self) -> int:
        """Elements, with those that pad the leaves."""
        return self.programs[-1] * _ELEMENTS

    @property
    def size(self) -> int:
        """Elements of all leaves, with those that pad them."""
        return self.inner


def exact_step_config() -> StepConfig:
    """The config of every layout."""
    return StepConfig(rows=1, columns=_ELEMENTS, num_warps=_WARPS)
