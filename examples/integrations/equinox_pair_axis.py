"""Equinox: `eqx.nn.Linear` keeps its weights as (out, in), and a plan has to be told.

The dual code lets two elements share a second moment. They should be two outputs of a layer, which
lie along the last axis in Flax and along the first in Equinox: `pair_axis` says so by path.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

x = jax.random.normal(jax.random.key(0), (128, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]

model = eqx.nn.MLP(32, 16, 256, depth=1, activation=jax.nn.gelu, key=jax.random.key(1))
params = eqx.filter(model, eqx.is_inexact_array)  # the activation is None here: no state
plan = gx.plan_by_shape(params, pair_axis={"*weight": 0})
tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(3e-3, plan=plan))
opt_state = tx.init(params)


@eqx.filter_value_and_grad
def loss_fn(model):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit(donate="all")
def step(model, opt_state):
    loss, grads = loss_fn(model)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, loss


losses = []
for _ in range(200):
    model, opt_state, loss = step(model, opt_state)
    losses.append(loss)
for row in plan.table():
    print(row.path, row.shape, row.kind, row.reason)
print(f"equinox: loss {losses[0]:.2g} to {losses[-1]:.2g}")
