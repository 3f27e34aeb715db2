"""What one optimizer step needs on a GPU, by compiling it for an H200 on a machine without one.

One jitted step with donated parameters and state: `update` and `apply_updates`, or the fused step.
Nothing runs: temporaries are the compiler's analysis, kernels and traffic are counted in the
compiled HLO; of time there is the compiler's only. Needs the CUDA plugin of the installed jax (V is
its version, and nothing else of CUDA is needed):

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V
    python examples/benchmarks/gpu_memory.py
"""

import argparse
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _common import write
from cpu_step import OPTIMIZERS, make_step
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small, llama_1b

import gefen_jax as gx

TARGET = Path(__file__).parent / "targets" / "h200.txt"
TREES: dict[str, Callable[[], Any]] = {
    "one 16M leaf": lambda: {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)},
    "one 256M leaf": lambda: {"w": jax.ShapeDtypeStruct((16384, 16384), jnp.float32)},
    "GPT-2 small, 148 leaves": gpt2_small,
    "Llama-like 1.5B": llama_1b,
}
# The kernel of large leaves, from jax 0.11.2 on.
KERNELS: dict[str, Callable[[Any], Any]] = {
    "gefen, mosaic": lambda tree: gx.gefen(1e-3, backend="mosaic"),
    "gefen, fused, mosaic": lambda tree: gx.fused_gefen(1e-3, backend="mosaic"),
    "gefen, shared blocks, mosaic": lambda tree: gx.gefen(
        1e-3, plan=gx.plan_by_shape(tree, kind="shared_blocks"), backend="mosaic"
    ),
    "gefen, shared blocks, fused, mosaic": lambda tree: gx.fused_gefen(
        1e-3, plan=gx.plan_by_shape(tree, kind="shared_blocks"), backend="mosaic"
    ),
}
NOTE = "Compiled ahead of time for an H200; not measured on a GPU."
COLUMNS = (
    "temporary_bytes",
    "temporary_bytes_per_parameter",
    "kernels",  # copies too; loops by their turns
    "loops",
    "traffic_bytes_per_parameter",  # of kernels; what they read twice counts once
    "copied_bytes_per_parameter",
    "compile_seconds",  # from Python to machine code, on the CPU at hand
)

# What no kernel or copy is run for.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "after-all"}
_LINE = re.compile(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")


class Instruction(NamedTuple):
    """One line of an HLO text."""

    name: str
    type: str
    opcode: str
    operands: list[str]  # names
    rest: str  # attributes
    is_root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its result."""
        arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", self.type)
        return sum(
            max(1, int(bits or 8) // 8) * math.prod(int(n) for n in shape.split(",") if n)
            for _, bits, shape in arrays
        )


Computation = dict[str, Instruction]


class Cost(NamedTuple):
    """What a computation does each time it runs."""

    kernels: int = 0
    nbytes: int = 0  # read and written: every operand of a kernel once, of slices what they take
    copied: int = 0  # bytes that copies write

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """The sum with another, which runs so many times."""
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


def computations(hlo: str) -> dict[str, Computation]:
    """The computations of an HLO module by name; ENTRY's is under that name."""
    found: dict[str, Computation] = {}
    here: Computation = {}
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry, name = re.findall(r"^(ENTRY )?%(\S+)", line)[0]
            here = found["ENTRY" if entry else name] = {}
        elif match := _LINE.match(line):
            root, name, kind, opcode, inside, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", inside)
            here[name] = Instruction(name, kind, opcode, operands, rest, bool(root))
    return found


def _read(inside: Computation, name: str) -> int:
    """Bytes that a fusion reads of one of its parameters, or of a bitcast of it."""
    total = 0
    for user in (i for i in inside.values() if name in i.operands):
        if user.opcode == "bitcast":
            total += _read(inside, user.name)
        elif user.opcode in ("dynamic-slice", "slice"):
            total += user.nbytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            total += inside[name].nbytes
    return min(total, inside[name].nbytes)


def _written(inside: Computation, name: str) -> int:
    """Bytes that a fusion writes for one of its results: of an update in place, the update's."""
    result = inside[name]
    if result.opcode in ("tuple", "bitcast"):
        return sum(_written(inside, operand) for operand in result.operands)
    if result.opcode == "dynamic-update-slice":
        return inside[result.operands[1]].nbytes
    return result.nbytes


def cost(module: dict[str, Computation], name: str = "ENTRY") -> Cost:
    """Kernels and traffic of a computation, loops by their known number of turns."""
    total, here = Cost(), module[name]
    for i in here.values():
        if i.opcode == "while":
            (turns,) = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest)
            (body,) = re.findall(r"body=%([\w.-]+)", i.rest)
            total = total.plus(cost(module, body), int(turns))
        elif i.opcode == "fusion":
            (called,) = re.findall(r"calls=%([\w.-]+)", i.rest)
            inside = module[called]
            (root,) = (x.name for x in inside.values() if x.is_root)
            read = sum(_read(inside, x.name) for x in inside.values() if x.opcode == "parameter")
            total = total.plus(Cost(1, read + _written(inside, root)))
        elif i.opcode not in _FREE:
            copied = i.nbytes if i.opcode == "copy" else 0
            nbytes = i.nbytes + sum(here[x].nbytes for x in i.operands)
            total = total.plus(Cost(1, nbytes, copied))
    return total


def compiled(tx: Any, tree: Any, device: Any) -> Any:
    """The jitted step as machine code for the device."""
    sharding = SingleDeviceSharding(device)
    params, state = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), t)
        for t in (tree, jax.eval_shape(tx.init, tree))
    )
    # Mosaic asks which GPU it is for.
    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(make_step(tx), donate_argnums=(0, 1)).trace(params, state, params)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def measure(tx: Any, tree: Any, device: Any) -> dict[str, float]:
    """One row of the table."""
    jax.clear_caches()  # as in a program of its own
    start = time.perf_counter()
    executable = compiled(tx, tree, device)
    seconds = time.perf_counter() - start
    parameters = sum(x.size for x in jax.tree.leaves(tree))
    temporary = executable.memory_analysis().temp_size_in_bytes
    hlo = executable.as_text()
    of_step = cost(computations(hlo))
    values = (
        temporary,
        round(temporary / parameters, 4),
        of_step.kernels,
        hlo.count(" while("),
        round(of_step.nbytes / parameters, 2),
        round(of_step.copied / parameters, 4),
        round(seconds, 1),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Compiles everything, writes the result file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="gpu_memory.json")
    args = parser.parse_args()
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text("utf-8"), topology="1x1x1"
    )
    optimizers = OPTIMIZERS | (KERNELS if jax.__version_info__ >= (0, 11, 2) else {})
    results: dict[str, Any] = {"note": NOTE, "trees": {}}
    table = Table("", "", *COLUMNS, title=NOTE)
    for tree_name, make_tree in TREES.items():
        tree = make_tree()
        rows = {
            name: measure(make(tree), tree, topology.devices[0])
            for name, make in optimizers.items()
        }
        results["trees"][tree_name] = rows
        for name, row in rows.items():
            table.add_row(tree_name, name, *map(str, row.values()))
    write(args.out, "python examples/benchmarks/gpu_memory.py", results)
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
