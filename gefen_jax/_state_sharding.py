"""`state_sharding`: where the state of an optimizer lies, given where the parameters lie."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from gefen_jax._fused import FusedGefen
from gefen_jax._specs import as_in_results, sharding_like, shardings

_Path = tuple[Any, ...]
_TABLES = (GetAttrKey("codebook"), GetAttrKey("codebook4"))


def state_sharding(
    tx: optax.GradientTransformation | FusedGefen,
    params: optax.Params,
    specs: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    r"""Where every array of an optimizer's state lies: with its parameter.

    For ``jax.jit(tx.init, out_shardings=...)``, for restoring a checkpoint onto another mesh, and
    for the ``out_shardings`` of a step. What has its parameter's shape gets its parameter's
    sharding. A statistic with one entry per block, of shape :math:`n_i = \lceil d_i / b_i \rceil`,
    gets of every axis :math:`i` those of the parameter's mesh axes :math:`x_1, x_2, \ldots` that
    divide it,

    .. math::
      x_1, \ldots, x_k \quad \text{with the largest } k \text{ such that } |x_1| \cdots |x_k|
      \text{ divides } n_i

    and is replicated on the others. Counts, codebooks and all else that belongs to no parameter are
    replicated.

    An array belongs to the parameter whose key path its own path ends with, the longest if there
    are several: so it is in every transformation that keeps trees like the parameters, this
    package's, Optax's and others'.

    Args:
      tx: Any optimizer, or a `fused_gefen`: ``tx.init`` is traced, not run.
      params: The parameters, or their `jax.ShapeDtypeStruct`s. Without ``specs``, they say by
        their ``sharding`` where they lie; those without a `jax.sharding.NamedSharding` are
        replicated.
      specs: None; or a tree like the parameters, or a prefix of it, of `jax.sharding.PartitionSpec`
        or `jax.sharding.NamedSharding`.
      mesh: The mesh that a `jax.sharding.PartitionSpec` is for; or another one than that of
        ``params``: of the same axes with fewer devices, or the mesh behind an abstract one.

    Returns:
      A tree like ``tx.init(params)`` of `jax.sharding.NamedSharding`.

    Raises:
      ValueError: If nothing says which mesh; for a parameter, by name, whose spec does not fit its
        shape; for specs of another structure.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import gefen_jax as gx
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"w": jax.ShapeDtypeStruct((128, 256), jnp.float32)}
      >>> tx = gx.gefen(1e-3)
      >>> shardings = gx.state_sharding(tx, params, {"w": P("data")}, mesh=mesh)
      >>> shardings[0].mu["w"].spec, shardings[0].count.spec
      (P('data', None), P())
      >>> init = jax.jit(tx.init, out_shardings=shardings)
      >>> opt_state = init({"w": jnp.zeros((128, 256))})
      >>> print(opt_state[0].nu["w"].shape, opt_state[0].nu["w"].sharding.spec)
      (128, 1) P('data', None)

    .. note::
      A block that crosses shards costs communication in every step, and its statistics may not
      divide. `plan_by_shape` and `calibrate` make blocks that fit from the same ``specs``.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    of_params = shardings(params, specs, mesh)
    by_path = {path: (x.shape, s) for (path, x), s in zip(flat, of_params, strict=True)}
    found = next((s.mesh for s in of_params if s is not None), mesh)
    if found is None:
        raise ValueError(
            "`params` lie on no mesh: none has a NamedSharding. Place them by jax.device_put, or"
            " give `specs`."
        )

    def of_leaf(path: _Path, leaf: Any) -> NamedSharding:
        suffixes = (path[i:] for i in range(len(path) + 1))
        owner = next((p for p in suffixes if p in by_path), None)
        shape, sharding = ((), None) if owner is None else by_path[owner]
        # Every path ends with that of parameters which are one bare array, this package's tables'
        # too.
        if owner == () and path[-1] in _TABLES:
            sharding = None
        if sharding is None or len(leaf.shape) != len(shape):
            return as_in_results(NamedSharding(found, PartitionSpec()), len(leaf.shape))
        return sharding_like(sharding, leaf.shape)

    # Without the shardings, which a traced `init` on Explicit axes would have to carry through.
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.tree_util.tree_map_with_path(of_leaf, jax.eval_shape(tx.init, structs))
