"""Weights in two parts: every bit of the arithmetic, and training that float32 would not tell."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._backend import CHUNK
from gefen_jax._dither import dither, leaf_phases
from gefen_jax._split import advance, correction_dtype, merge, split
from gefen_jax._with_split_weights import _phases

_BF16, _FP16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)

_split = jax.jit(split, static_argnums=(1, 2))
_merge = jax.jit(merge)
_advance = jax.jit(advance, static_argnums=3)

# The bits -----------------------------------------------------------------------------------------

_LOWS = (0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001)
_LOWS += (0x807F, 0x8080, 0xFF7F, 0xFF80, 0xFF81, 0xFFFF)


@functools.cache
def _floats() -> np.ndarray:
    """Every sign, exponent and upper 7 bits of a mantissa, with tails of every sort."""
    rng = np.random.default_rng(0)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    tails = [np.full(1 << 16, low, np.uint32) for low in _LOWS]
    tails += [rng.integers(0, 1 << 16, 1 << 16, dtype=np.uint32) for _ in range(6)]
    return np.concatenate([high | tail for tail in tails]).view(np.float32)


def _words(x: Any) -> np.ndarray:
    """The bits of an array, for comparisons that know -0 from 0 and one NaN from another."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def _weights(dtype: np.dtype) -> np.ndarray:
    """All that there are."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


class Format(NamedTuple):
    """Bounds that follow from the format: see the docstring of `split_weights`."""

    dtype: np.dtype
    bits: int
    relative: float  # 2^-n of n significant bits: half a unit, of the smallest mantissa
    smallest: float  # above this; below, numbers are evenly spaced and errors absolute
    absolute: float
    overflow: float  # from here on the number is infinite


_FORMATS = {
    # 8 bits significant, and those of the correction. Below 2^-126 units of 2^-133.
    "bfloat16, 16": Format(_BF16, 16, 2.0**-8, 2.0**-126, 2.0**-134, (2 - 2.0**-8) * 2.0**127),
    "bfloat16, 24": Format(_BF16, 24, 2.0**-16, 2.0**-126, 2.0**-142, (2 - 2.0**-16) * 2.0**127),
    "bfloat16, 32": Format(_BF16, 32, 0.0, 2.0**-126, 0.0, np.inf),
    # 11 bits significant, with those of the correction; below 2^-14 units of 2^-24.
    "float16, 16": Format(_FP16, 16, 2.0**-11, 2.0**-14, 2.0**-25 + 2.0**-41, 65520.0),
    "float16, 24": Format(_FP16, 24, 2.0**-19, 2.0**-14, 2.0**-33 + 2.0**-41, 65536 - 2.0**-5),
    "float16, 32": Format(_FP16, 32, 0.0, 2.0**-17, 2.0**-41, 65536.0),
}
_SPLIT = [name for name in _FORMATS if not name.endswith("16")]


@pytest.fixture(params=_FORMATS)
def form(request) -> Format:
    return _FORMATS[request.param]


def test_error_of_every_exponent(form):
    x = _floats()
    weight, low = _split(x, form.bits, form.dtype)
    assert weight.dtype == form.dtype and (low is None) == (form.bits == 16)
    if low is not None:
        assert low.dtype == correction_dtype(form.bits)
    merged = np.asarray(_merge(weight, low))
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(merged), nan)
    np.testing.assert_array_equal(np.isnan(np.asarray(weight, np.float32)), nan)
    np.testing.assert_array_equal(np.signbit(merged), np.signbit(x))
    size = np.abs(x[~nan].astype(np.float64))
    got = np.abs(merged[~nan].astype(np.float64))
    infinite = size >= form.overflow
    np.testing.assert_array_equal(np.isinf(got), infinite)
    size, got = size[~infinite], got[~infinite]
    error = np.abs(got - size)
    bound = np.where(size >= form.smallest, form.relative * size, form.absolute)
    assert np.all(error <= bound)


@pytest.mark.parametrize("dtype", [_BF16, _FP16])
def test_more_bits_are_nearer(dtype):
    x = _floats()
    finite = np.isfinite(x) & (np.abs(x) < _FORMATS[f"{dtype}, 16"].overflow)
    errors = [
        np.abs(np.asarray(_merge(*_split(x, bits, dtype)))[finite].astype(np.float64) - x[finite])
        for bits in (16, 24, 32)
    ]
    # 16 and 24 bits of float16 are rounded from its 32: half a unit of those each.
    slack = 2.0**-40 if dtype == _FP16 else 0.0
    assert np.all(errors[1] <= errors[0] + slack) and np.all(errors[2] <= errors[1] + slack)


def test_32_bits_of_bfloat16_lose_nothing():
    x = _floats()
    real = ~np.isnan(x)
    merged = _merge(*_split(x, 32, _BF16))
    np.testing.assert_array_equal(_words(merged)[real], _words(x)[real])


def test_bits_are_those_of_the_specification():
    """bfloat16: the formulas of the docstring, in integers of another kind."""
    x = _floats()
    x = x[~np.isnan(x)]
    magnitude = (_words(x) & 0x7FFFFFFF).astype(np.int64)
    # NumPy rounds halves to even, too; a quotient by a power of two is exact.
    rounded = {24: np.rint(magnitude / 2**8).astype(np.int64), 32: magnitude}
    for bits, keep in {24: 8, 32: 16}.items():
        weight, low = _split(x, bits, _BF16)
        high = (rounded[bits] + 2 ** (keep - 1)) // 2**keep
        np.testing.assert_array_equal(_words(weight) & 0x7FFF, high)
        np.testing.assert_array_equal(low, rounded[bits] - high * 2**keep)


def test_the_weight_is_the_cast_but_for_near_ties(form):
    x = _floats()
    x = x[~np.isnan(x)]
    weight = _words(_split(x, form.bits, form.dtype)[0])
    with np.errstate(over="ignore"):
        cast = _words(x.astype(form.dtype))
    if form.bits == 16:
        # float16 below 2^-14 is rounded twice: to 2^-40, which may be a tie that x was not.
        once = np.abs(x) >= (2.0**-14 if form.dtype == _FP16 else 0.0)
        np.testing.assert_array_equal(weight[once], cast[once])
    apart = weight.astype(np.int64) - cast
    assert np.all(np.abs(apart) <= 1)
    # Apart are at most one tail in 2^8, those of the correction's step at a tie: of random ones,
    # and of float16's double rounding, fewer. Not more, so no tolerance.
    assert (apart[-6 << 16 :] != 0).mean() <= 2.0**-8


def test_what_comes_back_stays(form):
    """Splitting what was merged gives the same parts, down to -0 and subnormals."""
    parts = _split(_floats(), form.bits, form.dtype)
    again = _split(_merge(*parts), form.bits, form.dtype)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_words(a), _words(b)), again, parts)


def test_weights_are_exact(form):
    """Of a number that is a weight already the correction is 0."""
    weights = _weights(form.dtype)
    with np.errstate(invalid="ignore"):  # NumPy warns of some NaN
        weights = weights[~np.isnan(weights.astype(np.float32))]
    wide = np.asarray(_merge(weights, None))
    np.testing.assert_array_equal(_words(wide), _words(weights.astype(np.float32)))
    again, low = _split(wide, form.bits, form.dtype)
    np.testing.assert_array_equal(_words(again), _words(weights))
    assert low is None or not np.any(low)
    # Stochastic rounding, too, lets them be; subnormals are flushed by some devices' sums.
    usual = _usual(wide) | np.isinf(wide)
    weights, low = weights[usual], None if low is None else low[usual]
    for word in (0, 1 << 31, (1 << 32) - 1):
        words = np.full(weights.shape, word, np.uint32)
        zero = np.zeros(weights.shape, np.float32)
        delta, low = _advance(weights, low, zero, form.bits, words)
        assert np.all(_words(delta) == 1 << 31) and (low is None or not np.any(low))


def test_order_is_kept(form):
    x = _floats()
    x = np.sort(x[~np.isnan(x)])
    weight, low = _split(x, form.bits, form.dtype)
    for values in (np.asarray(weight).astype(np.float32), np.asarray(_merge(weight, low))):
        assert np.all(values[1:] >= values[:-1])


def test_negatives_mirror(form):
    x = _floats()
    weight, low = _split(x, form.bits, form.dtype)
    mirrored, same = _split(-x, form.bits, form.dtype)
    np.testing.assert_array_equal(_words(mirrored), _words(weight) ^ 0x8000)
    assert low is None or np.array_equal(low, same)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(_FORMATS)),
    words=st.lists(st.integers(0, 2**32 - 1), min_size=33, max_size=33),
)
def test_any_float_comes_back_the_same_way_twice(name, words):
    form, x = _FORMATS[name], np.array(words, np.uint32).view(np.float32)
    once = _merge(*_split(x, form.bits, form.dtype))
    np.testing.assert_array_equal(
        _words(_merge(*_split(once, form.bits, form.dtype))), _words(once)
    )
    np.testing.assert_array_equal(np.isnan(once), np.isnan(x))


@pytest.mark.parametrize("size", [0, 1, 33, 1000, 4097])
def test_tails(size):
    """Whatever the size, an element is treated as in any other array."""
    x = _floats()[(3 << 16) - 2000 :]
    whole = _split(x, 24, _BF16)
    part = _split(x[:size], 24, _BF16)
    for a, b in zip(part, whole, strict=True):
        np.testing.assert_array_equal(_words(a), _words(b)[:size])


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", _FORMATS)
def test_dtypes_are_stated(name):
    form = _FORMATS[name]
    low = correction_dtype(form.bits)
    x, words, weight = (
        jax.ShapeDtypeStruct((4,), d) for d in (jnp.float32, jnp.uint32, form.dtype)
    )
    correction = None if low is None else jax.ShapeDtypeStruct((4,), low)
    assert jax.eval_shape(merge, weight, correction) == x
    parts = jax.eval_shape(lambda x: split(x, form.bits, form.dtype), x)
    assert parts == (weight, correction)
    for dither_words in (words, None):
        out = jax.eval_shape(
            lambda w, c, u, d: advance(w, c, u, form.bits, d), weight, correction, x, dither_words
        )
        assert out == (x, correction)


# Right on average ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16, 16", "bfloat16, 24", "float16, 16", "float16, 24"])
def test_stochastic_rounding_is_right_on_average(name):
    """Over all fractions that can decide, the mean is the number itself: exactly, no tolerance."""
    form = _FORMATS[name]
    drop = 32 - form.bits
    x = np.random.default_rng(1).choice(_floats(), 1 << (20 - drop))
    # Where doubles add up exactly, and away from overflow; for float16 where nothing is fixed.
    low = 2.0**-100 if form.dtype == _BF16 else 2.0**-17
    high = 2.0**100 if form.dtype == _BF16 else 2.0**15
    x = x[(np.abs(x) > low) & (np.abs(x) < high)]
    words = np.arange(1 << drop, dtype=np.uint32)[:, None] << np.uint32(32 - drop)
    zeros = np.zeros((1 << drop, x.size), form.dtype)
    none = None if form.bits == 16 else zeros.astype(np.int8)
    # From a weight of 0: the update is the number.
    words, updates = np.broadcast_arrays(words, x)
    delta, low = _advance(zeros, none, updates, form.bits, words)
    got = np.asarray(_merge(np.asarray(delta).astype(form.dtype), low), np.float64)
    np.testing.assert_array_equal(got.mean(axis=0), x.astype(np.float64))
    # And it is one of the two neighbours.
    unit = np.maximum(2 * form.relative * np.abs(x), 2 * form.absolute)
    assert np.all(np.abs(got - x) <= unit)


def _fraction(paths: list[str], count: Any, size: int) -> np.ndarray:
    """The dither of weights, as numbers in [0, 1)."""
    phases = _phases(paths, jnp.int32(count))
    words = dither(phases[0], jnp.arange(size, dtype=jnp.uint32))[0]
    return np.asarray(words) / 2.0**32


@pytest.mark.parametrize("bits", [16, 24])
def test_small_updates_add_up(bits):
    """A thousand updates of a fraction of a unit move every weight by their sum.

    The multiples of an irrational number with partial quotients of at most 2, as sqrt(2) has, visit
    every interval as often as its length says, but for at most 3 per digit of the count in that
    number system, of which 1,000 has 8.
    """
    steps, unit = 1000, 2.0**-8 if bits == 16 else 2.0**-16  # of numbers in [1/2, 1)
    # A multiple of 2^-24: what float32 itself would round away is not in question.
    update = np.float32(5 / 256 * unit)
    tx = gx.with_split_weights(optax.sgd(1.0), bits)
    params = {"w": jnp.full(512, 0.6, jnp.bfloat16)}
    grads = {"w": jnp.full(512, -update, jnp.float32)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    end, state = jax.jit(lambda *c: jax.lax.scan(step, c, length=steps)[0])(params, tx.init(params))
    moved = np.asarray(gx.merge_weights(end, state)["w"], np.float64) - float(params["w"][0])
    assert np.all(np.abs(moved - steps * update) <= 3 * 8 * unit)
    assert abs(moved.mean() - steps * update) <= 0.05 * steps * update


def test_elements_and_moments_have_dithers_of_their_own():
    size = 1 << 14
    own = _fraction(["w"], 5, size)
    # Means of independent fractions: within 5 standard deviations.
    assert abs(own.mean() - 0.5) <= 5 * np.sqrt(1 / 12 / size)
    assert abs(np.corrcoef(own[1:], own[:-1])[0, 1]) <= 5 / np.sqrt(size)
    assert abs(np.corrcoef(own, _fraction(["v"], 5, size))[0, 1]) <= 5 / np.sqrt(size)
    # Over the steps, the fractions of one element and of its moments fill the square: neither lags
    # the other by a constant. A quarter holds its share but for the discrepancy, log^2(n) / n.
    steps = 1 << 12
    counts = jnp.arange(steps, dtype=jnp.int32)
    weights = jax.vmap(lambda t: dither(_phases(["w"], t)[0], jnp.uint32(3)[None])[0][0])(counts)
    moments = jax.vmap(lambda t: dither(leaf_phases(["w"], t)[0], jnp.uint32(3)[None])[0][0])(
        counts
    )
    both = (np.asarray(weights) < 1 << 31) & (np.asarray(moments) < 1 << 31)
    assert abs(both.mean() - 0.25) <= np.log2(steps) ** 2 / steps


# What apply_updates gives -------------------------------------------------------------------------


def _advance_and_apply(weights, low, updates, bits):
    delta, new_low = _advance(weights, low, updates, bits, None)
    return np.asarray(optax.apply_updates(jnp.asarray(weights), delta)), new_low


def _usual(x: np.ndarray) -> np.ndarray:
    """Normal float32 numbers, and 0: others are flushed on some devices."""
    with np.errstate(invalid="ignore"):  # NumPy warns of some NaN
        size = np.abs(x.astype(np.float64))
    return np.isfinite(size) & ((size >= 2.0**-126) | (size == 0))


@pytest.mark.parametrize("name", _FORMATS)
def test_applied_weights_are_those_meant(name):
    """Between any two weights, and the correction is right even where float32 cannot say it.

    The difference is off by 2^-24 of itself, at most 2^-24 (|old| + |new|), so is the sum, once
    more; a cast gives the new weight if that is below half of the smaller gap beside it: 2^-9 of
    it in bfloat16, 2^-12 in float16. So it does while |old| <= 2^14 |new|, or 2^11.

    Where it does not, new is below 2^-14 of old, and new's rounding and the sum's are below 2^-9 of
    that: with the difference's error less than 2^-22 of old. In float16, 2^-11 and 2^-12.
    """
    form = _FORMATS[name]
    rng = np.random.default_rng(2)
    old = np.tile(_weights(form.dtype), 24)
    new = rng.permuted(np.tile(_weights(form.dtype), 24))
    # A third lands near zero: numbers that cross it, and ratios about the bound.
    near = rng.random(new.size) < 1 / 3
    ratio = 2.0 ** -rng.uniform(0, 24, new.size) * rng.choice([-1, 1], new.size)
    with np.errstate(all="ignore"):
        new = np.where(near, (old.astype(np.float64) * ratio).astype(form.dtype), new)
        wide_old, wide_new = old.astype(np.float32), new.astype(np.float32)
        update = wide_new - wide_old
        # From float32 numbers that are weights, so that theta is what float32 adds up to.
        theta = wide_old + update
        usual = _usual(wide_old) & _usual(wide_new) & _usual(update) & _usual(theta)
    old, update, theta = old[usual], update[usual], theta[usual].astype(np.float64)
    zero = None if form.bits == 16 else np.zeros(old.shape, correction_dtype(form.bits))
    applied, low = _advance_and_apply(old, zero, update, form.bits)
    meant, meant_low = _split(theta.astype(np.float32), form.bits, form.dtype)
    factor = 2.0**14 if form.dtype == _BF16 else 2.0**11
    size = np.abs(np.asarray(meant).astype(np.float64))
    sayable = (np.abs(old.astype(np.float64)) <= factor * size) & (size >= 2.0**-126) | (size == 0)
    assert 0.5 < sayable.mean() < 1
    np.testing.assert_array_equal(
        applied[sayable].astype(np.float32), np.asarray(meant)[sayable].astype(np.float32)
    )
    if low is not None:
        np.testing.assert_array_equal(np.asarray(low)[sayable], np.asarray(meant_low)[sayable])
    # The rest, where neither is infinite: correction and weight agree on a number nearby.
    merged = np.asarray(_merge(applied, low), np.float64)
    rest = ~sayable & np.isfinite(merged) & np.isfinite(theta) & (np.abs(theta) < form.overflow)
    assert np.all(np.abs(merged - theta)[rest] <= 2.0**-22 * np.abs(old[rest].astype(np.float64)))


def test_an_update_of_zero_changes_no_bit(form):
    """Every weight with every correction, in any rounding, and through apply_updates."""
    weights = _weights(form.dtype)
    wide = weights.astype(np.float32)
    weights = weights[_usual(wide) | np.isinf(wide)]
    rng = np.random.default_rng(3)
    for low in (-(1 << 7), -1, 1, (1 << 7) - 1):
        parts = weights, None
        if form.bits > 16:
            # As they can be: of a weight of 0, and of infinity, not every one.
            low = np.full(weights.shape, low << (form.bits - 24), correction_dtype(form.bits))
            low = np.where((_words(weights) & 0x7FFF == 0) & (low < 0), 0, low).astype(low.dtype)
            low = np.where(np.isinf(weights.astype(np.float32)) & (low > 0), 0, low)
            parts = _split(
                _merge(weights, low.astype(correction_dtype(form.bits))), form.bits, form.dtype
            )
        start, low = parts[0], parts[1]
        keep = _usual(np.asarray(start).astype(np.float32))
        words = rng.integers(0, 1 << 32, weights.shape, dtype=np.uint32)
        for zero in (np.float32(0.0), np.float32(-0.0)):
            delta, after = _advance(start, low, np.full(weights.shape, zero), form.bits, words)
            applied = optax.apply_updates(jnp.asarray(start), delta)
            np.testing.assert_array_equal(_words(applied)[keep], _words(start)[keep])
            if low is not None:
                np.testing.assert_array_equal(np.asarray(after)[keep], np.asarray(low)[keep])


def test_overflow_and_nan():
    """As casts: infinity in the weight; bfloat16's correction still knows the number."""
    x = np.array([3.4e38, 1e38, 65519.0, 7e4, np.inf, np.nan], np.float32)
    big = _split(x, 24, _BF16)
    np.testing.assert_array_equal(np.isinf(np.asarray(big[0], np.float32)), [1, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(_merge(*big), x, rtol=2.0**-16)
    half = _split(x, 24, _FP16)
    np.testing.assert_array_equal(np.isinf(np.asarray(half[0], np.float32)), [1, 1, 0, 1, 1, 0])
    np.testing.assert_allclose(_merge(*half)[2:3], x[2:3], rtol=2.0**-19)
    # A weight of inf stays so; what becomes NaN stays NaN, in both parts.
    for dtype in (_BF16, _FP16):
        weights = np.array([np.inf, np.inf, 1.0, np.nan], dtype)
        update = np.array([1.0, -np.inf, np.nan, 1.0], np.float32)
        applied, low = _advance_and_apply(weights, np.zeros(4, np.int8), update, 24)
        merged = np.asarray(_merge(applied, low))
        np.testing.assert_array_equal(merged, [np.inf, np.nan, np.nan, np.nan])
        np.testing.assert_array_equal(applied.astype(np.float32), merged)


# Training -----------------------------------------------------------------------------------------


def _normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    # NumPy's: JAX would compile it for every shape.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _params() -> Any:
    return {"dense": {"kernel": _normal(0, 64, 128)}, "head": _normal(2)}


def _grads(step: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.tree.map(lambda p: _normal(7 * step + p.ndim + 10, *p.shape, dtype=dtype), _params())


_SEQUENCE = tuple(_grads(t) for t in range(4))


def _run(tx, params, state, sequence, update=None):
    for grads in sequence:
        updates, state = (update or tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _split_state(state: Any) -> gx.SplitWeightsState:
    """The one state of split weights somewhere in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, gx.SplitWeightsState))
    (found,) = (x for x in nodes if isinstance(x, gx.SplitWeightsState))
    return found


def _start(tx, bits=24, dtype=_BF16, params=None):
    params = _params() if params is None else params
    return gx.split_weights(params, bits, dtype)[0], tx.init(params)


_OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "gefen": lambda: gx.gefen(1e-3, weight_decay=0.1),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_32_bits_train_as_float32_does(name):
    """Bit for bit: both run operation by operation, so that no fusion tells them apart."""
    plain, split_tx = _OPTIMIZERS[name](), gx.with_split_weights(_OPTIMIZERS[name](), bits=32)
    steps = [jax.tree.map(lambda g: g.astype(jnp.float32), s) for s in _SEQUENCE] * 3
    expected, expected_state = _run(plain, _params(), plain.init(_params()), steps)
    weights, state = _run(split_tx, *_start(split_tx, 32), _SEQUENCE * 3)
    chex.assert_trees_all_equal(gx.merge_weights(weights, state), expected)
    chex.assert_trees_all_equal(state.inner, expected_state)
    chex.assert_trees_all_equal(weights, gx.split_weights(expected, 32)[0])
    chex.assert_trees_all_equal(state.correction, gx.split_weights(expected, 32)[1])


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_fewer_bits_stay_near(name, bits):
    """Each step rounds by less than a unit of a number below 4; roundings of T steps add up.

    Updates are the same but for the weight decay, of less than 1e-3 times what weights are apart.
    """
    plain, tx = _OPTIMIZERS[name](), gx.with_split_weights(_OPTIMIZERS[name](), bits)
    steps = [jax.tree.map(lambda g: g.astype(jnp.float32), s) for s in _SEQUENCE]
    expected, _ = _run(plain, _params(), plain.init(_params()), steps)
    weights, state = _run(tx, *_start(tx, bits), _SEQUENCE)
    unit = 4 * 2.0 ** -(8 if bits == 16 else 16)
    atol = (len(_SEQUENCE) + 1) * unit
    chex.assert_trees_all_close(gx.merge_weights(weights, state), expected, rtol=0, atol=atol)


# Weights of 0.6 to 1 in bfloat16 lie 2^-8 apart; with 24 bits 2^-16.
_STALLS = {
    "float32": (optax.lion, 2e-6, True),
    "bfloat16": (lambda lr: gx.with_split_weights(optax.lion(lr), 16, "nearest"), 1e-4, False),
    "16, stochastic": (lambda lr: gx.with_split_weights(optax.lion(lr), 16), 1e-4, True),
    "24, nearest": (lambda lr: gx.with_split_weights(optax.lion(lr), 24, "nearest"), 1e-4, True),
    "24, nearest, slow": (
        lambda lr: gx.with_split_weights(optax.lion(lr), 24, "nearest"),
        2e-6,
        False,
    ),
    "24, stochastic, slow": (lambda lr: gx.with_split_weights(optax.lion(lr), 24), 2e-6, True),
    "32, slow": (lambda lr: gx.with_split_weights(optax.lion(lr), 32), 2e-6, True),
}


@pytest.mark.parametrize("name", _STALLS)
def test_small_learning_rates(name):
    """A parabola whose minimum is 400 steps of Lion away: some get there, some never start."""
    make, learning_rate, arrives = _STALLS[name]
    tx, steps = make(learning_rate), 400
    start = jnp.full((64,), 0.75, jnp.float32)
    target = start + steps * learning_rate

    def step(carry, _):
        w, state = carry
        grads = (gx.merge_weights(w, state) if name != "float32" else w) - target
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = start if name == "float32" else start.astype(jnp.bfloat16)
    (w, state), _ = jax.jit(lambda *c: jax.lax.scan(step, c, length=steps))(w, tx.init(start))
    got = w if name == "float32" else gx.merge_weights(w, state)
    way = float(jnp.mean(got - start) / (steps * learning_rate))
    # The dither's discrepancy, of 24 units in all, is less than this of the mean over elements.
    assert (0.8 <= way <= 1.2) if arrives else way == 0.0


# Where it is used ---------------------------------------------------------------------------------

_TX = gx.with_split_weights(optax.adamw(1e-3))
_LABELS = {"dense": "split", "head": "plain"}


def _injected(learning_rate):
    return gx.with_split_weights(optax.adamw(learning_rate))


_WRAPPERS = {
    "chain": optax.chain(optax.identity(), _TX),
    "named chain": optax.named_chain(("tx", _TX)),
    "masked": optax.masked(_TX, {"dense": True, "head": False}),
    "partition": optax.partition({"split": _TX, "plain": optax.sgd(1e-3)}, _LABELS),
    "inject_hyperparams": optax.inject_hyperparams(_injected)(1e-3),
    "inject_hyperparams, itself": optax.inject_hyperparams(
        gx.with_split_weights, static_args=("bits",)
    )(optax.adamw(1e-3), 24),
    "inject_hyperparams, inside": gx.with_split_weights(
        optax.inject_hyperparams(optax.adamw)(1e-3)
    ),
    "apply_if_finite, inside": gx.with_split_weights(optax.apply_if_finite(optax.adamw(1e-3), 3)),
    "MultiSteps, of one": optax.MultiSteps(_TX, 1),
}


@pytest.mark.parametrize("name", _WRAPPERS)
def test_wrapped(name):
    """Paths, and so rounding, are the same wherever it stands."""
    wrapped = _WRAPPERS[name]
    params, state = _run(wrapped, *_start(wrapped), _SEQUENCE[:2])
    expected, expected_state = _run(_TX, *_start(_TX), _SEQUENCE[:2])
    own, expected_own = _split_state(state), _split_state(expected_state)
    assert own.count == 2
    actual = params["dense"]["kernel"], own.correction["dense"]["kernel"]
    wanted = expected["dense"]["kernel"], expected_own.correction["dense"]["kernel"]
    for a, b in zip(actual, wanted, strict=True):
        # 1 - float32(b2) as an injected number is off by 2^-24 / 1e-3 of itself, and updates of
        # 1e-3 by as much of 64 units of a correction: one in 250 is rounded differently.
        differs = np.asarray(a) != np.asarray(b)
        assert differs.mean() <= (1 / 250 if name.startswith("inject") else 0.0)
    merged = gx.merge_weights({"dense": params["dense"]}, {"dense": own.correction["dense"]})
    assert merged["dense"]["kernel"].dtype == jnp.float32


def test_partition_into_two():
    """Two states share a tree: each leaf's correction is found in one of them."""
    split_tx = {"a": _TX, "b": gx.with_split_weights(optax.sgd(1e-3), 32)}
    tx = optax.partition(split_tx, {"dense": "a", "head": "b"})
    params = _params()
    weights, _ = gx.split_weights(params)
    merged = gx.merge_weights(weights, tx.init(params))
    assert float(merged["head"]) == float(params["head"])
    chex.assert_trees_all_close(merged, params, rtol=2.0**-16)


@pytest.mark.parametrize("outside", [True, False])
def test_multi_steps(outside):
    """Steps in between change no bit; then comes the step of the mean."""
    inner = optax.sgd(1e-2)
    if outside:
        tx = optax.MultiSteps(gx.with_split_weights(inner), 2)
    else:
        tx = gx.with_split_weights(optax.MultiSteps(inner, 2).gradient_transformation())
    update = jax.jit(tx.update)
    start = _start(tx)
    half, state = _run(tx, *start, _SEQUENCE[:1], update)
    chex.assert_trees_all_equal(half, start[0])
    chex.assert_trees_all_equal(_split_state(state).correction, _split_state(start[1]).correction)
    params, state = _run(tx, half, state, _SEQUENCE[1:2], update)
    mean = jax.tree.map(lambda *g: sum(x.astype(jnp.float32) for x in g) / 2, *_SEQUENCE[:2])
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g, _params(), mean)
    # Started from 24 bits, rounded once to 24 bits: a unit and a half of 2^-16 and below 4, and
    # with the mean, of numbers below 4, in bfloat16.
    atol = 2 * 4 * 2.0**-16 + 1e-2 * 4 * 2.0**-8
    chex.assert_trees_all_close(gx.merge_weights(params, state), expected, rtol=0, atol=atol)


def test_map_params():
    """How a sharding rule lays out the state; the mask is by path, and not asked for nothing."""
    for tx in (_TX, gx.with_split_weights(optax.adamw(1e-3), mask={"dense": True, "head": False})):
        specs = jax.tree.map(lambda p: P(*("x" for _ in p.shape)), _params())
        laid_out = optax.tree.map_params(
            tx,
            lambda s, spec: None if s is None else spec,
            tx.init(_params()),
            specs,
            transform_non_params=lambda _: P(),
            is_leaf=lambda x: x is None or isinstance(x, P),
        )
        assert laid_out.count == P()
        assert laid_out.correction["dense"] == specs["dense"] == laid_out.inner[0].mu["dense"]
    assert laid_out.correction["head"] is None


def _stacked(sequence):
    return jax.tree.map(lambda *g: jnp.stack(g), *sequence)


def test_scan_with_donation_equals_loop():
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, stacked):
        def step(carry, grads):
            params, state = carry
            updates, state = _TX.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), stacked)[0]

    expected_shapes = jax.eval_shape(_TX.init, _params())
    for _ in range(2):  # a buffer of the module's would be gone the second time
        old = _start(_TX)
        chex.assert_trees_all_equal_shapes_and_dtypes(old[1], expected_shapes)
        params, state = run(*old, _stacked(_SEQUENCE))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_shapes)
    update = jax.jit(_TX.update)
    expected, expected_state = _run(_TX, *_start(_TX), _SEQUENCE, update)
    assert update._cache_size() == 1
    # Two programs: an ulp of the update, 2^-24 of it, is 2^-12 of a unit: few are rounded apart,
    # and then by one unit.
    merged, wanted = (
        gx.merge_weights(*x)["dense"]["kernel"]
        for x in ((params, state), (expected, expected_state))
    )
    assert (merged != wanted).mean() <= 1e-2
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=4 * 2.0**-16)


def test_resumed_is_the_same():
    """Everything that decides is in the state."""
    update = jax.jit(_TX.update)
    whole = _run(_TX, *_start(_TX), _SEQUENCE, update)
    half = _run(_TX, *_start(_TX), _SEQUENCE[:2], update)
    half = jax.tree.map(lambda x: jnp.asarray(np.array(x)), half)
    chex.assert_trees_all_equal(_run(_TX, *half, _SEQUENCE[2:], update), whole)


def test_vmap_over_an_ensemble():
    tx = gx.with_split_weights(optax.sgd(1e-2))
    members = [{"w": _normal(i, 16, 8)} for i in range(3)]
    grads = [{"w": _normal(9 + i, 16, 8, dtype=jnp.bfloat16)} for i in range(3)]
    each = [_run(tx, *_start(tx, params=p), [g]) for p, g in zip(members, grads, strict=True)]
    weights = jax.vmap(lambda p: gx.split_weights(p)[0])(_stacked(members))
    state = jax.vmap(tx.init)(_stacked(members))
    updates, state = jax.vmap(tx.update)(_stacked(grads), state, weights)
    together = optax.apply_updates(weights, updates), state
    chex.assert_trees_all_equal(together, _stacked(each))


_SPECS = {"fsdp": P("x", None), "tensor": P(None, ("x", "y")), "both": P("y", "x")}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    """Every spec is a leaf of one model; what comes out lies as the weights do, bit for bit."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in _SPECS.items()}
    params = {name: _normal(i, 64, 128) for i, name in enumerate(_SPECS)}
    grads = {name: _normal(9 + i, 64, 128, dtype=jnp.bfloat16) for i, name in enumerate(_SPECS)}
    tx = gx.with_split_weights(optax.sgd(1e-2))
    expected, expected_state = _run(tx, *_start(tx, params=params), [grads])
    with jax.set_mesh(mesh):
        spread, grads = jax.device_put(params, shardings), jax.device_put(grads, shardings)
        weights, state = gx.split_weights(spread)[0], jax.jit(tx.init)(spread)
        weights, state = _run(tx, weights, state, [grads], jax.jit(tx.update))
        merged = gx.merge_weights(weights, state)
        fresh = tx.init(weights).correction
    for name, sharding in shardings.items():
        for x in (weights[name], state.correction[name], merged[name], fresh[name]):
            assert x.sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_equal(jax.device_get((weights, state)), (expected, expected_state))


def test_linen_train_state():
    model = nn.Dense(16, param_dtype=jnp.float32, dtype=jnp.bfloat16)
    x = _normal(0, 4, 8)
    params = model.init(jax.random.key(1), x)["params"]
    tx = gx.with_split_weights(optax.adam(1e-2))
    train = TrainState.create(apply_fn=model.apply, params=gx.split_weights(params)[0], tx=tx)
    train = train.replace(opt_state=tx.init(params))  # with the lower bits of the start

    @jax.jit
    def step(train):
        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, x) - 1))

        value, grads = jax.value_and_grad(loss)(train.params)
        return train.apply_gradients(grads=grads), value

    values = []
    for _ in range(5):
        before = train
        train, value = step(train)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert train.params["kernel"].dtype == jnp.bfloat16
    # What was applied is what the correction goes with: the weight nearest to what they stand for.
    merged = gx.merge_weights(train.params, train.opt_state)
    chex.assert_trees_all_equal(gx.split_weights(merged)[0], train.params)
    assert np.any(np.asarray(before.params["kernel"]) != np.asarray(train.params["kernel"]))


def test_nnx_optimizer():
    """Which calls apply_updates itself, with variables for leaves."""
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, _TX, wrt=nnx.Param)  # from float32 parameters
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, gx.split_weights(nnx.state(model, nnx.Param))[0])
    x = _normal(0, 4, 8)
    merged = gx.merge_weights(nnx.state(model, nnx.Param), optimizer.opt_state)
    chex.assert_trees_all_close(nnx.to_pure_dict(merged), params, rtol=2.0**-16)

    def loss(model):
        return jnp.mean(jnp.square(model(x) - 1))

    weights, state = _start(_TX, params=params)
    for _ in range(3):
        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)
        weights, state = _run(_TX, weights, state, [nnx.to_pure_dict(grads)])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), weights)
    merged = gx.merge_weights(nnx.state(model, nnx.Param), optimizer.opt_state)
    chex.assert_trees_all_equal(nnx.to_pure_dict(merged), gx.merge_weights(weights, state))


# Leaves and starts --------------------------------------------------------------------------------


def test_leaves_that_are_not_split():
    params = {
        "w": _normal(0, 4, 3),
        "scalar": jnp.float32(0.3),
        "empty": jnp.zeros((0, 3)),
        "table": jnp.arange(3),
        "other": jnp.ones(2, jnp.float8_e4m3fn),
        "none": None,
        "masked": optax.MaskedNode(),
        "norm": _normal(1, 4),
    }
    mask = dict.fromkeys(params, True) | {"norm": False}
    weights, low = gx.split_weights(params, mask=mask)
    assert [weights[k].dtype for k in ("w", "scalar", "empty")] == [_BF16] * 3
    assert [low[k].dtype for k in ("w", "scalar", "empty")] == [np.int8] * 3
    assert low["scalar"].shape == () and low["empty"].shape == (0, 3)
    for name in ("table", "other", "none", "masked", "norm"):
        assert weights[name] is params[name] or name == "masked"
        assert low[name] is None or name == "masked"
    assert weights["masked"] == low["masked"] == optax.MaskedNode()
    tx = gx.with_split_weights(optax.sgd(0.1), mask=mask)
    state = tx.init(params)
    grads = {
        k: None if k in ("none", "table", "other") else jax.tree.map(jnp.ones_like, v)
        for k, v in params.items()
    }
    updates, after = tx.update(grads, state, weights)
    assert updates["table"] is None and updates["none"] is None
    assert updates["masked"] == optax.MaskedNode()
    assert [updates[k].dtype for k in ("w", "scalar", "empty", "norm")] == [jnp.float32] * 4
    np.testing.assert_array_equal(updates["norm"], np.full(4, -0.1, np.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    merged = gx.merge_weights(weights, state)
    assert merged["norm"] is params["norm"] and merged["none"] is None
    assert merged["scalar"].dtype == jnp.float32


def test_a_mask_may_be_a_tree_that_is_callable():
    """As an Equinox module is one."""
    params = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    weights, _ = gx.split_weights(params, mask=mask)
    assert jax.tree.map(lambda x: x.dtype == _BF16, weights) == mask


def test_a_none_gradient_leaves_a_leaf_alone():
    tx = gx.with_split_weights(optax.sgd(1e-2))
    weights, state = _start(tx)
    _, state = tx.update(_SEQUENCE[0], state, weights)
    updates, after = tx.update(_SEQUENCE[1] | {"head": None}, state, weights)
    full, full_after = tx.update(_SEQUENCE[1], state, weights)
    assert updates["head"] is None
    chex.assert_trees_all_equal(updates["dense"], full["dense"])
    chex.assert_trees_all_equal(after.correction["head"], state.correction["head"])
    chex.assert_trees_all_equal(after.correction["dense"], full_after.correction["dense"])


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("dtype", [_BF16, _FP16])
def test_starts(bits, dtype):
    """From float32 with the lower bits, from weights with corrections of 0."""
    tx = gx.with_split_weights(optax.sgd(1.0), bits, dtype=dtype)
    params = {"w": _normal(0, 64)}
    weights, low = gx.split_weights(params, bits, dtype)
    chex.assert_trees_all_equal(tx.init(params).correction, low)
    assert gx.split_weights(weights, bits, dtype)[0]["w"] is weights["w"]
    zero = tx.init(weights).correction["w"]
    assert zero is None if bits == 16 else not np.any(zero)
    chex.assert_trees_all_equal(tx.init(weights).inner, tx.init(params).inner)
    assert (low["w"] is None) == (bits == 16)
    wide = gx.merge_weights(weights, tx.init(weights))["w"]
    np.testing.assert_array_equal(wide, np.asarray(weights["w"], np.float32))


def test_gradients_are_widened():
    """In float16 the squares of small gradients would be 0, and AdamW's steps infinite."""
    params = {"w": _normal(0, 64)}
    grads = {"w": jnp.full(64, 1e-5, jnp.float16)}
    tx = gx.with_split_weights(optax.adam(1e-3, eps=0.0), 24, dtype="float16")
    updates, state = tx.update(grads, tx.init(params), gx.split_weights(params, 24, "float16")[0])
    np.testing.assert_allclose(
        state.inner[0].nu["w"], 1e-3 * np.float32(grads["w"]) ** 2, rtol=1e-6
    )
    assert float(jnp.abs(updates["w"]).max()) < 4e-3  # 1e-3, and a unit of numbers below 4

    seen = []
    spy = optax.stateless(lambda g, p: seen.append((g["w"].dtype, p["w"].dtype)) or g)
    for dtype in ("float32", None):
        tx = gx.with_split_weights(spy, dtype="float16", gradient_dtype=dtype)
        tx.update(grads, tx.init(params), gx.split_weights(params, 24, "float16")[0])
    assert seen == [(jnp.float32, jnp.float32), (jnp.float16, jnp.float32)]


def test_extra_arguments_reach_the_wrapped_one():
    def update(updates, state, params, *, value):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = gx.with_split_weights(inner)
    weights = {"w": jnp.zeros(2, jnp.bfloat16)}
    updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(weights), weights, value=2.0)
    np.testing.assert_array_equal(updates["w"], [2.0, 2.0])


# Memory -------------------------------------------------------------------------------------------


def test_bytes():
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
    gefen = gx.memory_report(jax.eval_shape(gx.gefen(1e-3).init, params))
    for bits, extra in {16: 0, 24: 1, 32: 2}.items():
        tx = optax.chain(gx.with_split_weights(gx.gefen(1e-3), bits))
        report = gx.memory_report(jax.eval_shape(tx.init, params))
        assert report.by_field["correction"] == extra << 20
        assert report.by_tensor["w"] == gefen.by_tensor["w"] + (extra << 20)
        assert report.total_bytes == gefen.total_bytes + (extra << 20) + 4
        assert sum(report.by_field.values()) == report.total_bytes


def test_bytes_of_weights_and_gradients():
    """Beside corrections and the state inside, each as large as its arrays."""
    params = _params()
    weights, state = (
        gx.split_weights(params)[0],
        gx.with_split_weights(optax.adamw(1e-3)).init(params),
    )
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    report = gx.memory_report(state, weights, grads)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    size = sum(x.size for _, x in leaves)
    # Two moments in float32 and two counts of 4 bytes, this transformation's and Adam's.
    expected = {"weights": 2 * size, "gradients": 4 * size, "correction": size, "count": 4}
    assert report.by_field == expected | {"other": 8 * size + 4}
    assert report.total_bytes == 15 * size + 8
    assert report.bytes_per_param == report.total_bytes / size
    kernel = params["dense"]["kernel"].size
    assert report.by_tensor["dense/kernel"] == (2 + 4 + 1) * kernel
    assert len(report.by_tensor) == len(leaves)


# What the table of docs/total-memory.md is made from; bytes per parameter at the step's peak.
_PEAKS = {
    "flash_adamw, split weights": 7.2,
    "flash_adamw, split weights, release": 5.2,
    "gefen, split weights": 6.1,
    "fused_gefen, split weights": 6.1,
    "fused_gefen, split weights, release": 4.1,
    "fused_gefen, 16 bits, release": 3.1,
}


@pytest.mark.parametrize("name", _PEAKS)
def test_measured_peaks(name):
    path = Path(__file__).parent.parent / "examples/results/memory_h200.json"
    results = json.loads(path.read_text())["results"]
    assert results[name]["bytes per parameter"] <= _PEAKS[name]


# Bytes per parameter of temporaries on a CPU, where XLA makes no fusion of two outputs: for a
# correction, gefen's update in the gradient's dtype, and copies of what both outputs read.
# With gradients made float32, they and the update are arrays of that.
_TEMPORARIES = {(16, None): 0, (24, None): 2 + 2 + 1, (24, "float32"): 4 + 4 + 2 + 1}


@pytest.mark.parametrize("bits, gradient_dtype", _TEMPORARIES)
def test_temporaries_of_a_step(bits, gradient_dtype):
    tx = gx.with_split_weights(gx.gefen(1e-3), bits, gradient_dtype=gradient_dtype)
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = params, jax.eval_shape(tx.init, params), params
    used = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    # And the loop's own, a few pieces in float32.
    most = _TEMPORARIES[bits, gradient_dtype] * 4096**2 + 4 * 4 * CHUNK
    assert used.temp_size_in_bytes <= most


# Errors -------------------------------------------------------------------------------------------

_BAD_ARGUMENTS = {
    "bits": {"bits": 8},
    "rounding": {"rounding": "down"},
    "dtype": {"dtype": "float32"},
    "gradient_dtype": {"gradient_dtype": "int32"},
}


@pytest.mark.parametrize("name", _BAD_ARGUMENTS)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        gx.with_split_weights(optax.sgd(0.1), **_BAD_ARGUMENTS[name])


def _updated(tx, params, weights=None, state=None, grads=None):
    state = tx.init(params) if state is None else state
    return tx.update(params if grads is None else grads, state, weights)


_SGD = gx.with_split_weights(optax.sgd(0.1))
_W32, _W16 = {"a": {"w": jnp.ones(3)}}, {"a": {"w": jnp.ones(3, jnp.bfloat16)}}
_CASES = {
    "no params": (ValueError, "needs `params`", lambda: _updated(_SGD, _W32)),
    "still float32": (
        TypeError,
        "`params.a/w.` is float32 in `update`",
        lambda: _updated(_SGD, _W32, _W32),
    ),
    "two leaves of one name": (
        ValueError,
        "two leaves.*name `a/b`",
        lambda: gx.split_weights({"a/b": jnp.zeros(3), "a": {"b": jnp.zeros(3)}}),
    ),
    "other dtype": (
        TypeError,
        "`params.a/w.` is float16",
        lambda: _SGD.init({"a": {"w": jnp.ones(3, jnp.float16)}}),
    ),
    "no entry in the mask": (
        ValueError,
        "`mask` has no entry for `a/w`",
        lambda: gx.split_weights(_W32, mask={"b": True}),
    ),
    "state of other bits": (
        ValueError,
        r"correction of `a/w` must be int8\[3\], found int16",
        lambda: _updated(_SGD, _W32, _W16, gx.with_split_weights(optax.sgd(0.1), 32).init(_W32)),
    ),
    "state of another mask": (
        ValueError,
        "correction of `a/w` must be None, found int8",
        lambda: _updated(
            gx.with_split_weights(optax.sgd(0.1), mask=False), _W16, _W16, _SGD.init(_W32)
        ),
    ),
    "correction without a weight": (
        ValueError,
        "`correction` has `b`",
        lambda: gx.merge_weights(_W16, {"b": jnp.zeros(3, jnp.int8)}),
    ),
    "correction of another shape": (
        ValueError,
        "`correction.a/w.` must be int8",
        lambda: gx.merge_weights(_W16, {"a": {"w": jnp.zeros(4, jnp.int8)}}),
    ),
    "differentiated": (
        NotImplementedError,
        "no useful derivative",
        lambda: jax.grad(
            lambda g: _updated(_SGD, _W32, _W16, grads={"a": {"w": g}})[0]["a"]["w"].sum()
        )(jnp.ones(3)),
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_refused_by_name(name):
    error, message, call = _CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_merging_and_splitting_are_casts_for_derivatives():
    """To evaluate in float32 what is kept in two parts, and to train through it."""
    weights, low = gx.split_weights({"w": jnp.array([0.1, 0.2])})
    grads = jax.grad(lambda w: jnp.sum(gx.merge_weights(w, low)["w"] ** 2), allow_int=True)(weights)
    expected = (2 * gx.merge_weights(weights, low)["w"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(grads["w"], expected)
    grads = jax.grad(lambda x: jnp.sum(gx.split_weights(x)[0].astype(jnp.float32)))(jnp.ones(2))
    np.testing.assert_array_equal(grads, [1.0, 1.0])
