"""The GPU kernels compiled for an H200 on a machine without one: registers, spills, shared memory.

Nothing runs: these are numbers of compiled code, and no measurement of speed. Needs the CUDA plugin
of the installed jax (V is its version, and nothing else of CUDA is needed) and a `ptxas`:

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V
    python examples/benchmarks/gpu_compile.py --ptxas /usr/local/cuda-13.0/bin/ptxas

From jax 0.11.2 on Mosaic's kernels are compiled, too, and with `jax-triton` installed, its own.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
from _common import write
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from pallas_kernels import DualLayout, DualScalars, SplitWeight, dual_step, dual_step_config

TARGET = Path(__file__).parent / "targets" / "h200.txt"
PERIODS = (96, 256, 320, 768, 1000, 1024, 4096)
INNERS = (1, 768)
SIZE = 1 << 24  # of a leaf, about
KERNEL = "dual_step"
CORRECTIONS = {None: None, 16: None, 24: "int8", 32: "int16"}


class Build(NamedTuple):
    """One kernel to compile."""

    period: int
    inner: int
    gradient: str
    fused: bool
    bits: int | None = None  # of a split weight, in the gradient's dtype; None for a float32
    backend: str = "triton"

    @property
    def layout(self) -> DualLayout:
        """Blocks of one stretch."""
        blocks = max(1, SIZE // (self.period * self.inner))
        return DualLayout(blocks, 1, self.period // 2, self.inner)


def set_environment(dump: str) -> None:
    """What the CUDA compiler reads when jax first asks for it: PTX goes to this folder."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ |= {"JAX_TRITON_DUMP_DIR": dump, "MOSAIC_GPU_DUMP_TO": dump}
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
    jax.config.update("jax_platforms", "cpu")


def builds() -> list[Build]:
    """Every layout in both forms and with split weights; the rest at the default period."""
    layouts = [(p, i) for i in INNERS for p in PERIODS]
    every = [Build(*x, "float32", fused) for x in layouts for fused in (False, True)]
    every += [Build(256, 1, dtype, True) for dtype in ("bfloat16", "float16")]
    every += [Build(*x, "bfloat16", True, 24) for x in layouts]
    every += [Build(256, 1, "bfloat16", True, bits) for bits in (16, 32)]
    every += [Build(256, 1, "float16", True, bits) for bits in (16, 24, 32)]
    backends = ["triton"]
    if jax.__version_info__ >= (0, 11, 2):
        backends.append("mosaic")
    if importlib.util.find_spec("jax_triton") is not None:
        backends.append("jax_triton")
    return [build._replace(backend=backend) for backend in backends for build in every]


def arguments(build: Build, device: Any) -> tuple[Any, Any]:
    """Of a step, without numbers: what it may overwrite, and the rest."""
    layout, sharding = build.layout, SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shape = (layout.blocks, layout.period, layout.inner)
    state = (array(shape, "uint8"), array(shape[::2], "float32"), array(shape[::2], "uint8"))
    dtype = None if not build.fused else "float32" if build.bits is None else build.gradient
    param, correction = array(shape, dtype), array(shape, CORRECTIONS[build.bits])
    rest = {
        "scalars": DualScalars(*(array((), "float32") for _ in DualScalars._fields)),
        "codebook": array((16,), "float32"),
        "phase": array((2,), "uint32"),
    }
    if build.fused:
        rest |= {name: array((), "float32") for name in ("learning_rate", "weight_decay")}
    return (state, param, correction), (array(shape, build.gradient), rest)


def compiled(build: Build, device: Any) -> Any:
    """A jitted step with donated parameter and state, as machine code."""

    def step(donated: Any, others: Any) -> Any:
        (state, param, correction), (g, rest) = donated, others
        split = None if build.bits is None else SplitWeight(correction, rest["phase"])
        others = {"layout": build.layout, "backend": build.backend}
        return dual_step(g, *state, param=param, split=split, **others, **rest)

    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
    )
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # The Triton dialect is deprecated from jax 0.11 on.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = jax.jit(step, donate_argnums=0).trace(*arguments(build, device))
        return traced.lower(lowering_platforms=("cuda",)).compile()


def assembled(ptxas: str, dump: Path) -> dict[str, int]:
    """What ptxas says of the kernel in the dump, which is emptied."""
    (path,) = (p for p in dump.rglob("*.ptx") if KERNEL in p.read_text("utf-8"))
    text = path.read_text("utf-8")
    (architecture,) = re.findall(r"\.target (\w+)", text)
    command = [ptxas, "-v", f"-arch={architecture}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # XLA's of its own kernels; of those that it is given, jax_triton's.
    told = [*dump.glob("*thunk_sequence.txt"), *dump.rglob("*.compile_info")]
    told += dump.glob("*.resources.txt")  # Mosaic's
    launches = "\n".join(p.read_text("utf-8") for p in told)
    shutil.rmtree(dump)
    dump.mkdir()
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared_bytes": int(
            re.findall(
                rf"(?:{KERNEL}.* shared_mem(?:ory|_bytes): ?|smem_scratch_bytes=)(\d+)", launches
            )[0]
        ),
        "shared_stores": text.count("st.shared"),
        "barriers": text.count("bar.sync"),
        "wide_loads": text.count("ld.global.v4"),
    }


def measure(build: Build, device: Any, ptxas: str, dump: Path) -> dict[str, Any]:
    """One row of the table."""
    executable = compiled(build, device)
    hlo = executable.as_text()
    config = dual_step_config(build.layout)
    return {
        **build._asdict(),
        "rows": config.rows,
        "columns": config.columns,
        "num_warps": config.num_warps,
        **assembled(ptxas, dump),
        "copies_in_hlo": len(re.findall(r" copy\(", hlo)),
        "aliased_outputs": len(re.findall(r"\((?:\d+), \{[^}]*\}, (?:may|must)-alias\)", hlo)),
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    """Compiles everything, writes the result file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ptxas", default=shutil.which("ptxas"))
    parser.add_argument("--out", default="gpu_compile.json", help="a file in examples/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        set_environment(name)
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text("utf-8"), topology="1x1x1"
        )
        device = topology.devices[0]
        rows = [measure(build, device, args.ptxas, Path(name)) for build in builds()]
    version = subprocess.run([args.ptxas, "--version"], capture_output=True, text=True, check=True)
    results = {
        "note": "Compiled ahead of time for an H200; not measured on a GPU.",
        "ptxas": version.stdout.strip().splitlines()[-1],
        "kernels": rows,
    }
    write(args.out, f"python examples/benchmarks/gpu_compile.py --out {args.out}", results)
    table = Table(*rows[0], title=results["note"])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=240).print(table)


if __name__ == "__main__":
    main()
