"""What an optimizer's state weighs."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp

from gefen_jax._muon import ScaleByGefenMuonState
from gefen_jax._paths import path_name
from gefen_jax._split_weights import SplitWeightsState
from gefen_jax._transform import ScaleByGefenState
from gefen_jax._types import Moments

_STATES = (ScaleByGefenState, ScaleByGefenMuonState, SplitWeightsState)
_SLOTS = (*Moments._fields, "correction")


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer state.

    Attributes:
      total_bytes: All of it, other transformations of a chain included.
      by_field: Bytes of every field of the Gefen states, of the corrections of split weights, and
        of all else as "other".
      by_tensor: Bytes of mu, scale, nu and correction of every parameter, by its path.
    """

    total_bytes: int
    by_field: dict[str, int]
    by_tensor: dict[str, int]


def memory_report(opt_state: Any) -> MemoryReport:
    """Counts the bytes of an optimizer state that holds Gefen states anywhere.

    Args:
      opt_state: Any optimizer state: arrays or `jax.ShapeDtypeStruct`s (from `jax.eval_shape`).

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
      correction 0
      other 0
      >>> gx.memory_report(gx.gefen_muon(1e-3, bits=4).init(params)).by_tensor
      {'w': 589824}
    """
    by_field = dict.fromkeys((*ScaleByGefenState._fields, "correction", "other"), 0)
    by_tensor: dict[str, int] = defaultdict(int)

    def visit(node: Any) -> None:
        if not isinstance(node, _STATES):
            by_field["other"] += _nbytes(node)
            return
        for field in node._fields:
            if field != "inner":
                by_field[field] += _nbytes(getattr(node, field))
        for slot in _SLOTS:
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(node, slot, None))[0]:
                by_tensor[path_name(path)] += _nbytes(leaf)
        if isinstance(node, SplitWeightsState):
            walk(node.inner)

    def walk(tree: Any) -> None:
        jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, _STATES))

    walk(opt_state)
    return MemoryReport(sum(by_field.values()), by_field, dict(by_tensor))


def _nbytes(tree: Any) -> int:
    return sum(x.size * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))
