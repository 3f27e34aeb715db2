"""Whether a state fits gradients, parameters and plan, and what to do where it does not.

What comes from a checkpoint may be of another model, another optimizer, another plan, or without
its NamedTuples; JAX's own words for that name neither the tensor nor a remedy.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from gefen_jax._paths import LeafSpec, named_leaves, path_name
from gefen_jax._types import Kind, Moments

KeyPath = tuple[Any, ...]

OTHER_STATE = (
    "It is the state of other parameters than those that the gradients are of; to train a part of"
    " them, use `optax.partition` or `optax.masked`."
)
OTHER_PARAMS = "Give the parameters that the gradients are of."


def describe(tree: Any) -> str:
    """Dtypes and shapes of the leaves of a tree."""
    leaves = jax.tree.leaves(tree)
    return ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves) or "nothing"


def advice(found: Any, *, takes_adam: bool = True) -> str:
    """How to get the state of an optimizer, of `gefen` if it takes Adam's, from what was found."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    if takes_adam and any(map(is_adam, jax.tree.leaves(found, is_leaf=is_adam))):
        return "A run of AdamW goes on after `gefen_jax.from_adam(opt_state, params)`."
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    # Of a NamedTuple's fields; parameters in the state's place are dicts, too.
    if any(DictKey("count") in path for path in paths):
        return (
            "It was restored as dicts: restore it into the structure of `jax.eval_shape(tx.init,"
            " params)`, which gives it its NamedTuples again."
        )
    return "It has to come from `init` of the optimizer, with the same arguments."


def check_type(state: Any, expected: Any, *, takes_adam: bool = False) -> None:
    """Raises ValueError unless a state has the fields of a NamedTuple."""
    if not all(hasattr(state, field) for field in expected._fields):
        raise ValueError(
            f"`state` must be the {expected.__name__} that `init` returned, found"
            f" {type(state).__name__}. {advice(state, takes_adam=takes_adam)}"
        )


def leaves_like(
    treedef: Any, paths: Sequence[KeyPath], name: str, tree: Any, remedy: str = OTHER_STATE
) -> list[Any]:
    """The leaves of a tree in the order of the gradients' treedef, whose key paths are given."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        wanted, found = (
            [path_name(path) for path in paths],
            [path for path, _ in named_leaves(tree)],
        )
        more = [path for path in found if path not in wanted]
        fewer = [path for path in wanted if path not in found]
        if tree is None:
            what = "is None"
        elif more:
            what = f"has `{more[0]}`, which the gradients have not"
        elif fewer:
            what = f"has no `{fewer[0]}`, which the gradients have"
        else:
            what = f"has other containers than the gradients ({error})"
        raise ValueError(f"`{name}` {what}. {remedy}") from error


def leaves_of(
    state: Any, slots: Sequence[str], paths: Sequence[KeyPath], treedef: Any
) -> list[tuple[Any, ...]]:
    """What a state has in these slots, for every leaf of the gradients, in the treedef's order."""
    trees = (leaves_like(treedef, paths, f"state.{x}", getattr(state, x)) for x in slots)
    return list(zip(*trees, strict=True))


def state_leaves(
    state: Any, paths: Sequence[KeyPath], treedef: Any
) -> tuple[list[LeafSpec], list[Moments]]:
    """The spec and the moments of every leaf at these key paths, in the treedef's order."""
    moments = [Moments(*leaf) for leaf in leaves_of(state, Moments._fields, paths, treedef)]
    specs = [_spec(path_name(path), leaf.mu) for path, leaf in zip(paths, moments, strict=True)]
    return specs, moments


def _spec(path: str, mu: Any) -> LeafSpec:
    # A gradient may be None, the state is always there: mu has the leaf's shape.
    return LeafSpec(path, () if mu is None else tuple(jnp.shape(mu)), mu is not None)


@functools.cache
def _initial(kind: Kind, shape: tuple[int, ...]) -> Moments:
    """The shapes and dtypes of a leaf's state. Kept: tracing them takes as long as a small step."""
    return jax.eval_shape(lambda: kind.init(shape))


def check_state(spec: LeafSpec, kind: Kind, moments: Moments) -> None:
    """The state must be the one that this kind of leaf starts with, in all but its values."""
    expected = _initial(kind, spec.shape)
    same = jax.tree.structure(expected) == jax.tree.structure(moments) and all(
        e.shape == jnp.shape(s) and e.dtype == jnp.result_type(s)
        for e, s in zip(jax.tree.leaves(expected), jax.tree.leaves(moments), strict=True)
    )
    if not same:
        raise ValueError(
            f"the state of `{spec.path}` does not fit its plan, {kind}: expected"
            f" {describe(expected)}, found {describe(moments)}. Use the plan that the state was"
            " made with, and keep its dtypes (no tree.cast)."
        )
