"""Functions of a leaf on any mesh: with Explicit axes results lie where they are expected."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from gefen_jax._specs import fitting_spec


def by_the_compiler(function: Callable[..., Any], like: Array, results: Any, *args: Any) -> Any:
    """``function(*args)`` on any mesh, of a leaf whose blocks may cross shards.

    With Explicit axes, where JAX refuses to split a sharded axis into such blocks, the compiler
    chooses the shardings inside. What comes out lies as ``results``, arrays of the same shapes, do;
    in place of what nobody placed, as ``like`` does.
    """
    sharding = jax.typeof(like).sharding
    if not sharding.mesh.explicit_axes:
        return function(*args)

    def spec(x: Array) -> PartitionSpec:
        own = jax.typeof(x).sharding.spec
        return own if any(own) else fitting_spec(sharding.spec, x.shape, sharding.mesh)

    with jax.sharding.use_abstract_mesh(sharding.mesh):
        specs, axes = jax.tree.map(spec, results), sharding.mesh.explicit_axes
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=specs)(*args)


def laid_out_like(like: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` on any mesh; with Explicit axes, results lie as ``like`` does.

    As far as their shapes allow: statistics have the axes that divide them.
    """
    mesh = None if like is None else jax.typeof(like).sharding.mesh
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return function(*args)
    spec = jax.typeof(like).sharding.spec
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    specs = jax.tree.map(
        lambda x: fitting_spec(spec, x.shape, mesh), jax.eval_shape(function, *shapes)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        inside = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=specs)
        return inside(*args)
