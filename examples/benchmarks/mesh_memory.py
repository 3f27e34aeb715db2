"""Temporaries of one optimizer step on a mesh of 8 devices, by compiling it: nothing runs.

Every leaf is cut over one axis, fsdp, along its first axis that 8 divides. Per device: what the
compiler needs beside parameters, gradients and state, and the collectives it finds necessary. The
row "whole leaves" has the same plan without its partitions: so the step does not know how leaves
are cut, and cannot work through them in pieces. For 8 H200 without one (what that needs:
`gpu_memory.py`), and for 8 virtual devices of the CPU.

    python examples/benchmarks/mesh_memory.py
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from _common import write
from cpu_step import make_step
from gpu_memory import TARGET, computations, cost
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small, llama_1b
from simulate_mesh import collectives, placed

import gefen_jax as gx

DEVICES = 8
TREES: dict[str, Callable[[], Any]] = {
    "GPT-2 small, 148 leaves": gpt2_small,
    "Llama-like 1.5B": llama_1b,
}
NOTE = "Compiled ahead of time for 8 devices; nothing was run."


def whole(plan: gx.Plan) -> gx.Plan:
    """The plan without what it knows of a mesh."""
    leaves = tuple(dataclasses.replace(leaf, partition=None) for leaf in plan.leaves)
    return dataclasses.replace(plan, leaves=leaves)


OPTIMIZERS: dict[str, Callable[[gx.Plan], Any]] = {
    "optax.adamw": lambda plan: optax.adamw(1e-3),
    "gefen, whole leaves": lambda plan: gx.gefen(1e-3, plan=whole(plan)),
    "gefen": lambda plan: gx.gefen(1e-3, plan=plan),
    "gefen, fused, whole leaves": lambda plan: gx.fused_gefen(1e-3, plan=whole(plan)),
    "gefen, fused": lambda plan: gx.fused_gefen(1e-3, plan=plan),
}
# The kernel, which every device runs on its shards; for GPUs, from jax 0.11.2 on.
MOSAIC: dict[str, Callable[[gx.Plan], Any]] = {
    "gefen, fused, mosaic": lambda plan: gx.fused_gefen(1e-3, plan=plan, backend="mosaic"),
}


def cut(tree: Any, mesh: Mesh) -> Any:
    """The structs with shardings."""

    def spec(shape: tuple[int, ...]) -> P:
        axis = next((i for i, size in enumerate(shape) if size % DEVICES == 0), None)
        return P() if axis is None else P(*(None,) * axis, "fsdp")

    return jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, spec(x.shape))), tree)


def measure(tx: Any, params: Any, platform: str) -> dict[str, float]:
    """One row of the table."""
    state = placed(tx, params)
    where = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(make_step(tx), donate_argnums=(0, 1), out_shardings=where)
    traced = jitted.trace(params, state, params)
    executable = traced.lower(lowering_platforms=(platform,)).compile()
    memory, hlo = executable.memory_analysis(), executable.as_text()
    assert memory is not None and hlo is not None
    share = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))
    row: dict[str, float] = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "temporary_bytes_per_local_parameter": round(memory.temp_size_in_bytes / share, 4),
        "collectives": len(collectives(hlo)),
    }
    return row | ({"kernels": cost(computations(hlo)).kernels} if platform == "cuda" else {})


def platforms() -> dict[str, Any]:
    """Eight devices of each; to be called before anything else of jax."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text("utf-8"), topology=f"1x{DEVICES}x1"
    )
    return {"cuda": topology.devices, "cpu": jax.devices()}


def main() -> None:
    """Compiles everything, writes `mesh_memory.json` and prints the table."""
    results: dict[str, Any] = {"note": NOTE}
    table = Table("", "", "", "temporary bytes", "per local parameter", "collectives", "kernels")
    for platform, devices in platforms().items():
        mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
        with_kernel = platform == "cuda" and jax.__version_info__ >= (0, 11, 2)
        optimizers = OPTIMIZERS | (MOSAIC if with_kernel else {})
        for tree_name, make_tree in TREES.items():
            params = cut(make_tree(), mesh)
            plan = gx.plan_by_shape(params)
            rows = {
                name: measure(make(plan), params, platform) for name, make in optimizers.items()
            }
            results.setdefault(platform, {})[tree_name] = rows
            for name, row in rows.items():
                table.add_row(platform, tree_name, name, *map(str, row.values()))
    write("mesh_memory.json", "python examples/benchmarks/mesh_memory.py", results)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
