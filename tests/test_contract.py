"""Optax's contract for a contributed optimizer, in our words (optax/contrib/_common_test.py).

One contract, many implementations: every test runs for both factories and every way of planning.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx

_LEARNING_RATE = 1e-2

# A float32 holds 1 - 0.999 to half an ulp of 1, which is 2^-24 / 1e-3 of it. That is how far a
# decay rate that became an array may move nu; scale sees 2^-24 / 0.1.
_INJECTED_RTOL = 2.0**-24 / 1e-3


def _params(dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(0)  # NumPy's: JAX would compile it for every shape
    rows = np.exp(random.standard_normal((64, 1)))
    return {
        "kernel": jnp.asarray(rows * random.standard_normal((64, 128)), dtype),  # in blocks
        "bias": jnp.asarray(random.standard_normal(128), dtype),  # exact, but for the reference
    }


def _reference_with_builtin_codebook(params: Any, grads: Any) -> gx.Plan:
    # The reference's own codebook of a handful of gradients has a handful of values and no zero:
    # on noiseless objectives of three parameters it diverges, there as here.
    plan = gx.calibrate(params, grads, rule="reference")
    return dataclasses.replace(plan, codebook=gx.plan_by_shape(params).codebook)


PLANS: dict[str, Callable[[Any, Any], gx.Plan | None]] = {
    "no plan": lambda params, grads: None,
    "wide": lambda params, grads: gx.plan_by_shape(params, kind="wide_dual_code"),
    "axis": gx.calibrate,
    "reference": lambda params, grads: gx.calibrate(params, grads, rule="reference"),
}


class Factory(NamedTuple):
    make: Callable[..., Any]
    number: dict[str, float]  # the positional arguments, as injectable keywords


FACTORIES = {
    "gefen": Factory(gx.gefen, {"learning_rate": _LEARNING_RATE}),
    "scale_by_gefen": Factory(gx.scale_by_gefen, {"b1": 0.9}),
}

_GRADS = _params()
_MADE = {name: make(_GRADS, _GRADS) for name, make in PLANS.items()}


@pytest.fixture(params=PLANS)
def plan(request) -> gx.Plan | None:
    return _MADE[request.param]


@pytest.fixture(params=FACTORIES)
def factory(request) -> Factory:
    return FACTORIES[request.param]


@pytest.fixture
def tx(factory, plan) -> optax.GradientTransformationExtraArgs:
    return factory.make(**factory.number, plan=plan)


def _steps(tx, params, grads, n, **extra):
    state = tx.init(params)
    for _ in range(n):
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def test_extra_args_are_ignored_and_the_second_call_does_not_trace(tx):
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(_GRADS, state, params, an_argument_nobody_expects=1)
        return optax.apply_updates(params, updates), state

    params = _params()
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1 and step._cache_size() == 1
    plain_params, _ = _steps(tx, _params(), _GRADS, 3)
    # Compiled in one piece, products and sums may be fused: a few ulps of the step, 1e-2.
    chex.assert_trees_all_close(params, plain_params, rtol=0, atol=2 * _LEARNING_RATE * 2**-7)


def test_map_params(tx):
    state = tx.init(_params())
    same = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(same, state)
    chex.assert_trees_all_equal_dtypes(same, state)
    # Leaf by leaf beside the parameters, as a sharding rule does it; mu has their shapes.
    beside = optax.tree.map_params(
        tx, lambda s, p: None if s is None else p, state, _params(), is_leaf=lambda x: x is None
    )
    chex.assert_trees_all_equal(optax.tree.get(beside, "mu"), _params())
    assert optax.tree.get(beside, "count") is optax.tree.get(state, "count")
    assert optax.tree.get(beside, "codebook") is optax.tree.get(state, "codebook")


def test_gefen_is_the_chain_of_its_parts(plan):
    parts = optax.chain(
        gx.scale_by_gefen(plan=plan),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(_LEARNING_RATE),
    )
    whole = gx.gefen(_LEARNING_RATE, plan=plan)
    chex.assert_trees_all_equal(
        _steps(whole, _params(), _GRADS, 2), _steps(parts, _params(), _GRADS, 2)
    )


def _assert_close_but_flips(actual, expected):
    """All within _INJECTED_RTOL, but for the few elements whose rounding it decides otherwise.

    Levels of a dual code's nu are a 32nd of it apart at least, so an error of rtol decides for
    another one in up to 32 rtol of all cases, and of mu in about half as many; an exact leaf and
    shared blocks have none of the kind. Another code is the next one: the widest gap between two
    entries is 0.27 of the largest. Where nu's other code is that of the element that decides the
    scale, as in 0.2 of 64 blocks, the block's 128 values have another scale.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        wrong = a != e if a.dtype == np.uint8 else ~np.isclose(a, e, rtol=_INJECTED_RTOL, atol=0)
        block = 0 if a.dtype == np.uint8 else 128
        assert wrong.sum() <= 48 * _INJECTED_RTOL * a.size + block
        if a.dtype != np.uint8:
            np.testing.assert_allclose(a[wrong], e[wrong], atol=0.3 * np.abs(e).max(initial=0))


def test_inject_hyperparams(factory, plan, tx):
    injected = optax.inject_hyperparams(factory.make)(**factory.number, plan=plan)
    state = jax.jit(injected.init)(_params())
    updates, state = injected.update(_GRADS, state, _params())
    expected, expected_state = tx.update(_GRADS, tx.init(_params()), _params())
    _assert_close_but_flips((updates, state.inner_state), (expected, expected_state))


def test_init_in_jit_is_init(tx):
    chex.assert_trees_all_equal(jax.jit(tx.init)(_params()), tx.init(_params()))


def test_init_by_shape_alone(tx):
    params = _params()
    expected = tx.init(params)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal(tx.init(structs), expected)
    for given in (params, structs):
        abstract = jax.eval_shape(tx.init, given)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, expected)


# Traced only, from here on, where shapes and dtypes say it all: `cond` raises while it is traced if
# structure, shape or dtype of its branches differ. The values are for test_surfaces.py.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_of_updates_is_kept(tx, dtype):
    grads = _params(dtype)
    state = tx.init(grads)
    updates, new_state = jax.eval_shape(tx.update, grads, state, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    # The state does not depend on the dtype of the parameters.
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(_GRADS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("nesterov", [False, True])
def test_scale_by_gefen_promotes_explicitly(plan, nesterov, dtype, strict_promotion):
    # Only our own part: the rest of the chain is Optax's, which raises under strict promotion.
    tx = gx.scale_by_gefen(nesterov=nesterov, plan=plan)
    jax.eval_shape(tx.update, _params(dtype), tx.init(_params(dtype)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradient_accumulation(tx, dtype):
    grads = _params(dtype)
    steps = optax.MultiSteps(tx, every_k_schedule=4)
    state = steps.init(grads)
    updates, new_state = jax.eval_shape(steps.update, grads, state, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_state_is_stable_through_cond(tx, dtype):
    def step(skip, params, state):
        updates, new_state = jax.lax.cond(
            skip,
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
            lambda: tx.update(params, state, params),
        )
        return optax.apply_updates(params, updates), new_state

    params = _params(dtype)
    state = tx.init(params)
    new_params, new_state = jax.eval_shape(step, True, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_init_and_update_agree_on_the_state(tx):
    state = tx.init(_params())
    for _ in range(2):
        before = state
        _, state = tx.update(_GRADS, state, _params())
        chex.assert_trees_all_equal_structs(state, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        assert [x.weak_type for x in jax.tree.leaves(state)] == [
            x.weak_type for x in jax.tree.leaves(before)
        ]
        assert all(x.committed == y.committed for x, y in _pairs(state, before))


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
def test_a_schedule_equals_its_constant(plan, argument):
    def run(value):
        tx = gx.gefen(**{"learning_rate": _LEARNING_RATE, argument: value}, plan=plan)
        return _steps(tx, _params(), _GRADS, 3)[0]

    constant, scheduled = run(0.05), run(optax.constant_schedule(0.05))
    chex.assert_trees_all_close(scheduled, constant, rtol=2**-22)


class Objective(NamedTuple):
    """A function with a known minimum."""

    start: Any
    minimum: Any
    value: Callable[[Any], jax.Array]
    plans: dict[str, Callable[[Any, Any], gx.Plan | None]]


def _parabola(start: Any, minimum: Any, **plans: Any) -> Objective:
    def value(params):
        squares = jax.tree.map(lambda p, m: jnp.sum(jnp.square(p - m)), params, minimum)
        return jax.tree.reduce(jnp.add, squares)

    return Objective(start, minimum, value, _SMALL | plans)


def _rosenbrock(params):
    return (1.0 - params[0]) ** 2 + 100.0 * (params[1] - params[0] ** 2) ** 2


_SMALL = {
    "no plan": PLANS["no plan"],
    "axis": PLANS["axis"],
    "reference, built-in codebook": _reference_with_builtin_codebook,
}
OBJECTIVES = {
    "parabola": _parabola(jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])),
    "rosenbrock": Objective(jnp.zeros(2), jnp.ones(2), _rosenbrock, _SMALL),
    "matrix parabola": _parabola(jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]])),
    "mixed tensors": _parabola(
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
    ),
    # Not Optax's: large enough for blocks, with rows of different size.
    "large parabola": _parabola(
        jnp.zeros((64, 128)), _GRADS["kernel"], reference=PLANS["reference"]
    ),
}
_STEPS = 2000
_TOLERANCE = 3e-2  # Optax's own


@pytest.mark.once
@pytest.mark.parametrize(
    "name, rule", [(name, rule) for name, o in OBJECTIVES.items() for rule in o.plans]
)
def test_converges(name, rule):
    objective = OBJECTIVES[name]
    plan = objective.plans[rule](objective.start, jax.grad(objective.value)(objective.start))
    tx = gx.gefen(optax.cosine_decay_schedule(0.1, _STEPS), plan=plan)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective.value)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = objective.start, tx.init(objective.start)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=_STEPS))(start)
    chex.assert_trees_all_close(params, objective.minimum, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.parametrize("make", [gx.gefen(1e-2).init, gx.scale_by_gefen().init, gx.plan_by_shape])
def test_complex_parameters_are_refused_by_name(make):
    # The complex variants of Optax's objectives do not apply: second moments are real here.
    params = {"real": jnp.zeros(3), "layer": {"phase": jnp.zeros((2, 2), jnp.complex64)}}
    with pytest.raises(TypeError, match=r"layer/phase.*complex64.*optax\.partition"):
        make(params)


def test_exact_leaves_are_adam():
    # The same equation in the same order: an ulp or two for what XLA fuses.
    params = {"a": _GRADS["bias"], "b": jnp.ones((3, 5))}
    grads = {"a": 1e-3 * _GRADS["bias"], "b": jnp.full((3, 5), -2.0)}
    ours = gx.scale_by_gefen()
    updates, state = ours.update(grads, ours.init(params))
    adam = optax.scale_by_adam()
    expected, _ = adam.update(grads, adam.init(params))
    chex.assert_trees_all_close(updates, expected, rtol=2**-22)
    np.testing.assert_array_equal(state.count, 1)
