"""Two moments in one byte: per element, four bits of mu and half of a byte of nu."""

import dataclasses
import functools
from typing import Any, ClassVar

from jaxtyping import Array

from gefen_jax._backend import Advance, in_best_form, kernel_of
from gefen_jax._blocks import Shape, as_block, check_block, flat_view, runs_divide
from gefen_jax._dual_step import advance_dual, direction_dual, fused_dual, read_dual, write_dual
from gefen_jax._packing import SHARED, Packing
from gefen_jax._pairs import paired_axis, stretches
from gefen_jax._types import Codebooks, Moments, Move, Step


@dataclasses.dataclass(frozen=True)
class DualCode:
    """Keeps both moments in one byte per element: 1 + 5 / |block| bytes with what a block needs.

    State of a leaf of shape s: ``mu`` uint8[s], in its low half the code of the element's first
    moment, in its high half four of the eight bits of the second moment that the two elements of a
    pair share; per block a ``scale`` float32[s / block] and in ``nu`` an exponent uint8[s / block].
    The second moment is one of 256 levels, of 16 octaves, below 2^(nu - 127), the first is an entry
    of ``codebook4`` times the scale times the second's root; both are rounded so that they are
    right on average over steps.

    A pair is element i and element i + n / 2 of a run of n along the last axis of the block that
    has an even number of elements.

    Unlike in `SharedBlocks`, blocks need not follow the gradient's structure, and no calibration is
    needed: what 256 elements share is a scale and a range, and two share a second moment.

    Args:
      block: The box that shares a scale and an exponent, e.g. ``(1, 256)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((512, 512))})
      >>> plan["w"].kind
      DualCode(block=(1, 256))
      >>> round(plan.bytes_per_param, 3)
      1.024
    """

    block: Shape
    name: ClassVar[str] = "dual_code"

    _packing: ClassVar[Packing] = SHARED

    def __post_init__(self):
        object.__setattr__(self, "block", as_block(self.block))

    @classmethod
    def has_pairs(cls, block: Shape) -> bool:
        """Whether a block has an axis with halves that are long enough."""
        axis = paired_axis(block)
        return axis is not None and block[axis] >= cls._packing.smallest_run

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless the block is a box of the leaf, divides it, and has pairs."""
        check_block(shape, self.block)
        if not runs_divide(shape, self.block):
            raise ValueError(f"`block` {self.block} of a dual code must divide the leaf, {shape}")
        axis = paired_axis(self.block)
        if axis is None:
            raise ValueError(
                f"`block` {self.block} of a dual code must have an even number of elements along"
                " one axis at least, for pairs"
            )
        if self.block[axis] < self._packing.smallest_run:
            raise ValueError(
                f"`block` {self.block} must have {self._packing.smallest_run} elements at least"
                f" along axis {axis}, whose halves are paired"
            )

    def init(self, shape: Shape) -> Moments:
        """Zero moments: scales of 0, and the exponent of 0."""
        return self._packing.init(shape, self.block)

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """One step; see `gefen_jax._dual_step` for the equations."""
        if (kernel := kernel_of(self.name, g, step.backend)) is not None:
            return kernel.update(g, moments, self.block, step)
        new = in_best_form(self.advance, g, moments, self.block, step, at_once=True)
        return self.direction(g, new, step), new

    def fused(
        self, weight: Any, g: Array, moments: Moments, step: Step, move: Move
    ) -> tuple[Any, Moments]:
        """One step that takes the weight along."""
        if (kernel := kernel_of(self.name, g, step.backend)) is not None:
            return kernel.fused(weight, g, moments, self.block, step, move)
        fused = functools.partial(fused_dual, packing=self._packing, move=move)
        return in_best_form(fused, g, (weight, moments), self.block, step, at_once=True)

    def run(self, shape: Shape) -> int | None:
        """The block's length; None where its pairs, or its elements, are not one run's."""
        view = flat_view(shape, self.block)
        return view.period if view.inner == 1 and stretches(self.block) == 1 else None

    @property
    def advance(self) -> Advance:
        """The step of the moments alone."""
        return functools.partial(advance_dual, packing=self._packing)

    def direction(self, g: Array, moments: Moments, step: Step) -> Array:
        """An elementwise expression."""
        return direction_dual(g, moments, self.block, step, self._packing)

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """What the codes of every element stand for."""
        return read_dual(moments, self.block, codebooks.levels, self._packing)

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """The nearest level of nu, or of a pair's mean nu, then of mu by its root."""
        return write_dual(mu, nu, self.block, codebooks.levels, self._packing)

    @property
    def scale_block(self) -> Shape:
        """The block."""
        return self.block

    def describe(self) -> str:
        """The box, as 1x256."""
        return "x".join(map(str, self.block))
