"""The examples of integrations run, train, and say what they should."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

_EXAMPLES = Path(__file__).parent.parent / "examples" / "integrations"


class Example(NamedTuple):
    """How many runs an example prints, what its last loss may be, and what else it must say."""

    runs: int = 1
    of_first_loss: float = 0.1  # 200 steps on one batch: all come down by far more
    says: Callable[[str], bool] = lambda printed: True


def _bytes(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"([\d.]+) bytes per parameter", printed)]


EXAMPLES = {
    "linen_train_state": Example(says=lambda printed: "Dense_0/kernel dual_code" in printed),
    "nnx_optimizer": Example(says=lambda printed: "layers/0/kernel shared_blocks" in printed),
    "nnx_release": Example(),
    "equinox_pair_axis": Example(
        says=lambda printed: (
            "layers/0/weight (256, 32) dual_code as asked: 256 along axis 0" in printed
        )
    ),
    # MultiSteps keeps a float32 sum.
    "gradient_accumulation": Example(
        runs=2, says=lambda printed: _bytes(printed)[1] - _bytes(printed)[0] > 3.99
    ),
    "ensemble_vmap": Example(runs=3),
    "lora": Example(says=lambda printed: "has not moved" in printed and "'weight'" not in printed),
    "host_offload": Example(says=lambda printed: "{'pinned_host'}" in printed),
    # Fresh batches: the loss comes down more slowly, and its average is smoother.
    "ema": Example(
        runs=2,
        of_first_loss=0.6,
        says=lambda printed: _losses(printed)[1][1] < _losses(printed)[0][1],
    ),
    # 4 and 1 against 2, 1 and 1.
    "mixed_precision": Example(
        runs=2, says=lambda printed: 0.9 < _bytes(printed)[0] - _bytes(printed)[1] < 1.1
    ),
}


def _losses(printed: str) -> list[tuple[float, float]]:
    found = re.findall(r"loss (\S+) to ([^\s,]+)", printed)
    return [(float(first), float(last)) for first, last in found]


def test_every_example_is_here():
    assert {path.stem for path in _EXAMPLES.glob("*.py")} == set(EXAMPLES)


@pytest.fixture
def quick_compilation():
    """What is compiled here runs for a moment only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_integration(name, capsys, quick_compilation):
    runpy.run_path(str(_EXAMPLES / f"{name}.py"), run_name="__main__")
    example, printed = EXAMPLES[name], capsys.readouterr().out
    losses = _losses(printed)
    assert len(losses) == example.runs
    for first, last in losses:
        assert last < example.of_first_loss * first
    assert example.says(printed), printed
