"""Arrays inside of anybody's `jax.shard_map`: over which Manual axes of the mesh they vary."""

from typing import Any

import jax
from jaxtyping import Array


def varying_alike(tree: Any) -> Any:
    """The same, varying over the same Manual axes: what a loop carries must not come to vary.

    In a `jax.shard_map` a fresh state is the same everywhere, and the gradient is not.
    """

    def axes_of(x: Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - axes_of(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
