"""The fused step: `gefen` and `apply_updates` in one, from the same state and to the same state.

``u = 2**-24`` is the relative rounding error of float32.

Both sides do the same float32 operations in the same order, and mostly the results are equal to
the bit. But they are two programs, of which XLA may contract a product and a sum in either. The
directions are the same expression of the stored state, at most 16 roundings on either side; so are
the sums with the weight decay and of the parameter: ``32 u`` of the change and of the weight decay,
and ``4 u`` of the parameter. A code flips where a fraction, or the middle between two entries,
decides within rounding (`test_dual` says how seldom): one block of a leaf may differ in a step.
Every comparison starts from one state, so that such a code has no sequel.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._builtin import builtin_codebook
from gefen_jax._transform import _update_leaf

_U = 2.0**-24
_RATE = 1e-2

# Shape, kind, and elements of a block that may differ. Every kind, and of dual codes blocks that
# lie in one stretch, in several, and along an inner axis that pieces cut with an overlap.
_LEAVES: dict[str, tuple[tuple[int, ...], Any, int]] = {
    "exact": ((5, 7), gx.Exact(), 0),
    "rows": ((7, 64), gx.DualCode((1, 64)), 64),
    "heads": ((3, 4, 8), gx.DualCode((1, 4, 8)), 32),
    "inner": ((7, 4, 67), gx.DualCode((1, 4, 1)), 4),
    "wide": ((7, 4, 67), gx.WideDualCode((1, 4, 1)), 4),
    "shared": ((6, 64), gx.SharedBlocks((1, 64)), 64),
    "ragged": ((33, 6), gx.SharedBlocks((16, 1)), 16),
    "flat": ((6, 8), gx.FlatPeriods(16, 16), 16),
    "nu per element": ((6, 8), gx.FlatPeriods(1, 16), 16),
}


def _plan(leaves: dict[str, Any] = _LEAVES) -> gx.Plan:
    entries = (gx.LeafPlan(k, shape, kind, "test") for k, (shape, kind, _) in leaves.items())
    return gx.Plan(tuple(entries), builtin_codebook(), "test", "shape")


def _params(leaves: dict[str, Any] = _LEAVES) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, (s, *_) in leaves.items()}


def _grads(t: int, leaves: dict[str, Any] = _LEAVES) -> dict[str, Any]:
    """Of different size from row to row; some exactly 0."""
    rng = np.random.default_rng([1, t])
    grads = {}
    for k, (shape, *_) in leaves.items():
        rows = 10.0 ** rng.integers(-3, 1, (shape[0],) + (1,) * (len(shape) - 1))
        g = rng.normal(size=shape) * rows * (rng.random(shape) < 0.9)
        grads[k] = jnp.asarray(g, jnp.float32)
    return grads


def _gefen(max_norm: float | None = None, **arguments: Any) -> Any:
    """What the fused step stands for."""
    tx = gx.gefen(_RATE, **arguments) if "learning_rate" not in arguments else gx.gefen(**arguments)
    return tx if max_norm is None else optax.chain(optax.clip_by_global_norm(max_norm), tx)


def _fused(**arguments: Any) -> gx.FusedGefen:
    return gx.fused_gefen(**({"learning_rate": _RATE} | arguments))


def _unfused_step(tx: Any) -> Any:
    def step(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _gefen_state(opt_state: Any) -> gx.ScaleByGefenState:
    return optax.tree.get(opt_state, "ScaleByGefenState")


def _assert_same(ours: Any, theirs: Any, before: Any, decay: float = 0.1, leaves=_LEAVES) -> None:
    """Parameters and states after one step from the same; see the docstring of the module."""
    (our_params, our_state), (params, state) = (jax.device_get(x) for x in (ours, theirs))
    assert jax.tree.structure(our_state) == jax.tree.structure(state)
    our_rest, rest = (optax.tree.set(s, mu=0, scale=0, nu=0) for s in (our_state, state))
    jax.tree.map(np.testing.assert_array_equal, our_rest, rest)  # counts, schedules, codebooks
    mine, other = _gefen_state(our_state), _gefen_state(state)
    for k, (_, _, may_differ) in leaves.items():
        p, old = params[k], np.asarray(before[k])
        assert our_params[k].dtype == p.dtype and our_params[k].shape == p.shape
        change = np.abs(p - old) + _RATE * decay * np.abs(old)
        bound = _U * (4 * np.abs(old) + 32 * change)
        assert np.sum(np.abs(our_params[k] - p) > bound) <= may_differ, k
        for slot in ("mu", "scale", "nu"):
            a, b = (getattr(s, slot)[k] for s in (mine, other))
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            codes = b.dtype == np.uint8
            largest = 0 if codes else 16 * _U * np.abs(b).max()
            differ = np.sum(~np.isclose(a, b, rtol=0 if codes else 16 * _U, atol=largest))
            assert differ <= (may_differ if b.shape == p.shape else min(may_differ, 1)), (k, slot)


class _Setting(NamedTuple):
    """Arguments of both, and from which leaf size on they work in pieces."""

    arguments: dict[str, Any] = {}
    chunk: int = 1 << 18


_MASK = {k: i % 2 == 0 for i, k in enumerate(_LEAVES)}
_SETTINGS = {
    "schedules, mask": _Setting(
        {
            "learning_rate": optax.linear_schedule(0.0, 2 * _RATE, 4),
            "weight_decay": optax.linear_schedule(0.1, 0.0, 4),
            "mask": _MASK,
        }
    ),
    "nesterov, mask function, clipped": _Setting(
        {
            "nesterov": True,
            "eps_root": 1e-6,
            "weight_decay": 0.1,
            "mask": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
            "max_norm": 1.0,
        }
    ),
    "in pieces": _Setting({"weight_decay": 0.1, "max_norm": 1.0}, chunk=100),
    "in pieces, nesterov, nothing to clip": _Setting(
        {"nesterov": True, "b2": 0.95, "weight_decay": 0.0, "max_norm": 1e6}, chunk=300
    ),
}


@pytest.fixture
def chunk(monkeypatch):
    """Sets the size of a piece; compiled leaves know the last one."""

    def set_chunk(size: int) -> None:
        monkeypatch.setattr(_backend, "CHUNK", size)
        _update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)

    yield set_chunk
    _update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)


@pytest.mark.once
@pytest.mark.parametrize("name", _SETTINGS)
def test_it_is_gefen_and_apply_updates(name, chunk):
    """Step by step, and each goes on from the other's state in turn."""
    setting = _SETTINGS[name]
    chunk(setting.chunk)
    arguments = setting.arguments | {"plan": _plan()}
    fused, unfused = _fused(**arguments), _gefen(**arguments)
    step, other = jax.jit(fused.step), jax.jit(_unfused_step(unfused))
    params, state = _params(), fused.init(_params())
    assert jax.tree.structure(state) == jax.tree.structure(unfused.init(params))
    for t in range(1, 5):
        grads = _grads(t)
        ours, theirs = step(grads, state, params), other(grads, state, params)
        _assert_same(ours, theirs, params)
        params, state = (ours, theirs)[t % 2]
    assert step._cache_size() == 1
    assert _gefen_state(state).count == 4


_NARROW = [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float32)]


_SOME = {k: _LEAVES[k] for k in ("exact", "rows", "shared")}


@pytest.mark.parametrize("p_dtype, g_dtype", _NARROW)
def test_narrow_floats_are_rounded_once(p_dtype, g_dtype, chunk, strict_promotion):
    """What float32 gives, in the parameter's dtype: at most an ulp of it beside the other side's.

    The norm and the clipped gradients are float32 too.
    """
    chunk(100)
    fused = _fused(plan=_plan(_SOME), weight_decay=0.1, max_norm=1.0)
    step = jax.jit(fused.step)
    params = {k: p.astype(p_dtype) for k, p in _params(_SOME).items()}
    state = fused.init(params)
    eps = float(jnp.finfo(p_dtype).eps)
    for t in range(1, 3):
        grads = {k: g.astype(g_dtype) for k, g in _grads(t, _SOME).items()}
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
        expected, _ = step(wide[0], state, wide[1])
        new, next_state = step(grads, state, params)
        for k, (_, _, may_differ) in _SOME.items():
            assert new[k].dtype == p_dtype
            ours, theirs = (np.asarray(x[k], np.float32) for x in (new, expected))
            bound = eps * np.abs(theirs) + 36 * _U * np.abs(theirs)
            assert np.sum(np.abs(ours - theirs) > bound) <= may_differ, k
        params, state = new, next_state


def test_what_has_no_gradient_stays():
    """Integers, None in params or grads, empty leaves; and the norm is that of the others."""
    params = {
        "w": jnp.ones((64, 128)),
        "steps": jnp.arange(3),
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "frozen": jnp.ones((64, 64)),
    }
    grads: dict[str, Any] = {
        "w": jnp.full((64, 128), 2.0),
        "steps": np.zeros(3, jax.dtypes.float0),
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "frozen": None,
    }
    fused = gx.fused_gefen(0.1, weight_decay=0.0, max_norm=1.0)
    state = fused.init(params)
    new, new_state = fused.step(grads, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["steps"], params["steps"])
    np.testing.assert_array_equal(new["frozen"], params["frozen"])
    assert new["none"] is None and new["empty"].shape == (0, 4)
    old_moments, moments = _gefen_state(state), _gefen_state(new_state)
    np.testing.assert_array_equal(moments.mu["frozen"], old_moments.mu["frozen"])
    # A constant gradient: every direction is 1, but for one gap of nu's levels, a sixteenth of an
    # octave at most, and one of m's, 0.27 of a block's largest.
    np.testing.assert_allclose(new["w"], 0.9, atol=0.1 * (0.27 + 1 / 16))
    assert float(fused.step(grads, new_state, new)[0]["w"][0, 0]) < 0.9


def test_scan_equals_loop():
    fused = _fused(plan=_plan(_SOME), weight_decay=0.1)
    sequence = [_grads(t, _SOME) for t in range(1, 4)]

    @jax.jit
    def run(params, state, grads):
        def body(carry, g):
            params, state = carry
            return fused.step(g, state, params), None

        return jax.lax.scan(body, (params, state), grads)[0]

    params, step = _params(_SOME), jax.jit(fused.step)
    state = fused.init(params)
    one = jax.tree.map(lambda x: x[None], sequence[0])
    _assert_same(run(params, state, one), step(sequence[0], state, params), params, leaves=_SOME)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)
    _, state = run(params, state, stacked)
    assert _gefen_state(state).count == 3


def test_vmap_over_an_ensemble():
    fused = _fused(plan=_plan(_SOME), weight_decay=0.1)
    both = [jax.tree.map(lambda p, i=i: p + i, _params(_SOME)) for i in range(2)]
    grads = [_grads(t, _SOME) for t in range(1, 3)]
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    params, state = stack(*both), jax.vmap(fused.init)(stack(*both))
    new, new_state = jax.jit(jax.vmap(fused.step))(stack(*grads), state, params)
    step = jax.jit(fused.step)
    for i in range(2):
        of_one = jax.tree.map(lambda x, i=i: x[i], (new, new_state))
        _assert_same(of_one, step(grads[i], fused.init(both[i]), both[i]), both[i], leaves=_SOME)


_SPREAD = {
    "dual": ((16, 512), gx.DualCode((1, 256)), 256),
    "wide": ((16, 512), gx.WideDualCode((1, 256)), 256),
    "shared": ((16, 512), gx.SharedBlocks((1, 256)), 256),
    "exact": ((16, 512), gx.Exact(), 0),
}


@pytest.mark.parametrize(
    "axis_type, spec", [(AxisType.Auto, P("x", "y")), (AxisType.Explicit, P(None, ("x", "y")))]
)
def test_a_mesh_sees_what_one_device_sees(axis_type, spec):
    """Also where shards hold parts of blocks; results lie as the parameters do."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, spec)
    fused = _fused(plan=_plan(_SPREAD), weight_decay=0.1, max_norm=1.0)
    step, params, grads = jax.jit(fused.step), _params(_SPREAD), _grads(1, _SPREAD)
    expected = step(grads, fused.init(params), params)
    spread = jax.device_put(params, sharding)
    new, state = step(jax.device_put(grads, sharding), jax.jit(fused.init)(spread), spread)
    for k in _SPREAD:
        assert new[k].sharding.is_equivalent_to(sharding, 2)
        assert _gefen_state(state).mu[k].sharding.is_equivalent_to(sharding, 2)
    _assert_same((new, state), expected, params, leaves=_SPREAD)


# Memory ------------------------------------------------------------------------------------------

_LARGE = (4096, 4096)


class _Memory(NamedTuple):
    """A leaf of 16M elements; temporaries may take a tenth of it."""

    kind: Any
    max_norm: float | None = 1.0


_MEMORY = {
    "dual": _Memory(gx.DualCode((1, 256))),
    "dual columns": _Memory(gx.DualCode((256, 1))),
    "wide": _Memory(gx.WideDualCode((1, 256))),
    "shared": _Memory(gx.SharedBlocks((1, 1024))),
    "flat": _Memory(gx.FlatPeriods(1024, 1024)),
    # Two fusions read the gradient: clipped, it would be stored.
    "exact": _Memory(gx.Exact(), max_norm=None),
}


@pytest.mark.parametrize("name", _MEMORY)
def test_a_donated_step_copies_nothing(name):
    case = _MEMORY[name]
    params = {"w": jax.ShapeDtypeStruct(_LARGE, "f4"), "b": jax.ShapeDtypeStruct((64,), "f4")}
    plan = gx.plan_by_shape(params).with_kind("w", case.kind)
    fused = gx.fused_gefen(1e-3, plan=plan, max_norm=case.max_norm)
    state = jax.eval_shape(fused.init, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        return fused.step(grads, state, params)

    compiled = step.lower(params, state, params).compile()
    analysis, size = compiled.memory_analysis(), math.prod(_LARGE)
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert analysis.alias_size_in_bytes >= donated
    assert analysis.temp_size_in_bytes < 0.1 * size * 4
    # Nor is anything of the leaf's size copied (in fusions, what is called so is in registers).
    computations = compiled.as_text().split("\n\n")
    for text in (c for c in computations if not c.startswith("%fused_computation")):
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text):
            assert math.prod(map(int, dims.split(","))) < size


# What does not fit -------------------------------------------------------------------------------


def _step_with(fused: gx.FusedGefen, **changed: Any) -> Any:
    params = {"w": jnp.ones((64, 128))}
    arguments = {"grads": params, "opt_state": fused.init(params), "params": params} | changed
    return fused.step(**arguments)


_W = {"w": jnp.ones((64, 128))}
_MISFITS = {
    "a gradient's shape": ({}, {"grads": {"w": jnp.ones((64, 64))}}, r"`updates\[w\]`"),
    "a parameter's shape": ({}, {"params": {"w": jnp.ones((64, 64))}}, r"`params\[w\]`"),
    "a parameter's dtype": ({}, {"params": {"w": jnp.ones((64, 128), int)}}, r"`params\[w\]`"),
    "another optimizer": ({}, {"opt_state": optax.adamw(1e-3).init(_W)}, "`opt_state`"),
    "no state at all": ({}, {"opt_state": ()}, "`opt_state`"),
    "a state without clipping": (
        {"max_norm": 1.0},
        {"opt_state": gx.gefen(1e-3).init(_W)},
        "`opt_state`",
    ),
    "another plan's state": (
        {},
        {
            "opt_state": gx.gefen(1e-3, plan=gx.plan_by_shape(_W).with_kind("w", gx.Exact())).init(
                _W
            )
        },
        "the state of `w`",
    ),
}


@pytest.mark.parametrize("name", _MISFITS)
def test_what_does_not_fit_is_named(name):
    arguments, changed, message = _MISFITS[name]
    with pytest.raises(ValueError, match=message):
        _step_with(gx.fused_gefen(1e-3, **arguments), **changed)


_BAD_ARGUMENTS = {
    "max_norm": -1.0,
    "learning_rate": -1.0,
    "weight_decay": -1.0,
    "b1": 1.0,
    "backend": "cuda",
}


@pytest.mark.parametrize("name", _BAD_ARGUMENTS)
def test_arguments_out_of_range(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        gx.fused_gefen(**({"learning_rate": 1e-3} | {name: _BAD_ARGUMENTS[name]}))


# Split weights -----------------------------------------------------------------------------------


_SPLIT = [(16, "bfloat16"), (24, "bfloat16"), (32, "bfloat16"), (24, "float16")]


@pytest.mark.once
@pytest.mark.parametrize("bits, dtype", _SPLIT)
def test_split_weights_are_those_of_the_unfused_form(bits, dtype, chunk):
    """Bit for bit: every rounding is that of `with_split_weights(gefen)`, in pieces or whole.

    But where XLA contracts a product with a sum in one of the two programs (2^-24 of the number):
    that takes a last bit of the 24, or a code, over the edge in fewer than 1 of 100.
    """
    chunk(100)
    arguments = {"plan": _plan(_SOME), "weight_decay": 0.1, "mask": {k: k != "rows" for k in _SOME}}
    unfused = gx.with_split_weights(_gefen(max_norm=1.0, **arguments), bits, dtype=dtype)
    fused = gx.with_split_weights(_fused(max_norm=1.0, **arguments), bits, dtype=dtype)
    params = _params(_SOME)
    weights, state = gx.split_weights(params, bits, dtype)[0], fused.init(params)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(unfused.init(params)), strict=True):
        np.testing.assert_array_equal(a, b)
    step, other = jax.jit(fused.step), jax.jit(_unfused_step(unfused))
    for t in range(1, 4):
        grads = jax.tree.map(lambda g: g.astype(dtype), _grads(t, _SOME))
        ours, theirs = step(grads, state, weights), other(grads, state, weights)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            same = np.isclose(a, b, rtol=16 * _U, atol=0) if b.dtype == jnp.float32 else a == b
            # One block of the smallest leaf, 16 rows of 6 columns, may have another scale.
            assert np.sum(~np.asarray(same)) <= max(1, 0.01 * b.size)
        weights, state = (ours, theirs)[t % 2]
    assert int(state.count) == 3


@pytest.mark.parametrize("bits, most", [(24, 2.3), (16, 2.2)])
def test_no_float32_leaf_of_split_weights(bits, most):
    """A few pieces of 2^18 elements beside the 2^24 of the leaf; the unfused form takes 5 bytes.

    And another array of new weights, as `gefen_jax._chunks.Chunk` says.
    """
    weights = {"w": jax.ShapeDtypeStruct(_LARGE, jnp.bfloat16)}
    fused = gx.with_split_weights(gx.fused_gefen(1e-3, weight_decay=0.1), bits)
    state = jax.eval_shape(fused.init, weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, grads):
        return fused.step(grads, state, weights)

    analysis = step.lower(weights, state, weights).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < most * math.prod(_LARGE)
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, state)))
    assert analysis.alias_size_in_bytes >= donated
