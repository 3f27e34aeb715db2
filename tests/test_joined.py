"""Leaves that a CPU steps in one loop: the bits of every leaf alone, in less to compile."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx
from gefen_jax import _backend, _fused_leaf, _groups, _transform
from gefen_jax._joined import _Rows

# Rows of 16 elements, the run of all blocks: a leaf of one row; sizes that share no divisor; one
# with several axes. Blocks along columns, and small exact leaves, are stepped alone.
_SHAPES = {
    "one": (1, 16),
    "prime": (37, 16),
    "wide": (5, 96),
    "deep": (3, 4, 32),
    "large": (61, 64),
    "columns": (16, 24),
    "bias": (24,),
}
_ROWS = (1, 37, 5 * 6, 3 * 4 * 2, 61 * 4)


def _zeros(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in _SHAPES.items()}


def _plan(kind=gx.DualCode):
    plan = gx.plan_by_shape(_zeros()).with_kind("bias", gx.Exact())
    for name, shape in _SHAPES.items():
        if name not in ("columns", "bias"):
            plan = plan.with_kind(name, kind((1,) * (len(shape) - 1) + (16,)))
    return plan.with_kind("columns", kind((16, 1)))


def _grads(t, dtype=jnp.float32):
    keys = dict(zip(_SHAPES, jax.random.split(jax.random.key(t), len(_SHAPES)), strict=True))
    return {k: jax.random.normal(keys[k], s).astype(dtype) for k, s in _SHAPES.items()}


@pytest.fixture
def turns(monkeypatch):
    """Sets the elements of a turn and the leaves of a loop."""

    def set_turns(size: int, leaves: int = 64) -> None:
        for module in (_transform, _fused_leaf):
            monkeypatch.setattr(module, "JOINED_CHUNK", size)
        monkeypatch.setattr(_groups, "_JOINED_LEAVES", leaves)

    return set_turns


def _run(step, state, grads_of, params):
    step = jax.jit(step)
    for t in range(3):
        params, state = step(grads_of(t), state, params)
    return params, state


# What is stepped, and with which elements per turn: fewer than a leaf's, several leaves', all.
_CASES = {
    "dual codes": (gx.DualCode, {}, jnp.float32, 160),
    "one turn": (gx.DualCode, {}, jnp.float32, 1 << 19),
    "wide dual codes": (gx.WideDualCode, {}, jnp.float32, 500),
    "nesterov, bfloat16": (gx.DualCode, {"nesterov": True}, jnp.bfloat16, 700),
}


@pytest.mark.once
@pytest.mark.parametrize("name", _CASES)
def test_bits_are_those_of_every_leaf_alone(name, turns):
    kind, arguments, dtype, size = _CASES[name]
    optimizer = gx.scale_by_gefen(plan=_plan(kind), **arguments)

    def step(grads, state, _):
        return optimizer.update(grads, state)

    results = []
    for leaves in (64, 2, 1) if name == "dual codes" else (64, 1):
        turns(size, leaves)
        results.append(_run(step, optimizer.init(_zeros()), lambda t: _grads(t, dtype), None))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.once
@pytest.mark.parametrize("mask", [None, {k: k != "wide" for k in _SHAPES}])
def test_the_fused_step_has_the_same_state_and_weights(mask, turns):
    """But for rounding: alone, a leaf's weights and moments are in one loop, and XLA may contract
    products and sums in other places (a few units in the last place of float32, in each of three
    steps). So may a code, once in a thousand, be its neighbour.
    """
    optimizer = gx.fused_gefen(1e-2, plan=_plan(), weight_decay=0.1, mask=mask, max_norm=1.0)
    results = []
    for leaves in (64, 1):
        turns(160, leaves)
        params = jax.tree.map(lambda x: x + 0.5, _zeros())
        results.append(_run(optimizer.step, optimizer.init(params), _grads, params))
    for new, other in zip(*map(jax.tree.leaves, results), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating):
            other_than = np.abs(new - other) > 3 * 4 * 2**-23 * np.maximum(np.abs(other), 2**-24)
        else:
            other_than = np.asarray(new != other)
        assert other_than.sum() <= 1 + new.size // 1000


def test_a_gradient_of_none_leaves_its_leaf_out(turns):
    turns(160)
    optimizer = gx.scale_by_gefen(plan=_plan())
    grads, state = _grads(0), optimizer.init(_zeros())
    updates, new = optimizer.update(grads | {"wide": None}, state)
    all_updates, all_new = optimizer.update(grads, state)
    assert updates["wide"] is None
    np.testing.assert_array_equal(new.mu["wide"], state.mu["wide"])
    for name in set(_SHAPES) - {"wide"}:
        np.testing.assert_array_equal(updates[name], all_updates[name])
        np.testing.assert_array_equal(new.mu[name], all_new.mu[name])


def test_leaves_of_other_dtypes_are_other_loops(turns):
    """And updates leave in the dtype of their gradient."""
    turns(160)
    optimizer = gx.scale_by_gefen(plan=_plan())
    grads, state = _grads(0), optimizer.init(_zeros())
    mixed = {
        k: g.astype(jnp.bfloat16 if k in ("wide", "one") else g.dtype) for k, g in grads.items()
    }
    updates, _ = optimizer.update(mixed, state)
    assert all(updates[k].dtype == mixed[k].dtype for k in _SHAPES)
    text = jax.jit(optimizer.update).lower(mixed, state).as_text()
    # One loop for the two, one for the others, none for leaves of less than a piece.
    assert text.count("stablehlo.while") == 2


# What is compiled -------------------------------------------------------------------------------


def _layers(number):
    layer = {"up": (8, 256), "down": (256, 16), "square": (40, 64), "bias": (24,)}
    return {
        f"layer_{i}": {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in layer.items()}
        for i in range(number)
    }


def _optimizer(tree, make):
    plan = gx.plan_by_shape(tree)
    for name in ("up", "down", "square"):
        plan = plan.with_kind(f"*{name}", gx.DualCode((1, 16)))
    return make(1e-3, plan=plan)


def _step(tx):
    if isinstance(tx, gx.FusedGefen):
        return lambda params, state, grads: tx.step(grads, state, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _lowered(number, make):
    tree = _layers(number)
    tx = _optimizer(tree, make)
    state = jax.eval_shape(tx.init, tree)
    return jax.jit(_step(tx), donate_argnums=(0, 1)).trace(tree, state, tree)


_KERNEL = re.compile(r"^%\S*fused_computation\S* .*?^\}", re.M | re.S)


def _kernels(text):
    """The kernels of a program, without names: XLA compiles equal ones once."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    names = r"%?[\w\-]*\.[\w.\-]*|param_\d+|%\w+"
    return {re.sub(names, "", kernel) for kernel in _KERNEL.findall(text)}


@pytest.mark.once
@pytest.mark.parametrize("make", [gx.gefen, gx.fused_gefen])
def test_the_number_of_kernels_does_not_grow_with_that_of_layers(make, turns):
    """One loop; nothing of a leaf's size is copied; kernels are those of shapes."""
    turns(1 << 12)
    kernels = {}
    for number in (4, 8):
        compiled = _lowered(number, make).lower().compile()
        text = compiled.as_text()
        assert text.count(" while(") == 1
        copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", _KERNEL.sub("", text))
        # At most what a turn takes (jax 0.12 copies the gradients it put together); one array of
        # every leaf would be twice as much, in each layer.
        sizes = (np.prod([int(n) for n in x.split(",") if n]) for x in copied)
        assert sum(sizes) <= 1 << 12
        kernels[number] = len(_kernels(text))
        # A turn's pieces, of 5 bytes per element and some of 4 that XLA computes from them.
        assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2 * (1 << 12)
    assert kernels[4] == kernels[8]


@pytest.mark.parametrize(
    "platform, chunk, loops",
    [("cpu", 1 << 10, 1), ("cuda", 1 << 10, 6), ("cuda", 1 << 20, 0), ("tpu", 1 << 10, 0)],
)
def test_only_a_cpu_joins(platform, chunk, loops, turns, monkeypatch):
    """Elsewhere every leaf has its own form; for a GPU a loop, if it is larger than a piece."""
    turns(1 << 10)
    monkeypatch.setattr(_backend, "CHUNK", 1 << 10)
    monkeypatch.setattr(_backend, "GPU_CHUNK", chunk)
    _transform._update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    text = _lowered(2, gx.gefen).lower(lowering_platforms=(platform,)).as_text()
    _transform._update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    functions = dict(re.findall(r"func.func \w+ @(\w+)\((.*?)\n  \}", text, re.S))
    called = sum(
        body.count("stablehlo.while") * max(1, len(re.findall(rf"call @{name}\(", text)))
        for name, body in functions.items()
    )
    assert called == loops


def test_every_row_is_taken_and_few_are_twice():
    rows = _Rows.of(_ROWS, 40)
    for size, part, last in zip(rows.sizes, rows.parts, rows.lasts, strict=True):
        starts = (min(turn * part, last) for turn in range(rows.turns))
        assert {start + i for start in starts for i in range(part)} == set(range(size))
    # Sizes with a common divisor: none.
    assert _Rows.of((12, 36, 48), 24).are_new


def test_xla_has_no_complaint_of_many_leaves(capfd, turns):
    """Its simplifier logs an error if it has to run more than 50 times."""
    turns(60 * 16)
    plan = gx.plan_by_shape(params := {str(i): jnp.zeros((4, 16)) for i in range(60)})
    optimizer = gx.scale_by_gefen(plan=plan.with_kind("*", gx.DualCode((1, 16))))
    jax.jit(optimizer.update).lower(params, optimizer.init(params)).compile()
    assert "simplif" not in capfd.readouterr().err
