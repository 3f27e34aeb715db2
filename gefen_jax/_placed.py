"""A fresh state outside of `jit` lies where its parameters do, as in Optax's optimizers."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from gefen_jax._specs import as_in_results, sharding_like


def placed_like(x: Any, state: Any) -> Any:
    """What belongs to a parameter, along with it."""
    sharding = _placement(x)
    if sharding is None:
        return state
    return jax.tree.map(lambda s: jax.device_put(s, sharding_like(sharding, s.shape)), state)


def placed_beside(params: Any, tables: Any) -> Any:
    """What belongs to no parameter, replicated on the mesh where they lie."""
    placements = map(_placement, jax.tree.leaves(params))
    mesh = next((s.mesh for s in placements if s is not None), None)
    if mesh is None:
        return tables
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda t: jax.device_put(t, as_in_results(everywhere, t.ndim)), tables)


def _placement(x: Any) -> NamedSharding | None:
    """The sharding over several devices, if it is known: not in `jit`, where the compiler decides.

    Nor where other processes have a part of the array: `jax.device_put` would have to ask them.
    """
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding if sharding.is_fully_addressable else None
