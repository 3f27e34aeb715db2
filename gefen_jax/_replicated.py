"""Small results of arrays in any sharding, the same on every device and every process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


def replicated(function: Callable[..., Any], *arrays: Array, **static: Any) -> Any:
    """``function(*arrays, **static)``, jitted, as NumPy arrays.

    On a mesh the function runs with shardings chosen by the compiler (Explicit axes would refuse
    its reshapes and scatters), and its results come out replicated: every process can read them.
    """
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    compiled = _jitted(function, tuple(static.items()), meshes[0] if meshes else None)
    return jax.tree.map(np.asarray, compiled(*arrays))


@functools.lru_cache(maxsize=256)
def _jitted(function: Callable[..., Any], static: tuple[Any, ...], mesh: Mesh | None) -> Any:
    # Cached here: jit compares functions by identity, and these are made on the spot.
    bound = functools.partial(function, **dict(static))
    if mesh is None:
        return jax.jit(bound)
    inside: Any = jax.sharding.auto_axes(bound, out_sharding=PartitionSpec())
    compiled = jax.jit(inside, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on_mesh(*arrays: Array) -> Any:
        with jax.set_mesh(mesh):
            return compiled(*arrays)

    return on_mesh
