"""Writes the README's tables from the result files, between its markers.

python examples/benchmarks/tables.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _common import RESULTS

README = Path(__file__).parent.parent.parent / "README.md"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plans() -> str:
    """Bytes per parameter on real shapes."""
    rows = [
        [
            name,
            f"{r['parameters'] / 1e6:,.1f}M",
            f"{r['bytes per parameter by shape']:.3f}",
            f"{r['bytes per parameter calibrated']:.3f}",
            f"{r['bytes per parameter at worst']:.3f}",
        ]
        for name, r in _load("plans.json")["results"].items()
    ]
    return _markdown(["model", "parameters", "by shape", "calibrated", "worst case"], rows)


def cpu_step() -> str:
    """Time, compile time and temporaries beside adamw."""
    data = _load("cpu_step.json")
    rows = []
    for tree, numbers in data["results"].items():
        if "temporaries" in tree:
            cells = [f"{numbers[name]:.3f} leaves" for name in ("optax.adamw", "gefen")]
            rows.append([tree, *cells, ""])
            continue
        for what, row in numbers.items():
            cells = [f"{1e3 * row[name]:.0f} ms" for name in ("optax.adamw", "gefen")]
            noise = max(row["spread"].values())
            rows.append(
                [f"{tree}: {what[:-2]} time", *cells, f"{row['ratio']:.2f} (± {noise:.0%})"]
            )
    head = _markdown(["", "optax.adamw", "gefen", "ratio (quartiles of a time)"], rows)
    env = data["environment"]
    return f"{head}\n\n{env['cpu']}, {env['cpu_cores']} cores, jax {env['jax']}."


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
    gaps = [g - a for a, g in zip(losses["adamw"], losses["gefen"], strict=True)]
    head = ["", "validation loss (each seed)", "state, bytes per parameter", "peak of a step"]
    return (
        f"{_markdown(head, rows)}\n\nPaired difference gefen - adamw: {mean(gaps):+.3f} nats,"
        f" standard deviation {stdev(gaps):.3f} over {len(gaps)} seeds. A byte-level GPT of"
        f" {data['parameters'] / 1e6:.2f}M parameters, {data['config']['steps']} steps, on the"
        f" standard library of Python {data['python']} (sha256"
        f" {data['corpus']['sha256'][:12]}), AdamW's best learning rate for both."
    )


TABLES: dict[str, Callable[[], str]] = {"char_lm": char_lm, "plans": plans, "cpu_step": cpu_step}


def with_tables(text: str) -> str:
    """The README's text with every table made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have the markers of {name!r} once, found {count}")
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
