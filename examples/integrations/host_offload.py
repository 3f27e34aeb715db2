"""The optimizer's state in the host's memory, brought to the device for the update alone.

Whole trees go back and forth within the jitted step; XLA may overlap that with the backward pass.
With gefen one byte per parameter crosses each way, with AdamW eight. The CPU backend has the memory
kind `pinned_host`, too, so that this runs anywhere; it was not timed on an accelerator.

`out_shardings` alone do not suffice: the arithmetic needs operands in one memory, so `device_put`
says where the state is to be.
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
    "down": jax.random.normal(down, (256, 16)) / 16,
}
tx = gx.gefen(3e-3)

# On a mesh: `gx.state_sharding(tx, params)` and `.with_memory_kind(...)` of each of its leaves.
on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device")
on_host = on_device.with_memory_kind("pinned_host")


def loss_fn(params):
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


@jax.jit(donate_argnums=(0, 1))
def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, jax.device_put(opt_state, on_device), params)
    return optax.apply_updates(params, updates), jax.device_put(opt_state, on_host), loss


opt_state = jax.jit(tx.init, out_shardings=on_host)(params)
losses = []
for _ in range(200):
    params, opt_state, loss = step(params, opt_state)
    losses.append(loss)
print("the state lies in", {leaf.sharding.memory_kind for leaf in jax.tree.leaves(opt_state)})
print(f"host offload: loss {losses[0]:.2g} to {losses[-1]:.2g}")
