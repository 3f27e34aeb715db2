"""The encoder: both of its paths give the code of the literal rule, to the last float32.

No tolerances here: codes are integers. All inputs go through two functions compiled once, so they
are padded to ``_SIZE``.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gefen_jax._builtin import builtin_codebook
from gefen_jax._codebook import learn
from gefen_jax._encoder import (
    decode,
    encode,
    exact_thresholds,
    lookup_is_exact,
    make_encoder,
    thresholds,
)

pytestmark = pytest.mark.once

_SIZE = 8192
_CODES = 256
_BINS = 4096
_GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "codebooks.npz")
_NAMES = [k.removeprefix("hist__") for k in _GOLDEN.files if k.startswith("hist__")]
_RICH = ["normal_p1024", "lognormal_p384", "exactly_256_active"]


def _with_three_close(where: float, gap: float) -> np.ndarray:
    """A uniform codebook, and three entries within one bin of the lookup's table."""
    codes = np.linspace(-1, 1, _CODES - 3)
    return np.sort([*codes, *(where + gap * np.arange(3))]).astype(np.float32)


def _reference(name: str) -> np.ndarray:
    return _GOLDEN[f"codebook__{name}"]


# name: how to make it, and what `lookup_is_exact` must say: True for all that `learn` makes, False
# for duplicates and for two thresholds in one bin of the table, None where either is right (what
# the reference learns may lie too close, and the closed form of a threshold may miss by an ulp).
_CODEBOOKS = {
    "builtin": (lambda: np.asarray(builtin_codebook(), np.float32), True),
    "uniform": (lambda: np.linspace(-1, 1, _CODES).astype(np.float32), None),
    **{
        f"learned {name}": (
            lambda name=name: learn(_GOLDEN[f"hist__{name}"].astype(np.int64)),
            True,
        )
        for name in _RICH
    },
    **{
        f"reference {name}": (
            lambda name=name: _reference(name),
            False if np.any(np.diff(_reference(name)) == 0) else None,
        )
        for name in _NAMES
    },
    "three close": (lambda: _with_three_close(0.3, 1e-6), False),
    "three close at the end": (lambda: _with_three_close(1 - 3e-5, 1e-5), False),
}


@functools.cache
def _codebook(name: str) -> np.ndarray:
    return _CODEBOOKS[name][0]()


def _rule(c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The module docstring's rule, in NumPy float32."""
    i = np.clip(np.searchsorted(c, x, side="left"), 0, _CODES - 1)
    below = np.maximum(i - 1, 0)
    return np.where(np.abs(x - c[below]) <= np.abs(x - c[i]), below, i)


@functools.partial(jax.jit, static_argnames="exact_lookup")
def _encode(c, x, *, exact_lookup):
    encoder = make_encoder(c)
    codes = encode(encoder, x, exact_lookup=exact_lookup)
    return codes, decode(encoder, codes)


# As in `make_encoder`, traced: compiled, it could in principle round otherwise than on the host.
_thresholds = jax.jit(thresholds)


def _codes(c: np.ndarray, x: np.ndarray, *, exact_lookup: bool) -> np.ndarray:
    padded = np.zeros(_SIZE, np.float32)
    padded[: len(x)] = x
    return np.asarray(_encode(c, padded, exact_lookup=exact_lookup)[0])[: len(x)]


def _paths(c: np.ndarray) -> list[bool]:
    """The paths that must be right: the search always, the table if it says so."""
    return [False, True] if lookup_is_exact(c) else [False]


def _probes(c: np.ndarray) -> np.ndarray:
    """Where codes change, the floats around, the codes themselves, and other special values."""
    lower, upper = c[:-1], c[1:]
    borders = np.concatenate([c, exact_thresholds(c), lower + (upper - lower) / 2])
    near = [borders]
    for direction in (-2, 2):
        x = borders
        for _ in range(3):
            x = np.nextafter(x, np.float32(direction))
            near.append(x)
    # Denormal x are fine. Denormal entries would not be: XLA takes them for 0. None is learned,
    # the bins' centres being 2**-12 from 0 at least.
    tiny = np.float32([1e-45, 1e-40, 1e-38, 1.2e-38, 1e-30, 2.0**-24, 2.0**-13, 2.0**-12])
    # A quotient m / max|m| may come out an ulp or two beyond 1.
    beyond = np.float32([1 + 2.0**-23, 1 + 2.0**-22])
    special = np.concatenate([tiny, beyond, np.float32([0.0, 1.0, 0.5, 1 - 2.0**-24])])
    x = np.concatenate([*near, special, -special])
    return x[np.abs(x) <= 1 + 2.0**-22]


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", _CODEBOOKS)
def test_codes_are_those_of_the_rule(name):
    c = _codebook(name)
    x = _probes(c)
    rest = np.random.default_rng(0).uniform(-1, 1, _SIZE - len(x)).astype(np.float32)
    x = np.concatenate([x, rest])
    for exact_lookup in _paths(c):
        np.testing.assert_array_equal(_codes(c, x, exact_lookup=exact_lookup), _rule(c, x))


@pytest.mark.parametrize("name", [k for k, (_, says) in _CODEBOOKS.items() if says is not None])
def test_lookup_is_exact_says_when(name):
    assert lookup_is_exact(_codebook(name)) == _CODEBOOKS[name][1]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["builtin", "learned lognormal_p384", "reference few_active_100", "uniform"]),
    st.lists(st.floats(-1, 1, width=32), max_size=32),
)
def test_any_float32(name, x):
    c, x = _codebook(name), np.asarray(x, np.float32)
    for exact_lookup in _paths(c):
        np.testing.assert_array_equal(_codes(c, x, exact_lookup=exact_lookup), _rule(c, x))


def test_any_codebook_by_search():
    """Sorted numbers with many repetitions, up to a codebook of one value."""
    rng = np.random.default_rng(0)
    for distinct in (1, 2, 3, 10, 100, 200, 255, 256):
        values = rng.uniform(-1, 1, distinct).astype(np.float32)
        c = np.sort(np.concatenate([values, rng.choice(values, _CODES - distinct)]))
        x = np.concatenate([c, rng.uniform(-1, 1, 4000).astype(np.float32)])
        np.testing.assert_array_equal(_codes(c, x, exact_lookup=False), _rule(c, x))


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_codes_stand_for_themselves(name):
    """decode(encode(c_j)) = c_j: encoding twice changes nothing (duplicates: the same value)."""
    c = _codebook(name)
    padded = np.concatenate([c, np.zeros(_SIZE - _CODES, np.float32)])
    for exact_lookup in _paths(c):
        codes, values = _encode(c, padded, exact_lookup=exact_lookup)
        assert codes.dtype == jnp.uint8 and values.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(values)[:_CODES], c)


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_exact_thresholds(name):
    """The last float32 that takes the lower of two codes, and the first that does not."""
    c = _codebook(name)
    t = exact_thresholds(c)
    distinct = c[:-1] < c[1:]
    t, lower, upper = t[distinct], c[:-1][distinct], c[1:][distinct]
    after = np.nextafter(t, np.float32(2))
    assert np.all((lower <= t) & (t < upper))
    assert np.all(np.abs(t - lower) <= np.abs(t - upper))
    assert np.all(np.abs(after - lower) > np.abs(after - upper))


def test_tables_hold_no_infinity():
    """`jax_debug_infs` would find it, in a step that is not jitted."""
    with jax.debug_infs(True), jax.disable_jit():
        make_encoder(jnp.asarray(_codebook("builtin")))


@pytest.mark.parametrize("exact_lookup", [True, False])
def test_not_a_number_gets_some_code(exact_lookup):
    """No code is right; the table must not be read outside. (The scale carries the NaN.)"""
    x = np.float32([np.nan, -np.nan, 0.0])
    codes = _codes(_codebook("builtin"), x, exact_lookup=exact_lookup)
    assert codes.dtype == np.uint8
    assert codes[2] == _rule(_codebook("builtin"), x)[2]


def _sparse(rng: np.random.Generator) -> np.ndarray:
    bins = rng.choice(_BINS, rng.integers(_CODES, 500), replace=False)
    return np.bincount(bins, rng.integers(1, 100, len(bins)), _BINS)


def _dense(rng: np.random.Generator) -> np.ndarray:
    """A long run of bins, all of them filled."""
    return np.bincount(np.arange(1500, 3000), rng.integers(1, 1000, 1500), _BINS)


def _lognormal(rng: np.random.Generator) -> np.ndarray:
    """Weights from 1 to 10**9 on some of the bins."""
    weights = np.ceil(np.exp(rng.normal(0, 5, _BINS)))
    return np.minimum(weights, 1e9) * (rng.random(_BINS) < 0.2)


def _run_of_bins(rng: np.random.Generator) -> np.ndarray:
    """Neighbouring bins only, of which nearly every one gets an entry: the closest thresholds."""
    start = rng.integers(0, _BINS - 300)
    return np.bincount(np.arange(start, start + rng.integers(_CODES, 300)), minlength=_BINS) * 5


def _run_around_zero(rng: np.random.Generator) -> np.ndarray:
    """The fixed 0 lies half a bin from the entries at either side."""
    low, high = _BINS // 2 - rng.integers(1, 150), _BINS // 2 + rng.integers(128, 150)
    low = min(low, high - _CODES)
    histogram = np.zeros(_BINS)
    histogram[low:high] = rng.integers(1, 50, high - low)
    return histogram


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from([_sparse, _dense, _lognormal, _run_of_bins, _run_around_zero]),
    st.integers(0, 2**32 - 1),
)
def test_every_learned_codebook_has_an_exact_lookup(histogram_of, seed):
    histogram = histogram_of(np.random.default_rng(seed)).astype(np.int64)
    codebook = learn(histogram)
    assert codebook is not None
    assert lookup_is_exact(codebook)
    closed = np.asarray(_thresholds(codebook))
    np.testing.assert_array_equal(closed, exact_thresholds(codebook))
    x = _probes(codebook)
    np.testing.assert_array_equal(_codes(codebook, x, exact_lookup=True), _rule(codebook, x))
