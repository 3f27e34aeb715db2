"""The benchmark that is written for GPUs runs, and its numbers belong together."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
import step_time

import gefen_jax as gx
import pallas_kernels


def test_an_optimizer_beside_adamw(tmp_path, monkeypatch, capsys):
    out = tmp_path / "step_time.json"
    options = ["--tree", "1M leaf", "--optimizer", "gefen, fused", "gefen, fused, jax_triton"]
    options += ["--rounds", "2", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *options])
    monkeypatch.setattr(step_time, "copy_bytes_per_second", lambda: 1e9)
    monkeypatch.setitem(step_time.TREES, "1M leaf", lambda: step_time._leaf(128))
    step_time.main()
    rows = json.loads(out.read_text())["results"]["trees"]["1M leaf"]
    row = rows["gefen, fused"]
    assert row["seconds"] > 0 and row["ratio"] > 0
    assert row["bytes_per_second"] == pytest.approx(
        row["traffic_bytes_per_parameter"] * 128**2 / row["seconds"]
    )
    # Gradient, parameter and state; the last two once more. Codebooks and small leaves add to it.
    assert 14 < row["traffic_bytes_per_parameter"] < 14.5
    # There is no such kernel for a CPU.
    assert rows["gefen, fused, jax_triton"]["failed"].startswith("NotImplementedError")
    assert "gefen, fused" in capsys.readouterr().out


@pytest.mark.skipif(
    not pallas_kernels.is_available(), reason=f"jax {jax.__version__} has no Triton dialect"
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_kernels_are_compared_with_the_plain_step(monkeypatch):
    """Interpreted: nothing differs, but all does where steps are twice as long."""
    tree = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    for name in ("gefen, shared blocks, fused, triton", "gefen, fused, triton"):
        assert step_time.differing(name, tree, "triton") == {"differ": 0, "out_of": 8192}
    monkeypatch.setitem(
        step_time.OPTIMIZERS, name, lambda tree: gx.fused_gefen(2e-3, backend="triton")
    )
    assert step_time.differing(name, tree, "triton")["differ"] > 8000


def test_every_optimizer_has_a_step():
    tree = step_time._leaf(128)
    for name in step_time.OPTIMIZERS:
        tx, step = step_time.optimizer(name, tree)
        assert callable(step)
        if not isinstance(tx, gx.FusedGefen):
            jax.eval_shape(tx.init, tree)
