"""Two processes, killed again and again: is anything lost, and are the last bits the same?

    python examples/benchmarks/kill_and_resume.py       # some minutes, most of them for starting

Trains as `examples/multihost.py` does, once undisturbed, and once with 20 kills (SIGKILL) of one
process at random, seeded points: while it starts, within steps, while a checkpoint is written.
After each, both processes start anew. Every loss of every attempt, and in the end every bit of
parameters and state, must be that of the undisturbed run. Writes `kill_and_resume.json`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from _common import write

sys.path.insert(0, str(Path(__file__).parent.parent))
from multihost import Cluster, newest  # noqa: E402

_Result = TypeVar("_Result")
STEPS, SAVE_EVERY = 80, 3


def follow(line: str, losses: dict[int, str]) -> int:
    """Notes the loss of a step, which must be the same in every attempt; returns the step or 0."""
    if not line.startswith("step "):
        return 0
    _, step, _, loss = line.split()
    if losses.setdefault(int(step), loss) != loss:
        raise AssertionError(f"step {step}: loss {loss}, it was {losses[int(step)]} before")
    return int(step)


def whole_run(run: Path, losses: dict[int, str], *, steps: int, save_every: int) -> tuple[int, str]:
    """Runs to the end, from wherever the run is: the step it went on from, and its fingerprint."""
    first, line = 0, ""
    with Cluster(run, steps=steps, save_every=save_every) as cluster:
        for line in cluster.lines():
            if line.startswith("going on from step"):
                first = int(line.split()[-1])
            follow(line, losses)
    return first, line.split()[-1]


class Kill(NamedTuple):
    """Which process is killed, how many steps after it went on, and how many seconds after that."""

    process: int
    after: int
    pause: float


def killed_run(
    run: Path, losses: dict[int, str], kill: Kill, *, steps: int, save_every: int
) -> dict[str, Any]:
    """One attempt that ends with a kill: what was lost."""
    expected, first, step = newest(run), 0, 0
    with Cluster(run, steps=steps, save_every=save_every) as cluster:
        for line in cluster.lines():
            if line.startswith("going on from step"):
                first = int(line.split()[-1])
                if first != expected:
                    raise AssertionError(f"went on from {first}; the last checkpoint is {expected}")
            step = follow(line, losses) or step
            if step - first >= kill.after and (step or not kill.after):
                break
        else:
            raise AssertionError("the run ended before it was killed: it needs more steps")
        time.sleep(kill.pause)
        cluster.workers[kill.process].kill()
        writing = any(run.glob("*tmp*"))
    return {
        "killed_process": kill.process,
        "went_on_from": first,
        "last_step_seen": step,
        "checkpoint_after": newest(run),
        "while_writing": writing,
        "steps_to_repeat": max(0, step - newest(run)),
    }


def patiently(attempt: Callable[[], _Result]) -> _Result:
    """On a busy machine a start may fail, see `Cluster.lines`; that is one more crash."""
    for _ in range(3):
        try:
            return attempt()
        except RuntimeError as error:
            print(f"once more: {str(error).splitlines()[-1]}", flush=True)
    return attempt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, size = np.random.default_rng(options.seed), dict(steps=STEPS, save_every=SAVE_EVERY)
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[int, str] = {}
        whole = Path(folder) / "undisturbed"
        _, undisturbed = patiently(lambda: whole_run(whole, losses, **size))
        run, kills = Path(folder) / "killed", []
        for i in range(options.kills):
            # A step takes about half a second.
            kill = Kill(int(rng.integers(2)), int(rng.integers(7)), float(rng.uniform(0, 0.5)))
            kills.append(patiently(lambda kill=kill: killed_run(run, losses, kill, **size)))
            print(f"kill {i + 1}: {kills[-1]}", flush=True)
        first, fingerprint = patiently(lambda: whole_run(run, losses, **size))
    results = {
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "processes": 2,
        "devices_per_process": 4,
        "kills": kills,
        "kills_while_writing": sum(kill["while_writing"] for kill in kills),
        "last_attempt_from": first,
        "sha256_undisturbed": undisturbed,
        "sha256_killed": fingerprint,
        "bit_equal": fingerprint == undisturbed,
    }
    flags = f"--kills {options.kills} --seed {options.seed}"
    command = f"python examples/benchmarks/kill_and_resume.py {flags}"
    print(write("kill_and_resume.json", command, results))
    if not results["bit_equal"]:
        raise SystemExit("the killed run ended with other bits")


if __name__ == "__main__":
    main()
