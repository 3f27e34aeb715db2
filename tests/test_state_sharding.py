"""A state lies where its parameters lie: rules, bytes per device, and steps that leave it there."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx
from gefen_jax._specs import fitting_spec

_AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
_BOTH = ("x", "y")


def _mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), _BOTH, axis_types=(axis_type, axis_type))


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


_SHAPES = {"up": (64, 256), "down": (256, 64), "bias": (256,), "scalar": ()}


def _tree(seed: int) -> Any:
    return {name: _normal(seed + i, *s) for i, (name, s) in enumerate(_SHAPES.items())}


_SPECS = {
    "fsdp": {"up": P(_BOTH, None), "down": P(_BOTH, None), "bias": P(_BOTH), "scalar": P()},
    # Eight shards of 32 elements: a block of 256 crosses them all.
    "tensor": {"up": P(None, _BOTH), "down": P(_BOTH, None), "bias": P(_BOTH), "scalar": P()},
    "both": {"up": P("x", "y"), "down": P("y", "x"), "bias": P("y"), "scalar": P()},
}


def _shardings(mesh, specs):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def _same(a: NamedSharding, b: NamedSharding, ndim: int) -> bool:
    return a.is_equivalent_to(b, ndim)


# The rule for one array -------------------------------------------------------------------------

# The parameter's spec and the array's shape, on 4 x 2 devices; its spec.
_FITTING = {
    "all divide": (P("x", "y"), (8, 2), P("x", "y")),
    "one does not": (P("x", "y"), (8, 3), P("x", None)),
    "none divides": (P("x", "y"), (6, 1), P(None, None)),
    "several": (P(None, _BOTH), (5, 16), P(None, _BOTH)),
    "the first of several": (P(_BOTH, None), (4, 16), P("x", None)),
    "not the second alone": (P(_BOTH, None), (2, 16), P(None, None)),
    "a spec that ends early": (P("x"), (4, 7, 9), P("x")),
    "replicated": (P(), (4, 7), P()),
    "another rank": (P("x", "y"), (8,), P()),
    "empty": (P("x"), (0, 3), P("x")),
}


@pytest.mark.parametrize("case", _FITTING)
def test_fitting_spec(case):
    spec, shape, expected = _FITTING[case]
    assert fitting_spec(spec, shape, _mesh()) == expected
    NamedSharding(_mesh(), expected).shard_shape(shape)  # JAX accepts it


# The rule for a state ---------------------------------------------------------------------------


def _structs(mesh, specs):
    return {
        n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, specs[n]))
        for n, s in _SHAPES.items()
    }


def test_where_everything_of_ours_lies():
    specs = _SPECS["both"]
    plan = gx.plan_by_shape(_tree(0)).with_kind("down", gx.SharedBlocks((128, 1)))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), gx.gefen(optax.constant_schedule(1), plan=plan)
    )
    got = gx.state_sharding(tx, _structs(_mesh(), specs))
    state = jax.eval_shape(tx.init, _tree(0))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    ours = jax.tree.map(lambda s: s.spec, got[1][0])
    assert state[1][0].scale["up"].shape == (64, 1) and state[1][0].scale["down"].shape == (2, 64)
    assert ours.mu == specs
    assert ours.scale == {"up": P("x"), "down": P("y", "x"), "bias": None, "scalar": None}
    assert ours.nu == ours.scale | {"bias": P("y"), "scalar": P()}
    assert ours.count == ours.codebook == ours.codebook4 == got[1][2].count.spec == P()


_WIDE = gx.plan_by_shape(_tree(0), kind="wide_dual_code")
_OPTIMIZERS = {
    "gefen": lambda: gx.gefen(1e-3),
    "gefen, wide codes": lambda: gx.gefen(1e-3, plan=_WIDE),
    "gefen_muon": lambda: gx.gefen_muon(1e-3),
    "gefen_muon, 4 bits": lambda: gx.gefen_muon(1e-3, bits=4),
    "adamw": lambda: optax.adamw(1e-3),
    "clipped, injected": lambda: optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(gx.gefen)(1e-3)
    ),
    "partition": lambda: optax.partition(
        {"g": gx.gefen(1e-3), "a": optax.adamw(1e-3)},
        {"up": "g", "down": "a", "bias": "g", "scalar": "a"},
    ),
    "MultiSteps": lambda: optax.MultiSteps(gx.gefen(1e-3), 2).gradient_transformation(),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "schedule_free": lambda: optax.contrib.schedule_free(gx.gefen(1e-3), 1e-3),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_any_transformation(name):
    tx, specs = _OPTIMIZERS[name](), _SPECS["both"]
    got = gx.state_sharding(tx, _structs(_mesh(), specs))
    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, _tree(0)))
    for (path, x), sharding in zip(state, jax.tree.leaves(got), strict=True):
        sharding.shard_shape(x.shape)  # raises where it does not divide
        last = path[-1]
        owner = getattr(last, "key", None)
        if owner in _SHAPES and x.shape == _SHAPES[owner]:
            assert _same(sharding, NamedSharding(_mesh(), specs[owner]), len(x.shape)), path
        if owner not in _SHAPES:
            assert sharding.spec == P(), path


def test_three_ways_to_say_where_parameters_lie():
    mesh, specs, tx = _mesh(), _SPECS["both"], gx.gefen(1e-3)
    expected = gx.state_sharding(tx, _structs(mesh, specs))
    arrays = jax.device_put(_tree(0), _shardings(mesh, specs))
    assert gx.state_sharding(tx, arrays) == expected
    assert gx.state_sharding(tx, _tree(0), specs, mesh=mesh) == expected
    assert gx.state_sharding(tx, _tree(0), _shardings(mesh, specs)) == expected
    # One for a whole part of the tree; what has none is replicated.
    prefix = gx.state_sharding(tx, {"model": _tree(0)}, {"model": P()}, mesh=mesh)
    assert {s.spec for s in jax.tree.leaves(prefix)} == {P()}
    mixed = gx.state_sharding(tx, arrays | {"down": jnp.zeros(_SHAPES["down"])})
    assert mixed[0].mu["down"].spec == P() and mixed[0].mu["up"] == expected[0].mu["up"]
    # The mesh behind an abstract one, and a smaller one.
    explicit = jax.device_put(_tree(0), _shardings(_mesh(AxisType.Explicit), specs))
    abstract = jax.eval_shape(lambda: explicit)
    small = jax.make_mesh((2, 2), _BOTH, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    for other in (_mesh(AxisType.Explicit), small):
        got = gx.state_sharding(tx, abstract, mesh=other)[0].mu["up"]
        assert got == NamedSharding(other, P("x", "y"))


def test_names_that_are_alike():
    # The longest path decides; keys of another type do not match.
    mesh = _mesh()
    params = {"w": jnp.zeros((8, 8)), "in": {"w": jnp.zeros((8, 8))}, "count": jnp.zeros(8)}
    specs = {"w": P("x"), "in": {"w": P("y")}, "count": P("x")}
    got = gx.state_sharding(gx.gefen(1e-3), params, specs, mesh=mesh)[0]
    assert jax.tree.map(lambda s: s.spec, got.mu) == specs and got.count.spec == P()
    # A bare array, whose path every path ends with.
    (bare, *_) = gx.state_sharding(gx.gefen(1e-3), jnp.zeros(10_000), P("x"), mesh=mesh)
    assert bare.mu.spec == bare.scale.spec == P("x")
    assert bare.count.spec == bare.codebook.spec == bare.codebook4.spec == P()


def test_nnx():
    mesh = _mesh()
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 128, rngs=nnx.Rngs(0), kernel_init=init)
    params, tx = nnx.as_pure(nnx.state(model, nnx.Param)), gx.gefen(1e-3)
    got = gx.state_sharding(tx, params)[0]
    assert got.mu["kernel"].spec == P("x", "y") and got.nu["kernel"].spec == P("x")
    # Variables keep their boxes, in the parameters and in the state.
    boxed = gx.state_sharding(tx, nnx.state(model, nnx.Param))
    assert nnx.as_pure(boxed)[0].mu["kernel"] == got.mu["kernel"]


# Bytes per device -------------------------------------------------------------------------------

_D, _KV, _FFN, _VOCAB, _LAYERS = 4096, 1024, 14336, 128256, 32
# Llama 3 with 8B parameters: of every matrix the axis that tensor parallelism cuts.
_LLAMA = {
    "q": ((_D, _D), 1),
    "k": ((_D, _KV), 1),
    "v": ((_D, _KV), 1),
    "o": ((_D, _D), 0),
    "gate": ((_D, _FFN), 1),
    "up": ((_D, _FFN), 1),
    "down": ((_FFN, _D), 0),
    "norm": ((_D,), None),
}


def _layout(rank: int, cut: int | None, layout: str) -> tuple[Any, ...]:
    if cut is None:
        return (None,) * rank
    names = {"fsdp": (_BOTH, None), "tensor": (None, _BOTH), "both": ("x", "y")}[layout]
    if layout == "fsdp":
        return names
    return names if cut == 1 else names[::-1]


def _llama(layout: str, stacked: bool) -> Any:
    """Structs with shardings; layers in one leaf each, or two layers on their own."""
    mesh, lead = _mesh(), (_LAYERS,) if stacked else ()

    def struct(shape, cut, lead=()):
        spec = P(*(None for _ in lead), *_layout(len(shape), cut, layout))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.bfloat16, sharding=sharding)

    layer = {name: struct(shape, cut, lead) for name, (shape, cut) in _LLAMA.items()}
    layers = layer if stacked else {"0": layer, "1": layer}
    return {
        "layers": layers,
        "embedding": struct((_VOCAB, _D), 0),
        "head": struct((_D, _VOCAB), 1),
        "norm": struct((_D,), None),
    }


def _bytes(shape, x) -> int:
    return math.prod(shape) * x.dtype.itemsize


def _share(tx: optax.GradientTransformation, params: Any) -> float:
    """What one of 8 devices holds of the state, over an eighth of it."""
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    shardings = jax.tree.leaves(gx.state_sharding(tx, params))
    total = sum(_bytes(x.shape, x) for x in state)
    one = sum(_bytes(s.shard_shape(x.shape), x) for x, s in zip(state, shardings, strict=True))
    return 8 * one / total


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
@pytest.mark.parametrize("name", ["gefen", "adamw"])
def test_bytes_per_device(layout, stacked, name):
    """An eighth, within 2 %: codebooks, norms and some statistics of k and v are replicated.

    Of the latter: 5 bytes for 256 elements of the 1024 columns that 8 devices share, 4 blocks.
    """
    assert 1 <= _share(_OPTIMIZERS[name](), _llama(layout, stacked)) <= 1.02


_EXPERTS, _STAGES = {"expert": 4, "fsdp": 2}, {"stage": 4, "tensor": 2}
# Axes of a mesh, and by name the shape and the spec of a leaf: (experts or stages, layers, ...).
_MODELS = {
    "experts": (
        _EXPERTS,
        {
            "up": ((8, _D, 1024), P("expert", None, "fsdp")),
            "down": ((8, 1024, _D), P("expert", "fsdp", None)),
            "router": ((_D, 8), P(("expert", "fsdp"), None)),
            "q": ((_D, _D), P(None, ("expert", "fsdp"))),
            "norm": ((_D,), P(None)),
        },
    ),
    "stages": (
        _STAGES,
        {
            "up": ((4, 2, _D, 1024), P("stage", None, None, "tensor")),
            "down": ((4, 2, 1024, _D), P("stage", None, "tensor", None)),
            "kv": ((4, 2, _D, 2 * 96), P("stage", None, None, "tensor")),
            "norm": ((4, 2, _D), P("stage", None, None)),
            "head": ((_D, _VOCAB), P(None, ("stage", "tensor"))),
        },
    ),
}


@pytest.mark.parametrize("kind", ["dual_code", "wide_dual_code", "shared_blocks"])
@pytest.mark.parametrize("model", _MODELS)
def test_bytes_per_device_of_experts_and_stages(model, kind):
    """With a plan for the mesh, within 2 %: codebooks and norms are replicated."""
    axes, leaves = _MODELS[model]
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 2)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in leaves.items()
    }
    plan = gx.plan_by_shape(params, kind=kind)
    assert 1 <= _share(gx.gefen(1e-3, plan=plan), params) <= 1.02


def test_bytes_per_device_without_a_plan():
    """GPT-2's kernels by columns: 8 does not divide 3, 9 or 12 runs of 256, whose 5 bytes of
    statistics every device then keeps: at most 7 * 5 / 256 more, 14 %.
    """
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    at = NamedSharding(mesh, P(None, "fsdp"))
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=at) for k, s in shapes.items()}
    plan = gx.plan_by_shape(params)
    assert 1 <= _share(gx.gefen(1e-3, plan=plan), params) <= 1.02
    assert 1.13 < _share(gx.gefen(1e-3), params) < 1.14


# Steps ------------------------------------------------------------------------------------------

_RATE = 1e-2
# As in test_surfaces.py: two programs of a step differ by a few ulps, and a code flips if it lies
# within a few ulps of a threshold. A flip of mu or nu moves an update by less than the learning
# rate.
_ULPS, _FLIPS = 2.0**-20, 1e-3


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
@pytest.mark.parametrize("layout", _SPECS)
def test_three_steps(layout, axis_type):
    mesh, specs, tx = _mesh(axis_type), _SPECS[layout], gx.gefen(_RATE)
    # Full specs: on Explicit axes another form of the same would be another type of parameters.
    at = _shardings(mesh, specs)
    params = jax.device_put(_tree(0), at)
    shardings = gx.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    spread = jax.jit(step, out_shardings=(at, shardings), donate_argnums=(0, 1))
    alone, alone_state, alone_step = _tree(0), tx.init(_tree(0)), jax.jit(step)
    for i in range(3):
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert _same(x.sharding, s, x.ndim)
        params, state = spread(params, state, jax.device_put(_tree(10 + 10 * i), at))
        alone, alone_state = alone_step(alone, alone_state, _tree(10 + 10 * i))
    assert spread._cache_size() == 1
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert _same(x.sharding, s, x.ndim)
    for name, expected in alone.items():
        got, expected = np.asarray(params[name]), np.asarray(expected)
        wrong = ~np.isclose(got, expected, rtol=_ULPS, atol=_ULPS)
        assert wrong.sum() <= _FLIPS * wrong.size, name
        np.testing.assert_allclose(got, expected, rtol=0, atol=3 * _RATE)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, alone_state)


@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
@pytest.mark.parametrize("name", ["gefen", "adamw"])
def test_shardings_stay_by_themselves(name, axis_type):
    # A step that says nothing of where its results lie.
    mesh, tx = _mesh(axis_type), _OPTIMIZERS[name]()
    params = jax.device_put(_tree(0), _shardings(mesh, _SPECS["both"]))
    shardings = gx.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    assert update._cache_size() == 1
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert _same(x.sharding, s, x.ndim)


# Refusals ---------------------------------------------------------------------------------------

_REFUSED = {
    "no mesh": (lambda: (_tree(0),), {}, "none has a NamedSharding"),
    "no mesh for specs": (lambda: (_tree(0), _SPECS["both"]), {}, "`mesh` must be given"),
    "other specs": (
        lambda: (_tree(0), {"up": P()}),
        {"mesh": _mesh()},
        "`specs` must be a tree like `params`",
    ),
    "does not divide": (
        lambda: ({"a": {"w": jnp.zeros((6, 3))}}, {"a": {"w": P("x")}}),
        {"mesh": _mesh()},
        r"`params\[a/w\]` of shape \(6, 3\)",
    ),
    "rank": (
        lambda: ({"w": jnp.zeros(8)}, {"w": P(None, "x")}),
        {"mesh": _mesh()},
        r"`params\[w\]` of shape \(8,\)",
    ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refused_by_name(case):
    args, keywords, match = _REFUSED[case]
    with pytest.raises(ValueError, match=match):
        gx.state_sharding(gx.gefen(1e-3), *args(), **keywords)


# A fresh state outside of jit --------------------------------------------------------------------

_MADE = {
    "gefen": lambda plan: gx.gefen(1e-3, plan=plan),
    "fused": lambda plan: gx.fused_gefen(1e-3, plan=plan, max_norm=1.0),
    "split weights": lambda plan: gx.with_split_weights(gx.gefen(1e-3, plan=plan)),
    "muon": lambda plan: gx.gefen_muon(1e-3, plan=plan),
    "flash": lambda _: gx.flash_adamw(1e-3),
    "microadam": lambda _: gx.microadam(1e-3),
}


@pytest.mark.parametrize("name", _MADE)
@pytest.mark.parametrize("axis_type", _AXIS_TYPES)
def test_a_state_that_is_made_outside_of_jit_lies_with_its_parameters(axis_type, name):
    """As `state_sharding` says."""
    mesh = _mesh(axis_type)
    params = jax.device_put(_tree(0), _shardings(mesh, _SPECS["fsdp"]))
    tx: Any = _MADE[name](gx.plan_by_shape(params))
    state, wanted = tx.init(params), gx.state_sharding(tx, params)
    spread = 0
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        spread += not x.is_fully_replicated
        # What chain and schedules count is Optax's own.
        assert x.sharding.is_equivalent_to(sharding, x.ndim) or x.ndim == 0
    assert spread >= 2
