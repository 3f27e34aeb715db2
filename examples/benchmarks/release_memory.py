"""Temporaries of a step with gradient release on a stack of 16 layers, by compiling it.

Layers of one bfloat16 matrix of 512 x 1024, which they use twice, and a batch of one: next to
nothing of it is activations. For this machine's CPU, and for an H200 without one (what that needs:
`gpu_memory.py`). Nothing runs.

    python examples/benchmarks/release_memory.py
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import write
from gpu_memory import TARGET
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

import gefen_jax as gx

LAYERS, WIDTH, INNER = 16, 512, 1024
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "fused_gefen, 16 bits": lambda: gx.with_split_weights(gx.fused_gefen(1e-3), bits=16),
    "fused_gefen, 24 bits": lambda: gx.with_split_weights(gx.fused_gefen(1e-3)),
    "fused_gefen, 32 bits": lambda: gx.with_split_weights(gx.fused_gefen(1e-3), bits=32),
    "flash_adamw, 24 bits": lambda: gx.with_split_weights(
        gx.flash_adamw(1e-3), gradient_dtype=None
    ),
    "optax.adamw, 24 bits": lambda: gx.with_split_weights(optax.adamw(1e-3)),
}


def _embed(params: Any, batch: Any) -> Any:
    return batch + params["in"][None]


def _layer(w: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ w) @ w.T


def _head(_: Any, x: Any, batch: Any) -> Any:
    return jnp.sum(jnp.square(x - batch).astype(jnp.float32))


def temporaries(optimizer: Any, device: Any, platform: str) -> float:
    """In bytes per parameter."""
    sharding = SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {"in": array(WIDTH), "layers": array(LAYERS, WIDTH, INNER)}
    args = placed((params, jax.eval_shape(optimizer.init, params), array(1, WIDTH)))
    step = gx.release(optimizer, _embed, _layer, _head)
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*args)
    memory = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / (LAYERS * WIDTH * INNER)


def main() -> None:
    """Compiles everything, writes `release_memory.json` and prints the table."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text("utf-8"), topology="1x1x1"
    )
    devices = {"H200": (topology.devices[0], "cuda"), "CPU": (jax.devices()[0], "cpu")}
    results = {
        name: {of: round(temporaries(make(), *device), 3) for of, device in devices.items()}
        for name, make in OPTIMIZERS.items()
    }
    table = Table("bytes per parameter", *devices)
    for name, row in results.items():
        table.add_row(name, *map(str, row.values()))
    write("release_memory.json", "python examples/benchmarks/release_memory.py", results)
    Console().print(table)


if __name__ == "__main__":
    main()
