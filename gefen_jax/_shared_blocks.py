"""Shared blocks: one byte of momentum per element, one scale and one nu per block."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._backend import in_best_form
from gefen_jax._blocks import Shape, as_block, check_block, stats_shape
from gefen_jax._step import advance, by_equal_runs, direction, read_moments, write_moments
from gefen_jax._types import Codebooks, Moments, Step


@dataclasses.dataclass(frozen=True)
class SharedBlocks:
    """Keeps one code per element and two float32 numbers per block: 1 + 8 / |block| bytes.

    State of a leaf of shape s: ``mu`` uint8[s], ``scale`` and ``nu`` float32[s / block], of the
    leaf's rank. The first moment is ``codebook[mu] * scale``, ``scale`` the largest magnitude in
    the block, ``nu`` the moving average of ``mean_block(g^2)``.

    Args:
      block: The box that shares a scale and a nu: one axis cut into runs, the axes after it whole
        up to some axis, then 1; e.g. ``(1, 768)``, ``(256, 1)``, ``(1, 2, 512)``.

    Examples:
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((512, 512))})
      >>> plan = plan.with_kind("w", gx.SharedBlocks((512, 1)))
      >>> plan["w"].kind
      SharedBlocks(block=(512, 1))
    """

    block: Shape
    name: ClassVar[str] = "shared_blocks"

    def __post_init__(self):
        object.__setattr__(self, "block", as_block(self.block))

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless the block is a box of the leaf."""
        check_block(shape, self.block)

    def init(self, shape: Shape) -> Moments:
        """Zero moments (a scale of 0 makes any code 0)."""
        stats = stats_shape(shape, self.block)
        codes = jnp.zeros(shape, jnp.uint8)
        return Moments(codes, jnp.zeros(stats, jnp.float32), jnp.zeros(stats, jnp.float32))

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """One step; see `gefen_jax._step` for the equations."""
        new = in_best_form(advance, g, moments, self.block, step)
        update = direction(g, new, self.block, step)
        return update, new

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """Entries of the codebook times their scales, and every block's nu for all of it."""
        return read_moments(moments, self.block, codebooks)

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """Nearest codes at the block's scale, and the block's mean of nu."""

        def write_part(mu: Array, nu: Array, block: Shape) -> Moments:
            return write_moments(mu, nu, block, codebooks)

        return by_equal_runs(write_part, mu, nu, self.block)

    @property
    def scale_block(self) -> Shape:
        """The block."""
        return self.block

    def describe(self) -> str:
        """The box, as 1x768."""
        return "x".join(map(str, self.block))
