"""`calibrate`: from a first gradient to a plan."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from gefen_jax import _codebook
from gefen_jax._axis_rule import choose_block, find_evidence
from gefen_jax._builtin import builtin_codebook
from gefen_jax._candidates import (
    block_by_shape,
    decided_by_size,
    describe_block,
    exact_if_none_fits,
    is_output_layer,
)
from gefen_jax._constants import HISTOGRAM_BINS
from gefen_jax._flat_periods import FlatPeriods
from gefen_jax._histogram import count_normalised, count_reference
from gefen_jax._paths import LeafSpec, leaf_spec, named_leaves
from gefen_jax._period import find_period, scale_group
from gefen_jax._plan import LeafPlan, Plan
from gefen_jax._shared_blocks import SharedBlocks
from gefen_jax._specs import Share, shares
from gefen_jax._types import Kind


class _Leaf(NamedTuple):
    spec: LeafSpec
    grads: tuple[Any, ...]  # those that are not None


def calibrate(
    params: Any,
    grads: Any | Sequence[Any],
    *,
    rule: Literal["axis", "reference"] = "axis",
    specs: Any = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Plan:
    r"""Infers the blocks of every leaf and learns the codebook, from one gradient or several.

    With the rule "axis", a leaf gets the box, along whichever axis, that explains the variance of
    the gradient's magnitude; small leaves keep exact moments; a leaf without structure or without a
    gradient gets a block by its shape. With "reference" every leaf gets the flat period of the
    Gefen package. The codebook minimises the squared error of the gradients divided by their
    block's largest magnitude, exactly, with -1, 1 and (but for "reference") 0 fixed.

    Runs on the host, once, before training; the arrays may live on any devices and in any
    sharding. Needs at most one leaf of float32 beyond the gradients, at a time.

    Args:
      params: The parameters that the optimizer will be initialised with, or their
        `jax.ShapeDtypeStruct`s.
      grads: A gradient of the same structure, or a list or tuple of them: squared gradients are
        averaged and histograms added. Leaves that are not floats have no state and are skipped; a
        None gradient of a float leaf counts as no evidence.
      rule: "axis" or "reference", which knows nothing of meshes.
      specs: Where the optimizer's state will lie, as in `state_sharding`: no block crosses a shard.
        Without, it is where the parameters lie; of those that are not cut, where the first gradient
        does.
      mesh: The mesh that the ``specs`` are for; it may be abstract.

    Returns:
      A `Plan`, which says for every leaf why it got its blocks.

    Raises:
      ValueError: If a gradient holds NaN or inf, or does not match the parameters; the message
        names the first leaf; for specs that do not fit the parameters. Nothing is kept of a
        failed calibration.
      TypeError: For complex leaves, and inside `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> rows = jnp.exp(jax.random.normal(jax.random.key(0), (128, 1)))
      >>> grads = {"w": rows * jax.random.normal(jax.random.key(1), (128, 512))}
      >>> plan = gx.calibrate(grads, grads)
      >>> print(plan["w"].kind, plan["w"].reason)
      SharedBlocks(block=(1, 512)) peak at 512 along the last axis: 49% of the variance of |g|

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026
    """
    if rule not in ("axis", "reference"):
        raise ValueError(f'`rule` must be "axis" or "reference", got {rule!r}')
    leaves = _matched(params, grads)
    if rule == "axis":
        plans = _axis_leaves(leaves, _shares(leaves, params, specs, mesh))
    else:
        plans = _reference_leaves(leaves)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    for leaf, plan in zip(leaves, plans, strict=True):
        for g in leaf.grads:
            histogram += _count(plan.kind, g)
    if rule == "axis":
        codebook, reason = _codebook.learn(histogram), "learned from the gradients"
    else:
        codebook, reason = _codebook.learn_reference(histogram), "reference: from the gradients"
    if codebook is None:
        codebook, reason = builtin_codebook(), _why_builtin(histogram)
    return Plan(tuple(plans), tuple(np.asarray(codebook).tolist()), reason, rule)


def _shares(leaves: list[_Leaf], params: Any, specs: Any, mesh: Any) -> dict[str, Share]:
    """What a device will hold of every leaf."""
    held = shares(params, specs, mesh)
    if specs is None:
        for spec, grads in leaves:
            if grads and held[spec.path].shape == spec.shape:
                held |= {spec.path: shares(grads[0], None, mesh)["."]}
    return held


def _count(kind: Kind, g: Any) -> np.ndarray | int:
    """What a leaf adds to the histogram."""
    if isinstance(kind, FlatPeriods):
        return count_reference(np.asarray(g, np.float32).reshape(-1), kind.period)
    block = kind.scale_block
    return 0 if block is None else count_normalised(jnp.asarray(g), block)


def _why_builtin(histogram: np.ndarray) -> str:
    bins = np.count_nonzero(histogram)
    return f"built in: the gradients fill only {bins} of {HISTOGRAM_BINS} bins"


def _matched(params: Any, grads: Any) -> list[_Leaf]:
    """Every parameter with its gradients, or an error that names the first difference."""
    named = named_leaves(params)
    is_leaf = {"is_leaf": lambda x: x is None}
    structure = jax.tree.structure(params, **is_leaf)
    trees = (grads,)
    if jax.tree.structure(grads, **is_leaf) != structure and isinstance(grads, list | tuple):
        trees = tuple(grads)
        if not trees:
            raise ValueError("`grads` is empty: give one gradient tree or several")
    columns = [_column(named, tree, i, len(trees)) for i, tree in enumerate(trees)]
    leaves = []
    for (path, param), *row in zip(named, *columns, strict=True):
        if param is None:
            continue
        spec = leaf_spec(path, param)
        present = tuple(g for g in row if g is not None) if spec.trained else ()
        leaves.append(_Leaf(spec, present))
    return leaves


_SAME_TREE = (
    "Give the parameters that the loss was differentiated by (with flax nnx,"
    " `nnx.state(model, nnx.Param)`)."
)


def _column(named: list[tuple[str, Any]], tree: Any, index: int, total: int) -> list[Any]:
    where = "`grads`" if total == 1 else f"`grads[{index}]`"
    found = named_leaves(tree)
    for (path, param), (other, g) in zip(named, found, strict=False):
        if path != other:
            raise ValueError(
                f"{where} does not match `params`: expected `{path}`, found `{other}`. {_SAME_TREE}"
            )
        _check_gradient(where, path, param, g)
    if len(named) != len(found):
        longer, extra = (found, "has") if len(found) > len(named) else (named, "lacks")
        path = longer[min(len(named), len(found))][0]
        raise ValueError(f"{where} does not match `params`: it {extra} `{path}`. {_SAME_TREE}")
    return [g for _, g in found]


def _check_gradient(where: str, path: str, param: Any, g: Any) -> None:
    if param is None or g is None:
        if param is None and g is not None:
            raise ValueError(f"{where} has a gradient for `{path}`, which is None in `params`")
        return
    if isinstance(g, Tracer):
        raise TypeError("`calibrate` decides shapes on the host: call it outside of `jit`")
    if jnp.shape(g) != jnp.shape(param):
        raise ValueError(
            f"{where} does not match `params` at `{path}`: expected shape {jnp.shape(param)},"
            f" found {jnp.shape(g)}"
        )
    trained = leaf_spec(path, param).trained
    if trained and not jnp.issubdtype(jnp.result_type(g), jnp.floating):
        raise TypeError(
            f"{where} at `{path}` must be real and floating, found {jnp.result_type(g)}"
        )


def _not_finite(path: str) -> ValueError:
    return ValueError(
        f"the gradient of `{path}` holds NaN or inf: a plan made from it would be wrong. Calibrate"
        " on another batch, or lower the loss scale."
    )


def _axis_leaves(leaves: list[_Leaf], held: dict[str, Share]) -> list[LeafPlan]:
    decided = decided_by_size([leaf.spec for leaf in leaves])
    plans = []
    for spec, grads in leaves:
        local, partition = held[spec.path]
        without_blocks = decided.get(spec.path) or exact_if_none_fits(spec.shape, local)
        if without_blocks is not None:
            kind, reason = without_blocks
            if not all(bool(jnp.all(jnp.isfinite(g))) for g in grads):
                raise _not_finite(spec.path)
        elif not grads:
            block = block_by_shape(spec.shape, local, is_output=is_output_layer(spec))
            kind = SharedBlocks(block)
            reason = f"no gradient: by shape, {describe_block(spec.shape, block, local)}"
        else:
            evidence, blocks = find_evidence(tuple(map(jnp.asarray, grads)), local)
            if not evidence.finite:
                raise _not_finite(spec.path)
            block, reason = choose_block(spec, blocks, evidence, local)
            kind = SharedBlocks(block)
        plans.append(LeafPlan(spec.path, spec.shape, kind, reason, partition))
    return plans


def _reference_leaves(leaves: list[_Leaf]) -> list[LeafPlan]:
    plans = []
    for spec, grads in leaves:
        if not spec.trained or not spec.size:
            kind, reason = decided_by_size([spec])[spec.path]
            plans.append(LeafPlan(spec.path, spec.shape, kind, reason))
            continue
        if not all(getattr(g, "is_fully_addressable", True) for g in grads):
            raise ValueError(
                f"the gradient of `{spec.path}` lies on devices of other processes, and"
                ' `rule="reference"` computes on the host: gather the gradients first'
                " (`jax.experimental.multihost_utils.process_allgather`), or take the default rule"
            )
        flat = [np.asarray(g, np.float32).reshape(-1) for g in grads]
        if not all(np.all(np.isfinite(g)) for g in flat):
            raise _not_finite(spec.path)
        squares = [g * g for g in flat] or [np.zeros(spec.size, np.float32)]
        period = find_period(squares[0] if len(squares) == 1 else np.mean(squares, axis=0))
        kind = FlatPeriods(period, scale_group(spec.size, period))
        reason = f"reference: peak at {period}" if period > 1 else "reference: no peak"
        plans.append(LeafPlan(spec.path, spec.shape, kind, reason))
    return plans
