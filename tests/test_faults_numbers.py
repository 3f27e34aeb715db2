"""Numerical faults of other implementations of this idea, each a test of ours. See also the
encoder's, the codebook's and the period search's own tests.

Most run on one leaf in every kind of blocks, with the built-in and with a learned codebook.
Bounds are derived where they stand. U is the rounding error of one float32 operation.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx
from gefen_jax import _codebook
from gefen_jax._builtin import builtin_codebook
from gefen_jax._histogram import count_normalised

pytestmark = pytest.mark.once

U = 2.0**-24
SHAPE = (32, 256)  # large enough to be coded

KINDS = {
    "rows": gx.SharedBlocks((1, 256)),
    "columns": gx.SharedBlocks((32, 1)),
    "boxes": gx.SharedBlocks((4, 256)),
    "shorter last run": gx.SharedBlocks((1, 96)),
    "flat": gx.FlatPeriods(256, 256),
    "flat, nu per element": gx.FlatPeriods(1, 256),
}
BUILT_IN, LEARNED = "built in", "learned"
PLANS = {
    "no plan": None,
    **{f"{kind}, {LEARNED}": (kind, LEARNED) for kind in KINDS},
    f"rows, {BUILT_IN}": ("rows", BUILT_IN),
    f"flat, {BUILT_IN}": ("flat", BUILT_IN),
}
SHARED_NU = [name for name, case in PLANS.items() if case and case[0] != "flat, nu per element"]
# Those whose numbers are as exact as a codebook of 256 entries; the dual code: test_dual.py.
SOME = ["rows, built in", "columns, learned", "flat, learned"]


@functools.cache
def learned_plan() -> gx.Plan:
    g = {"w": noise(7)}
    return gx.calibrate(g, g)


def make_plan(name: str) -> gx.Plan | None:
    if PLANS[name] is None:
        return None
    kind, codebook = PLANS[name]
    plan = learned_plan() if codebook == LEARNED else gx.plan_by_shape({"w": jnp.zeros(SHAPE)})
    return plan.with_kind("w", KINDS[kind])


def kind_of(name: str) -> gx.SharedBlocks | gx.FlatPeriods:
    return KINDS["rows"] if PLANS[name] is None else KINDS[PLANS[name][0]]


def block_ids(kind: gx.SharedBlocks | gx.FlatPeriods) -> np.ndarray:
    """For every element of the leaf the number of its block."""
    if isinstance(kind, gx.FlatPeriods):
        return (np.arange(math.prod(SHAPE)) // kind.group).reshape(SHAPE)
    index = [i // b for i, b in zip(np.indices(SHAPE), kind.block, strict=True)]
    return np.ravel_multi_index(index, [-(-d // b) for d, b in zip(SHAPE, kind.block, strict=True)])


def runner(tx, gradient, steps, *, keep=True):
    """Training on ``gradient(step, *args)``: a jitted function of the params and ``args``.

    It returns the last params and state and, to ``keep``, every step's update, as float32 (a scan
    that stacks bfloat16 converts the whole stack at every step on a CPU).
    """

    @jax.jit
    def run(params, *args):
        def body(carry, step):
            params, state = carry
            updates, state = tx.update(gradient(step, *args), state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, jax.tree.map(lambda u: u.astype(jnp.float32), updates) if keep else None

        carry, updates = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))
        return *carry, updates

    return run


@functools.cache
def _bank() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((37, *SHAPE), np.float32)


def noise(step):
    """A normal gradient for every step, traced or not; they repeat after 37."""
    return jnp.asarray(_bank())[step % 37]


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def signs(shape=SHAPE):
    return np.where(np.random.default_rng(1).random(shape) < 0.5, np.float32(1), np.float32(-1))


def momentum(state: gx.ScaleByGefenState, kind: gx.SharedBlocks | gx.FlatPeriods) -> np.ndarray:
    scale = np.asarray(state.scale["w"], np.float64).reshape(-1)[block_ids(kind)]
    return np.asarray(state.codebook, np.float64)[np.asarray(state.mu["w"])] * scale


def assert_bitwise(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def dead_mask() -> np.ndarray:
    """Whole rows, whole columns and single elements."""
    dead = np.random.default_rng(2).random(SHAPE) < 0.1
    dead[[0, 5]] = True
    dead[:, [0, 7, 255]] = True
    return dead


# 1. What has no gradient does not drift.


@pytest.mark.parametrize("name", PLANS)
def test_01_without_gradient_nothing_moves(name):
    dead = dead_mask()
    start = {"w": normal(SHAPE, 10)}
    tx = gx.gefen(1e-2, weight_decay=0.0, plan=make_plan(name))
    run = runner(tx, lambda i: {"w": jnp.where(dead, 0.0, noise(i))}, 1000, keep=False)
    end, _, _ = run(start)
    np.testing.assert_array_equal(end["w"][dead], start["w"][dead])
    assert np.all(end["w"][~dead] != start["w"][~dead])


@pytest.mark.parametrize("name", ["rows, learned", "columns, learned", "flat, built in"])
def test_01_what_loses_its_gradient_drifts_by_less_than_the_coding_error(name):
    # Here coding differs from AdamW: the momentum m of an element without gradient becomes 0.9 m,
    # and the nearest code to that is its own once 0.1 |m| is at most half the distance between
    # codes. It stays there: |m| <= scale * gap / (2 (1 - b1)), with the gap around 0. Whole blocks
    # without a gradient are free of it: their scale decays.
    dead, kind = dead_mask(), kind_of(name)
    tx = gx.scale_by_gefen(plan=make_plan(name))
    run = runner(tx, lambda i: {"w": jnp.where(dead & (i >= 10), 0.0, noise(i))}, 1000)
    _, state, updates = run({"w": jnp.zeros(SHAPE)})
    codebook = np.asarray(state.codebook, np.float64)
    gap = np.diff(codebook)[np.abs(codebook[1:]) < 0.25].max()
    scale = np.asarray(state.scale["w"], np.float64).reshape(-1)[block_ids(kind)]
    # Scales go up and down from step to step and take a code along, by at most a code's distance.
    assert np.all(np.abs(momentum(state, kind))[dead] <= scale[dead] * gap * (5 + 1))
    ids = block_ids(kind)
    without = np.isin(ids, [b for b in np.unique(ids) if dead[ids == b].all()])
    np.testing.assert_array_less(np.abs(np.asarray(updates["w"][-1])[without]), 1e-30)


# 2. Gradients that are zero at first.


def regression(tx):
    """A linear regression whose first four gradients of some leaves are zero.

    Returns a jitted function of a flag per leaf: the last loss and all updates.
    """
    x, target = normal((256, 32), 1), normal(SHAPE, 2)
    y = x @ target + 0.1 * normal((256, 256), 3)

    def loss(params):
        return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)

    @jax.jit
    def run(zero_at_first):
        def body(carry, step):
            params, state = carry
            g = jax.grad(loss)(params)
            g = jax.tree.map(lambda g, zero: jnp.where((step < 4) & zero, 0, g), g, zero_at_first)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        params = {"w": jnp.zeros(SHAPE), "b": jnp.zeros(256)}
        carry, updates = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(400))
        return loss(carry[0]), updates

    return run


SCHEDULE = optax.linear_schedule(0.05, 0.0, 400)


@functools.cache
def adamw_regression() -> float:
    tx = optax.adamw(SCHEDULE, weight_decay=0.0)
    return float(regression(tx)({"w": False, "b": False})[0])


REGRESSION_PLANS = {
    "no plan": lambda params: None,
    "calibrated on zeros": lambda params: gx.calibrate(params, params),
    "calibrated on a zero and a constant": lambda params: gx.calibrate(
        params, {"w": params["w"], "b": params["b"] + 1}
    ),
    "calibrated without a gradient": lambda params: gx.calibrate(params, {"w": None, "b": None}),
    # 7. Too few values for a codebook.
    "calibrated on a constant": lambda params: gx.calibrate(
        params, jax.tree.map(jnp.ones_like, params)
    ),
    "calibrated on one element": lambda params: gx.calibrate(
        params, jax.tree.map(lambda x: x.at[(3,) * x.ndim].set(-1e-3), params)
    ),
    "columns": lambda params: gx.plan_by_shape(params).with_kind("w", KINDS["columns"]),
    "flat": lambda params: gx.plan_by_shape(params).with_kind("w", KINDS["flat"]),
}


@pytest.mark.parametrize("plan", REGRESSION_PLANS)
def test_02_and_07_zero_at_first_then_converges(plan):
    plan = REGRESSION_PLANS[plan]({"w": jnp.zeros(SHAPE), "b": jnp.zeros(256)})
    run = regression(gx.gefen(SCHEDULE, weight_decay=0.0, plan=plan))
    for zero in ({"w": True, "b": False}, {"w": True, "b": True}):
        value, updates = run(zero)
        assert not np.any(updates["w"][:4]) and np.any(updates["w"][4])
        assert np.any(updates["b"][:4]) != zero["b"]
        # The noise that no parameter explains is 0.01 * (1 - 33 / 256) = 0.0087, and both reach it
        # but for the last steps' size: a twentieth of it is left to the coding.
        assert value <= 1.05 * adamw_regression() <= 1.05 * 0.01


# 3. Narrow gradients.

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME)
def test_03_nu_rises_and_decays_over_3000_steps(name, dtype):
    # 300^2 overflows float16; a thousandth of nu is below the resolution of both narrow types.
    high, low = (float(jnp.asarray(v, DTYPES[dtype])) for v in (300.0, 0.03))
    tx = gx.scale_by_gefen(plan=make_plan(name))

    def gradient(i, rise):
        return {"w": (jnp.where(i < rise, high, low) * signs()).astype(DTYPES[dtype])}

    run = runner(tx, gradient, 3000, keep=False)
    for rise in (3000, 1000):
        _, state, _ = run({"w": jnp.zeros(SHAPE, DTYPES[dtype])}, rise)
        left = 0.999 ** (3000 - rise)
        expected = high**2 * (1 - 0.999**rise) * left + low**2 * (1 - left)
        assert state.nu["w"].dtype == jnp.float32
        # Per step: b2 itself, the product and the sum round, each by U.
        np.testing.assert_allclose(state.nu["w"], expected, rtol=3 * 3000 * U)


SIZES = {  # 1e-8 is 0 in float16, whose smallest number is 6e-8
    "bfloat16": (300.0, 1e-8, 1e-16, 1e18),
    "float16": (300.0, 1e-8, 6e-8, 65504.0),
    "float32": (300.0, 1e-8, 1e-16, 1e18),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME)
def test_03_size_does_not_matter(name, dtype):
    tx = gx.scale_by_gefen(eps=1e-30, plan=make_plan(name))
    run = runner(tx, lambda i, g: {"w": g}, 5)
    for size in SIZES[dtype]:
        g = (size * signs()).astype(DTYPES[dtype])
        _, _, updates = run({"w": g}, g)
        # Rounded to the dtype once, and in float32 by a few operations per step; of 1 - b2^t
        # subtraction leaves t / 1000 of b2, whose power is known to t * U.
        rtol = float(jnp.finfo(DTYPES[dtype]).eps) + (1000 + 20) * U
        np.testing.assert_allclose(updates["w"][-1], np.sign(g.astype(np.float32)), rtol=rtol)
        direction, _ = jax.eval_shape(tx.update, {"w": g}, tx.init({"w": g}))
        assert direction["w"].dtype == g.dtype


# 4. Scales that differ inside a block, and a spike.


def block_sizes(g: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per step and block: the largest |g| and the mean of g^2."""
    order = np.argsort(ids, axis=None, kind="stable")
    flat = np.abs(g.reshape(len(g), -1)[:, order]).astype(np.float64)
    starts = np.searchsorted(ids.reshape(-1)[order], np.arange(ids.max() + 1))
    counts = np.diff([*starts, ids.size])
    return np.maximum.reduceat(flat, starts, 1), np.add.reduceat(flat**2, starts, 1) / counts


def average(x: np.ndarray, decay: float, *, debias: bool = True) -> np.ndarray:
    """Adam's moving average along the first axis."""
    out, running = np.empty_like(x), np.zeros_like(x[0])
    for t in range(len(x)):
        running = decay * running + (1 - decay) * x[t]
        out[t] = running / (1 - decay ** (t + 1) if debias else 1)
    return out


SPIKE, STEPS = 40, 120
UNEVEN = {
    "even": 1.0,
    "elements": np.where(np.indices(SHAPE).sum(0) % 2, 1.0, 1e-4),
    "one in 64": np.where(np.indices(SHAPE)[1] % 64, 1e-4, 1.0),
}


@pytest.mark.parametrize("name", SHARED_NU)
def test_04_uneven_blocks_and_a_spike(name):
    # Codes lie in [-1, 1], so with M_t = max_block |g_t|
    #     scale_t <= b1 scale_{t-1} + (1 - b1) M_t:  scale is at most the average of M, and
    #     |update| <= lr * average(M) / sqrt(average(mean_block g^2)),
    # whatever coding does: for sizes that stay, the block's largest over its root mean square.
    kind = kind_of(name)
    ids = block_ids(kind)

    def gradient(i, size, spike):
        return {"w": jnp.where(i == SPIKE, spike, 1.0) * size * noise(i)}

    run = runner(gx.scale_by_gefen(plan=make_plan(name)), gradient, STEPS)
    all_gradients = jax.jit(
        lambda size, spike: jax.lax.map(lambda i: gradient(i, size, spike)["w"], jnp.arange(STEPS))
    )
    for size in UNEVEN.values():
        size = jnp.broadcast_to(jnp.asarray(size, jnp.float32), SHAPE)
        coded, tolerance = [], 0.0
        for spike in (100.0, 1.0):
            largest, square = block_sizes(np.asarray(all_gradients(size, spike)), ids)
            bound = average(largest, 0.9) / np.sqrt(average(square, 0.999))
            _, state, updates = run({"w": jnp.zeros(SHAPE)}, size, spike)
            assert np.all(np.abs(updates["w"]) <= bound[:, ids] * (1 + 10 * STEPS * U))
            coded.append(momentum(state, kind))
            # A code is off by at most half a gap times the scale. That error fades as the momentum
            # does: the sum over steps k ago of 0.9^k is an average over (1 - 0.9).
            gap = np.diff(np.asarray(state.codebook, np.float64)).max()
            scale = average(largest, 0.9, debias=False)
            tolerance += average(gap / 2 * scale, 0.9, debias=False)[-1] / (1 - 0.9)
            # What is left of the momentum at the spike; since then both had the same gradients.
            tolerance += 0.9 ** (STEPS - 1 - SPIKE) * scale[SPIKE]
        # Recovery: 80 steps after the spike, both momenta are equal but for that.
        assert np.all(np.abs(coded[0] - coded[1]) <= tolerance[ids])


# 5. Signed zeros and subnormals through the whole update. (Codes and ties: the encoder's tests.)

TINY = (-0.0, 0.0, 1e-42, -1e-45, 2.0**-126)
WITH_PER_ELEMENT = [*SOME, "flat, nu per element, learned"]


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("name", WITH_PER_ELEMENT)
def test_05_zeros_and_subnormals(name, eps):
    # Everywhere, and beside gradients of ordinary size. Squares of all of them are 0 in float32.
    tx = gx.scale_by_gefen(eps=eps, plan=make_plan(name))
    run = runner(tx, lambda i, g: {"w": g}, 10)
    every_other = np.indices(SHAPE).sum(0) % 2 == 1
    for value in TINY:
        for is_tiny in (np.full(SHAPE, True), every_other):
            g = jnp.where(is_tiny, jnp.float32(value), noise(0))
            _, state, updates = run({"w": jnp.zeros(SHAPE)}, g)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, updates)))
            assert np.all(np.abs(updates["w"][:, is_tiny]) <= 1e-20)


# 6. Histogram counts that float32 cannot hold.


def test_06_counts_beyond_2_to_the_24():
    rows = 4100
    g = jnp.ones((rows, 4096), jnp.bfloat16).at[:, 1].set(-0.5)
    counts = count_normalised(g, (1, 4096))
    assert counts[4095] == rows * 4095 > 2**24
    assert counts[1024] == rows
    assert counts.sum() == g.size


def test_06_chunks_count_as_the_whole():
    # Multiples of 1 / 2048: the division and the bin are exact, here and in NumPy.
    g = np.random.default_rng(0).integers(-2048, 2049, (1030, 1024)).astype(np.float32)
    g[:, 0] = 2048
    expected = np.bincount(np.minimum(g[g != 0] + 2048, 4095).astype(int), minlength=4096)
    assert g.size > 1 << 20  # more than one chunk
    np.testing.assert_array_equal(count_normalised(jnp.asarray(g), (1, 1024)), expected)
    np.testing.assert_array_equal(count_normalised(jnp.asarray(g.T), (1024, 1)), expected)


def test_06_large_counts_give_the_same_codebook():
    # A power of two: every sum of the dynamic programme is the same number, scaled.
    histogram = np.zeros(4096, np.int64)
    histogram[100:4000:13] = np.random.default_rng(0).integers(1, 1000, 300)
    np.testing.assert_array_equal(_codebook.learn(histogram), _codebook.learn(histogram << 30))


# 8. Sizes.

ANY_SIZE = ((), (0,), (1,), (2,), (0, 5), (7919,), (2, 4099), (4099, 2), (67, 83))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", ANY_SIZE)
def test_08_any_size(shape, calibrated):
    g = {"w": normal(shape, 5)}
    plan = gx.calibrate(g, g) if calibrated else None
    end, state, updates = runner(gx.gefen(0.1, plan=plan), lambda i: g, 3)(g)
    assert end["w"].shape == updates["w"].shape[1:] == state[0].mu["w"].shape == shape
    assert np.all(np.isfinite(updates["w"]))
    # Downhill, where the gradient is too large for the code 0.
    large = np.abs(g["w"]) > 0.1
    assert np.all((np.sign(end["w"] - g["w"]) == -np.sign(g["w"])) | ~large)


HUGE = {
    "square": (50_000, 50_000),
    "vector": (2**31 + 2**12,),
    "vector that no run divides": (2**31 + 11,),
    "stacked": (64, 8192, 8192),
    "many rows": (2**22, 640),
    "many columns": (640, 2**22),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_08_more_than_2_to_the_31_elements(dtype):
    params = {k: jax.ShapeDtypeStruct(s, DTYPES[dtype]) for k, s in HUGE.items()}
    assert all(math.prod(s) > 2**31 for s in HUGE.values())
    plan = gx.plan_by_shape(params)
    tx = gx.gefen(1e-3, plan=plan)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {k: (u.shape, u.dtype) for k, u in updates.items()} == {
        k: (p.shape, p.dtype) for k, p in params.items()
    }
    size = sum(math.prod(s) for s in HUGE.values())
    assert gx.memory_report(state).total_bytes == pytest.approx(size * plan.bytes_per_param)
    assert 1 < plan.bytes_per_param < 1.05


def test_08_more_than_2_to_the_31_elements_lower():
    params = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in HUGE.items()}
    tx = gx.gefen(1e-3)
    state = jax.eval_shape(tx.init, params)
    assert jax.jit(tx.init).lower(params)
    assert jax.jit(tx.update).lower(params, state, params)


# 9. Arguments out of range.

REFUSED = {
    "learning_rate": (-1e-3, math.inf, math.nan),
    "b1": (1.0, -0.1, math.nan, 1.5),
    "b2": (1.0, -0.1, math.nan, 1.5),
    "eps": (-1e-8, math.nan, math.inf),
    "eps_root": (-1e-8, math.nan, math.inf),
    "weight_decay": (-0.1, math.nan, math.inf),
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in REFUSED.items() for v in vs])
def test_09_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{re.escape(str(value))}"):
        gx.gefen(**{"learning_rate": 1e-3, name: value})


ZEROS = {
    "b1": dict(b1=0.0),
    "b2": dict(b2=0.0),
    "both": dict(b1=0.0, b2=0.0),
    "both, nesterov": dict(b1=0.0, b2=0.0, nesterov=True),
}


@pytest.mark.parametrize("which", ZEROS)
@pytest.mark.parametrize("name", ["columns, learned"])
def test_09_zero_decay_rates_work(name, which):
    # |g| is the same everywhere, so codes of +-1 lose nothing and this is Adam.
    def gradient(i):
        return {"w": jnp.array([1.0, 3.0, 0.5, 2.0])[i % 4] * signs()}

    params = {"w": jnp.zeros(SHAPE)}
    tx = gx.scale_by_gefen(**ZEROS[which], plan=make_plan(name))
    _, _, ours = runner(tx, gradient, 20)(params)
    _, _, theirs = runner(optax.scale_by_adam(**ZEROS[which]), gradient, 20)(params)
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=10 * 20 * U)


# 9a. Overflow, eps = 0, a calibration that failed.


@pytest.mark.parametrize("name", [*SOME, "shorter last run, learned"])
def test_09a_a_square_that_overflows_is_loud_and_stays_in_its_block(name):
    ids = block_ids(kind_of(name))
    hit = ids == ids[3, 200]
    tx = gx.scale_by_gefen(plan=make_plan(name))
    params = {"w": jnp.zeros(SHAPE)}

    def gradient(i, value):
        g = noise(i)
        return {"w": jnp.where(i == 2, g.at[3, 200].set(value), g)}

    run = runner(tx, gradient, 6)
    _, state, updates = run(params, 1e20)
    _, quiet, expected = run(params, 1.0)
    np.testing.assert_array_equal(np.isnan(updates["w"][2:]), np.broadcast_to(hit, (4, *SHAPE)))
    np.testing.assert_array_equal(updates["w"][:, ~hit], expected["w"][:, ~hit])
    np.testing.assert_array_equal(state.mu["w"][~hit], quiet.mu["w"][~hit])
    assert np.sum(~np.isfinite(state.nu["w"])) == 1


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        (gx.WideDualCode((1, 256)), 1),
        (gx.DualCode((1, 256)), 2),
        (gx.SharedBlocks((1, 256)), 256),
    ],
)
def test_09a_where_squares_begin_to_overflow(kind, sharing):
    """Of one element, and of all that share a second moment."""
    params = {"w": jnp.zeros((2, 256))}
    tx = gx.scale_by_gefen(plan=gx.plan_by_shape(params).with_kind("w", kind))
    two_steps = jax.jit(
        lambda g: tx.update({"w": jnp.ones_like(g)}, tx.update({"w": g}, tx.init(params))[1])[0]
    )

    def finite(value, elements):
        updates = two_steps(jnp.ones((2, 256)).at[0, elements].set(value))["w"]
        return np.isfinite(updates).all(axis=1).tolist()

    most = np.sqrt(np.finfo(np.float32).max)
    for elements, bound in ((0, most), (slice(None), most / np.sqrt(sharing))):
        # The margin: roundings of a sum, and of the square.
        assert finite(0.99 * bound, elements) == [True, True]
        assert finite(1.01 * bound, elements) == [False, True]


@pytest.mark.parametrize(
    ("name", "nesterov"), [*((name, False) for name in WITH_PER_ELEMENT), ("no plan", True)]
)
def test_09a_eps_0_and_a_block_of_zeros(name, nesterov):
    ids = block_ids(kind_of(name))
    zero = ids == ids[3, 200]
    tx = gx.scale_by_gefen(eps=0.0, nesterov=nesterov, plan=make_plan(name))
    run = runner(tx, lambda i: {"w": jnp.where(zero, 0.0, noise(i))}, 5)
    _, state, updates = run({"w": jnp.zeros(SHAPE)})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    assert not np.any(updates["w"][:, zero])
    assert np.any(updates["w"][:, ~zero])


@pytest.mark.parametrize("rule", ["axis", "reference"])
def test_09a_a_failed_calibration_leaves_nothing_behind(rule):
    good = {"a": noise(0), "b": noise(1), "c": normal(7)}
    before = builtin_codebook()
    first = gx.calibrate(good, good, rule=rule)
    for path, bad in (("b", good["b"].at[3, 3].set(jnp.nan)), ("c", good["c"].at[1].set(jnp.inf))):
        with pytest.raises(ValueError, match=f"`{path}`"):
            gx.calibrate(good, good | {path: bad}, rule=rule)
    assert gx.calibrate(good, good, rule=rule) == first
    assert builtin_codebook() == before


# 9b. The reference's cap on periods.

PERIODS = {  # length of the rows whose sizes alternate: the period that becomes of it
    1152: 1152,
    2048: 2048,
    7919: 7919,
    4096: 2048,
    2304: 1152,
    8 * 1031: 1031,
    1024: 1024,
    768: 768,
}


@pytest.mark.parametrize("row", PERIODS)
def test_09b_periods_above_1024_become_the_smallest_divisor_above(row):
    # Neighbouring rows differ in size, longer periods average two of them, shorter ones find
    # neighbours that do not differ: the score peaks at a row.
    sizes = np.where(np.arange(16) % 2, np.float32(1), np.float32(1e-3))[:, None]
    g = {"w": sizes * signs((16, row))}
    plan = gx.calibrate(g, g, rule="reference")
    assert plan["w"].kind == gx.FlatPeriods(PERIODS[row], PERIODS[row])


# 10. Large counts.


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_10_large_counts(name, nesterov):
    tx = gx.scale_by_gefen(nesterov=nesterov, plan=make_plan(name))
    params = {"w": jnp.asarray(signs())}
    step = jax.jit(tx.update)
    for count in (2**24 + 1, 2**31 - 2, 2**31 - 1):
        state = tx.init(params)
        for k in (1, 2, 3):
            updates, state = step(params, state._replace(count=jnp.int32(count)))
            assert int(state.count) == min(count + 1, 2**31 - 1)
            # No bias is left to correct: after k gradients of +-1, mu is 1 - 0.9^k (nesterov: of
            # one more) and nu 1 - 0.999^k, whose first digits float32 subtracts away: 1 / 1000 of
            # b2 remains, known to U * 1000.
            size = (1 - 0.9 ** (k + nesterov)) / (math.sqrt(1 - 0.999**k) + 1e-8)
            np.testing.assert_allclose(np.abs(updates["w"]), size, rtol=1000 * U + 20 * U)


# 11. NaN and inf.

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("rule", ["axis", "reference"])
@pytest.mark.parametrize("leaf", ["coded", "small", "scalar"])
def test_11_calibration_names_the_leaf(leaf, rule, value):
    good = {"coded": noise(0), "small": normal(16), "scalar": jnp.float32(1.0)}
    bad = good | {leaf: good[leaf].at[(1,) * good[leaf].ndim].set(BAD[value])}
    for grads in (bad, [good, bad]):
        with pytest.raises(ValueError, match=f"`{leaf}` holds NaN or inf"):
            gx.calibrate(good, grads, rule=rule)


@pytest.mark.parametrize("name", SOME)
def test_11_apply_if_finite_keeps_everything(name):
    tx = optax.apply_if_finite(gx.gefen(1e-2, plan=make_plan(name)), max_consecutive_errors=3)
    params = {"w": noise(9)}
    step = jax.jit(tx.update)
    updates, state = step({"w": noise(0)}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    expected, _ = step({"w": noise(2)}, state, params)
    for value in BAD.values():
        updates, skipped = step({"w": noise(1).at[3, 3].set(value)}, state, params)
        assert not np.any(updates["w"])
        assert_bitwise(skipped.inner_state, state.inner_state)
        assert int(skipped.total_notfinite) == 1
        after, _ = step({"w": noise(2)}, skipped, params)
        assert_bitwise(after, expected)
