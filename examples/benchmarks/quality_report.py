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
from quality_statistics import (
    BASELINE,
    SETUP,
    Comparison,
    Paired,
    Row,
    by_setup,
    compare,
    losses,
    of_shared_seeds,
)
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
the same runs, and empty where only one was run. Differences are paired: a seed has the same
initialisation and the same batches for every optimizer; ± is the half-width of the 95 % t-interval
of their mean.

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
    # Of a single rate nobody knows whether it is the best.
    own = comparison.rates > 1 or comparison.own_lr != comparison.lr
    return [
        comparison.variant,
        _loss(comparison.loss),
        "" if itself else _paired(comparison.difference),
        f"{comparison.own_lr:g}" if own else "",
        _loss(comparison.own_loss) if own else "",
        _paired(comparison.own_difference) if own and not itself else "",
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
    """Per setup: curves at the baseline's best learning rate, less the baseline's, losses by rate.

    All are means over the seeds that what is compared has in common.
    """
    figure, axes = plt.subplots(
        len(setups), 3, figsize=(20, 5 * len(setups)), layout="constrained", squeeze=False
    )
    colors = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for (left, middle, right), (setup, rows) in zip(axes, setups.items(), strict=True):
        base = [row for row in rows if row["variant"] == BASELINE]
        for index, comparison in enumerate(compare(rows)):
            of = [row for row in rows if row["variant"] == comparison.variant]
            here = [row for row in of if row["lr"] == comparison.lr]
            # More variants than colours: those of the second round are dashed.
            style = dict(
                color=colors[index % len(colors)],
                linestyle="-" if index < len(colors) else "--",
                marker=".",
                label=comparison.variant,
            )
            left.plot(*_curve(here), **style)
            middle.plot(*_curve_less(here, base), **style)
            if comparison.rates > 1:
                right.plot(*_losses_by_lr(of), **style)
        left.set(xlabel="step", ylabel="validation loss", title=title_of(setup), yscale="log")
        middle.set(xlabel="step", ylabel=f"validation loss less {BASELINE}'s")
        # Both 0.001 and 0.5 are to be seen.
        middle.set_yscale("symlog", linthresh=0.02)
        right.set(xlabel="learning rate", ylabel="final validation loss", xscale="log")
        right.set_visible(right.has_data())
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(1, 1),
            bbox_transform=right.transAxes,
            fontsize="small",
        )
    figure.savefig(path, dpi=60, bbox_inches="tight")
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


def _curve_less(rows: Sequence[Row], base: Sequence[Row]) -> tuple[list[int], list[float]]:
    """The mean of paired differences to the baseline at that learning rate, at every step."""
    curves = {(row["lr"], row["seed"]): dict(row["curve"]) for row in base}
    points: dict[int, list[float]] = {}
    for row in rows:
        of_base = curves.get((row["lr"], row["seed"]), {})
        for step, loss in row["curve"]:
            if step in of_base:
                known = None not in (loss, of_base[step])
                points.setdefault(step, []).append(loss - of_base[step] if known else math.nan)
    return list(points), [mean(of) for of in points.values()]


def _losses_by_lr(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Over the seeds that most rates have: others would bend the line by their luck."""
    judged = of_shared_seeds(losses(rows, rows[0]["variant"]))
    found = {lr: mean(of) for lr, of in sorted(judged.items())}
    return list(found), [x if math.isfinite(x) else math.nan for x in found.values()]


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
