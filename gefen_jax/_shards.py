"""Every device steps what it has of a leaf alone, as if that were a leaf of its own.

So it needs the temporaries of one device: `gefen_jax._backend` works through arrays that lie on one
device in pieces, where a loop over slices of a sharded one would gather it. Nothing but the place
of an element in its leaf enters a step from outside of its block (`gefen_jax._dither`), so where no
block crosses shards the result is that of one device, bit for bit.

It has to be known how the leaf is cut. On Explicit axes the gradient's type says it. On Auto axes
only the compiler knows, after tracing; there the plan says it, if it was made for the mesh at hand,
from arrays that lie on it or from specs. (`jax.experimental.custom_partitioning` would ask the
compiler: what speaks against it is in docs/meshes.md.)
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
from gefen_jax._specs import Partition, partition_of
from gefen_jax._types import Kind, Moments


class Shards(NamedTuple):
    """How a leaf lies on a mesh; so do its statistics, of which every axis has as many shards."""

    mesh: AbstractMesh
    spec: PartitionSpec
    shape: Shape  # the whole leaf's
    local: Shape  # what a device has of it

    def map(
        self,
        function: Callable[[Any, Any, Place | None], Any],
        leaf: Any,
        shared: Any,
        place: Place | None = None,
    ) -> Any:
        """``function(leaf, shared, place)`` of every shard, with its place in the whole leaf.

        The leaf, and the results, are trees of arrays of its shape or of statistics of its blocks;
        ``shared`` is any tree of numbers and tables. ``place`` is that of the leaf itself, where it
        is a part of another one.
        """

        def on_shard(leaf: Any, shared: Any, place: Place | None) -> Any:
            return function(leaf, shared, self._moved(place))

        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            on_shard,
            mesh=self.mesh,
            in_specs=(self.spec, everywhere, everywhere),
            out_specs=self.spec,
            # A kernel does not say along which axes of the mesh its results vary.
            check_vma=False,
        )
        with jax.sharding.use_abstract_mesh(self.mesh):
            if AxisType.Explicit in self.mesh.axis_types:
                leaf = jax.tree.map(lambda x: jax.sharding.reshard(x, self.spec), leaf)
                return mapped(leaf, shared, place)
            return _whole_under_vmap(mapped, function)(leaf, shared, place)

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

    On Explicit axes it is cut as ``like`` is, on Auto axes by the plan's ``partition``. A leaf
    without blocks is left to the compiler: its step is elementwise.
    """
    block = kind.scale_block
    mesh = None if block is None else _mesh_of(like, moments.mu)
    if mesh is None or block is None:
        return None
    if AxisType.Explicit in mesh.axis_types:
        partition = _partition_in_types(like, moments.mu)
    local = None if partition is None else partition.local(like.shape, mesh)
    if partition is None or local is None or not fits_shards(like.shape, block, local):
        return None
    return Shards(mesh, PartitionSpec(*partition.spec), like.shape, local)


def _mesh_of(*arrays: Array) -> AbstractMesh | None:
    """The mesh of several devices that they lie on, with axes of one type, none of them Manual."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    mesh = next((mesh for mesh in meshes if mesh.size > 1), None)
    if mesh is None or set(mesh.axis_types) not in ({AxisType.Auto}, {AxisType.Explicit}):
        return None
    return mesh


def _partition_in_types(like: Array, mu: Array) -> Partition | None:
    """As the types have it; None if they differ (ZeRO-1): the compiler moves one to the other."""
    first, second = (partition_of(jax.typeof(x).sharding) for x in (like, mu))
    # A state that nobody placed is cut as it is first stepped.
    return first if second is None or second == first or not second.spec else None
