"""A byte and a half: per element, four bits of mu and eight of a nu of its own."""

import dataclasses
from typing import ClassVar

from gefen_jax._dual_code import DualCode
from gefen_jax._packing import OWN, Packing


@dataclasses.dataclass(frozen=True)
class WideDualCode(DualCode):
    """Keeps both moments in 1.5 bytes per element: 1.5 + 4 / |block| with what a block needs.

    As `DualCode`, but no element shares its second moment: that is AdamW's loss where a pair's
    shared one costs some (`examples/benchmarks/research.md`: fine-tuning with b2 = 0.999).

    State of a leaf of shape s: ``mu`` uint8[s], in its low half the code of the element's first
    moment, in its high half the upper four of the eight bits of its second; ``nu`` uint8, one per
    pair (s with half the paired axis), with the lower four bits of its two elements; per block a
    ``scale`` uint32[s / block]: its lower 8 bits are the exponent, and as a float32 without them it
    is the scale.

    Args:
      block: The box that shares a scale and an exponent, e.g. ``(1, 256)``; its last axis with an
        even number of elements has at least 4.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> plan = gx.plan_by_shape({"w": jnp.zeros((512, 512))}, kind="wide_dual_code")
      >>> plan["w"].kind
      WideDualCode(block=(1, 256))
      >>> round(plan.bytes_per_param, 3)
      1.52
    """

    name: ClassVar[str] = "wide_dual_code"
    _packing: ClassVar[Packing] = OWN
