"""LoRA: the frozen weights get no state, by `optax.partition`.

`optax.masked` alone would let the frozen weights' gradients through as updates. With `set_to_zero`
nothing reads these gradients, and under `jit` they are never computed.
"""

import jax
import jax.numpy as jnp
import optax

import gefen_jax as gx

RANK = 32
x = jax.random.normal(jax.random.key(0), (128, 256))
w, shift, a = jax.random.split(jax.random.key(1), 3)
weight = jax.random.normal(w, (256, 256)) / 16
# The task: the weight has moved by a matrix of low rank.
left, right = jnp.split(jax.random.normal(shift, (256, 16)) / 16, 2, axis=1)
y = x @ (weight + left @ right.T)

params = {
    "weight": weight,
    "lora_a": jax.random.normal(a, (256, RANK)) / 16,
    "lora_b": jnp.zeros((RANK, 256)),  # zero at first, and so is the gradient of lora_a
}
labels = {name: "lora" if name.startswith("lora") else "frozen" for name in params}
tx = optax.partition({"lora": gx.gefen(3e-3), "frozen": optax.set_to_zero()}, labels)


def loss_fn(params):
    delta = params["lora_a"] @ params["lora_b"]
    return jnp.mean((x @ (params["weight"] + delta) - y) ** 2)


@jax.jit
def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


opt_state = tx.init(params)
report = gx.memory_report(opt_state)
losses = []
for _ in range(300):
    params, opt_state, loss = step(params, opt_state)
    losses.append(loss)
print("bytes of state by tensor:", dict(report.by_tensor))
print(f"the frozen weight has {'not ' if bool(jnp.all(params['weight'] == weight)) else ''}moved")
print(f"lora: loss {losses[0]:.2g} to {losses[-1]:.2g}")
