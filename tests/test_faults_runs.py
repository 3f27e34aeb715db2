"""Faults of whole runs: bad gradients, full disks, kills, flipped bits. The last checkpoint stays.

Truncated files, flipped bits of a plan, and plans of other models: `test_checkpoints.py`. Kills of
a process among several: `test_multihost.py`.
"""

import functools
import gc
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gefen_jax as gx

# When orbax gives up one read, its other ones come back to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _params() -> Any:
    return {"w": _normal(0, 32, 256), "b": _normal(1, 8)}


def _grads(step: int) -> Any:
    return {"w": _normal(10 + step, 32, 256), "b": _normal(100 + step, 8)}


_PLAN = gx.plan_by_shape(_params())
_SHARED = gx.plan_by_shape(_params(), kind="shared_blocks")
_OPTIMIZERS = {
    "gefen": gx.gefen(1e-2, plan=_PLAN),
    "shared blocks": gx.gefen(1e-2, plan=_SHARED),
    "adamw": optax.adamw(1e-2),
}


@functools.cache
def _step(name: str) -> Any:
    def step(params, state, grads):
        updates, state = _OPTIMIZERS[name].update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def _train(name: str, now: Any, steps: range) -> Any:
    for i in steps:
        now = _step(name)(*now, _grads(i))
    return now


def _start(name: str) -> Any:
    return _params(), _OPTIMIZERS[name].init(_params())


def _assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Gradients that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_without_apply_if_finite(name, value):
    """It is loud and stays: AdamW's element, gefen's block. Others, and what was saved, are well.

    With `optax.apply_if_finite` nothing happens at all: `test_faults_numbers.py`, number 11.
    """
    saved = jax.device_get(_train(name, _start(name), range(2)))
    bad = _grads(2)
    bad["w"] = bad["w"].at[3, 5].set(value)
    params, state = _step(name)(*saved, bad)
    for i in (3, 4):
        params, state = _step(name)(params, state, _grads(i))
    lost = ~np.isfinite(params["w"])
    assert lost[3, 5] and not lost[np.arange(32) != 3].any()  # a block is a row here
    assert lost.sum() == (1 if name == "adamw" else 256)
    assert np.isfinite(params["b"]).all()
    # From what was saved before, it goes on as if it had never met that batch.
    expected = _train(name, _start(name), range(2))
    _assert_same(_step(name)(*saved, _grads(3)), _step(name)(*expected, _grads(3)))


# Disks that are full, and kills -----------------------------------------------------------------


def _save(manager: ocp.CheckpointManager, step: int, now: Any) -> None:
    manager.save(step, args=ocp.args.StandardSave({"params": now[0], "opt_state": now[1]}))
    manager.wait_until_finished()


def _restore(directory: Path) -> tuple[int, Any]:
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        like = dict(
            zip(("params", "opt_state"), jax.eval_shape(lambda: _start("gefen")), strict=True)
        )
        restored = manager.restore(step, args=ocp.args.StandardRestore(like))
    return step, (restored["params"], restored["opt_state"])


def _unlucky(directory: Path) -> None:
    """Another process: saves step 2, finds the disk full at step 4, and is killed at step 6."""
    now = _train("gefen", _start("gefen"), range(2))
    manager = ocp.CheckpointManager(directory)
    _PLAN.save(directory / "plan.json")
    _save(manager, 2, now)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # no file beyond 200 bytes
    for what, save in (
        ("plan", lambda: _SHARED.save(directory / "plan.json")),
        ("checkpoint", lambda: _save(manager, 4, now)),
    ):
        try:
            save()
        except Exception as error:
            print(f"{what}: {error}".splitlines()[0][:500])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    rename = os.rename

    def killed_at_the_commit(source, target, *args, **kwargs):
        if Path(target).name == "6":
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)

    os.rename = killed_at_the_commit
    _save(ocp.CheckpointManager(directory), 6, now)


def test_a_full_disk_and_a_kill_leave_the_checkpoint_before(tmp_path):
    run = tmp_path / "run"
    child = subprocess.run(
        [sys.executable, __file__, str(run)],
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    plan, checkpoint, killed = child.stdout.splitlines()
    assert "plan: [Errno 27] File too large" in plan
    assert "checkpoint: " in checkpoint and "File too large" in checkpoint and killed == "killed"
    # What was half written is no checkpoint, and the plan beside is the one before.
    assert not (run / "6").exists() and any(run.glob("6*tmp*"))
    assert not any(run.glob("plan.json.*"))
    _PLAN.check_saved(run / "plan.json")
    step, restored = _restore(run)
    assert step == 2
    expected = _train("gefen", _start("gefen"), range(2))
    _assert_same(restored, expected)
    _assert_same(_train("gefen", restored, range(2, 4)), _train("gefen", expected, range(2, 4)))


# Flipped bits -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_numpys_format_is_found(tmp_path):
    """A zip archive has a checksum of every array. What still loads was not part of one."""
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(_start("gefen")))}
    path = tmp_path / "state.npz"
    np.savez(path, allow_pickle=False, **leaves)
    data, found = path.read_bytes(), 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(data), 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            with np.load(path) as loaded:
                loaded = {name: loaded[name] for name in leaves}
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, OSError):
            found += 1
            continue
        _assert_same(loaded, leaves)
    assert found > 50


def test_a_flipped_bit_in_orbaxs_files(tmp_path):
    """An error, the same state, or other numbers of the same shapes and dtypes; never another step.

    Orbax 0.12 has no checksum of an array's bytes: a flipped bit of them goes unnoticed, for any
    optimizer. `gefen_jax.check_fingerprint` finds it: `test_fingerprint.py`.
    """
    now = jax.device_get(_train("gefen", _start("gefen"), range(1)))
    with ocp.CheckpointManager(tmp_path) as manager:
        _save(manager, 1, now)
        _save(manager, 2, now)
    rng, errors = np.random.default_rng(0), 0
    for path in sorted(p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size):
        data = path.read_bytes()
        bit = rng.integers(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            step, restored = _restore(tmp_path)
        except Exception:  # of many types: what the file was for decides
            errors += 1
        else:
            assert step == 2
            same = jax.tree.map(
                lambda x, y: x.shape == y.shape and x.dtype == y.dtype, restored, now
            )
            assert jax.tree.all(same)
        path.write_bytes(data)
    assert errors > 0
    _assert_same(_restore(tmp_path)[1], now)  # every file is as it was
    time.sleep(0.5)  # for the reads that are still under way, see above
    gc.collect()


if __name__ == "__main__":
    _unlucky(Path(sys.argv[1]))
