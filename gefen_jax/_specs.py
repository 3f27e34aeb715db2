"""Where parameters lie on a mesh, and arrays that belong to them: statistics of their blocks."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gefen_jax._blocks import Shape
from gefen_jax._paths import path_name


class Partition(NamedTuple):
    """How an array is cut over a mesh, as plain data."""

    mesh: tuple[tuple[str, int], ...]  # names and sizes of its axes
    # The entries of the PartitionSpec, without the Nones at its end.
    spec: tuple[str | tuple[str, ...] | None, ...]

    def share(self, shape: Shape) -> Shape:
        """What a device has of an array of this shape, which is even."""
        # JAX's own `shard_shape` does not know meshes of which only some axes are Manual.
        sizes = dict(self.mesh)
        parts = [math.prod(sizes[name] for name in _several(names)) for names in self.spec]
        return tuple(d // n for d, n in itertools.zip_longest(shape, parts, fillvalue=1))

    def local(self, shape: Shape, mesh: Mesh | AbstractMesh) -> Shape | None:
        """The same; None on another mesh, or if uneven."""
        spec = PartitionSpec(*self.spec)
        if self.mesh != tuple(mesh.shape.items()) or fitting_spec(spec, shape, mesh) != spec:
            return None
        return self.share(shape)

    def on(self, axes: Iterable[str]) -> "Partition":
        """What these axes of the mesh have in it."""
        return Partition(self.mesh, partition_spec(self.spec, axes))

    def refines(self, coarser: "Partition") -> bool:
        """Whether what a device has of an array is a part of what it has by the coarser one."""
        pairs = itertools.zip_longest(self.spec, coarser.spec)
        names = ((_several(fine), _several(coarse)) for fine, coarse in pairs)
        return all(fine[: len(coarse)] == coarse for fine, coarse in names)


def partition_spec(spec: Iterable[Any], axes: Iterable[str]) -> tuple[Any, ...]:
    """The entries of a spec with these axes of the mesh only, without the Nones at its end."""
    kept, entries = set(axes), []
    for names in spec:
        here = tuple(name for name in _several(names) if name in kept)
        entries.append(here if len(here) > 1 else here[0] if here else None)
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def partition_of(sharding: NamedSharding | None) -> Partition | None:
    """How arrays of this sharding are cut; None if it is not known."""
    if sharding is None:
        return None
    mesh = sharding.mesh
    return Partition(tuple(mesh.shape.items()), partition_spec(sharding.spec, mesh.axis_names))


def _several(names: Any) -> tuple[str, ...]:
    """An entry of a spec as names of the mesh's axes."""
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return ()
    return names if isinstance(names, tuple) else (names,)


def fitting_spec(spec: PartitionSpec, shape: Shape, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The parameter's spec, of every axis the mesh axes whose devices divide the array's size.

    Of several mesh axes on one axis the first ones are kept, as many as divide: so what a device
    has of the statistics still covers what it has of the parameter. An array of another rank is
    replicated.
    """
    if len(spec) > len(shape):
        return PartitionSpec()
    return PartitionSpec(
        *(_fitting(names, size, mesh) for names, size in zip(spec, shape, strict=False))
    )


def _fitting(names: Any, size: int, mesh: Mesh | AbstractMesh) -> Any:
    several = _several(names)
    for n in range(len(several), 0, -1):
        if size % math.prod(mesh.shape[name] for name in several[:n]) == 0:
            return names if n == len(several) else several[0] if n == 1 else several[:n]
    return None


def sharding_like(sharding: NamedSharding, shape: Shape) -> NamedSharding:
    """Of an array of this shape that belongs to a parameter of that sharding."""
    spec = fitting_spec(sharding.spec, shape, sharding.mesh)
    own = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return as_in_results(own, len(shape))


def as_in_results(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """The same sharding in the form that a jitted step's results have.

    An equal one in another form is another key in the cache of compiled steps. On Explicit axes the
    spec of a result names every axis, on Auto ones those up to the last that is cut.
    """
    entries = list(sharding.spec)
    if AxisType.Explicit in sharding.mesh.axis_types:
        entries += [None] * (ndim - len(entries))
    else:
        while entries and entries[-1] is None:
            entries.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def shardings(
    params: Any, specs: Any, mesh: Mesh | AbstractMesh | None
) -> list[NamedSharding | None]:
    """The sharding of every parameter, as the specs or its own say; None where nothing is said.

    Raises ValueError for specs of another structure or without a mesh, and for a parameter, by
    name, that its sharding does not divide.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    if specs is None:
        found = [_own_sharding(x) for _, x in flat]
    else:
        found = _specs_by_leaf(params, specs)
    on_mesh = [
        None if x is None else _on(mesh, x, path_name(path))
        for (path, _), x in zip(flat, found, strict=True)
    ]
    for (path, x), sharding in zip(flat, on_mesh, strict=True):
        if sharding is not None:
            _check_fits(path_name(path), jnp.shape(x), sharding)
    return on_mesh


class Share(NamedTuple):
    """What a device has of a parameter, and how it is cut; all of it where no mesh is known."""

    shape: Shape
    partition: Partition | None


def shares(
    params: Any, specs: Any = None, mesh: Mesh | AbstractMesh | None = None
) -> dict[str, Share]:
    """What a device has of every parameter, by path."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    found = map(partition_of, shardings(params, specs, mesh))
    return {
        path_name(path): Share(
            jnp.shape(x) if partition is None else partition.share(jnp.shape(x)),
            None if specs is None and _is_partly_known(x) else partition,
        )
        for (path, x), partition in zip(flat, found, strict=True)
    }


def _own_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    if isinstance(x, Tracer) and jax.typeof(x).sharding.mesh.explicit_axes:
        sharding = jax.typeof(x).sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def _is_partly_known(x: Any) -> bool:
    """A tracer tells the axes that are Explicit; on Auto ones nobody knows before compilation."""
    return isinstance(x, Tracer) and bool(jax.typeof(x).sharding.mesh.auto_axes)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec | NamedSharding)


def _specs_by_leaf(params: Any, specs: Any) -> list[PartitionSpec | NamedSharding]:
    """A tree of specs, or a prefix, as one spec per parameter."""
    try:
        whole = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part), specs, params, is_leaf=_is_spec
        )
    except ValueError as error:
        raise ValueError(f"`specs` must be a tree like `params`, or a prefix: {error}") from None
    return jax.tree.leaves(whole, is_leaf=_is_spec)


def _on(
    mesh: Mesh | AbstractMesh | None, spec: PartitionSpec | NamedSharding, name: str
) -> NamedSharding:
    """On this mesh, if one is given."""
    memory_kind = None
    if isinstance(spec, NamedSharding):
        if mesh is None:
            return spec
        spec, memory_kind = spec.spec, spec.memory_kind
    if mesh is None:
        raise ValueError("`mesh` must be given for `specs` that are PartitionSpecs")
    for axis in (axis for names in spec for axis in _several(names)):
        if axis not in mesh.axis_names:
            raise ValueError(
                f"`specs` cuts `params[{name}]` by {spec}, and the mesh has no axis {axis!r}, only"
                f" {mesh.axis_names}: logical names must be replaced by the mesh's"
            )
    return NamedSharding(mesh, spec, memory_kind=memory_kind)


def _check_fits(name: str, shape: Shape, sharding: NamedSharding) -> None:
    if fitting_spec(sharding.spec, shape, sharding.mesh) != PartitionSpec(*sharding.spec):
        raise ValueError(
            f"`params[{name}]` of shape {shape} cannot be cut by {sharding.spec}: every"
            f" axis must be a multiple of its devices, on {dict(sharding.mesh.shape)}"
        )
