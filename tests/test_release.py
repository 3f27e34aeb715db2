"""Gradient release: the ordinary step's results, without its gradients.

The model here computes in small integers, kept in float32 (it rounds its weights and activations,
with straight-through derivatives that are clipped). So gradients, and their norm, are exact in
whatever order they are added up, and what two programs differ by is how XLA rounds the optimizer's
own arithmetic: it contracts products with sums, and takes ``a / b / c`` for ``a / (b * c)``, in the
one or the other. In the first step of an optimizer whose constants are powers of two all this is
exact (the bias corrections are 1/2), and results are compared bit for bit. In later steps they may
be a few units of 2^-24 apart, which takes a code, or a weight's last bit, over the edge now and
then: 1 % of them, here.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

_LAYERS, _WIDTH, _HIDDEN, _TOKENS, _BATCH = 2, 64, 128, 96, 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: jax.Array, unit: float = 1.0) -> jax.Array:
    """Units of x, a whole number from -2 to 2."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / unit), -2, 2)


_whole.defvjp(
    lambda x, unit: (_whole(x, unit), jnp.zeros([], x.dtype)),
    lambda unit, like, g: (jnp.clip(g, -8, 8).astype(like.dtype),),
)
_UNIT = 0.05  # of the weights, which start from numbers of this size


def _embed(params: Any, batch: Any) -> jax.Array:
    x = _whole(params["table"], _UNIT)[batch["read"]]
    return _whole(x + _whole(params["place"], _UNIT)[None])


def _layer(params: Any, x: jax.Array) -> jax.Array:
    y = _whole(x + _whole(params["shift"], _UNIT)[None])
    y = _whole(y @ _whole(params["up"], _UNIT), 4.0)
    return _whole(x + _whole(y @ _whole(params["down"], _UNIT), 4.0))


def _head(params: Any, x: jax.Array, batch: Any) -> jax.Array:
    tied = _whole(params["table"], _UNIT).T
    out = _whole(x @ _whole(params["out"], _UNIT) + x @ tied, 4.0)
    loss = 0.5 * jnp.sum(jnp.square(out - batch["aim"]))
    return loss + jnp.sum(params["out"].astype(jnp.float32) * batch["zero"])


def _loss(params: Any, batch: Any) -> jax.Array:
    x, layers = _embed(params, batch), params["layers"]
    if isinstance(layers, list):
        for layer in layers:
            x = _layer(layer, x)
    else:
        x = jax.lax.scan(lambda x, layer: (_layer(layer, x), None), x, layers)[0]
    return _head(params, x, batch)


def _params(stacked: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.05, jnp.float32)

    layers: Any = {
        "up": normal(_LAYERS, _WIDTH, _HIDDEN),
        "down": normal(_LAYERS, _HIDDEN, _WIDTH),
        "shift": normal(_LAYERS, _WIDTH),
    }
    if not stacked:
        layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(_LAYERS)]
    return {
        "layers": layers,
        "out": normal(_WIDTH, _TOKENS),  # of the head alone
        "place": normal(_WIDTH),  # of the embedding alone
        "table": normal(_TOKENS, _WIDTH),  # of both
    }


def _batch(t: int, zero: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng([2, t])
    return {
        "read": jnp.asarray(rng.integers(0, _TOKENS, _BATCH)),
        "aim": jnp.asarray(rng.integers(-2, 3, (_BATCH, _TOKENS)), jnp.float32),
        "zero": jnp.float32(zero),  # or what should not get into the parameters
    }


def _ordinary(optimizer: Any, loss: Any = _loss) -> Any:
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        if isinstance(optimizer, gx.FusedGefen):
            return *optimizer.step(grads, opt_state, params), value
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def _released(optimizer: Any, **options: Any) -> Any:
    return gx.release(optimizer, _embed, _layer, _head, **options)


def _assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


# Powers of two: products with them are exact, and so it does not matter which of them XLA contracts
# with a sum (a fused multiply-add rounds once, the two operations twice).
_B = {"b1": 0.5, "b2": 0.5}
_ADAM = _B | {"learning_rate": 2.0**-7, "weight_decay": 2.0**-3}


def _plan() -> gx.Plan:
    """Dual codes, exact leaves, and one of shared blocks."""
    return gx.plan_by_shape(_params(True)).with_kind("layers/up", gx.SharedBlocks((1, 16, 128)))


_OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(**_ADAM, mask=_matrices),
    "fused, split": lambda: gx.with_split_weights(gx.fused_gefen(**_ADAM, plan=_plan())),
    "adamw, split": lambda: gx.with_split_weights(optax.adamw(**_ADAM), bits=16),
    "gefen": lambda: gx.gefen(**_ADAM),
}
_RUNS = [("gefen", False), ("adamw, split", True), ("fused, split", True)]


def _start(name: str, stacked: bool) -> tuple[Any, Any, Any]:
    optimizer, params = _OPTIMIZERS[name](), _params(stacked)
    opt_state = optimizer.init(params)
    return optimizer, gx.split_weights(params)[0] if "split" in name else params, opt_state


def _assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        same = a == b if b.dtype != np.float32 else np.isclose(a, b, rtol=2.0**-20, atol=2.0**-24)
        assert np.mean(~same) <= 0.01


@pytest.mark.once
@pytest.mark.parametrize("name, stacked", _RUNS)
def test_50_steps_are_the_ordinary_ones(name, stacked):
    """Each from the same start, and each goes on from the other's results in turn."""
    optimizer, params, opt_state = _start(name, stacked)
    released, ordinary = jax.jit(_released(optimizer)), jax.jit(_ordinary(optimizer))
    now = params, opt_state
    for t in range(50):
        *ours, loss = released(*now, _batch(t))
        *theirs, other = ordinary(*now, _batch(t))
        assert loss == other
        (_assert_close if t else _assert_equal)(tuple(ours), tuple(theirs))
        now = (ours, theirs)[t % 2]
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), now[0], params)
    assert all(jax.tree.leaves(moved))
    assert optax.tree.get_all_with_path(now[1], "count")[0][1] == 50
    assert released._cache_size() == 1


# A model as any: numbers are rounded in every operation, and two programs do it in two ways.


def _smooth_embed(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["in"]


def _smooth_layer(params: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def _smooth_head(params: Any, x: jax.Array, aim: jax.Array) -> jax.Array:
    out = (x @ params["in"].T).astype(jnp.float32)
    return jnp.mean(jnp.square(out - jnp.sin(3 * aim.astype(jnp.float32))))


_SMOOTH = _smooth_embed, _smooth_layer, _smooth_head


def _smooth_params() -> Any:
    def normal(seed: int, *shape: int) -> jax.Array:
        values = np.random.default_rng(seed).normal(size=shape) * shape[-2] ** -0.5
        return jnp.asarray(values, jnp.float32)

    return {
        "in": normal(0, 16, 32),
        "layers": {"up": normal(1, 2, 32, 64), "down": normal(2, 2, 64, 32)},
    }


def _smooth_loss(params: Any, x: jax.Array) -> jax.Array:
    y = _smooth_embed(params, x)
    y = jax.lax.scan(lambda y, p: (_smooth_layer(p, y), None), y, params["layers"])[0]
    return _smooth_head(params, y, x)


_ALONE: dict[str, Any] = {
    "adamw": lambda: optax.adamw(1e-3),
    "fused, split": lambda: gx.with_split_weights(gx.fused_gefen(1e-3)),
    "flash, split": lambda: gx.with_split_weights(gx.flash_adamw(1e-3)),
}


@pytest.mark.once
@pytest.mark.parametrize("name", _ALONE)
def test_50_steps_alone_beside_50_ordinary_ones(name):
    """Neither run sees the other's results.

    In float32, both round a parameter to 2^-25 of it in every step, and gradients that are a few
    2^-24 apart move it by as little of the learning rate, which is less. In 24 bits the steps are
    the same, but where such a difference takes a number, or a code, over the edge: few elements,
    by one unit, 2^-15 of it, for each such step.
    """
    optimizer, params = _ALONE[name](), _smooth_params()
    split = "split" in name
    weights = gx.split_weights(params)[0] if split else params
    ours = theirs = weights, optimizer.init(params)
    released = jax.jit(gx.release(optimizer, *_SMOOTH))
    ordinary = jax.jit(_ordinary(optimizer, _smooth_loss))
    for t in range(50):
        x = np.random.default_rng([1, t]).normal(size=(8, 16))
        x = jnp.asarray(x, weights["in"].dtype)
        *ours, _ = released(*ours, x)
        *theirs, _ = ordinary(*theirs, x)
    if split:
        ours, theirs = (gx.merge_weights(*run) for run in (ours, theirs))
    else:
        ours, theirs = ours[0], theirs[0]
    unit = 2.0**-15 if split else 2.0**-24
    for a, b, start in zip(*map(jax.tree.leaves, (ours, theirs, params)), strict=True):
        apart = np.abs(a - b)
        assert np.all(apart <= 50 * unit * np.max(np.abs(b)))
        assert not split or np.mean(apart > 0) <= 0.01
        assert np.mean(np.abs(b - start)) > 1e-2  # the rate times 50 steps that mostly agree: 0.05


@pytest.mark.parametrize("stacked", [False, True])
def test_clipping_by_the_norm_of_all(stacked):
    """As the chain does it that must not be given to it. Sums of squares are whole numbers here."""
    optimizer, params, opt_state = _start("adamw", stacked)
    chain = optax.chain(optax.clip_by_global_norm(32.0), optimizer)
    released = jax.jit(_released(optimizer, max_norm=32.0))
    ordinary = jax.jit(_ordinary(chain))
    ours, theirs = (params, opt_state), (params, chain.init(params))
    *ours, _ = released(*ours, _batch(0))
    *theirs, _ = ordinary(*theirs, _batch(0))
    norm = optax.tree.norm(optax.tree.get(ours[1], "mu"))
    assert norm == pytest.approx(16.0, rel=1e-5)  # half of what was clipped to 32
    _assert_equal(tuple(ours), (theirs[0], theirs[1][1]))


@pytest.mark.once
@pytest.mark.parametrize("name, stacked", [("adamw", False), ("adamw, split", True)])
def test_a_step_that_is_not_finite_changes_nothing(name, stacked):
    optimizer, params, opt_state = _start(name, stacked)
    step = jax.jit(_released(optimizer, skip_nonfinite=True))
    ordinary = jax.jit(_ordinary(optimizer))
    ours = theirs = params, opt_state
    for t, zero in enumerate((np.inf, np.nan, 0.0)):
        before = ours
        *ours, loss = step(*ours, _batch(t, zero))
        if np.isfinite(zero):
            *theirs, other = ordinary(*theirs, _batch(t))
            assert loss == other
        else:
            assert not np.isfinite(loss)
            _assert_equal(tuple(ours), tuple(before))
    _assert_equal(tuple(ours), tuple(theirs))


@pytest.mark.once
def test_on_a_mesh():
    """Data in parallel, parameters cut over the same devices: what one device gives."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer, params, opt_state = _start("fused, split", True)
    specs = {
        "layers": {"up": P(None, "data"), "down": P(None, "data", "model"), "shift": P()},
        "out": P("model"),
        "place": P(),
        "table": P("data"),
    }
    spread = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    init = optax.GradientTransformation(optimizer.init, optax.identity().update)
    where = gx.state_sharding(init, spread)
    layout = jax.tree.map(lambda x: x.sharding, spread)
    step = jax.jit(_released(optimizer), out_shardings=(layout, where, None))
    cut = jax.device_put(_batch(0), NamedSharding(mesh, P()))
    cut |= {k: jax.device_put(cut[k], NamedSharding(mesh, P("data"))) for k in ("read", "aim")}
    ours = step(spread, jax.device_put(opt_state, where), cut)
    theirs = jax.jit(_released(optimizer))(params, opt_state, _batch(0))
    _assert_equal(ours, theirs)


_MESHES: dict[str, Any] = {
    "stacked, FSDP": (True, True, AxisType.Auto),
    "list, FSDP": (False, True, AxisType.Auto),
    "list, data in parallel": (False, False, AxisType.Auto),
    "stacked, data in parallel, Explicit": (True, False, AxisType.Explicit),
}


@pytest.mark.parametrize("name", _MESHES)
def test_on_a_mesh_clipped_or_skipped(name):
    """What one device gives, bit for bit: all sums are of whole numbers, the norm's too."""
    stacked, is_cut, axis_type = _MESHES[name]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    rng = np.random.default_rng(0)
    params: Any = {
        "in": jnp.asarray(rng.integers(-1, 2, (4, 8)), jnp.float32),
        "layers": jnp.asarray(rng.integers(-1, 2, (2, 8, 8)), jnp.float32),
        "out": jnp.asarray(rng.integers(-1, 2, (8, 4)), jnp.float32),
    }
    if not stacked:
        params["layers"] = list(params["layers"])
    optimizer = optax.adamw(**_ADAM)
    step = gx.release(
        optimizer,
        lambda params, batch: batch @ params["in"],
        lambda w, x: x + x @ w,
        lambda params, x, batch: jnp.sum((x @ params["out"]) * batch),
        max_norm=8.0,
        skip_nonfinite=True,
    )
    opt_state = optimizer.init(params)
    batch = jnp.asarray(rng.integers(-1, 2, (4, 4)), jnp.float32)
    expected = jax.jit(step)(params, opt_state, batch)
    norm = optax.tree.norm(optax.tree.get(expected[1], "mu"))
    assert norm == pytest.approx(4.0, rel=1e-5)  # half of what was clipped to 8

    rows = P("data") if is_cut else P()
    specs = {"in": rows, "layers": P(None, *rows) if stacked else [rows] * 2, "out": rows}
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        layout = jax.tree.map(lambda x: x.sharding, spread)
        where = gx.state_sharding(optimizer, spread)
        now = spread, jax.device_put(opt_state, where)
        jitted = jax.jit(step, out_shardings=(layout, where, None))
        data = NamedSharding(mesh, P("data"))
        ours = jitted(*now, jax.device_put(batch, data))
        skipped = jitted(*now, jax.device_put(batch.at[0, 0].set(jnp.inf), data))
    _assert_equal(ours, expected)
    _assert_equal(skipped[:2], (params, opt_state))


def test_integers_and_keys_pass_through_the_layers():
    """Dropout: the key is a part of x; and an integer leaf of the layers stays."""

    def layer(params, x):
        x, key, number = x
        key, own = jax.random.split(key)
        kept = jax.random.bernoulli(own, 0.5, x.shape) * params["steps"]
        return _layer(params, x) * kept, key, number + 1

    def embed(params, batch):
        return _embed(params, batch), jax.random.key(0), 0

    def head(params, x, batch):
        return _head(params, x[0], batch) + jnp.where(x[2] == _LAYERS, 0.0, jnp.nan)

    def loss(params, batch):
        x = embed(params, batch)
        for i in range(_LAYERS):
            x = layer(jax.tree.map(lambda p, i=i: p[i], params["layers"]), x)
        return head(params, x, batch)

    optimizer = optax.sgd(2.0**-7)
    params = _params(True)
    params["layers"]["steps"] = jnp.ones(_LAYERS, jnp.int32)
    opt_state = optimizer.init(params)
    step = jax.jit(gx.release(optimizer, embed, layer, head))
    ours, _, _ = step(params, opt_state, _batch(0))
    grads = jax.jit(jax.grad(loss, allow_int=True))(params, _batch(0))
    assert ours["layers"].pop("steps").dtype == params["layers"].pop("steps").dtype == jnp.int32
    del grads["layers"]["steps"]
    _assert_equal(ours, jax.tree.map(lambda p, g: p - 2.0**-7 * g, params, grads))


class _Net(eqx.Module):
    first: jax.Array
    blocks: list[jax.Array]


def test_a_layer_of_flash_moments_is_rounded_as_in_the_whole_leaf():
    """By its own fractions: with the same gradient, layers do not have the same scales."""
    optimizer = gx.flash_adamw(**_ADAM)
    # Groups along the last axis, and in a vector: 5 of them in each of 3 layers.
    params = {"layers": {"rows": jnp.ones((3, 16, 64)), "vector": jnp.ones((3, 8, 20))}}
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape[1:]), x.dtype), params)

    def layer(layer_params, x):  # with the batch as its gradient, without any rounding
        total, batch = x
        products = jax.tree.map(lambda p, b: jnp.sum(p * b), layer_params, batch["layers"])
        return total + sum(jax.tree.leaves(products)), batch

    step = gx.release(
        optimizer, lambda _, batch: (jnp.float32(0), batch), layer, lambda _, x, batch: x[0]
    )
    opt_state = optimizer.init(params)
    *ours, _ = jax.jit(step)(params, opt_state, batch)

    @jax.jit
    def ordinary(params, opt_state, batch):
        grads = jax.tree.map(lambda b: jnp.broadcast_to(b, (3, *b.shape)), batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    _assert_equal(tuple(ours), ordinary(params, opt_state, batch))
    layers = optax.tree.get(ours[1], "mu_scale")["layers"]["rows"]
    assert jnp.any(layers[0] != layers[1]) and jnp.any(layers[1] != layers[2])


def test_layers_of_a_list_may_change_the_shape():
    params = [{"w": jnp.full((8, 4), 0.5)}, {"w": jnp.full((4, 2), 0.25)}]
    optimizer = optax.sgd(0.5)
    functions = (lambda _, x: x, lambda p, x: x @ p["w"], lambda _, x, __: jnp.sum(x))
    step = gx.release(optimizer, *functions, layers=lambda params: params, skip_nonfinite=True)
    x = jnp.ones((2, 8))
    new, _, loss = jax.jit(step)(params, optimizer.init(params), x)

    def value(params):
        return jnp.sum(x @ params[0]["w"] @ params[1]["w"])

    # Numbers are powers of two, or whole: sums are exact.
    assert loss == value(params) == 16.0
    _assert_equal(new, jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(value)(params)))
    same = jax.jit(step)(params, optimizer.init(params), jnp.full((2, 8), jnp.inf))[0]
    _assert_equal(same, params)


def test_stacked_layers_may_not_change_the_shape():
    step = gx.release(
        optax.sgd(0.1), lambda _, x: x, lambda p, x: x @ p, lambda _, x, __: jnp.sum(x)
    )
    params = {"layers": jnp.ones((2, 8, 4))}
    with pytest.raises(ValueError, match=r"`layer` must return .*\[1, 4\].* for .*\[1, 8\].*list"):
        jax.eval_shape(step, params, optax.sgd(0.1).init(params), jnp.ones((1, 8)))


def test_stacked_layers_may_not_change_the_dtype():
    params = {"layers": jnp.ones((2, 8, 8))}
    layer = lambda p, x: (x @ p).astype(jnp.bfloat16)  # noqa: E731
    step = gx.release(optax.sgd(0.1), lambda _, x: x, layer, lambda _, x, __: jnp.sum(x))
    with pytest.raises(ValueError, match=r"bfloat16\[1, 8\] for float32\[1, 8\]\. Cast"):
        jax.eval_shape(step, params, optax.sgd(0.1).init(params), jnp.ones((1, 8)))


def test_any_tree_of_parameters():
    params = _Net(jnp.ones(8), [jnp.full((8, 8), 0.1), jnp.full((8, 8), 0.2)])
    optimizer = optax.sgd(0.1)
    step = gx.release(
        optimizer,
        lambda net, batch: batch * net.first[None],
        lambda w, x: x @ w,
        lambda net, x, batch: jnp.sum(x),
        layers=lambda net: net.blocks,
    )
    x = jnp.ones((2, 8))
    new, _, loss = step(params, optimizer.init(params), x)

    def value(net):
        return jnp.sum(x * net.first[None] @ net.blocks[0] @ net.blocks[1])

    grads = jax.grad(value)(params)
    # Sums of 8 and 2 terms, one product each, in float32.
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=16 * 2.0**-24), new, expected)
    np.testing.assert_allclose(loss, value(params), rtol=32 * 2.0**-24)


# Memory ------------------------------------------------------------------------------------------


# Bytes per parameter, at most, of temporaries on a CPU, where all gradients would be 2. They are
# some arrays of a layer, of which one in float32 is 4 / 16.
_TEMPORARIES: dict[str, Any] = {
    "fused, 16 bits": (lambda: gx.with_split_weights(gx.fused_gefen(1e-3), 16), 0.75),
    "fused, 24 bits": (lambda: gx.with_split_weights(gx.fused_gefen(1e-3)), 1.0),
    "fused, 32 bits": (lambda: gx.with_split_weights(gx.fused_gefen(1e-3), 32), 1.2),
    "flash": (lambda: gx.with_split_weights(gx.flash_adamw(1e-3), gradient_dtype=None), 1.3),
    "adamw": (lambda: gx.with_split_weights(optax.adamw(1e-3)), 1.3),
}


@pytest.mark.parametrize("name", _TEMPORARIES)
def test_temporaries_are_those_of_one_layer(name):
    make, most = _TEMPORARIES[name]

    def layer(w, x):
        return x + jnp.tanh(x @ w) @ w.T

    def embed(params, batch):
        return batch + params["in"][None]

    def head(params, x, batch):
        return jnp.sum(jnp.square(x - batch).astype(jnp.float32))

    optimizer = make()
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {"in": struct((512,)), "layers": struct((16, 512, 1024))}
    opt_state, batch = jax.eval_shape(optimizer.init, params), struct((1, 512))
    step = gx.release(optimizer, embed, layer, head)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, batch).compile()
    used = compiled.memory_analysis()
    size = 16 * 512 * 1024
    assert used.temp_size_in_bytes < most * size
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, opt_state)))
    assert used.alias_size_in_bytes >= donated


# What does not fit -------------------------------------------------------------------------------


def _crossing() -> Any:
    plan = gx.plan_by_shape(_params(True)).with_kind("layers/up", gx.SharedBlocks((2, 64, 128)))
    return gx.fused_gefen(0.01, plan=plan)


_MISFITS: dict[str, Any] = {
    "clipping in the chain": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        {},
        "`max_norm`",
    ),
    "skipping in a wrapper": (lambda: optax.apply_if_finite(optax.sgd(0.1), 3), {}, "finite"),
    "clipping in the fused step": (lambda: gx.fused_gefen(0.1, max_norm=1.0), {}, "`max_norm`"),
    "gefen that is stacked": (lambda: gx.gefen(0.1), {}, "gx.fused_gefen"),
    "blocks over layers": (_crossing, {}, r"`layers/up`.*`plan\.with_kind`"),
    "a state without layers": (lambda: gx.microadam(0.1), {}, "`layers/.*as a list"),
    "noise": (lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), {}, "random"),
    "noise, now and then": (
        lambda: optax.conditionally_transform(optax.add_noise(0.1, 0.5, 0), lambda step: step > 3),
        {},
        "random",
    ),
    "no layers": (
        lambda: optax.sgd(0.1),
        {"layers": lambda p: {"a": p["out"], "b": p["table"]}},
        "`layers`",
    ),
    "layers of another name": (
        lambda: optax.sgd(0.1),
        {"layers": lambda p: p["blocks"]},
        r"does not find the layers.*KeyError\('blocks'\).*`layers=lambda",
    ),
    "muon that is stacked": (lambda: gx.gefen_muon(0.1), {}, "gefen_muon.*as a list"),
    "a layer used twice": (
        lambda: optax.sgd(0.1),
        {"layers": lambda p: [p["layers"]] * 2},
        "each of them once",
    ),
    "layers that are made": (
        lambda: optax.sgd(0.1),
        {"layers": lambda p: [jax.tree.map(jnp.ones_like, p["layers"])]},
        "pick leaves",
    ),
    "a norm below 0": (lambda: optax.sgd(0.1), {"max_norm": -1.0}, "`max_norm`"),
}


@pytest.mark.parametrize("name", _MISFITS)
def test_what_does_not_fit_is_refused(name):
    make, options, message = _MISFITS[name]
    optimizer, params = make(), _params(True)
    opt_state = jax.eval_shape(optimizer.init, params)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_released(optimizer, **options), params, opt_state, _batch(0))


def test_numbered_layers_are_taken_for_one_that_is_stacked():
    """Which they may be: what `layer` then raises says so."""
    optimizer, layers = optax.sgd(0.1), {str(i): {"w": jnp.ones((8, 8))} for i in range(2)}
    args = {"layers": layers}, optimizer.init({"layers": layers}), jnp.ones((1, 8))

    def step(layer):
        return gx.release(optimizer, lambda _, x: x, layer, lambda _, x, __: jnp.sum(x))

    with pytest.raises(KeyError) as error:
        jax.eval_shape(step(lambda p, x: x @ p["w"]), *args)
    assert "make a list of them" in error.value.__notes__[0]
    jax.eval_shape(step(lambda p, x: x + (p["0"]["w"] * p["1"]["w"])[None]), *args)


def test_groups_of_flash_moments_that_cross_layers():
    """2 x 20 elements have two groups, as two layers have, but others: 32 and 8."""
    optimizer, params = gx.flash_lion(0.1), {"layers": jnp.ones((2, 20))}
    step = gx.release(optimizer, lambda _, x: x, lambda p, x: x + jnp.sum(p), lambda _, x, __: x)
    with pytest.raises(ValueError, match="`layers`.*cross layers"):
        jax.eval_shape(step, params, optimizer.init(params), 0.0)


@pytest.mark.parametrize(
    "head",
    [
        lambda params, x, batch: x,
        lambda params, x, batch: (jnp.sum(x), jnp.mean(x)),
        lambda params, x, batch: None,
        lambda params, x, batch: jnp.sum(x > 0),
    ],
)
def test_a_loss_must_be_a_scalar(head):
    optimizer, params = optax.sgd(0.1), _params(True)
    step = gx.release(optimizer, _embed, _layer, head)
    with pytest.raises(ValueError, match="`head` must return the loss, one floating scalar"):
        jax.eval_shape(step, params, optimizer.init(params), _batch(0))


_SEPARABLE: dict[str, Any] = {
    "schedule, mask": _OPTIMIZERS["adamw"],
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "lion": lambda: optax.lion(1e-3),
    "masked": lambda: optax.masked(optax.sgd(0.1, 0.9), _matrices),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params),
    ),
}


@pytest.mark.parametrize("name", _SEPARABLE)
def test_what_steps_each_leaf_by_itself_is_not_refused(name):
    optimizer, params = _SEPARABLE[name](), _params(True)
    state = jax.eval_shape(optimizer.init, params)
    new = jax.eval_shape(_released(optimizer), params, state, _batch(0))[:2]
    assert jax.tree.structure(new) == jax.tree.structure((params, state))
