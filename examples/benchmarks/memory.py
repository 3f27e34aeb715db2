"""What a training step holds in memory, by XLA's analysis of the compiled step; nothing runs.

The model is a stack of Llama 3 8B's layers between an embedding and a head for 32,000 tokens, batch
1, every layer computed again in the backward pass. Bytes per parameter are the slope of the peak
over the number of layers at 16 tokens, where activations are next to nothing; the largest model is
what fits at 2,048 tokens, by the straight line through two depths.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --h200  # for a GPU; needs what gpu_memory.py says

Without `--h200` it is for this machine's CPU, where XLA multiplies bfloat16 matrices in float32: it
widens all stacked weights of an ordinary step, 4 bytes per parameter that a GPU does not need.
"""

import argparse
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import write
from gpu_memory import TARGET
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gefen_jax as gx

WIDTH, HEADS, KV_HEADS, HEAD, MLP, VOCAB = 4096, 32, 8, 128, 14336, 32_000
DEPTHS, FEW_TOKENS, TOKENS = (8, 16), 16, 2048
DEVICES = {"16 GB": 16e9, "24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
Params = Any


def shapes(layers: int, dtype: Any) -> Params:
    """The parameters, without values."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    heads, kv = HEADS * HEAD, KV_HEADS * HEAD
    return {
        "tokens": leaf(VOCAB, WIDTH),
        "layers": {
            "norms": leaf(layers, 2, WIDTH),
            "q": leaf(layers, WIDTH, heads),
            "k": leaf(layers, WIDTH, kv),
            "v": leaf(layers, WIDTH, kv),
            "o": leaf(layers, heads, WIDTH),
            "gate": leaf(layers, WIDTH, MLP),
            "up": leaf(layers, WIDTH, MLP),
            "down": leaf(layers, MLP, WIDTH),
        },
        "norm": leaf(WIDTH),
        "head": leaf(WIDTH, VOCAB),
    }


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def embed(params: Params, batch: jax.Array) -> jax.Array:
    """The first layer's input."""
    return params["tokens"][batch[:, :-1]]


def layer(params: Params, x: jax.Array) -> jax.Array:
    """Grouped-query attention and SwiGLU; rotations, which hold no memory, are left out."""
    batch, context, _ = x.shape
    normed = _norm(x, params["norms"][0])
    q = (normed @ params["q"]).reshape(batch, context, HEADS, HEAD)
    k, v = ((normed @ params[n]).reshape(batch, context, KV_HEADS, HEAD) for n in ("k", "v"))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(batch, context, HEADS * HEAD) @ params["o"]
    normed = _norm(x, params["norms"][1])
    return x + (jax.nn.silu(normed @ params["gate"]) * (normed @ params["up"])) @ params["down"]


def head(params: Params, x: jax.Array, batch: jax.Array) -> jax.Array:
    """The loss."""
    logits = (_norm(x, params["norm"]) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def _loss(params: Params, batch: jax.Array) -> jax.Array:
    again = jax.checkpoint(layer)
    x = embed(params, batch)
    x, _ = jax.lax.scan(lambda x, p: (again(p, x), None), x, params["layers"])
    return head(params, x, batch)


def _ordinary(optimizer: Any) -> Callable[..., Any]:
    def step(params: Params, opt_state: Any, batch: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        if isinstance(optimizer, gx.FusedGefen):
            return *optimizer.step(grads, opt_state, params), loss
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


@dataclass(frozen=True)
class Case:
    """An optimizer with the weights that it goes with."""

    optimizer: Callable[[], Any]
    weights: Any = jnp.float32
    release: bool = False

    def step(self) -> Callable[..., Any]:
        """The whole training step."""
        optimizer = self.optimizer()
        if self.release:
            return gx.release(optimizer, embed, layer, head)
        return _ordinary(optimizer)


def _split(tx: Callable[..., Any], bits: int = 24) -> Callable[[], Any]:
    return lambda: gx.with_split_weights(tx(1e-3), bits=bits, gradient_dtype=None)


_BF16 = jnp.bfloat16
CASES = {
    "optax.adamw": Case(lambda: optax.adamw(1e-3)),
    "optax.lion": Case(lambda: optax.lion(1e-3)),
    "optax.adafactor": Case(lambda: optax.adafactor(1e-3)),
    "microadam": Case(lambda: gx.microadam(1e-3)),
    "gefen": Case(lambda: gx.gefen(1e-3)),
    "fused_gefen": Case(lambda: gx.fused_gefen(1e-3)),
    "flash_adamw, split weights": Case(_split(gx.flash_adamw), _BF16),
    "gefen, split weights": Case(_split(gx.gefen), _BF16),
    "fused_gefen, split weights": Case(_split(gx.fused_gefen), _BF16),
    "flash_adamw, split weights, release": Case(_split(gx.flash_adamw), _BF16, release=True),
    "fused_gefen, release": Case(lambda: gx.fused_gefen(1e-3), release=True),
    "fused_gefen, split weights, release": Case(_split(gx.fused_gefen), _BF16, release=True),
    "fused_gefen, 16 bits, release": Case(_split(gx.fused_gefen, 16), _BF16, release=True),
}


@functools.cache
def peak(case: Case, layers: int, tokens: int, device: Any) -> tuple[int, int]:
    """Bytes at the step's peak, and of them those that stay between steps; None for the CPU."""
    state = jax.eval_shape(case.optimizer().init, shapes(layers, jnp.float32))
    batch = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
    args = shapes(layers, case.weights), state, batch
    step = jax.jit(case.step(), donate_argnums=(0, 1))
    if device is None:
        memory = step.lower(*args).compile().memory_analysis()
    else:
        sharding = SingleDeviceSharding(device)
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        lowered = step.trace(*args).lower(lowering_platforms=("cuda",))
        # Without a GPU, products cannot be timed to choose between their kernels.
        compiler_options: Any = {"xla_gpu_autotune_level": 0}
        memory = lowered.compile(compiler_options).memory_analysis()
    assert memory is not None, "this backend has no memory analysis"
    kept = memory.argument_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + fresh + memory.temp_size_in_bytes, kept


def size(layers: int) -> int:
    """Parameters of the model."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(layers, jnp.float32)))


def measure(case: Case, device: Any = None) -> dict[str, Any]:
    """Slopes over depth, and what fits."""
    few, many = DEPTHS
    parameters = size(many) - size(few)
    (low, low_kept), (high, high_kept) = (peak(case, depth, FEW_TOKENS, device) for depth in DEPTHS)
    start, end = (peak(case, depth, TOKENS, device)[0] for depth in DEPTHS)
    per_layer = (end - start) / (many - few)
    fits = {}
    for device, nbytes in DEVICES.items():
        depth = int((nbytes - start) // per_layer) + few
        fits[device] = size(depth) / 1e9 if depth > 0 else None
    return {
        "bytes per parameter": (high - low) / parameters,
        "kept between steps": (high_kept - low_kept) / parameters,
        "billions of parameters that fit": fits,
    }


def _h200() -> Any:
    """A device to compile for."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    target = TARGET.read_text("utf-8")
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology="1x1x1"
    ).devices[0]


def main() -> None:
    """Compiles everything, prints a table, writes `memory.json` or `memory_h200.json`."""
    parser = argparse.ArgumentParser(description="Memory of a training step, by XLA's analysis.")
    parser.add_argument("--h200", action="store_true", help="compile for an H200, without one")
    on_gpu = parser.parse_args().h200
    device = _h200() if on_gpu else None
    results = {name: measure(case, device) for name, case in track(CASES.items(), "Compiling")}
    table = Table("", "kept between steps", "peak", *(f"fits {d}" for d in DEVICES))
    table.title = "Bytes per parameter; billions of parameters that fit"
    for name, row in results.items():
        fits = row["billions of parameters that fit"].values()
        cells = (f"{n:.1f}" if n else "-" for n in fits)
        table.add_row(
            name, f"{row['kept between steps']:.3f}", f"{row['bytes per parameter']:.3f}", *cells
        )
    Console(width=160).print(table)
    command = "python examples/benchmarks/memory.py"
    if on_gpu:
        write("memory_h200.json", f"{command} --h200", results)
    else:
        write("memory.json", command, results)


if __name__ == "__main__":
    main()
