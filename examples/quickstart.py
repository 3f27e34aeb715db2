"""From `optax.adamw` to `gefen_jax.gefen` in a Flax model: one line changes."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gefen_jax as gx

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(32, 512, rngs=rngs), nnx.gelu, nnx.Linear(512, 32, rngs=rngs))
graphdef, params = nnx.split(model, nnx.Param)
x = jax.random.normal(jax.random.key(1), (256, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))


def loss_fn(params, x, y):
    return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)


tx = gx.gefen(3e-3, weight_decay=0.01)  # was: optax.adamw(3e-3, weight_decay=0.01)
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for step in range(1, 201):
    params, opt_state, loss = train_step(params, opt_state, x, y)
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.4f}")
size = sum(p.size for p in jax.tree.leaves(params))
per_param = gx.memory_report(opt_state).total_bytes / size
print(f"{per_param:.2f} bytes of optimizer state per parameter, where AdamW needs 8")
