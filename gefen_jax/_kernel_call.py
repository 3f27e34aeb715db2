"""What the calls of all kernels of `pallas_kernels` have in common."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gefen_jax._types import Move, Step, Weight
from pallas_kernels import SplitWeight


def fused_arguments(weight: Weight, step: Step, move: Move) -> dict[str, Any]:
    """Those of a kernel that takes the weight along."""
    rates, split = step.rates, None
    assert rates is not None
    factor: Any = 1.0
    if rates.clip is not None:
        factor = jnp.where(rates.clip.idle, 1.0, rates.clip.max_norm / rates.clip.norm)
    if move.rounding is not None:
        split = SplitWeight(weight.low, step.weight_phase if move.rounding.stochastic else None)
    return {
        "gradient_factor": factor,
        "param": weight.high,
        "split": split,
        "learning_rate": -rates.scale,
        "weight_decay": 0.0 if rates.weight_decay is None else rates.weight_decay,
    }


def run_kernel(launch: Callable[..., Any], backend: Any, *args: Any) -> Any:
    """``launch(interpret, *args)`` on the device that there is.

    Without a default: for devices other than these JAX raises when it lowers.
    """
    interpreted = {} if backend == "jax_triton" else {"cpu": functools.partial(launch, True)}
    return jax.lax.platform_dependent(*args, cuda=functools.partial(launch, False), **interpreted)
