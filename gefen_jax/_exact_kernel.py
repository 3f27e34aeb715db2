"""Adam's own step of small leaves by the kernel of `pallas_kernels` that takes many at once."""

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array

import pallas_kernels
from gefen_jax._kernel_call import fused_arguments, run_kernel
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._types import Moments, Move, Step, Weight
from pallas_kernels import FLOATS, ExactLeaf, StepScalars

_NO_DERIVATIVE = (
    "a kernel has no derivative: use `backend` None or 'xla' where gefen's update is differentiated"
)


def fits(*arrays: Array) -> bool:
    """Whether parameters and gradients are of dtypes that the kernel takes."""
    return all(jnp.result_type(x) in FLOATS for x in arrays)


def fused(
    leaves: Sequence[tuple[Weight, Array, Moments]], steps: Sequence[Step], move: Move
) -> list[tuple[Weight, Moments]]:
    """One step of leaves, which takes their weights along.

    Steps differ in the phases of the weights only, and weights are split alike.
    """
    first, backend = steps[0], cast(Any, steps[0].backend)
    arrays = list(leaves), first.decay, first.rates
    leaves, decay, rates = not_differentiable(arrays, _NO_DERIVATIVE)
    steps = [step._replace(rates=rates) for step in steps]
    own = [fused_arguments(x[0], step, move) for x, step in zip(leaves, steps, strict=True)]
    shared = {k: x for k, x in own[0].items() if k not in ("param", "split")}
    before = [
        ExactLeaf(x["param"], moments.mu, moments.nu, x["split"])
        for x, (_, _, moments) in zip(own, leaves, strict=True)
    ]

    def launch(
        interpret: bool,
        gradients: list[Array],
        before: list[ExactLeaf],
        decay: Any,
        shared: dict[str, Any],
    ) -> list[ExactLeaf]:
        return pallas_kernels.exact_steps(
            gradients,
            before,
            scalars=StepScalars(*decay),
            nesterov=first.nesterov,
            backend=backend,
            interpret=interpret,
            **shared,
        )

    gradients = [g for _, g, _ in leaves]
    after = run_kernel(launch, backend, gradients, before, decay, shared)
    return [
        (Weight(x.param, x.split and x.split.correction), Moments(x.mu, None, x.nu)) for x in after
    ]
