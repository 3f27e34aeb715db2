"""Flax linen: `TrainState` takes the optimizer as it takes any of Optax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

import gefen_jax as gx

x = jax.random.normal(jax.random.key(0), (128, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))[:, ::2]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(256)(x))
        return nn.Dense(16)(x)


model = Model()
params = model.init(jax.random.key(1), x)["params"]
plan = gx.plan_by_shape(params)  # optional: what `gefen` does without one, to look at and to save
train = TrainState.create(apply_fn=model.apply, params=params, tx=gx.gefen(3e-3, plan=plan))


@jax.jit
def step(train):
    def loss_fn(params):
        return jnp.mean((train.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(train.params)
    return train.apply_gradients(grads=grads), loss


losses = []
for _ in range(200):
    train, loss = step(train)
    losses.append(loss)
for row in plan.table():
    print(row.path, row.kind, row.nbytes, "bytes")
print(f"linen: loss {losses[0]:.2g} to {losses[-1]:.2g}")
