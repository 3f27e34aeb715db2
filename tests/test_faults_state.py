"""Faults of other implementations' states, checkpoints and memory, each a test of ours.

Memory is what the compiler plans for a step on abstract values: nothing large is allocated here.
"""

import dataclasses
import functools
import math
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gefen_jax as gx
from gefen_jax._axis_rule import _evidence
from gefen_jax._backend import CHUNK
from gefen_jax._candidates import candidate_blocks
from gefen_jax._histogram import _count

pytestmark = pytest.mark.once

ROWS, COLUMNS = gx.SharedBlocks((1, 256)), gx.SharedBlocks((32, 1))
FLAT, PER_ELEMENT = gx.FlatPeriods(256, 256), gx.FlatPeriods(1, 256)


def make_params() -> dict:
    """Leaves of every kind of state."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "coded": array(32, 256),
        "narrow": array(32, 256, dtype=jnp.bfloat16),
        "last run shorter": array(3, 2003),
        "small": array(16),
        "scalar": array(),
        "empty": array(0, 5),
    }


def make_grads(step: int) -> dict:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), make_params())


@functools.cache
def calibrated() -> gx.Plan:
    params, grads = make_params(), make_grads(100)
    # Shapes that no run divides are calibrated in test_bytes.py and test_faults_numbers.py.
    return gx.calibrate(params, grads | {"last run shorter": None})


PLANS = {
    "no plan": lambda: None,
    "calibrated": calibrated,
    "columns": lambda: calibrated().with_kind("coded", COLUMNS),
    "flat": lambda: calibrated().with_kind("coded", FLAT),
    "flat, nu per element": lambda: calibrated().with_kind("coded", PER_ELEMENT),
}


@functools.cache
def optimizer(name: str) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(1e-2, 1e-3, 20)
    return optax.chain(
        optax.clip_by_global_norm(1e3), gx.gefen(schedule, weight_decay=0.1, plan=PLANS[name]())
    )


@functools.cache
def compiled_step(name: str):
    tx = optimizer(name)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(name, params, state, steps):
    for i in steps:
        params, state = compiled_step(name)(params, state, make_grads(i))
    return params, state


def gefen_state(state) -> gx.ScaleByGefenState:
    return next(
        s
        for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, gx.ScaleByGefenState))
        if isinstance(s, gx.ScaleByGefenState)
    )


def assert_same(a, b):
    """Equal to the last bit, in structure, dtypes and values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# 12. Resume is bit-exact.

FORMATS = {  # saves, and loads with a fresh state at hand
    "numpy": (lambda s: jax.tree.map(np.array, s), lambda saved, like: saved),
    "jax": (lambda s: jax.tree.map(np.array, s), lambda saved, _: jax.tree.map(jnp.array, saved)),
    "flax msgpack": (
        flax.serialization.to_bytes,
        lambda saved, like: flax.serialization.from_bytes(like, saved),
    ),
    "pickle": (
        lambda s: pickle.dumps(jax.tree.map(np.array, s)),
        lambda saved, like: pickle.loads(saved),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PLANS)
def test_12_resume_is_bit_exact(name, form):
    save, load = FORMATS[form]
    params = make_params()
    state = optimizer(name).init(params)
    expected = train(name, params, state, range(10))
    saved = save(train(name, params, state, range(5)))
    loaded = load(saved, (params, state))
    before = jax.tree.map(np.array, loaded)
    assert_same(loaded[1], jax.tree.map(np.array, train(name, params, state, range(5))[1]))
    resumed = train(name, *loaded, range(5, 10))
    assert_same(resumed, expected)
    assert_same(loaded, before)  # loading and training leave the loaded object as it was


# 13 and 14. What does not fit is refused by name, and changes nothing.


def swapped(state: gx.ScaleByGefenState) -> gx.ScaleByGefenState:
    mu = state.mu
    return state._replace(
        mu=mu | {"coded": mu["last run shorter"], "last run shorter": mu["coded"]}
    )


def cast(state: gx.ScaleByGefenState) -> gx.ScaleByGefenState:
    return optax.tree.cast(state, jnp.bfloat16)


def without_scale(state: gx.ScaleByGefenState) -> gx.ScaleByGefenState:
    return state._replace(scale=state.scale | {"coded": None})


def codes_as_floats(state: gx.ScaleByGefenState) -> gx.ScaleByGefenState:
    return state._replace(mu=state.mu | {"coded": state.mu["coded"].astype(jnp.float32)})


MISFITS = (swapped, cast, without_scale, codes_as_floats)


@pytest.mark.parametrize("misfit", MISFITS)
def test_13_a_mixed_up_state_is_refused_and_left_alone(misfit):
    tx = gx.scale_by_gefen(plan=calibrated())
    wrong = misfit(tx.init(make_params()))
    before = jax.tree.map(np.array, wrong)
    with pytest.raises(ValueError, match="`coded`"):
        tx.update(make_grads(0), wrong)
    assert_same(wrong, before)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.999])
def test_13_a_truncated_checkpoint_changes_nothing(cut):
    state = optimizer("calibrated").init(make_params())
    before = jax.tree.map(np.array, state)
    data = flax.serialization.to_bytes(train("calibrated", make_params(), state, range(2))[1])
    with pytest.raises(ValueError):
        flax.serialization.from_bytes(state, data[: int(cut * len(data))])
    assert_same(state, before)


KINDS = {
    "rows": ROWS,
    "columns": COLUMNS,
    "boxes": gx.SharedBlocks((4, 256)),
    "flat": FLAT,
    "flat, nu per element": PER_ELEMENT,
    "exact": gx.Exact(),
}


@pytest.mark.parametrize("used", KINDS)
@pytest.mark.parametrize("made", KINDS)
def test_14_a_state_of_another_plan_is_refused_by_name(made, used):
    params = {"x": {"coded": jnp.zeros((32, 256))}, "small": jnp.zeros(3)}
    plan = gx.plan_by_shape(params)
    state = gx.scale_by_gefen(plan=plan.with_kind("x/coded", KINDS[made])).init(params)
    tx = gx.scale_by_gefen(plan=plan.with_kind("x/coded", KINDS[used]))
    if made == used:
        jax.eval_shape(tx.update, params, state)
        return
    with pytest.raises(ValueError, match=r"the state of `x/coded` does not fit its plan"):
        jax.eval_shape(tx.update, params, state)


@pytest.mark.parametrize("plan", [lambda p: None, gx.plan_by_shape, lambda p: gx.calibrate(p, p)])
def test_14_an_absent_leaf_needs_no_plan(plan):
    # As in equinox's filtered trees: None in the parameters and in the gradients.
    params = {"w": jnp.ones((32, 256)), "activation": None}
    tx = gx.gefen(1e-3, plan=plan(params))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["activation"] is None and np.all(np.isfinite(updates["w"]))


def test_14_the_plan_is_never_guessed_again():
    # Later gradients have their structure along the other axis, and other sizes.
    rng = np.random.default_rng(0)
    rows = np.exp(rng.standard_normal((512, 1))) * rng.standard_normal((512, 512))
    first, later = ({"w": jnp.asarray(g, jnp.float32)} for g in (rows, 1e3 * rows.T))
    plan = gx.calibrate(first, first)
    assert plan["w"].kind == gx.SharedBlocks((1, 512))
    assert gx.calibrate(first, later)["w"].kind == gx.SharedBlocks((512, 1))
    before = hash(plan)
    tx = gx.scale_by_gefen(plan=plan)
    state = tx.init(first)
    saved = jax.tree.map(np.array, state)
    step = jax.jit(tx.update)
    for resumed in (state, saved):
        for _ in range(3):
            _, resumed = step(later, resumed)
        assert_same(resumed.codebook, state.codebook)
        assert_same(*(jax.tree.map(jnp.shape, s) for s in (resumed, state)))
    assert hash(plan) == before


# 15. Buffers are never shared.


def pointers(tree) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_15_no_two_arrays_share_a_buffer(name, jitted):
    tx, params = optimizer(name), make_params()
    init = jax.jit(tx.init) if jitted else tx.init
    state, another = init(params), init(params)
    found = pointers((params, state, another))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["no plan", "flat"])
def test_15_the_whole_state_can_be_donated(name):
    params = make_params()
    state, kept = optimizer(name).init(params), optimizer(name).init(params)
    expected = train(name, params, kept, range(3))
    step = jax.jit(compiled_step(name).__wrapped__, donate_argnums=(0, 1))
    given = jax.tree.map(jnp.array, params)
    for i in range(3):
        old = state
        given, state = step(given, state, make_grads(i))
        assert all(x.is_deleted() for x in jax.tree.leaves(gefen_state(old)) if x.size)
    assert_same((given, state), expected)
    # Neither another state nor the next one lost anything.
    assert_same(train(name, params, optimizer(name).init(params), range(3)), expected)


# 16. Scalars take part in everything.


def test_16_scalar_leaves_take_part():
    params = {"scale": jnp.float32(2.0), "w": jnp.ones((32, 256))}
    plan = gx.calibrate(params, params)
    assert plan["scale"].shape == () and plan["scale"].kind == gx.Exact()
    tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(0.1, weight_decay=0.1, plan=plan))
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    state, adamw_state = tx.init(params), adamw.init(params)
    assert gx.memory_report(state).by_tensor["scale"] == 8
    ours = theirs = params
    for _ in range(5):
        updates, state = tx.update(ours, state, ours)
        expected, adamw_state = adamw.update(theirs, adamw_state, theirs)
        ours, theirs = optax.apply_updates(ours, updates), optax.apply_updates(theirs, expected)
    assert gefen_state(state).mu["scale"].shape == ()
    # Exact moments are AdamW's; the gradient's norm sees the coded leaf too, whose updates are
    # AdamW's to a rounding error where all gradients of a block are equal.
    np.testing.assert_allclose(ours["scale"], theirs["scale"], rtol=5 * 10 * 2**-24)
    bare = gx.scale_by_gefen()
    update, state = bare.update(jnp.float32(3.0), bare.init(jnp.float32(1.0)))
    np.testing.assert_allclose(update, 1.0, rtol=1000 * 2**-24)


# 17. Counters are in the state.


@pytest.mark.parametrize("name", PLANS)
def test_17_a_saved_state_replays(name):
    params = make_params()
    middle = train(name, params, optimizer(name).init(params), range(4))
    ends = [train(name, *middle, range(4, 8)) for _ in range(2)]
    assert_same(*ends)
    assert int(gefen_state(middle[1]).count) == 4
    assert int(gefen_state(ends[0][1]).count) == 8


def test_17_nothing_is_frozen_by_compiling():
    name = "calibrated"
    params = make_params()
    state = optimizer(name).init(params)
    expected = train(name, params, state, range(4))
    traces = []

    @jax.jit
    def step(*args):
        traces.append(None)
        return compiled_step(name).__wrapped__(*args)

    ahead = step.lower(params, state, make_grads(0)).compile()
    for run in (ahead, step):
        now = params, state
        for i in range(4):
            now = run(*now, make_grads(i))
        assert_same(now, expected)
    assert len(traces) == 1


# 21 and 22. Memory.

LEAF = 1 << 26
PIECE = 4 * CHUNK  # bytes of a piece in float32


@dataclasses.dataclass(frozen=True)
class Case:
    """A leaf of 64 million elements, its kind, and the temporaries allowed in float32 leaves.

    0.2 is generous: a step needs some arrays of one piece (1 / 256 of a leaf) and statistics.
    """

    shape: tuple[int, ...]
    kind: gx.SharedBlocks | gx.FlatPeriods | None = None
    bound: float = 0.2
    dtype: str = "float32"


MEMORY = {
    "vector": Case((LEAF,)),
    "matrix": Case((8192, 8192)),
    "columns": Case((4096, 16384), gx.SharedBlocks((4096, 1))),
    "runs of columns": Case((4096, 16384), gx.SharedBlocks((1024, 1))),
    "stack of columns": Case((16, 2048, 2048), gx.SharedBlocks((1, 1024, 1))),
    "flat": Case((4096, 16384), gx.FlatPeriods(1024, 1024)),
    "flat, nu per element": Case((4096, 16384), gx.FlatPeriods(1, 256)),
    "float16": Case((8192, 8192), dtype="float16"),
    # XLA on a CPU, before jax 0.11, slices bfloat16 only after converting it to float32: one leaf.
    "bfloat16": Case((8192, 8192), bound=1.2, dtype="bfloat16"),
    "bfloat16 columns": Case((4096, 16384), gx.SharedBlocks((4096, 1)), 1.2, "bfloat16"),
    # A shorter last run makes two leaves of one: their gradients and codes are sliced, 1.25 leaves.
    "shorter last run": Case((4096, 16384), gx.SharedBlocks((1000, 1)), 1.3),
}


def planned_temporaries(params, plan, *, donate_grads=False) -> int:
    """Bytes of temporaries of a jitted training step on abstract values."""
    tx = gx.gefen(1e-3, weight_decay=0.1, plan=plan)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), state
        return (*new, grads) if donate_grads else new

    donated = (0, 1, 2) if donate_grads else (0, 1)
    compiled = jax.jit(step, donate_argnums=donated).lower(params, state, params).compile()
    analysis = compiled.memory_analysis()
    arguments = (params, state, params) if donate_grads else (params, state)
    aliased = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    assert analysis.alias_size_in_bytes >= aliased  # in place
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "donate_grads"),
    [*((name, False) for name in MEMORY), ("matrix", True), ("columns", True)],
)
def test_22_temporaries_of_a_step_are_bounded_by_a_piece(name, donate_grads, record_property):
    case = MEMORY[name]
    params = {"w": jax.ShapeDtypeStruct(case.shape, case.dtype)}
    plan = gx.plan_by_shape(params)
    if case.kind is not None:
        plan = plan.with_kind("w", case.kind)
    fraction = planned_temporaries(params, plan, donate_grads=donate_grads) / (4 * LEAF)
    record_property(f"leaves of temporaries, {name}, donated {donate_grads}", round(fraction, 4))
    assert fraction <= case.bound


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_21_no_float32_copy_of_the_model(dtype, record_property):
    leaves = 8
    params = {str(i): jax.ShapeDtypeStruct((2048, 4096), dtype) for i in range(leaves)}
    fraction = planned_temporaries(params, gx.plan_by_shape(params)) / (4 * LEAF / leaves)
    record_property(f"leaves of temporaries, {leaves} leaves, {dtype}", round(fraction, 4))
    assert fraction <= 1.2


# About what one whole leaf needs, in leaves of float32: with columns as blocks it is stepped alone.
SMALL = {"shared blocks": (gx.SharedBlocks((1, 256)), 3), "columns": (gx.DualCode((256, 1)), 4)}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA drops barriers before it schedules")
@pytest.mark.parametrize("name", SMALL)
def test_21_temporaries_of_small_leaves_do_not_add_up(name, record_property):
    """Leaves that are not cut into pieces are stepped one after the other."""
    kind, bound = SMALL[name]
    params = {str(i): jax.ShapeDtypeStruct((256, 1024), jnp.float32) for i in range(8)}
    assert math.prod(params["0"].shape) <= CHUNK
    plan = gx.plan_by_shape(params).with_kind("*", kind)
    leaves = planned_temporaries(params, plan) / (4 * math.prod(params["0"].shape))
    record_property(f"leaves of temporaries, {name}, 8 small leaves", round(leaves, 4))
    assert leaves <= bound


def test_21_init_needs_nothing_beyond_the_state():
    params = {"w": jax.ShapeDtypeStruct((8192, 8192), jnp.float32)}
    tx = gx.gefen(1e-3)
    analysis = jax.jit(tx.init).lower(params).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= PIECE
    state = gx.memory_report(jax.eval_shape(tx.init, params)).total_bytes
    tuple_table = 16 * len(jax.tree.leaves(jax.eval_shape(tx.init, params)))
    assert analysis.output_size_in_bytes <= state + tuple_table


# What calibration runs on a leaf, with what it may need beyond the gradient, in float32 leaves.
CALIBRATION = {"evidence": 1.05, "histogram": 0.1}


@pytest.mark.parametrize("part", CALIBRATION)
def test_21_calibration_needs_one_leaf_at_a_time(part, record_property):
    shape = (4096, 16384)
    blocks = tuple(candidate_blocks(shape))
    run = {
        "evidence": functools.partial(_evidence, blocks=blocks),
        "histogram": functools.partial(_count, block=blocks[0]),
    }[part]
    g = jax.ShapeDtypeStruct(shape, jnp.float32)
    temporaries = jax.jit(run).lower(g).compile().memory_analysis().temp_size_in_bytes
    record_property(f"leaves of temporaries, {part}", round(temporaries / (4 * LEAF), 4))
    assert temporaries <= CALIBRATION[part] * 4 * LEAF


def test_21_calibration_keeps_nothing():
    grads = {str(i): jnp.asarray(make_grads(i)["coded"]) for i in range(3)}
    gx.calibrate(grads, grads)

    def alive() -> int:
        return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())

    before = alive()
    plan = gx.calibrate(grads, grads)
    assert alive() <= before
    assert math.isclose(plan.bytes_per_param, 1, rel_tol=0.1)


_STATES = {"adamw": optax.scale_by_adam(), "gefen": gx.scale_by_gefen()}
_STEPS = {
    "gefen": (lambda g, s, p: gx.scale_by_gefen().update(g, s, p), "adamw", "from_adam"),
    "split": (
        lambda g, s, p: gx.with_split_weights(gx.scale_by_gefen()).update(g, s, p),
        "gefen",
        "SplitWeightsState, got ScaleByGefenState",
    ),
    "split and fused": (
        lambda g, s, p: gx.with_split_weights(gx.fused_gefen(1e-3)).step(g, s, p),
        "gefen",
        "SplitWeightsState, got ScaleByGefenState",
    ),
}


@pytest.mark.parametrize("name", _STEPS)
def test_the_state_of_another_optimizer_is_refused(name):
    step, other, message = _STEPS[name]
    params = {"w": jnp.ones((4, 8))}
    with pytest.raises((TypeError, ValueError), match=message):
        step(params, _STATES[other].init(params), params)


def test_a_fused_optimizer_is_no_part_of_a_chain():
    fused, params = gx.fused_gefen(1e-3), {"w": jnp.ones((4, 8))}
    assert not hasattr(fused, "update")
    with pytest.raises(AttributeError, match="use `gefen`"):
        optax.chain(optax.clip(1.0), fused)
        optax.MultiSteps(fused, 2).update(params, optax.MultiSteps(fused, 2).init(params), params)
