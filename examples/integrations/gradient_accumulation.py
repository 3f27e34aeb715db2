"""Gradient accumulation: a scan over micro-batches, beside `optax.MultiSteps`.

`MultiSteps` works with gefen, but keeps a sum of the gradients in its state, 4 bytes per parameter
in float32: four times gefen's own state. A `lax.scan` over the micro-batches of one step needs
the sum only within the step, and may keep it in bfloat16: 2 bytes, and none in checkpoints.
A bfloat16 sum of n gradients is off by up to n / 2^9 of its size: for a handful that is less than
what a batch's own noise moves, for hundreds take float32.
"""

import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

MICRO_BATCHES = 4
x = jax.random.normal(jax.random.key(0), (MICRO_BATCHES, 32, 32))
y = jnp.sin(jnp.cumsum(x, axis=-1))[..., ::2]
up, down = jax.random.split(jax.random.key(1))
params = {
    "up": jax.random.normal(up, (32, 256)) / 32**0.5,
    "down": jax.random.normal(down, (256, 16)) / 16,  # small: exact moments, 8 bytes each
}


def loss_fn(params, x, y):
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


def accumulated(params, xs, ys, dtype=jnp.bfloat16):
    """Mean loss and gradient over the micro-batches, summed in `dtype`."""

    def add(total, micro_batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *micro_batch)
        return jax.tree.map(lambda s, g: s + g.astype(dtype), total, grads), loss

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
    total, losses = jax.lax.scan(add, zeros, (xs, ys))
    # float32 again before the optimizer: updates leave it in the dtype that gradients have.
    mean = jax.tree.map(lambda s: s.astype(jnp.float32) / len(losses), total)
    return jnp.mean(losses), mean


def train(tx, step):
    now, opt_state = params, tx.init(params)
    losses = []
    for _ in range(200):
        now, opt_state, loss = step(now, opt_state)
        losses.append(float(loss))
    size = sum(p.size for p in params.values())
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    return losses[0], losses[-1], nbytes / size


tx = gx.gefen(3e-3)


@jax.jit
def scanned(params, opt_state):
    loss, grads = accumulated(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


multi = optax.MultiSteps(tx, MICRO_BATCHES)


@jax.jit
def multi_steps(params, opt_state):
    def micro_step(carry, micro_batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *micro_batch)
        updates, opt_state = multi.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(micro_step, (params, opt_state), (x, y))
    return params, opt_state, jnp.mean(losses)


for name, made, step in (("scan", tx, scanned), ("MultiSteps", multi, multi_steps)):
    first, last, nbytes = train(made, step)
    print(f"{name}: loss {first:.2g} to {last:.2g}, state of {nbytes:.2f} bytes per parameter")
