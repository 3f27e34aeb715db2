"""What the parts of the package hand to each other."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, UInt32

from gefen_jax._blocks import Shape
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


class Step(NamedTuple):
    """Everything but the leaf itself that an update needs."""

    decay: Decay
    encoder: Encoder  # of the state's codebook: codes of 8 bits
    levels: Levels  # of the state's codebook4: codes of 4 bits
    phase: UInt32[Array, "two"]  # of this leaf at this step, for the dither
    nesterov: bool
    exact_lookup: bool
    backend: str | None


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
        """One step: the direction, in the gradient's dtype, and the new moments."""
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
