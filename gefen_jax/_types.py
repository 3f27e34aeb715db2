"""What the parts of the package hand to each other."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from gefen_jax._blocks import Shape
from gefen_jax._dither import Place
from gefen_jax._encoder import Encoder
from gefen_jax._levels import Levels


class Decay(NamedTuple):
    """The scalars of one step; t is the number of this step, from 1."""

    b1: Any  # numbers or traced scalars
    b2: Any
    # Subtracted before they become float32: 1 - float32(0.999) is off by 1.3e-5 of itself.
    one_minus_b1: Any
    one_minus_b2: Any
    eps: Any
    eps_root: Any
    correction1: Float[Array, ""]  # 1 - b1^t
    next_correction1: Float[Array, ""]  # 1 - b1^(t + 1), for nesterov
    correction2: Float[Array, ""]  # 1 - b2^t


class Moments(NamedTuple):
    """The state of one leaf: three arrays, or None where a kind keeps none.

    One array per slot, so that each slot of the optimizer's state is a tree like the parameters:
    what pairs the two trees leaf by leaf (nnx, sharding rules, `optax.tree.map_params`) works.
    """

    mu: Any  # codes uint8, or float32; of the leaf's shape
    scale: Any  # float32 per block: what the codes of the first moment are multiplied by
    nu: Any  # float32, or exponents uint8


class Clip(NamedTuple):
    """What clipping by the global norm does to every gradient."""

    norm: Float[Array, ""]
    max_norm: Float[Array, ""]
    idle: Bool[Array, ""]  # the norm is below max_norm


class Rates(NamedTuple):
    """What a fused step does beside the update: with gradients before, with parameters after it."""

    clip: Clip | None
    weight_decay: Any  # a scalar, or None where the weights do not decay
    scale: Float[Array, ""]  # minus the learning rate


class Step(NamedTuple):
    """Everything but the leaf itself that an update needs."""

    decay: Decay
    encoder: Encoder  # of the state's codebook: codes of 8 bits
    levels: Levels  # of the state's codebook4: codes of 4 bits
    phase: UInt32[Array, "two"]  # of this leaf at this step, for the dither
    nesterov: bool
    exact_lookup: bool
    backend: str | None
    rates: Rates | None = None  # of a fused step
    place: Place | None = None  # where the arrays at hand are a part of a leaf
    weight_phase: UInt32[Array, "two"] | None = None  # for the dither of a split weight

    # Where a fused step does what Optax does, it is with its operations in its order
    # (`clip_by_global_norm`, `add_decayed_weights`, `scale_by_learning_rate`, `apply_updates`).

    def gradient(self, g: Array) -> Float[Array, "*shape"]:
        """The gradient that the moments get to see, in float32."""
        if self.rates is None or self.rates.clip is None:
            return g.astype(jnp.float32)
        clip, g = self.rates.clip, g.astype(jnp.float32)
        return jnp.where(clip.idle, g, g / clip.norm * clip.max_norm)

    def moved(self, p: Array, direction: Float[Array, "*shape"]) -> Array:
        """A fused step's new parameter: computed in float32 at least, rounded to p's dtype once."""
        assert self.rates is not None
        wide = jnp.float64 if p.dtype == jnp.float64 else jnp.float32
        theta, update = p.astype(wide), direction.astype(wide)
        if self.rates.weight_decay is not None:
            update = update + self.rates.weight_decay.astype(wide) * theta
        return (theta + self.rates.scale.astype(wide) * update).astype(p.dtype)


class Codebooks(NamedTuple):
    """What the codes of a state stand for: all that reading and writing moments needs."""

    encoder: Encoder  # codes of 8 bits
    levels: Levels  # codes of 4 bits
    exact_lookup: bool  # what `gefen_jax._encoder.lookup_is_exact` found; for writing


@runtime_checkable
class Kind(Protocol):
    """How the moments of one leaf are kept: a frozen, hashable dataclass, one file each.

    Its fields are what a saved plan holds, so they are numbers, strings and tuples of them.
    Invariant: ``mu`` has the leaf's shape, or is None if the leaf has no state at all.
    """

    name: ClassVar[str]

    def check(self, shape: Shape) -> None:
        """Raises ValueError if this kind cannot hold a leaf of this shape."""
        ...

    def init(self, shape: Shape) -> Moments:
        """The moments before the first step."""
        ...

    def update(self, g: Array, moments: Moments, step: Step) -> tuple[Array, Moments]:
        """One step from `Step.gradient`: the direction, float32, and the new moments."""
        ...

    def read(self, moments: Moments, codebooks: Codebooks) -> tuple[Array, Array]:
        """The first and the second moment of every element, float32 of the leaf's shape.

        None, twice, of a leaf without state.
        """
        ...

    def write(self, mu: Array, nu: Array, codebooks: Codebooks) -> Moments:
        """The state whose `read` is nearest to these moments, as this kind can hold them.

        ``mu`` and ``nu`` are float32 of the leaf's shape. No dither: equal moments give equal
        states. Writing what was read gives the same moments again, but for rounding.
        """
        ...

    @property
    def scale_block(self) -> Shape | None:
        """The block whose elements share one momentum scale; None if the kind keeps no codes."""
        ...

    def describe(self) -> str:
        """The blocks in a few characters, for tables."""
        ...


class Weight(NamedTuple):
    """A parameter as the model holds it, and what the state holds of it."""

    high: Array
    low: Array | None  # the correction of `split_weights`, if there is one


class Rounding(NamedTuple):
    """How a weight in 16 bits is kept."""

    bits: int
    stochastic: bool


@runtime_checkable
class Move(Protocol):
    """How a fused step takes a weight, or a piece of it, along."""

    @property
    def rounding(self) -> Rounding | None:
        """None for a parameter that is not split."""
        ...

    def __call__(self, weight: Any, direction: Array, position: Array, step: Step, /) -> Any:
        """The new weight; ``position`` are the row-major positions in the leaf, uint32."""
        ...


@runtime_checkable
class FusedKind(Kind, Protocol):
    """A kind that knows a better way to take the weight along than after `update`."""

    def fused(
        self, weight: Any, g: Array, moments: Moments, step: Step, move: Move
    ) -> tuple[Any, Moments]:
        """One step: what ``move`` makes of the weight, a tree of arrays like the leaf."""
        ...


@runtime_checkable
class JoinedKind(Kind, Protocol):
    """A kind whose leaves can be stepped together, in one loop (`gefen_jax._joined`)."""

    def run(self, shape: Shape) -> int | None:
        """The length of a leaf's blocks where they are runs of consecutive elements, else None.

        With it, leaves of any shapes are stepped as leaves of blocks ``(1, run)``.
        """
        ...

    @property
    def advance(self) -> Callable[..., Any]:
        """What takes the gradient into the moments, a `gefen_jax._backend.Advance`."""
        ...

    def direction(self, g: Array, moments: Moments, step: Step) -> Array:
        """The direction, float32, from the moments that ``advance`` made."""
        ...
