"""The dual code in runs: the same in whatever form, no movement without gradient, close to AdamW.

``u = 2**-24`` is the relative rounding error of float32. That two programs may differ in a code
where a fraction decides within rounding, and how seldom, is derived in `test_dual`. Comparisons
start every step from one state, so that such a code has no sequel.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_dual import (
    BUILTIN,
    FLOAT_MIN,
    LEAVES,
    U,
    blocks_of,
    gradients,
    moments_of,
    plan_of,
    zeros_of,
)

import gefen_jax as gx
from gefen_jax._dither import leaf_phases
from gefen_jax._dual_step import advance_dual
from gefen_jax._levels import make_levels
from gefen_jax._transform import _decay
from gefen_jax._types import Moments, Step

# One result, in whatever form ---------------------------------------------------------------------


def _assert_same_but_for_a_group(ours: Moments, theirs: Moments, block: tuple[int, ...]) -> None:
    """One step of two programs: equal bits, scales to an ulp or two; one group may have a flip."""
    ours, theirs = (Moments(*(np.asarray(x) for x in moments)) for moments in (ours, theirs))
    differ = 0
    for i, at in blocks_of(ours.mu.shape, block):
        same = np.array_equal(ours.mu[at], theirs.mu[at]) and ours.nu[i] == theirs.nu[i]
        differ += not (same and np.isclose(ours.scale[i], theirs.scale[i], rtol=4 * U, atol=0))
    assert differ <= 1


@functools.partial(jax.jit, static_argnames=("block", "chunk"))
def _advance(g, state, count, block, chunk):
    step = Step(
        decay=_decay(0.9, 0.999, 1e-8, 0.0, count),
        encoder=None,  # pyright: ignore[reportArgumentType] (that of codes of 8 bits)
        levels=make_levels(jnp.asarray(BUILTIN)),
        phase=leaf_phases(["w"], count)[0],
        nesterov=False,
        exact_lookup=True,
        backend=None,
    )
    return advance_dual(g, state, block, step, chunk=chunk)


# Shape, block, elements of a piece: rows of blocks, with a last piece that reaches back; columns
# of an inner axis, both ways; one block at a time.
_PIECES = {
    "rows": ((7, 48), (1, 16), 80),
    "inner": ((3, 4, 67), (1, 2, 1), 300),
    "single blocks": ((3, 4, 8), (1, 4, 8), 1),
}


@pytest.mark.parametrize("name", _PIECES)
def test_pieces_give_the_same_state(name):
    shape, block, chunk = _PIECES[name]
    leaf = {name: (shape, block)}
    state = gx.DualCode(block).init(shape)
    for t in range(1, 6):
        g = jnp.asarray(gradients(leaf, t)[name])
        whole, pieces = (_advance(g, state, jnp.int32(t), block, c) for c in (None, chunk))
        _assert_same_but_for_a_group(pieces, whole, block)
        state = whole


# Leaves that get blocks of (1, 256) by their shape, and how they lie: on shards of whole rows, of
# two blocks, of a quarter of a block.
_SPREADS = {
    "rows": ((16, 512), P("x", None)),
    "blocks": ((8, 1024), P("x", "y")),
    "parts of blocks": ((16, 512), P(None, ("x", "y"))),
}
_ON_A_MESH = list(itertools.product([AxisType.Auto, AxisType.Explicit], _SPREADS))


@pytest.mark.parametrize("axis_type, name", _ON_A_MESH)
def test_a_mesh_sees_what_one_device_sees(axis_type, name):
    """Every step from the state of one device; results lie as the parameters do."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    leaf, sharding = {name: _SPREADS[name]}, NamedSharding(mesh, _SPREADS[name][1])
    params, tx, block = zeros_of(leaf), gx.scale_by_gefen(), (1, 256)
    assert gx.plan_by_shape(params)[name].kind == gx.DualCode(block)
    update, alone = jax.jit(tx.update), tx.init(params)
    state = jax.jit(tx.init)(jax.device_put(params, sharding))
    for t in range(1, 4):
        grads = gradients(leaf, t)
        _, alone = update(grads, alone)
        updates, state = update(jax.device_put(grads, sharding), state)
        assert updates[name].sharding.is_equivalent_to(sharding, 2)
        assert state.mu[name].sharding.is_equivalent_to(sharding, 2)
        _assert_same_but_for_a_group(moments_of(state, name), moments_of(alone, name), block)
        lie = jax.tree.map(lambda x: x.sharding, state)
        state = jax.device_put(jax.device_get(alone), lie)


# One compiled optimizer without eps, for all that follows: rows and columns of four groups each.
_SOME = {"rows": ((4, 64), (1, 64)), "columns": ((64, 4), (64, 1))}
_NO_EPS = gx.scale_by_gefen(eps=0.0, plan=plan_of(_SOME))
_update = jax.jit(_NO_EPS.update)


def _run(sequence: Any, state: Any = None) -> tuple[list[Any], Any]:
    """The updates, as NumPy, and the last state."""
    state, updates = _NO_EPS.init(zeros_of(_SOME)) if state is None else state, []
    for grads in sequence:
        u, state = _update(grads, state)
        updates.append(jax.device_get(u))
    return updates, state


def _assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


_SEQUENCE = [gradients(_SOME, t) for t in range(1, 21)]


def test_a_run_resumes_bit_for_bit():
    updates, state = _run(_SEQUENCE)
    _, halfway = _run(_SEQUENCE[:10])
    saved = jax.tree.map(np.array, jax.device_get(halfway))
    resumed_updates, resumed = _run(_SEQUENCE[10:], jax.tree.map(jnp.asarray, saved))
    _assert_equal(resumed_updates, updates[10:])
    _assert_equal(resumed, state)


# What must not happen -----------------------------------------------------------------------------

# Adam's |m| / sqrt(nu), whatever the gradients were (Cauchy and Schwarz): 7.3.
_LARGEST = 0.1 / math.sqrt(0.001 * (1 - 0.9**2 / 0.999))


def test_without_gradient_no_movement():
    """Elements in groups that move, and whole groups, though eps is 0; then a late first gradient.

    Late ones move as far as Adam's: the one largest element of its group has code 1 exactly, and
    nu's level is within a half-octave, at most 1.5, of nu.
    """
    first = {"rows": np.zeros((4, 64), np.float32), "columns": np.zeros((64, 4), np.float32)}
    late = jax.tree.map(np.copy, first)
    first["rows"][:2, ::16], first["columns"][5, 1:3] = 1e-3, [1.0, -1e4]
    late["rows"][3, 7], late["columns"][9, 0] = -1e-6, 1e6
    updates, state = _run([first] * 40)
    for u, name in itertools.product(updates, _SOME):
        np.testing.assert_array_equal(np.sign(u[name]), np.sign(first[name]))
    (u,), _ = _run([late], state)
    adam = 0.1 / (1 - 0.9**41) / math.sqrt(1e-3 / (1 - 0.999**41))
    for name in _SOME:
        moved = late[name] != 0
        ratio = u[name][moved] / (np.sign(late[name][moved]) * adam)
        assert np.all((ratio >= 1.5**-0.5 * (1 - 2**-20)) & (ratio <= 1.5**0.5 * (1 + 2**-20)))
        idle = ~moved & (first[name] == 0)
        assert not u[name][idle].any()


def test_zero_gradients_for_ever():
    """From the first step on nothing moves; after others, steps fade as Adam's do, to 0.

    Adam's fade by b1 / sqrt(b2), from at most _LARGEST; a level within an octave of nu, either way,
    and the octave that chance may be late, are a factor of 2 in the root. At last m is subnormal:
    some CPUs then flush it to 0, on others 0.9 m rounds back to m, for good. Divided by the root of
    nu, here above 2^-20, that is an update below 2^20 FLOAT_MIN = 1e-32.
    """
    zeros = zeros_of(_SOME)
    _, untouched = _run([zeros] * 3)
    assert not any(np.any(x) for x in jax.tree.leaves((untouched.scale, untouched.nu)))

    def step(state, _):
        updates, state = _NO_EPS.update(zeros, state)
        largest = jax.tree.map(lambda u: jnp.max(jnp.abs(u)), updates)
        return state, jnp.stack(jax.tree.leaves(largest))

    _, state = _run(_SEQUENCE)
    _, largest = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1000))(state)
    t = np.arange(1, 1001)[:, None]
    bound = 2 * _LARGEST * (0.9 / math.sqrt(0.999)) ** t
    assert np.all(np.isfinite(largest)) and np.all(largest <= np.maximum(bound, 2**20 * FLOAT_MIN))


_LOUD = {"nan": np.nan, "-nan": -np.nan, "inf": np.inf, "-inf": -np.inf, "g^2 overflows": 1e25}


@pytest.mark.parametrize("name", _LOUD)
def test_what_is_not_finite_is_loud_and_stays(name):
    """Its element at once, its group at the next step at the latest and ever after; no other."""
    expected, _ = _run(_SEQUENCE)
    sequence = [jax.tree.map(np.copy, grads) for grads in _SEQUENCE]
    sequence[3]["rows"][1, 5], sequence[3]["columns"][5, 2] = _LOUD[name], _LOUD[name]
    updates, _ = _run(sequence)
    assert not np.isfinite(updates[3]["rows"][1, 5]) and not np.isfinite(
        updates[3]["columns"][5, 2]
    )
    for before, u in zip(expected[4:], updates[4:], strict=True):
        assert not np.isfinite(u["rows"][1]).any() and not np.isfinite(u["columns"][:, 2]).any()
        np.testing.assert_array_equal(u["rows"][[0, 2, 3]], before["rows"][[0, 2, 3]])
        np.testing.assert_array_equal(u["columns"][:, [0, 1, 3]], before["columns"][:, [0, 1, 3]])


@pytest.mark.parametrize("k", [-40, -20, -7, 1, 20, 50])
def test_scale_invariance(k):
    """Gradients times 2^k: the same updates, codes and scales to the bit, exponents 2 k more.

    From 2^-52 = 2e-16 (nu times 1 - b2, eleven octaves of levels, within normal floats) to 2^63.
    """
    expected, expected_state = _run(_SEQUENCE)
    updates, state = _run([jax.tree.map(lambda g: g * np.float32(2.0**k), s) for s in _SEQUENCE])
    _assert_equal(updates, expected)
    _assert_equal((state.mu, state.scale), (expected_state.mu, expected_state.scale))
    for name in _SOME:
        seen = np.asarray(expected_state.nu[name]) > 0
        shift = np.asarray(state.nu[name], int) - np.asarray(expected_state.nu[name])
        np.testing.assert_array_equal(shift, 2 * k * seen)


@pytest.mark.parametrize("k", [-100, -66, -60, -58, -56, -54])
def test_gradients_whose_squares_underflow_do_no_harm(k):
    """The smaller they are, the more elements have a nu of 0 and stay: never a wild step.

    At most Adam's largest; the level may be an octave below nu.
    """
    factor = np.float32(2.0**k)
    updates, _ = _run([jax.tree.map(lambda g: g * factor, grads) for grads in _SEQUENCE])
    for name in _SOME:
        seen = np.cumsum([grads[name] != 0 for grads in _SEQUENCE], axis=0)
        u = np.stack([u[name] for u in updates])
        assert np.all(np.abs(u) <= math.sqrt(2) * _LARGEST) and not u[seen == 0].any()
        assert k > -66 or not u.any()


# Close to Adam ------------------------------------------------------------------------------------


def test_constant_gradients_give_their_sign():
    """Of sizes over ten octaves in a group, each within the levels around its nu.

    Those are up to an octave apart: a factor of sqrt(2) in the update, either way, for as long as
    nu takes, 1 / (1 - b2) steps. m is right on average; roundings are off by half a gap of 0.29
    scales (of up to sqrt(2)), 0.2 / sqrt(3) on average, for 1 / (1 - b1) steps: over 1000 steps, as
    if independent, by 1.2 / sqrt(1000) = 0.037. Five of these are allowed.

    The average of all 512 lies between 1 and 1.046: that of 1 / sqrt(nu) over two levels is above
    1 / sqrt of their average, by up to 1.5 % for levels 1.5 apart and 4.6 % for 2. It is allowed
    five deviations, which add half a level's range, (sqrt(2) - 1) / 2 = 0.21, to an element's.
    """
    size = 2.0 ** -np.random.default_rng(0).uniform(0, 5, 256)
    sign = np.resize([1, -1, 1], 256)
    grads = {
        name: jnp.asarray((sign * size).reshape(s), jnp.float32) for name, (s, _) in _SOME.items()
    }

    def step(state, _):
        updates, state = _NO_EPS.update(grads, state)
        return state, updates

    start = _NO_EPS.init(zeros_of(_SOME))
    _, updates = jax.jit(lambda s: jax.lax.scan(step, s, None, length=2000))(start)
    averages = [np.asarray(u)[1000:].mean(axis=0).ravel() * sign for u in jax.tree.leaves(updates)]
    assert np.min(averages) >= 0.5**0.5 - 5 * 0.037 and np.max(averages) <= 2**0.5 + 5 * 0.037
    share = 5 * math.hypot(0.21, 0.037) / math.sqrt(512)
    assert 1 - share <= np.mean(averages) <= 1.046 + share


class _Training(NamedTuple):
    """Arguments of both optimizers, and what is special about the gradients."""

    kwargs: dict[str, Any] = {}
    dtype: Any = jnp.float32
    spike: float = 1.0  # what the gradients of one step are multiplied by


_TRAININGS = {
    "default": _Training(),
    "b2 = 0.95": _Training({"b2": 0.95}),
    "b1 = 0": _Training({"b1": 0.0}),
    "nesterov": _Training({"nesterov": True}),
    "weight decay": _Training({"weight_decay": 0.1}),
    "bfloat16 gradients": _Training(dtype=jnp.bfloat16),
    "spike": _Training(spike=100.0),
    "spike, b2 = 0.95": _Training({"b2": 0.95}, spike=100.0),
}


@pytest.mark.parametrize("name", _TRAININGS)
def test_noisy_quadratic(name):
    """Curvatures over two decades in a group: AdamW's descent, and nearly its noise floor.

    While the gradient decides, the losses agree within 10 % (sums of 2,048 elements; an update is
    right on average). At the floor the loss goes with the square of the updates, so with 1 / nu.
    Nu's roundings, of a gap d each, add up over 1 / (1 - b2) steps to a variance of up to d / 2
    times nu, as if independent: for gaps of a third to half of nu (the large elements, which make
    the loss), a fifth of nu^2, and so much is 1 / nu larger on average. The first moment adds its
    own: gaps of 0.1 scales of three deviations are 0.09 / 6 of m's variance at b1 = 0, and five
    times that at b1 = 0.9, where they add up. A factor of 1.35 covers both, and some chance.
    """
    training = _TRAININGS[name]
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(10 ** rng.uniform(-1, 1, (8, 256)), jnp.float32)
    start = jnp.asarray(rng.choice([-1.0, 1.0], (8, 256)), jnp.float32)
    plan = plan_of({"w": (start.shape, (1, 256))})
    arguments: dict[str, Any] = {"weight_decay": 0.0} | training.kwargs
    optimizers = (
        optax.adamw(0.01, **arguments),
        gx.gefen(0.01, plan=plan, **arguments),
    )

    def losses(tx):
        def step(carry, t):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), start.shape)
            g = curvature * (params["w"] + noise) * jnp.where(t == 300, training.spike, 1.0)
            updates, state = tx.update({"w": g.astype(training.dtype)}, state, params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
            return (params, state), jnp.mean(curvature * params["w"] ** 2)

        params = {"w": start}
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(500))[1]

    adam, ours = (np.asarray(jax.jit(functools.partial(losses, tx))()) for tx in optimizers)
    np.testing.assert_allclose(ours[:100], adam[:100], rtol=0.1)
    assert 0.9 < ours[400:].mean() / adam[400:].mean() < 1.35


@pytest.mark.parametrize("name", LEAVES)
def test_bytes(name):
    """One byte per element; per block a float32 and a byte."""
    shape, block = LEAVES[name]
    blocks = len(list(blocks_of(shape, block)))
    leaf = gx.LeafPlan(name, shape, gx.DualCode(block), "test")
    assert leaf.nbytes == math.prod(shape) + 5 * blocks
