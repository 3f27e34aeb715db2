"""Flat periods: the reference implementation's state, row-major runs of the flattened leaf."""

import dataclasses
import numbers
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._backend import in_best_form, kernel_of
from gefen_jax._blocks import Shape
from gefen_jax._dither import Place
from gefen_jax._step import advance, direction, read_moments, write_moments
from gefen_jax._types import Codebooks, Moments, Move, Step
from gefen_jax._update_then_move import update_then_move


@dataclasses.dataclass(frozen=True)
class FlatPeriods:
    """Keeps codes, one scale per ``group`` and one nu per ``period`` consecutive elements.

    What ``calibrate(..., rule="reference")`` gives every leaf. A period of 1 keeps nu per element,
    and then the momentum's scales have groups of their own. The statistics are vectors, whatever
    the leaf's rank: prefer `SharedBlocks` on a mesh.

    Args:
      period: Elements that share a nu; divides the leaf's size.
      group: Elements that share a momentum scale: the period, or if that is 1 the largest divisor
        of the size that is at most 256.

    Examples:
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((512, 512))})
      >>> plan.with_kind("w", gx.FlatPeriods(period=1024, group=1024))["w"].kind
      FlatPeriods(period=1024, group=1024)
    """

    period: int
    group: int
    name: ClassVar[str] = "flat_periods"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, numbers.Integral):
                raise TypeError(f"`{field.name}` must be an integer, got {value!r}")
            object.__setattr__(self, field.name, int(value))

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless period and group divide the leaf and agree."""
        size = 1
        for d in shape:
            size *= d
        if self.period < 1 or self.group < 1 or size % self.period or size % self.group:
            raise ValueError(f"`period` {self.period} and `group` {self.group} must divide {size}")
        if self.period > 1 and self.group != self.period:
            raise ValueError(f"`group` {self.group} must be `period` {self.period}, or period 1")

    def init(self, shape: Shape) -> Moments:
        """Zero moments; codes in the leaf's shape, statistics flat."""
        codes = jnp.zeros(shape, jnp.uint8)
        scale = jnp.zeros(codes.size // self.group, jnp.float32)
        return Moments(codes, scale, jnp.zeros(codes.size // self.period, jnp.float32))

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """One step on the flattened leaf; see `gefen_jax._step` for the equations."""
        flat, block, old = g.reshape(-1), (self.group,), _flat(moments)
        if (kernel := kernel_of(self.name, g, step.backend)) is not None:
            update, new = kernel.update(flat, old, block, step)
        else:
            new = in_best_form(advance, flat, old, block, step)
            update = direction(flat, new, block, step)
        return update.reshape(g.shape), new._replace(mu=new.mu.reshape(g.shape))

    def fused(
        self, weight: Any, g: Array, moments: Moments, step: Step, move: Move
    ) -> tuple[Any, Moments]:
        """One step that takes the weight along."""
        if (kernel := kernel_of(self.name, g, step.backend)) is None:
            return update_then_move(self, weight, g, moments, step, move)
        if step.place is not None:  # a layer, which has no gaps
            step = step._replace(place=Place(step.place.offset, (1,)))
        flat = jax.tree.map(lambda x: x.reshape(-1), weight)
        args = flat, g.reshape(-1), _flat(moments), (self.group,), step, move
        weight, new = kernel.fused(*args)
        weight = jax.tree.map(lambda x: x.reshape(g.shape), weight)
        return weight, new._replace(mu=new.mu.reshape(g.shape))

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """As with shared blocks, on the flattened leaf."""
        shape = moments.mu.shape
        mu, nu = read_moments(_flat(moments), (self.group,), codebooks)
        return mu.reshape(shape), nu.reshape(shape)

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """As with shared blocks, on the flattened leaf; with period 1, nu as it is."""
        per_element = self.period == 1
        new = write_moments(
            mu.reshape(-1), nu.reshape(-1), (self.group,), codebooks, per_element=per_element
        )
        return new._replace(mu=new.mu.reshape(mu.shape))

    @property
    def scale_block(self) -> None:
        """No box: the reference's histogram is taken over flat periods."""

    def describe(self) -> str:
        """Period, and group where it differs."""
        return f"{self.period} flat" + ("" if self.group == self.period else f" / {self.group}")


def _flat(moments: Moments) -> Moments:
    return moments._replace(mu=moments.mu.reshape(-1))
