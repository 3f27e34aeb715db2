"""Mosaic's kernels compiled to PTX and run on a CPU, beside the same kernels interpreted.

In Pallas' interpreter plain code stands for the operations that `pallas_kernels._mosaic_ops` writes
for Mosaic's compiler. Here is what the compiler makes of them, for a leaf of a few programs, warp
by warp in any order (`ptx.py`): a check of numbers and of barriers, and no measurement of speed. It
needs what `gpu_compile.py` does, but for `ptxas`:

    python examples/benchmarks/ptx_run.py
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
from _common import write
from gpu_compile import TARGETS, Build, Gpu
from jax.experimental import topologies
from ptx import run
from rich.console import Console
from rich.table import Table

from gefen_jax._builtin import builtin_codebook
from gefen_jax._encoder import make_encoder
from pallas_kernels import SharedTables, StepScalars, _launch, _mosaic

ULP = 2.0**-23
_SMALL = {"backend": "mosaic", "size": 1500}
BUILDS = [
    *(Build("shared", p, 1, "float32", p % 2 == 0, **_SMALL) for p in (1, 9, 96, 257, 1000, 5000)),
    *(Build("shared", p, 5, "float32", p % 2 == 1, **_SMALL) for p in (6, 96, 1100)),
    Build("shared", 4096, 1, "bfloat16", True, **_SMALL),
    Build("shared", 257, 1, "float16", False, exact_lookup=False, **_SMALL),
    *(Build("shared", 96, 1, "bfloat16", True, bits, **_SMALL) for bits in (16, 24, 32)),
    Build("shared", 5000, 1, "float16", True, 24, **_SMALL),
    *(Build("dual", p, 1, "float32", p % 4 == 0, **_SMALL) for p in (6, 96, 256, 1000, 4096)),
    *(Build("dual", p, 5, "float32", p % 4 == 0, **_SMALL) for p in (6, 96)),
    *(Build("dual", 256, 1, "bfloat16", True, bits, **_SMALL) for bits in (16, 24, 32)),
    Build("dual", 96, 5, "float16", True, 24, **_SMALL),
    *(Build("exact", p, 1, "float32", True, leaves=3, **_SMALL) for p in (7, 600)),
    Build("exact", 1025, 1, "float16", True, leaves=1, **_SMALL),
    *(Build("exact", 600, 1, "bfloat16", True, bits, leaves=3, **_SMALL) for bits in (16, 24, 32)),
    Build("exact", 600, 1, "float16", True, 24, leaves=3, **_SMALL),
]
# A kernel's parameters are what it reads or writes, in the order in which it first does.
_TABLES = ("count_below", "next_threshold")
ORDER = {
    "dual": (
        "scalars",
        "tables",
        "g",
        "codes",
        "scale",
        "nu",
        "leaf",
        "step",
        "param",
        "correction",
    ),
    "shared": (
        *("scalars", "scale", "nu", "g", "codes", "codebook", "leaf", "step"),
        *(*_TABLES, "param", "correction"),
    ),
}
INPUTS = {
    "dual": ("scalars", "leaf", "step", "tables", "g"),
    "shared": ("scalars", "leaf", "step", "g", "codebook", *_TABLES),
}
WRITTEN = ("param", "codes", "scale", "nu", "correction")


def names_of(build: Build) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """The kernel's parameters in that order, its inputs, and what it writes; some may be missing.

    Of exact leaves every one has its own.
    """
    if build.step != "exact":
        return ORDER[build.step], INPUTS[build.step], WRITTEN
    shared, numbers = ("scalars", "leaf", "step"), range(build.leaves)
    order = [f"{name} {i}" for i in numbers for name in ("g", "mu", "nu", "param", "correction")]
    written = [f"{name} {i}" for name in ("param", "mu", "nu", "correction") for i in numbers]
    return (*shared, *order), (*shared, *(f"g {i}" for i in numbers)), written


def numbers(build: Build, device: Any) -> tuple[Any, Any]:
    """What a step takes: any state, and gradients of its size."""
    rng = np.random.default_rng(0)

    def like(x: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=x.shape), x.dtype)
        ends = jnp.iinfo(x.dtype)
        return jnp.asarray(rng.integers(ends.min, ends.max, x.shape, x.dtype, endpoint=True))

    donated, (g, rest) = jax.tree.map(like, gpu_compile.arguments(build, device))
    b1, b2, t = 0.9, 0.999, 3
    decay = (b1, b2, 1 - b1, 1 - b2, 1e-8, 0.0, 1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t)
    rest |= {"scalars": StepScalars(*decay)}
    if build.step == "exact":
        # One word of the phases is the step's.
        rest["phase"] = [x.at[1].set(rest["phase"][0][1]) for x in rest["phase"]]
        return [[param, mu, jnp.abs(nu), low] for param, mu, nu, low in donated], (g, rest)
    ((codes, scale, nu), *weight) = donated
    # An exponent of about 1; a second moment of about 1.
    nu = nu % 8 + 124 if build.step == "dual" else jnp.abs(nu)
    codebook = jnp.asarray(builtin_codebook(16 if build.step == "dual" else 256), jnp.float32)
    lookup = make_encoder(codebook)[1:] if build.step == "shared" and build.exact_lookup else ()
    rest |= {"tables": SharedTables(codebook, *lookup)}
    return ((codes, jnp.abs(scale), nu), *weight), (g, rest)


def call_of(build: Build, args: Any) -> Any:
    """What the kernel is given, as arrays."""
    calls, launch = [], _launch.LAUNCHES["mosaic"]

    def record(call: Any) -> list[Any]:
        calls.append(call)
        return [*(jnp.zeros(x.shape, x.dtype) for x in call.out), *call.written]

    _launch.LAUNCHES["mosaic"] = record
    try:
        gpu_compile.step_of(build)(*args)
    finally:
        _launch.LAUNCHES["mosaic"] = launch
    return calls[0]


def run_ptx(build: Build, text: str, args: Any, seed: int) -> list[np.ndarray]:
    """What the kernel writes."""
    call, (order, inputs, written) = call_of(build, args), names_of(build)
    out = [jnp.zeros(x.shape, x.dtype) for x in call.out]
    given = zip(inputs, call.inputs, strict=False)
    new = list(zip(written, [*out, *call.written], strict=False))
    arrays = {name: np.array(x) for name, x in (*given, *new)}
    if build.step != "dual" and not call.form.stochastic:
        del arrays["leaf"], arrays["step"]
    config = _mosaic.of_warpgroups(call.config, call.layout)
    threads = 128 * _mosaic.warpgroups_of(math.prod(config.tile(call.layout)))
    in_order = [arrays[name] for name in order if name in arrays]
    run(text, in_order, config.programs(call.layout), threads, seed)
    return [arrays[name] for name, _ in new]


def measure(build: Build, gpu: Gpu, device: Any, dump: Path, seed: int) -> dict[str, Any]:
    """One row of the table."""
    args = numbers(build, device)
    gpu_compile.compiled(build, gpu, device)
    path = gpu_compile.ptx_in(dump)
    text = path.read_text("utf-8")
    path.unlink()
    started = time.process_time()
    found = run_ptx(build, text, args, seed)
    seconds = time.process_time() - started
    step = jax.jit(gpu_compile.step_of(build, interpret=True))
    row = {name: x for name, x in build._asdict().items() if name != "backend"}
    results = step(*args)
    if build.step == "exact":
        results = [x for field in zip(*results, strict=True) for x in field]
    for name, ours, wanted in zip(names_of(build)[2], found, results, strict=False):
        wanted = np.asarray(wanted).reshape(-1)
        if wanted.dtype.kind in "iu":
            row[f"{name} that differ"] = int(np.count_nonzero(ours != wanted))
            continue
        ours, wanted = (x.astype(np.float64) for x in (ours, wanted))
        row[name] = round(np.max(np.abs(ours - wanted)) / np.max(np.abs(wanted)) / ULP, 2)
    return row | {"elements": build.layout.size, "seconds": round(seconds, 1)}


def main() -> None:
    """Runs everything, writes the result file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--seed", type=int, default=0, help="of the order of warps")
    parser.add_argument("--out", default="ptx_run.json", help="a file in examples/results")
    args = parser.parse_args()
    gpu = Gpu((TARGETS / f"{args.target}.txt").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        gpu_compile.set_environment(name)
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.text, topology="1x1x1"
        )
        device = topology.devices[0]
        rows = [measure(build, gpu, device, Path(name), args.seed) for build in BUILDS]
    note = (
        "PTX run on a CPU beside the interpreted kernel. Floats: the largest difference, in 2^-23"
        " of the largest number of the array. Seconds are the emulator's."
    )
    write(args.out, "python examples/benchmarks/ptx_run.py", {"note": note, "kernels": rows})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=note)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    Console(width=240).print(table)


if __name__ == "__main__":
    main()
