"""An ensemble: one `vmap` over `init` and `update` trains several models at once.

All members have the same plan, so one made from one member's shapes serves all. The dual code's
rounding goes by leaf, position and step: members round alike, which does them no harm.
"""

import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

MEMBERS = 3
x = jax.random.normal(jax.random.key(0), (128, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]
tx = gx.gefen(3e-3)


def new(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (32, 256)) / 32**0.5,
        "down": jax.random.normal(down, (256, 16)) / 16,
    }


def loss_fn(params):
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


params = jax.vmap(new)(jax.random.split(jax.random.key(1), MEMBERS))
opt_state = jax.vmap(tx.init)(params)
step = jax.jit(jax.vmap(step))
losses = []
for _ in range(200):
    params, opt_state, loss = step(params, opt_state)
    losses.append(loss)
for i in range(MEMBERS):
    print(f"member {i}: loss {losses[0][i]:.2g} to {losses[-1][i]:.2g}")
