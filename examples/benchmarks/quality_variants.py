"""The optimizers that the quality bench compares; a new one is a new entry of `VARIANTS`.

Each is called once per seed, outside of `jit`, with the parameters before training and the gradient
of the first batch, for those that want to look at them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import optax
from research_moments import Kept, scale_by_kept

import gefen_jax as gx

Variant = Callable[..., optax.GradientTransformation]


def _adamw(
    learning_rate: optax.Schedule, *, b2: float, weight_decay: float, mask: Any, **_: Any
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)


def _gefen(
    learning_rate: optax.Schedule, *, b2: float, weight_decay: float, mask: Any, **_: Any
) -> optax.GradientTransformation:
    """As it comes: both moments of every element in one byte."""
    return gx.gefen(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)


def _optimizer(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    **_: Any,
) -> optax.GradientTransformation:
    """One that takes what AdamW takes."""
    return make(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask)


def _split(bits: int, *args: Any, **kwargs: Any) -> optax.GradientTransformation:
    return gx.with_split_weights(_gefen(*args, **kwargs), bits=bits)


def _adamw_split(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
    """What narrow weights cost alone."""
    return gx.with_split_weights(_adamw(*args, **kwargs))


def _planned(
    rule: Literal["axis", "reference"],
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    params: Any,
    grads: Any,
) -> optax.GradientTransformation:
    """Gefen's own state: one second moment per block, inferred from the first gradient."""
    plan = gx.calibrate(params, grads, rule=rule)
    return gx.gefen(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask, plan=plan)


def _muon(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    **_: Any,
) -> optax.GradientTransformation:
    """With updates of AdamW's root mean square, so that its learning rates serve."""
    return make(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        adam_b2=b2,
        consistent_rms=0.2,
    )


def _simulated(
    kept: Kept,
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    **_: Any,
) -> optax.GradientTransformation:
    """Moments in float32, rounded to what a leaner state could hold; so its bytes are no row's."""
    return optax.chain(
        scale_by_kept(kept, b2),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


# Parts of the default state, and what more bytes would buy.
_NU_PER_PAIR = Kept(
    nu="maximum", nu_levels=256, nu_ratio="float", nu_rounding="golden", nu_pairs=True
)
_NU_EACH = replace(_NU_PER_PAIR, nu_pairs=False)
_MU = Kept(mu_levels=16, mu_relative=True, mu_rounding="golden")
_SIMULATED = {
    "mu exact, nu per pair": _NU_PER_PAIR,
    "mu exact, nu per pair, relative to columns": replace(_NU_PER_PAIR, nu_columns=True),
    "mu exact, nu 8 bits each": _NU_EACH,
    "mu 4 bits, nu exact": _MU,
    "mu 8 bits, nu per pair": replace(
        _NU_PER_PAIR, mu_levels=256, mu_relative=True, mu_rounding="golden"
    ),
    "mu 4 bits, nu 8 bits each": replace(
        _NU_EACH, mu_levels=16, mu_relative=True, mu_rounding="golden"
    ),
}


def _shorter_axis(
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    mask: Any,
    params: Any,
    **_: Any,
) -> optax.GradientTransformation:
    """Pairs of two features of the residual stream, which lie along a matrix's shorter axis."""
    axes = {
        row.path: len(row.shape) - 2
        for row in gx.plan_by_shape(params).table()
        if row.kind == gx.DualCode.name and row.shape[-2] < row.shape[-1]
    }
    plan = gx.plan_by_shape(params, pair_axis=axes)
    return gx.gefen(learning_rate, b2=b2, weight_decay=weight_decay, mask=mask, plan=plan)


def _smaller_blocks(size: int, *args: Any, params: Any, **kwargs: Any) -> Any:
    """A scale of the first moments for every so many elements at most, instead of 256."""
    plan = gx.plan_by_shape(params)

    def divided(length: int) -> int:
        halves = (length >> i for i in range(length.bit_length()))
        return next(half for half in halves if half <= size)

    for row in plan.table():
        kind = plan[row.path].kind
        if isinstance(kind, gx.DualCode):
            smaller = gx.DualCode(tuple(map(divided, kind.block)))
            plan = plan.with_kind(row.path, smaller)
    return _optimizer(functools.partial(gx.gefen, plan=plan), *args, **kwargs)


def _wide(*args: Any, params: Any, **kwargs: Any) -> optax.GradientTransformation:
    """A byte and a half per parameter: no second moment is shared."""
    plan = gx.plan_by_shape(params, kind="wide_dual_code")
    return _optimizer(functools.partial(gx.gefen, plan=plan), *args, **kwargs)


def _wide_in(pattern: str, *args: Any, params: Any, **kwargs: Any) -> Any:
    """Half a byte more where the path matches, to see where sharing a second moment costs."""
    plan = gx.plan_by_shape(params)
    wide = gx.plan_by_shape(params, kind="wide_dual_code")
    for row in wide.table():
        if row.kind == gx.WideDualCode.name and re.search(pattern, row.path):
            plan = plan.with_kind(row.path, wide[row.path].kind)
    return _optimizer(functools.partial(gx.gefen, plan=plan), *args, **kwargs)


VARIANTS: dict[str, Variant] = {
    "adamw": _adamw,
    "gefen": _gefen,
    "gefen, wide codes": _wide,
    "gefen, wide codes in attention": functools.partial(_wide_in, "qkv|attention_out"),
    "gefen, wide codes in mlp": functools.partial(_wide_in, "mlp"),
    "gefen, wide codes in embeddings": functools.partial(_wide_in, "embedding"),
    "gefen, wide codes in a": functools.partial(_wide_in, "/a$"),
    "gefen, wide codes in b": functools.partial(_wide_in, "/b$"),
    "gefen, blocks of 64": functools.partial(_smaller_blocks, 64),
    "gefen, pairs along the shorter axis": _shorter_axis,
    "gefen, shared blocks": functools.partial(_planned, "axis"),
    "gefen, reference rule": functools.partial(_planned, "reference"),
    "muon": functools.partial(_muon, optax.contrib.muon),
    "gefen_muon": functools.partial(_muon, gx.gefen_muon),
    "gefen_muon, 4 bits": functools.partial(_muon, functools.partial(gx.gefen_muon, bits=4)),
    "flash_adamw": functools.partial(_optimizer, gx.flash_adamw),
    "microadam": functools.partial(_optimizer, gx.microadam),
    "adamw, split weights": _adamw_split,
    "gefen, split weights": functools.partial(_split, 24),
    "gefen, 16 bits": functools.partial(_split, 16),
    "gefen, bfloat16 weights": _gefen,
    **{f"simulated: {name}": functools.partial(_simulated, x) for name, x in _SIMULATED.items()},
}

# The model holds its weights in bfloat16, and gradients come in bfloat16; it computes in float32.
NARROW = frozenset(
    {
        "adamw, split weights",
        "gefen, split weights",
        "gefen, 16 bits",
        "gefen, bfloat16 weights",
    }
)

# Bytes per parameter that a simulated state would need, of large leaves.
SIMULATED_BYTES = {f"simulated: {name}": x.bytes_per_parameter for name, x in _SIMULATED.items()}
