"""Writes the tables of the README and of docs/ from the result files, between their markers.

python examples/benchmarks/tables.py
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _common import RESULTS
from quality_report import cells, read
from quality_statistics import BASELINE, SETUP, Comparison, by_setup, compare

_ROOT = Path(__file__).parent.parent.parent
PAGES = (
    _ROOT / "README.md",
    *(
        _ROOT / "docs" / f"{name}.md"
        for name in ("meshes", "plans", "quality", "speed", "total-memory")
    ),
    Path(__file__).parent / "research.md",
)


CPU_SUMMARY = ("gefen", "gefen, fused", "gefen, shared blocks")


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plans() -> str:
    """Bytes per parameter on real shapes."""
    kinds = (
        "dual code",
        *(f"shared blocks {how}" for how in ("by shape", "calibrated", "at worst")),
    )
    rows = [
        [
            name,
            f"{r['parameters'] / 1e6:,.1f}M",
            *(f"{r[kind]:.3f}" for kind in kinds),
        ]
        for name, r in _load("plans.json")["results"].items()
    ]
    return _markdown(["model", "parameters", *kinds], rows)


def cpu_step() -> str:
    """Time, compile time and temporaries beside adamw."""
    data = _load("cpu_step.json")
    names = next(iter(data["results"].values()))["step wall s"]["ratio"]
    rows = []
    for tree, numbers in data["results"].items():
        if tree.endswith(": traffic"):
            cells = (f"{numbers[name]:.1f} bytes" for name in names)
            rows.append([f"{tree[:-9]}: to read and write, per parameter", *cells, ""])
            continue
        if "temporaries" in tree:
            rows.append([tree, *(f"{numbers[name]:.3f} leaves" for name in names), ""])
            continue
        for what, row in numbers.items():
            cells = [f"{1e3 * row[n]:.0f} ms ({row['ratio'][n]:.2f})" for n in names]
            noise = max(row["spread"].values())
            rows.append([f"{tree}: {what[:-2]} time", *cells, f"± {noise:.0%}"])
    head = _markdown(["", *(f"{name} (ratio)" for name in names), "quartiles"], rows)
    env = data["environment"]
    return f"{head}\n\n{env['cpu']}, {env['cpu_cores']} cores, jax {env['jax']}."


def cpu_summary() -> str:
    """Ratios to adamw of time, and temporaries, of what the README speaks of."""
    results = _load("cpu_step.json")["results"]
    names = [n for n in results["64M leaf: temporaries, gradients kept"] if n in CPU_SUMMARY]
    rows = []
    for tree in ("one 16M leaf", "GPT-2 small, 148 leaves"):
        for what, title in (("step wall s", "step"), ("compile wall s", "compilation")):
            row = results[tree][what]
            cells_ = (f"{row['ratio'][name]:.1f}" for name in names)
            rows.append([f"{tree}: {title}", *cells_, f"± {max(row['spread'].values()):.0%}"])
    return _markdown(["times AdamW's", *names, "quartiles"], rows)


def char_lm() -> str:
    """The main job: losses over seeds, bytes, time, peak memory."""
    data = _load("char_lm.json")
    optimizers = data["optimizers"]
    losses = {name: list(o["validation_loss_per_seed"].values()) for name, o in optimizers.items()}
    rows = [
        [
            name,
            f"{mean(losses[name]):.3f} ({', '.join(f'{x:.3f}' for x in losses[name])})",
            f"{o['state_bytes_per_parameter']:.3f}",
            f"{o['train_step']['peak'] / 1e6:.1f} MB",
        ]
        for name, o in optimizers.items()
    ]
    head = ["", "validation loss (each seed)", "state, bytes per parameter", "peak of a step"]
    gaps = {
        name: [x - a for a, x in zip(losses["adamw"], of, strict=True)]
        for name, of in losses.items()
        if name != "adamw"
    }
    paired = "; ".join(f"{n} {mean(d):+.3f} (sd {stdev(d):.3f})" for n, d in gaps.items())
    return (
        f"{_markdown(head, rows)}\n\nPaired differences to adamw in nats, over"
        f" {len(losses['adamw'])} seeds: {paired}. A byte-level GPT of"
        f" {data['parameters'] / 1e6:.2f}M parameters, {data['config']['steps']} steps, on the"
        f" standard library of Python {data['python']} (sha256"
        f" {data['corpus']['sha256'][:12]}), a learning rate of {data['config']['lr']:g} for all."
    )


def _parts(setup: tuple[Any, ...]) -> list[str]:
    """Each field of a setup of the quality bench in words."""
    units = {"steps": "{} steps", "b2": "b2 {:g}", "grad_dtype": "{} gradients"}
    return [units.get(name, "{}").format(x) for name, x in zip(SETUP, setup, strict=True)]


# What was tried, but is no state that one can have: all of it is in quality.md.
_NOT_SHOWN = ("simulated", "gefen, pairs")
# Shared blocks, and what might give them their loss back: on the page of what was tried.
_SHARED = "gefen, shared blocks"
# The other optimizers, and narrow weights: a table of their own.
_TOTAL_MEMORY = ("adamw, split", "gefen, split", "gefen, 16", "gefen, bfl", "flash", "microadam")


def _quality(is_shown: Callable[[str], bool]) -> str:
    """Losses of the quality bench at AdamW's best learning rate, paired differences, bytes."""
    rows, usual = [], {}
    for setup, runs in by_setup(read(RESULTS / "quality.jsonl")).items():
        # The first setup of a task is its own; of others, what is different.
        first = usual.setdefault(setup[0], setup)
        parts = [title for title, a, b in zip(_parts(setup), setup, first, strict=True) if a != b]
        name = ", ".join([setup[0], *parts])
        shown = [of for of in compare(runs) if of.variant == BASELINE or is_shown(of.variant)]
        for of in shown if len(shown) > 1 else []:
            _, loss, difference, own, own_loss, _, seeds, size = cells(of)
            best = f"{own_loss} at {own}" if own else ""
            rows.append([name, of.variant, loss, difference, best, seeds, size])
    head = ["task", "", "loss", "less AdamW's", "best of the rates tried", "seeds", "bytes"]
    return _markdown(head, rows)


def quality() -> str:
    """States of gefen beside AdamW's, and of the PyTorch packages."""
    hidden = (*_NOT_SHOWN, *_TOTAL_MEMORY, f"{_SHARED}, ")
    return _quality(lambda variant: not variant.startswith(hidden))


# The README's columns: what one chooses between, and what one compares it with.
_SUMMARY = ("gefen", "gefen, wide codes", _SHARED, "torch gefen 1.2.3", "torch gefen-x 0.5.0")


def quality_summary() -> str:
    """Paired differences of every task in its own setup, and of the long runs."""
    rows, usual = [], {}
    for setup, runs in by_setup(read(RESULTS / "quality.jsonl")).items():
        task, steps, *others = setup
        first = usual.setdefault(task, setup)
        if others != list(first[2:]) or task == "gpt_spike":  # what happens once is no task
            continue
        found = {of.variant: of for of in compare(runs)}
        cells_ = [_difference_cell(found.get(name)) for name in _SUMMARY]
        name = task if steps == first[1] else f"{task}, {steps:,} steps"
        rows.append([name, f"{found[BASELINE].loss:.3f}", *cells_])
    names = ("gefen", "wide codes", "shared blocks", "torch gefen", "torch gefen-x")
    return _markdown(["task", "AdamW's loss", *names], rows)


def _difference_cell(of: Comparison | None) -> str:
    if of is None or of.difference is None:
        return ""
    mean_, half_width, pairs = of.difference
    interval = "" if math.isnan(half_width) else f" ± {half_width:.3f}"
    return f"{mean_:+.3f}{interval} ({pairs})"


def quality_shared() -> str:
    """Shared blocks, as they are and otherwise, beside AdamW."""
    return _quality(lambda variant: variant.startswith(_SHARED))


def quality_total_memory() -> str:
    """Narrow weights, FlashOptim and MicroAdam beside AdamW."""
    return _quality(lambda variant: variant.startswith(_TOTAL_MEMORY))


def update_error() -> str:
    """Updates of made-up gradients beside Adam's."""
    rows, results = [], _load("update_error.json")["results"]
    for name, of in results.items():
        numbers = [f"{x['error']:.3f} ({x['drift']:.3f})" for x in of.values()]
        largest = max(x["largest"] for x in of.values())
        adam = of["dual_code"]["adam"]  # the same beside every kind
        rows.append([name, f"{adam:.3f}", *numbers, f"{largest:.1f}"])
    kinds = (kind.replace("_", " ") for kind in next(iter(results.values())))
    return _markdown(["gradients", "Adam's", *kinds, "largest of all"], rows)


def nu_codes() -> str:
    """Updates beside AdamW's, by how two elements' second moments are kept."""
    rows = [
        [name, f"{of['error']:.2f}", f"{of['size']:.2f}"]
        for name, of in _load("nu_codes.json")["results"]["finetune"].items()
    ]
    return _markdown(["second moments of two elements", "error", "size"], rows)


def simulate_mesh() -> str:
    """Gigabytes per device on abstract meshes."""
    columns = ("adamw's state", "gefen's state", "in all, adamw", "in all, gefen")
    rows = []
    for model, meshes in _load("simulate_mesh.json")["results"]["models"].items():
        for devices, found in meshes.items():
            per_device = (found["bytes per device"][column] / 1e9 for column in columns)
            rows.append([model, f"{int(devices):,}", *(f"{n:.3f}" for n in per_device)])
    return _markdown(["GB per device", "devices", *columns], rows)


def memory() -> str:
    """Bytes per parameter of a whole training step, and what fits."""
    cpu, gpu = (_load(name)["results"] for name in ("memory.json", "memory_h200.json"))
    devices = next(iter(gpu.values()))["billions of parameters that fit"]
    rows = []
    for name, row in gpu.items():
        fits = row["billions of parameters that fit"].values()
        peaks = (f"{found[name]['bytes per parameter']:.2f}" for found in (gpu, cpu))
        kept = f"{row['kept between steps']:.2f}"
        rows.append([name, kept, *peaks, *(f"{n:.1f}" if n else "-" for n in fits)])
    head = ["", "kept between steps", "peak, H200", "peak, CPU"]
    return _markdown([*head, *(f"{device} holds" for device in devices)], rows)


def gpu_memory() -> str:
    """Temporaries and kernels of a step, compiled for a GPU."""
    trees = _load("gpu_memory.json")["results"]["trees"]
    names = list(next(iter(trees.values())))
    rows = [
        [
            tree,
            *(
                f"{found[n]['temporary_bytes_per_parameter']:.2f},"
                f" {found[n]['traffic_bytes_per_parameter']:.1f} ({found[n]['kernels']:,}),"
                f" {found[n]['compile_seconds']:.0f} s"
                for n in names
            ),
        ]
        for tree, found in trees.items()
    ]
    return _markdown(
        ["bytes per parameter: temporaries, traffic (kernels), time to compile", *names], rows
    )


def mesh_memory() -> str:
    """Temporaries of a step on a mesh, in pieces and in whole leaves."""
    results = _load("mesh_memory.json")["results"]
    names = list(next(iter(results["cuda"].values())))
    rows = [
        [
            f"{tree}, 8 {device}",
            *(
                f"{found[name]['temporary_bytes_per_local_parameter']:.2f}" if name in found else ""
                for name in names
            ),
        ]
        for platform, device in (("cuda", "H200"), ("cpu", "CPU devices"))
        for tree, found in results[platform].items()
    ]
    return _markdown(["temporaries in bytes per parameter of a device's share", *names], rows)


def train_memory() -> str:
    """Temporaries of a whole training step."""
    results = _load("train_memory.json")["results"]
    rows, names = [], []
    for devices, by_tokens in results.items():
        if devices == "note":
            continue
        for tokens, row in by_tokens.items():
            names = list(row)
            rows.append([f"{devices}, {tokens} each", *(f"{row[name]:.3f}" for name in names)])
    return _markdown(["bytes per parameter of a device's share", *names], rows)


def release_memory() -> str:
    """Temporaries of a step with gradient release."""
    results = _load("release_memory.json")["results"]
    devices = list(next(iter(results.values())))
    rows = [[name, *(f"{row[device]:.2f}" for device in devices)] for name, row in results.items()]
    return _markdown(["bytes per parameter", *devices], rows)


TABLES: dict[str, Callable[[], str]] = {
    "char_lm": char_lm,
    "quality": quality,
    "quality_summary": quality_summary,
    "quality_total_memory": quality_total_memory,
    "quality_shared": quality_shared,
    "plans": plans,
    "cpu_step": cpu_step,
    "cpu_summary": cpu_summary,
    "gpu_memory": gpu_memory,
    "memory": memory,
    "release_memory": release_memory,
    "mesh_memory": mesh_memory,
    "train_memory": train_memory,
    "simulate_mesh": simulate_mesh,
    "update_error": update_error,
    "nu_codes": nu_codes,
}


def with_tables(text: str) -> str:
    """A page's text with every table between its markers made anew."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}{TABLES[found[2]]()}\n{found[3]}"

    # Right after the marker a table may be missing, where it has not been made yet.
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
