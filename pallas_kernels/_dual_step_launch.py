"""The launch of a dual code's step: checks, small tables, one kernel."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels._dual_step import LEVELS, dual_step_body
from pallas_kernels._dual_step_config import (
    MAX_PERIOD,
    DualLayout,
    DualStepConfig,
    dual_step_config,
)
from pallas_kernels._launch import (
    SplitWeight,
    StepScalars,
    Weights,
    check,
    launched,
    scalars_of,
    words_of,
)

_DTYPES = {"codes": (jnp.uint8,), "scale": (jnp.float32,), "exponent": (jnp.uint8,)}


class DualStepResult(NamedTuple):
    """What a step returns."""

    out: Array  # the update, in the gradient's dtype; or the new parameter
    codes: Array
    scale: Array
    exponent: Array
    correction: Array | None = None  # of a split weight of more than 16 bits


def _tables(codebook: Float[Array, "16"]) -> Float[Array, "48"]:
    """The codebook and the lines of its gaps; the last entry, x = 1, takes the last gap's."""
    slope = 1 / jnp.diff(codebook)
    offset = jnp.arange(LEVELS - 1, dtype=jnp.float32) - codebook[:-1] * slope
    return jnp.concatenate([codebook, offset, offset[-1:], slope, slope[-1:]])


def dual_step(
    # Their dtypes are checked below, by name.
    g: Num[Array, "*shape"],
    codes: Num[Array, "*shape"],
    scale: Num[Array, "*stats"],
    exponent: Num[Array, "*stats"],
    *,
    layout: DualLayout,
    scalars: StepScalars,
    codebook: Float[Array, "16"],
    phase: UInt32[Array, "two"],
    offset: Any = 0,
    nesterov: bool = False,
    gradient_factor: Any = 1.0,
    param: Num[Array, "*shape"] | None = None,
    learning_rate: Any = 0.0,
    weight_decay: Any = 0.0,
    split: SplitWeight | None = None,
    config: DualStepConfig | None = None,
    backend: Literal["triton", "mosaic", "jax_triton"] = "triton",
    interpret: Any = False,
) -> DualStepResult:
    """One step of a leaf with both moments in a byte per element, in one pass over memory.

    The equations and the dither are those of `gefen_jax._dual_step`. With ``param`` it writes

        param - learning_rate * (update + weight_decay * param),

    computed in float32 and cast once; without, the update. Codes, scales, exponents and the
    parameter are written in place where the caller donates them.

    With ``split``, the parameter is a weight in bfloat16 or float16 that stands for 16, 24 or 32
    bits: it is merged with its correction, moved in float32, and split again, as `gefen_jax._split`
    has it, by the same integers and the same dither. A change of 0 leaves both as they are, bit for
    bit. What is written is the split number itself, also where an update that is added to the old
    weight in float32, as Optax does, could not say so (a new weight below 2^-14 of the old one; in
    float16, 2^-11).

    Args:
      g: The gradient: float32, bfloat16 or float16.
      codes: The bytes of the moments.
      scale: Per block and inner index, row-major: what m is coded relative to. Float32.
      exponent: Likewise, of nu.
      layout: How leaves lie in memory.
      scalars: What the step's equations name.
      codebook: The sorted levels of m, the first -1 and the last 1. Float32.
      phase: The two words of this leaf and this step, for the dither.
      offset: Where the leaf begins in another one that it is a part of: a position, for the dither.
      nesterov: Whether the update looks ahead.
      gradient_factor: What the gradient is multiplied by first (a clip's): a number or a scalar.
      param: The parameter, for the fused form: float32, bfloat16 or float16.
      learning_rate: Of the fused form, a number or a traced scalar.
      weight_decay: Likewise; 0 for a leaf without.
      split: What goes with a weight in bfloat16 or float16; None for a parameter in one part.
      config: How programs are cut; None takes `dual_step_config`.
      backend: "triton" for Pallas' Triton dialect, "mosaic" for Pallas' Mosaic GPU, "jax_triton"
        for `jax_triton.triton_call`.
      interpret: Whether to run without a GPU, slowly; for "mosaic" also the parameters of that
        language's own interpreter. Not for "jax_triton".

    Returns:
      The update in the gradient's dtype, or the new parameter in its own, and the new state.

    Raises:
      TypeError: for other dtypes than these.
      ValueError: for shapes that are not the layout's, and for ``split`` without ``param``.
      NotImplementedError: for blocks or leaves too large for this kernel, and where the backend is
        not installed, or cannot be interpreted.
    """
    factors = {
        "gradient_factor": gradient_factor,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    weights = Weights(param, split)
    leaves = {"g": g, "codes": codes, "param": param, "correction": weights.correction}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    stats = {"scale": scale, "exponent": exponent}
    groups = [(leaves, layout.size), (stats, layout.blocks * layout.inner)]
    check(groups, _DTYPES, layout, weights)
    if layout.period > MAX_PERIOD:
        raise NotImplementedError(
            f"this kernel takes blocks of at most {MAX_PERIOD} elements, got {layout}: use the XLA"
            " backend for this leaf"
        )
    new = launched(
        backend,
        g,
        [codes, scale, exponent],
        weights,
        body=dual_step_body,
        layout=layout,
        config=dual_step_config(layout) if config is None else config,
        form=weights.form(nesterov),
        inputs=[
            scalars_of(scalars, nesterov, factors),
            *words_of(offset, [phase, *weights.phase]),
            _tables(codebook),
            g.reshape(-1),
        ],
        interpret=interpret,
    )
    return DualStepResult(*new)
