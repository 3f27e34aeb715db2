"""Time of one optimizer step beside `optax.adamw`, on a GPU; and here, small, to see that it runs.

One jitted step with donated parameters and state: `update` and `apply_updates`, or the fused step;
on a GPU once more by every kernel of `pallas_kernels`. Each optimizer takes turns with
`optax.adamw`, so that what else the machine does hits both, and only two of them need memory at a
time. A turn is several steps in a row. Medians after a warm-up; ratios are of a round's two turns.

Before a kernel is timed, three steps of it are compared with the plain step's: `differ` counts the
new parameters that differ by more than a few roundings (a handful may: a code that a rounding
decides otherwise). What fails is recorded, and the file is written after every row.

Bytes per second are those that the step has to read and to write (parameters, gradients, state,
once each way) by its time, beside what a plain copy reaches on the same machine.

    python examples/benchmarks/step_time.py               # all that is meant for the device
    python examples/benchmarks/step_time.py --tree "16M leaf" "GPT-2 small" --optimizer gefen
    python examples/benchmarks/step_time.py --reference   # besides, torch's AdamW and Gefen

`flashoptim-jax` is measured where it is installed, in bfloat16 as it wants it. `--reference` needs
torch and the package `gefen`, on a GPU of CUDA.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import write
from cpu_step import make_step, spread, traffic
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small, llama_1b

import gefen_jax as gx

BASELINE = "optax.adamw"
_KERNELS = ("mosaic", "triton", "jax_triton")
_RATE = 1e-3
COMMAND = "python examples/benchmarks/step_time.py"


def _leaf(side: int) -> Any:
    return {"w": jax.ShapeDtypeStruct((side, side), jnp.float32)}


TREES: dict[str, Callable[[], Any]] = {
    **{f"{4**i}M leaf": functools.partial(_leaf, 1024 * 2**i) for i in range(5)},
    "GPT-2 small": gpt2_small,
    "Llama-like 1.5B": llama_1b,
}
ON_CPU = ("1M leaf", "4M leaf")

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    BASELINE: lambda tree: optax.adamw(_RATE),
    "optax.adafactor": lambda tree: optax.adafactor(_RATE),
    "optax.lion": lambda tree: optax.lion(_RATE),
    "optax.contrib.muon": lambda tree: optax.contrib.muon(_RATE),
    "gx.flash_adamw": lambda tree: gx.flash_adamw(_RATE),
}


def _shared(tree: Any) -> gx.Plan:
    return gx.plan_by_shape(tree, kind="shared_blocks")


def _of_backend(backend: str | None) -> dict[str, Callable[[Any], Any]]:
    """The forms of gefen, by the plain code or by a kernel."""

    def fused(tree: Any, plan: gx.Plan | None = None) -> gx.FusedGefen:
        return gx.fused_gefen(_RATE, plan=plan, backend=backend)

    forms: dict[str, Callable[[Any], Any]] = {
        "gefen": lambda tree: gx.gefen(_RATE, backend=backend),
        "gefen, fused": fused,
        "gefen, shared blocks": lambda tree: gx.gefen(_RATE, plan=_shared(tree), backend=backend),
        "gefen, shared blocks, fused": lambda tree: fused(tree, _shared(tree)),
        "gefen, fused, split weights": lambda tree: gx.with_split_weights(fused(tree)),
        "gefen, shared blocks, fused, split weights": lambda tree: gx.with_split_weights(
            fused(tree, _shared(tree))
        ),
    }
    return forms if backend is None else {f"{name}, {backend}": f for name, f in forms.items()}


for _backend in (None, *_KERNELS):
    OPTIMIZERS |= _of_backend(_backend)
# Of weights and gradients in bfloat16.
FLASHOPTIM_JAX = "flashoptim-jax"


def is_narrow(name: str) -> bool:
    """Whether an optimizer is for weights in bfloat16."""
    return "split weights" in name or name == FLASHOPTIM_JAX


def optimizer(name: str, tree: Any) -> tuple[Any, Callable[..., Any]]:
    """What makes the state of an optimizer, and its step of (params, state, grads)."""
    if name != FLASHOPTIM_JAX:
        tx = OPTIMIZERS[name](tree)
        return tx, make_step(tx)
    tx = importlib.import_module("flashoptim_jax").flash_adamw(learning_rate=_RATE)
    return tx, tx.step


class Turns:
    """An optimizer's steps on arrays of its own."""

    def __init__(self, name: str, tree: Any, steps: int):
        dtype = jnp.bfloat16 if is_narrow(name) else jnp.float32
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
        tx, step = optimizer(name, tree)
        keys = iter(jax.random.split(jax.random.key(0), 1000))
        self._grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, dtype), like)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like)
        self._held = params, jax.jit(tx.init)(params)
        self._step, self._steps = jax.jit(step, donate_argnums=(0, 1)), steps
        self.traffic = traffic(tx, like)

    @property
    def params(self) -> Any:
        """As they are by now."""
        return self._held[0]

    def seconds(self) -> float:
        """Of a step, by a turn of several."""
        start = time.perf_counter()
        for _ in range(self._steps):
            self._held = self._step(*self._held, self._grads)
        jax.block_until_ready(self._held)
        return (time.perf_counter() - start) / self._steps


def differing(name: str, tree: Any, kernel: str) -> dict[str, int]:
    """How many new parameters of a kernel are not the plain step's, after three steps."""
    ends = []
    for which in (name.removesuffix(f", {kernel}"), name):
        turns = Turns(which, tree, 3)
        turns.seconds()
        ends.append(jax.tree.leaves(turns.params))

    @jax.jit
    def apart(x: Any, y: Any) -> Any:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        # A flip moves an element by a gap of the codebook, 0.27 of a step at most.
        return jnp.sum(~(jnp.abs(x - y) <= 1e-5 * jnp.abs(y) + 1e-3 * _RATE))

    found = sum(int(apart(x, y)) for x, y in zip(*ends, strict=True))
    return {"differ": found, "out_of": sum(x.size for x in ends[0])}


def copy_bytes_per_second(elements: int = 1 << 26, times: int = 20) -> float:
    """What a kernel that reads and writes an array in place reaches on this device."""
    step, x = jax.jit(lambda x: -x, donate_argnums=0), jnp.ones(elements)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(10):
            x = step(x)
        x.block_until_ready()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / statistics.median(seconds[2:])


def compare(name: str, tree: Any, rounds: int, steps: int) -> dict[str, float]:
    """An optimizer and the baseline, in turns."""
    both = [Turns(n, tree, steps) for n in (BASELINE, name)]
    measured = [[turns.seconds() for turns in both] for _ in range(rounds + 2)][2:]
    ours = [seconds for _, seconds in measured]
    ratios = [seconds / baseline for baseline, seconds in measured]
    size = sum(x.size for x in jax.tree.leaves(tree))
    median = statistics.median(ours)
    return {
        "seconds": median,
        "spread": spread(ours),
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "traffic_bytes_per_parameter": both[1].traffic,
        "bytes_per_second": both[1].traffic * size / median,
    }


def reference(tree: Any, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Torch's fused AdamW and the package `gefen` with its CUDA kernels, on the same shapes."""
    torch: Any = importlib.import_module("torch")
    gefen: Any = importlib.import_module("gefen")
    if not torch.cuda.is_available():
        raise SystemExit("--reference needs a GPU that torch can use")
    found = {}
    makes = {"torch AdamW, fused": functools.partial(torch.optim.AdamW, fused=True)}
    makes[f"torch gefen {importlib.metadata.version('gefen')}"] = functools.partial(
        gefen.Gefen, fused=True
    )
    for name, make in makes.items():
        params = [
            torch.nn.Parameter(torch.zeros(x.shape, device="cuda")) for x in jax.tree.leaves(tree)
        ]
        for p in params:
            p.grad = torch.randn_like(p)
        named = [(str(i), p) for i, p in enumerate(params)]
        tx, seconds = make(named, lr=_RATE), []
        for _ in range(rounds + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                tx.step()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / steps)
        found[name] = {"seconds": statistics.median(seconds[2:]), "spread": spread(seconds[2:])}
    return found


def names_for(gpu: bool) -> list[str]:
    """The optimizers to measure on such a device."""
    slow = () if gpu else (*_KERNELS, "muon")  # interpreted; minutes per step
    names = [name for name in OPTIMIZERS if not name.endswith(slow)]
    # Its kernels are for GPUs.
    if gpu and importlib.util.find_spec("flashoptim_jax") is not None:
        names.append(FLASHOPTIM_JAX)
    return names


def main() -> None:
    """Runs everything, prints a table, writes the result file."""
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", nargs="+", choices=TREES, default=list(TREES if gpu else ON_CPU))
    parser.add_argument("--optimizer", nargs="+", default=names_for(gpu))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3, help="of a turn")
    parser.add_argument("--reference", action="store_true")
    default = "step_time.json" if gpu else "step_time_cpu.json"
    parser.add_argument("--out", default=default, help="a file in examples/results")
    options = parser.parse_args()

    copy = copy_bytes_per_second()
    results: dict[str, Any] = {"copy_bytes_per_second": copy, "trees": {}}
    table = Table("", "", "ms", "of adamw", "GB/s", "of a copy")
    for tree_name in options.tree:
        tree = TREES[tree_name]()
        rows: dict[str, Any] = {}
        for name in options.optimizer:
            try:
                kernel = next((k for k in _KERNELS if name.endswith(f", {k}")), None)
                row: dict[str, Any] = {} if kernel is None else differing(name, tree, kernel)
                row |= compare(name, tree, options.rounds, options.steps)
            # Whatever it is (a kernel that this jax has not, no memory): the others are measured.
            except Exception as error:
                row = {"failed": f"{type(error).__name__}: {error}"[:500]}
            rows[name] = row
            results["trees"][tree_name] = rows
            write(options.out, COMMAND, results)
            if "failed" in row:
                table.add_row(tree_name, name, "failed")
                continue
            table.add_row(
                tree_name,
                name,
                f"{1e3 * row['seconds']:.3f}",
                f"{row['ratio']:.2f} ± {100 * row['ratio_spread']:.0f} %",
                f"{row['bytes_per_second'] / 1e9:.0f}",
                f"{100 * row['bytes_per_second'] / copy:.0f} %",
            )
        if options.reference:
            rows |= reference(tree, options.rounds, options.steps)
            write(options.out, COMMAND, results)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
