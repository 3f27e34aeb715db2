"""The launch of the step of shared blocks: checks, one kernel."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Num

from pallas_kernels._launch import (
    SplitWeight,
    StepScalars,
    Weights,
    check,
    launched,
    scalars_of,
    words_of,
)
from pallas_kernels._shared_step import CODES, shared_step_body
from pallas_kernels._shared_step_config import (
    SharedLayout,
    SharedStepConfig,
    shared_step_config,
)

_DTYPES = {name: (jnp.float32,) for name in ("scale", "nu", "codebook", "next_threshold")}
_DTYPES |= {name: (jnp.uint8,) for name in ("codes", "count_below")}


class SharedTables(NamedTuple):
    """What codes stand for, and how the nearest one is found.

    A code's threshold is the largest float32 of which it is the nearest. Of equal bins of [-1, 1],
    ``count_below`` says how many thresholds lie in lower ones, and ``next_threshold`` which is the
    next: code = count_below + (x > next_threshold), exactly, if no bin has two. Without these two,
    eight halvings of the codebook find it.
    """

    codebook: Array  # float32 [256], sorted
    count_below: Array | None = None  # uint8 [bins]
    next_threshold: Array | None = None  # float32 [bins]

    @property
    def lookup(self) -> dict[str, Array]:
        """The bins by name, or nothing."""
        pair = {"count_below": self.count_below, "next_threshold": self.next_threshold}
        found = {name: x for name, x in pair.items() if x is not None}
        if len(found) == 1:
            raise ValueError(f"`tables` must have both or neither of {', '.join(pair)}")
        return found


class SharedStepResult(NamedTuple):
    """What a step returns."""

    out: Array  # the update, in the gradient's dtype; or the new parameter
    codes: Array
    scale: Array
    nu: Array
    correction: Array | None = None  # of a split weight of more than 16 bits


def shared_step(
    # Their dtypes are checked below, by name.
    g: Num[Array, "*shape"],
    codes: Num[Array, "*shape"],
    scale: Num[Array, "*stats"],
    nu: Num[Array, "..."],
    *,
    layout: SharedLayout,
    scalars: StepScalars,
    tables: SharedTables,
    offset: Any = 0,
    nesterov: bool = False,
    gradient_factor: Any = 1.0,
    param: Num[Array, "*shape"] | None = None,
    learning_rate: Any = 0.0,
    weight_decay: Any = 0.0,
    split: SplitWeight | None = None,
    config: SharedStepConfig | None = None,
    backend: Literal["triton", "mosaic", "jax_triton"] = "triton",
    interpret: Any = False,
) -> SharedStepResult:
    """One step of a leaf in blocks with a code per element, a scale and a second moment per block.

    The equations are those of `gefen_jax._step`. The fused form, and ``split``, are those of
    `pallas_kernels.dual_step`. Codes, statistics and the parameter are written in place where the
    caller donates them. A block of up to 4,096 elements (1,024 along an axis that is not the last)
    is read once; a longer one twice, whatever its length.

    Args:
      g: The gradient: float32, bfloat16 or float16.
      codes: Of the first moment: what ``codebook`` has there, times the scale. Uint8.
      scale: Per block and inner index, row-major. Float32.
      nu: Likewise, the second moment; or of every element. Float32.
      layout: How leaves lie in memory.
      scalars: What the step's equations name.
      tables: The codebook, and what finds the nearest code.
      offset: Where the leaf begins in another one that it is a part of: a position, for the dither
        of a split weight.
      nesterov: Whether the update looks ahead.
      gradient_factor: What the gradient is multiplied by first (a clip's): a number or a scalar.
      param: The parameter, for the fused form: float32, bfloat16 or float16.
      learning_rate: Of the fused form, a number or a traced scalar.
      weight_decay: Likewise; 0 for a leaf without.
      split: What goes with a weight in bfloat16 or float16; None for a parameter in one part.
      config: How programs are cut; None takes `shared_step_config`.
      backend: As in `pallas_kernels.dual_step`.
      interpret: Likewise.

    Returns:
      The update in the gradient's dtype, or the new parameter in its own, and the new state.

    Raises:
      TypeError: for other dtypes than these.
      ValueError: for shapes that are not the layout's, and for ``split`` without ``param``.
      NotImplementedError: for leaves too large for this kernel, and where the backend is not
        installed, has no such kernel, or cannot be interpreted.
    """
    factors = {
        "gradient_factor": gradient_factor,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    weights, blocks = Weights(param, split), layout.blocks * layout.inner
    leaves = {"g": g, "codes": codes, "param": param, "correction": weights.correction}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    groups = [(leaves, layout.size), ({"scale": scale}, blocks)]
    groups += [({"nu": nu}, layout.size if layout.nu_per_element else blocks)]
    groups += [({"codebook": tables.codebook}, CODES)]
    lookup = tables.lookup
    if lookup:
        groups += [(lookup, lookup["count_below"].size)]
    check(groups, _DTYPES, layout, weights)
    new = launched(
        backend,
        g,
        [codes, scale, nu],
        weights,
        body=shared_step_body,
        layout=layout,
        config=shared_step_config(layout) if config is None else config,
        form=weights.form(nesterov),
        inputs=[
            scalars_of(scalars, nesterov, factors),
            *words_of(offset, weights.phase),
            g.reshape(-1),
            tables.codebook,
            *lookup.values(),
        ],
        interpret=interpret,
    )
    return SharedStepResult(*new)
