"""Exact moments: two float32 arrays, as AdamW keeps them."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._blocks import Shape
from gefen_jax._types import Codebooks, Moments, Step


@dataclasses.dataclass(frozen=True)
class Exact:
    """Keeps mu and nu of a leaf in float32: 8 bytes per parameter.

    For small leaves, whose bytes do not matter. The arithmetic is that of
    `optax.scale_by_adam`, in its order, so that a plan of exact leaves only is AdamW.

    Examples:
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((64, 512))})
      >>> plan.with_kind("*", gx.Exact()).bytes_per_param > 8
      True
    """

    name: ClassVar[str] = "exact"

    def check(self, shape: Shape) -> None:
        """Every shape fits."""

    def init(self, shape: Shape) -> Moments:
        """Zeros, in two buffers: one shared buffer could not be donated."""
        return Moments(jnp.zeros(shape, jnp.float32), None, jnp.zeros(shape, jnp.float32))

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """Adam's step (Kingma and Ba, arXiv 1412.6980; Dozat 2016 for nesterov)."""
        decay = step.decay
        g32 = step.gradient(g)
        mu = decay.one_minus_b1 * g32 + decay.b1 * moments.mu
        nu = decay.one_minus_b2 * (g32 * g32) + decay.b2 * moments.nu
        if step.nesterov:
            m_hat = decay.b1 * (mu / decay.next_correction1) + decay.one_minus_b1 * (
                g32 / decay.correction1
            )
        else:
            m_hat = mu / decay.correction1
        update = m_hat / (jnp.sqrt(nu / decay.correction2 + decay.eps_root) + decay.eps)
        return update, Moments(mu, None, nu)

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """The moments as they are."""
        return moments.mu, moments.nu

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """The moments as they are."""
        return Moments(mu, None, nu)

    @property
    def scale_block(self) -> None:
        """No codes."""

    def describe(self) -> str:
        """No blocks."""
        return "-"
