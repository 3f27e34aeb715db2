"""Flax nnx: a transformer trained by gradient release, with split weights."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gefen_jax as gx

WIDTH, LAYERS, CONTEXT, VOCAB = 64, 3, 16, 64


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


rngs = nnx.Rngs(0)
blocks, tokens = [Block(rngs) for _ in range(LAYERS)], nnx.Embed(VOCAB, WIDTH, rngs=rngs)
block_def, token_def = nnx.graphdef(blocks[0]), nnx.graphdef(tokens)
# Modules as a plain tree: layers in a list, the rest beside it.
params = {"tokens": nnx.state(tokens), "layers": [nnx.state(block) for block in blocks]}


def embed(params, batch):
    return nnx.merge(token_def, params["tokens"])(batch[:, :-1])


def layer(layer_params, x):
    return nnx.merge(block_def, layer_params)(x)


def head(params, x, batch):
    logits = nnx.merge(token_def, params["tokens"]).attend(x)  # tied
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


optimizer = gx.with_split_weights(gx.fused_gefen(3e-3))
opt_state = optimizer.init(params)
weights, _ = gx.split_weights(params)
step = gx.release(optimizer, embed, layer, head, max_norm=1.0)
step = jax.jit(step, donate_argnums=(0, 1))

rows = jnp.arange(8)[:, None] + jnp.square(jnp.arange(CONTEXT + 1))[None]
batch, losses = rows % VOCAB, []
for _ in range(100):
    weights, opt_state, loss = step(weights, opt_state, batch)
    losses.append(loss)
print(f"nnx, release: loss {losses[0]:.2g} to {losses[-1]:.2g}")
