"""Every backend by name: what `backend="triton"` or "mosaic" gives is what the plain step gives.

Here kernels run in Pallas' interpreter. The kernel and the plain step are two programs: a float
differs by a few roundings, and a code of 4 bits where its fraction lies within rounding of the
point at which it would decide otherwise (tests/test_kernels.py derives how often: about one in
30,000), one of 8 bits beside a border (tests/test_shared_kernels.py).
"""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
import pallas_kernels
from gefen_jax._builtin import builtin_codebook

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

_WITH_TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not pallas_kernels.is_available(),
        reason=f"jax {jax.__version__} has no Triton dialect of Pallas",
    ),
)
_WITH_MOSAIC = pytest.param(
    "mosaic",
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 11, 2), reason="`backend` 'mosaic' needs jax 0.11.2 or newer"
    ),
)
with_a_kernel = pytest.mark.parametrize("kernel", [_WITH_TRITON])
with_every_kernel = pytest.mark.parametrize("kernel", [_WITH_TRITON, _WITH_MOSAIC])

# Interpreted kernels are large programs, which run for microseconds.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

_U = 2.0**-24
_RATE = 1e-2

# Leaves that kernels take, along a row and along columns; and exact ones, of which updates are
# plain.
_KINDS: dict[str, tuple[tuple[int, ...], Any]] = {
    "rows": ((6, 64), gx.DualCode((1, 64))),
    "columns": ((32, 5), gx.DualCode((32, 1))),
    "shared": ((6, 40), gx.SharedBlocks((1, 40))),
    "a shorter last run": ((7, 5), gx.SharedBlocks((4, 1))),  # two leaves for a kernel
    "flat": ((6, 10), gx.FlatPeriods(1, 15)),
    # Of a fused step one kernel takes these.
    "bias": ((7,), gx.Exact()),
    "other bias": ((33,), gx.Exact()),
    "third bias": ((2, 5), gx.Exact()),
}
_LAUNCHES = 6  # of them
_PLAN = gx.Plan(
    tuple(gx.LeafPlan(name, shape, kind, "test") for name, (shape, kind) in _KINDS.items()),
    builtin_codebook(),
    "test",
    "shape",
)


def _tree(seed: int, size: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _) in _KINDS.items()}
    return {k: jnp.asarray(size * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


_PARAMS = _tree(0, 0.1)
_GRADS = [_tree(i) for i in range(1, 4)]


def _assert_same_state(ours: Any, theirs: Any) -> None:
    """Codes bit for bit, as these seeds have no flip; scales to the roundings of a maximum.

    So are means of squares, of up to 40.
    """
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=16 * _U, atol=0)
        else:
            np.testing.assert_array_equal(a, b)


@with_a_kernel
def test_updates(kernel):
    """Of every kind; 24 roundings of an update, as derived in test_dual.py, in either program."""
    transformations = (gx.scale_by_gefen(plan=_PLAN, backend=b) for b in ("xla", kernel))
    plain, _ = transformations = tuple(transformations)
    state = plain.init(_PARAMS)
    steps = [_jit(tx.update) for tx in transformations]
    for grads in _GRADS:
        (expected, after), (updates, ours) = (step(grads, state) for step in steps)
        _assert_same_state(ours, after)
        for name, update in updates.items():
            atol = 48 * _U * np.abs(expected[name]).max()
            np.testing.assert_allclose(update, expected[name], rtol=48 * _U, atol=atol)
        state = after


def _moved(fused: gx.FusedGefen, weights: Any, grads: Any = _GRADS[0]) -> Any:
    return _jit(fused.step)(grads, fused.init(_PARAMS), weights)


@with_every_kernel
def test_fused(kernel):
    """Clipped, and with a mask. The parameter is rounded once, its change a few times."""
    arguments = {"max_norm": 1.0, "weight_decay": 0.1, "mask": {k: k == "rows" for k in _KINDS}}
    make = functools.partial(gx.fused_gefen, _RATE, plan=_PLAN, **arguments)
    expected, ours = (_moved(make(backend=b), _PARAMS) for b in ("xla", kernel))
    _assert_same_state(ours[1], expected[1])
    for name, p in expected[0].items():
        change = np.abs(p - _PARAMS[name])
        bound = 2 * _U * np.abs(p) + 64 * _U * change
        assert np.all(np.abs(ours[0][name] - p) <= bound)


@with_a_kernel
def test_split_weights(kernel, bits=24):
    """Of merged weights, which have as many bits: an ulp of theirs, and roundings of the change."""
    weights = gx.split_weights(_PARAMS, bits)[0]
    wholes = []
    for backend in ("xla", kernel):
        fused = gx.with_split_weights(gx.fused_gefen(_RATE, plan=_PLAN, backend=backend), bits=bits)
        new, state = _moved(fused, weights)
        assert new["rows"].dtype == jnp.bfloat16
        wholes.append(gx.merge_weights(new, state))
    for name, p in wholes[0].items():
        bound = (2.0 ** -(bits - 9) + 2 * _U) * np.abs(p) + 64 * _U * np.abs(p - _PARAMS[name])
        assert np.all(np.abs(wholes[1][name] - p) <= bound)
        assert np.mean(wholes[1][name] == p) > 0.9


def _embed(params, batch):
    return batch @ params["in"]


def _layer(params, x):
    return x + jnp.tanh(x @ params["w"])


def _head(params, x, batch):
    return jnp.mean((x @ params["out"] - jnp.sin(batch)) ** 2)


def _loss(params, batch):
    x = _embed(params, batch)
    return _head(
        params, jax.lax.scan(lambda x, p: (_layer(p, x), None), x, params["layers"])[0], batch
    )


@functools.cache
def _model() -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)

    params = {"in": normal(4, 64), "layers": {"w": normal(2, 64, 64)}, "out": normal(64, 4)}
    return params, jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)


@pytest.mark.parametrize("kind", ["dual_code", "shared_blocks"])
@with_every_kernel
def test_a_training_run(kernel, kind):
    """The loss curves of 20 steps; leaves of 8,192 elements are large: one in codes, two exact.

    A flip of a code moves an element by a gap of the codebook, 0.27 of the block's largest, of one
    step, so the loss by less than a hundredth of what a step does.
    """
    params, batch = _model()
    curves = []
    for backend in ("xla", kernel):
        tx = gx.gefen(_RATE, backend=backend, plan=gx.plan_by_shape(params, kind=kind))

        @_jit
        def train(params, tx=tx):
            def step(carry, _):
                params, state = carry
                loss, grads = jax.value_and_grad(_loss)(params, batch)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), loss

            return jax.lax.scan(step, (params, tx.init(params)), length=20)[1]

        curves.append(np.asarray(train(params)))
    assert curves[0][-1] < 0.5 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


@pytest.mark.parametrize("kind", [gx.DualCode((1, 1, 64)), gx.SharedBlocks((1, 16, 64))])
@with_a_kernel
def test_layers_of_stacked_leaves(kernel, kind):
    """A layer gets the fractions of its place in the whole leaf, from the kernel too."""
    params, batch = _model()
    plan = gx.plan_by_shape(params).with_kind("layers/w", kind)
    results = []
    for backend in ("xla", kernel):
        fused = gx.fused_gefen(_RATE, backend=backend, plan=plan)
        step = _jit(gx.release(fused, _embed, _layer, _head))
        results.append(step(params, fused.init(params), batch))
    (expected, after, _), (new, state, _) = results
    _assert_same_state(state, after)
    w = expected["layers"]["w"]
    bound = 2 * _U * np.abs(w) + 64 * _U * _RATE
    assert np.all(np.abs(new["layers"]["w"] - w) <= bound)


@with_a_kernel
def test_an_ensemble_by_vmap(kernel):
    tx = gx.scale_by_gefen(plan=_PLAN, backend=kernel)
    rows = [{name: grads[name] for name in ("rows", "shared")} for grads in _GRADS[:2]]
    both = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    states = jax.vmap(tx.init)(both)
    updates, states = _jit(jax.vmap(tx.update))(both, states)
    one = _jit(tx.update)
    for i in range(2):
        expected, state = one(rows[i], tx.init(rows[i]))
        ours = jax.tree.map(lambda x, i=i: x[i], (updates, states))
        _assert_same_state(ours[1], state)
        for name, update in expected.items():
            atol = 48 * _U * np.abs(update).max()
            np.testing.assert_allclose(ours[0][name], update, rtol=48 * _U, atol=atol)


# Lowered, not run --------------------------------------------------------------------------------


_H200 = AbstractMesh(
    (1,),
    ("x",),
    axis_types=(AxisType.Auto,),
    # From jax 0.11 on, lowering asks which GPU it is for.
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
)


_CUSTOM_CALLS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@with_every_kernel
def test_cuda_gets_one_kernel_per_leaf(kernel, dtype):
    """And `backend=None` none, as nothing was measured."""
    grads = optax.tree.cast(_GRADS[0], dtype)
    for backend, kernels in ((kernel, _LAUNCHES), (None, 0)):
        tx = gx.scale_by_gefen(plan=_PLAN, backend=backend)
        state = jax.eval_shape(tx.init, _PARAMS)
        with jax.sharding.use_abstract_mesh(_H200):
            traced = jax.jit(tx.update).trace(jax.eval_shape(lambda: grads), state)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(f"custom_call @{_CUSTOM_CALLS[kernel]}") == kernels


@pytest.mark.parametrize("split", [False, True])
@with_every_kernel
def test_the_fused_step_copies_nothing(kernel, split):
    """Of shared blocks: lowered, what a kernel writes is what was donated to it."""
    params = {"w": jnp.zeros((64, 96), jnp.bfloat16 if split else jnp.float32)}
    plan = gx.plan_by_shape(params).with_kind("w", gx.SharedBlocks((1, 96)))
    fused = gx.fused_gefen(_RATE, plan=plan, backend=kernel)
    fused = gx.with_split_weights(fused) if split else fused
    state = jax.eval_shape(fused.init, params)

    def step(params, state, grads):
        return fused.step(grads, state, params)

    with jax.sharding.use_abstract_mesh(_H200):
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The parameter, and its correction; codes, scales and nu.
    assert text.count("#stablehlo.output_operand_alias<") == (5 if split else 4)
    assert text.count(f"custom_call @{_CUSTOM_CALLS[kernel]}") == 1


@pytest.mark.parametrize("backend", ["triton", "mosaic", "jax_triton"])
def test_kinds_without_a_kernel_are_refused(backend):
    """By name, and not left to the plain step."""
    params = {"w": jnp.ones((2, 8))}
    plan = gx.plan_by_shape(params).with_kind("w", gx.WideDualCode((1, 8)))
    tx, fused = (make(_RATE, plan=plan, backend=backend) for make in (gx.gefen, gx.fused_gefen))
    for step in (tx.update, fused.step):
        with pytest.raises(NotImplementedError, match="no kernel for a leaf of kind 'wide_dual"):
            jax.eval_shape(step, params, tx.init(params), params)


def test_shared_blocks_too_large_for_a_kernel_are_refused():
    """By their layout."""
    params = {"w": jax.ShapeDtypeStruct((2**21, 1024), jnp.float32)}
    plan = gx.plan_by_shape(params).with_kind("w", gx.SharedBlocks((1, 1024)))
    tx = gx.scale_by_gefen(plan=plan, backend="triton")
    with pytest.raises(NotImplementedError, match="SharedLayout.blocks=2097152, .*: use the XLA"):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params))


@with_a_kernel
def test_derivatives_are_refused(kernel):
    tx = gx.scale_by_gefen(plan=_PLAN, backend=kernel)

    def loss(grads):
        return jnp.sum(tx.update(grads, tx.init(_PARAMS))[0]["rows"])

    with pytest.raises(NotImplementedError, match="no useful derivative"):
        jax.eval_shape(jax.grad(loss), _GRADS[0])


def _refused(backend: str, match: str) -> None:
    # A leaf of its own: what another test has traced raises no more.
    params = {"w": jnp.zeros((262, 258))}
    tx = gx.scale_by_gefen(backend=backend)
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(tx.update, params, tx.init(params))


@pytest.mark.parametrize("module", [None, SimpleNamespace(__version_info__=(0, 3, 1))])
def test_no_jax_triton_or_an_old_one_is_refused(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    _refused("jax_triton", "needs jax-triton 0.4.1 or newer")


def test_a_jax_too_old_for_mosaic_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    _refused("mosaic", "'mosaic' needs jax 0.11.2 or newer, found")


@with_every_kernel
def test_other_devices_are_refused(kernel):
    tx = gx.scale_by_gefen(plan=_PLAN, backend=kernel)
    traced = jax.jit(tx.update).trace(_GRADS[0], tx.init(_PARAMS))
    with pytest.raises(NotImplementedError, match="platform tpu"):
        traced.lower(lowering_platforms=("tpu",))


_DUAL, _SHARED = gx.DualCode((1, 256)), gx.SharedBlocks((1, 128))
_LAYOUTS = {"columns": P(None, "y"), "both": P("y", "x"), "an axis of both": P(("x", "y"))}
_WHOLE = {"w": jax.random.normal(jax.random.key(0), (16, 1024))}


def _kernel_step(params: Any, split: bool, kernel: str, kind: Any) -> Any:
    """The step of a leaf, and what it starts with."""
    plan = gx.plan_by_shape(params).with_kind("w", kind)
    if not split:
        tx = gx.scale_by_gefen(plan=plan, backend=kernel)
        return _jit(tx.update), (params, tx.init(params))
    tx = gx.with_split_weights(gx.fused_gefen(1e-2, plan=plan, backend=kernel))
    weights, _ = gx.split_weights(params)
    return _jit(tx.step), (weights, tx.init(params), weights)


@functools.cache
def _on_one_device(split: bool, kernel: str, kind: Any) -> Any:
    step, args = _kernel_step(_WHOLE, split, kernel, kind)
    return step(*args)


@pytest.mark.parametrize(
    ("kernel", "layout", "types", "split", "kind"),
    [
        pytest.param(*kernel.values, *case, marks=kernel.marks)
        for kernel, case in [
            (_WITH_TRITON, ("columns", AxisType.Auto, False, _DUAL)),
            (_WITH_TRITON, ("both", AxisType.Explicit, False, _DUAL)),
            (_WITH_TRITON, ("an axis of both", AxisType.Explicit, False, _DUAL)),
            (_WITH_TRITON, ("both", AxisType.Auto, True, _DUAL)),
            (_WITH_TRITON, ("both", AxisType.Auto, True, _SHARED)),
            (_WITH_MOSAIC, ("both", AxisType.Explicit, False, _DUAL)),
            (_WITH_MOSAIC, ("columns", AxisType.Explicit, False, _SHARED)),
        ]
    ],
)
def test_a_mesh_runs_the_kernel_on_every_shard(kernel, layout, types, split, kind):
    """With the fractions that elements have in the whole leaf, wherever in it a shard lies."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(types,) * 2)
    at = NamedSharding(mesh, _LAYOUTS[layout])
    step, args = _kernel_step(jax.device_put(_WHOLE, at), split, kernel, kind)
    (new, ours), (expected, state) = step(*args), _on_one_device(split, kernel, kind)
    assert new["w"].sharding.is_equivalent_to(at, 2)
    _assert_same_state(ours, state)
    np.testing.assert_allclose(new["w"], expected["w"], rtol=0 if split else 48 * _U, atol=1e-6)


def test_blocks_that_cross_shards_are_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    params = {"w": jax.device_put(jnp.ones((64, 256)), NamedSharding(mesh, P(None, "x")))}
    tx = gx.scale_by_gefen(backend="triton")
    with pytest.raises(NotImplementedError, match="leaves on one device, found one of .64, 256"):
        jax.eval_shape(tx.update, params, jax.jit(tx.init)(params))
