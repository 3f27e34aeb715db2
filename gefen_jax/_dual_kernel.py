"""The dual code's step by the kernel of `pallas_kernels`, in one pass over memory."""

from typing import Any

from jaxtyping import Array

import pallas_kernels
from gefen_jax._backend import NO_DERIVATIVE
from gefen_jax._blocks import Axis, Shape, flat_view
from gefen_jax._dither import strides_at
from gefen_jax._kernel_call import fused_arguments, run_kernel
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._pairs import stretches
from gefen_jax._types import Moments, Move, Step, Weight
from pallas_kernels import DualLayout, DualStepResult, StepScalars


def update(g: Array, moments: Moments, block: Shape, step: Step) -> tuple[Array, Moments]:
    """One step: the direction, in the gradient's dtype, and the new moments."""
    result = _step(g, moments, block, step, {})
    return result.out, _moments(result)


def fused(
    weight: Weight, g: Array, moments: Moments, block: Shape, step: Step, move: Move
) -> tuple[Weight, Moments]:
    """One step that takes the weight along."""
    result = _step(g, moments, block, step, fused_arguments(weight, step, move))
    return Weight(result.out, result.correction), _moments(result)


def _moments(result: DualStepResult) -> Moments:
    return Moments(result.codes, result.scale, result.exponent)


def _step(
    g: Array, moments: Moments, block: Shape, step: Step, others: dict[str, Any]
) -> DualStepResult:
    g, moments = not_differentiable((g, moments), NO_DERIVATIVE)
    backend: Any = step.backend
    offset: Any = 0 if step.place is None else step.place.offset
    axes = Axis(g.shape, strides_at(g.shape, step.place)).steps[::-1]
    view, number = flat_view(g.shape, block), stretches(block)
    layout = DualLayout(view.blocks, number, view.period // number // 2, view.inner, axes)

    def launch(
        interpret: bool,
        g: Array,
        moments: Moments,
        decay: Any,
        codebook: Array,
        phase: Array,
        offset: Any,
        others: Any,
    ) -> DualStepResult:
        return pallas_kernels.dual_step(
            g,
            *moments,
            layout=layout,
            scalars=StepScalars(*decay),
            codebook=codebook,
            phase=phase,
            offset=offset,
            nesterov=step.nesterov,
            backend=backend,
            interpret=interpret,
            **others,
        )

    args = g, moments, step.decay, step.levels.codebook, step.phase, offset, others
    return run_kernel(launch, backend, *args)
