"""A tensor as matrices: which axes Muon reads as input, as output, and as a batch.

`optax.contrib.MuonDimensionNumbers` names the reduction axes (input) and the output axes of a
kernel; all others are a batch. They are looked up by key path, and an entry speaks for all leaves
below it: so they may be a tree like the parameters, a prefix of it, or one entry for all.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from gefen_jax._blocks import Shape
from gefen_jax._paths import path_name, resolved

KeyPath = tuple[Any, ...]


class Axes(NamedTuple):
    """The axes of a leaf by their role; together they are all of them, once."""

    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch + self.reduction + self.output


def _is_entry(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


class DimensionNumbers:
    """The entries of a specification (a tree, a prefix of it, or a function of it) by key path."""

    def __init__(self, spec: Any, tree: Any):
        self._spec, self._tree = spec, tree

    @functools.cached_property
    def _entries(self) -> dict[KeyPath, Any]:
        # Not before a leaf asks: a function may not know what to do with the tree without leaves
        # that `optax.tree.map_params` sends.
        spec = resolved(self._spec, self._tree)
        return dict(jax.tree_util.tree_flatten_with_path(spec, is_leaf=_is_entry)[0])

    def __getitem__(self, path: KeyPath) -> MuonDimensionNumbers | None:
        """The entry of a leaf, or of the nearest subtree that has one."""
        for length in range(len(path), -1, -1):
            if path[:length] in self._entries:
                entry = self._entries[path[:length]]
                if not _is_entry(entry):
                    break
                return entry
        raise ValueError(
            f"the dimension numbers of `{path_name(path)}` are missing: give every leaf, or a"
            " subtree above it, an optax.contrib.MuonDimensionNumbers, or None"
        )


def _axes(name: str, ndim: int, axes: Any) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"`{name}` has {ndim} axes, but its dimension numbers name {axes}")
    return tuple(a % ndim for a in axes)


def read_axes(name: str, shape: Shape, entry: MuonDimensionNumbers | None) -> Axes:
    """The roles of a leaf's axes.

    Args:
      name: The leaf's path, for errors.
      shape: Its shape.
      entry: Its dimension numbers; None means a plain matrix.

    Returns:
      Its `Axes`; the batch axes in the leaf's order.

    Raises:
      ValueError: For a leaf that is no matrix and has no dimension numbers, and for dimension
        numbers that do not fit the leaf.
    """
    ndim = len(shape)
    if ndim < 2 or (entry is None and ndim != 2):
        raise ValueError(
            f"`{name}` has shape {shape}, which is no matrix: give its axes as"
            " optax.contrib.MuonDimensionNumbers, or give it to another optimizer (a vector"
            " always; `gefen_muon` does so by itself)"
        )
    entry = MuonDimensionNumbers() if entry is None else entry
    reduction = _axes(name, ndim, entry.reduction_axis)
    output = _axes(name, ndim, entry.output_axis)
    if len({*reduction, *output}) < len(reduction + output):
        raise ValueError(f"`{name}` of shape {shape}: {entry} names an axis twice")
    batch = tuple(a for a in range(ndim) if a not in reduction + output)
    return Axes(batch, reduction, output)


def fans(shape: Shape, axes: Axes) -> tuple[int, int]:
    """Rows and columns of the matrices: fan in and fan out."""
    return math.prod(shape[a] for a in axes.reduction), math.prod(shape[a] for a in axes.output)


def to_matrices(x: Array, axes: Axes) -> Array:
    """The leaf as ``[*batch, fan_in, fan_out]``."""
    # Batch axes stay apart: a plain kernel, or a stack of them, is not even reshaped.
    batch = tuple(x.shape[a] for a in axes.batch)
    return x.transpose(axes.order).reshape(batch + fans(x.shape, axes))


def from_matrices(x: Array, shape: Shape, axes: Axes) -> Array:
    """The inverse of `to_matrices`, for a leaf of this shape."""
    inverse = tuple(axes.order.index(a) for a in range(len(shape)))
    return x.reshape(tuple(shape[a] for a in axes.order)).transpose(inverse)


def shape_factor(shape: Shape, axes: Axes, consistent_rms: Any) -> Any:
    """What an orthogonal matrix of this shape is multiplied by.

    ``sqrt(max(1, fan_out / fan_in))``, or with ``consistent_rms`` r, ``r sqrt(max(fan_in,
    fan_out))``: an update whose elements are of size r, whatever the shape.
    """
    fan_in, fan_out = fans(shape, axes)
    if consistent_rms is None:
        return math.sqrt(max(1.0, fan_out / max(fan_in, 1)))
    return math.sqrt(max(fan_in, fan_out)) * jnp.asarray(consistent_rms, jnp.float32)
