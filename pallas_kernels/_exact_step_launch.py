"""The launch of Adam's own step of many small leaves: checks, one kernel."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Num

from pallas_kernels._exact_step import exact_step_body
from pallas_kernels._exact_step_config import ExactLayout, exact_step_config
from pallas_kernels._launch import (
    LAUNCHES,
    SplitWeight,
    StepScalars,
    Weights,
    check,
    scalars_of,
    words_of,
)
from pallas_kernels._step import Call

_DTYPES = {name: (jnp.float32,) for name in ("mu", "nu")}
_WRITTEN = "param", "mu", "nu"


class ExactLeaf(NamedTuple):
    """What a step reads and writes of a leaf: arrays of one shape."""

    param: Array
    mu: Array
    nu: Array
    split: SplitWeight | None = None  # of a parameter that stands for a number of more bits


def exact_steps(
    gradients: Sequence[Num[Array, "..."]],
    leaves: Sequence[ExactLeaf],
    *,
    scalars: StepScalars,
    nesterov: bool = False,
    gradient_factor: Any = 1.0,
    learning_rate: Any = 0.0,
    weight_decay: Any = 0.0,
    backend: Literal["triton", "mosaic"] = "triton",
    interpret: Any = False,
) -> list[ExactLeaf]:
    """One step of leaves with exact moments, of all of them in one kernel.

    The equations are those of `gefen_jax._exact`; what becomes of the parameters, in one part or
    split, `dual_step` says. Parameters and moments are written in place where they are donated.

    Args:
      gradients: Of every leaf, float32, bfloat16 or float16.
      leaves: At least one. Moments are float32. Parameters as `dual_step`'s; if one of them is
        split, all are, and alike.
      scalars: What the step's equations name.
      nesterov: Whether the update looks ahead.
      gradient_factor: What gradients are multiplied by first (a clip's): a number or a scalar.
      learning_rate: A number or a traced scalar.
      weight_decay: Likewise; 0 for leaves without.
      backend: "triton" for Pallas' Triton dialect, "mosaic" for Pallas' Mosaic GPU.
      interpret: As `dual_step`'s.

    Returns:
      The leaves, a step later.

    Raises:
      TypeError: for other dtypes than these.
      ValueError: for no leaves or one without elements, for a leaf whose arrays have several
        shapes, and for weights that are split, but not alike.
      NotImplementedError: for more elements than a kernel counts, and where the backend is not
        installed.
    """
    if not leaves or not all(g.size for g in gradients):
        shapes = [g.shape for g in gradients]
        raise ValueError(f"`leaves` must be at least one, and none of them empty, got {shapes}")
    layout = ExactLayout(tuple(g.size for g in gradients))
    weights = [Weights(leaf.param, leaf.split) for leaf in leaves]
    for g, leaf, weight in zip(gradients, leaves, weights, strict=True):
        arrays = {"g": g, **leaf._asdict(), "split": None, "correction": weight.correction}
        arrays = {name: x for name, x in arrays.items() if x is not None}
        check([(arrays, g.size)], _DTYPES, layout, weight)
    forms = {weight.form(nesterov) for weight in weights}
    if len(forms) != 1:
        raise ValueError(f"`leaves` must be split alike, all or none of them; got {forms}")
    factors = {
        "gradient_factor": gradient_factor,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    words, step = words_of(0, [phase for weight in weights for phase in weight.phase])
    corrections = [x.correction for x in weights if x.correction is not None]
    written = [*(getattr(x, name) for name in _WRITTEN for x in leaves), *corrections]
    call = Call(
        body=exact_step_body,
        layout=layout,
        config=exact_step_config(),
        form=forms.pop(),
        # The step's word is the same for all.
        inputs=[scalars_of(scalars, nesterov, factors), words, step[:1], *map(_flat, gradients)],
        written=[_flat(x) for x in written],
        out=[],
        interpret=interpret,
    )
    new = LAUNCHES[backend](call)
    new = [x.reshape(old.shape) for x, old in zip(new, written, strict=True)]
    n, after = len(leaves), []
    for i, leaf in enumerate(leaves):
        param, mu, nu, *correction = new[i::n]
        split = leaf.split and leaf.split._replace(correction=correction[0] if correction else None)
        after.append(ExactLeaf(param, mu, nu, split))
    return after


def _flat(x: Array) -> Array:
    return x.reshape(-1)
