"""An axis that a mesh does not divide: what JAX makes of it, beside `optax.adamw`.

No array outside of `jit` can be cut like that. Inside, on Auto axes, a constraint can ask for it;
the compiler pads the last shards.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from simulate_mesh import collectives

import gefen_jax as gx

_SHAPE, _STEPS, _RATE = (60, 512), 20, 1e-2
_MAKE = {"adamw": optax.adamw, "gefen": gx.gefen, "fused": gx.fused_gefen}


@pytest.fixture
def at() -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), P("x"))


def _struct() -> Any:
    return {"w": jax.ShapeDtypeStruct(_SHAPE, jnp.float32)}


def test_such_arrays_are_refused(at):
    with pytest.raises(ValueError, match="60"):
        jax.device_put(np.zeros(_SHAPE), at)
    expected = r"`params\[w\]` of shape \(60, 512\) cannot be cut"
    for make in (optax.adamw, gx.gefen):
        with pytest.raises(ValueError, match=expected):
            gx.state_sharding(make(_RATE), _struct(), at)
    with pytest.raises(ValueError, match=expected):
        gx.plan_by_shape(_struct(), specs=at)


def _train(tx: Any, at: NamedSharding | None) -> Any:
    """All steps; parameters are cut in each if ``at`` says how."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        if at is not None:
            params = jax.lax.with_sharding_constraint(params, at)
        if isinstance(tx, gx.FusedGefen):
            return tx.step(grads, state, params), None
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


@pytest.mark.parametrize("name", _MAKE)
def test_uneven_inside_jit(at, name):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal(_SHAPE).astype(np.float32)}
    grads = {"w": rng.standard_normal((_STEPS, *_SHAPE)).astype(np.float32)}
    tx = _MAKE[name](_RATE)
    everywhere = NamedSharding(at.mesh, P())
    args = jax.device_put((params, grads), everywhere)
    train = jax.jit(_train(tx, at), out_shardings=everywhere).lower(*args).compile()
    # Rows of 256 cross no shards. What travels is the result, as it is asked for on all devices:
    # eight shards of eight rows, of which the last four are padding.
    assert sum(c.nbytes for c in collectives(train.as_text())) <= 64 * 512 * 4
    found, expected = train(*args)["w"], jax.jit(_train(tx, None))(params, grads)["w"]
    # An update may be fused with the addition in one program and not in the other: an ulp per step
    # of a parameter that was at most _STEPS * _RATE larger, for a decay and a sum that round.
    bound = 2 * _STEPS * 2.0**-23 * (np.abs(expected) + 2 * _STEPS * _RATE)
    assert np.all(np.abs(found - expected) <= bound)
