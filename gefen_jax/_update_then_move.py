"""A fused step of a kind that knows no better way: its update, then the weight's move."""

from typing import Any

from jaxtyping import Array

from gefen_jax._dither import positions
from gefen_jax._types import Kind, Moments, Move, Step


def update_then_move(
    kind: Kind, weight: Any, g: Array, moments: Moments, step: Step, move: Move
) -> tuple[Any, Moments]:
    """What ``move`` makes of the weight, and the new moments."""
    direction, new = kind.update(g, moments, step)
    return move(weight, direction, positions(g.shape, step.place), step), new
