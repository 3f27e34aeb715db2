"""The leaves of one step, and which of them are stepped together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from gefen_jax._backend import behind, has_kernels, joined_run
from gefen_jax._paths import LeafSpec
from gefen_jax._specs import Partition
from gefen_jax._types import Kind, Moments

# Leaves of one loop at most: a turn's small copies, a few for each of them, take time, too.
_JOINED_LEAVES = 64

# And of one kernel, which takes two to three times as long to compile with twice as many. Layers
# have 2, 4, 6, 8 or 12 small leaves; so many are those of whole layers, and kernels are alike.
_LEAVES_OF_A_KERNEL = 24


class LeafStep(NamedTuple):
    """What there is to the step of one leaf."""

    number: int  # among the leaves of the gradients
    spec: LeafSpec
    kind: Kind
    partition: Partition | None  # how the plan says that the leaf is cut
    g: Any
    moments: Moments
    phase: Any
    arrays: dict[str, Any]  # the other fields of a `Step`, the same for all leaves: traced ones
    static: dict[str, Any]

    def after(self, last: Array | None) -> "LeafStep":
        """The same, not begun before the codes of the leaf before, ``last``, are there.

        The step of a leaf without blocks is elementwise, in one kernel: it needs no temporaries.
        """
        if self.kind.scale_block is None or has_kernels(self.static["backend"]):
            return self
        moments, own = behind(last, self.moments, self.arrays | {"phase": self.phase})
        return self._replace(moments=moments, phase=own.pop("phase"), arrays=own)


class Joined(NamedTuple):
    """Leaves that can be stepped together."""

    run: int  # the length of their blocks
    leaves: Sequence[LeafStep]
    phases: UInt32[Array, "leaves two"]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(leaf.kind for leaf in self.leaves)


def groups(
    leaves: Sequence[LeafStep], apart: Callable[[LeafStep], Any]
) -> list[tuple[int, list[LeafStep]]]:
    """All leaves, those together that can be stepped together, with the run of their blocks."""
    found: dict[Any, list[LeafStep]] = {}
    for leaf in leaves:
        run = joined_run(leaf.kind, leaf.g, leaf.moments, leaf.static["backend"])
        also = apart(leaf)
        alike = run is not None and also is not None
        dtype = jnp.result_type(leaf.g)
        key = (run, type(leaf.kind), dtype, also) if alike else (0, leaf.number)
        found.setdefault(key, []).append(leaf)
    kernels = leaves and has_kernels(leaves[0].static["backend"])
    most = _LEAVES_OF_A_KERNEL if kernels else _JOINED_LEAVES
    return [
        (key[0], group[i : i + most])
        for key, group in found.items()
        for i in range(0, len(group), most)
    ]
