"""The step of shared blocks by the kernel of `pallas_kernels`.

Where runs do not divide their axis, the last ones are a leaf of their own: two kernels, and copies,
as the parts are cut out and put together again.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import pallas_kernels
from gefen_jax._backend import NO_DERIVATIVE
from gefen_jax._blocks import Axis, Shape, flat_view, read_cut
from gefen_jax._dither import Place, strides_at
from gefen_jax._kernel_call import fused_arguments, run_kernel
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._step import by_equal_runs
from gefen_jax._types import Moments, Move, Step, Weight
from pallas_kernels import SharedLayout, SharedStepResult, SharedTables, StepScalars


def update(g: Array, moments: Moments, block: Shape, step: Step) -> tuple[Array, Moments]:
    """One step: the direction, in the gradient's dtype, and the new moments."""

    def of_part(g: Array, moments: Moments, block: Shape) -> tuple[Array, Moments]:
        result = _step(g, moments, block, step, {})
        return result.out, _moments(result)

    return by_equal_runs(of_part, g, moments, block)


def fused(
    weight: Weight, g: Array, moments: Moments, block: Shape, step: Step, move: Move
) -> tuple[Weight, Moments]:
    """One step that takes the weight along."""

    def of_part(
        part: Array, others: tuple[Weight, Moments], part_block: Shape
    ) -> tuple[Weight, Moments]:
        here = step
        if part.shape != g.shape:
            axis = read_cut(g.shape, block).axis
            low = 0 if part_block == block else g.shape[axis] - part.shape[axis]
            here = step._replace(place=_moved(g.shape, step.place, axis, low))
        weight, moments = others
        result = _step(part, moments, part_block, here, fused_arguments(weight, here, move))
        return Weight(result.out, result.correction), _moments(result)

    return by_equal_runs(of_part, g, (weight, moments), block)


def _moved(shape: Shape, place: Place | None, axis: int, low: int) -> Place:
    """The place of a part that begins so far along an axis."""
    strides, offset = strides_at(shape, place), 0 if place is None else place.offset
    return Place(jnp.uint32(offset) + np.uint32(low * strides[axis] & 0xFFFFFFFF), strides)


def _moments(result: SharedStepResult) -> Moments:
    return Moments(result.codes, result.scale, result.nu)


def _step(
    g: Array, moments: Moments, block: Shape, step: Step, others: dict[str, Any]
) -> SharedStepResult:
    """Of a leaf in equal blocks; its nu may have an entry per element."""
    g, moments = not_differentiable((g, moments), NO_DERIVATIVE)
    backend: Any = step.backend
    offset: Any = 0 if step.place is None else step.place.offset
    axes = Axis(g.shape, strides_at(g.shape, step.place)).steps[::-1]
    layout = SharedLayout(*flat_view(g.shape, block), axes, moments.nu.shape == g.shape)

    def launch(
        interpret: bool,
        g: Array,
        moments: Moments,
        decay: Any,
        tables: tuple[Array, ...],
        offset: Any,
        others: Any,
    ) -> SharedStepResult:
        return pallas_kernels.shared_step(
            g,
            *moments,
            layout=layout,
            scalars=StepScalars(*decay),
            tables=SharedTables(*tables),
            offset=offset,
            nesterov=step.nesterov,
            backend=backend,
            interpret=interpret,
            **others,
        )

    tables = tuple(step.encoder) if step.exact_lookup else (step.encoder.codebook,)
    return run_kernel(launch, backend, g, moments, step.decay, tables, offset, others)
