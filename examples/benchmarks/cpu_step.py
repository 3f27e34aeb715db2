"""Time, compile time and memory of one optimizer step on this machine, beside `optax.adamw`.

One jitted step with donated parameters and state: `update` and `apply_updates`, or the fused step.
The optimizers take turns in one run, so that whatever else the machine does hits all; medians after
a warm-up. All ratios are to `optax.adamw` with everything in float32. Two optimizers have weights
and gradients in bfloat16: the fused step with split weights, which trains 24 bits of each; and
`optax.adamw` on the same arrays, whose moments are then in bfloat16, too, and whose weights lose
what bfloat16 cannot hold: a baseline of time, not of what is learned.

    python examples/benchmarks/cpu_step.py
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import write
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small

import gefen_jax as gx

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "optax.adamw": lambda tree: optax.adamw(1e-3),
    "gefen": lambda tree: gx.gefen(1e-3),
    "gefen, fused": lambda tree: gx.fused_gefen(1e-3),
    "gefen, shared blocks": lambda tree: gx.gefen(
        1e-3, plan=gx.plan_by_shape(tree, kind="shared_blocks")
    ),
}
# Of weights and gradients in bfloat16.
NARROW: dict[str, Callable[[Any], Any]] = {
    "optax.adamw, bfloat16": lambda tree: optax.adamw(1e-3),
    "gefen, fused, split weights": lambda tree: gx.with_split_weights(gx.fused_gefen(1e-3)),
}
ALL = OPTIMIZERS | NARROW
BASELINE = "optax.adamw"
TREES: dict[str, Callable[[], Any]] = {
    "one 16M leaf": lambda: {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)},
    "GPT-2 small, 148 leaves": gpt2_small,
}
ROUNDS, WARM_UP, COMPILES = 25, 4, 5


def weights(name: str, tree: Any) -> Any:
    """The weights of an optimizer, and its gradients, without values."""
    dtype = jnp.bfloat16 if name in NARROW else jnp.float32
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def make_step(tx: optax.GradientTransformationExtraArgs | gx.FusedGefen) -> Callable[..., Any]:
    """The step as a training loop has it."""
    if isinstance(tx, gx.FusedGefen):
        return lambda params, opt_state, grads: tx.step(grads, opt_state, params)

    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def compile_seconds(tx: Any, tree: Any, times: int = COMPILES) -> tuple[list[float], list[float]]:
    """Seconds of wall time and of CPU time from tracing to machine code, several times."""
    wall, cpu = [], []
    state = jax.eval_shape(tx.init, tree)
    for _ in range(times):
        jax.clear_caches()
        start = time.perf_counter(), time.process_time()
        jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(tree, state, tree).compile()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return wall, cpu


def step_seconds(tree: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds (wall, CPU) of every round of every optimizer, taking turns."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    wide = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), tree)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    runs = {}
    for name, make in ALL.items():
        tx = make(tree)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), weights(name, tree))
        step = jax.jit(make_step(tx), donate_argnums=(0, 1))
        runs[name] = [step, params, jax.jit(tx.init)(params)]
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for round_ in range(ROUNDS):
        for name, (step, params, opt_state) in runs.items():
            grads = narrow if name in NARROW else wide
            start = time.perf_counter(), time.process_time()
            params, opt_state = jax.block_until_ready(step(params, opt_state, grads))
            if round_ >= WARM_UP:
                seconds[name][0].append(time.perf_counter() - start[0])
                seconds[name][1].append(time.process_time() - start[1])
            runs[name] = [step, params, opt_state]
    return seconds


def temporaries(donate_gradients: bool) -> dict[str, float]:
    """Temporaries of a step on one 64M leaf, in float32 leaves, by the compiler's analysis."""
    found = {}
    for name, make in ALL.items():
        leaf = weights(name, {"w": jax.ShapeDtypeStruct((8192, 8192), jnp.float32)})
        tx = make(leaf)
        donated = (0, 1, 2) if donate_gradients else (0, 1)
        with warnings.catch_warnings():
            # No result has room for them; what counts is that nothing needs a leaf of its own.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            lowered = jax.jit(make_step(tx), donate_argnums=donated).lower(
                leaf, jax.eval_shape(tx.init, leaf), leaf
            )
        memory = lowered.compile().memory_analysis()
        assert memory is not None, "this backend has no memory analysis"
        found[name] = memory.temp_size_in_bytes / (4 * 8192 * 8192)
    return found


def traffic(tx: Any, tree: Any) -> float:
    """Bytes per parameter that a step has to read and to write: all but the gradients is both."""

    def nbytes(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    grads = nbytes(tree)
    kept = nbytes((tree, jax.eval_shape(tx.init, tree)))
    return (grads + 2 * kept) / sum(x.size for x in jax.tree.leaves(tree))


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def main() -> None:
    """Runs everything, prints a table, writes `cpu_step.json`."""
    results: dict[str, Any] = {}
    table = Table("", *(f"{name}, ratio" for name in ALL))
    for tree_name, make_tree in TREES.items():
        tree = make_tree()
        measured = {
            name: dict(zip(("wall", "cpu"), s, strict=True))
            for name, s in step_seconds(tree).items()
        }
        compiled = {
            name: dict(zip(("wall", "cpu"), seconds, strict=True))
            for name, make in ALL.items()
            for seconds in [compile_seconds(make(tree), weights(name, tree))]
        }
        rows = {}
        for what, source in (("step", measured), ("compile", compiled)):
            for clock in ("wall", "cpu"):
                medians = {name: statistics.median(source[name][clock]) for name in ALL}
                rows[f"{what} {clock} s"] = {
                    **medians,
                    "ratio": {n: x / medians[BASELINE] for n, x in medians.items()},
                    "spread": {name: spread(source[name][clock]) for name in ALL},
                }
        results[tree_name] = rows
        for row, numbers in rows.items():
            table.add_row(
                f"{tree_name}: {row[:-2]}",
                *(f"{1e3 * numbers[n]:.1f} ms, {numbers['ratio'][n]:.2f}" for n in ALL),
            )
        moved = {name: traffic(make(tree), weights(name, tree)) for name, make in ALL.items()}
        results[f"{tree_name}: traffic"] = moved
        table.add_row(f"{tree_name}: traffic", *(f"{moved[name]:.2f} bytes" for name in ALL))
    for donated in (False, True):
        row = f"64M leaf: temporaries, gradients {'donated' if donated else 'kept'}"
        results[row] = temporaries(donated)
        table.add_row(row, *(f"{results[row][name]:.4f} leaves" for name in ALL))
    Console(width=160).print(table)
    write("cpu_step.json", "python examples/benchmarks/cpu_step.py", results)


if __name__ == "__main__":
    main()
