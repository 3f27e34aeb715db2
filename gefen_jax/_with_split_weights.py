"""`with_split_weights`: training 16-bit weights as if they had 24 or 32."""

import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt32

from gefen_jax._dither import dither, leaf_phases, positions
from gefen_jax._fused import FusedGefen
from gefen_jax._placed import placed_beside
from gefen_jax._release_part import Low, Part
from gefen_jax._split import advance, correction_dtype
from gefen_jax._split_weights import (
    Leaves,
    Mask,
    Mode,
    SplitWeightsState,
    describe,
    merge_leaf,
    mode_of,
    read_leaves,
    split_weights,
)

# frac(sqrt(2)) in units of 2^-32. Not the golden ratio of `leaf_phases`, by which the moments are
# rounded: two dithers in step would round every update's error in the same direction for ever.
# 1 and the two are independent over the rationals, so their pairs fill the square evenly.
_SILVER = np.uint32(0x6A09E667)


@functools.partial(jax.jit, static_argnames=("bits", "stochastic"))
def _advance_leaf(weight, correction, update, phase, place, *, bits, stochastic):
    """The update of a leaf's weight, and its new correction."""
    words = dither(phase, positions(weight.shape, place))[0] if stochastic else None
    return advance(weight, correction, update.astype(jnp.float32), bits, words)


def _phases(paths: list[str], count: Int[Array, ""]) -> UInt32[Array, "leaves two"]:
    """What the dither of every leaf starts from; other words than those of the moments."""
    names = leaf_phases([f"weights/{path}" for path in paths], jnp.zeros_like(count))[:, 0]
    step = jnp.broadcast_to(count.astype(jnp.uint32) * _SILVER, names.shape)
    return jnp.stack([names, step], axis=-1)


@overload
def with_split_weights(
    tx: FusedGefen,
    bits: int = ...,
    rounding: str = ...,
    dtype: DTypeLike = ...,
    *,
    mask: Mask = ...,
    gradient_dtype: DTypeLike | None = ...,
) -> FusedGefen: ...
@overload
def with_split_weights(
    tx: optax.GradientTransformation,
    bits: int = ...,
    rounding: str = ...,
    dtype: DTypeLike = ...,
    *,
    mask: Mask = ...,
    gradient_dtype: DTypeLike | None = ...,
) -> optax.GradientTransformationExtraArgs: ...
def with_split_weights(
    tx: optax.GradientTransformation | FusedGefen,
    bits: int = 24,
    rounding: str = "stochastic",
    dtype: DTypeLike = "bfloat16",
    *,
    mask: Mask = None,
    gradient_dtype: DTypeLike | None = "float32",
) -> optax.GradientTransformationExtraArgs | FusedGefen:
    r"""Trains 16-bit weights as float32 parameters, with 0, 1 or 2 more bytes for each.

    The model holds weights :math:`w` in bfloat16; the state holds corrections :math:`c`. In every
    step

    .. math::
      \theta_{t-1} &= \mathrm{merge}(w_{t-1}, c_{t-1}), \quad
      \theta_t = \theta_{t-1} + \mathrm{tx}(g_t, \theta_{t-1}) \\
      w_t, c_t &= \mathrm{split}(\theta_t), \quad u_t = w_t - w_{t-1}

    in float32, with merge and split those of `merge_weights` and `split_weights`. So learning
    rates too small for bfloat16, where ``w + u`` is ``w``, still move the weights.

    With 24 bits, and with 16 where there are no corrections at all, rounding is stochastic: right
    on average, and exact where nothing has to be rounded. The fractions that decide come from leaf,
    position and step: a run resumes bit for bit, and a mesh sees what one device sees (but inside
    your own `jax.shard_map`, where positions are those in the arrays at hand, weights are rounded
    by other fractions). With 32 bits nothing is rounded: training is that of float32 parameters.

    Use it like the transformation that it wraps, around all of it and last in a chain: ``u_t`` is
    what must be added to the weights, in float32, and must not be scaled or clipped any more. So
    `optax.clip_by_global_norm`, `optax.apply_if_finite` and schedules go inside. Start from float32
    parameters without losing their lower bits by ``tx.init(params)``, then train
    ``split_weights(params)[0]``, with the same ``bits``, ``dtype`` and ``mask``: other bits give
    some weights that do not fit their corrections, which nothing notices. Or start from a model in
    bfloat16, whose corrections are 0.

    Args:
      tx: Any transformation that gives final updates, e.g. `optax.adamw` or `gefen`. It sees
        float32 parameters, in ``init`` and in ``update``. Or a `fused_gefen`: then the result is
        one, too, with the state that this transformation of `gefen` has. It merges and splits
        weights where it reads and writes them, so that on a CPU no large leaf of dual codes is ever
        whole in float32.
      bits: 24, 16 + 8 bits of correction; 32, 16 + 16; or 16, weights alone.
      rounding: "stochastic" or "nearest", which loses what is below half a step. It has no meaning
        with 32 bits.
      dtype: The weights' dtype: bfloat16 or float16.
      mask: Which leaves are split: a tree of bools, a prefix of it, or a function of the params;
        None for all in float32 or ``dtype``. The others, and integers, are the wrapped
        transformation's alone: a norm's float32 scale stays in float32.
      gradient_dtype: Gradients of split leaves reach ``tx`` in this dtype. None leaves them as they
        come: with `gefen`, which computes in float32 in any case, that spares a CPU a copy, and
        rounds the updates to the gradients' dtype. A `fused_gefen` takes them as they come.

    Returns:
      A `optax.GradientTransformationExtraArgs`, or of a `fused_gefen` a `FusedGefen`, whose state
      is a `SplitWeightsState`. Updates of split leaves are float32: `optax.apply_updates` adds them
      in float32 and casts. A None gradient leaves weight and correction as they are, and so, bit
      for bit, does an update of 0.

    Raises:
      ValueError: For arguments out of range; in ``update`` without ``params``, and for a state of
        other bits.
      TypeError: For a leaf in the other of bfloat16 and float16; in ``update`` for a leaf that is
        still float32.
      NotImplementedError: When the update is differentiated.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> def loss(weights):
      ...   return jnp.mean((weights["w"].astype(jnp.float32) - 1) ** 2)
      >>> params = {"w": jnp.full((64, 128), 0.9)}
      >>> def train(tx, weights, opt_state):
      ...   for _ in range(50):
      ...     updates, opt_state = tx.update(jax.grad(loss)(weights), opt_state, weights)
      ...     weights = optax.apply_updates(weights, updates)
      ...   return weights, opt_state
      >>> tx = gx.with_split_weights(gx.gefen(1e-3, weight_decay=0.0))
      >>> weights, opt_state = train(tx, gx.split_weights(params)[0], tx.init(params))
      >>> print(weights["w"].dtype, gx.merge_weights(weights, opt_state)["w"].mean().round(2))
      bfloat16 0.95
      >>> tx = gx.gefen(1e-3, weight_decay=0.0)  # bfloat16 alone: 0.9 + 0.001 rounds to 0.9
      >>> weights = gx.split_weights(params)[0]
      >>> print(train(tx, weights, tx.init(weights))[0]["w"].mean())
      0.898438

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026

    .. note::
      ``w + u`` is the new weight, exactly, unless that is less than 2^-14 of the old one (2^-11 in
      float16): a float32 ``u`` cannot say so. Then the weight is what the sum gives, and the
      correction brings it as near to :math:`\theta_t` as it can, within 2^-22 of the old one. A
      weight once infinite stays so, or becomes NaN.

    .. note::
      ``init`` with weights that are not float32 makes a float32 copy of them for ``tx.init``. Under
      `jax.jit` it exists only where ``tx`` keeps it. With `optax.inject_hyperparams`, name ``bits``
      in its ``static_args``.
    """
    mode = mode_of(bits, dtype, mask)
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"`rounding` must be 'stochastic' or 'nearest', got {rounding!r}")
    if gradient_dtype is not None and not jnp.issubdtype(gradient_dtype, jnp.floating):
        raise ValueError(f"`gradient_dtype` must be floating or None, got {gradient_dtype!r}")
    init = tx.init
    stochastic = rounding == "stochastic" and mode.bits < 32

    def init_fn(params: optax.Params) -> SplitWeightsState:
        leaves = read_leaves(params, mode)
        correction = split_weights(params, mode.bits, mode.dtype, mask=mode.mask)[1]
        wide = [_widened(x, s) for x, s in zip(leaves.leaves, leaves.is_split, strict=True)]
        return SplitWeightsState(
            count=placed_beside(params, jnp.zeros([], jnp.int32)),
            correction=correction,
            inner=init(leaves.treedef.unflatten(wide)),
        )

    if isinstance(tx, FusedGefen):
        return _fused(tx, init_fn, mode, stochastic)
    inner = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SplitWeightsState]:
        if params is None:
            raise ValueError(_NO_PARAMS)
        leaves, corrections = _read(params, state, mode)
        updates, inner_state = inner.update(
            _cast_gradients(leaves, updates, gradient_dtype),
            state.inner,
            leaves.treedef.unflatten(_merged(leaves, corrections)),
            **extra_args,
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        phases = _phases(leaves.paths, count)
        new_updates = leaves.select(updates)
        part = extra_args.get("gefen_part", Part())
        for i, weight in enumerate(leaves.leaves):
            if leaves.is_split[i] and _is_array(new_updates[i]):
                new_updates[i], corrections[i] = _advance_leaf(
                    jnp.asarray(weight),
                    corrections[i],
                    jnp.asarray(new_updates[i]),
                    phases[i],
                    part.place(jnp.shape(weight)),
                    bits=mode.bits,
                    stochastic=stochastic,
                )
        new_state = SplitWeightsState(count, leaves.treedef.unflatten(corrections), inner_state)
        return leaves.treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fused(tx: FusedGefen, init: Any, mode: Mode, stochastic: bool) -> FusedGefen:
    """A fused step that merges and splits the weights where it reads and writes them."""

    def step_part(grads: Any, state: Any, params: Any, part: Part) -> tuple[Any, Any, Any]:
        leaves, corrections = _read(params, state, mode)
        count = jnp.asarray(optax.safe_increment(state.count))
        phases = _phases(leaves.paths, count)
        lows = {
            path: Low(corrections[i], phases[i], mode.bits, stochastic)
            for i, path in enumerate(leaves.paths)
            if leaves.is_split[i]
        }
        params, inner, new = tx.step_part(grads, state.inner, params, part._replace(lows=lows))
        corrections = [
            new.get(path, low) for path, low in zip(leaves.paths, corrections, strict=True)
        ]
        correction = leaves.treedef.unflatten(corrections)
        return params, SplitWeightsState(count, correction, inner), new

    return FusedGefen(init, step_part, tx.kinds)


_NO_PARAMS = (
    "`with_split_weights` needs `params` in `update`, the weights as they are:"
    " `tx.update(grads, opt_state, params)`"
)


def _is_array(x: Any) -> bool:
    """Or else None, or optax.MaskedNode: nothing to add."""
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(x)) and x is not None


def _widened(leaf: Any, is_split: bool) -> Any:
    return jnp.asarray(leaf).astype(jnp.float32) if is_split else leaf


def _merged(leaves: Leaves, corrections: list[Any]) -> list[Any]:
    """The leaves as the wrapped transformation sees them."""
    zipped = zip(leaves.leaves, corrections, leaves.is_split, strict=True)
    return [merge_leaf(jnp.asarray(x), low) if s else x for x, low, s in zipped]


def _cast_gradients(leaves: Leaves, grads: Any, dtype: Any) -> Any:
    if dtype is None:
        return grads
    cast = [
        jnp.asarray(g).astype(dtype) if s and _is_array(g) else g
        for g, s in zip(leaves.select(grads), leaves.is_split, strict=True)
    ]
    return leaves.treedef.unflatten(cast)


def _read(params: Any, state: Any, mode: Mode) -> tuple[Leaves, list[Any]]:
    """The weights, and of each the correction that it had from `init` on."""
    if not isinstance(state, SplitWeightsState):
        raise TypeError(
            f"the state must be a SplitWeightsState, got {type(state).__name__}: give the one of"
            " this optimizer's `init`, not that of the optimizer inside"
        )
    leaves = read_leaves(params, mode)
    corrections = leaves.select(state.correction)
    expected = correction_dtype(mode.bits)
    rows = zip(leaves.paths, leaves.leaves, leaves.is_split, corrections, strict=True)
    for path, leaf, is_split, low in rows:
        if is_split and jnp.result_type(leaf) != mode.dtype:
            raise TypeError(
                f"`params[{path}]` is {jnp.result_type(leaf)} in `update`, where its weights are"
                f" expected in {mode.dtype}: train `gx.split_weights(params)[0]`, or leave this"
                " leaf in float32 by `mask`"
            )
        has_one = low is not None and jnp.result_type(low) == expected
        fits = low is None if not is_split or expected is None else has_one
        if not fits or (low is not None and jnp.shape(low) != jnp.shape(leaf)):
            kind = f"{expected}{list(jnp.shape(leaf))}" if is_split and expected else "None"
            raise ValueError(
                f"the correction of `{path}` must be {kind}, found {describe(low)}: use the `bits`"
                " and `mask` that the state was made with, and keep its dtypes (no tree.cast)"
            )
    return leaves, corrections
