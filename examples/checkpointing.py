"""Stop and go on: checkpoints of gefen's state, and a run of AdamW that moves over to gefen."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import gefen_jax as gx

STEPS = 100
x = jax.random.normal(jax.random.key(1), (256, 32))
y = jnp.sin(jnp.cumsum(x, axis=1))


def new_model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(32, 512, rngs=rngs), nnx.gelu, nnx.Linear(512, 32, rngs=rngs))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.as_pure(params)


def train(tx, graphdef, params, opt_state, first, last):
    def loss_fn(params):
        return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    loss = jnp.inf
    for _ in range(first, last):
        params, opt_state, loss = step(params, opt_state)
    return params, opt_state, float(loss)


def run(directory: Path, last: int):
    """One process: goes on from the newest checkpoint, if there is one, and leaves another."""
    graphdef, params = new_model()
    plan = gx.plan_by_shape(params)  # or gx.calibrate(params, grads)
    with ocp.CheckpointManager(directory) as manager:
        first = manager.latest_step() or 0
        if first:
            plan = gx.Plan.load(directory / "plan.json")  # that which the state was made with
        tx = gx.gefen(3e-3, plan=plan)
        if first:
            like = jax.eval_shape(lambda p: {"params": p, "opt_state": tx.init(p)}, params)
            what = {"state": ocp.args.StandardRestore(like), "sums": ocp.args.JsonRestore()}
            saved = manager.restore(first, args=ocp.args.Composite(**what))
            gx.check_fingerprint(saved.state, saved.sums)  # to the last bit what was saved
            state = saved.state
        else:
            plan.save(directory / "plan.json")
            state = {"params": params, "opt_state": tx.init(params)}
        params, opt_state, loss = train(tx, graphdef, **state, first=first, last=last)
        print(f"gefen, steps {first} to {last}: loss {loss:.6f}")
        state = {"params": params, "opt_state": opt_state}
        sums = ocp.args.JsonSave(gx.fingerprint(state))
        what = {"state": ocp.args.StandardSave(state), "sums": sums}
        manager.save(last, args=ocp.args.Composite(**what))  # asynchronous
    return loss


with tempfile.TemporaryDirectory() as folder:
    run(Path(folder) / "whole", 2 * STEPS)
    run(Path(folder) / "in two", STEPS)
    run(Path(folder) / "in two", 2 * STEPS)  # fresh objects, as in a new process

graphdef, params = new_model()
adamw, tx = optax.adamw(3e-3), gx.gefen(3e-3)
params, opt_state, loss = train(adamw, graphdef, params, adamw.init(params), 0, STEPS)
print(f"adamw, steps 0 to {STEPS}: loss {loss:.6f}")
*_, loss = train(adamw, graphdef, params, opt_state, STEPS, 2 * STEPS)
print(f"adamw, steps {STEPS} to {2 * STEPS}: loss {loss:.6f}")
opt_state = gx.from_adam(opt_state, params)  # 8 bytes per parameter before, 1 after
*_, loss = train(tx, graphdef, params, opt_state, STEPS, 2 * STEPS)
print(f"gefen instead, steps {STEPS} to {2 * STEPS}: loss {loss:.6f}")
