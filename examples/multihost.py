"""Several processes, one run: FSDP over all their devices, checkpoints, and a process that dies.

    python examples/multihost.py     # two processes of 4 virtual CPU devices: a minute of one core

Without arguments it plays the cluster: it starts two workers, kills one of them with SIGKILL in the
middle, starts both anew, and shows that they go on from the last checkpoint. On a real cluster run
one worker per host, with a directory that all of them see:

    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 0 --directory RUN
    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 1 --directory RUN

The model is that of `char_lm.py`. The parts to copy are `train` and `fsdp`.
"""

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from char_lm import GPT, Config, decay_mask, load_corpus, loss_fn, random_batch
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

MODEL = Config(d_model=64, layers=1, heads=2, context=32, batch=8, corpus_bytes=200_000)
SAID = "[process 0] "  # begins every line of ours


def fsdp(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, and where they lie: every matrix is cut along its longest axis, if that divides."""

    def place(x):
        spec: list[str | None] = [None] * x.ndim
        longest = max(range(x.ndim), key=lambda axis: x.shape[axis], default=0)
        if x.ndim >= 2 and x.shape[longest] % mesh.size == 0:
            spec[longest] = "fsdp"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree.map(place, tree)


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def make_optimizer(plan: gx.Plan) -> optax.GradientTransformationExtraArgs:
    gefen = gx.gefen(2e-3, weight_decay=0.1, mask=decay_mask, plan=plan)
    return optax.chain(optax.clip_by_global_norm(1.0), gefen)


def begin(shapes: Any, graphdef: nnx.GraphDef, windows: jax.Array, directory: Path) -> Any:
    """New parameters; a plan from their first gradient, the same on all processes, and saved."""
    where = shardings(shapes)
    new = jax.jit(lambda: params_of(GPT(MODEL, nnx.Rngs(0)))[1], out_shardings=where)
    gradient = jax.jit(jax.grad(loss_fn), static_argnums=1, out_shardings=where)
    params = new()
    plan = gx.calibrate(params, gradient(params, graphdef, windows))
    # Not `hash`: Python salts that of strings in every process.
    mine = hashlib.sha256(repr(plan.table() + plan.codebook).encode()).digest()
    multihost_utils.assert_equal(np.frombuffer(mine, np.uint8), "the processes' plans differ")
    if jax.process_index() == 0:
        plan.save(directory / "plan.json")
    multihost_utils.sync_global_devices("the plan is saved")
    say(f"{plan}, the same on {jax.process_count()} processes")
    tx = make_optimizer(plan)
    opt_state = jax.jit(tx.init, out_shardings=gx.state_sharding(tx, params))(params)
    return tx, {"params": params, "opt_state": opt_state}


def resume(shapes: Any, manager: ocp.CheckpointManager, directory: Path) -> Any:
    """The last checkpoint, with the plan that its state was made with."""
    tx = make_optimizer(gx.Plan.load(directory / "plan.json"))
    opt_state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(tx.init, shapes),
        gx.state_sharding(tx, shapes),
    )
    like = {"params": shapes, "opt_state": opt_state}
    state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    say(f"going on from step {manager.latest_step()}")
    return tx, state


def params_of(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.as_pure(params)


def train(directory: Path, steps: int, save_every: int) -> None:
    """One worker's program, which is the same on every process: goes on where the run stopped."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    corpus, by_row = load_corpus(None, MODEL.corpus_bytes), NamedSharding(mesh, P("fsdp"))

    def batch(number: int) -> jax.Array:
        # By the step's number, so that a run that goes on needs no state of its data.
        rows = random_batch(np.random.default_rng((0, number)), corpus.train, MODEL)
        return jax.make_array_from_callback(rows.shape, by_row, lambda index: rows[index])

    graphdef, shapes = params_of(nnx.eval_shape(lambda: GPT(MODEL, nnx.Rngs(0))))
    shapes = fsdp(shapes, mesh)
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(save_every), max_to_keep=2
    )
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
    first = manager.latest_step() or 0
    if first:
        tx, state = resume(shapes, manager, directory)
    else:
        tx, state = begin(shapes, graphdef, batch(0), directory)

    @jax.jit(donate_argnums=0, out_shardings=(shardings(state), None))
    def update(state, windows):
        params = state["params"]
        loss, grads = jax.value_and_grad(loss_fn)(params, graphdef, windows)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, loss

    for step in range(first + 1, steps + 1):
        state, loss = update(state, batch(step))
        say(f"step {step} loss {np.float32(loss)}")
        manager.save(step, args=ocp.args.StandardSave(state))  # asynchronous, if it is time
    say(f"sha256 of parameters and state {digest(state, mesh)}")
    manager.close()  # waits for the last save


def digest(tree: Any, mesh: jax.sharding.Mesh) -> str:
    """A fingerprint of every bit of a (small) tree of arrays."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)
    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(whole))
    return hashlib.sha256(data).hexdigest()


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(f"{SAID}{line}\n", end="", flush=True)  # one write: a whole line


# --------------------------------------------------------------------- a cluster on one machine


class Cluster:
    """Workers on this machine, each with 4 virtual devices; on leaving, what is left is killed.

    So does a scheduler: once one process is gone, the others wait for it in vain.
    """

    def __init__(self, directory: Path, *, steps: int, save_every: int, xla_flags: str = ""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{s.getsockname()[1]}"
        command = [sys.executable, __file__, "--coordinator", coordinator, "--processes", "2"]
        command += ["--directory", str(directory), "--steps", str(steps)]
        command += ["--save-every", str(save_every), "--process"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {xla_flags}",
            # What one start compiles, the next one reads.
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        self.out, self.log = (directory.with_name(directory.name + x) for x in (".out", ".log"))
        with self.out.open("w") as out, self.log.open("a") as log:
            self.workers = [
                subprocess.Popen(
                    [*command, str(i)], env=environment, stdout=log if i else out, stderr=log
                )
                for i in range(2)
            ]

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def lines(self) -> Iterator[str]:
        """What process 0 says, without what the network library tells of its own.

        The threads of that library mix their lines, halves of them may come before one of ours.

        Raises:
          RuntimeError: If a worker fails. On a busy machine that may be Gloo, which waits for
            30 seconds until all processes have compiled a program: start anew.
        """
        with self.out.open() as out:
            begun = ""  # a line whose end is not yet written
            while True:
                codes = [worker.poll() for worker in self.workers]
                *whole, begun = (begun + out.read()).split("\n")
                for line in whole:
                    _, said, rest = line.partition(SAID)
                    if said:
                        yield rest
                if any(codes):
                    raise RuntimeError(f"a worker failed:\n{self.log.read_text()[-2000:]}")
                if None not in codes:
                    return
                time.sleep(0.01)


def demonstrate(steps: int, save_every: int, kill_at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with Cluster(run, steps=steps, save_every=save_every) as cluster:
            for line in cluster.lines():
                print("first start: ", line, flush=True)
                if line.startswith(f"step {kill_at} "):
                    cluster.workers[1].kill()
                    print(f"process 1 is killed; the last checkpoint is of step {newest(run)}")
                    break
        with Cluster(run, steps=steps, save_every=save_every) as cluster:
            for line in cluster.lines():
                print("second start:", line, flush=True)


def newest(directory: Path) -> int:
    """The step of the last checkpoint that is whole: orbax renames it when all is written."""
    return max((int(p.name) for p in directory.glob("*") if p.name.isdigit()), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; without it: a demonstration")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--directory", type=Path, help="of checkpoints, seen by all processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    options = parser.parse_args()
    if options.coordinator is None:
        return demonstrate(options.steps, options.save_every, kill_at=13)
    jax.distributed.initialize(options.coordinator, options.processes, options.process)
    try:
        train(options.directory, options.steps, options.save_every)
    except BaseException:
        traceback.print_exc()
        # At once, so that the scheduler sees it: on the usual way out, JAX waits for the others.
        os._exit(1)


if __name__ == "__main__":
    main()
