"""The GPU kernels compiled for a GPU on a machine without one: registers, spills, shared memory.

Nothing runs: these are numbers of compiled code, and no measurement of speed. Needs the CUDA plugin
of the installed jax (V is its version, and nothing else of CUDA is needed) and a `ptxas`:

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V
    python examples/benchmarks/gpu_compile.py --ptxas /usr/local/cuda-13.0/bin/ptxas

From jax 0.11.2 on Mosaic's kernels are compiled, too, and with `jax-triton` installed, its own.
`--target` is h200, a100 (without Mosaic's, which want a Hopper or newer) or b200.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
from _common import RESULTS, write
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from pallas_kernels import (
    DualLayout,
    ExactLayout,
    ExactLeaf,
    SharedLayout,
    SharedTables,
    SplitWeight,
    StepScalars,
    dual_step,
    dual_step_config,
    exact_step_config,
    exact_steps,
    shared_step,
    shared_step_config,
)

TARGETS = Path(__file__).parent / "targets"
PERIODS = {
    "dual": (96, 256, 320, 768, 1000, 1024, 4096, 8192),
    "shared": (9, 96, 257, 768, 1000, 1024, 4096, 16384),
    "exact": (7, 768, 4096),  # the size of the first leaf; there are others
}
DEFAULT = {"dual": 256, "shared": 768, "exact": 768}  # of the forms that have one period only
LEAVES = 8  # of the exact step
INNERS = (1, 768)
SIZE = 1 << 24  # of a leaf, about
KERNEL = "(?:dual|shared|exact)_step"
LOOKUP_BINS = 8192
CORRECTIONS = {None: None, 16: None, 24: "int8", 32: "int16"}


class Build(NamedTuple):
    """One kernel to compile."""

    step: str  # "dual", "shared" or "exact"
    period: int
    inner: int
    gradient: str
    fused: bool
    bits: int | None = None  # of a split weight, in the gradient's dtype; None for a float32
    backend: str = "triton"
    exact_lookup: bool = True  # of shared blocks; or else the codebook is halved

    size: int = SIZE  # of a leaf, about
    leaves: int = 1

    @property
    def layout(self) -> Any:
        """Blocks of one stretch; of exact leaves some that are once or twice as large."""
        if self.step == "exact":
            return ExactLayout(tuple(self.period * (1 + i % 3) for i in range(self.leaves)))
        blocks = max(1, self.size // (self.period * self.inner))
        if self.step == "shared":
            return SharedLayout(blocks, self.period, self.inner)
        return DualLayout(blocks, 1, self.period // 2, self.inner)

    @property
    def config(self) -> Any:
        """How programs are cut."""
        if self.step == "exact":
            return exact_step_config()
        make: Any = {"dual": dual_step_config, "shared": shared_step_config}[self.step]
        return make(self.layout)


class Gpu(NamedTuple):
    """A target's description."""

    text: str

    def _field(self, name: str) -> str:
        return re.findall(rf'{name}: "?([^"\n]+)', self.text)[0]

    @property
    def name(self) -> str:
        """As the driver has it."""
        return self._field("device_description_str")

    @property
    def abstract(self) -> AbstractDevice:
        """What jax asks when it lowers."""
        cores = int(self._field("core_count"))
        return AbstractDevice(device_kind=self.name, num_cores=cores, platform="cuda")

    @property
    def backends(self) -> list[str]:
        """Those of the kernels that can be compiled for it here."""
        backends = ["triton"]
        if jax.__version_info__ >= (0, 11, 2) and int(self._field("major")) >= 9:
            backends.append("mosaic")
        if importlib.util.find_spec("jax_triton") is not None:
            backends.append("jax_triton")
        return backends


def set_environment(dump: str) -> None:
    """What the CUDA compiler reads when jax first asks for it: PTX goes to this folder."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ |= {"JAX_TRITON_DUMP_DIR": dump, "MOSAIC_GPU_DUMP_TO": dump}
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
    jax.config.update("jax_platforms", "cpu")


def builds(gpu: Gpu) -> list[Build]:
    """Every layout in both forms and with split weights; the rest at the default period."""
    every = []
    for step, periods in PERIODS.items():
        layouts, usual = [(step, p, i) for i in INNERS for p in periods], (step, DEFAULT[step], 1)
        forms = (False, True)
        if step == "exact":
            layouts, forms = layouts[: len(periods)], (True,)
        every += [Build(*x, "float32", fused) for x in layouts for fused in forms]
        every += [Build(*usual, dtype, True) for dtype in ("bfloat16", "float16")]
        every += [Build(*x, "bfloat16", True, 24) for x in layouts]
        every += [Build(*usual, "bfloat16", True, bits) for bits in (16, 32)]
        every += [Build(*usual, "float16", True, bits) for bits in (16, 24, 32)]
    every.append(Build("shared", DEFAULT["shared"], 1, "float32", True, exact_lookup=False))
    every = [x._replace(leaves=LEAVES if x.step == "exact" else 1) for x in every]
    return [
        build._replace(backend=backend)
        for backend in gpu.backends
        for build in every
        if build.step != "exact" or backend != "jax_triton"
    ]


def arguments(build: Build, device: Any) -> tuple[Any, Any]:
    """Of a step, without numbers: what it may overwrite, and the rest."""
    layout, sharding = build.layout, SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rest: dict[str, Any] = {
        "scalars": StepScalars(*(array((), "float32") for _ in StepScalars._fields)),
    }
    if build.fused:
        rest |= {name: array((), "float32") for name in ("learning_rate", "weight_decay")}
    dtype = None if not build.fused else "float32" if build.bits is None else build.gradient
    if build.step == "exact":
        dtypes = dtype, "float32", "float32", CORRECTIONS[build.bits]
        rest["phase"] = [array((2,), "uint32") for _ in layout.sizes]
        leaves = [[array((size,), x) for x in dtypes] for size in layout.sizes]
        return leaves, ([array((size,), build.gradient) for size in layout.sizes], rest)
    shape = (layout.blocks, layout.period, layout.inner)
    nu = {"dual": "uint8", "shared": "float32"}[build.step]
    state = (array(shape, "uint8"), array(shape[::2], "float32"), array(shape[::2], nu))
    param, correction = array(shape, dtype), array(shape, CORRECTIONS[build.bits])
    codebook, bins = array(({"dual": 16, "shared": 256}[build.step],), "float32"), (LOOKUP_BINS,)
    lookup = (array(bins, "uint8"), array(bins, "float32")) if build.exact_lookup else ()
    rest |= {"phase": array((2,), "uint32"), "tables": SharedTables(codebook, *lookup)}
    return (state, param, correction), (array(shape, build.gradient), rest)


def step_of(build: Build, interpret: bool = False) -> Any:
    """A step of what it may overwrite and the rest."""

    def step(donated: Any, others: Any) -> Any:
        if build.step == "exact":
            return _exact_steps(build, donated, others[0], others[1], interpret)
        (state, param, correction), (g, rest) = donated, others
        # Of 32 bits nothing is rounded.
        phase = None if build.bits == 32 else rest["phase"]
        split = None if build.bits is None else SplitWeight(correction, phase)
        how = {"param": param, "split": split, "layout": build.layout, "backend": build.backend}
        how |= {"interpret": interpret}
        if build.step == "dual":
            rest = rest | {"codebook": rest["tables"].codebook}
            return dual_step(g, *state, **how, **{k: x for k, x in rest.items() if k != "tables"})
        return shared_step(g, *state, **how, **{k: x for k, x in rest.items() if k != "phase"})

    return step


def _exact_steps(build: Build, leaves: Any, gradients: Any, rest: Any, interpret: bool) -> Any:
    """In the order in which they were given: XLA pairs buffers of one shape in that order."""
    rest, before = dict(rest), []
    for (param, mu, nu, low), phase in zip(leaves, rest.pop("phase"), strict=True):
        split = SplitWeight(low, None if build.bits == 32 else phase)
        before.append(ExactLeaf(param, mu, nu, None if build.bits is None else split))
    how: dict[str, Any] = {"backend": build.backend, "interpret": interpret}
    after = exact_steps(gradients, before, **how, **rest)
    return [(*x[:3], x.split and x.split.correction) for x in after]


def compiled(build: Build, gpu: Gpu, device: Any) -> Any:
    """A jitted step with donated parameter and state, as machine code."""
    types = (AxisType.Auto,)
    mesh = AbstractMesh((1,), ("x",), axis_types=types, abstract_device=gpu.abstract)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # The Triton dialect is deprecated from jax 0.11 on.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = jax.jit(step_of(build), donate_argnums=0).trace(*arguments(build, device))
        return traced.lower(lowering_platforms=("cuda",)).compile()


def ptx_in(dump: Path) -> Path:
    """The kernel's in the dump."""
    (path,) = (p for p in dump.rglob("*.ptx") if re.search(KERNEL, p.read_text("utf-8")))
    return path


def assembled(ptxas: str, dump: Path) -> dict[str, Any]:
    """What ptxas says of the kernel in the dump, which is emptied."""
    path = ptx_in(dump)
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
        "architecture": architecture,
        "threads": math.prod(map(int, re.findall(r"\.(?:req|max)ntid (.*)", text)[0].split(","))),
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


def measure(build: Build, gpu: Gpu, device: Any, ptxas: str, dump: Path) -> dict[str, Any]:
    """One row of the table."""
    executable = compiled(build, gpu, device)
    hlo, config = executable.as_text(), build.config
    rows, items, columns = config.tile(build.layout)
    return {
        **{name: x for name, x in build._asdict().items() if name != "size"},
        "rows": rows,
        "items": items,
        "columns": columns,
        **assembled(ptxas, dump),
        "copies_in_hlo": len(re.findall(r" copy\(", hlo)),
        "aliased_outputs": len(re.findall(r"\((?:\d+), \{[^}]*\}, (?:may|must)-alias\)", hlo)),
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    """Compiles everything, writes the result file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ptxas", default=shutil.which("ptxas"))
    parser.add_argument("--target", default="h200", choices=[p.stem for p in TARGETS.iterdir()])
    parser.add_argument("--step", nargs="+", default=list(PERIODS), choices=list(PERIODS))
    parser.add_argument("--backend", nargs="+", help="of the kernels that the target has")
    parser.add_argument("--out", help="a file in examples/results")
    args = parser.parse_args()
    out = args.out or f"gpu_compile{'' if args.target == 'h200' else f'_{args.target}'}.json"
    gpu = Gpu((TARGETS / f"{args.target}.txt").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        set_environment(name)
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.text, topology="1x1x1"
        )
        rows = [
            measure(build, gpu, topology.devices[0], args.ptxas, Path(name))
            for build in builds(gpu)
            if build.step in args.step and build.backend in (args.backend or gpu.backends)
        ]
    if set(args.step) != set(PERIODS):  # what the file has of the others stays
        before = json.loads((RESULTS / out).read_text("utf-8"))["results"]["kernels"]
        rows = [row for row in before if row["step"] not in args.step] + rows
    version = subprocess.run([args.ptxas, "--version"], capture_output=True, text=True, check=True)
    results = {
        "note": f"Compiled ahead of time for {gpu.name}; not measured on a GPU.",
        "ptxas": version.stdout.strip().splitlines()[-1],
        "kernels": rows,
    }
    command = f"python examples/benchmarks/gpu_compile.py --target {args.target} --out {out}"
    write(out, command, results)
    table = Table(*rows[0], title=results["note"])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=240).print(table)


if __name__ == "__main__":
    main()
