"""Two moments in one byte: four bits of mu and four bits of nu per element."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._backend import in_best_form
from gefen_jax._blocks import Shape, check_block, stats_shape
from gefen_jax._dual_step import advance_dual, direction_dual, read_dual, write_dual
from gefen_jax._step import by_equal_runs
from gefen_jax._types import Codebooks, Moments, Step


@dataclasses.dataclass(frozen=True)
class DualCode:
    """Keeps both moments of every element in one byte: 1 + 5 / |block| bytes.

    State of a leaf of shape s: ``mu`` uint8[s], the code of the first moment in the low half of a
    byte and that of the second in the high half; per block a ``scale`` float32[s / block] and in
    ``nu`` an exponent uint8[s / block]. The second moment is one of 16 levels below 2^(nu - 127),
    the first is an entry of ``codebook4`` times the scale times the second's root; both are rounded
    so that they are right on average over steps.

    Unlike `SharedBlocks`, every element has a second moment of its own. So blocks need not
    follow the gradient's structure, and no calibration is needed.

    Args:
      block: The box that shares a scale and an exponent, e.g. ``(1, 256)``.

    Examples:
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((512, 512))})
      >>> plan["w"].kind
      DualCode(block=(1, 256))
      >>> round(plan.bytes_per_param, 3)
      1.024
    """

    block: Shape
    name: ClassVar[str] = "dual_code"

    def __post_init__(self):
        object.__setattr__(self, "block", tuple(int(b) for b in self.block))

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless the block is a box of the leaf."""
        check_block(shape, self.block)

    def init(self, shape: Shape) -> Moments:
        """Zero moments: a scale of 0, and the exponent of 0."""
        stats = stats_shape(shape, self.block)
        codes = jnp.zeros(shape, jnp.uint8)
        return Moments(codes, jnp.zeros(stats, jnp.float32), jnp.zeros(stats, jnp.uint8))

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """One step; see `gefen_jax._dual_step` for the equations."""
        new = in_best_form(advance_dual, g, moments, self.block, step)
        return direction_dual(g, new, self.block, step), new

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """What the byte of every element stands for."""
        return read_dual(moments, self.block, codebooks.levels)

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """The nearest level of nu, then of mu relative to its root the nearest entry."""

        def write_part(mu: Array, nu: Array, block: Shape) -> Moments:
            return write_dual(mu, nu, block, codebooks.levels)

        return by_equal_runs(write_part, mu, nu, self.block)

    @property
    def scale_block(self) -> Shape:
        """The block."""
        return self.block

    def describe(self) -> str:
        """The box, as 1x256."""
        return "x".join(map(str, self.block))
