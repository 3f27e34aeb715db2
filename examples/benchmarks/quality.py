"""Compares optimizers by validation loss, on tasks that take one core two minutes at most.

    python examples/benchmarks/quality.py --task gpt vit --seeds 0 1 2 --lr-factors 0.5 1 2
    python examples/benchmarks/quality.py --list              # what remains, and how long it takes
    python examples/benchmarks/quality.py --shard 0/2         # and 1/2 in another process
    python examples/benchmarks/quality_report.py              # tables and figure

Each run appends one line to `examples/results/quality.jsonl`; runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent))  # where char_lm is
from _common import RESULTS, commit, environment  # noqa: E402
from quality_tasks import TASKS  # noqa: E402
from quality_train import Outcome, Problem, Recipe, Trainer  # noqa: E402
from quality_variants import SIMULATED_BYTES, VARIANTS  # noqa: E402

DEFAULT_OUT = RESULTS / "quality.jsonl"


@dataclass(frozen=True)
class Job:
    """One run; two with equal fields, on equal Pythons, give equal results."""

    task: str
    variant: str
    seed: int
    lr: float
    steps: int
    b2: float
    grad_dtype: str

    @property
    def seconds(self) -> float:
        """What it should take on one core."""
        task = TASKS[self.task]
        return task.seconds * self.steps / task.steps

    @property
    def group(self) -> tuple[str, str, int]:
        """Jobs of one group share a compiled step."""
        return self.task, self.variant, self.seed


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All that was asked for: seed after seed, so that pairs are complete early."""
    jobs = []
    for task_name, seed, variant in itertools.product(options.task, options.seeds, options.variant):
        task = TASKS[task_name]
        for factor in options.lr_factors:
            lr = float(f"{task.best_lr * factor:.6g}")
            steps, b2 = options.steps or task.steps, options.b2 or task.b2
            jobs.append(Job(task_name, variant, seed, lr, steps, b2, options.grad_dtype))
    return jobs


def finished(path: Path) -> set[tuple[Job, str]]:
    """The jobs in a result file, each with its Python, because the text comes with Python."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(Job(**{f.name: row[f.name] for f in fields(Job)}), row["python"]) for row in rows}


def remaining(jobs: Sequence[Job], path: Path) -> list[Job]:
    done, python = finished(path), environment()["python"]
    return [job for job in jobs if (job, python) not in done]


def shard_of(jobs: Sequence[Job], shard: tuple[int, int]) -> list[Job]:
    """Every n-th group: what shares a compilation stays together."""
    index, count = shard
    groups = list(dict.fromkeys(job.group for job in jobs))[index::count]
    return [job for job in jobs if job.group in set(groups)]


def append(path: Path, row: dict[str, Any]) -> None:
    """In a single write at the file's end, so that lines of two processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())
    finally:
        os.close(file)


def row_of(job: Job, problem: Problem, trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    """A line of the result file; None stands for a loss that is not finite."""

    def plain(loss: float) -> float | None:
        return round(loss, 6) if math.isfinite(loss) else None

    versions = environment()
    held = outcome.state_bytes / trainer.parameters
    return {
        **asdict(job),
        "loss": plain(outcome.loss),
        "curve": [(step, plain(loss)) for step, loss in outcome.curve],
        "parameters": trainer.parameters,
        "state_bytes_per_parameter": round(SIMULATED_BYTES.get(job.variant, held), 4),
        "seconds": round(outcome.seconds, 1),
        "cpu_seconds": round(outcome.cpu_seconds, 1),
        "data_sha256": problem.data.sha256,
        **{name: versions[name] for name in ("python", "jax", "optax", "gefen_jax", "cpu")},
        **trainer.versions,
        "commit": commit(),
    }


def run(
    jobs: Sequence[Job], options: argparse.Namespace, make_trainer: type[Trainer] = Trainer
) -> Iterator[dict[str, Any]]:
    """Runs the jobs in order; a task's data and a group's step are made once."""
    commit()  # that of the code that is loaded, though it may change while this runs
    for task_name, of_task in itertools.groupby(jobs, lambda job: job.task):
        task = TASKS[task_name]
        problem = task.prepare(options.quick)
        for (_, variant, seed), of_group in itertools.groupby(of_task, lambda job: job.group):
            group = list(of_group)
            steps, b2 = group[0].steps, group[0].b2
            recipe = Recipe(variant, steps, b2, task.weight_decay, options.grad_dtype, task.spike)
            trainer = make_trainer(problem, recipe, seed)
            for job in group:
                row = row_of(job, problem, trainer, trainer.run(job.lr))
                append(options.out, row)
                yield row


def list_jobs(jobs: Sequence[Job], console: Console) -> None:
    """Prints what remains, a line per task and variant, with the minutes it should take."""
    table = Table("task", "variant", "seeds", "learning rates", "runs", "minutes")
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.task, job.variant), []).append(job)
    for (task, variant), of in groups.items():
        seeds = " ".join(map(str, sorted({job.seed for job in of})))
        rates = " ".join(f"{lr:g}" for lr in sorted({job.lr for job in of}))
        minutes = f"{sum(job.seconds for job in of) / 60:.0f}"
        table.add_row(task, variant, seeds, rates, str(len(of)), minutes)
    console.print(table)
    total = sum(job.seconds for job in jobs) / 60
    console.print(f"{len(jobs)} runs, about {total:.0f} minutes on one core")


def parse(
    argv: Sequence[str] | None, variants: Collection[str] = tuple(VARIANTS)
) -> argparse.Namespace:
    def shard(text: str) -> tuple[int, int]:
        index, count = map(int, text.split("/"))
        if not 0 <= index < count:
            raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, got {text}")
        return index, count

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variant", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr-factors", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    parser.add_argument("--b2", type=float, help="instead of each task's own")
    parser.add_argument("--grad-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="i/n")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--list", action="store_true", help="only print what remains")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    options = parser.parse_args(argv)
    if options.quick and options.out == DEFAULT_OUT:
        parser.error("--quick needs an --out of its own: its losses mean nothing")
    return options


def main(
    argv: Sequence[str] | None = None,
    variants: Collection[str] = tuple(VARIANTS),
    make_trainer: type[Trainer] = Trainer,
) -> None:
    options = parse(argv, variants)
    console = Console()
    # Sharded before what is done is left out, so that it does not matter when a process started.
    jobs = remaining(shard_of(jobs_of(options), options.shard), options.out)
    if options.list:
        list_jobs(jobs, console)
        return
    for i, row in enumerate(run(jobs, options, make_trainer), start=1):
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        console.print(
            f"{i}/{len(jobs)} {row['task']}, {row['variant']}, seed {row['seed']},"
            f" learning rate {row['lr']:g}: {loss} in {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
