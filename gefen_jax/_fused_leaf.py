"""One step of a leaf that may be one layer of stacked ones, its weight in one part or in two.

What `gefen_jax.fused_gefen` does with a leaf. Parameters that `gefen_jax.split_weights` has split
are merged, moved and split again where they are read and written: piece by piece in a dual code's
loop on a CPU, so that no leaf is ever an array of float32. A layer of stacked leaves is stepped by
the fractions (`gefen_jax._dither`) that it has in the whole leaf.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gefen_jax._backend import laid_out_like
from gefen_jax._dither import dither, positions
from gefen_jax._release_part import Part
from gefen_jax._split import advance, merge
from gefen_jax._transform import (
    LeafStep,
    Recipe,
    ScaleByGefenState,
    check_parameter,
    step_leaves,
)
from gefen_jax._types import FusedKind, Kind, Moments, Rates, Rounding, Step, Weight


class Place(NamedTuple):
    """What rounding depends on beside the leaf's name and the step."""

    offset: UInt32[Array, ""]  # the row-major position of the first element in the whole leaf
    phase: UInt32[Array, "two"] | None  # of the weight's dither; None where none is split


@functools.partial(
    jax.jit, static_argnames=("kind", "rounding", "nesterov", "exact_lookup", "backend")
)
def _step_jitted(g, weight, moments, arrays, place, *, kind, rounding, **static):
    """The new weight and moments; jitted so that leaves of equal shape are traced once.

    ``arrays`` and ``static`` are the fields of a `Step`; ``rounding`` is None for a parameter that
    is not split.
    """

    def step_here(g: Array, weight: Weight, moments: Moments, arrays: Any, place: Place) -> Any:
        step = Step(**arrays, **static)
        return _step_leaf(g, (weight, moments), step, place, kind, rounding)

    return laid_out_like(weight.high, step_here, g, weight, moments, arrays, place)


def _step_leaf(
    g: Array,
    both: tuple[Weight, Moments],
    step: Step,
    place: Place,
    kind: Kind,
    rounding: Rounding | None,
) -> tuple[Weight, Moments]:
    weight, moments = both
    move = _Move(rounding, place.phase)
    if isinstance(kind, FusedKind):
        return kind.fused(weight, g, moments, step, move, place.offset)
    direction, new = kind.update(g, moments, step)
    return move(weight, direction, positions(g.shape) + place.offset, step), new


class _Move(NamedTuple):
    """The weight after its update: as `Step.moved`, or as `with_split_weights` has it."""

    rounding: Rounding | None
    phase: UInt32[Array, "two"] | None

    def __call__(
        self,
        weight: Weight,
        direction: Float[Array, "..."],
        position: UInt32[Array, "..."],
        step: Step,
        /,
    ) -> Weight:
        if self.rounding is None:
            return weight._replace(high=step.moved(weight.high, direction))
        assert step.rates is not None and self.phase is not None
        update = direction.astype(jnp.float32)
        if step.rates.weight_decay is not None:
            decay = step.rates.weight_decay.astype(jnp.float32)
            update = update + decay * merge(weight.high, weight.low)
        update = step.rates.scale.astype(jnp.float32) * update
        words = dither(self.phase, position)[0] if self.rounding.stochastic else None
        delta, low = advance(weight.high, weight.low, update, self.rounding.bits, words)
        # As `optax.apply_updates` adds: so corrections are those of the unfused form, bit for bit.
        high = (merge(weight.high, None) + delta).astype(weight.high.dtype)
        return Weight(high, low)


def step_part(
    recipe: Recipe,
    part: Part,
    grads: Any,
    state: ScaleByGefenState,
    params: Any,
    rates: Sequence[Rates],
) -> tuple[Any, ScaleByGefenState, dict[str, Array | None]]:
    """One step of some leaves or layers: parameters, state, and corrections by path."""
    treedef = jax.tree.structure(grads, is_leaf=lambda x: x is None)
    leaves, lows = treedef.flatten_up_to(params), {}

    def visit(leaf: LeafStep) -> Moments:
        path, p = leaf.spec.path, leaves[leaf.number]
        check_parameter(leaf.spec, p)
        low = part.lows.get(path)
        weight, new = _step_jitted(
            leaf.g,
            Weight(p, None if low is None else low.correction),
            leaf.moments,
            leaf.arrays | {"rates": rates[leaf.number]},
            Place(part.offset(leaf.spec.shape), None if low is None else low.phase),
            kind=leaf.kind,
            rounding=None if low is None else Rounding(low.bits, low.stochastic),
            **leaf.static,
        )
        leaves[leaf.number] = weight.high
        if low is not None:
            lows[path] = weight.low
        return new

    new_state = step_leaves(recipe, grads, state, visit, part.kinds)
    return treedef.unflatten(leaves), new_state, lows
