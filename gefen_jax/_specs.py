"""Specs of arrays that belong to a parameter but are smaller: statistics of its blocks."""

import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from gefen_jax._blocks import Shape


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
    several = names if isinstance(names, tuple) else (names,)
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return None
    for n in range(len(several), 0, -1):
        if size % math.prod(mesh.shape[name] for name in several[:n]) == 0:
            return names if n == len(several) else several[0] if n == 1 else several[:n]
    return None
