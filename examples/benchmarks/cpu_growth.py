"""How a step's time grows with a leaf, and its compile time with their number, beside AdamW's.

python examples/benchmarks/cpu_growth.py
python examples/benchmarks/cpu_growth.py --leaf 16M  # some rows anew, in the file that there is
"""

import argparse
import itertools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from _common import RESULTS, write
from cpu_step import ALL, BASELINE, compile_seconds, spread, step_seconds, weights
from rich.console import Console
from rich.table import Table
from shapes import transformer_block

SIDES = {"4M": 2048, "16M": 4096, "64M": 8192, "256M": 16384}
LEAVES = {10: 3, 100: 3, 1000: 2}  # how many, and how often they are compiled


def _leaves(number: int) -> Any:
    """The first so many leaves of a GPT: of twelve in a layer four are matrices."""
    layers = [transformer_block(512, 2048) for _ in range(-(-number // 12))]
    return {f"{i}": x for i, x in enumerate(jax.tree.leaves(layers)[:number])}


def _row(seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **medians,
        "ratio": {name: value / medians[BASELINE] for name, value in medians.items()},
        "spread": {name: spread(values) for name, values in seconds.items()},
    }


def main() -> None:
    """Runs everything, writes `cpu_growth.json` after every row, prints a table."""
    parser = argparse.ArgumentParser(description="How step and compile times grow.")
    parser.add_argument("--leaf", nargs="+", choices=SIDES, help="only these rows; others are kept")
    parser.add_argument("--compile", action="store_true", help="only the rows of compile times")
    args = parser.parse_args()
    some = args.compile or args.leaf is not None
    results: dict[str, Any] = {}
    if some:
        results = json.loads((RESULTS / "cpu_growth.json").read_text(encoding="utf-8"))["results"]

    def add(name: str, seconds: dict[str, list[float]]) -> None:
        results[name] = _row(seconds)
        write("cpu_growth.json", "python examples/benchmarks/cpu_growth.py", results)

    for name in args.leaf or (() if args.compile else SIDES):
        side = SIDES[name]
        tree = {"w": jax.ShapeDtypeStruct((side, side), jnp.float32)}
        wall = {n: times[0] for n, times in step_seconds(tree).items()}
        add(f"one {name} leaf: step wall s", wall)
    for number, times in LEAVES.items() if args.compile or not some else ():
        tree = _leaves(number)
        wall = {
            name: compile_seconds(make(tree), weights(name, tree), times)[0]
            for name, make in ALL.items()
        }
        add(f"{number} leaves: compile wall s", wall)
    for few, many in itertools.pairwise(LEAVES):
        more, less = (results[f"{number} leaves: compile wall s"] for number in (many, few))
        results[f"{few} to {many} leaves: growth of compile wall"] = {
            name: more[name] / less[name] for name in ALL
        }
    write("cpu_growth.json", "python examples/benchmarks/cpu_growth.py", results)
    table = Table("", *(f"{name}, ratio" for name in ALL))
    for row, numbers in results.items():
        if "ratio" in numbers:
            cells = [f"{1e3 * numbers[n]:.0f} ms, {numbers['ratio'][n]:.2f}" for n in ALL]
        else:
            cells = [f"{numbers[n]:.1f}" for n in ALL]
        table.add_row(row.removesuffix(" s"), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
