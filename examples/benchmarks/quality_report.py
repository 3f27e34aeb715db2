"""Prints and writes what the quality bench has found so far.

    python examples/benchmarks/quality_report.py

It reads `examples/results/quality.jsonl` and writes `quality.md`, `quality.png` (curves) and
`quality_gap.png` (the loss gap against the bytes of the state) beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from _common import RESULTS
from quality_statistics import BASELINE, SETUP, Comparison, Paired, Row, by_setup, compare
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # the figure goes to a file, so no display is needed
import matplotlib.pyplot as plt  # noqa: E402

HEADINGS = (
    *("", "validation loss", f"difference to {BASELINE}", "best learning rate", "loss there"),
    *("difference there", "seeds", "state, bytes per parameter"),
)
INTRODUCTION = f"""# Optimizers by validation loss

Mean over seeds of the validation loss in nats: the first two columns at the learning rate that is
best for {BASELINE}, the next three at each optimizer's own best of those that were run, chosen by
the same runs. Differences are paired: a seed has the same initialisation and the same batches for
every optimizer; ± is the half-width of the 95 % t-interval of their mean.

`python examples/benchmarks/quality.py`, then `python examples/benchmarks/quality_report.py`
"""


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def title_of(setup: tuple[Any, ...]) -> str:
    values = dict(zip(SETUP, setup, strict=True))
    return (
        f"{values['task']}: {values['steps']} steps, b2 {values['b2']:g},"
        f" {values['grad_dtype']} gradients, data {values['data_sha256'][:8]}"
    )


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _paired(difference: Paired | None) -> str:
    if difference is None or not math.isfinite(difference.mean):
        return ""
    if math.isnan(difference.half_width):
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} ± {difference.half_width:.4f}"


def cells(comparison: Comparison) -> list[str]:
    """A variant's row, under `HEADINGS`; the baseline's differences to itself are left out."""
    itself = comparison.variant == BASELINE
    return [
        comparison.variant,
        _loss(comparison.loss),
        "" if itself else _paired(comparison.difference),
        f"{comparison.own_lr:g}",
        _loss(comparison.own_loss),
        "" if itself else _paired(comparison.own_difference),
        str(comparison.seeds),
        f"{comparison.bytes_per_parameter:.3f}",
    ]


def print_tables(setups: dict[tuple[Any, ...], list[Row]], console: Console) -> None:
    for setup, rows in setups.items():
        table = Table(*HEADINGS, title=title_of(setup))
        for comparison in compare(rows):
            table.add_row(*cells(comparison))
        console.print(table)


def markdown(setups: dict[tuple[Any, ...], list[Row]]) -> str:
    parts = [INTRODUCTION]
    for setup, rows in setups.items():
        lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, compare(rows))]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        first = rows[0]
        where = (
            f"{first['parameters'] / 1e6:.2f}M parameters trained; Python {first['python']},"
            f" jax {first['jax']}, {first['cpu']}."
        )
        parts.append(f"## {title_of(setup)}\n\n{table}\n\n{where}\n")
    return "\n".join(parts)


def plot(setups: dict[tuple[Any, ...], list[Row]], path: Path) -> None:
    """Per setup the curves at the baseline's best learning rate, and the losses by rate."""
    figure, axes = plt.subplots(
        len(setups), 2, figsize=(12, 4 * len(setups)), layout="constrained", squeeze=False
    )
    for (left, right), (setup, rows) in zip(axes, setups.items(), strict=True):
        for index, comparison in enumerate(compare(rows)):
            of = [row for row in rows if row["variant"] == comparison.variant]
            style = dict(color=f"C{index}", label=comparison.variant)
            left.plot(*_curve([row for row in of if row["lr"] == comparison.lr]), "o-", **style)
            right.plot(*_losses_by_lr(of), "o-", **style)
        left.set(xlabel="step", ylabel="validation loss", title=title_of(setup), yscale="log")
        right.set(xlabel="learning rate", ylabel="final validation loss", xscale="log")
        right.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# States of more and more bytes, of the same algorithm: Adam with decoupled weight decay.
BY_BYTES = ("gefen, shared blocks", "gefen", "gefen, wide codes", "flash_adamw", BASELINE)


def plot_gap(setups: dict[tuple[Any, ...], list[Row]], path: Path) -> None:
    """What fewer bytes cost: the gap to the baseline, with its interval, where seeds give one."""
    shown = {setup: rows for setup, rows in setups.items() if len(_by_bytes(rows)) > 2}
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.2 * len(shown), 3.6), layout="constrained", squeeze=False
    )
    for axis, (setup, rows) in zip(axes[0], shown.items(), strict=True):
        axis.axhline(0, color="0.8")
        for comparison in _by_bytes(rows):
            gap = comparison.difference or Paired(0.0, math.nan, 0)
            width = 0.0 if math.isnan(gap.half_width) else gap.half_width
            axis.errorbar(
                comparison.bytes_per_parameter,
                gap.mean,
                width,
                fmt="o",
                capsize=3,
                color=f"C{BY_BYTES.index(comparison.variant)}",
                label=f"{comparison.variant} ({comparison.seeds})",
            )
        axis.set(xlabel="state, bytes per parameter", xscale="log", title=setup[0])
        axis.set_xticks([1, 1.5, 2, 4, 8], labels=["1", "1.5", "2", "4", "8"])
        axis.minorticks_off()
        axis.legend(fontsize="x-small")
    axes[0][0].set_ylabel(f"validation loss less {BASELINE}'s")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _by_bytes(rows: Sequence[Row]) -> list[Comparison]:
    return [comparison for comparison in compare(rows) if comparison.variant in BY_BYTES]


def _curve(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Mean over seeds at the steps of the curve; what diverged is a gap."""
    points: dict[int, list[float]] = {}
    for row in rows:
        for step, loss in row["curve"]:
            points.setdefault(step, []).append(math.nan if loss is None else loss)
    return list(points), [mean(of) for of in points.values()]


def _losses_by_lr(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    found: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["lr"]):
        found.setdefault(row["lr"], []).append(math.nan if row["loss"] is None else row["loss"])
    return list(found), [mean(of) for of in found.values()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--out", type=Path, help="folder; the one of the results by default")
    parser.add_argument("--against", help="prints differences to this variant only")
    options = parser.parse_args(argv)
    setups = by_setup(read(options.results))
    # Where the output is no terminal (a log, a pipe), rich would fold the tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for setup in [setup for setup, rows in setups.items() if not compare(rows)]:
        console.print(f"no {BASELINE} yet, left out: {title_of(setup)}")
        del setups[setup]
    if not setups:
        raise SystemExit(f"nothing to compare: run quality.py --variant {BASELINE}")
    if options.against:
        for setup, rows in setups.items():
            console.print(title_of(setup))
            for found in compare(rows, options.against):
                console.print(f"  {found.variant}: {_paired(found.difference)}")
        return
    print_tables(setups, console)
    folder = options.out or options.results.parent
    (folder / "quality.md").write_text(markdown(setups), encoding="utf-8")
    plot(setups, folder / "quality.png")
    plot_gap(setups, folder / "quality_gap.png")


if __name__ == "__main__":
    main()
