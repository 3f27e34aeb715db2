"""Under jax_enable_x64 state and updates are what they are without it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx

_KERNEL = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
_PARAMS = {"kernel": _KERNEL, "bias": _KERNEL[0, :5]}
_RATE = 1e-3

# By the type of their numbers: np.float64 is what a sweep or a file gives.
OPTIMIZERS = {
    "gefen": lambda f: gx.gefen(_RATE, f(0.9), f(0.99), f(1e-8), nesterov=True),
    "gefen_muon": lambda f: gx.gefen_muon(_RATE, beta=f(0.95)),
    "gefen_muon, 4 bits": lambda f: gx.gefen_muon(_RATE, beta=f(0.95), bits=4),
    "flash_adamw": lambda f: gx.flash_adamw(_RATE, f(0.9), f(0.99), f(1e-8)),
    "microadam": lambda f: gx.microadam(_RATE, f(0.9), f(0.99), f(1e-8)),
    "microadam, split": lambda f: gx.with_split_weights(gx.microadam(_RATE, f(0.9))),
}


def _one_step(tx):
    params = jax.tree.map(jnp.asarray, _PARAMS)
    state = tx.init(params)
    if isinstance(state, gx.SplitWeightsState):
        params = gx.split_weights(params)[0]
    updates, new = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    return updates, new


@pytest.mark.parametrize("number", [float, np.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step(name, number):
    expected = _one_step(OPTIMIZERS[name](float))
    with jax.enable_x64(True):
        found = _one_step(OPTIMIZERS[name](number))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # A handful of roundings; a moment that is coded in another way is off by far more.
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-5)


def test_microadam_promotes_explicitly(strict_promotion):
    with jax.enable_x64(True):
        _one_step(gx.scale_by_microadam())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_is_unfused(dtype):
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(_KERNEL, dtype)}
        tx, fused = gx.gefen(_RATE), gx.fused_gefen(_RATE)
        updates, state = tx.update(params, tx.init(params), params)
        new, fused_state = fused.step(params, fused.init(params), params)
        chex.assert_trees_all_equal(fused_state, state)
        expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    chex.assert_trees_all_close(new, expected, rtol=1e-6)


def test_conversions_keep_float32():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, _PARAMS)
        state = gx.gefen(_RATE).init(params)
        for other in (
            gx.from_adam(optax.adamw(_RATE).init(params), params),
            gx.replan(state, params, None, None),
        ):
            chex.assert_trees_all_equal_shapes_and_dtypes(other, state)
