"""Llama 3 with 70B and 405B parameters on 8, 256 and 4,096 devices, on a CPU: nothing is allocated.

For every model and mesh: the plan and the time it takes, where the state lies, bytes per device of
weights, gradients and state beside `optax.adamw`, and the step lowered for GPUs with these
shardings. On 8 (virtual) devices the step of one layer is compiled too, and its collectives are
counted, with blocks that fit the shards, with those that a plan without a mesh gives, and with
adamw: of the full width, where 8 devices' shards are wide, and of a width of 256, where they are as
narrow as on thousands.

    python examples/benchmarks/simulate_mesh.py
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _common import write
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import gefen_jax as gx

_VOCABULARY, _KEY_VALUE = 128_256, 8 * 128


class Model(NamedTuple):
    """What differs between the two."""

    width: int
    mlp: int
    layers: int


MODELS = {"Llama 3 70B": Model(8192, 28_672, 80), "Llama 3 405B": Model(16_384, 53_248, 126)}
NARROW = Model(256, 1024, 1)
# Sizes of the axes: tensor cuts heads, inner features and tokens, fsdp the other axis of a matrix.
MESHES = {
    8: {"fsdp": 2, "tensor": 4},
    256: {"fsdp": 32, "tensor": 8},
    4096: {"fsdp": 512, "tensor": 8},
}


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    name: str
    nbytes: int  # of its results, on one device


_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast"
    r"|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Every collective in the text of a compiled program."""
    return [
        Collective(name, sum(_nbytes(bits, dims) for _, bits, dims in _ARRAY.findall(results)))
        for results, name in _COLLECTIVE.findall(hlo)
    ]


def _nbytes(bits: str, dims: str) -> int:
    size = math.prod(int(d) for d in dims.split(",") if d)
    return -(-size * int(bits or 8) // 8)  # pred has no number, and a byte


def structs(model: Model, mesh: Mesh | AbstractMesh, layers: int) -> Any:
    """The parameters as float32 structs with shardings."""
    d = model.width

    def array(*shape_and_spec: Any) -> jax.ShapeDtypeStruct:
        half = len(shape_and_spec) // 2
        sharding = NamedSharding(mesh, P(*shape_and_spec[half:]))
        return jax.ShapeDtypeStruct(shape_and_spec[:half], jnp.float32, sharding=sharding)

    def norm() -> Any:
        return {"scale": array(d, "fsdp")}

    def into(features: int) -> Any:
        return {"kernel": array(d, features, "fsdp", "tensor")}

    def out_of(features: int) -> Any:
        return {"kernel": array(features, d, "tensor", "fsdp")}

    def layer() -> Any:
        return {
            "attention_norm": norm(),
            "q": into(d),
            "k": into(_KEY_VALUE),
            "v": into(_KEY_VALUE),
            "o": out_of(d),
            "mlp_norm": norm(),
            "gate": into(model.mlp),
            "up": into(model.mlp),
            "down": out_of(model.mlp),
        }

    return {
        "embed": {"embedding": array(_VOCABULARY, d, "tensor", "fsdp")},
        "layers": {str(i): layer() for i in range(layers)},
        "norm": norm(),
        "head": into(_VOCABULARY),
    }


def placed(tx: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's state as structs with shardings."""
    state, where = jax.eval_shape(tx.init, params), gx.state_sharding(tx, params)
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, where)


def bytes_per_device(tree: Any) -> int:
    """What a device holds of structs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _step(tx: optax.GradientTransformation) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def simulate(model: Model, devices: int) -> dict[str, Any]:
    """Plan, bytes per device and lowering on an abstract mesh."""
    axes = MESHES[devices]
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    params = structs(model, mesh, model.layers)
    seconds = {}

    def timed(name: str, function: Any) -> Any:
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    plan = timed("plan", lambda: gx.plan_by_shape(params))
    tx = gx.gefen(3e-4, weight_decay=0.1, plan=plan)
    state = timed("state_sharding", lambda: placed(tx, params))
    traced = timed("trace", lambda: _step(tx).trace(params, state, params))
    timed("lower", lambda: traced.lower(lowering_platforms=("cuda",)))
    weights = bytes_per_device(params)
    size = sum(x.size for x in jax.tree.leaves(params))
    adamw, gefen = (bytes_per_device(x) for x in (placed(optax.adamw(3e-4), params), state))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return {
        "parameters": size,
        "mesh": axes,
        "leaves across shards": {
            "plan for the mesh": len(plan.across_shards(params)),
            "plan without a mesh": len(gx.plan_by_shape(_bare(params)).across_shards(params)),
        },
        "state, bytes per parameter": plan.bytes_per_param,
        "state per device over a device's share of the state": gefen * devices / whole,
        "bytes per device": {
            "weights, float32": weights,
            "gradients, float32": weights,
            "adamw's state": adamw,
            "gefen's state": gefen,
            "in all, adamw": 2 * weights + adamw,
            "in all, gefen": 2 * weights + gefen,
        },
        "seconds": seconds,
    }


def _bare(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def compile_layer(model: Model) -> dict[str, Any]:
    """The collectives of one layer's step, compiled for 8 devices."""
    axes = MESHES[8]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    params = structs(model, mesh, 1)["layers"]
    optimizers = {
        "adamw": optax.adamw(3e-4),
        "gefen, plan for the mesh": gx.gefen(3e-4, plan=gx.plan_by_shape(params)),
        "gefen, plan without a mesh": gx.gefen(3e-4, plan=gx.plan_by_shape(_bare(params))),
    }
    rows = {}
    for name, tx in optimizers.items():
        start = time.perf_counter()
        compiled = _step(tx).lower(params, placed(tx, params), params).compile()
        found = collectives(compiled.as_text())
        rows[name] = {
            "collectives": len(found),
            "bytes per device": sum(c.nbytes for c in found),
            "seconds to lower and compile": time.perf_counter() - start,
        }
    return rows


def main() -> None:
    """Simulates everything, prints tables, writes `simulate_mesh.json`."""
    jax.config.update("jax_num_cpu_devices", 8)
    results: dict[str, Any] = {
        "models": {
            name: {str(devices): simulate(model, devices) for devices in MESHES}
            for name, model in MODELS.items()
        },
        "one layer's step on 8 devices": {
            name: compile_layer(model) for name, model in (MODELS | {"width 256": NARROW}).items()
        },
    }
    write("simulate_mesh.json", "python examples/benchmarks/simulate_mesh.py", results)
    console = Console(width=120)
    gigabytes = ("weights, float32", "adamw's state", "gefen's state", "in all, adamw")
    gigabytes += ("in all, gefen",)
    table = Table("model", "devices", *gigabytes, "s, plan", "s, all", title="GB per device")
    for name, meshes in results["models"].items():
        for devices, row in meshes.items():
            cells = [f"{row['bytes per device'][what] / 1e9:,.3f}" for what in gigabytes]
            seconds = row["seconds"]
            times = (f"{seconds['plan']:.2f}", f"{sum(seconds.values()):.1f}")
            table.add_row(name, devices, *cells, *times)
    title = "One layer's step on 8 devices"
    layers = Table("model", "optimizer", "collectives", "MB per device", title=title)
    for name, rows in results["one layer's step on 8 devices"].items():
        for optimizer, row in rows.items():
            megabytes = f"{row['bytes per device'] / 1e6:,.2f}"
            layers.add_row(name, optimizer, str(row["collectives"]), megabytes)
    console.print(table, layers)


if __name__ == "__main__":
    main()
