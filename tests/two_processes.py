"""What each of two processes runs for `test_multihost.py`: one step function, two optimizers.

python tests/two_processes.py HOST:PORT 0    # and 1
"""

import re
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

_COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")


def train(tx, params, steps):
    """Parameters after steps along a gradient that each makes of them; and the program."""
    state = params, jax.jit(tx.init, out_shardings=gx.state_sharding(tx, params))(params)

    def update(params, opt_state):
        grads = jax.tree.map(lambda x: x * x - 0.5, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    where = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(update, donate_argnums=1, out_shardings=where).lower(*state).compile()
    for _ in range(steps):
        state = compiled(*state)
    return state[0], compiled.as_text()


def main(coordinator, process):
    jax.distributed.initialize(coordinator, 2, process)
    rng = np.random.default_rng(0)
    shapes, specs = {"w": (256, 64), "b": (96,)}, {"w": P("fsdp"), "b": P()}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def on(devices):
        mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
        return {
            name: jax.make_array_from_callback(
                x.shape, NamedSharding(mesh, specs[name]), lambda index, x=x: x[index]
            )
            for name, x in values.items()
        }

    spread, here = on(jax.devices()), on(jax.local_devices()[:1])
    plan = gx.plan_by_shape(spread)
    for name, tx in {"adamw": optax.adamw(1e-2), "gefen": gx.gefen(1e-2, plan=plan)}.items():
        new, program = train(tx, spread, steps=3)
        alone, _ = train(tx, here, steps=3)
        for leaf, x in new.items():
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(alone[leaf])[shard.index])
                assert not np.array_equal(shard.data, values[leaf][shard.index]), "nothing moved"
        assert not _COLLECTIVE.search(program), f"{name} communicates"
        print(f"{name} on {jax.process_count()} processes: the bits of one", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
