"""Leaves that have no moments: integers, booleans, random keys."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array

from gefen_jax._blocks import Shape
from gefen_jax._types import Codebooks, Moments, Step


@dataclasses.dataclass(frozen=True)
class Untrained:
    """Keeps nothing and passes the gradient through: what a leaf gets that is not a float.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> gx.plan_by_shape({"steps": jnp.zeros(3, jnp.int32)})["steps"].kind
      Untrained()
    """

    name: ClassVar[str] = "untrained"

    def check(self, shape: Shape) -> None:
        """Every shape fits."""

    def init(self, shape: Shape) -> Moments:
        """No state."""
        return Moments(None, None, None)

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """The gradient (zeros, float0 or None) unchanged."""
        return g, moments

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Any, Any]:
        """Nothing, twice."""
        return None, None

    def write(self, mu: Any, nu: Any, codebooks: Codebooks) -> Moments:
        """No state."""
        return Moments(None, None, None)

    @property
    def scale_block(self) -> None:
        """No codes."""

    def describe(self) -> str:
        """No blocks."""
        return "-"
