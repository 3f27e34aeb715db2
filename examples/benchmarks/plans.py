"""Bytes of state per parameter on the shapes of real models, and the time that a plan takes.

Four plans per model: dual codes, which go by shape; shared blocks by shape; those calibrated on
seeded structured gradients (a log-normal scale per input and per output unit, times normal noise);
and the worst that any gradient can bring about, the most expensive candidate block everywhere.

    python examples/benchmarks/plans.py
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import write
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small, llama_1b, resnet50, vit_b16

import gefen_jax as gx
from gefen_jax._candidates import candidate_blocks

# How many of a model's equal layers get gradients; the others copy the plans of these.
MODELS = {
    "GPT-2 small": (gpt2_small, 12),
    "Llama-like, 1.5B": (llama_1b, 1),
    "ViT-B/16": (vit_b16, 12),
    "ResNet-50": (resnet50, None),
}


def structured_gradient(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Noise whose size varies by input unit, by output unit, and by nothing else."""
    g = rng.standard_normal(shape, dtype=np.float32)
    for axis in range(max(0, len(shape) - 2), len(shape)):
        scale = np.exp(rng.standard_normal(shape[axis], dtype=np.float32))
        g *= scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return g


def first_layers(tree: dict[str, Any], count: int | None) -> dict[str, Any]:
    """The tree with only the first ``count`` of its numbered layers."""
    if count is None:
        return tree
    return {
        name: {k: v for k, v in child.items() if not k.isdigit() or int(k) < count}
        if isinstance(child, dict)
        else child
        for name, child in tree.items()
    }


def calibrated(tree: dict[str, Any], count: int | None) -> tuple[gx.Plan, float, float]:
    """The plan of the whole tree, and the seconds of a first and of a second calibration."""
    rng = np.random.default_rng(0)
    part = first_layers(tree, count)
    grads = jax.tree.map(lambda x: jnp.asarray(structured_gradient(x.shape, rng)), part)
    seconds = []
    plan = gx.plan_by_shape(part)
    for _ in range(2):
        start = time.perf_counter()
        plan = gx.calibrate(part, grads)
        seconds.append(time.perf_counter() - start)
    known = {leaf.path: leaf for leaf in plan.leaves}
    leaves = []
    for row in gx.plan_by_shape(tree).leaves:
        keys = row.path.split("/")
        if row.path not in known and count is not None:
            keys = [str(int(k) % count) if k.isdigit() else k for k in keys]
        leaves.append(dataclasses.replace(known["/".join(keys)], path=row.path))
    return dataclasses.replace(plan, leaves=tuple(leaves)), seconds[0], seconds[1]


def worst(tree: dict[str, Any]) -> gx.Plan:
    """Every leaf in the most expensive block that calibration may choose for it."""
    plan = gx.plan_by_shape(tree, kind="shared_blocks")
    leaves = []
    for leaf in plan.leaves:
        if isinstance(leaf.kind, gx.SharedBlocks):
            options = [
                dataclasses.replace(leaf, kind=gx.SharedBlocks(block), reason="worst case")
                for block in candidate_blocks(leaf.shape)
            ]
            leaf = max(options, key=lambda option: option.nbytes)
        leaves.append(leaf)
    return dataclasses.replace(plan, leaves=tuple(leaves))


def main() -> None:
    """Makes all plans, prints a table, writes `plans.json`."""
    headings = ("dual code", "shared, by shape", "calibrated", "worst", "s, first", "s, again")
    table = Table("model", "parameters", *headings)
    results = {}
    for name, (make, count) in MODELS.items():
        tree = make()
        size = sum(x.size for x in jax.tree.leaves(tree))
        plan, first, again = calibrated(tree, count)
        results[name] = {
            "parameters": size,
            "dual code": gx.plan_by_shape(tree).bytes_per_param,
            "shared blocks by shape": gx.plan_by_shape(tree, kind="shared_blocks").bytes_per_param,
            "shared blocks calibrated": plan.bytes_per_param,
            "shared blocks at worst": worst(tree).bytes_per_param,
            "parameters with a gradient": sum(
                x.size for x in jax.tree.leaves(first_layers(tree, count))
            ),
            "seconds of the first calibration": first,
            "seconds of the second calibration": again,
        }
        numbers = list(results[name].values())
        table.add_row(
            name,
            f"{size:,}",
            *(f"{x:.4f}" for x in numbers[1:5]),
            f"{first:.1f}",
            f"{again:.1f}",
        )
    Console().print(table)
    write("plans.json", "python examples/benchmarks/plans.py", results)


if __name__ == "__main__":
    main()
