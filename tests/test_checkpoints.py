"""Checkpoints: a run goes on to the last bit, on any mesh, and nothing that does not fit passes.

Through orbax, flax's msgpack and NumPy; with the dual code, which `gefen` has by default, and with
shared blocks; orbax with `optax.adamw`, too. What a plan holds is saved beside the state as JSON.
"""

import dataclasses
import functools
import gc
import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._specs import Partition

# When orbax gives up one read, its other ones come back to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

_RATE = optax.linear_schedule(1e-2, 1e-3, 20)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _params() -> Any:
    return {"mlp": {"up": _normal(0, 32, 256) / 6, "down": _normal(1, 256, 32) / 16}, "b": _b()}


def _b() -> jax.Array:
    return jnp.zeros(32)


def _loss(params, x):
    y = jnp.tanh(x @ params["mlp"]["up"]) @ params["mlp"]["down"] + params["b"][None]
    return jnp.mean(jnp.square(y - jnp.sin(x)))


_BY_SHAPE = gx.plan_by_shape(_params())
_PLANS: dict[str, gx.Plan | None] = {
    "no plan": None,
    "calibrated": gx.calibrate(_params(), jax.grad(_loss)(_params(), _normal(2, 64, 32))),
}


_PARTITION = Partition((("x", 2), ("y", 4)), (("x", "y"),))


_MAKE: dict[str, Callable[..., Any]] = {
    **{name: functools.partial(gx.gefen, plan=plan) for name, plan in _PLANS.items()},
    "adamw": optax.adamw,
}


@functools.cache
def _optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.clip_by_global_norm(1.0), _MAKE[name](_RATE, weight_decay=0.1))


@functools.cache
def _step(name: str, donate: bool = False):
    def step(params, state, x):
        grads = jax.grad(_loss)(params, x)
        updates, state = _optimizer(name).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def _train(name, params, state, steps, donate=False):
    for i in steps:
        params, state = _step(name, donate)(params, state, _normal(10 + i, 64, 32))
    return params, state


@functools.cache
def _run(name: str, steps: int) -> Any:
    params = _params()
    return jax.device_get(_train(name, params, _optimizer(name).init(params), range(steps)))


def _fresh(name: str) -> Any:
    """What a new process has before it restores: shapes."""
    return jax.eval_shape(lambda p: (p, _optimizer(name).init(p)), _params())


def _assert_same(a: Any, b: Any) -> None:
    """To the last bit, in structure and dtypes too."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# A run goes on ----------------------------------------------------------------------------------


def _manager(directory: Path, asynchronous: bool = False) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    return ocp.CheckpointManager(directory, options=options)


def _save(manager, step, params, state):
    items = {"params": params, "opt_state": state}
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    manager.save(step, args=ocp.args.Composite(**args))


def _restore(manager, params, state):
    like = {"params": params, "opt_state": state}
    args = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args))
    return restored.params, restored.opt_state


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", _MAKE)
def test_orbax(tmp_path, name, asynchronous):
    params = _params()
    now = _train(name, params, _optimizer(name).init(params), range(3))
    with _manager(tmp_path / "run", asynchronous) as manager:
        _save(manager, 3, *now)
        # The run goes on, in the very buffers that are being saved.
        ahead = _train(name, *now, range(3, 6), donate=True)
        manager.wait_until_finished()
    with _manager(tmp_path / "run") as manager:
        assert manager.latest_step() == 3
        restored = _restore(manager, *_fresh(name))
    _assert_same(restored, _run(name, 3))
    resumed = _train(name, *restored, range(3, 6), donate=True)
    _assert_same(resumed, _run(name, 6))
    _assert_same(resumed, ahead)


def test_orbax_with_split_weights_of_the_fused_step(tmp_path):
    """Weights in bfloat16 and corrections in int8, the leaf of dual codes stepped in one pass."""
    tx = gx.with_split_weights(gx.fused_gefen(_RATE, weight_decay=0.1, max_norm=1.0))

    @jax.jit
    def step(weights, state, x):
        return tx.step(jax.grad(_loss)(weights, x), state, weights)

    def train(now, steps):
        for i in steps:
            now = step(*now, _normal(10 + i, 64, 32))
        return now

    def start(params):
        return gx.split_weights(params)[0], tx.init(params)

    half = train(start(_params()), range(3))
    with _manager(tmp_path / "run") as manager:
        _save(manager, 3, *half)
        manager.wait_until_finished()
    with _manager(tmp_path / "run") as manager:
        restored = _restore(manager, *jax.eval_shape(start, _params()))
    _assert_same(restored, half)
    assert restored[0]["mlp"]["up"].dtype == jnp.bfloat16
    _assert_same(train(restored, range(3, 6)), train(half, range(3, 6)))


def _npz(tree) -> bytes:
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **leaves)
    return file.getvalue()


def _from_npz(saved: bytes, like: Any) -> Any:
    with np.load(io.BytesIO(saved)) as leaves:
        return jax.tree.structure(like).unflatten([leaves[str(i)] for i in range(len(leaves))])


def _from_msgpack(saved: bytes, like: Any) -> Any:
    return flax.serialization.from_bytes(jax.tree.map(lambda x: np.zeros(x.shape), like), saved)


_FORMATS = {
    "numpy": (_npz, _from_npz),
    "flax msgpack": (flax.serialization.to_bytes, _from_msgpack),
}


@pytest.mark.parametrize("form", _FORMATS)
@pytest.mark.parametrize("name", _PLANS)
def test_bytes(name, form):
    save, load = _FORMATS[form]
    restored = load(save(_run(name, 3)), _fresh(name))
    _assert_same(restored, _run(name, 3))
    _assert_same(_train(name, *restored, range(3, 6)), _run(name, 6))


def _held(tree: Any) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def test_what_is_saved_is_what_is_held(tmp_path):
    """Nothing is widened: 2 bytes of weights and 2 of correction and state, and small leaves."""
    params = {"w": _normal(5, 512, 512), "b": jnp.zeros(512)}
    tx = gx.with_split_weights(gx.gefen(1e-3))
    run = jax.device_get((gx.split_weights(params)[0], tx.init(params)))
    assert _held(run) <= 4.1 * 513 * 512
    # Names, shapes and dtypes: less than 200 bytes for each of some 20 arrays.
    assert len(flax.serialization.to_bytes(run)) <= _held(run) + 4000
    with _manager(tmp_path / "run") as manager:
        _save(manager, 0, *jax.tree.map(jnp.asarray, run))
    # Orbax's own metadata, and arrays that it compresses.
    files = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert files <= _held(run) + 40_000


def test_the_plan_beside_the_state(tmp_path):
    # A new process knows the model, and finds the rest.
    path = tmp_path / "run"
    with _manager(path) as manager:
        _PLANS["calibrated"].save(path / "plan.json")
        _save(manager, 3, *_run("calibrated", 3))
    with _manager(path) as manager:
        assert manager.latest_step() == 3
        plan = gx.Plan.load(path / "plan.json")
        assert plan == _PLANS["calibrated"]
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), gx.gefen(_RATE, weight_decay=0.1, plan=plan)
        )
        like = jax.eval_shape(lambda p: (p, tx.init(p)), _params())
        restored = _restore(manager, *like)
    _assert_same(_train("calibrated", *restored, range(3, 6)), _run("calibrated", 6))
    # And another plan, from there.
    state = gx.replan(restored[1], restored[0], plan, None)
    _train("no plan", restored[0], state, range(3, 4))


# Other meshes -----------------------------------------------------------------------------------

_SPECS = {"mlp": {"up": P("x", "y"), "down": P("y", "x")}, "b": P("x")}


def _mesh(devices: int) -> jax.sharding.Mesh:
    shape = {8: (4, 2), 4: (2, 2), 1: (1, 1)}[devices]
    return jax.make_mesh(
        shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )


def _placed(name: str, devices: int) -> Any:
    """Shapes with shardings, of parameters and state."""
    mesh, (params, state) = _mesh(devices), _fresh(name)
    at = jax.tree.map(lambda s: NamedSharding(mesh, s), _SPECS, is_leaf=lambda x: isinstance(x, P))
    shardings = gx.state_sharding(_optimizer(name), params, at)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        (params, state),
        (at, shardings),
    )


@pytest.mark.parametrize("name", ["no plan", "adamw"])
def test_onto_other_meshes(tmp_path, name):
    now = _run(name, 3)
    for hop, devices in enumerate((8, 4, 1, 8)):
        like = _placed(name, devices)
        with _manager(tmp_path / str(hop)) as manager:
            _save(manager, 3, *now)
            now = _restore(manager, *like)
        _assert_same(now, _run(name, 3))
        for x, expected in zip(jax.tree.leaves(now), jax.tree.leaves(like), strict=True):
            assert x.sharding == expected.sharding
    # Sums over eight devices round otherwise: the loss, not the bits.
    params, _ = _train(name, *now, range(3, 6))
    x = _normal(99, 64, 32)
    expected = _loss(_run(name, 6)[0], x)
    np.testing.assert_allclose(_loss(jax.device_get(params), x), expected, rtol=1e-3)


# What does not fit ------------------------------------------------------------------------------

# Of up, 32 x 256: with the shapes of the default's state, with others, exact.
_OTHERS = {
    "same shapes": gx.SharedBlocks((1, 256)),
    "half the block": gx.DualCode((1, 128)),
    "columns": gx.SharedBlocks((32, 1)),
    "exact": gx.Exact(),
}


@pytest.mark.parametrize("other", _OTHERS)
def test_another_plan_is_refused_by_name(tmp_path, other):
    plan = _BY_SHAPE.with_kind("mlp/up", _OTHERS[other])
    _BY_SHAPE.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json.*`mlp/up` as DualCode.*replan"):
        plan.check_saved(tmp_path / "plan.json")
    # Who does not check: these formats keep dtypes and shapes, and the first step names the leaf.
    tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(_RATE, plan=plan))
    params, state = _run("no plan", 3)
    like = jax.eval_shape(tx.init, params)
    for save, load in _FORMATS.values():
        saved = save(state)
        if other == "exact":  # whose state has a leaf less
            continue
        with pytest.raises(ValueError, match="state of `mlp/up` does not fit its plan"):
            tx.update(params, load(saved, like), params)


def test_check_saved(tmp_path):
    path = tmp_path / "plan.json"
    plan = _PLANS["calibrated"]
    plan.save(path)
    plan.check_saved(path)
    # Reasons are of no consequence; names, shapes, kinds and the codebook are.
    told = tuple(dataclasses.replace(leaf, reason="because") for leaf in plan.leaves)
    dataclasses.replace(plan, leaves=told).check_saved(path)
    refused = {
        "`mlp/more` is in this plan only": gx.plan_by_shape(
            {**_params(), "mlp": {**_params()["mlp"], "more": _b()}}
        ),
        "`b` is in the saved one only": gx.plan_by_shape({"mlp": _params()["mlp"]}),
        r"has `b` of shape \(32,\), this plan of shape \(33,\)": gx.plan_by_shape(
            {**_params(), "b": jnp.zeros(33)}
        ),
        "another codebook": dataclasses.replace(plan, codebook=_BY_SHAPE.codebook),
    }
    for match, other in refused.items():
        other = dataclasses.replace(other, leaves=tuple(_like(leaf, plan) for leaf in other.leaves))
        with pytest.raises(ValueError, match=match):
            other.check_saved(path)
    with pytest.raises(ValueError, match="not a readable plan"):
        path.write_text("{}")
        plan.check_saved(path)


def _like(leaf: gx.LeafPlan, plan: gx.Plan) -> gx.LeafPlan:
    """With the kind that the plan has for it, where shapes agree."""
    entries = {x.path: x for x in plan.leaves}
    known = entries.get(leaf.path)
    return known if known is not None and known.shape == leaf.shape else leaf


def test_a_plan_of_another_model():
    plan = gx.plan_by_shape({"mlp": {"up": jnp.zeros((32, 512))}, "b": _b()})
    params, _ = _run("no plan", 3)
    with pytest.raises(ValueError, match=r"expects `mlp/up` of shape \(32, 512\)|no leaf `mlp/"):
        gx.gefen(_RATE, plan=plan).init(params)


# Damaged files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file(kept):
    for save, load in _FORMATS.values():
        saved = save(_run("no plan", 3))
        with pytest.raises((ValueError, zipfile.BadZipFile, EOFError)):
            load(saved[: int(kept * len(saved))], _fresh("no plan"))


def test_a_truncated_orbax_checkpoint(tmp_path):
    with _manager(tmp_path / "run") as manager:
        _save(manager, 3, *_run("no plan", 3))
    files = [p for p in (tmp_path / "run" / "3" / "opt_state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with _manager(tmp_path / "run") as manager, pytest.raises(ValueError):
        _restore(manager, *_fresh("no plan"))
    time.sleep(0.5)  # for the reads that are still under way, see above
    gc.collect()


def test_flipped_bits_of_a_plan(tmp_path):
    """Whatever bit is flipped: an error that names the file, or the very plan (a blank is another).

    Of version 3, which has a checksum.
    """
    on_mesh = dataclasses.replace(_BY_SHAPE.leaves[-1], partition=_PARTITION)
    plan = dataclasses.replace(_BY_SHAPE, leaves=(*_BY_SHAPE.leaves[:-1], on_mesh))
    path = tmp_path / "plan.json"
    plan.save(path)
    data = path.read_bytes()
    assert gx.Plan.load(path) == plan and b'"mesh"' in data
    head, tail = data.index(b'"codebook":') + 300, len(data) - 60  # a codebook goes on like that
    loaded = refused = 0
    bits = [*range(8 * tail, 8 * len(data))]  # the checksum's
    bits += np.random.default_rng(0).integers(0, 8 * head, 600).tolist()
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            assert gx.Plan.load(path) == plan, bytes(flipped)
            loaded += 1
        except ValueError as error:
            assert "plan.json" in str(error), bytes(flipped)
            refused += 1
    assert loaded < 0.05 * refused


def test_a_plan_that_was_edited(tmp_path):
    path = tmp_path / "plan.json"
    _BY_SHAPE.save(path)
    text = path.read_text()
    path.write_text(text.replace("256", "128"))
    with pytest.raises(ValueError, match=r"plan\.json.*checksum does not fit.*with_kind"):
        gx.Plan.load(path)
    path.write_text(json.dumps(json.loads(text)))  # in other lines, it is the same plan
    assert gx.Plan.load(path) == _BY_SHAPE


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e400", "NaN", "[]", "null", '"x"', "2e9"])
@pytest.mark.parametrize("where", ["shape", "block", "codebook", "version"])
def test_wild_numbers_in_a_plan(tmp_path, where, value):
    path = tmp_path / "plan.json"
    _BY_SHAPE.save(path)
    data = json.loads(path.read_text())
    del data["checksum"]  # of which version 2 had none
    data["version"] = 2
    leaf = next(x for x in data["leaves"] if x["path"] == "mlp/up")
    if where == "version":
        data["version"] = "@"
    elif where == "codebook":
        data["codebook"][17] = "@"
    else:
        leaf[where][1] = "@"
    path.write_text(json.dumps(data).replace('"@"', value))
    with pytest.raises(ValueError, match=r"plan\.json"):
        gx.Plan.load(path)


# Files of earlier versions ----------------------------------------------------------------------

_FIXTURES = Path(__file__).parent / "fixtures"
_OLD_KINDS = {
    "dual": gx.DualCode((1, 256)),
    "flat": gx.FlatPeriods(17, 17),
    "rows": gx.SharedBlocks((1, 256)),
    "small": gx.Exact(),
    "steps": gx.Untrained(),
}


@pytest.mark.parametrize("version", [2, 3])
def test_a_plan_of_version_2_or_3(version):
    plan = gx.Plan.load(_FIXTURES / f"plan_{version}.json")
    assert {leaf.path: leaf.kind for leaf in plan.leaves} == _OLD_KINDS
    assert plan.codebook == _BY_SHAPE.codebook and plan.rule == "shape"


def test_a_plan_of_version_1():
    with pytest.raises(ValueError, match=r"plan_1\.json.*version is 1.*make the plan anew"):
        gx.Plan.load(_FIXTURES / "plan_1.json")
    plan = gx.Plan.load(_FIXTURES / "plan_1_shared.json")
    assert plan["dual"].kind == gx.SharedBlocks((17, 1)) and plan["small"].kind == gx.Exact()


def test_a_state_of_version_2():
    """Read leaf by leaf, as a checkpoint of that time, it holds the moments that it held then."""
    plan = gx.Plan.load(_FIXTURES / "plan_2.json")
    params = {
        leaf.path: jnp.zeros(leaf.shape, int if leaf.path == "steps" else jnp.float32)
        for leaf in plan.leaves
    }
    tx = gx.scale_by_gefen(plan=plan)
    like = jax.eval_shape(tx.init, params)
    with np.load(_FIXTURES / "state_2.npz") as saved:
        saved = dict(saved)
    leaves = [saved[f"leaf_{i}"] for i in range(len(jax.tree.leaves(like)))]
    state = jax.tree.structure(like).unflatten(leaves)
    assert int(state.count) == 3
    adam: Any = gx.to_adam(state, params, plan)
    for name in ("dual", "flat", "rows", "small"):
        # As decoded then; another order of products may round otherwise, twice.
        for moment, now in (("mu", adam.mu), ("nu", adam.nu)):
            np.testing.assert_allclose(now[name], saved[f"{moment}_{name}"], rtol=2**-22, atol=0)
    grads = {name: p if name != "steps" else None for name, p in params.items()}
    jax.eval_shape(tx.update, grads, state, params)  # which checks that the state fits
