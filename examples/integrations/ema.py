"""A moving average of the parameters, for evaluation: beside the optimizer, not within it.

It costs 4 bytes per parameter, more than gefen's state. Keep it in float32: with a decay of 0.999
a bfloat16 average would never move, because a thousandth of a change is less than it can hold.
"""

import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

DECAY = 0.98
up, down = jax.random.split(jax.random.key(1))
params = {
    "up": jax.random.normal(up, (32, 256)) / 32**0.5,
    "down": jax.random.normal(down, (256, 16)) / 16,
}
tx = gx.gefen(3e-3)


def loss_fn(params, x):
    y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


@jax.jit
def step(params, average, opt_state, key):
    x = jax.random.normal(key, (64, 32))
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, step_size=1 - DECAY)
    return params, average, opt_state, loss


held_out = jax.random.normal(jax.random.key(2), (512, 32))
first = loss_fn(params, held_out)
average, opt_state = params, tx.init(params)
for key in jax.random.split(jax.random.key(3), 400):
    params, average, opt_state, _ = step(params, average, opt_state, key)
print(f"parameters: loss {first:.4f} to {loss_fn(params, held_out):.4f}")
print(f"average: loss {first:.4f} to {loss_fn(average, held_out):.4f}")
