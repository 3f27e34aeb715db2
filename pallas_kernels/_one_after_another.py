"""A rule of `jax.vmap` for kernels that have none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# That takes references in such a rule, and, in Mosaic, all that a kernel computes.
OLDEST_JAX = (0, 11, 2)


def one_after_another(call: Callable[..., list[Array]]) -> Callable[..., list[Array]]:
    """The same function of arrays, which `jax.vmap` turns into a loop."""
    wrapped = jax.custom_batching.custom_vmap(call)

    @wrapped.def_vmap
    def loop(size: int, batched: Any, *arrays: Any) -> Any:
        def stacked(x: Array, batched: bool) -> Array:
            return x if batched else jnp.broadcast_to(x, (size, *x.shape))

        new = jax.lax.map(lambda x: call(*x), jax.tree.map(stacked, arrays, tuple(batched)))
        return new, [True] * len(new)

    return wrapped
