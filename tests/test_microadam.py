"""MicroAdam against its formulas in float64, against Adam where both must agree, and in Optax."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import gefen_jax as gx
from gefen_jax._microadam import _check
from gefen_jax._sparse_window import GROUP, Sparse, _read_error, _write_error, geometry

pytestmark = pytest.mark.once

_U = 2.0**-24  # relative rounding error of float32
_SHAPE = (350, 200)  # 3 blocks of 23360, the last one padded by 80
_DENSITY, _WINDOW, _B1, _B2 = 0.02, 3, 0.9, 0.99


def _tx(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "b1": _B1,
        "b2": _B2,
        "density": _DENSITY,
        "window": _WINDOW,
    } | changes
    return gx.scale_by_microadam(**arguments)


def _sparse(state: Any) -> Sparse:
    arrays: Any = (np.asarray(getattr(state, name)["w"]) for name in Sparse._fields)
    return Sparse(*arrays)


def _gradients(steps, shape=_SHAPE):
    """Of sizes that differ by element, as those of a layer do."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(size=shape))
    return [(size * rng.normal(size=shape)).astype(np.float32) for _ in range(steps)]


@functools.cache
def _trajectory(steps=7):
    tx, states, updates = _tx(), [], []
    state, update = tx.init({"w": jnp.zeros(_SHAPE)}), jax.jit(tx.update)
    for g in _gradients(steps):
        states.append(_sparse(state))
        u, state = update({"w": jnp.asarray(g)}, state)
        updates.append(np.asarray(u["w"]))
    return states + [_sparse(state)], updates


class _Float64:
    """Algorithm 1 of the paper, block by block."""

    def __init__(self, old: Sparse, g, t):
        n, groups = old.low.shape
        block = groups * GROUP
        flat = np.pad(g.astype(np.float64).ravel(), (0, n * block - g.size)).reshape(n, block)
        low, high = (x.astype(np.float64) for x in (old.low, old.high))
        codes = np.stack([old.error & 15, old.error >> 4], -1).reshape(n, groups, GROUP)
        error = low[..., None] + codes * (high - low)[..., None] / 15
        self.a = flat + error.reshape(n, block)
        kept = old.place.shape[-1]
        self.order = np.argsort(-np.abs(self.a), axis=1, kind="stable")
        self.taken = self.order[:, :kept]
        index, value = old.place.copy(), old.value.astype(np.float64)
        row = (t - 1) % _WINDOW
        index[:, row] = self.taken
        chosen = np.take_along_axis(self.a, self.taken, 1)
        value[:, row] = chosen.astype(ml_dtypes.bfloat16).astype(np.float64)
        self.left = self.a.copy()
        np.put_along_axis(self.left, self.taken, 0, 1)
        self.index, self.value, self.t = index, value, t

    def update(self, index, value):
        """From a window, over all of the leaf."""
        z1, z2 = np.zeros_like(self.a), np.zeros_like(self.a)
        for block in range(len(z1)):
            for row in range(_WINDOW):
                age = (self.t - 1 - row) % _WINDOW
                if age >= self.t:  # before the first step
                    continue
                at, v = index[block, row].astype(int), value[block, row]
                z1[block, at] += _B1**age * v
                z2[block, at] += _B2**age * v**2
        m = (1 - _B1) * z1 / (1 - _B1**self.t)
        v = (1 - _B2) * z2 / (1 - _B2**self.t)
        return (m / (np.sqrt(v) + 1e-8)).ravel()


def test_window_and_error_are_those_of_float64():
    """Step by step, each from the state that the step before left: nothing adds up.

    a = g + low + code * width / 15 has four roundings, relative to parts no larger than the group's
    bounds: 8 u of them. So indices differ only where two |a| lie so near to each other, in 1e-4 of
    all at most, and codes where a place of 15 is so near to a half. A bfloat16 is within 2^-8.
    """
    states, _ = _trajectory()
    for t, (old, new, g) in enumerate(zip(states, states[1:], _gradients(7), strict=False), 1):
        exact = _Float64(old, g, t)
        row = (t - 1) % _WINDOW
        same = np.sort(new.place[:, row], 1) == np.sort(exact.index[:, row].astype(np.int16), 1)
        assert np.mean(~same) <= 1e-4
        others = [r for r in range(_WINDOW) if r != row]
        np.testing.assert_array_equal(new.place[:, others], old.place[:, others])
        np.testing.assert_array_equal(new.value[:, others], old.value[:, others])
        taken = np.take_along_axis(exact.a, new.place[:, row].astype(int), 1)
        error = np.abs(new.value[:, row].astype(np.float64) - taken)
        assert np.all(error <= np.abs(taken) * (2.0**-8 + 16 * _U))
        # What is left, within half a step of 4 bits and the rounding of the bounds.
        n, groups = new.low.shape
        low, high = (x.astype(np.float64)[..., None] for x in (new.low, new.high))
        codes = np.stack([new.error & 15, new.error >> 4], -1).reshape(n, groups, GROUP)
        left = exact.a.copy()
        np.put_along_axis(left, new.place[:, row].astype(int), 0, 1)
        left = left.reshape(n, groups, GROUP)
        bounds = np.maximum(np.abs(low), np.abs(high)) * (2.0**-8 + 16 * _U)
        assert np.all(np.abs(low + codes * (high - low) / 15 - left) <= (high - low) / 30 + bounds)
        width = np.where(high > low, high - low, 1)
        place = np.clip((left - low) / width * 15, 0, 15)
        differs = codes != np.floor(place + 0.5)
        # What was taken counts as 0, a tie between bounds that are each other's negatives.
        assert np.all(np.abs(place % 1 - 0.5)[differs] <= 15 * 16 * _U)


def test_updates_are_those_of_float64():
    """From the same window: sums of 3 terms, a root, a quotient, the powers: below 24 u."""
    states, updates = _trajectory()
    for t, (old, new, g, u) in enumerate(
        zip(states, states[1:], _gradients(7), updates, strict=False), 1
    ):
        wanted = _Float64(old, g, t).update(new.place, new.value.astype(np.float64))
        wanted = wanted[: u.size]
        # Of terms that cancel, relative to what they sum up to without their signs.
        np.testing.assert_allclose(u.ravel(), wanted, rtol=24 * _U, atol=24 * _U)


def test_all_of_the_gradient_and_a_long_window_are_adam():
    """Gradients that bfloat16 holds; sums of at most 6 powers: below 32 u."""
    tx, adam = _tx(density=1.0, window=6), optax.scale_by_adam(_B1, _B2)
    params = {"w": jnp.zeros((72, 64))}
    state, adam_state = tx.init(params), adam.init(params)
    grads: Any = None
    u: Any
    wanted: Any
    for g in _gradients(6, (72, 64)):
        grads = {"w": jnp.asarray(g, jnp.bfloat16).astype(jnp.float32)}
        u, state = tx.update(grads, state)
        wanted, adam_state = adam.update(grads, adam_state)
        chex.assert_trees_all_close(u, wanted, rtol=32 * _U, atol=32 * _U)
    # Of the seventh step's window the first gradient is gone.
    u, _ = tx.update(grads, state)
    wanted, _ = adam.update(grads, adam_state)
    assert np.abs(np.asarray(u["w"] - wanted["w"])).max() > 1e-3


@settings(max_examples=50, deadline=None)
@given(
    npst.arrays(
        np.float32,
        (2, 2 * GROUP),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_error_is_within_half_a_step(a):
    error, low, high = _write_error(jnp.asarray(a))
    empty = jnp.zeros((2, 0, 0))
    back = np.asarray(_read_error(Sparse(error, low, high, empty, empty), 2 * GROUP), np.float64)
    low, high = (np.repeat(np.asarray(x, np.float64), GROUP, 1) for x in (low, high))
    # bfloat16 moves the bounds by 2^-8 of themselves; their difference and the sum, by 4 u.
    slack = np.maximum(np.abs(low), np.abs(high)) * (2.0**-8 + 8 * _U) + 1e-37
    assert np.all(np.abs(back - a) <= (high - low) / 30 + slack)


def test_error_of_equal_elements_and_of_nothing():
    for value in (0.0, 1.5, -(2.0**-100)):
        error, low, high = _write_error(jnp.full((1, GROUP), value))
        assert not error.any()
        assert float(low[0, 0]) == float(high[0, 0]) == value


def test_nothing_is_lost():
    """What is not taken waits: an element's updates start when its error has become large."""
    tx = _tx(density=1 / 128, window=2)
    params = {"w": jnp.zeros((65, 64))}
    state, update = tx.init(params), jax.jit(tx.update)
    g = jnp.ones((65, 64)).at[0].set(8.0)
    moved = np.zeros((65, 64), bool)
    for _ in range(300):
        u, state = update({"w": g}, state)
        moved |= np.asarray(u["w"]) != 0
    assert moved.mean() > 0.9


def test_resumes_bit_for_bit():
    tx = _tx()
    update = jax.jit(tx.update)
    states = [tx.init({"w": jnp.zeros(_SHAPE)})]
    grads = [{"w": jnp.asarray(g)} for g in _gradients(5)]
    for g in grads:
        states.append(update(g, states[-1])[1])
    saved = jax.tree.map(np.asarray, states[2])  # in the middle of a window
    state = jax.tree.map(jnp.asarray, saved)
    for g in grads[2:]:
        u, state = update(g, state)
    chex.assert_trees_all_equal(state, states[-1])


@pytest.mark.parametrize("shape", [(4097,), (128, 257), (3, 64, 4096), (1 << 15, 2)])
def test_geometry(shape):
    cut = geometry(shape, 0.01, 10)
    assert cut.block <= 1 << 15 and cut.block % GROUP == 0
    assert 0 <= cut.blocks * cut.block - cut.size < cut.blocks * GROUP
    assert cut.kept >= 0.01 * cut.block
    tx = gx.scale_by_microadam()
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    # 4 bits, 4 bytes per 64, and 1 % ten times, rounded up; and what is padded.
    bound = (0.5 + 4 / GROUP + 40 * (0.01 + 1 / cut.block)) * cut.blocks * cut.block + 8
    assert gx.memory_report(state).by_tensor["w"] <= bound


_MIXED: Any = {
    "w": jnp.ones((80, 64), jnp.bfloat16),
    "b": jnp.ones(64),
    "step": jnp.array(3),
    "none": None,
    "empty": jnp.zeros((0, 4)),
}


def test_mixed_leaves_keep_dtypes_and_shapes():
    tx: Any = gx.microadam(
        1e-2, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    step: Any = jax.jit(tx.update)
    state = tx.init(_MIXED)
    updates, after = step(_MIXED, state, _MIXED)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert updates["w"].dtype == jnp.bfloat16 and updates["none"] is None
    step(_MIXED, after, _MIXED)
    assert step._cache_size() == 1


def test_no_gradient_leaves_a_leaf_as_it_is():
    tx = _tx()
    _, state = tx.update(_MIXED, tx.init(_MIXED))
    updates, after = tx.update({**_MIXED, "w": None}, state)
    assert updates["w"] is None and int(after.count) == 2
    chex.assert_trees_all_equal(_sparse(after), _sparse(state))
    assert np.any(np.asarray(after.mu["b"]) != np.asarray(state.mu["b"]))


def test_small_leaves_are_adams():
    tx, adam = _tx(b2=0.999), optax.scale_by_adam()
    params = {"b": jnp.zeros(64)}
    state, adam_state = tx.init(params), adam.init(params)
    for g in _gradients(3, (64,)):
        u, state = tx.update({"b": jnp.asarray(g)}, state)
        wanted, adam_state = adam.update({"b": jnp.asarray(g)}, adam_state)
        chex.assert_trees_all_close(u, wanted, rtol=8 * _U, atol=8 * _U)  # sums cancel


def test_eps_of_0_moves_nothing_without_a_gradient():
    """99 of 100 elements are in no row of the window yet."""
    tx = _tx(eps=0.0)
    grads = {"w": jnp.ones((80, 64)), "b": jnp.zeros(3)}
    updates, _ = tx.update(grads, tx.init(grads))
    assert set(np.unique(updates["w"].round(5)).tolist()) == {0.0, 1.0}
    np.testing.assert_array_equal(updates["b"], 0)


def test_wrappers_and_scan():
    params = {"w": jnp.ones((80, 64))}
    make = optax.inject_hyperparams(gx.microadam, static_args=("density", "window"))
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(learning_rate=1e-2))
    tx = optax.apply_if_finite(tx, 3)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3)[0], donate_argnums=0)
    (after, state), _ = run(carry), None
    assert optax.tree.get(state, "total_notfinite") == 0
    assert float(jnp.sum(after["w"])) < 80 * 64
    marked: Any = optax.tree.map_params(
        gx.microadam(1e-2), lambda x: x, gx.microadam(1e-2).init({"b": jnp.zeros(3)})
    )
    assert marked[0].mu["b"].shape == (3,)


def test_a_sharded_leaf_gives_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tx = _tx()
    g = {"w": jnp.asarray(_gradients(1, (96, 80))[0])}
    state = tx.init(g)
    wanted = jax.jit(tx.update)(g, state)
    chex.assert_trees_all_equal(jax.jit(tx.update)(jax.device_put(g, spec), state), wanted)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"density": 0.0}, "`density` must lie in"),
        ({"density": 1.5}, "`density` must lie in"),
        ({"window": 0}, "`window` must be"),
        ({"b1": 1.0}, "`b1` must lie in"),
        ({"eps": -1.0}, "`eps` must lie in"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        gx.scale_by_microadam(**arguments)


def test_what_decides_shapes_is_plain():
    """As `optax.inject_hyperparams` would have it, and from a configuration file."""
    with pytest.raises(TypeError, match="`density` and `window`.*static_args"):
        jax.jit(lambda density: _check(density, 10))(0.01)
    with pytest.raises(TypeError, match="`density` and `window`.*static_args"):
        _check(jnp.float32(0.01), jnp.int32(10))
    for window in (3.0, float("inf"), "3"):
        with pytest.raises(ValueError, match="`window` must be an integer"):
            _check(0.01, window)


def test_bad_leaves_are_named():
    tx = _tx()
    with pytest.raises(TypeError, match=r"params\[w\]"):
        tx.init({"w": jnp.zeros(3, jnp.complex64)})
    state = tx.init({"w": jnp.zeros((80, 64))})
    with pytest.raises(ValueError, match="the state of `w`"):
        tx.update({"w": jnp.zeros((80, 80))}, state)
    with pytest.raises(ValueError, match="the state of `w`"):
        _tx(window=4).update({"w": jnp.zeros((80, 64))}, state)
    with pytest.raises(ValueError, match="the state of `w`"):
        tx.update({"w": jnp.zeros((80, 64))}, optax.tree.cast(state, jnp.float32))


def test_no_derivative():
    tx = _tx()
    params = {"w": jnp.ones((80, 64))}

    def loss(params: Any) -> Any:
        return jnp.sum(tx.update(params, tx.init(params))[0]["w"])

    with pytest.raises(NotImplementedError, match="no useful derivative"):
        jax.grad(loss)(params)
