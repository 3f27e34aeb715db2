"""Fifty steps with gradient release beside fifty ordinary ones, each run on its own, on a CPU.

A transformer of 4 layers, as a stack and as a list; the next token of a noisy sequence. What is
compared after the last step: the weights (those that are split, merged), and every loss.

    python examples/benchmarks/release_runs.py
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import write
from rich.console import Console
from rich.table import Table

import gefen_jax as gx

LAYERS, WIDTH, TOKENS, CONTEXT, BATCH, STEPS, RATE = 4, 64, 64, 32, 8, 50, 1e-3
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.adamw(RATE),
    "fused_gefen": lambda: gx.fused_gefen(RATE),
    "fused_gefen, 24 bits": lambda: gx.with_split_weights(gx.fused_gefen(RATE)),
    "flash_adamw, 24 bits": lambda: gx.with_split_weights(gx.flash_adamw(RATE)),
}


def _norm(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def _embed(params: Any, batch: Any) -> Any:
    return params["tokens"][batch[:, :-1]] + params["places"][None]


def _layer(p: Any, x: Any) -> Any:
    q, k, v = jnp.split(_norm(x) @ p["qkv"], 3, -1)
    x = (
        x
        + jax.nn.dot_product_attention(*(y[:, :, None] for y in (q, k, v)), is_causal=True)[:, :, 0]
        @ p["out"]
    )
    return x + jax.nn.gelu(_norm(x) @ p["up"]) @ p["down"]


def _head(params: Any, x: Any, batch: Any) -> Any:
    logits = (_norm(x) @ params["tokens"].T).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))


def _loss(params: Any, batch: Any) -> Any:
    x, layers = _embed(params, batch), params["layers"]
    if isinstance(layers, list):
        for layer in layers:
            x = _layer(layer, x)
    else:
        x = jax.lax.scan(lambda x, p: (_layer(p, x), None), x, layers)[0]
    return _head(params, x, batch)


def _params(stacked: bool) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)

    layers: Any = {
        "qkv": normal(LAYERS, WIDTH, 3 * WIDTH),
        "out": normal(LAYERS, WIDTH, WIDTH),
        "up": normal(LAYERS, WIDTH, 4 * WIDTH),
        "down": normal(LAYERS, 4 * WIDTH, WIDTH),
    }
    if not stacked:
        layers = [{k: x[i] for k, x in layers.items()} for i in range(LAYERS)]
    return {"layers": layers, "places": normal(CONTEXT, WIDTH), "tokens": normal(TOKENS, WIDTH)}


def _batch(t: int) -> Any:
    """Sequences that go up by one token, or by a random number of them."""
    rng = np.random.default_rng([1, t])
    jumps = rng.integers(0, TOKENS, (BATCH, CONTEXT + 1))
    steps = np.where(rng.random(jumps.shape) < 0.8, 1, jumps)
    return jnp.asarray(np.cumsum(steps, axis=1) % TOKENS)


def compare(make: Callable[[], Any], stacked: bool, split: bool) -> dict[str, float]:
    """How far apart the two runs end."""
    optimizer, start = make(), _params(stacked)
    weights = gx.split_weights(start)[0] if split else start

    def ordinary(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        if isinstance(optimizer, gx.FusedGefen):
            return *optimizer.step(grads, opt_state, params), loss
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    ends, losses = [], []
    for step in (gx.release(optimizer, _embed, _layer, _head), ordinary):
        jitted, run, found = jax.jit(step), (weights, optimizer.init(start)), []
        for t in range(STEPS):
            *run, loss = jitted(*run, _batch(t))
            found.append(float(loss))
        losses.append(np.array(found))
        ends.append(gx.merge_weights(*run) if split else run[0])

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    released, other, first = map(flat, (*ends, start))
    apart = np.abs(released - other)
    return {
        "largest distance": float(apart.max()),
        "share that differ": float(np.mean(apart > 0)),
        "mean distance moved": float(np.mean(np.abs(other - first))),
        "largest difference of a loss": float(np.max(np.abs(losses[0] - losses[1]))),
        "first loss": float(losses[1][0]),
        "last loss": float(losses[1][-1]),
    }


def main() -> None:
    """Runs everything, writes `release_runs.json` and prints the table."""
    results = {
        f"{name}, {'stack' if stacked else 'list'}": compare(make, stacked, "bits" in name)
        for name, make in OPTIMIZERS.items()
        for stacked in (True, False)
    }
    table = Table("after 50 steps", *next(iter(results.values())))
    for name, row in results.items():
        table.add_row(name, *(f"{x:.2g}" for x in row.values()))
    write("release_runs.json", "python examples/benchmarks/release_runs.py", results)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
