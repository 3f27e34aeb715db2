"""What the launches of all steps have in common: arguments, their checks, and who launches."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from pallas_kernels import _jax_triton_launch, _triton
from pallas_kernels._one_after_another import OLDEST_JAX
from pallas_kernels._split_weight import BITS, DTYPES
from pallas_kernels._step import SCALARS, Call, Form

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_CORRECTIONS = (jnp.int8, jnp.int16)
# Pallas' Triton dialect takes offsets of 32 bits, signed, for arrays of up to 2^32 bytes.
_MAX_SIZE = 2**31 - 1


class StepScalars(NamedTuple):
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


class Weights(NamedTuple):
    """Of a step's arguments, those of the fused form."""

    param: Array | None
    split: SplitWeight | None

    @property
    def correction(self) -> Array | None:
        """Of a split weight that has one."""
        return None if self.split is None else self.split.correction

    @property
    def phase(self) -> list[UInt32[Array, "two"]]:
        """The words of its dither, or none."""
        return [] if self.split is None or self.split.phase is None else [self.split.phase]

    def form(self, nesterov: bool) -> Form:
        """What of them is compiled in."""
        bits = None if self.split is None else self.split.bits
        return Form(self.param is not None, nesterov, bits, bool(self.phase))


@runtime_checkable
class SizedLayout(Protocol):
    """What of a layout is checked."""

    @property
    def blocks(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def size(self) -> int: ...


def scalars_of(
    scalars: StepScalars, nesterov: bool, factors: dict[str, Any]
) -> Float[Array, "scalars"]:
    """What the kernel's `SCALARS` names, in its order."""
    s = StepScalars(*(jnp.asarray(x, jnp.float32) for x in scalars))
    values = {name: getattr(s, name) for name in SCALARS if name in StepScalars._fields}
    values["inverse_correction2"] = 1 / s.correction2
    values["m_factor"] = s.b1 / s.next_correction1 if nesterov else 1 / s.correction1
    values["g_factor"] = s.one_minus_b1 / s.correction1 if nesterov else 0
    values |= factors
    return jnp.stack([jnp.asarray(values[name], jnp.float32) for name in SCALARS])


def words_of(offset: Any, phases: Sequence[UInt32[Array, "two"]]) -> list[Array]:
    """Of the words of dithers what belongs to the leaf, and what to the step: two inputs.

    A word of every phase, and where the leaf begins in another one; the other words of the phases.
    """
    # Apart, the first are constants and the second the same for all leaves: together they would be
    # an array of every leaf's, and take a kernel each to be written. The position is the last, as
    # XLA has a kernel for (0, x), too: a multiple of (0, 1).
    leaf = [*(phase[:1] for phase in phases), jnp.asarray(offset, jnp.uint32)[None]]
    step = [phase[1:] for phase in phases] or [jnp.zeros(1, jnp.uint32)]
    return [jnp.concatenate(leaf), jnp.concatenate(step)]


def check(
    groups: Sequence[tuple[dict[str, Any], int]],
    dtypes: dict[str, tuple[Any, ...]],
    layout: SizedLayout,
    weights: Weights,
) -> None:
    """Raises unless arrays have their dtype and groups of them one shape of so many elements.

    Those without a dtype of their own are floats.
    """
    for name, x in (item for group, _ in groups for item in group.items()):
        allowed = dtypes.get(name, _CORRECTIONS if name == "correction" else FLOATS)
        if x.dtype not in allowed:
            names = " or ".join(jnp.dtype(dtype).name for dtype in allowed)
            raise TypeError(f"`{name}` must be {names}, got {x.dtype}")
    for group, size in groups:
        shapes = {name: x.shape for name, x in group.items()}
        if len(set(shapes.values())) > 1 or any(x.size != size for x in group.values()):
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in group)} must have one shape of {size}"
                f" elements, as {layout} has, got {shapes}"
            )
    if layout.size > _MAX_SIZE:
        raise NotImplementedError(
            f"this kernel takes leaves of at most {_MAX_SIZE} elements, got {layout}: use the XLA"
            " backend for this leaf"
        )
    if weights.split is not None:
        _check_split(weights.param)


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


def launched(
    backend: str, g: Array, state: Sequence[Array], weights: Weights, **call: Any
) -> list[Array]:
    """The update or the parameter, the state, and the correction if there is one, a step later.

    ``call`` are the fields of a `Call` that do not follow from these.
    """
    like = g if weights.param is None else weights.param
    correction = [] if weights.correction is None else [weights.correction]
    old = [like, *state, *correction]
    flat = [x.reshape(-1) for x in old]
    # Never the gradient: whose it is, we do not know, and an alias would then cost a copy.
    fresh = 1 if weights.param is None else 0
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[:fresh]]
    new = LAUNCHES[backend](Call(**call, written=flat[fresh:], out=out))
    return [x.reshape(y.shape) for x, y in zip(new, old, strict=True)]
