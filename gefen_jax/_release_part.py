"""Parts of parameters, gradients and an optimizer's state: some of the leaves, or one layer's.

What is left out is `optax.MaskedNode`, as under `optax.masked`: key paths stay, and so do all
settings that are looked up by them. A layer of stacked leaves keeps its leading axis, of 1, so that
what asks for a rank sees that of the whole leaf.

An array of a state belongs to the parameter whose key path its own path ends with, the longest if
there are several. It is left out with it, and cut along its first axis as the leaf is. All else
(counts, codebooks, learning rates) is shared: every part is stepped from the same values.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt32

from gefen_jax._blocks import row_major
from gefen_jax._dither import Place
from gefen_jax._paths import path_name
from gefen_jax._types import Kind


class Low(NamedTuple):
    """The correction of a split weight, and how the weight is rounded."""

    correction: Array | None
    phase: UInt32[Array, "two"]  # of its dither
    bits: int
    stochastic: bool


class Part(NamedTuple):
    """What an optimizer that steps a part has to know beside its leaves."""

    kinds: Mapping[str, Kind] | None = None  # by path; None for what the leaves at hand say
    layer: Any = None  # which one of stacked leaves; None where leaves are whole
    lows: Mapping[str, Low] = {}  # by path, of weights that are split

    def place(self, shape: tuple[int, ...]) -> Place | None:
        """The place in its leaf of a layer of this shape; None where leaves are whole."""
        if self.layer is None:
            return None
        size = jnp.uint32(math.prod(shape) & 0xFFFFFFFF)
        return Place(jnp.asarray(self.layer).astype(jnp.uint32) * size, row_major(shape))


class Choice(NamedTuple):
    """Which leaves, by the index of their parameter, and which layer of how many."""

    chosen: Collection[int]
    layer: Any = None
    layers: int = 1

    def of(self, leaf: Any) -> Any:
        """This layer of a leaf."""
        if self.layer is None or leaf is None:
            return leaf
        rows = leaf.shape[0] // self.layers
        return jax.lax.dynamic_slice_in_dim(leaf, self.layer * rows, rows)

    def into(self, leaf: Any, new: Any) -> Any:
        """The leaf with this layer replaced."""
        if self.layer is None or leaf is None:
            return new
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, self.layer * new.shape[0], 0)


def is_none(x: Any) -> bool:
    """None is a leaf: a parameter, or a statistic of one, that is not there."""
    return x is None


def flatten(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Leaves with their key paths, None included, and the tree's structure."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)


def owners(tree: Any, params: Any) -> list[int | None]:
    """For every leaf of a state, the index of its parameter; None for what is shared."""
    index = {path: i for i, (path, _) in enumerate(flatten(params)[0])}

    def owner(path: tuple[Any, ...]) -> int | None:
        suffixes = (path[i:] for i in range(len(path) + 1))
        return next((index[p] for p in suffixes if p in index), None)

    return [owner(path) for path, _ in flatten(tree)[0]]


def take(tree: Any, owner: list[int | None], choice: Choice) -> Any:
    """The part of a tree that is chosen, with what is shared."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    part = [
        leaf if i is None else choice.of(leaf) if i in choice.chosen else optax.MaskedNode()
        for leaf, i in zip(leaves, owner, strict=True)
    ]
    return treedef.unflatten(part)


def put(tree: Any, part: Any, owner: list[int | None], choice: Choice, *, shared: bool) -> Any:
    """The tree with a part of it replaced; what is shared only if so asked."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    rows = zip(leaves, treedef.flatten_up_to(part), owner, strict=True)
    merged = [
        (new if shared else leaf)
        if i is None
        else choice.into(leaf, new)
        if i in choice.chosen
        else leaf
        for leaf, new, i in rows
    ]
    return treedef.unflatten(merged)


def check_layers(
    tree: Any, owner: list[int | None], params: Any, choice: Choice, advice: str
) -> None:
    """Raises ValueError unless what belongs to these leaves can be cut into layers."""
    names = [path_name(path) for path, _ in flatten(params)[0]]
    for leaf, i in zip(jax.tree.leaves(tree, is_leaf=is_none), owner, strict=True):
        if i is None or i not in choice.chosen or leaf is None:
            continue
        shape = jnp.shape(leaf)
        if not shape or shape[0] % choice.layers:
            raise ValueError(
                f"`opt_state` has an array of shape {shape} for `{names[i]}`, which cannot be cut"
                f" into {choice.layers} layers along its first axis. {advice}"
            )
