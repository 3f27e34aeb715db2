"""Mixed precision: compute in bfloat16, and two ways to keep the weights.

Float32 weights, cast within the loss: gradients and updates are float32, 4 bytes per weight. Or
split weights: the model holds bfloat16, the optimizer's state one byte more of each (24 bits), or
two (32 bits, as exact as float32); gradients are bfloat16.
"""

import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

x = jax.random.normal(jax.random.key(0), (128, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]
up, down = jax.random.split(jax.random.key(1))
params = {
    "up": jax.random.normal(up, (32, 256)) / 32**0.5,
    "down": jax.random.normal(down, (256, 16)) / 16,  # small: exact moments, 8 bytes each
}


def loss_fn(params):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    output = jax.nn.gelu(x.astype(jnp.bfloat16) @ narrow["up"]) @ narrow["down"]
    return jnp.mean((output.astype(jnp.float32) - y) ** 2)  # float32 where sums are long


def train(name, tx, params, opt_state):
    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(200):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    size = sum(p.size for p in params.values())
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state))) / size
    print(f"{name}: loss {losses[0]:.2g} to {losses[-1]:.2g}, {nbytes:.2f} bytes per parameter")


tx = gx.gefen(3e-3)
train("float32 weights", tx, params, tx.init(params))

tx = gx.with_split_weights(gx.gefen(3e-3))  # outermost, last in the chain
opt_state = tx.init(params)  # from float32: their low bits are kept
weights, _ = gx.split_weights(params)
train("split weights", tx, weights, opt_state)
