"""States that do not fit: the error names what was found, and what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gefen_jax as gx

_RATE = 1e-3
_PARAMS = {"b": jnp.ones(3), "w": jnp.ones((16, 32))}
_PART = {"w": _PARAMS["w"]}
_SCHEDULE = optax.constant_schedule(_RATE)

_RESTORE = r"restored as dicts.*jax\.eval_shape\(tx\.init, params\)"
_FROM_ADAM = r"gefen_jax\.from_adam\(opt_state, params\)"


def _decay_all(params):
    return jax.tree.map(lambda _: True, params)


def _without_tuples():
    """What a library restores that is told of no structure."""
    return (gx.gefen(_RATE).init(_PARAMS)[0]._asdict(), {}, {})


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda s: gx.gefen(_RATE).update(_PARAMS, s, _PARAMS), _RESTORE),
        (lambda s: gx.fused_gefen(_RATE).step(_PARAMS, s, _PARAMS), _RESTORE),
        (lambda s: gx.fused_gefen(_RATE).step(_PARAMS, list(s), _PARAMS), _RESTORE),
        (lambda s: gx.replan(s, _PARAMS, None, None), _RESTORE),
        (lambda s: gx.to_adam(s, _PARAMS), r"NamedTuples again.*jax\.eval_shape"),
        (lambda s: gx.scale_by_gefen_muon().update(_PART, s[0]), _RESTORE),
        (lambda s: gx.scale_by_flash_adam().update(_PART, s[0]), _RESTORE),
        (lambda s: gx.scale_by_microadam().update(_PART, s[0]), _RESTORE),
    ],
)
def test_restored_without_named_tuples(call, advice):
    with pytest.raises(ValueError, match=advice):
        call(_without_tuples())


@pytest.mark.parametrize(
    "call",
    [
        lambda s: gx.gefen(_RATE).update(_PARAMS, s, _PARAMS),
        lambda s: gx.fused_gefen(_RATE).step(_PARAMS, s, _PARAMS),
        lambda s: gx.replan(s, _PARAMS, None, None),
    ],
)
def test_a_state_of_adamw(call):
    with pytest.raises(ValueError, match=_FROM_ADAM):
        call(optax.adamw(_RATE).init(_PARAMS))


def test_parameters_in_the_states_place():
    """They are dicts, but nothing that was restored."""
    optimizer = gx.fused_gefen(_RATE)
    with pytest.raises(ValueError, match="found dict.*come from `init`") as error:
        optimizer.step(_PARAMS, _PARAMS, optimizer.init(_PARAMS))
    assert "restored" not in str(error.value)


def test_others_do_not_advise_from_adam():
    """It makes the state of gefen only."""
    state = optax.scale_by_adam().init(_PART)
    with pytest.raises(ValueError, match="ScaleByFlashAdamState.*found ScaleByAdamState") as error:
        gx.scale_by_flash_adam().update(_PART, state)
    assert "from_adam" not in str(error.value)


@pytest.mark.parametrize(
    "tx",
    [
        gx.scale_by_gefen(),
        gx.scale_by_flash_adam(),
        gx.scale_by_flash_momentum(0.9),
        gx.scale_by_microadam(),
    ],
)
def test_of_other_parameters(tx):
    with pytest.raises(ValueError, match=r"`state\.\w+` has `b`, which the gradients have not"):
        tx.update(_PART, tx.init(_PARAMS))
    with pytest.raises(ValueError, match=r"`state\.\w+` has no `b`, which the gradients have"):
        tx.update(_PARAMS, tx.init(_PART))


def test_of_other_matrices():
    tx, more = gx.scale_by_gefen_muon(), {**_PART, "v": _PARAMS["w"]}
    with pytest.raises(ValueError, match=r"`state\.\w+` has `v`, which the gradients have not"):
        tx.update(_PART, tx.init(more))


def test_of_other_containers():
    tx = gx.scale_by_gefen()
    with pytest.raises(ValueError, match=r"`state\.mu` has other containers than the gradients"):
        tx.update([_PARAMS["w"]], tx.init((_PARAMS["w"],)))


@pytest.mark.parametrize(
    ("params", "what"),
    [(None, "is None"), (_PART, "has no `b`"), (_PARAMS | {"c": 1.0}, "has `c`")],
)
def test_fused_with_other_parameters(params, what):
    optimizer = gx.fused_gefen(_RATE)
    with pytest.raises(ValueError, match=f"`params` {what}.*Give the parameters"):
        optimizer.step(_PARAMS, optimizer.init(_PARAMS), params)


@pytest.mark.parametrize(
    ("now", "before", "what"),
    [
        (gx.fused_gefen(_SCHEDULE), gx.fused_gefen(_RATE), "`learning_rate` was a number"),
        (gx.fused_gefen(_RATE), gx.fused_gefen(_SCHEDULE), "`learning_rate` was a schedule"),
        (
            gx.fused_gefen(_RATE, weight_decay=_SCHEDULE),
            gx.fused_gefen(_RATE),
            "`weight_decay` was a number",
        ),
        (gx.fused_gefen(_RATE, mask=_decay_all), gx.fused_gefen(_RATE), "without a `mask`"),
        (gx.fused_gefen(_RATE), gx.fused_gefen(_RATE, mask=_decay_all), "with a `mask`"),
        (gx.fused_gefen(_RATE, max_norm=1.0), gx.fused_gefen(_RATE), "of 2 links"),
        (gx.fused_gefen(_RATE), gx.fused_gefen(_RATE, max_norm=1.0), "of 3 links"),
    ],
)
def test_fused_with_a_state_of_other_arguments(now, before, what):
    with pytest.raises(ValueError, match=f"`opt_state` must be what `init` returns.*{what}"):
        now.step(_PARAMS, before.init(_PARAMS), _PARAMS)
    now.step(_PARAMS, now.init(_PARAMS), _PARAMS)
