"""Temporaries of a whole training step, gradients among them, by compiling it: nothing runs.

Twelve residual blocks as GPT-2 small's MLPs, not stacked, so that XLA may compute a gradient when
the optimizer needs it; on one device, and on eight, fsdp: weights cut along their first axis, the
batch along tokens. In bytes per parameter of a device's share, beside optax.adamw; for an H200
without one (what that needs: `gpu_memory.py`), and for a CPU.

    python examples/benchmarks/train_memory.py
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import write
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from mesh_memory import DEVICES, platforms
from rich.console import Console
from rich.table import Table
from simulate_mesh import placed

import gefen_jax as gx

LAYERS, WIDTH, INNER = 12, 768, 3072
TOKENS = (64, 1024, 8192)  # of a device
KINDS = {"cuda": "H200", "cpu": "CPU"}
NOTE = "Compiled ahead of time; nothing was run."
OPTIMIZERS: dict[str, Callable[[gx.Plan], Any]] = {
    "optax.adamw": lambda plan: optax.adamw(1e-3),
    "gefen": lambda plan: gx.gefen(1e-3, plan=plan),
    "gefen, fused": lambda plan: gx.fused_gefen(1e-3, plan=plan),
}


def loss(params: Any, x: jax.Array) -> jax.Array:
    """The mean square of what the blocks make of the tokens."""
    for layer in params.values():
        x = x + jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]
    return jnp.mean(jnp.square(x))


def temporaries(make: Callable[[gx.Plan], Any], mesh: Mesh, platform: str, tokens: int) -> float:
    """In bytes per parameter of a device."""
    on_a_mesh = mesh.size > 1
    cut = NamedSharding(mesh, P("fsdp")) if on_a_mesh else SingleDeviceSharding(mesh.devices.item())

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=cut)

    layer = {"up": array(WIDTH, INNER), "bias": array(INNER), "down": array(INNER, WIDTH)}
    params = {f"{i:02d}": layer for i in range(LAYERS)}
    tx = make(gx.plan_by_shape(params))

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = jax.grad(loss)(params, x)
        if isinstance(tx, gx.FusedGefen):
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if on_a_mesh:
        opt_state = placed(tx, params)
    else:
        opt_state = jax.tree.map(lambda x: x.update(sharding=cut), jax.eval_shape(tx.init, params))
    args = params, opt_state, array(tokens * mesh.size, WIDTH)
    where = jax.tree.map(lambda x: x.sharding, args[:2])
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    memory = jitted.trace(*args).lower(lowering_platforms=(platform,)).compile().memory_analysis()
    assert memory is not None
    share = sum(math.prod(cut.shard_shape(x.shape)) for x in jax.tree.leaves(params))
    return memory.temp_size_in_bytes / share


def main() -> None:
    """Compiles everything, writes `train_memory.json` and prints the table."""
    results: dict[str, Any] = {"note": NOTE}
    table = Table("bytes per parameter", "tokens", *OPTIMIZERS, title=NOTE)
    for platform, devices in platforms().items():
        kind = KINDS[platform]
        for number in (1, DEVICES):
            mesh = Mesh(np.array(devices[:number]), ("fsdp",), axis_types=(AxisType.Auto,))
            for tokens in TOKENS:
                row = {
                    name: round(temporaries(make, mesh, platform, tokens), 3)
                    for name, make in OPTIMIZERS.items()
                }
                results.setdefault(f"{number} {kind}", {})[f"{tokens} tokens"] = row
                table.add_row(f"{number} {kind}", str(tokens), *map(str, row.values()))
    write("train_memory.json", "python examples/benchmarks/train_memory.py", results)
    Console().print(table)


if __name__ == "__main__":
    main()
