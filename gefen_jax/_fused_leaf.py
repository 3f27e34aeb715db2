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

from gefen_jax._backend import (
    JOINED_CHUNK,
    Leaf,
    in_joined_form,
    is_placed,
    kernel_of_many,
)
from gefen_jax._dither import Place, dither
from gefen_jax._groups import Joined, LeafStep
from gefen_jax._laid_out import by_the_compiler
from gefen_jax._release_part import Low, Part
from gefen_jax._shards import shards_of
from gefen_jax._split import advance, merge
from gefen_jax._transform import (
    Recipe,
    ScaleByGefenState,
    check_parameter,
    step_leaves,
)
from gefen_jax._types import FusedKind, Moments, Rates, Rounding, Step, Weight
from gefen_jax._update_then_move import update_then_move

_STATIC = ("nesterov", "exact_lookup", "backend")  # fields of a `Step`


@functools.partial(
    jax.jit,
    static_argnames=("kind", "partition", "rounding", *_STATIC),
)
def _step_jitted(weight, g, moments, arrays, place, *, kind, partition, rounding, **static):
    """The new weight and moments; jitted so that leaves of equal shape are traced once.

    ``arrays`` and ``static`` are the fields of a `Step`; ``rounding`` is None for a parameter that
    is not split; ``place`` is that of a layer.
    """

    def step_here(leaf: Any, shared: Any, place: Place | None) -> tuple[Weight, Moments]:
        weight, g, moments = leaf
        move, step = _Move(rounding), Step(**shared, **static, place=place)
        if isinstance(kind, FusedKind):
            return kind.fused(weight, g, moments, step, move)
        return update_then_move(kind, weight, g, moments, step, move)

    def whole(leaf: Any, shared: Any, place: Place | None) -> tuple[Weight, Moments]:
        weight, _, moments = leaf
        return by_the_compiler(step_here, weight.high, (weight, moments), leaf, shared, place)

    shards = shards_of(kind, partition, weight.high, moments)
    args = (weight, g, moments), arrays, place
    if shards is None:
        return whole(*args)
    weight, moments = shards.map(step_here, *args, whole=whole)
    return weight._replace(high=shards.back_home(weight.high)), moments


@functools.partial(
    jax.jit,
    static_argnames=("kinds", "run", "size", *_STATIC),
)
def _step_joined(leaves, arrays, phases, *, kinds, run, size, **static):
    """What `_step_jitted` gives of each; whole leaves that can be stepped together, not split."""

    def alone(i, leaf, arrays):
        about = {"kind": kinds[i], "partition": None, "rounding": None}
        return _step_jitted(Weight(leaf.weight, None), *leaf[1:], arrays, None, **about, **static)

    def after(i, leaf, arrays):
        return _moved(*leaf, arrays, kind=kinds[i], **static), leaf.moments

    how = {"run": run, "size": size, "static": static, "alone": alone, "after": after}
    results = [(Weight(leaf.weight, None), leaf.moments) for leaf in leaves]
    return in_joined_form(kinds[0].advance, leaves, arrays, phases, results=results, **how)


@functools.partial(jax.jit, static_argnames=("kind", "rounding", *_STATIC))
def _step_in_one_kernel(leaves, arrays, phases, weight_phases, *, kind, rounding, **static):
    """What `_step_jitted` gives of each ``(weight, g, moments)``; whole leaves, split alike."""
    kernel = kernel_of_many(kind.name, static["backend"])
    both = zip(phases, weight_phases, strict=True)
    steps = [Step(**arrays, **static, phase=x, weight_phase=y) for x, y in both]
    return kernel.fused(leaves, steps, _Move(rounding))


@functools.partial(jax.jit, static_argnames=("kind", *_STATIC))
def _moved(p, g, moments, arrays, *, kind, **static):
    """The weight of one leaf after the step of its moments: one elementwise expression."""
    step = Step(**arrays, **static)
    return Weight(step.moved(p, kind.direction(g, moments, step)), None)


class _Move(NamedTuple):
    """The weight after its update: as `Step.moved`, or as `with_split_weights` has it."""

    rounding: Rounding | None

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
        assert step.rates is not None
        update = direction.astype(jnp.float32)
        if step.rates.weight_decay is not None:
            decay = step.rates.weight_decay.astype(jnp.float32)
            update = update + decay * merge(weight.high, weight.low)
        update = step.rates.scale.astype(jnp.float32) * update
        words = None
        if self.rounding.stochastic:
            assert step.weight_phase is not None
            words = dither(step.weight_phase, position)[0]
        delta, low = advance(weight.high, weight.low, update, self.rounding.bits, words)
        # As `optax.apply_updates` adds: so corrections are those of the unfused form, bit for bit.
        high = (merge(weight.high, None) + delta).astype(weight.high.dtype)
        return Weight(high, low)


def _rounding(low: Low | None) -> Rounding | None:
    return None if low is None else Rounding(low.bits, low.stochastic)


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
        own = {"phase": leaf.phase, "rates": rates[leaf.number]}
        if low is not None:
            own["weight_phase"] = low.phase
        weight, new = _step_jitted(
            Weight(p, None if low is None else low.correction),
            leaf.g,
            leaf.moments,
            leaf.arrays | own,
            part.place(leaf.spec.shape),
            kind=leaf.kind,
            partition=leaf.partition,
            rounding=_rounding(low),
            **leaf.static,
        )
        leaves[leaf.number] = weight.high
        if low is not None:
            lows[path] = weight.low
        return new

    def visit_joined(joined: Joined) -> list[Moments]:
        for leaf in joined.leaves:
            check_parameter(leaf.spec, leaves[leaf.number])
        first, own = joined.leaves[0], [part.lows.get(leaf.spec.path) for leaf in joined.leaves]
        arrays = first.arrays | {"rates": rates[first.number]}
        if kernel_of_many(first.kind.name, recipe.backend) is None:
            parts = [Leaf(leaves[leaf.number], leaf.g, leaf.moments) for leaf in joined.leaves]
            about = {"kinds": joined.kinds, "run": joined.run, "size": JOINED_CHUNK}
            results = _step_joined(parts, arrays, joined.phases, **about, **first.static)
        else:
            weights = [
                Weight(leaves[leaf.number], low and low.correction)
                for leaf, low in zip(joined.leaves, own, strict=True)
            ]
            parts = [(w, x.g, x.moments) for w, x in zip(weights, joined.leaves, strict=True)]
            phases = [x.phase for x in joined.leaves], [low and low.phase for low in own]
            about = {"kind": first.kind, "rounding": _rounding(own[0])}
            results = _step_in_one_kernel(parts, arrays, *phases, **about, **first.static)
        for leaf, low, (weight, _) in zip(joined.leaves, own, results, strict=True):
            leaves[leaf.number] = weight.high
            if low is not None:
                lows[leaf.spec.path] = weight.low
        return [new for _, new in results]

    def apart(leaf: LeafStep) -> Any:
        p, low = leaves[leaf.number], part.lows.get(leaf.spec.path)
        kernel = kernel_of_many(leaf.kind.name, recipe.backend)
        fits = low is None if kernel is None else kernel.fits(p, leaf.g)
        if part.layer is not None or is_placed(p) or not fits:
            return None
        return rates[leaf.number].weight_decay is None, _rounding(low)

    new_state = step_leaves(recipe, grads, state, visit, visit_joined, part.kinds, apart)
    return treedef.unflatten(leaves), new_state, lows
