"""The step of a coded leaf: in pieces as at once, and as its equations say.

``u = 2**-24`` is the relative rounding error of float32.

The restatement takes every step from our own last state, in float64, so nothing accumulates:

- nu and scale: a handful of roundings each (square, mean, two products, sum; decode, difference,
  product, sum), and a mean over a block of at most 64: 12 u. A sum of parts of either sign can be
  smaller than they are, so the scale's bound is relative to the largest part.
- codes: the chosen entry is as near as the nearest one, up to 12 u for the error of m / scale.
- updates: 24 u, for the roundings of the quotient and the root, and bias corrections ``1 - b**t``
  with one rounding of b**t: ``u / (1 - b)``, that is 4 u for b = 0.75 and 8 u, of which the root
  takes half, for b = 0.875. (0.999 would need 1e-5; see test_golden.) Nesterov adds two terms that
  may cancel: relative to the larger one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._builtin import builtin_codebook
from gefen_jax._chunks import Chunk
from gefen_jax._encoder import Encoder, make_encoder
from gefen_jax._levels import make_levels
from gefen_jax._step import advance
from gefen_jax._transform import _update_leaf
from gefen_jax._types import Decay, Moments, Step

_U = 2.0**-24
_CODEBOOK = np.asarray(builtin_codebook(), np.float32)
# Fewer values than entries, and no 0 among them: what only the search encodes.
_DUPLICATES = np.sort(np.resize(np.linspace(-1, 1, 80), 256)).astype(np.float32)
_B1, _B2 = 0.75, 0.875


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A leaf whose blocks have equal size, and in pieces of how many elements it is worked on."""

    shape: tuple[int, ...]
    block: tuple[int, ...]
    per_element: bool
    chunk: int


@st.composite
def _geometries(draw) -> _Geometry:
    """Boxes of all kinds: (before, runs * run, spanned, inner) with axes left out at random."""
    before = draw(st.lists(st.integers(1, 5), max_size=1))
    run, runs = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    spanned = draw(st.lists(st.integers(2, 6), max_size=1))
    # Pieces cut an inner axis from 65 columns on; 130 leaves a remainder.
    inner = draw(st.lists(st.sampled_from([1, 3, 64, 100, 130]), max_size=1))
    shape = (*before, run * runs, *spanned, *inner)
    block = (1,) * len(before) + (run, *spanned) + (1,) * len(inner)
    return _Geometry(shape, block, draw(st.booleans()), draw(st.integers(1, 400)))


_DECAY = Decay(_B1, _B2, 1 - _B1, 1 - _B2, 1e-8, 0.0, *(jnp.float32(x) for x in (0.5, 0.6, 0.4)))


def _step(encoder: Encoder) -> Step:
    levels = make_levels(jnp.asarray(builtin_codebook(16)))
    return Step(_DECAY, encoder, levels, jnp.zeros(2, jnp.uint32), False, True, None)


@functools.partial(jax.jit, static_argnames=("block", "chunk"))
def _advance(g, state, block, chunk):
    step = _step(make_encoder(jnp.asarray(_CODEBOOK)))
    return advance(g, state, block, step, chunk=chunk and Chunk(chunk))


@settings(max_examples=12, deadline=None)
@given(_geometries(), st.integers(0, 2**32 - 1))
def test_pieces_give_the_same_state(geometry, seed):
    """In pieces of any size codes and scales are those of the whole leaf, to the bit.

    They are two programs, of which XLA may contract ``m + (1 - b1) (g - m)`` in either; with
    b1 = 0.75 the product is exact, and contracted or not it is rounded once. Decoding is exact
    with scales of few bits.

    Nu is a mean over n elements, perhaps in another order: n roundings that do not conspire, which
    four standard deviations bound, and those of the average over time.
    """
    shape, block = geometry.shape, geometry.block
    rng = np.random.default_rng(seed)
    stats = tuple(d // b for d, b in zip(shape, block, strict=True))
    g = rng.normal(size=shape).astype(np.float32)
    state = Moments(
        rng.integers(0, 256, shape).astype(np.uint8),
        (rng.integers(0, 3, stats) / 2).astype(np.float32),
        rng.random(shape if geometry.per_element else stats).astype(np.float32),
    )
    whole = _advance(g, state, block, None)
    pieces = _advance(g, state, block, geometry.chunk)
    for a, b, old in zip(whole, pieces, state, strict=True):
        assert a.dtype == b.dtype == old.dtype and a.shape == b.shape == old.shape
    np.testing.assert_array_equal(pieces.mu, whole.mu)
    np.testing.assert_array_equal(pieces.scale, whole.scale)
    rtol = (4 * math.sqrt(math.prod(block)) + 4) * _U
    np.testing.assert_allclose(pieces.nu, whole.nu, rtol=rtol)


# Leaves of the restated step: shape and kind. "ragged": the last run is shorter.
_LEAVES = {
    "ragged vector": ((97,), gx.SharedBlocks((32,))),  # a last run of 1
    "ragged columns": ((37, 6), gx.SharedBlocks((16, 1))),
    "ragged in the middle": ((3, 11, 4), gx.SharedBlocks((1, 4, 4))),
    "one block": ((7, 5), gx.SharedBlocks((7, 5))),
    "blocks of one": ((4, 6), gx.SharedBlocks((1, 1))),
    "flat": ((6, 8), gx.FlatPeriods(16, 16)),
    "nu per element": ((6, 8), gx.FlatPeriods(1, 16)),
}


@dataclasses.dataclass(frozen=True)
class _Setting:
    """How the optimizer is made, and from which leaf size on it works in pieces, if from any."""

    kwargs: dict[str, Any]
    codebook: np.ndarray = dataclasses.field(default_factory=lambda: _CODEBOOK)
    chunk: int = 1 << 18


_SETTINGS = {
    "nesterov, eps_root": _Setting({"eps": 1e-3, "eps_root": 1e-4, "nesterov": True}),
    "duplicates in the codebook": _Setting({"eps": 1e-8}, codebook=_DUPLICATES),
    "in pieces": _Setting({"eps": 1e-8}, chunk=20),
}


def _plan(codebook: np.ndarray = _CODEBOOK) -> gx.Plan:
    leaves = (gx.LeafPlan(k, shape, kind, "test") for k, (shape, kind) in _LEAVES.items())
    return gx.Plan(tuple(leaves), tuple(codebook.tolist()), "test", "shape")


def _params() -> dict[str, Any]:
    return {k: jnp.zeros(shape) for k, (shape, _) in _LEAVES.items()}


# One leaf of every path through the code, where the geometry does not matter; a plan serves any
# part of its model.
_SOME = ("ragged columns", "one block", "flat", "nu per element")


def _gradients(t: int) -> dict[str, np.ndarray]:
    """Of very different size along the first axis; some exactly 0, in whole rows too."""
    rng = np.random.default_rng(t)
    grads = {}
    for k, (shape, _) in _LEAVES.items():
        rows = 10.0 ** rng.integers(-3, 4, (shape[0],) + (1,) * (len(shape) - 1))
        rows[rng.random(rows.shape) < 0.2] = 0
        g = rng.normal(size=shape) * rows * (rng.random(shape) < 0.9)
        grads[k] = g.astype(np.float32)
    return grads


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """Every block as (its number in the statistics, its slices)."""
    counts = (range(math.ceil(d / b)) for d, b in zip(shape, block, strict=True))
    for i in itertools.product(*counts):
        yield i, tuple(slice(n * b, (n + 1) * b) for n, b in zip(i, block, strict=True))


class _Leaf:
    """mu, scale and nu of a leaf in float64, seen in the shape that its blocks have."""

    def __init__(self, kind: Any, moments: Moments):
        flat = isinstance(kind, gx.FlatPeriods)
        self.block = (kind.group,) if flat else kind.block
        self.mu = np.asarray(moments.mu).reshape(-1 if flat else moments.mu.shape)
        self.scale = np.asarray(moments.scale, np.float64)
        self.nu = np.asarray(moments.nu, np.float64)
        self.per_element = flat and kind.period == 1


def _check_step(g, old: _Leaf, new: _Leaf, update, codebook, t, setting: _Setting) -> None:
    """One step of one leaf, block by block, against the equations in `gefen_jax._step`."""
    c, g = codebook.astype(np.float64), g.astype(np.float64).reshape(old.mu.shape)
    update = np.asarray(update, np.float64).reshape(old.mu.shape)
    eps_root, eps = setting.kwargs.get("eps_root", 0.0), setting.kwargs["eps"]
    for i, at in _blocks(old.mu.shape, old.block):
        stat = at if old.per_element else i
        square = g[at] ** 2 if old.per_element else np.mean(g[at] ** 2)
        nu = _B2 * old.nu[stat] + (1 - _B2) * square
        np.testing.assert_allclose(new.nu[stat], nu, rtol=12 * _U)

        m_old = c[old.mu[at]] * old.scale[i]
        m = m_old + (1 - _B1) * (g[at] - m_old)
        scale = np.abs(m).max()
        parts = max(np.abs(m_old).max(), np.abs(g[at]).max())
        np.testing.assert_allclose(new.scale[i], scale, rtol=0, atol=12 * _U * parts)

        # From our own scale, 0 where it is 0.
        x = m / new.scale[i] if new.scale[i] else np.zeros_like(m)
        rounding = 12 * _U * (parts / new.scale[i] if new.scale[i] else 0)
        nearest = np.abs(x[..., None] - c).min(-1)
        assert np.all(np.abs(x - c[new.mu[at]]) <= nearest + rounding)

        m_hat = c[new.mu[at]] * new.scale[i]
        terms = [m_hat / (1 - _B1**t)]
        if setting.kwargs.get("nesterov"):
            terms = [_B1 * m_hat / (1 - _B1 ** (t + 1)), (1 - _B1) * g[at] / (1 - _B1**t)]
        root = np.sqrt(new.nu[stat] / (1 - _B2**t) + eps_root) + eps
        error = 24 * _U * np.max(np.abs(terms), axis=0) / root
        assert np.all(np.abs(update[at] - sum(terms) / root) <= error)


@pytest.mark.once
@pytest.mark.parametrize("name", _SETTINGS)
def test_step_is_what_the_equations_say(name, monkeypatch, request):
    setting = _SETTINGS[name]
    monkeypatch.setattr(_backend, "CHUNK", setting.chunk)
    _update_leaf.clear_cache()  # it knows the leaves from the last setting, with its pieces
    request.addfinalizer(_update_leaf.clear_cache)  # nor may others know these
    plan = _plan(setting.codebook)
    optimizer = gx.scale_by_gefen(_B1, _B2, plan=plan, **setting.kwargs)
    step = jax.jit(optimizer.update)
    state = optimizer.init(_params())
    for t in range(1, 5):
        grads = _gradients(t)
        updates, new = step(grads, state)
        for k, (_, kind) in _LEAVES.items():
            before, after = (
                _Leaf(kind, Moments(s.mu[k], s.scale[k], s.nu[k])) for s in (state, new)
            )
            _check_step(grads[k], before, after, updates[k], setting.codebook, t, setting)
        state = new


@pytest.fixture(scope="module")
def one_step():
    """A compiled step of some leaves (and an exact one), and its first state."""
    params = {k: _params()[k] for k in _SOME} | {"exact": jnp.zeros(5)}
    exact = gx.LeafPlan("exact", (5,), gx.Exact(), "test")
    plan = dataclasses.replace(_plan(), leaves=(*_plan().leaves, exact))
    optimizer = gx.scale_by_gefen(_B1, _B2, plan=plan)
    return jax.jit(optimizer.update), optimizer.init(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_gradients(one_step, dtype):
    """Computed in float32, cast once: as with the same gradients in float32.

    Two programs: codes and scales are equal to the bit (as in `test_pieces_give_the_same_state`),
    other moments up to 12 u. The updates are those of float32, rounded; that they may differ by an
    ulp before the rounding is less than an ulp of the narrow float.
    """
    step, state = one_step
    grads = {k: g for k, g in _gradients(1).items() if k in _SOME}
    grads["exact"] = np.linspace(-1, 1, 5, dtype=np.float32)
    narrow = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    narrow_updates, narrow_state = step(narrow, state)
    wide_updates, wide_state = step(wide, state)
    for k in grads:
        ours, theirs = (Moments(s.mu[k], s.scale[k], s.nu[k]) for s in (narrow_state, wide_state))
        kept = [x.dtype for x in (ours.mu, ours.scale, ours.nu) if x is not None]
        assert kept in ([jnp.uint8, jnp.float32, jnp.float32], [jnp.float32, jnp.float32])
        np.testing.assert_allclose(ours.nu, theirs.nu, rtol=12 * _U)
        np.testing.assert_allclose(ours.mu, theirs.mu, rtol=12 * _U)  # of a code: equal
        assert (ours.scale is None) == (theirs.scale is None)
        np.testing.assert_array_equal(ours.scale, theirs.scale)
        assert narrow_updates[k].dtype == dtype and wide_updates[k].dtype == jnp.float32
        narrowed = np.asarray(narrow_updates[k], np.float32)
        np.testing.assert_allclose(narrowed, wide_updates[k], rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("nesterov", [False, True])
def test_no_gradient_no_step(nesterov):
    """Blocks that only ever saw zeros stay where they are, without eps too; the others move."""
    optimizer = gx.scale_by_gefen(0.9, 0.999, eps=0.0, nesterov=nesterov, plan=_plan())
    step = jax.jit(optimizer.update)
    params = {k: _params()[k] for k in _SOME}
    state = optimizer.init(params)
    grads = {k: jnp.zeros(g.shape).at[-1].set(1.0) for k, g in params.items()}
    for _ in range(2):
        updates, state = step(grads, state)
        for k in params:
            leaf = _Leaf(_LEAVES[k][1], Moments(state.mu[k], state.scale[k], state.nu[k]))
            u, g = (np.asarray(x[k]).reshape(leaf.mu.shape) for x in (updates, grads))
            assert np.all(np.isfinite(u)), k
            for _, at in _blocks(leaf.mu.shape, leaf.block):
                assert u[at].any() == g[at].any(), k
