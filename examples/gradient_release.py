"""Gradient release: train a small GPT in which no tree of gradients ever exists.

The layers are stacked, as `jax.lax.scan` wants them, and updated one by one, from the last to the
first, inside the backward pass. Text and task are those of `char_lm.py`: bytes of the standard
library's sources. It trains with the ordinary step and with release, and prints what XLA says that
each of them needs.

    python examples/gradient_release.py
    python examples/gradient_release.py --steps 300 --width 256 --layers 16
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import gefen_jax as gx

HEADS, CONTEXT, BATCH = 4, 32, 4


def load_text(limit: int = 1_000_000) -> np.ndarray:
    pieces = [p.read_bytes() for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    return np.frombuffer(b"".join(pieces)[:limit], np.uint8)


def init(key: jax.Array, width: int, layers: int) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return scale * shape[-2] ** -0.5 * jax.random.normal(next(keys), shape)

    return {
        "tokens": normal(256, width) * 16 * width**-0.5,  # also the output layer
        "positions": normal(CONTEXT, width) * CONTEXT**0.5 * width**-0.5,
        "norm": jnp.ones(width),
        "layers": {
            "norms": jnp.ones((layers, 2, width)),
            "qkv": normal(layers, width, 3 * width),
            "out": normal(layers, width, width, scale=layers**-0.5),
            "up": normal(layers, width, 4 * width),
            "down": normal(layers, 4 * width, width, scale=layers**-0.5),
        },
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * scale


# The three functions of the model. `embed` and `head` see all parameters but the layers'.


def embed(params: Any, batch: jax.Array) -> jax.Array:
    return params["tokens"][batch[:, :-1]] + params["positions"][None]


def layer(params: Any, x: jax.Array) -> jax.Array:
    batch, context, width = x.shape
    qkv = norm(x, params["norms"][0]) @ params["qkv"]
    qkv = qkv.reshape(batch, context, 3, HEADS, width // HEADS)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    x = x + attended.reshape(batch, context, width) @ params["out"]
    return x + jax.nn.gelu(norm(x, params["norms"][1]) @ params["up"]) @ params["down"]


def head(params: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    logits = (norm(x, params["norm"]) @ params["tokens"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def ordinary(optimizer: gx.FusedGefen) -> Any:
    """The step that everyone writes."""

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        x = embed(params, batch)
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])
        return head(params, x, batch)

    def step(params: Any, opt_state: Any, batch: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return *optimizer.step(grads, opt_state, params), loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("steps", 60), ("width", 64), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    text, rng = load_text(), np.random.default_rng(0)
    starts = rng.integers(0, len(text) - CONTEXT - 1, (options.steps, BATCH))
    batches = jnp.asarray(text[starts[..., None] + np.arange(CONTEXT + 1)], jnp.int32)

    full = init(jax.random.key(0), options.width, options.layers)
    size = sum(p.size for p in jax.tree.leaves(full))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, options.steps // 10, options.steps)
    optimizer = gx.with_split_weights(gx.fused_gefen(schedule, b2=0.99, weight_decay=0.1))
    steps = {
        "ordinary step": ordinary(optimizer),
        "release": gx.release(optimizer, embed, layer, head),
        "release, clipped": gx.release(optimizer, embed, layer, head, max_norm=1.0),
    }
    table = Table(title=f"{size:,} parameters in {options.layers} layers, bytes for each")
    for heading in ("", "weights and state", "temporaries", "loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, step in steps.items():
        params, opt_state = gx.split_weights(full)[0], optimizer.init(full)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, batches[0])
        compiled = compiled.compile()
        used, losses = compiled.memory_analysis(), []
        assert used is not None, "this backend does not tell what it needs"
        for batch in batches:
            params, opt_state, loss = compiled(params, opt_state, batch)
            losses.append(loss)
        kept, temporaries = (
            f"{n / size:.2f}" for n in (used.argument_size_in_bytes, used.temp_size_in_bytes)
        )
        table.add_row(name, kept, temporaries, f"{float(np.mean(losses[-10:])):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
