"""Two processes train one model, one is killed, and the run goes on as if nothing had been.

The same twenty times: `examples/benchmarks/kill_and_resume.py`, whose result file is read here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kill_and_resume import follow, patiently
from multihost import Cluster, newest

_RESULT = Path(__file__).parent.parent / "examples" / "results" / "kill_and_resume.json"
# A program that runs for a moment only need not be fast.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.once
def test_a_killed_process(tmp_path):
    run, losses = tmp_path / "run", {}

    def killed() -> int:
        said, step, again = [], 0, newest(run)
        with Cluster(run, steps=1000, save_every=2, xla_flags=_QUICK) as cluster:
            for line in cluster.lines():
                said.append(line)
                step = follow(line, losses) or step
                if newest(run) and step > newest(run):
                    cluster.workers[1].kill()
                    break
        assert again or any("the same on 2 processes" in line for line in said)
        return step

    last = patiently(killed)
    checkpoint = newest(run)
    assert 0 < checkpoint < last

    def resumed() -> list[str]:
        with Cluster(run, steps=last + 1, save_every=2, xla_flags=_QUICK) as cluster:
            return list(cluster.lines())

    said = patiently(resumed)
    assert said[0] == f"going on from step {checkpoint}"
    # `follow` compares each loss with that of the first time, to the last digit.
    assert [follow(line, losses) for line in said[1:-1]] == list(range(checkpoint + 1, last + 2))
    assert (run / "plan.json").exists()


def test_one_step_function_on_two_processes_beside_adamw():
    def both() -> list[str]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{s.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {_QUICK}",
        }
        workers = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("two_processes.py"), coordinator, str(i)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        try:
            said = [worker.communicate(timeout=100)[0] for worker in workers]
        except subprocess.TimeoutExpired as error:  # the other one has failed
            raise RuntimeError(str(error)) from error
        finally:
            for worker in workers:
                worker.kill()
        if any(worker.returncode for worker in workers):
            raise RuntimeError("\n".join(said))
        return said

    for said in patiently(both):
        for name in ("adamw", "gefen"):
            assert f"{name} on 2 processes: the bits of one" in said


def test_lines_that_another_library_breaks(tmp_path):
    class Ended:
        def poll(self) -> int:
            return 0

    said = Cluster.__new__(Cluster)
    said.workers, said.out = [Ended()], tmp_path / "run.out"
    said.out.write_text(
        "[Gloo] Rank 0[Gloo] Rank 0 is connected\n is connected\n"
        "[Gloo] [process 0] step 3 loss 1.5\n[process 0] step 4 loss 1.25\n[process 0] not yet wh"
    )
    assert list(said.lines()) == ["step 3 loss 1.5", "step 4 loss 1.25"]


def test_the_result_file():
    results = json.loads(_RESULT.read_text())["results"]
    kills, every = results["kills"], results["save_every"]
    assert len(kills) == 20 and {kill["killed_process"] for kill in kills} == {0, 1}
    assert results["bit_equal"] and results["sha256_killed"] == results["sha256_undisturbed"]
    for before, after in zip(kills, kills[1:], strict=False):
        # 0 where it was killed before it could say where it went on from.
        assert after["went_on_from"] in (0, before["checkpoint_after"])
        assert after["checkpoint_after"] >= before["checkpoint_after"]
    # At most the steps since a checkpoint, and those that went by while the next was written.
    assert all(0 <= kill["steps_to_repeat"] <= 2 * every for kill in kills)
