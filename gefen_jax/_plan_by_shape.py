"""`plan_by_shape`: the plan that needs no gradient."""

import fnmatch
import numbers
from collections.abc import Mapping
from typing import Any, Literal

from jax.sharding import AbstractMesh, Mesh

from gefen_jax._builtin import builtin_codebook
from gefen_jax._candidates import KINDS_BY_SHAPE, kinds_by_shape
from gefen_jax._paths import LeafSpec, param_specs
from gefen_jax._plan import LeafPlan, Plan
from gefen_jax._specs import shares


def _axes_by_path(specs: list[LeafSpec], pair_axis: Mapping[str, int]) -> dict[str, int]:
    """The non-negative axis of every leaf that a pattern matches; the last pattern wins."""
    axes = {}
    for pattern, axis in pair_axis.items():
        hit = [spec for spec in specs if fnmatch.fnmatchcase(spec.path, pattern)]
        if not hit:
            raise ValueError(f"`pair_axis`: the pattern {pattern!r} matches no leaf")
        if not isinstance(axis, numbers.Integral):
            raise TypeError(
                f"`pair_axis`: the axis of {pattern!r} must be an integer, got {axis!r}"
            )
        for spec in hit:
            if not -len(spec.shape) <= axis < len(spec.shape):
                raise ValueError(
                    f"`pair_axis`: `{spec.path}`, of shape {spec.shape}, has no axis {axis}"
                )
            axes[spec.path] = axis % len(spec.shape)
    return axes


def plan_by_shape(
    params: Any,
    *,
    kind: Literal["dual_code", "wide_dual_code", "shared_blocks"] = "dual_code",
    pair_axis: Mapping[str, int] | None = None,
    specs: Any = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Plan:
    """A plan from shapes; with the dual code and on no mesh, what `gefen` uses when given none.

    On a mesh, no block crosses a shard: its shape divides that of what a device holds. So a step
    needs no communication, and statistics lie as their parameters do. A leaf whose shards are too
    narrow for any block keeps exact moments. A plan fits on every mesh with coarser shards, too.

    Args:
      params: The parameters, or their `jax.ShapeDtypeStruct`s; where they have a
        `jax.sharding.NamedSharding`, it says where they lie.
      kind: What the leaves that are not small get: "dual_code" (both moments in one byte per
        element; shared blocks where no axis has even runs), "wide_dual_code" (1.5 bytes, no second
        moment is shared; the same) or "shared_blocks" (one second moment per block, with the
        built-in codebook; `calibrate` chooses better blocks).
      pair_axis: Along which axis the two elements lie that share a second moment in a dual code:
        patterns of paths as in `fnmatch`, and their axes. Without, it is the last, the outputs of
        a layer in Flax, but the first of an output layer (by name, or with far more columns than
        rows). equinox keeps the outputs of a `Linear` along the first axis:
        ``{"*linear*weight": 0}``. The last pattern that matches decides.
      specs: Where the optimizer's state will lie, if not as the parameters say: a tree like theirs,
        or a prefix, of `jax.sharding.PartitionSpec` or `jax.sharding.NamedSharding`. Needed inside
        `jax.jit` on Auto axes, where tracers do not say it, and where only the state is cut
        (ZeRO-1).
      mesh: The mesh that the ``specs`` are for; it may be a `jax.sharding.AbstractMesh`.

    Returns:
      A `Plan` with rule "shape".

    Raises:
      TypeError: For a complex leaf.
      ValueError: For a kind that shapes alone cannot give; for a pattern that matches nothing, or
        a leaf without that axis; for a parameter, by name, that its sharding does not divide, and
        for specs of another structure or without a mesh.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> round(gx.plan_by_shape(params).bytes_per_param, 3)
      1.02
      >>> round(gx.plan_by_shape(params, kind="shared_blocks").bytes_per_param, 3)
      1.008
      >>> gx.plan_by_shape(params, pair_axis={"w": 0})["w"].kind
      DualCode(block=(256, 1))
      >>> from jax.sharding import AbstractMesh, PartitionSpec as P
      >>> mesh = AbstractMesh((32,), ("tensor",))
      >>> plan = gx.plan_by_shape(params, specs={"w": P(None, "tensor")}, mesh=mesh)
      >>> plan["w"].reason
      'by shape: 128 along the last axis, in shards of (4096, 128)'
    """
    if kind not in KINDS_BY_SHAPE:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS_BY_SHAPE)}, got {kind!r}")
    named = param_specs(params)
    pair_axes, held = _axes_by_path(named, pair_axis or {}), shares(params, specs, mesh)
    kinds = kinds_by_shape(named, kind, pair_axes, {k: x.shape for k, x in held.items()})
    leaves = (LeafPlan(s.path, s.shape, *kinds[s.path], held[s.path].partition) for s in named)
    return Plan(tuple(leaves), builtin_codebook(), "built in", "shape")
