"""With exact moments on every leaf, gefen is AdamW.

Tolerance. Both sides do the same float32 operations in the same order, and on most machines the
results are equal to the bit. But they are two programs, and XLA may contract a product and a sum
into one rounding in either: for each of the four sums of an update (mu, nu, the root's, the weight
decay's) one ulp of the leaf's largest update. Parameters sum up T updates, and round once per step
themselves: ``T (4 s + 1)`` ulp of the leaf's largest parameter, where s is the largest update in
terms of it.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx

_T = 100
_ULP = 2.0**-23
_ULPS = 4
_LARGEST_COUNT = 2**31 - 1


def _params() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "dense": {"w": jax.random.normal(keys[0], (5, 7)), "b": jax.random.normal(keys[1], (7,))},
        "scalar": jnp.float32(0.5),
        "one": jax.random.normal(keys[2], (1,)),
    }


def _grads(scale: float) -> dict[str, Any]:
    """T gradients of every leaf, with some steps of zeros and sizes that vary by leaf and step."""
    leaves, treedef = jax.tree.flatten(_params())
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(0, 1, _T)) * (rng.random(_T) > 0.05) * scale
    return treedef.unflatten(
        [
            (
                rng.normal(0.3, 1, (_T, *p.shape)) * sizes.reshape(-1, *[1] * p.ndim) * 10.0**i
            ).astype(np.float32)
            for i, p in enumerate(leaves)
        ]
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments for both optimizers, and the size of the gradients."""

    kwargs: dict[str, Any]
    learning_rate: Any = 1e-2
    grad_scale: float = 1e-2


_MASK = {"dense": {"w": True, "b": False}, "scalar": False, "one": True}
_CASES = {
    "defaults": Case({}),
    "mask, b1 = 0": Case({"weight_decay": 0.1, "mask": _MASK, "b1": 0.0}),
    "mask function, b2 = 0": Case(
        {
            "weight_decay": 0.1,
            "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            "b2": 0.0,
            "eps": 1e-4,
        }
    ),
    "large eps": Case({"eps": 1e-2, "b1": 0.5, "b2": 0.9}, grad_scale=1e-3),
    "slow, tiny gradients": Case({"b1": 0.99, "b2": 0.9999, "eps": 1e-15}, grad_scale=1e-12),
    "nesterov": Case({"nesterov": True}),
    "nesterov with eps_root": Case({"nesterov": True, "eps_root": 1e-6, "b1": 0.8, "b2": 0.95}),
    "schedules": Case(
        {"weight_decay": optax.linear_schedule(0.2, 0.0, 50)},
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, _T),
    ),
}


def _exact_plan() -> gx.Plan:
    return gx.plan_by_shape(_params()).with_kind("*", gx.Exact())


def _train(optimizer: optax.GradientTransformation, grads: Any) -> tuple[Any, Any]:
    """Parameters after every step, and every step's updates."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    params = _params()
    carry = params, optimizer.init(params)
    return jax.jit(lambda c, g: jax.lax.scan(step, c, g)[1])(carry, grads)


def _largest(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.abs(x).max(), tree)


@pytest.mark.once
@pytest.mark.parametrize("name", _CASES)
def test_trajectory_is_that_of_adamw(name):
    case = _CASES[name]
    grads = _grads(case.grad_scale)
    optimizer = gx.gefen(case.learning_rate, plan=_exact_plan(), **case.kwargs)
    our_params, our_updates = _train(optimizer, grads)
    params, updates = _train(optax.adamw(case.learning_rate, **case.kwargs), grads)
    # In units of the leaf's largest number: then one tolerance is right for all leaves.
    unit, largest = _largest(updates), _largest(params)
    chex.assert_trees_all_close(
        jax.tree.map(jnp.divide, our_updates, unit),
        jax.tree.map(jnp.divide, updates, unit),
        rtol=0,
        atol=_ULPS * _ULP,
    )
    share = max(jax.tree.leaves(jax.tree.map(jnp.divide, unit, largest)))
    chex.assert_trees_all_close(
        jax.tree.map(jnp.divide, our_params, largest),
        jax.tree.map(jnp.divide, params, largest),
        rtol=0,
        atol=_T * (_ULPS * float(share) + 1) * _ULP,
    )


_RESCALED = {
    "defaults": {},
    "nesterov": {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "eps_root": 1e-8, "nesterov": True},
}


@pytest.mark.parametrize("name", _RESCALED)
def test_rescaling_is_that_of_scale_by_adam(name):
    """Moments and count too, in the state's own places."""
    grads = _grads(1e-2)
    ours = gx.scale_by_gefen(plan=_exact_plan(), **_RESCALED[name])
    theirs = optax.scale_by_adam(**_RESCALED[name])
    our_state, state = ours.init(_params()), theirs.init(_params())
    our_update, update = jax.jit(ours.update), jax.jit(theirs.update)
    for t in range(5):
        g = jax.tree.map(lambda x, t=t: x[t], grads)
        our_u, our_state = our_update(g, our_state)
        u, state = update(g, state)
        both = (our_u, our_state.mu, our_state.nu), (u, state.mu, state.nu)
        units = _largest(both[1])
        relative = (jax.tree.map(jnp.divide, side, units) for side in both)
        chex.assert_trees_all_close(*relative, rtol=0, atol=2 * _ULP)
        assert our_state.count == state.count
    assert our_state.scale == jax.tree.map(lambda p: None, _params())


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_largest_count(nesterov):
    """The count stops at 2**31 - 1; corrections are 1 there, and nothing wraps around."""
    params = {"exact": jnp.ones((3, 4)), "blocks": jnp.ones((16, 32))}
    plan = gx.plan_by_shape(params).with_kind("blocks", gx.SharedBlocks((1, 32)))
    ours = gx.scale_by_gefen(plan=plan, nesterov=nesterov)
    theirs = optax.scale_by_adam(nesterov=nesterov)
    g = jax.tree.map(lambda p: 0.1 * p, params)
    our_state, state = ours.init(params), theirs.init(params)
    largest = jnp.asarray(_LARGEST_COUNT, jnp.int32)
    our_state, state = our_state._replace(count=largest), state._replace(count=largest)
    our_update, update = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(2):
        our_u, our_state = our_update(g, our_state)
        u, state = update(g, state)
        assert our_state.count == _LARGEST_COUNT
        chex.assert_tree_all_finite(our_u)
        # Constant gradients: all codes are 1, and blocks are Adam as well.
        chex.assert_trees_all_close(our_u, u, rtol=_ULPS * _ULP)
