"""Every device steps what it has of a leaf alone, as if that were a leaf of its own.

So it needs the temporaries of one device: `gefen_jax._backend` works through arrays that lie on one
device in pieces, where a loop over slices of a sharded one would gather it. Nothing but the place
of an element in its leaf enters a step from outside of its block (`gefen_jax._dither`), so where no
block crosses shards the result is that of one device, bit for bit.

It has to be known how the leaf is cut. On Explicit axes the arrays' types say it: the leaf is
stepped as its state lies, which costs no communication where that is cut further than the gradient
(ZeRO-1). On Auto axes only the compiler knows, after tracing; there the plan says it, if it was
made for the mesh at hand, from arrays that lie on it or from specs. Axes that are Manual already,
in anybody's `jax.shard_map`, stay as they are: a leaf is then what it is there.
(`jax.experimental.custom_partitioning` would ask the compiler: what speaks against it is in
docs/meshes.md.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from gefen_jax._blocks import Shape, fits_shards
from gefen_jax._dither import Place, strides_at
from gefen_jax._specs import Partition, partition_of, partition_spec
from gefen_jax._types import Kind, Moments

# Of a leaf, what all leaves share, and the leaf's place if it is a part of another one.
OfPart = Callable[[Any, Any, Place | None], Any]


class Shards(NamedTuple):
    """How a leaf is stepped on a mesh; its statistics have as many shards along every axis."""

    mesh: AbstractMesh
    spec: PartitionSpec
    shape: Shape  # the whole leaf's
    local: Shape  # what a device has of it
    home: PartitionSpec  # on Explicit axes, where the gradient, or the parameter, lies

    def map(
        self,
        function: OfPart,
        leaf: Any,
        shared: Any,
        place: Place | None = None,
        *,
        whole: OfPart,
    ) -> Any:
        """``function(leaf, shared, place)`` of every shard, with its place in the whole leaf.

        The leaf, and the results, are trees of arrays of its shape or of statistics of its blocks;
        ``shared`` is any tree of numbers and tables. ``place`` is that of the leaf itself, where it
        is a part of another one. ``whole`` does the same without knowing how the leaf is cut.
        """

        def on_shard(leaf: Any, shared: Any, place: Place | None) -> Any:
            return function(leaf, shared, self._moved(place))

        everywhere, types = PartitionSpec(), self.mesh.axis_types
        mapped: OfPart = jax.shard_map(
            on_shard,
            mesh=self.mesh,
            # Unnamed: all but an Explicit axis that `vmap` maps over, which the mesh has, too.
            axis_names=free_axes(self.mesh) if self.mesh.manual_axes else set(),
            in_specs=(self.spec, everywhere, everywhere),
            out_specs=self.spec,
            # A kernel does not say along which axes of the mesh its results vary.
            check_vma=False,
        )
        if AxisType.Auto in types:
            mapped = _whole_under_vmap(mapped, whole)
        with jax.sharding.use_abstract_mesh(self.mesh):
            if AxisType.Explicit in types:
                spec = PartitionSpec(*partition_spec(self.spec, self.mesh.explicit_axes))
                leaf = jax.tree.map(lambda x: jax.sharding.reshard(x, spec), leaf)
            return mapped(leaf, shared, place)

    def back_home(self, x: Array) -> Array:
        """An array of the leaf's shape as the gradient, or the parameter, lies."""
        if jax.typeof(x).sharding.spec == self.home:
            return x
        with jax.sharding.use_abstract_mesh(self.mesh):
            return jax.sharding.reshard(x, self.home)

    def _moved(self, place: Place | None) -> Place:
        """The place of this device's shard."""
        strides = strides_at(self.shape, place)
        offset = jnp.uint32(0) if place is None else place.offset
        for names, size, stride in zip(self.spec, self.local, strides, strict=False):
            if names is not None:
                index = jax.lax.axis_index(names).astype(jnp.uint32)
                offset += index * np.uint32(size * stride & 0xFFFFFFFF)
        return Place(offset, strides)


def _whole_under_vmap(mapped: Callable[..., Any], whole: Callable[..., Any]) -> Any:
    """The first of two functions that do the same; under `jax.vmap` the second."""
    either = jax.custom_batching.custom_vmap(mapped)

    # The axis that is mapped over may be sharded, and on Auto axes nobody knows: `shard_map` would
    # gather it.
    @either.def_vmap
    def _(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        result = jax.vmap(whole, in_axes=tuple(axes))(*args)
        return result, jax.tree.map(lambda _: True, result)

    return either


def shards_of(
    kind: Kind, partition: Partition | None, like: Array, moments: Moments
) -> Shards | None:
    """The shards of a leaf that devices can step alone; None if there are none, or none known.

    On Explicit axes it is cut as its state is, or if nobody placed that, as ``like`` is: the
    gradient, or the parameter, if that is stepped along. On Auto axes it is cut by the plan's
    ``partition``. A leaf without blocks is left to the compiler: its step is elementwise.
    """
    block = kind.scale_block
    mesh = None if block is None else _mesh_of(like, moments.mu)
    if mesh is None or block is None:
        return None
    partition = _partition_on(mesh, partition, like, moments.mu)
    local = None if partition is None else partition.local(like.shape, mesh)
    if partition is None or local is None or not fits_shards(like.shape, block, local):
        return None
    home = jax.typeof(like).sharding.spec
    return Shards(mesh, PartitionSpec(*partition.spec), like.shape, local, home)


def is_spread(mesh: AbstractMesh) -> bool:
    """Whether an axis over several devices is not Manual: arrays may be spread over it."""
    return any(mesh.shape[name] > 1 for name in free_axes(mesh))


def free_axes(mesh: AbstractMesh) -> set[str]:
    """The axes that are not Manual."""
    return set(mesh.axis_names) - set(mesh.manual_axes)


def _mesh_of(*arrays: Array) -> AbstractMesh | None:
    """The mesh that one of them is spread over."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next(filter(is_spread, meshes), None)


def _partition_on(
    mesh: AbstractMesh, planned: Partition | None, like: Array, mu: Array
) -> Partition | None:
    """How a leaf is cut over the axes that are not Manual; None if it is not known."""
    typed = _partition_in_types(like, mu)
    if typed is None or not mesh.auto_axes:
        return typed
    if planned is None or planned.on(mesh.manual_axes).spec:
        return None
    # What both know has to agree.
    return planned if planned.on(mesh.explicit_axes).spec == typed.spec else None


def _partition_in_types(like: Array, mu: Array) -> Partition | None:
    """Over Explicit axes; None if it would take more than cutting to bring both together."""
    leaf, state = (partition_of(jax.typeof(x).sharding) for x in (like, mu))
    # A state that nobody placed is cut as it is first stepped.
    if leaf is None or state is None or not state.spec:
        return leaf
    return state if state.refines(leaf) else None
