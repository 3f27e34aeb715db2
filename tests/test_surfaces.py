"""Where an Optax optimizer is used: every surface takes Gefen, and it stays the same Gefen.

Most tests run eagerly: leaves of equal shape and kind are compiled once for the whole file.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._transform import check_number

_LEARNING_RATE = 1e-2

# Two programs of one step differ where XLA fuses a product and a sum: a few ulps per step of a
# handful. 2^-20 is 8 ulps of float32.
_ULPS = 2.0**-20
# An ulp moves a code only if it lies at a threshold: 255 thresholds on [-1, 1], a few ulps of at
# most 2^-24 wide, are hit by less than one in 10^4 elements.
_FLIPS = 1e-4
# And a flipped code moves the update by a codebook step, of at most 0.03, times the step size.
_FLIPPED_STEP = 0.03 * _LEARNING_RATE


def _normal(seed: int, *shape: int, rows: Any = 1.0) -> jax.Array:
    # NumPy's: JAX would compile it for every shape.
    return jnp.asarray(rows * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _params() -> Any:
    return {
        "dense": {"kernel": _normal(0, 64, 128), "bias": _normal(1, 128)},  # in blocks; exact
        "head": _normal(2, 3, 5),  # exact
    }


def _grads(step: int = 0) -> Any:
    """Gradients whose kernel has rows of different size; another draw for every step."""
    rows = np.exp(np.random.default_rng(7).standard_normal((64, 1)))
    seed = 10 * (step + 1)
    return {
        "dense": {"kernel": _normal(seed, 64, 128, rows=rows), "bias": _normal(seed + 1, 128)},
        "head": _normal(seed + 2, 3, 5),
    }


_SEQUENCE = tuple(_grads(i) for i in range(4))

PLANS: dict[str, gx.Plan | None] = {
    "no plan": None,
    "axis": gx.calibrate(_params(), _SEQUENCE[0]),
}


@pytest.fixture(params=PLANS)
def plan(request) -> gx.Plan | None:
    return PLANS[request.param]


@pytest.fixture
def tx(plan) -> optax.GradientTransformationExtraArgs:
    return gx.gefen(_LEARNING_RATE, plan=plan)


@pytest.fixture
def planned() -> optax.GradientTransformationExtraArgs:
    """For tests that compile whole steps, where no plan would compile to the same again."""
    return gx.gefen(_LEARNING_RATE, plan=PLANS["axis"])


def _run(tx, params, sequence, update=None):
    state, update = tx.init(params), update or tx.update
    for grads in sequence:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _gefen_state(state: Any) -> gx.ScaleByGefenState:
    """The one Gefen state somewhere in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, gx.ScaleByGefenState))
    (found,) = (x for x in nodes if isinstance(x, gx.ScaleByGefenState))
    return found


def _assert_near_codes(a: np.ndarray, e: np.ndarray, dual: bool) -> None:
    """Each the same or its neighbour; in a dual code's bytes, those of both moments."""
    apart = np.abs(a.astype(int) - e.astype(int))
    if dual:
        # A code of nu goes on in the other byte of its pair, so its lower half may wrap around.
        assert np.all(np.abs((a & 15).astype(int) - (e & 15)) <= 1)
        apart = np.abs((a >> 4).astype(int) - (e >> 4)) % 15
    assert np.all(apart <= 1)


def _assert_same_but_ulps(
    actual: Any, expected: Any, rtol: float = _ULPS, dual: bool = False
) -> None:
    """Two results of the same steps by different programs: params, updates or states.

    Levels of a dual code's nu are a 32nd of it apart: an error of rtol decides for another one in
    32 rtol of all cases at most, per step and pair of elements.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        flips = (_FLIPS + (32 * rtol * len(_SEQUENCE) if dual else 0.0)) * a.size
        if a.dtype == np.uint8:
            flipped = a != e
            assert flipped.sum() <= max(1, flips)
            _assert_near_codes(a, e, dual)
        else:
            wrong = ~np.isclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max(initial=0))
            assert wrong.sum() <= flips
            np.testing.assert_allclose(a, e, rtol=rtol, atol=max(_FLIPPED_STEP, rtol))


AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def _mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))


# Transformations around Gefen -------------------------------------------------------------------


class Wrapper(NamedTuple):
    """A transformation around Gefen, and what the Gefen inside it is expected to have seen."""

    wrap: Callable[[Callable[..., Any]], Any]  # given `gx.gefen` but for plan and learning rate
    seen: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda sequence: sequence
    sees: Callable[[Any], Any] = lambda params: params  # of the parameters
    params_agree: bool = True  # or the wrapper moves the parameters in its own way
    rtol: float = 0.0  # bit for bit
    jit: bool = False  # a `cond` would be compiled anew at every eager step


def _clipped(sequence):
    return tuple(jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), g) for g in sequence)


def _normalised(sequence):
    return tuple(optax.tree.scale(1 / optax.tree.norm(g), g) for g in sequence)


def _means_of_two(sequence):
    pairs = zip(sequence[::2], sequence[1::2], strict=True)
    return tuple(jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs)


def _inject(make, **numbers):
    factory = optax.inject_hyperparams(make.func)
    return factory(**{"learning_rate": _LEARNING_RATE, **make.keywords, **numbers})


def _dense(params):
    # The plan is by path: what a mask leaves keeps its place in the tree.
    return {"dense": params["dense"]}


_LABELS = {"dense": "gefen", "head": "sgd"}

# 1 - float32(0.999) is off by at most 2^-24 / 1e-3 of itself.
_INJECTED = 2.0**-24 / 1e-3

WRAPPERS = {
    "chain, clip": Wrapper(lambda make: optax.chain(optax.clip(0.5), make()), _clipped),
    "chain, clip by norm": Wrapper(
        lambda make: optax.chain(optax.clip_by_global_norm(1.0), make()), _normalised, rtol=_ULPS
    ),
    "named chain": Wrapper(lambda make: optax.named_chain(("gefen", make()))),
    "masked": Wrapper(
        lambda make: optax.masked(make(), {"dense": True, "head": False}),
        sees=_dense,
    ),
    "masked by a function": Wrapper(
        lambda make: optax.masked(
            make(), lambda p: jax.tree_util.tree_map_with_path(lambda k, _: "head" not in str(k), p)
        ),
        sees=_dense,
    ),
    "partition": Wrapper(
        lambda make: optax.partition({"gefen": make(), "sgd": optax.sgd(0.1)}, _LABELS),
        sees=_dense,
    ),
    "inject_hyperparams": Wrapper(_inject, rtol=_INJECTED),
    "inject_hyperparams, every number": Wrapper(
        functools.partial(_inject, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False),
        rtol=_INJECTED,
    ),
    "inject_hyperparams, schedules": Wrapper(
        functools.partial(
            _inject,
            learning_rate=optax.constant_schedule(_LEARNING_RATE),
            b1=optax.constant_schedule(0.9),
            weight_decay=optax.constant_schedule(1e-4),
        ),
        rtol=_INJECTED,
    ),
    "MultiSteps": Wrapper(
        lambda make: optax.MultiSteps(make(), 2), _means_of_two, rtol=_ULPS, jit=True
    ),
    "apply_if_finite": Wrapper(lambda make: optax.apply_if_finite(make(), 3), rtol=_ULPS, jit=True),
    "schedule_free": Wrapper(
        lambda make: optax.contrib.schedule_free(make(), _LEARNING_RATE), params_agree=False
    ),
    "mechanize": Wrapper(lambda make: optax.contrib.mechanize(make()), params_agree=False),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_gefen_is_gefen(plan, name):
    wrapper = WRAPPERS[name]
    make = functools.partial(gx.gefen, plan=plan)
    wrapped = wrapper.wrap(functools.partial(make, learning_rate=_LEARNING_RATE))
    update = jax.jit(wrapped.update) if wrapper.jit else wrapped.update
    params, state = _run(wrapped, _params(), _SEQUENCE, update)
    seen = tuple(wrapper.sees(g) for g in wrapper.seen(_SEQUENCE))
    expected_params, expected = _run(make(_LEARNING_RATE), wrapper.sees(_params()), seen)
    states = (jax.tree.leaves(_gefen_state(x)) for x in (state, expected))
    _assert_same_but_ulps(*states, wrapper.rtol, dual=plan is None)
    if wrapper.params_agree:
        _assert_same_but_ulps(
            wrapper.sees(params), expected_params, wrapper.rtol, dual=plan is None
        )


def test_apply_if_finite_leaves_all_bits_of_a_bad_step(planned):
    tx = optax.apply_if_finite(planned, 3)
    step = jax.jit(tx.update)
    params, state = _run(tx, _params(), _SEQUENCE[:2], step)
    bad = jax.tree.map(lambda g: g.at[(1,) * g.ndim].set(jnp.nan), _SEQUENCE[2])
    updates, after = step(bad, state, params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    # Nothing is poisoned: the next good step is the one that would have come anyway.
    after = after._replace(notfinite_count=state.notfinite_count, total_notfinite=jnp.int32(0))
    after = after._replace(last_finite=state.last_finite)
    chex.assert_trees_all_equal(
        step(_SEQUENCE[2], after, params), step(_SEQUENCE[2], state, params)
    )


def test_skip_on_spike(planned):
    def step(params, state, grads):
        def take():
            updates, new_state = planned.update(grads, state, params)
            return optax.apply_updates(params, updates), new_state

        return jax.lax.cond(optax.tree.norm(grads) < 1e6, take, lambda: (params, state))

    params, step = _params(), jax.jit(step)
    state = planned.init(params)
    spike = jax.tree.map(lambda g: 1e6 * g, _SEQUENCE[1])
    for grads in (_SEQUENCE[0], spike, _SEQUENCE[2]):
        params, state = step(params, state, grads)
    _assert_same_but_ulps((params, state), _run(planned, _params(), (_SEQUENCE[0], _SEQUENCE[2])))
    assert optax.tree.get(state, "count") == 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterov_can_be_injected(nesterov):
    # A bool is no number: inject_hyperparams leaves it static.
    params = _params()
    injected = optax.inject_hyperparams(gx.gefen)(_LEARNING_RATE, nesterov=nesterov)
    plain = gx.gefen(_LEARNING_RATE, nesterov=nesterov)
    _assert_same_but_ulps(
        _run(injected, params, _SEQUENCE[:2])[0], _run(plain, params, _SEQUENCE[:2])[0], _INJECTED
    )


def test_injected_numbers_can_be_changed_without_a_new_trace():
    tx = optax.inject_hyperparams(gx.gefen)(_LEARNING_RATE)
    update, params = jax.jit(tx.update), _params()
    state = tx.init(params)
    first, _ = update(_SEQUENCE[0], state, params)
    state.hyperparams["learning_rate"] = 2 * state.hyperparams["learning_rate"]
    second, _ = update(_SEQUENCE[0], state, params)
    assert update._cache_size() == 1
    chex.assert_trees_all_equal(second, jax.tree.map(lambda u: 2 * u, first))


def test_schedule_free_and_mechanize_descend():
    # On a parabola; in `test_wrapped_gefen_is_gefen` they only have to leave Gefen alone.
    target = {"kernel": _params()["dense"]["kernel"]}

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    wrapped = {
        "schedule_free": optax.contrib.schedule_free(gx.gefen(0.05, b1=0.0), 0.05),
        "mechanize": optax.contrib.mechanize(gx.gefen(0.05)),
    }
    start = jax.tree.map(jnp.zeros_like, target)

    def run(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=50)
        return loss(params)

    for name, tx in wrapped.items():
        assert run(tx) < 0.5 * loss(start), name


def test_map_params_beside_specs(tx):
    """How a sharding rule lays out the state: one spec per parameter, another for the rest."""
    state = tx.init(_params())
    specs = jax.tree.map(lambda p: P(*("x" for _ in p.shape)), _params())
    laid_out = optax.tree.map_params(
        tx,
        lambda s, spec: None if s is None else spec,
        state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=lambda x: x is None or isinstance(x, P),
    )
    gefen = _gefen_state(laid_out)
    assert gefen.count == P() and gefen.codebook == P()
    assert gefen.mu == specs and gefen.nu == specs
    assert gefen.scale == {"dense": {"kernel": P("x", "x"), "bias": None}, "head": None}
    # Every spec has the rank of the array it is meant for.
    for array, spec in zip(jax.tree.leaves(state), jax.tree.leaves(laid_out), strict=True):
        assert len(spec) <= array.ndim


def test_flatten():
    # optax.flatten hands over one vector; a plan is made from that vector.
    params = _params()
    vector = jax.flatten_util.ravel_pytree(params)[0]
    grads = [jax.flatten_util.ravel_pytree(g)[0] for g in _SEQUENCE]
    for plan in (None, gx.plan_by_shape(vector)):
        tx = gx.gefen(_LEARNING_RATE, plan=plan)
        flattened, state = _run(optax.flatten(tx), params, _SEQUENCE)
        expected, expected_state = _run(tx, vector, grads)
        chex.assert_trees_all_equal(jax.flatten_util.ravel_pytree(flattened)[0], expected)
        chex.assert_trees_all_equal(state, expected_state)


def test_tree_get_and_set(tx):
    _, state = _run(tx, _params(), _SEQUENCE[:2])
    assert optax.tree.get(state, "count") == 2
    assert optax.tree.get(state, "codebook").shape == (256,)
    state = optax.tree.set(state, count=jnp.int32(7))
    assert _gefen_state(state).count == 7


# jit, scan, vmap, donation ----------------------------------------------------------------------


def test_first_step_inside_jit(planned):
    @jax.jit
    def first(params, grads):
        return planned.update(grads, planned.init(params), params)

    params = _params()
    _assert_same_but_ulps(
        first(params, _SEQUENCE[0]), planned.update(_SEQUENCE[0], planned.init(params), params)
    )


def test_scan_equals_loop(planned):
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *_SEQUENCE)

    @jax.jit
    def run(params):
        def step(carry, grads):
            params, state = carry
            updates, state = planned.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, planned.init(params)), stacked)[0]

    _assert_same_but_ulps(run(_params()), _run(planned, _params(), _SEQUENCE))


def test_vmap_over_an_ensemble(planned):
    members = [
        (jax.tree.map(lambda p, i=i: p + i, _params()), (_SEQUENCE[i], _SEQUENCE[i + 1]))
        for i in range(2)
    ]

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    params = stack(*(p for p, _ in members))
    sequence = tuple(stack(*step) for step in zip(*(s for _, s in members), strict=True))
    state = jax.vmap(planned.init)(params)
    update = jax.jit(jax.vmap(planned.update))
    for grads in sequence:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = stack(*(_run(planned, p, s) for p, s in members))
    _assert_same_but_ulps((params, state), expected)


def _buffers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def _every_buffer_once(*trees) -> bool:
    pointers = [p for tree in trees for p in _buffers(tree)]
    return len(set(pointers)) == len(pointers)


def test_no_two_inits_share_a_buffer(tx):
    assert _every_buffer_once(tx.init(_params()), tx.init(_params()))
    init = jax.jit(tx.init)
    assert _every_buffer_once(init(_params()), init(_params()))


def test_donation_of_state_and_params(planned):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = planned.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kept = planned.init(_params())
    expected = jax.tree.map(np.array, kept)
    # Twice from the start: were anything in it a constant of the module, the second would fail.
    for _ in range(2):
        params, state = _params(), planned.init(_params())
        for grads in _SEQUENCE[:2]:
            old = params, state
            params, state = step(params, state, grads)
            assert all(x.is_deleted() for x in jax.tree.leaves(old))
            assert _every_buffer_once(params, state)
    chex.assert_trees_all_equal(kept, expected)


# Frameworks -------------------------------------------------------------------------------------


def test_linen_train_state():
    model = nn.Dense(128)
    x = _normal(0, 4, 64)
    params = model.init(jax.random.key(1), x)["params"]

    def loss(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - 1))

    tx = gx.gefen(_LEARNING_RATE, plan=gx.plan_by_shape(params))
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    train = train.replace(step=jnp.zeros([], jnp.int32))  # create's 0 would cost a trace of its own
    before = loss(train.params)
    step = jax.jit(lambda train: train.apply_gradients(grads=jax.grad(loss)(train.params)))
    for _ in range(5):
        train = step(train)
    assert step._cache_size() == 1
    assert loss(train.params) < 0.9 * before
    assert train.opt_state[0].mu["kernel"].dtype == jnp.uint8 and train.opt_state[0].count == 5


_BOXES = {
    "with_partitioning": lambda init: nn.with_partitioning(init, (None, "x")),
    "with_logical_partitioning": lambda init: nn.with_logical_partitioning(init, (None, "x")),
}


@pytest.mark.parametrize("box", _BOXES)
def test_linen_partitioned_params(box):
    kernel_init = nn.initializers.lecun_normal()
    x = jnp.ones((2, 64))
    key = jax.random.key(0)
    bare = nn.Dense(128, kernel_init=kernel_init).init(key, x)
    boxed = nn.Dense(128, kernel_init=_BOXES[box](kernel_init)).init(key, x)
    assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
    # The box is no part of a leaf's name: plans for either fit both.
    plan = gx.plan_by_shape(bare)
    assert gx.plan_by_shape(boxed) == plan == gx.plan_by_shape(nn.unbox(boxed))
    tx = gx.gefen(_LEARNING_RATE, plan=plan)
    params, state = _run(tx, boxed, (boxed, boxed))
    assert isinstance(params["params"]["kernel"], nn.Partitioned)
    assert params["params"]["kernel"].names == (None, "x")
    expected = _run(tx, bare, (bare, bare))
    chex.assert_trees_all_equal((nn.unbox(params), nn.unbox(state)), expected)
    # The moments carry the names too, with the rank that the names are for.
    specs = nn.get_partition_spec(state[0].mu), nn.get_partition_spec(state[0].nu)
    assert all(spec["params"]["kernel"] == P(None, "x") for spec in specs)
    assert state[0].nu["params"]["kernel"].value.ndim == 2


class _Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, kernel_init=nnx.initializers.lecun_normal()):  # noqa: B008
        self.dense = nnx.Linear(64, 128, rngs=rngs, kernel_init=kernel_init)
        self.head = nnx.Linear(128, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # state that is no Param

    def __call__(self, x):
        return self.head(nnx.relu(self.dense(x)))


def _nnx_loss(model):
    x = _normal(3, 8, 64)
    return jnp.mean(jnp.square(model(x) - 1))


def _bare(tree: Any) -> Any:
    """nnx variables and linen boxes off."""
    return nnx.to_pure_dict(nnx.state(tree, nnx.Param))


@functools.cache
def _nnx_plan() -> gx.Plan:
    model = _Model(nnx.Rngs(0))
    return gx.calibrate(nnx.state(model, nnx.Param), nnx.grad(_nnx_loss)(model))


def test_nnx_plan_has_the_names_of_the_modules():
    paths = {leaf.path for leaf in _nnx_plan().leaves}
    assert paths == {"dense/kernel", "dense/bias", "head/kernel", "head/bias"}


def test_nnx_optimizer_is_the_plain_run():
    model = _Model(nnx.Rngs(0))
    tx = gx.gefen(_LEARNING_RATE, plan=_nnx_plan())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = _bare(model)
    state = tx.init(params)
    for _ in range(2):
        grads = nnx.grad(_nnx_loss)(model)
        optimizer.update(model, grads)
        updates, state = tx.update(nnx.to_pure_dict(grads), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(_bare(model), params)
    kept = nnx.state(optimizer)["opt_state"]
    assert kept[0]["mu"]["dense"]["kernel"].get_value().dtype == jnp.uint8
    for field, expected in state[0]._asdict().items():
        bare = jax.tree.leaves(nnx.to_pure_dict(nnx.State({"field": kept[0][field]})))
        chex.assert_trees_all_equal(bare, jax.tree.leaves(expected))


def _train_nnx(model, optimizer, steps):
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        value, grads = nnx.value_and_grad(_nnx_loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(steps)]
    assert len(traces) == 1
    assert values[-1] < 0.9 * values[0]


def test_nnx_optimizer_in_nnx_jit():
    model = _Model(nnx.Rngs(0))
    tx = gx.gefen(_LEARNING_RATE, plan=_nnx_plan())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _train_nnx(model, optimizer, 6)
    assert int(optimizer.step.get_value()) == 6
    # And through split and merge, as a checkpoint does it.
    graph, state = nnx.split((model, optimizer))
    model, optimizer = nnx.merge(graph, state)
    _train_nnx(model, optimizer, 6)


class Spread(NamedTuple):
    """Mesh axes of a kernel of (64, 128), and its blocks: statistics get the same axes."""

    names: tuple[str | None, ...]
    block: tuple[int, ...]


SPREADS = {
    "blocks on one device": Spread(("x", None), (2, 128)),
    "runs along the spread axis": Spread((None, "x"), (1, 32)),
}


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_nnx_with_sharding_metadata_under_a_mesh(axis_type, name):
    spread, mesh = SPREADS[name], _mesh(axis_type)
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spread.names)
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 128, use_bias=False, rngs=nnx.Rngs(0), kernel_init=kernel_init)
        expected = np.asarray(model.kernel.get_value())
        grads = nnx.state(model, nnx.Param)
        plan = gx.plan_by_shape(grads).with_kind("kernel", gx.SharedBlocks(spread.block))
        tx = gx.gefen(_LEARNING_RATE, plan=plan)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
        step(model, optimizer, grads)
    kernel = model.kernel.get_value()
    mu = optimizer.opt_state[0].mu["kernel"].get_value()
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(*spread.names)), 2)
    assert mu.sharding.is_equivalent_to(kernel.sharding, 2)
    plain = {"kernel": jnp.asarray(expected)}
    _assert_same_but_ulps({"kernel": jax.device_get(kernel)}, _run(tx, plain, [plain])[0])


class _Equinox(eqx.Module):
    linear: eqx.nn.Linear
    steps: jax.Array
    name: str = eqx.field(static=True)


def test_equinox_filter_jit_with_an_integer_leaf():
    model = _Equinox(eqx.nn.Linear(64, 128, key=jax.random.key(0)), jnp.arange(3), "m")
    x = _normal(1, 8, 64)

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean(jnp.square(jax.vmap(model.linear)(x) - 1))

    params = eqx.filter(model, eqx.is_array)
    plan = gx.plan_by_shape(params)
    assert plan["steps"].kind == gx.Untrained()
    tx = gx.gefen(_LEARNING_RATE, plan=plan)
    trained, state = model, tx.init(params)

    @eqx.filter_jit
    def step(model, state):
        value, grads = loss(model)  # None for the integers
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(5):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert state[0].mu.linear.weight.dtype == jnp.uint8
    np.testing.assert_array_equal(trained.steps, model.steps)


# Leaves of every sort ---------------------------------------------------------------------------


def test_none_leaves(tx):
    params = {**_params(), "frozen": None}
    grads = {**_SEQUENCE[0], "frozen": None}
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates.pop("frozen") is None
    expected, expected_state = tx.update(_SEQUENCE[0], tx.init(_params()), _params())
    chex.assert_trees_all_equal(updates, expected)
    assert jax.tree.structure(state[0].mu) == jax.tree.structure(params)
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(expected_state))


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves, None among them, by name."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    return {jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in flat}


@pytest.mark.parametrize("path", _by_path(_params()))
def test_a_none_gradient_leaves_its_state_alone(tx, path):
    params, state = _run(tx, _params(), _SEQUENCE[:1])
    grads = jax.tree_util.tree_map_with_path(
        lambda at, g: None if jax.tree_util.keystr(at, simple=True, separator="/") == path else g,
        _SEQUENCE[1],
    )
    updates, after = tx.update(grads, state, params)
    complete, other = tx.update(_SEQUENCE[1], state, params)
    chex.assert_trees_all_equal(_by_path(updates), {**_by_path(complete), path: None})
    for slot in ("mu", "scale", "nu"):
        before, now, elsewhere = (_by_path(getattr(s[0], slot)) for s in (state, after, other))
        chex.assert_trees_all_equal(now, {**elsewhere, path: before[path]})
    assert after[0].count == 2


class Leaf(NamedTuple):
    """A leaf that is no ordinary float matrix, and what becomes of it."""

    param: Any
    grad: Any
    update: Any
    state: str  # dtype of mu, or "none"


_FLOAT0 = np.zeros((2, 3), jax.dtypes.float0)
LEAVES = {
    "empty": Leaf(jnp.zeros((0, 8)), jnp.zeros((0, 8)), jnp.zeros((0, 8)), "float32"),
    "scalar": Leaf(jnp.float32(3), jnp.float32(-2), jnp.float32(-1), "float32"),
    "integer": Leaf(jnp.ones(3, jnp.int32), jnp.zeros(3, jnp.int32), jnp.zeros(3, int), "none"),
    "float0": Leaf(jnp.ones((2, 3), jnp.int8), _FLOAT0, _FLOAT0, "none"),
    "bool": Leaf(jnp.ones(2, bool), None, None, "none"),
    "bfloat16": Leaf(
        jnp.ones(4, jnp.bfloat16), jnp.ones(4, jnp.bfloat16), jnp.ones(4, jnp.bfloat16), "float32"
    ),
    "float16 in blocks": Leaf(
        jnp.ones((64, 128), jnp.float16),
        jnp.full((64, 128), 0.5, jnp.float16),
        jnp.ones((64, 128), jnp.float16),
        "uint8",
    ),
    "a vector in blocks": Leaf(jnp.ones(10_007), -3 * jnp.ones(10_007), -jnp.ones(10_007), "uint8"),
}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize(("kind", "rtol"), [("dual_code", 0.264), ("shared_blocks", _INJECTED)])
def test_leaves_of_every_sort(name, kind, rtol):
    # Adam's first step is the sign of the gradient, but that 1 - float32(0.999) in the correction
    # is off by up to 2^-24 / 1e-3 of itself. In a dual code nu may be at a level a sixteenth above
    # or below, at most, so m / root lies between sqrt(16 / 17) = 0.970 and sqrt(17 / 16) = 1.031.
    # Where some pairs of a block took the level above and others that below, the largest is at
    # least 1, has the scale, and the smaller ones may have the next entry: 0.7373 times the scale.
    # That is 0.2627 off, and an update in float16 is rounded by 2^-12 of itself.
    leaf = LEAVES[name]
    params = {"leaf": leaf.param}
    tx = gx.scale_by_gefen(plan=gx.plan_by_shape(params, kind=kind))
    state = tx.init(params)
    updates, new = tx.update({"leaf": leaf.grad}, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    update, mu = updates["leaf"], new.mu["leaf"]
    assert ("none" if mu is None else str(mu.dtype)) == leaf.state
    if leaf.update is not None and jnp.result_type(update) != jax.dtypes.float0:
        assert update.dtype == leaf.update.dtype
        np.testing.assert_allclose(
            np.asarray(update, np.float32), np.asarray(leaf.update, np.float32), rtol=rtol
        )
    else:
        assert update is leaf.grad


def test_a_tree_of_mixed_dtypes(tx):
    params, grads = _params(), _grads()
    for tree in (params, grads):
        tree["dense"]["kernel"] = tree["dense"]["kernel"].astype(jnp.bfloat16)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    # bfloat16 at the door, float32 inside: the update of the rounded gradient, rounded.
    wide = optax.tree.cast(grads, jnp.float32), optax.tree.cast(params, jnp.float32)
    expected, _ = tx.update(wide[0], tx.init(wide[1]), wide[1])
    # Rounded three times on the way, by add_decayed_weights and scale_by_learning_rate too.
    chex.assert_trees_all_close(optax.tree.cast(updates, jnp.float32), expected, rtol=3 * 2**-8)


def test_a_bare_array_is_a_tree():
    params, grads = _params()["dense"]["kernel"], _SEQUENCE[0]["dense"]["kernel"]
    # Not a dual code: its rounding goes by the leaf's name.
    plans = (gx.plan_by_shape(p, kind="shared_blocks") for p in (params, {"w": params}))
    tx, named = (gx.gefen(_LEARNING_RATE, plan=plan) for plan in plans)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = named.update({"w": grads}, named.init({"w": params}), {"w": params})
    np.testing.assert_array_equal(updates, expected["w"])


_DECAYS = [{"b1": 0.0}, {"b2": 0.0}, {"b1": 0.0, "b2": 0.0}]


@pytest.mark.parametrize("numbers", _DECAYS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_without_memory(plan, numbers, nesterov):
    tx = gx.scale_by_gefen(**numbers, plan=plan, nesterov=nesterov)
    _, state = _run(tx, _params(), _SEQUENCE[:2])
    updates, state = tx.update(_SEQUENCE[2], state, _params())
    # Exact leaves do what Adam does. Eagerly a power is off by an ulp of 1 that a compiled one is
    # not: 2^-24 in a correction of 1 - 0.999^3 = 3e-3.
    adam = optax.scale_by_adam(**numbers, nesterov=nesterov)
    expected, _ = adam.update(_SEQUENCE[2], _run(adam, _params(), _SEQUENCE[:2])[1])
    chex.assert_trees_all_close(updates["head"], expected["head"], rtol=2**-24 / 3e-3 + _ULPS)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("numbers", [n for n in _DECAYS if n.get("b1") == 0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_without_momentum_the_momentum_is_the_gradient(calibrated, numbers):
    plan = PLANS["axis"] if calibrated else gx.plan_by_shape(_params(), kind="shared_blocks")
    tx = gx.scale_by_gefen(**numbers, plan=plan)
    _, state = _run(tx, _params(), _SEQUENCE[:3])
    g = np.asarray(_SEQUENCE[2]["dense"]["kernel"])
    mu, scale = state.mu["dense"]["kernel"], np.asarray(state.scale["dense"]["kernel"])
    per_block = [n // m for n, m in zip(g.shape, scale.shape, strict=True)]
    scale = np.kron(scale, np.ones(per_block, np.float32))
    # Within half of the codebook's widest step, of the block's largest magnitude.
    half_step = np.diff(state.codebook).max() / 2
    assert np.all(np.abs(state.codebook[mu] * scale - g) <= half_step * scale * (1 + 2**-20))


# Meshes -----------------------------------------------------------------------------------------

SPECS = {
    "fsdp": P("x", None),
    "tensor": P(None, ("x", "y")),
    "both": P("y", "x"),
}


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_steps_on_a_mesh(axis_type):
    """Every spec is a leaf of one model; what comes out lies as the parameters do."""
    mesh = _mesh(axis_type)
    sharding = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    kernel = _SEQUENCE[0]["dense"]["kernel"]
    params = {name: kernel + i for i, name in enumerate(SPECS)}
    sequence = [dict.fromkeys(SPECS, g["dense"]["kernel"]) for g in _SEQUENCE[:2]]
    plan = gx.calibrate(params, sequence[0])
    tx = gx.gefen(_LEARNING_RATE, plan=plan)
    expected_params, expected = _run(tx, params, sequence)

    spread = jax.device_put(params, sharding)
    spread_sequence = [jax.device_put(g, sharding) for g in sequence]
    state, update = jax.jit(tx.init)(spread), jax.jit(tx.update)
    for grads in spread_sequence:
        updates, state = update(grads, state, spread)
        for name, u in updates.items():
            assert u.sharding.is_equivalent_to(sharding[name], u.ndim), name
        spread = optax.apply_updates(spread, updates)
    for name, mu in state[0].mu.items():
        assert mu.sharding.is_equivalent_to(sharding[name], mu.ndim), name
    _assert_same_but_ulps(jax.device_get((spread, state)), (expected_params, expected))


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_init_with_out_shardings(planned, axis_type):
    mesh = _mesh(axis_type)
    params = _params()
    specs = {"dense": {"kernel": P("x", "y"), "bias": P("x")}, "head": P()}
    params = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    wanted = optax.tree.map_params(
        planned,
        lambda s, spec: None if s is None else NamedSharding(mesh, _fitting(mesh, spec, s.shape)),
        jax.eval_shape(planned.init, params),
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=lambda x: x is None,
    )
    state = jax.jit(planned.init, out_shardings=wanted)(params)
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(planned.init(_params())))


def _fitting(mesh, spec, shape):
    """The spec without the axes that do not divide the array's: the statistics are smaller."""
    return P(
        *(
            name if name is None or shape[i] % mesh.shape[name] == 0 else None
            for i, name in enumerate(spec)
        )
    )


# What is refused, by name -----------------------------------------------------------------------


def test_a_cast_state_is_refused():
    tx = gx.gefen(_LEARNING_RATE)
    state = optax.tree.cast(tx.init(_params()), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"state of `dense/bias`.*float32\[128\].*tree\.cast"):
        tx.update(_SEQUENCE[0], state, _params())


def test_derivatives_are_refused_but_of_exact_leaves():
    tx, adam = gx.scale_by_gefen(), optax.scale_by_adam()

    def total(transformation):
        def function(grads):
            updates, _ = transformation.update(grads, transformation.init(grads))
            return jax.tree.reduce(jnp.add, jax.tree.map(lambda u: jnp.sum(jnp.sin(u)), updates))

        return function

    large, small = (_SEQUENCE[0]["dense"][name] for name in ("kernel", "bias"))
    with pytest.raises(NotImplementedError, match=r"optax\.adamw.*Exact"):
        jax.grad(total(tx))(large)
    # The message's way out, and leaves that are exact anyway.
    exact = gx.plan_by_shape(large).with_kind("*", gx.Exact())
    for made, grads in ((gx.scale_by_gefen(plan=exact), large), (tx, small)):
        derivative = jax.grad(total(made))(grads)
        # u = g / (|g| + eps): eps / g^2 cancels to about nothing, an ulp of 1 / |g| is left.
        size = max(float(jnp.max(1 / jnp.abs(g))) for g in jax.tree.leaves(grads))
        chex.assert_trees_all_close(derivative, jax.grad(total(adam))(grads), atol=size * 2**-20)


class Refusal(NamedTuple):
    """Arguments, or a use, that must fail with a message that helps."""

    call: Callable[[], Any]
    error: type[Exception]
    match: str


# The annotations are checked here, by beartype; what others get is our own message.
_unchecked = inspect.unwrap(gx.scale_by_gefen)


def _init_with(plan, params):
    return lambda: gx.gefen(1e-3, plan=plan).init(params)


def _update_with_state_of(plan, other):
    def call():
        state = gx.gefen(1e-3, plan=other).init(_params())
        return gx.gefen(1e-3, plan=plan).update(_SEQUENCE[0], state, _params())

    return call


_AXIS = PLANS["axis"]
_ALL_EXACT = gx.plan_by_shape(_params()).with_kind("*", gx.Exact())
_FLAT = gx.plan_by_shape(_params()).with_kind("dense/*", gx.FlatPeriods(128, 128))
_RENAMED = {"dense": {"kernels": jnp.zeros((64, 128))}}
_RESHAPED = {"dense": {"kernel": jnp.zeros((128, 64))}}


def _gradients_of(**leaves):
    def call():
        tx = gx.scale_by_gefen()
        return tx.update(leaves, tx.init({"w": jnp.zeros((64, 128)), "b": jnp.zeros(3)}))

    return call


REFUSALS = {
    "plan, other shape": Refusal(
        _init_with(_AXIS, _RESHAPED), ValueError, r"`dense/kernel`.*\(64, 128\).*\(128, 64\)"
    ),
    "plan, other path": Refusal(
        _init_with(_AXIS, _RENAMED), ValueError, r"no leaf `dense/kernels`.*nearest.*'dense/kernel'"
    ),
    "plan, nothing near": Refusal(
        _init_with(_AXIS, {"zzz": jnp.zeros(3)}), ValueError, r"no leaf `zzz`; it has"
    ),
    "plan, of wrong type": Refusal(
        lambda: _unchecked(plan=_AXIS.leaves), TypeError, "`plan` must be a gefen_jax.Plan"
    ),
    "b1, a string": Refusal(
        lambda: check_number("b1", "0.9", 0.0, 1.0, open_end=True), ValueError, "`b1`.*got '0.9'"
    ),
    "b1, several": Refusal(
        lambda: gx.gefen(1e-3, np.array([0.9, 0.8])), ValueError, r"`b1`.*got array\(\[0.9, 0.8"
    ),
    "plan, a path": Refusal(
        lambda: _unchecked(plan="plan.json"), TypeError, "`plan` must be.*got str"
    ),
    "state of another plan": Refusal(
        _update_with_state_of(_AXIS, _ALL_EXACT), ValueError, "state of `dense/kernel`.*plan"
    ),
    "state in blocks, plan exact": Refusal(
        _update_with_state_of(_ALL_EXACT, _AXIS), ValueError, "state of `dense/kernel`.*plan"
    ),
    "state in flat periods": Refusal(
        _update_with_state_of(_AXIS, _FLAT), ValueError, "state of `dense/bias`.*plan"
    ),
    "gradient, other shape": Refusal(
        _gradients_of(w=jnp.zeros((128, 64)), b=jnp.zeros(3)), ValueError, r"updates\[w\].*64, 128"
    ),
    "gradient, integer": Refusal(
        _gradients_of(w=jnp.zeros((64, 128)), b=jnp.zeros(3, int)), ValueError, r"updates\[b\].*int"
    ),
    "gradient, complex": Refusal(
        _gradients_of(w=jnp.zeros((64, 128)), b=jnp.zeros(3, complex)), ValueError, r"updates\[b\]"
    ),
    "two leaves of one name": Refusal(
        _init_with(None, {"a/b": jnp.zeros(3), "a": {"b": jnp.zeros((64, 128))}}),
        ValueError,
        "two leaves.*name `a/b`",
    ),
    "state of AdamW": Refusal(
        lambda: gx.gefen(1e-3).update(_params(), optax.adamw(1e-3).init(_params()), _params()),
        ValueError,
        "`state`.*ScaleByGefenState.*found ScaleByAdamState.*from_adam",
    ),
    "backend": Refusal(
        lambda: gx.gefen(1e-3, backend="cuda"), ValueError, "`backend` must be.*'xla'.*'cuda'"
    ),
}
_OUT_OF_RANGE = {
    "learning_rate": (-1e-3, np.nan, np.inf),
    "weight_decay": (-1e-3, np.nan, np.inf),
    "b1": (-0.1, 1.0, 1.5, np.nan),
    "b2": (-0.1, 1.0, 1.5, np.nan),
    "eps": (-1e-8, np.nan, np.inf),
    "eps_root": (-1e-8, np.nan, np.inf),
}
REFUSALS |= {
    f"{name} {value}": Refusal(
        lambda name=name, value=value: gx.gefen(**{"learning_rate": 1e-3, name: value}),
        ValueError,
        f"`{name}`.*{value}",
    )
    for name, values in _OUT_OF_RANGE.items()
    for value in values
}
REFUSALS |= {
    f"scale_by_gefen {name} {value}": Refusal(
        lambda name=name, value=value: gx.scale_by_gefen(**{name: value}), ValueError, f"`{name}`"
    )
    for name, values in _OUT_OF_RANGE.items()
    if name not in ("learning_rate", "weight_decay")
    for value in values
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(case):
    call, error, match = REFUSALS[case]
    with pytest.raises(error, match=match):
        call()
