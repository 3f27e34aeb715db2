"""The optimizers that the quality bench compares; a new one is a new entry of `VARIANTS`.

Each is called once per seed, outside of `jit`, with the parameters before training and the gradient
of the first batch, for those that want to look at them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import optax

import gefen_jax as gx

Variant = Callable[..., optax.GradientTransformation]


def _adamw(
    learning_rate: optax.Schedule, *, b2: float, weight_decay: float, mask: Any, **_: Any
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)


def _gefen(
    learning_rate: optax.Schedule, *, b2: float, weight_decay: float, mask: Any, **_: Any
) -> optax.GradientTransformation:
    """As it comes: both moments of every element in one byte."""
    return gx.gefen(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)


def _planned(
    rule: Literal["axis", "reference"],
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    params: Any,
    grads: Any,
) -> optax.GradientTransformation:
    """Gefen's own state: one second moment per block, inferred from the first gradient."""
    plan = gx.calibrate(params, grads, rule=rule)
    return gx.gefen(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask, plan=plan)


VARIANTS: dict[str, Variant] = {
    "adamw": _adamw,
    "gefen": _gefen,
    "gefen, shared blocks": functools.partial(_planned, "axis"),
    "gefen, reference rule": functools.partial(_planned, "reference"),
}
