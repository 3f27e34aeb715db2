"""What the bodies of all steps have in common: what a launch gets, and how weights move."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels._layout import InAnother, StepConfig
from pallas_kernels._program import Program
from pallas_kernels._split_weight import merge, split

_MANTISSA = 23  # bits of a float32's mantissa
INFINITY = 255 << _MANTISSA  # its bits
TINY = np.float32(2.0**-126)
_MIX1, _MIX2, _MIX3 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x9C8F2D35)

# What a kernel's first input holds, in this order.
SCALARS = (
    "gradient_factor",
    "one_minus_b1",
    "b2",
    "one_minus_b2",
    "eps",
    "eps_root",
    "inverse_correction2",
    "m_factor",  # of m in the numerator of the update
    "g_factor",  # of the gradient there; 0 but for nesterov
    "learning_rate",
    "weight_decay",
)
Scalars = dict[str, Array]  # these, by name


class Form(NamedTuple):
    """What is compiled in."""

    fused: bool  # writes the new parameter, not the update
    nesterov: bool
    bits: int | None  # of a parameter that is a split weight
    stochastic: bool  # a fraction rounds it


class Call(NamedTuple):
    """What a launch gets: one step of a leaf."""

    # (inputs, old, new, program, layout, form): what a program does. Refs have one axis; old are
    # those fields of a `Leaf` that are read, new those that are written, which may lie in place.
    body: Callable[..., None]
    layout: Any
    config: StepConfig
    form: Form
    inputs: list[Array]  # the scalars, ...
    written: list[Array]  # in place: a `Leaf`'s fields, without the parameter if it is not fused
    out: list[jax.ShapeDtypeStruct]  # the update, if it is not fused; the first of what is new
    interpret: Any  # see `dual_step`

    @property
    def name(self) -> str:
        """Of the kernel."""
        step = self.body.__name__.removesuffix("_body")
        return f"gefen_{step}_fused" if self.form.fused else f"gefen_{step}"


class Leaf(NamedTuple):
    """Refs of what a step reads, or of what it writes."""

    param: Any  # written without having been read, it is the update
    mu: Any  # codes, or the numbers themselves
    scale: Any
    nu: Any  # of a dual code the exponent
    correction: Any = None  # of a split weight of more than 16 bits


def leaves(old: Any, new: Any, form: Form) -> tuple[Leaf, Leaf]:
    """The refs of a call as what they are."""
    return Leaf(*([] if form.fused else [None]), *old), Leaf(*new)


def read_scalars(ref: Any) -> Scalars:
    """What a kernel's first input holds."""
    return {name: ref[i] for i, name in enumerate(SCALARS)}


def bits_of(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The bits of floats: those that are not negative have the order of theirs, NaN comes last."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: Int[Array, "..."] | UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The floats of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def root_of(nu: Float[Array, "..."], scalars: Scalars) -> Float[Array, "..."]:
    """sqrt(nu / (1 - b2^t) + eps_root) + eps."""
    return jnp.sqrt(nu * scalars["inverse_correction2"] + scalars["eps_root"]) + scalars["eps"]


def inverse_of(root: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / root, and 0 of 0: what never saw a gradient stays where it is, with eps = 0 too."""
    return 1 / jnp.where(root == 0, jnp.inf, root)


def dither(
    words: tuple[Array, Array, Array], at: Int[Array, "..."], layout: InAnother
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The two fractions of the elements there, in units of 2^-32.

    Of the words, two are the phase, and the third is where the array at hand begins in its leaf.
    """
    word = (words[2] + _position(at, layout)) ^ words[0]
    word = (word ^ (word >> 16)) * _MIX1
    word = (word ^ (word >> 15)) * _MIX2
    return word + words[1], (word ^ (word >> 16)) * _MIX3 + words[1]


def _position(index: Int[Array, "..."], layout: InAnother) -> UInt32[Array, "..."]:
    """Where elements lie in the whole leaf."""
    position, strides = np.uint32(0), tuple(map(np.uint32, layout.strides))
    for size, stride in zip(layout.faster, strides, strict=False):
        here = jax.lax.rem(index, jnp.int32(size)).astype(jnp.uint32)
        position, index = position + here * stride, jax.lax.div(index, jnp.int32(size))
    return position + index.astype(jnp.uint32) * strides[-1]


class Move(NamedTuple):
    """How a program takes the weights of some of its elements along."""

    old: Leaf
    new: Leaf
    scalars: Scalars
    words: tuple[Array, Array, Array] | None  # of the weight's dither: see `dither`
    program: Program
    layout: InAnother
    form: Form

    def __call__(
        self, at: Int[Array, "..."], mask: Bool[Array, "..."], out: Float[Array, "..."]
    ) -> None:
        """Writes the update, or of the fused form the parameter that it gives."""
        if self.form.fused:
            theta, scalars = self._load(at, mask), self.scalars
            change = scalars["learning_rate"] * (out + scalars["weight_decay"] * theta)
            # Not theta - 0, which is no identity for -0, nor where subnormals are flushed.
            out = jnp.where(change == 0, theta, theta - change)
        low = None
        if self.form.bits is not None:
            fraction = None if self.words is None else dither(self.words, at, self.layout)[0]
            out, low = split(out, self.form.bits, self.new.param.dtype, fraction)
        self.program.store(self.new.param, at, out, mask)
        if low is not None:
            self.program.store(self.new.correction, at, low, mask)

    def _load(self, at: Int[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
        load, refs = self.program.load, self.old
        param = load(refs.param, at, mask)
        if self.form.bits is None:
            return param.astype(jnp.float32)
        return merge(param, None if refs.correction is None else load(refs.correction, at, mask))
