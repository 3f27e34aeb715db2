"""Ways to keep Adam's two moments, simulated: the transformation behind `research.py`.

The moments are float32 arrays, rounded to what the codes of a leaner state could stand for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt32

from gefen_jax._builtin import builtin_codebook, derive
from gefen_jax._constants import SMALL_LEAF
from gefen_jax._dither import dither, leaf_phases, positions

Params = Any
Rounding = Literal["nearest", "random", "golden"]


@dataclass(frozen=True)
class Kept:
    """How the moments of a large leaf are kept. As it stands: exactly, which is Adam.

    Groups are runs of at most `group` elements along `axis`, as long as divides it.
    """

    mu_levels: int = 0  # 0 (exact), 16, 32 or 256, relative to the group's largest
    mu_relative: bool = False  # what is rounded is mu / sqrt(nu), with nu as kept
    mu_rounding: Rounding = "nearest"
    nu: Literal["exact", "mean", "factored", "row-column", "maximum"] = "exact"
    nu_levels: int = 16  # around row x column / mean, or from the group's maximum down
    # Between levels. "mixed": half-octaves near the top, 11 octaves. "float": 4 bits of mantissa.
    nu_ratio: float | Literal["mixed", "float"] = 2.0
    nu_rounding: Rounding = "random"
    nu_pairs: bool = False  # an element shares nu with the one half a group away
    nu_columns: bool = False  # relative to averages over columns
    group: int = 256
    axis: int = -1
    mu_used: Literal["coded", "uncoded"] = "coded"  # in the update
    nu_used: Literal["coded", "uncoded"] = "coded"

    @property
    def bytes_per_parameter(self) -> float:
        """Codes, float32 scales and means, one-byte exponents; rows and columns of 512."""
        mu = math.log2(self.mu_levels) / 8 + 4 / self.group if self.mu_levels else 4
        code = math.log2(self.nu_levels) / 8
        nu = {
            "exact": 4,
            "mean": 4 / self.group,
            "factored": 8 / 512,
            "row-column": code + 8 / 512,
            "maximum": code / (2 if self.nu_pairs else 1) + 1 / self.group,
        }
        return mu + nu[self.nu]


_TINY = np.finfo(np.float32).tiny


class Leaf(NamedTuple):
    """The moments as kept, and averages of g^2 over columns and over rows."""

    mu: Array
    nu: Array
    row: Array
    column: Array


class State(NamedTuple):
    """The leaves' states, in the order of the parameters."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    leaves: list[Leaf]


def _group(x: Array, kept: Kept) -> Float[Array, "... groups elements"]:
    x = jnp.moveaxis(x, kept.axis, -1)
    size = max(d for d in range(1, kept.group + 1) if x.shape[-1] % d == 0)
    return x.reshape(*x.shape[:-1], -1, size)


def _ungroup(x: Array, like: Array, kept: Kept) -> Array:
    """The inverse; x may have one element per group."""
    x = jnp.broadcast_to(x, _group(like, kept).shape)
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1), -1, kept.axis)


def _fraction(how: Rounding, which: int, phase: UInt32[Array, "two"], like: Array) -> Array:
    """In [0, 1), they decide between two levels, of nu (0) or mu (1); a phase per leaf and step."""
    if how == "nearest":
        return jnp.full(like.shape, 0.5)
    key = jax.random.fold_in(jax.random.wrap_key_data(phase), which)
    golden = how == "golden"
    word = (
        dither(phase, positions(like.shape))[which] if golden else jax.random.bits(key, like.shape)
    )
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def _round(x: Array, levels: np.ndarray, fraction: Array) -> Array:
    """One of the two levels around each x, right on average over fractions."""
    table = jnp.asarray(levels, jnp.float32)
    upper = jnp.clip(jnp.searchsorted(table, x), 1, table.size - 1)
    low, high = table[upper - 1], table[upper]
    return jnp.where((x - low) / (high - low) + fraction >= 1, high, low)


@functools.cache
def _codebook(levels: int) -> np.ndarray:
    return np.asarray(derive(levels, 256) if levels == 32 else builtin_codebook(levels))


def _pairs(x: Array, kept: Kept, combine: Callable[[Array, Array], Array]) -> Array:
    """For both elements of every pair, what `combine` makes of the two."""
    groups = _group(x, kept)
    first, second = jnp.split(groups, 2, -1)
    return _ungroup(jnp.tile(combine(first, second), 2), x, kept)


def _levels(kept: Kept) -> list[float]:
    """The levels of nu, relative to its group's largest rounded up."""
    if kept.nu_ratio == "mixed":
        return [2.0**-i for i in range(12)] + [1.5 * 2.0**-i for i in range(1, 5)]
    if kept.nu_ratio == "float":
        return [(1 + (-i % 16) / 16) * 2.0 ** -math.ceil(i / 16) for i in range(kept.nu_levels)]
    return [kept.nu_ratio**-i for i in range(kept.nu_levels)]


def _keep_nu(nu: Array, base: Array, column: Array, kept: Kept, fraction: Array) -> Array:
    """nu as kept; `base` is row x column / mean."""
    if kept.nu_columns:
        unit = jnp.maximum(column, _TINY)
        relative = dataclasses.replace(kept, nu_columns=False)
        return unit * _keep_nu(nu / unit, base, column, relative, fraction)
    if kept.nu in ("exact", "factored"):
        return nu if kept.nu == "exact" else base
    if kept.nu == "mean":
        return _ungroup(jnp.mean(_group(nu, kept), -1, keepdims=True), nu, kept)
    if kept.nu_pairs:
        nu = _pairs(nu, kept, lambda first, second: (first + second) / 2)
        fraction = _pairs(fraction, kept, lambda first, _: first)
    ratio = kept.nu_ratio if isinstance(kept.nu_ratio, float) else 2.0
    if kept.nu == "row-column":
        top = base * ratio**6
    else:  # the group's largest, rounded up to a power of the ratio
        largest = jnp.maximum(jnp.max(_group(nu, kept), -1, keepdims=True), _TINY)
        top = _ungroup(ratio ** jnp.ceil(jnp.log2(largest) / math.log2(ratio)), nu, kept)
    return top * _round(nu / jnp.maximum(top, _TINY), np.sort(_levels(kept)), fraction)


def _keep_mu(mu: Array, nu: Array, kept: Kept, fraction: Array) -> Array:
    """mu as kept; nu as kept already."""
    if not kept.mu_levels:
        return mu
    unit = jnp.maximum(jnp.sqrt(nu), 1e-30) if kept.mu_relative else jnp.ones_like(nu)
    scale = jnp.max(jnp.abs(_group(mu / unit, kept)), -1, keepdims=True)
    scale = _ungroup(jnp.maximum(scale, _TINY), mu, kept)
    return _round(mu / unit / scale, _codebook(kept.mu_levels), fraction) * scale * unit


def _advance(
    g: Array, leaf: Leaf, phase: Array, kept: Kept, b1: float, b2: float
) -> tuple[Leaf, Array, Array]:
    """The state of a leaf a step later, and the moments that its update is made of."""
    square = g * g
    mu = b1 * leaf.mu + (1 - b1) * g
    nu = b2 * leaf.nu + (1 - b2) * square
    if g.ndim < 2 or g.size <= SMALL_LEAF:
        return leaf._replace(mu=mu, nu=nu), mu, nu
    row = b2 * leaf.row + (1 - b2) * jnp.mean(square, -1, keepdims=True)
    column = b2 * leaf.column + (1 - b2) * jnp.mean(square, -2, keepdims=True)
    base = row * column / jnp.maximum(jnp.mean(row, -2, keepdims=True), _TINY)
    new_nu = _keep_nu(nu, base, column, kept, _fraction(kept.nu_rounding, 0, phase, g))
    new_mu = _keep_mu(mu, new_nu, kept, _fraction(kept.mu_rounding, 1, phase, g))
    used_mu = new_mu if kept.mu_used == "coded" else mu
    return Leaf(new_mu, new_nu, row, column), used_mu, new_nu if kept.nu_used == "coded" else nu


def scale_by_kept(kept: Kept, b2: float, b1: float = 0.9) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the moments of large leaves kept in some way."""

    def init(params: Params) -> State:
        def zeros(p: Array) -> Leaf:
            row, column = (p[..., :1], p[..., :1, :]) if p.ndim > 1 else (p, p)
            return Leaf(*(jnp.zeros_like(x) for x in (p, p, row, column)))

        return State(jnp.zeros((), jnp.int32), [zeros(p) for p in jax.tree.leaves(params)])

    def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, State]:
        gs, treedef = jax.tree.flatten(updates)
        count = state.count + 1
        phases = leaf_phases([str(i) for i in range(len(gs))], count)
        correction1, correction2 = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))
        new = [
            _advance(*inputs, kept, b1, b2) for inputs in zip(gs, state.leaves, phases, strict=True)
        ]
        directions = [mu / correction1 / (jnp.sqrt(nu / correction2) + 1e-8) for _, mu, nu in new]
        return treedef.unflatten(directions), State(count, [leaf for leaf, _, _ in new])

    return optax.GradientTransformation(init, update)


def depths(params: Params, state: State, group: int = 256) -> dict[str, list[list[float]]]:
    """How far nu lies below the largest of its group, by leaf.

    The shares of elements more than 7.5, 11 and 15 octaves below (what 16 levels reach with a ratio
    of sqrt 2, with mixed levels, and with 2), in groups along the last axis, then along the first.
    """
    result = {}
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, _), leaf in zip(paths, state.leaves, strict=True):
        if leaf.nu.size > SMALL_LEAF:
            groups = [_group(leaf.nu, Kept(group=group, axis=axis)) for axis in (-1, -2)]
            below = [jnp.max(x, -1, keepdims=True) / jnp.maximum(x, _TINY) for x in groups]
            result[jax.tree_util.keystr(path, simple=True, separator="/")] = [
                [round(float(jnp.mean(x > 2.0**n)), 4) for n in (7.5, 11, 15)] for x in below
            ]
    return result
