"""What the benchmarks share: where results go, and what machine they come from."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent.parent / "results"


def environment() -> dict[str, Any]:
    """Versions and machine, to stand beside every number."""
    packages = ("jax", "jaxlib", "optax", "numpy", "gefen_jax")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "device": device.device_kind,
        "backend": jax.default_backend(),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the code, as it is at the first call; None outside of git.

    Changes that are not committed add "-dirty", but for result files: these come from the code.
    """
    git = functools.partial(subprocess.check_output, cwd=RESULTS.parent, text=True)
    try:
        name = git(["git", "rev-parse", "--short=10", "HEAD"]).strip()
        changed = git(["git", "status", "--porcelain", "--", ":/", ":(exclude)results"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty" if changed else name


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def write(name: str, command: str, results: Any) -> Path:
    """Writes a result file: the command that repeats it, the environment, the numbers."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / name
    data = {"command": command, "environment": environment(), "results": results}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path
