"""The examples run, and write what they say they write."""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < 0.1 * losses[0]
    assert "bytes of optimizer state per parameter" in lines[-1]


def test_checkpointing(capsys):
    runpy.run_path(str(EXAMPLES / "checkpointing.py"), run_name="__main__")
    lines = [x for x in capsys.readouterr().out.splitlines() if "loss" in x]
    whole, first, second, before, adamw, gefen = (float(line.split()[-1]) for line in lines)
    # Interrupted or not, to the last digit; after a switch, it falls as AdamW's does, fifty-fold.
    assert second == whole < first
    assert gefen < before / 10 and adamw < before / 10


def test_main_job(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import char_lm

    with jax.numpy_rank_promotion("allow"):  # the model adds biases to batches, as Flax does
        result = char_lm.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "char_lm.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "char_lm.json").read_text())["parameters"] > 0
    for name, bytes_per_parameter in (("adamw", (7.9, 8.1)), ("gefen", (1.0, 2.0))):
        optimizer = result["optimizers"][name]
        assert np.isfinite(optimizer["validation_loss"])
        low, high = bytes_per_parameter
        assert low < optimizer["state_bytes_per_parameter"] < high
