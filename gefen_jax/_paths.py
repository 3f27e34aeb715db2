"""Leaves of a pytree by name."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from gefen_jax._blocks import Shape


class LeafSpec(NamedTuple):
    """What decides the state of a leaf: its path, its shape, and whether it is trained."""

    path: str
    shape: Shape
    trained: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as a string, e.g. ``layers/0/kernel``; a bare array is ``.``."""
    # Flax boxes its parameters (nnx.Variable, nn.Partitioned) here and hands them out bare there:
    # the box's attribute is no part of the name.
    while path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path, simple=True, separator="/") or "."


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names; None is a leaf of its own."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    return [(path_name(path), leaf) for path, leaf in leaves]


def check_names(paths: Iterable[str]) -> None:
    """Raises ValueError for two leaves of one name: what is kept by name would be mixed up."""
    known: set[str] = set()
    for path in paths:
        if path in known:
            raise ValueError(
                f"two leaves of the parameters have the name `{path}`: a key with a `/` in it reads"
                " like a tree of two levels. Rename one of them."
            )
        known.add(path)


def resolved(tree: Any, params: Any) -> Any:
    """A tree, or what it makes of the parameters if it is a function of them."""
    leaves = jax.tree.leaves(tree)
    # A tree may be callable itself (an Equinox module): its leaves are not.
    return tree(params) if leaves and all(map(callable, leaves)) else tree


def leaf_spec(path: str, leaf: Any) -> LeafSpec:
    """Reads shape and dtype of a parameter; complex ones are refused by name."""
    dtype = jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`params[{path}]` is {dtype}: gefen shares real second moments. Keep real and"
            " imaginary parts as two leaves, or give this leaf to optax.adamw by optax.partition."
        )
    return LeafSpec(path, tuple(jnp.shape(leaf)), bool(jnp.issubdtype(dtype, jnp.floating)))


def param_specs(params: Any) -> list[LeafSpec]:
    """The specs of all leaves of a parameter tree (arrays or ShapeDtypeStructs)."""
    return [leaf_spec(path, leaf) for path, leaf in named_leaves(params) if leaf is not None]
