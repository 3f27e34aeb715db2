"""From `optax.adamw` to `gefen` in the middle of a run, and back.

``u = 2**-24`` is the relative rounding error of float32. How far moments move is what `replan`
states and tests/test_replan.py tests of every kind; here is what holds from Adam's on:

- exact leaves keep every bit, in float32 and in bfloat16, there and back;
- shared blocks: m is off by half the codebook's largest gap times the block's largest |m|, and v is
  the block's mean, whose float32 sum of n numbers is off by less than n u;
- dual code: a pair's v is within 1/32 of its mean (4 bits of mantissa, to the nearest), or the
  lowest level, at most 2^-15 of the block's largest; m is off by half the largest gap of
  ``codebook4`` times the block's largest |m / sqrt(v)|, times sqrt(v). Quotients, roots and
  products round a handful of times: 8 u.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._builtin import builtin_codebook

pytestmark = pytest.mark.once

_U = 2.0**-24
_SHAPE = (16, 512)
_RATE = 1e-2


def _normal(seed: int, *shape: int) -> jax.Array:
    # Elements of very different size.
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape)), jnp.float32)


def _params() -> Any:
    return {"dense": {"w": _normal(0, *_SHAPE), "b": _normal(1, 512)}, "out": _normal(2, 512, 16)}


def _grads(step: int) -> Any:
    return jax.tree.map(lambda p: _normal(10 + step + p.size, *p.shape), _params())


_SEQUENCE = tuple(_grads(i) for i in range(4))
_BY_SHAPE = gx.plan_by_shape(_params())
_EXACT = _BY_SHAPE.with_kind("*", gx.Exact())
_PLANS = {
    "no plan": None,
    "exact": _EXACT,
    "wide": gx.plan_by_shape(_params(), kind="wide_dual_code"),
    "shared": gx.calibrate(_params(), _SEQUENCE[0]),
    "ragged": _BY_SHAPE.with_kind("dense/w", gx.SharedBlocks((1, 200))),
}


def _train(tx, params, state, sequence):
    for grads in sequence:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def _adam_state(mu_dtype: Any = None) -> optax.ScaleByAdamState:
    """Adam's state after three steps."""
    tx = optax.scale_by_adam(mu_dtype=mu_dtype)
    return _train(tx, _params(), tx.init(_params()), _SEQUENCE[:3])[1]


def _all_of(state: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in nodes if isinstance(x, kind)]


# Moments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_exact_moments_keep_every_bit(mu_dtype):
    adam = _adam_state(mu_dtype)
    ours = gx.from_adam(adam, _params(), _EXACT)
    chex.assert_trees_all_equal((ours.mu, ours.nu), optax.tree.cast((adam.mu, adam.nu), "float32"))
    assert int(ours.count) == 3
    back = gx.to_adam(ours, _params(), _EXACT, mu_dtype=mu_dtype)
    chex.assert_trees_all_equal(back, adam)
    chex.assert_trees_all_equal_dtypes(back, adam)


def test_moments_of_a_model_in_bfloat16():
    params = optax.tree.cast(_params(), jnp.bfloat16)
    tx = optax.scale_by_adam()
    _, adam = tx.update(params, tx.init(params))
    assert adam.nu["out"].dtype == jnp.bfloat16
    exact = gx.to_adam(gx.from_adam(adam, params, _EXACT), params, _EXACT)
    chex.assert_trees_all_equal(exact, adam)
    chex.assert_trees_all_equal_dtypes(gx.to_adam(gx.from_adam(adam, params), params), adam)


@pytest.mark.parametrize("name", ["no plan", "wide", "shared", "ragged"])
def test_the_same_as_by_way_of_exact_moments(name):
    plan, params = _PLANS[name], _params()
    ours = gx.from_adam(_adam_state(), params, plan)
    exact = gx.from_adam(_adam_state(), params, _EXACT)
    chex.assert_trees_all_equal(ours, gx.replan(exact, params, _EXACT, plan))
    # To Adam and back: exponents of a dual code may sink, the moments stay.
    adam = gx.to_adam(ours, params, plan)
    again = gx.to_adam(gx.from_adam(adam, params, plan), params, plan)
    chex.assert_trees_all_equal(again.nu, adam.nu)
    chex.assert_trees_all_close(again.mu, adam.mu, rtol=8 * _U, atol=0)


def _blocks(x: Any, block: tuple[int, int]) -> np.ndarray:
    """The blocks of a matrix, as rows; runs must divide."""
    (a, b), (p, q) = x.shape, block
    return np.asarray(x, np.float64).reshape(a // p, p, b // q, q).swapaxes(1, 2).reshape(-1, p * q)


def _moments(state, path, block):
    return (_blocks(tree["dense"][path], block) for tree in (state.mu, state.nu))


def test_bounds_of_the_dual_code():
    kind = _BY_SHAPE["dense/w"].kind
    assert kind == gx.DualCode((1, 256))
    mu, nu = _moments(_adam_state(), "w", kind.block)
    got = gx.to_adam(gx.from_adam(_adam_state(), _params()), _params())
    new_mu, new_nu = _moments(got, "w", kind.block)
    mean = np.tile((nu[:, :128] + nu[:, 128:]) / 2, 2)
    lowest = 2.0**-15 * nu.max(axis=1, keepdims=True)
    low = new_nu <= lowest
    assert np.all(np.abs(new_nu - mean)[~low] <= mean[~low] * (1 / 32 + 4 * _U))
    assert np.all(mean[low] <= np.broadcast_to(lowest, mean.shape)[low])
    root = np.sqrt(new_nu)
    gap = np.max(np.diff(np.asarray(builtin_codebook(16)))) / 2
    scale = np.max(np.abs(mu / root), axis=1, keepdims=True)
    assert np.all(np.abs(new_mu - mu) <= (gap + 8 * _U) * scale * root)


def test_bounds_of_shared_blocks():
    plan = _PLANS["shared"].with_kind("dense/w", gx.SharedBlocks((1, 256)))
    mu, nu = _moments(_adam_state(), "w", (1, 256))
    got = gx.to_adam(gx.from_adam(_adam_state(), _params(), plan), _params(), plan)
    new_mu, new_nu = _moments(got, "w", (1, 256))
    mean = np.broadcast_to(nu.mean(axis=1, keepdims=True), nu.shape)
    np.testing.assert_allclose(new_nu, mean, rtol=256 * _U)
    gap = np.max(np.diff(np.asarray(plan.codebook))) / 2
    scale = np.max(np.abs(mu), axis=1, keepdims=True)
    assert np.all(np.abs(new_mu - mu) <= (gap + 8 * _U) * scale)
    np.testing.assert_array_equal(got.nu["dense"]["b"], _adam_state().nu["dense"]["b"])


def test_before_the_first_step():
    params = _params()
    for plan in _PLANS.values():
        ours = gx.from_adam(optax.adamw(_RATE).init(params), params, plan)
        moments = gx.to_adam(ours, params, plan)[0]
        assert not any(np.any(x) for x in jax.tree.leaves(moments))


def test_leaves_that_are_no_floats():
    params = {"w": _params()["out"], "steps": jnp.zeros(3, jnp.int32), "nothing": None}
    adam, tx = optax.scale_by_adam(), gx.scale_by_gefen()
    state = gx.from_adam(adam.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    for mu_dtype in (None, jnp.bfloat16):
        expected = optax.scale_by_adam(mu_dtype=mu_dtype).init(params)
        back = gx.to_adam(state, params, mu_dtype=mu_dtype)
        chex.assert_trees_all_equal(back, expected)
        chex.assert_trees_all_equal_dtypes(back, expected)


# Wherever AdamW is ------------------------------------------------------------------------------

_SCHEDULE = optax.linear_schedule(_RATE, _RATE / 10, 10)
_MASK = {"dense": {"w": True, "b": False}, "out": True}
_MASKED_OUT = {"dense": True, "out": False}
_LABELS = {"dense": "x", "out": "y"}

# Given `optax.adamw` or `gx.gefen`, with the same arguments.
_SURFACES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "constant": lambda make: make(_RATE),
    "schedule": lambda make: make(_SCHEDULE),
    "numbers": lambda make: make(_RATE, 0.8, 0.99, 1e-6, 1e-12, weight_decay=0.1, nesterov=True),
    "mask": lambda make: make(_RATE, weight_decay=0.1, mask=_MASK),
    "mask, a function": lambda make: make(_RATE, mask=lambda p: jax.tree.map(jnp.ndim, p)),
    "schedule of weight decay": lambda make: make(_RATE, weight_decay=_SCHEDULE),
    "clip": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(_SCHEDULE)),
    "named chain": lambda make: optax.named_chain(("clip", optax.clip(1.0)), ("x", make(_RATE))),
    "inject": lambda make: optax.inject_hyperparams(make)(_RATE),
    "inject a schedule": lambda make: optax.inject_hyperparams(make)(_SCHEDULE, b1=0.8),
    "masked": lambda make: optax.masked(make(_RATE), _MASKED_OUT),
    "partition": lambda make: optax.partition({"x": make(_RATE), "y": optax.sgd(0.1)}, _LABELS),
    "two of a partition": lambda make: optax.partition(
        {"x": make(_RATE), "y": make(_SCHEDULE)}, _LABELS
    ),
    "MultiSteps": lambda make: optax.MultiSteps(make(_RATE), 2).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(_RATE), 3),
    "flatten": lambda make: optax.flatten(make(_RATE)),
    "nested": lambda make: optax.MultiSteps(
        optax.chain(optax.clip(1.0), optax.masked(make(_SCHEDULE), _MASKED_OUT)), 2
    ).gradient_transformation(),
}


def _others(state: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in nodes if not isinstance(x, kind)]


@pytest.mark.parametrize("name", _SURFACES)
def test_surfaces(name):
    params = _params()
    adamw, gefen = _SURFACES[name](optax.adamw), _SURFACES[name](gx.gefen)
    trained, state = _train(adamw, params, adamw.init(params), _SEQUENCE[:1])
    ours = gx.from_adam(state, params)
    # The structure, shapes and dtypes of a fresh state, so its own update takes it.
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, jax.eval_shape(gefen.init, params))
    updates, after = jax.eval_shape(gefen.update, _SEQUENCE[1], ours, trained)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, ours))
    # Each Adam state as on its own, and all else as it was.
    theirs = _all_of(state, optax.ScaleByAdamState)
    converted = _all_of(ours, gx.ScaleByGefenState)
    assert len(theirs) == len(converted) == (2 if name.startswith("two") else 1)
    before, now = _others(state, optax.ScaleByAdamState), _others(ours, gx.ScaleByGefenState)
    assert all(x is y for x, y in zip(before, now, strict=True))
    back = gx.to_adam(ours, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    for adam, gefen_state, adam_again in zip(
        theirs, converted, _all_of(back, optax.ScaleByAdamState), strict=True
    ):
        assert gefen_state.count == adam.count == adam_again.count
    if name != "flatten":  # its plan would be another
        exact = gx.from_adam(state, params, _EXACT)
        chex.assert_trees_all_equal(gx.to_adam(exact, params, _EXACT), state)


def test_dtypes_that_have_nothing_in_common():
    params = {"w": jnp.ones((64, 128), jnp.float8_e4m3fn), "v": jnp.ones((64, 128))}
    back = gx.to_adam(gx.gefen(_RATE).init(params), params)
    chex.assert_trees_all_equal(back, optax.adamw(_RATE).init(params))


def test_a_changed_rate_stays():
    params, tx = _params(), optax.inject_hyperparams(optax.adamw)(_RATE)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.5)
    ours = gx.from_adam(state, params)
    assert float(ours.hyperparams["learning_rate"]) == 0.5
    ours = optax.inject_hyperparams(gx.gefen)(_RATE).update(_SEQUENCE[0], ours, params)[1]
    assert float(gx.to_adam(ours, params).hyperparams["learning_rate"]) == 0.5


def test_nnx_optimizer():
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    grads = nnx.state(model, nnx.Param)
    adamw = nnx.Optimizer(model, optax.adamw(_RATE), wrt=nnx.Param)
    gefen = nnx.Optimizer(model, gx.gefen(_RATE), wrt=nnx.Param)
    structure = jax.tree.structure(nnx.state(gefen))
    adamw.update(model, grads)
    params, state = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(adamw.opt_state)
    ours = gx.from_adam(state, params)
    nnx.update(gefen.opt_state, nnx.state(ours))
    assert jax.tree.structure(nnx.state(gefen)) == structure
    chex.assert_trees_all_equal(nnx.as_pure(gefen.opt_state), ours)
    expected = gx.gefen(_RATE).update(nnx.as_pure(grads), ours, params)[1]
    gefen.update(model, grads)
    chex.assert_trees_all_equal(nnx.as_pure(gefen.opt_state), expected)


# How it is called -------------------------------------------------------------------------------


def test_jit_structs_and_numpy():
    params = _params()
    structs = jax.eval_shape(lambda: params)
    for plan in _PLANS.values():
        ours = gx.from_adam(_adam_state(), params, plan)
        jitted = jax.jit(gx.from_adam, static_argnums=2)(_adam_state(), params, plan)
        chex.assert_trees_all_equal(jitted, ours)
        on_host = jax.tree.map(np.asarray, _adam_state())
        chex.assert_trees_all_equal(gx.from_adam(on_host, structs, plan), ours)
        back = gx.to_adam(ours, params, plan)
        chex.assert_trees_all_equal(jax.jit(gx.to_adam, static_argnums=2)(ours, params, plan), back)
        on_host = jax.tree.map(np.asarray, ours)
        chex.assert_trees_all_equal(gx.to_adam(on_host, structs, plan), back)


def test_strict_promotion(strict_promotion):
    params = jax.eval_shape(lambda: optax.tree.cast(_params(), jnp.bfloat16))
    state = jax.eval_shape(optax.scale_by_adam().init, params)
    for plan in _PLANS.values():
        ours = jax.eval_shape(lambda s, plan=plan: gx.from_adam(s, params, plan), state)
        jax.eval_shape(lambda s, plan=plan: gx.to_adam(s, params, plan), ours)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_on_a_mesh(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P("x", "y") if x.ndim == 2 else P()))

    spread = gx.from_adam(jax.tree.map(place, _adam_state()), _params())
    assert spread.mu["dense"]["w"].sharding.spec == P("x", "y")
    chex.assert_trees_all_equal(
        jax.device_get(spread), jax.device_get(gx.from_adam(_adam_state(), _params()))
    )
    back = gx.to_adam(spread, _params())
    for tree in (back.mu, back.nu):
        assert tree["dense"]["w"].sharding.spec == P("x", "y")


def test_the_converted_state_can_be_donated():
    params = _params()
    tx = gx.gefen(_RATE)
    adamw = optax.adamw(_RATE)
    _, state = _train(adamw, params, adamw.init(params), _SEQUENCE[:1])
    step = jax.jit(tx.update, donate_argnums=1)
    _, after = step(_SEQUENCE[1], gx.from_adam(state, params), params)
    assert int(after[0].count) == 2


# Training goes on -------------------------------------------------------------------------------

_SWITCH, _AFTER = 20, 60
_INPUTS = np.asarray(np.random.default_rng(1).standard_normal((256, 16)), np.float32)
_TARGETS = np.tanh(_INPUTS @ np.random.default_rng(2).standard_normal((16, 4)) / 4)
_MODEL = {
    "w": np.float32(np.random.default_rng(4).standard_normal((16, 512)) / 4),
    "out": np.float32(np.random.default_rng(5).standard_normal((512, 16)) / 32),
}


def _loss(params):
    hidden = jnp.tanh(_INPUTS @ params["w"])
    return jnp.mean(jnp.square((hidden @ params["out"])[:, :4] - _TARGETS))


def _run(tx, params, state, steps):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(_loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), losses = scan((params, state))
    return params, state, np.asarray(losses)


@functools.cache
def _adamw_run():
    tx, model = optax.adamw(3e-3), jax.tree.map(jnp.asarray, _MODEL)
    params, state, before = _run(tx, model, tx.init(model), _SWITCH)
    *_, after = _run(tx, params, state, _AFTER)
    return params, state, before, after


@pytest.mark.parametrize("name", ["dual", "shared", "exact"])
def test_a_run_switches_and_switches_back(name):
    """The loss after the switch stays nearer to AdamW's than a run of that kind from its start.

    So what is off is the kind of state's doing, not the switch's; with exact moments nothing is,
    but for a few roundings of float32, which 60 steps magnify.
    """
    params, state, before, expected = _adamw_run()
    plan = gx.plan_by_shape(params)
    if name == "exact":
        plan = plan.with_kind("*", gx.Exact())
    if name == "shared":
        plan = gx.calibrate(params, jax.grad(_loss)(params))
    tx, model = gx.gefen(3e-3, plan=plan), jax.tree.map(jnp.asarray, _MODEL)
    switched, ours, losses = _run(tx, params, gx.from_adam(state, params, plan), _AFTER)
    *_, from_the_start = _run(tx, model, tx.init(model), _SWITCH + _AFTER)
    *_, restarted = _run(tx, params, tx.init(params), _AFTER)

    def away(losses):
        return np.max(np.abs(np.log(losses[-_AFTER:] / expected)))

    assert expected[-1] < before[-1] / 2 < before[0] / 4
    assert away(losses) <= max(away(from_the_start), 1e-3)
    assert away(losses) < away(restarted) / 2
    # And back: AdamW goes on from where ours is, without a step up.
    adamw = optax.adamw(3e-3)
    *_, back = _run(adamw, switched, gx.to_adam(ours, params, plan), _SWITCH)
    assert np.max(back) < losses[-1]


# Refusals ---------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """What is wrong with the arguments, and what the message says."""

    match: str
    state: Callable[[], Any] = _adam_state
    params: Callable[[], Any] = _params
    plan: gx.Plan | None = None


def _changed(**changes):
    return lambda: {**_params(), **changes}


def _with(slot: str, value: Any):
    def make():
        adam = _adam_state()
        return adam._replace(**{slot: {**getattr(adam, slot), "out": value}})

    return make


_WIDE = jnp.zeros((512, 32))
_WIDER = gx.plan_by_shape(_changed(out=_WIDE)())
_RENAMED = gx.plan_by_shape({"dense": _params()["dense"], "outs": _WIDE})
_NO_NU = {"dense": _params()["dense"]}

_REFUSED = {
    "no Adam's": Refusal(
        "`opt_state` holds no ScaleByAdamState", lambda: optax.sgd(1.0, 0.9).init(_params())
    ),
    "ours already": Refusal(
        "`opt_state` holds no ScaleByAdamState", lambda: gx.gefen(1.0).init(_params())
    ),
    "a dict": Refusal("NamedTuples again, not dicts", lambda: _adam_state()._asdict()),
    "another shape": Refusal(
        r"`out`, of shape \(512, 16\), and `params` is \(512, 32\)", params=_changed(out=_WIDE)
    ),
    "another name": Refusal(
        "`params` has `outs`, of which `opt_state` has no moments",
        params=lambda: {"dense": _params()["dense"], "outs": _WIDE},
    ),
    "one more": Refusal("`params` has `more/w`, of wh", params=_changed(more={"w": jnp.zeros(3)})),
    "one less": Refusal(
        "moments of `out`.*`params` has none", params=lambda: {"dense": _params()["dense"]}
    ),
    "none": Refusal("moments of `dense/b`.*`params` has none", params=dict),
    "mu unlike nu": Refusal(r"mu of `out` of shape \(512, 32\) and a nu", _with("mu", _WIDE)),
    "integers": Refusal("`out` of dtypes int32", _with("mu", jnp.zeros((512, 16), jnp.int32))),
    "no nu": Refusal(
        "a mu of `out` and no nu", lambda: _adam_state()._replace(nu={"dense": _params()["dense"]})
    ),
    "no mu": Refusal(
        "`params` has `out`, of wh",
        lambda: _adam_state()._replace(mu={"dense": _params()["dense"]}),
    ),
    "plan, another shape": Refusal("expects `out` of shape", plan=_WIDER),
    "plan, another name": Refusal("no leaf `out`; the nearest", plan=_RENAMED),
    "plan without moments": Refusal(
        "`out` has moments, and none under `plan`", plan=_EXACT.with_kind("out", gx.Untrained())
    ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refused_by_name(case):
    refusal = _REFUSED[case]
    state, params = refusal.state(), refusal.params()
    with pytest.raises(ValueError, match=refusal.match):
        gx.from_adam((state, {"other": 1.0}), params, refusal.plan)


_GEFEN = gx.scale_by_gefen()
_REFUSED_BACK = {
    "no state of ours": Refusal("`opt_state` holds no ScaleByGefenState", _adam_state),
    "another plan": Refusal("state of `dense/w` does not fit its plan", plan=_EXACT),
    "another shape": Refusal(
        r"`out`, of shape \(512, 16\), and `params` is \(512, 32\)", params=_changed(out=_WIDE)
    ),
    "one more": Refusal("`params` has `more`, of which", params=_changed(more=jnp.zeros(3))),
    "one less": Refusal(
        "moments of `out`.*`params` has none", params=lambda: {"dense": _params()["dense"]}
    ),
    "plan, another shape": Refusal("expects `out` of shape", plan=_WIDER),
    "no moments": Refusal(
        "`out` has moments, and none under `plan`",
        lambda: gx.scale_by_gefen(plan=_BY_SHAPE.with_kind("out", gx.Untrained())).init(_params()),
        plan=_BY_SHAPE.with_kind("out", gx.Untrained()),
    ),
}


@pytest.mark.parametrize("case", _REFUSED_BACK)
def test_back_refused_by_name(case):
    refusal = _REFUSED_BACK[case]
    made = refusal.state is not Refusal._field_defaults["state"] or case == "no state of ours"
    state = refusal.state() if made else _GEFEN.init(_params())
    with pytest.raises(ValueError, match=refusal.match):
        gx.to_adam((state, {"other": 1.0}), refusal.params(), refusal.plan)


def test_a_path_is_no_plan():
    for convert, state in ((gx.from_adam, _adam_state()), (gx.to_adam, _GEFEN.init(_params()))):
        # The tests' type checker may be the one that says so.
        with pytest.raises(TypeError, match="plan"):
            convert(state, _params(), "plan.json")  # pyright: ignore
