"""Weights in 16 bits and what makes up for them: `split_weights` and `merge_weights`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from gefen_jax._paths import check_names, named_leaves, path_name, resolved
from gefen_jax._split import BITS, NARROW, correction_dtype, merge, split

Mask = Any | Callable[[optax.Params], Any] | None


class SplitWeightsState(NamedTuple):
    """State of `with_split_weights`: the corrections, and the wrapped transformation's state."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    correction: Any  # follows the params: int8 or int16 of the parameter's shape, or None
    inner: Any  # the wrapped transformation's, made for float32 parameters


class Mode(NamedTuple):
    """How weights are kept."""

    bits: int
    dtype: np.dtype
    mask: Mask


def mode_of(bits: Any, dtype: Any, mask: Mask) -> Mode:
    if bits not in BITS:
        raise ValueError(f"`bits` must be 16, 24 or 32, got {bits}")
    dtype = jnp.dtype(dtype)
    if dtype not in NARROW:
        raise ValueError(f"`dtype` must be bfloat16 or float16, got {dtype}")
    return Mode(int(bits), dtype, mask)


class Leaves(NamedTuple):
    """The leaves of a parameter tree; None is one."""

    paths: list[str]
    leaves: list[Any]
    is_split: list[bool]  # or kept as it is
    treedef: Any

    def select(self, tree: Any) -> list[Any]:
        """What another tree has in the places of these leaves."""
        return self.treedef.flatten_up_to(tree)


def read_leaves(params: Any, mode: Mode) -> Leaves:
    """The leaves, and which of them are kept in two parts."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    entries = _mask_entries(mode.mask, params) if flat else {}
    leaves = Leaves([path_name(path) for path, _ in flat], [x for _, x in flat], [], treedef)
    check_names(leaves.paths)
    for (key_path, leaf), path in zip(flat, leaves.paths, strict=True):
        dtype = None if leaf is None else jnp.result_type(leaf)
        chosen = dtype in (jnp.float32, *NARROW) and _is_chosen(path, key_path, entries)
        if chosen and dtype not in (jnp.float32, mode.dtype):
            raise TypeError(
                f"`params[{path}]` is {dtype}, but weights are kept in {mode.dtype}: cast it, give"
                f" `dtype={str(dtype)!r}`, or leave this leaf as it is by `mask`"
            )
        leaves.is_split.append(chosen)
    return leaves


def _mask_entries(mask: Mask, params: Any) -> dict[tuple[Any, ...], Any]:
    # By key path, so that trees of which a wrapper shows only a part fit the mask of the whole.
    mask = True if mask is None else resolved(mask, params)
    return dict(jax.tree_util.tree_flatten_with_path(mask)[0])


def _is_chosen(path: str, key_path: tuple[Any, ...], entries: dict[tuple[Any, ...], Any]) -> bool:
    for length in range(len(key_path), -1, -1):
        if key_path[:length] in entries:
            return bool(entries[key_path[:length]])
    raise ValueError(f"`mask` has no entry for `{path}`: give it, or a subtree above it, a bool")


# Jitted: one pass over memory, compiled once for leaves of equal shape.
_split_leaf = jax.jit(split, static_argnums=(1, 2))
merge_leaf = jax.jit(merge)


def split_weights(
    params: optax.Params,
    bits: int = 24,
    dtype: DTypeLike = "bfloat16",
    *,
    mask: Mask = None,
) -> tuple[Any, Any]:
    r"""Splits float32 parameters into 16-bit weights and small integer corrections.

    In bfloat16, with :math:`M` the bits of :math:`|\theta|` as an integer,

    .. math::
      t = \mathrm{round}(M / 2^8), \quad w = \lfloor (t + 2^7) / 2^8 \rfloor, \quad
      c = t - 2^8 w

    for 24 bits: the bits of the weight's magnitude are :math:`w`, and :math:`c` is in int8. With 32
    bits :math:`t = M`, the step is :math:`2^{16}` and :math:`c` is in int16: nothing is lost. The
    weight is ``theta.astype(bfloat16)`` but for one of 500 with 24 bits, and for ties with 32,
    which are rounded to the neighbour. In float16 the same holds with its own bits.

    Relative errors of what `merge_weights` gives back, at most: 2^-16 in 24 bits, 0 in 32. For
    float16, 2^-19 in 24 bits above 2^-14, and 2^-33 + 2^-41 in absolute terms below; in 32 bits 0
    above 2^-17, and 2^-41 below.

    Args:
      params: A tree of arrays. Leaves in float32 are split, with subnormals and infinities; a NaN
        stays one. Leaves in ``dtype`` are weights already, with corrections of 0. Leaves of other
        dtypes, integers and None stay as they are.
      bits: 24; 32; or 16, for no correction: the weights are ``params.astype(dtype)``, in float16
        but for near ties below 2^-14.
      dtype: The weights' dtype: bfloat16 or float16.
      mask: Which leaves to split: a tree of bools, a prefix of it, or a function of the params.
        None for all.

    Returns:
      The weights, like ``params`` with ``dtype`` for float32, and the corrections, a tree like it
      of int8 for 24 bits, int16 for 32, with None where a leaf has none.

    Raises:
      ValueError: For other ``bits`` or ``dtype``, and for a leaf without entry in ``mask``.
      TypeError: For a leaf in the other of bfloat16 and float16.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.array([0.1, 1.0, 3e-5])}
      >>> weights, correction = gx.split_weights(params)
      >>> print(weights["w"], correction["w"])
      [0.100098 1 3.00407e-05] [-51   0 -87]
      >>> print(gx.merge_weights(weights, correction)["w"])
      [1.0000038e-01 1.0000000e+00 3.0000228e-05]

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026. Its correction is a scaled error; these are bits.

    .. note::
      What overflows, as in a cast: a float32 that rounds to infinity in ``dtype`` has an infinite
      weight. In bfloat16 (beyond 3.39e38) `merge_weights` still gives it back; in float16, beyond
      65536, infinity.
    """
    mode = mode_of(bits, dtype, mask)
    leaves = read_leaves(params, mode)
    parts = []
    for leaf, is_split in zip(leaves.leaves, leaves.is_split, strict=True):
        parts.append(_parts(jnp.asarray(leaf), mode) if is_split else (leaf, None))
    weights, correction = ([part[i] for part in parts] for i in (0, 1))
    return leaves.treedef.unflatten(weights), leaves.treedef.unflatten(correction)


def _parts(leaf: Array, mode: Mode) -> tuple[Array, Array | None]:
    """A leaf's weight and its correction."""
    if leaf.dtype == jnp.float32:
        return _split_leaf(leaf, mode.bits, mode.dtype)
    exact = correction_dtype(mode.bits)
    return leaf, None if exact is None else jnp.zeros_like(leaf, exact)


def _corrections(tree: Any) -> dict[str, Any]:
    """Corrections by name, from a tree of them or from an optimizer's state."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SplitWeightsState))
    states = [x for x in nodes if isinstance(x, SplitWeightsState)]
    trees = [x.correction for x in states] if states else [tree]
    # Several states share a tree under optax.partition: a leaf has a correction in one of them.
    return {path: leaf for tree in trees for path, leaf in named_leaves(tree) if leaf is not None}


def merge_weights(weights: optax.Params, correction: Any) -> Any:
    """Gives back the float32 parameters that `split_weights` has split.

    To evaluate or export what is trained by `with_split_weights`. Leaves are matched by path.

    Args:
      weights: A tree of arrays; leaves in bfloat16 and float16 are weights.
      correction: The corrections from `split_weights`, or an optimizer's state that holds a
        `SplitWeightsState` anywhere.

    Returns:
      A tree like ``weights``, in float32 for bfloat16 and float16, whether they have a correction
      or not; other leaves as they are.

    Raises:
      ValueError: For a correction that is no weight's, by its path.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.array([0.1, 0.2, 0.3])}
      >>> tx = gx.with_split_weights(optax.sgd(1e-3), bits=32)
      >>> opt_state = tx.init(params)
      >>> weights, _ = gx.split_weights(params, bits=32)
      >>> print(gx.merge_weights(weights, opt_state)["w"] == params["w"])
      [ True  True  True]
    """
    corrections = _corrections(correction)
    flat, treedef = jax.tree_util.tree_flatten_with_path(weights, is_leaf=lambda x: x is None)
    merged = []
    for key_path, leaf in flat:
        path = path_name(key_path)
        low = corrections.pop(path, None)
        is_narrow = leaf is not None and jnp.result_type(leaf) in NARROW
        if low is not None:
            _check_correction(path, leaf, low, is_narrow)
        merged.append(merge_leaf(jnp.asarray(leaf), low) if is_narrow else leaf)
    if corrections:
        raise ValueError(
            f"`correction` has `{next(iter(corrections))}`, which is no leaf of `weights`: give the"
            " corrections, or the optimizer state, that belong to these weights"
        )
    return treedef.unflatten(merged)


def _check_correction(path: str, leaf: Any, low: Any, is_narrow: bool) -> None:
    known = [correction_dtype(bits) for bits in BITS]
    if not is_narrow or jnp.shape(leaf) != jnp.shape(low) or jnp.result_type(low) not in known:
        raise ValueError(
            f"`correction[{path}]` must be int8 or int16 and have the shape of a weight in bfloat16"
            f" or float16; found {describe(low)} beside {describe(leaf)}"
        )


def describe(x: Any) -> str:
    return "None" if x is None else f"{jnp.result_type(x)}{list(jnp.shape(x))}"
