"""What training holds in memory: an optimizer's state, and the weights and gradients beside it."""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp

from gefen_jax._flash import ScaleByFlashAdamState, ScaleByFlashMomentumState
from gefen_jax._microadam import ScaleByMicroAdamState
from gefen_jax._paths import named_leaves
from gefen_jax._scale_by_muon import ScaleByGefenMuonState
from gefen_jax._split_weights import SplitWeightsState
from gefen_jax._transform import ScaleByGefenState

_STATES = (
    ScaleByFlashAdamState,
    ScaleByFlashMomentumState,
    ScaleByGefenMuonState,
    ScaleByGefenState,
    ScaleByMicroAdamState,
    SplitWeightsState,
)
# Fields of a state that are no trees like the parameters.
_GLOBAL = frozenset({"count", "codebook", "codebook4"})


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer state, and of what was given beside it.

    Attributes:
      total_bytes: All of it, other transformations of a chain included.
      by_field: Bytes of every field of this package's states, of all else in the state as "other",
        and of "weights" and "gradients" where they were given.
      by_tensor: Bytes of every parameter's part of all of these but "other", by its path.
      bytes_per_param: ``total_bytes`` over the number of parameters; None if they were not given.
    """

    total_bytes: int
    by_field: dict[str, int]
    by_tensor: dict[str, int]
    bytes_per_param: float | None = None


def memory_report(opt_state: Any, params: Any = None, grads: Any = None) -> MemoryReport:
    """Counts the bytes of an optimizer state, and of the weights and gradients that go with it.

    Args:
      opt_state: Any optimizer state that holds states of this package anywhere: arrays or
        `jax.ShapeDtypeStruct`s (from `jax.eval_shape`). The state alone: a flax ``TrainState``
        holds the parameters, too, which would be counted twice (give ``train_state.opt_state``),
        and ``nnx.state(optimizer)`` names no types, so that all of it would be "other" (give
        ``optimizer.opt_state``).
      params: The parameters, to be counted too; None to leave them out.
      grads: The gradients, alike. Often ``params`` once more: gradients have their dtypes.

    Returns:
      A `MemoryReport`; bytes are those of whole arrays, over all devices.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.zeros((1024, 1024))}
      >>> report = gx.memory_report(gx.gefen(1e-3).init(params))
      >>> report.by_tensor
      {'w': 1069056}
      >>> for field, nbytes in report.by_field.items():
      ...   print(field, nbytes)
      count 4
      codebook 1024
      codebook4 64
      mu 1048576
      scale 16384
      nu 4096
      other 0
      >>> weights, _ = gx.split_weights(params)
      >>> state = gx.with_split_weights(gx.gefen(1e-3)).init(params)
      >>> print(round(gx.memory_report(state, weights, weights).bytes_per_param, 2))
      6.02
    """
    by_field: dict[str, int] = defaultdict(int)
    by_tensor: dict[str, int] = defaultdict(int)
    other = 0

    def count(field: str, tree: Any) -> None:
        by_field[field] += _nbytes(tree)
        if field not in _GLOBAL:
            for path, leaf in named_leaves(tree):
                by_tensor[path] += _nbytes(leaf)

    def visit(node: Any) -> None:
        nonlocal other
        if not isinstance(node, _STATES):
            other += _nbytes(node)
            return
        for field in node._fields:
            if field == "inner":
                walk(getattr(node, field))
            else:
                count(field, getattr(node, field))

    def walk(tree: Any) -> None:
        jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, _STATES))

    walk(opt_state)
    by_field["other"] = other
    for field, tree in (("weights", params), ("gradients", grads)):
        if tree is not None:
            count(field, tree)
    total = sum(by_field.values())
    size = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params))
    per_param = total / size if size else None
    return MemoryReport(total, dict(by_field), dict(by_tensor), per_param)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))
