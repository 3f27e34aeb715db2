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
import optax
from jaxtyping import Array, Float, UInt32

from gefen_jax._backend import in_best_form, laid_out_like
from gefen_jax._blocks import Shape, flat_view, split, split_stats
from gefen_jax._chunks import PairedPiece, Pairs, map_pieces
from gefen_jax._dither import dither, leaf_phases, positions
from gefen_jax._dual_code import DualCode
from gefen_jax._dual_step import (
    _PIECE,
    _blocked,
    _direction,
    _halves,
    _joined,
    _next,
    _nu_code,
    _nu_level,
    _stretches,
    direction_dual,
)
from gefen_jax._encoder import make_encoder
from gefen_jax._levels import make_levels
from gefen_jax._release_part import Part
from gefen_jax._split import advance, merge
from gefen_jax._transform import (
    Recipe,
    ScaleByGefenState,
    _check_gradient,
    _check_parameter,
    by_slot,
    check_state,
    decay_at,
    kinds_of,
    state_leaves,
)
from gefen_jax._types import Kind, Moments, Rates, Step


class Weight(NamedTuple):
    """A parameter as the model holds it, and what the state holds of it."""

    high: Array
    low: Array | None  # the correction of `split_weights`, if there is one


class Place(NamedTuple):
    """What rounding depends on beside the leaf's name and the step."""

    offset: UInt32[Array, ""]  # the row-major position of the first element in the whole leaf
    phase: UInt32[Array, "two"] | None  # of the weight's dither; None where none is split


class Rounding(NamedTuple):
    """How a weight in 16 bits is kept."""

    bits: int
    stochastic: bool


@functools.partial(
    jax.jit, static_argnames=("kind", "rounding", "nesterov", "exact_lookup", "backend")
)
def step_leaf(g, weight, moments, arrays, place, *, kind, rounding, **static):
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
    def move(weight: Weight, direction: Array, position: Array, step: Step) -> Weight:
        return _moved(weight, direction, position, step, place, rounding)

    if isinstance(kind, DualCode):
        fused = functools.partial(_fused_dual, offset=place.offset, move=move)
        return in_best_form(fused, g, both, kind.block, step)
    weight, moments = both
    direction, new = kind.update(g, moments, step)
    return move(weight, direction, positions(g.shape) + place.offset, step), new


def _moved(
    weight: Weight,
    direction: Float[Array, "..."],
    position: UInt32[Array, "..."],
    step: Step,
    place: Place,
    rounding: Rounding | None,
) -> Weight:
    """The weight after its update: as `Step.moved`, or as `with_split_weights` has it."""
    if rounding is None:
        return weight._replace(high=step.moved(weight.high, direction))
    assert step.rates is not None and place.phase is not None
    update = direction.astype(jnp.float32)
    if step.rates.weight_decay is not None:
        decay = step.rates.weight_decay.astype(jnp.float32)
        update = update + decay * merge(weight.high, weight.low)
    update = step.rates.scale.astype(jnp.float32) * update
    words = dither(place.phase, position)[0] if rounding.stochastic else None
    delta, low = advance(weight.high, weight.low, update, rounding.bits, words)
    # As `optax.apply_updates` adds: so corrections are those of the unfused form, bit for bit.
    high = (merge(weight.high, None) + delta).astype(weight.high.dtype)
    return Weight(high, low)


def _fused_dual(
    g: Float[Array, "*shape"],
    both: tuple[Weight, Moments],
    block: Shape,
    step: Step,
    *,
    offset: UInt32[Array, ""],
    move: Any,
    chunk: int | None = None,
) -> tuple[Weight, Moments]:
    """`gefen_jax._dual_step.fused_dual` from this offset, with this way to move a weight."""
    weight, state = both
    if chunk is None:
        position = positions(g.shape) + offset
        new = _advance_dual(g, state, position, block, step)
        return move(weight, direction_dual(g, new, block, step), position, step), new
    view = flat_view(g.shape, block)

    def in_piece(piece: PairedPiece, g: Pairs, both: Any) -> tuple[Weight, Moments]:
        weight, state = both
        first, second = piece.positions(view)
        position = first + offset, second + offset
        state = state._replace(mu=state.mu.halves)
        new = _next(g.halves, state, position, _PIECE, step)
        nu = _nu_level(new.nu, _nu_code(*new.mu))
        halves = []
        for i in range(2):
            update = _direction(g.halves[i], new.mu[i], new.scale, nu, step)
            half = Weight(weight.high.halves[i], weight.low and weight.low.halves[i])
            halves.append(move(half, update, position[i], step))
        new_weight = jax.tree.map(lambda *parts: piece.joined(parts), *halves)
        return new_weight, new._replace(mu=piece.joined(new.mu))

    return map_pieces(in_piece, g, both, view, chunk, stretches=_stretches(block))


def _advance_dual(
    g: Array, state: Moments, position: UInt32[Array, "..."], block: Shape, step: Step
) -> Moments:
    """`gefen_jax._dual_step.advance_dual` at these positions."""
    layout = _blocked(g.shape, block)
    blocked, _ = split(g, block)
    g_halves, mu, positions_ = (
        _halves(x.reshape(blocked.shape), layout.paired) for x in (g, state.mu, position)
    )
    scale, exponent = (split_stats(x, g.shape, block) for x in (state.scale, state.nu))
    new = _next(g_halves, Moments(mu, scale, exponent), positions_, layout, step)
    return _joined(new, state, layout)


def step_part(
    recipe: Recipe,
    part: Part,
    grads: Any,
    state: ScaleByGefenState,
    params: Any,
    rates: Sequence[Rates],
) -> tuple[Any, ScaleByGefenState, dict[str, Array | None]]:
    """One step of some leaves or layers: parameters, state, and corrections by path."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None)
    specs, moments = state_leaves(state, [path for path, _ in flat], treedef)
    kinds = kinds_of(specs, recipe.plan) if part.kinds is None else part.kinds
    count = optax.safe_increment(state.count)
    arrays: dict[str, Any] = {
        "decay": decay_at(recipe.b1, recipe.b2, recipe.eps, recipe.eps_root, count),
        "encoder": make_encoder(state.codebook),
        "levels": make_levels(state.codebook4),
    }
    static = {name: getattr(recipe, name) for name in ("nesterov", "exact_lookup", "backend")}
    phases = leaf_phases([spec.path for spec in specs], jnp.asarray(count))
    leaves, lows = treedef.flatten_up_to(params), {}
    for i, ((_, g), spec) in enumerate(zip(flat, specs, strict=True)):
        kind = kinds[spec.path]
        check_state(spec, kind, moments[i])
        if g is None or not spec.trained:
            continue
        _check_gradient(spec, g)
        _check_parameter(spec, leaves[i])
        low = part.lows.get(spec.path)
        weight, moments[i] = step_leaf(
            g,
            Weight(leaves[i], None if low is None else low.correction),
            moments[i],
            arrays | {"phase": phases[i], "rates": rates[i]},
            Place(part.offset(spec.shape), None if low is None else low.phase),
            kind=kind,
            rounding=None if low is None else Rounding(low.bits, low.stochastic),
            **static,
        )
        leaves[i] = weight.high
        if low is not None:
            lows[spec.path] = weight.low
    slots = by_slot(treedef, moments)
    new = ScaleByGefenState(jnp.asarray(count), state.codebook, state.codebook4, **slots)
    return treedef.unflatten(leaves), new, lows
