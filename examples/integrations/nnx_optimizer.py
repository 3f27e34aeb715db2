"""Flax nnx: `nnx.Optimizer` takes the optimizer as it takes any of Optax's."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gefen_jax as gx

x = jax.random.normal(jax.random.key(0), (128, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]


def loss_fn(model):
    return jnp.mean((model(x) - y) ** 2)


rngs = nnx.Rngs(1)
model = nnx.Sequential(nnx.Linear(32, 256, rngs=rngs), nnx.gelu, nnx.Linear(256, 16, rngs=rngs))
# Shared blocks, to show it: the plan's paths are those of the model's parameters.
plan = gx.calibrate(nnx.state(model, nnx.Param), nnx.grad(loss_fn)(model))
tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(3e-3, plan=plan))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


losses = []
for _ in range(200):
    loss = step(model, optimizer)
    losses.append(loss)
for row in plan.table():
    print(row.path, row.kind, row.reason)
print(f"nnx: loss {losses[0]:.2g} to {losses[-1]:.2g}")
