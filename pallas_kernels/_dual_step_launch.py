"""The launch of a dual code's step: checks, small tables, one kernel."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels import _jax_triton_launch, _triton
from pallas_kernels._dual_step import LEVELS, SCALARS, Call, Form
from pallas_kernels._dual_step_config import (
    MAX_PERIOD,
    DualLayout,
    DualStepConfig,
    dual_step_config,
)
from pallas_kernels._one_after_another import OLDEST_JAX
from pallas_kernels._split_weight import BITS, DTYPES

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_DTYPES = {
    "codes": (jnp.uint8,),
    "scale": (jnp.float32,),
    "exponent": (jnp.uint8,),
    "correction": (jnp.int8, jnp.int16),
}
# Pallas' Triton dialect takes offsets of 32 bits, signed, for arrays of up to 2^32 bytes.
_MAX_SIZE = 2**31 - 1


class DualScalars(NamedTuple):
    """The scalars of one step; t is the number of this step, from 1."""

    b1: Any  # numbers or traced scalars
    b2: Any
    one_minus_b1: Any
    one_minus_b2: Any
    eps: Any
    eps_root: Any
    correction1: Any  # 1 - b1^t
    next_correction1: Any  # 1 - b1^(t + 1), for nesterov
    correction2: Any  # 1 - b2^t


class SplitWeight(NamedTuple):
    """What a narrow parameter has beside it, if it stands for a number of more bits."""

    correction: Array | None  # int8 for 24 bits, int16 for 32, None for 16
    phase: Array | None  # two words, uint32, for its dither; None to round to the nearest

    @property
    def bits(self) -> int:
        """Of weight and correction."""
        return BITS[None if self.correction is None else self.correction.dtype]


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


def _scalars(
    scalars: DualScalars, nesterov: bool, others: dict[str, Any]
) -> Float[Array, "scalars"]:
    """What the kernel's `SCALARS` names, in its order."""
    s = DualScalars(*(jnp.asarray(x, jnp.float32) for x in scalars))
    values = {name: getattr(s, name) for name in SCALARS if name in DualScalars._fields}
    values["inverse_correction2"] = 1 / s.correction2
    values["m_factor"] = s.b1 / s.next_correction1 if nesterov else 1 / s.correction1
    values["g_factor"] = s.one_minus_b1 / s.correction1 if nesterov else 0
    values |= others
    return jnp.stack([jnp.asarray(values[name], jnp.float32) for name in SCALARS])


def _check(leaves: dict[str, Array], stats: dict[str, Array], layout: DualLayout) -> None:
    """Raises unless the arrays have the layout's shapes and the right dtypes."""
    for name, x in (leaves | stats).items():
        dtypes = _DTYPES.get(name, _FLOATS)
        if x.dtype not in dtypes:
            names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise TypeError(f"`{name}` must be {names}, got {x.dtype}")
    for group, size in ((leaves, layout.size), (stats, layout.blocks * layout.inner)):
        shapes = {name: x.shape for name, x in group.items()}
        if len(set(shapes.values())) > 1 or any(x.size != size for x in group.values()):
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in group)} must have one shape of {size}"
                f" elements, as {layout} has, got {shapes}"
            )
    if layout.period > MAX_PERIOD or layout.size > _MAX_SIZE:
        raise NotImplementedError(
            f"this kernel takes blocks of at most {MAX_PERIOD} elements and leaves of at most"
            f" {_MAX_SIZE}, got {layout}: use the XLA backend for this leaf"
        )


def _check_split(param: Array | None) -> None:
    """Raises unless the parameter can be a split weight here."""
    if param is None:
        raise ValueError("`split` needs `param`, the weight that it belongs to")
    if param.dtype not in DTYPES:
        names = " or ".join(jnp.dtype(dtype).name for dtype in DTYPES)
        raise TypeError(f"`param` of `split` must be {names}, got {param.dtype}")


def _mosaic_launch(call: Call) -> Sequence[Array]:
    if jax.__version_info__ < OLDEST_JAX:
        raise NotImplementedError(
            f"`backend` 'mosaic' needs jax 0.11.2 or newer, found {jax.__version__}: use another"
        )
    from pallas_kernels import _mosaic  # here, as it takes time

    return _mosaic.launch(call)


# By the name of a backend.
LAUNCHES = {
    "triton": _triton.launch,
    "mosaic": _mosaic_launch,
    "jax_triton": _jax_triton_launch.launch,
}


def dual_step(
    # Their dtypes are checked below, by name.
    g: Num[Array, "*shape"],
    codes: Num[Array, "*shape"],
    scale: Num[Array, "*stats"],
    exponent: Num[Array, "*stats"],
    *,
    layout: DualLayout,
    scalars: DualScalars,
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
    correction, weight_phase = (None, None) if split is None else split
    leaves = {"g": g, "codes": codes, "param": param, "correction": correction}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    _check(leaves, {"scale": scale, "exponent": exponent}, layout)
    if split is not None:
        _check_split(param)
    bits = None if split is None else split.bits
    form = Form(param is not None, nesterov, bits, weight_phase is not None)
    config = dual_step_config(layout) if config is None else config
    others = {
        "gradient_factor": gradient_factor,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }

    like = g if param is None else param
    old = [like, codes, scale, exponent, *([] if correction is None else [correction])]
    flat = [x.reshape(-1) for x in old]
    words = [phase, jnp.asarray(offset, jnp.uint32)[None]]
    inputs = [
        _scalars(scalars, nesterov, others),
        jnp.concatenate(words if weight_phase is None else [*words, weight_phase]),
        _tables(codebook),
        g.reshape(-1),
    ]
    # Never the gradient: whose it is, we do not know, and an alias would then cost a copy.
    fresh = 0 if form.fused else 1
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[:fresh]]
    new = LAUNCHES[backend](Call(layout, config, form, inputs, flat[fresh:], out, interpret))
    return DualStepResult(*(x.reshape(y.shape) for x, y in zip(new, old, strict=True)))
