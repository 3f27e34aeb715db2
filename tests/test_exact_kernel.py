"""The kernel of small leaves with exact moments, against their plain step; and that it lowers.

``u = 2**-24`` is the relative rounding error of float32. Of its terms, |m| and |g|, a new m is at
most four roundings away from the exact one in either program, and one more where a factor has
clipped g: 10 u between them. A new nu is at most four away: 8 u. The update divides by the root of
nu: half of nu's error and three roundings in either program, of the terms divided by it; 24 u of
these, or 32 u with nesterov's further sum and the three roundings of the change. Then comes one of
the parameter.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_kernels import (
    BY_SEVERAL,
    CORRECTIONS,
    H200,
    LEARNING_RATE,
    WEIGHT_DECAY,
    any_bits,
    check_weight,
    decay_at,
    same_weights,
)

import gefen_jax as gx
import pallas_kernels
from gefen_jax import _groups
from gefen_jax._dither import leaf_phases
from gefen_jax._exact import Exact
from gefen_jax._fused_leaf import _Move
from gefen_jax._types import Decay, Moments, Rates, Rounding, Step, Weight
from gefen_jax._update_then_move import update_then_move
from pallas_kernels import ExactLayout, ExactLeaf, SplitWeight, StepScalars, exact_steps

U = 2.0**-24
_ROUNDING = {"float32": U, "bfloat16": 2.0**-8, "float16": 2.0**-11}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


class Case(NamedTuple):
    """Leaves of these shapes, and a form of the step."""

    shapes: tuple[tuple[int, ...], ...]
    gradient: str = "float32"
    param: str = "float32"
    nesterov: bool = False
    bits: int = 0  # 16, 24 or 32 of a split weight
    stochastic: bool = True  # its rounding


class Data(NamedTuple):
    """What a step takes of a leaf."""

    g: Any
    moments: Moments
    param: Any
    correction: Any
    phase: Any


class Result(NamedTuple):
    """What it gives."""

    out: Any
    moments: Moments
    correction: Any = None


# Programs take 1,024 elements: less than one, one, one and a few more, several.
SHAPES = ((7,), (1024,), (5, 7), (1030,), (), (3, 700))
CASES = {
    "float32": Case(SHAPES),
    "nesterov": Case(SHAPES, nesterov=True),
    "bfloat16 gradients": Case(SHAPES[:4], "bfloat16"),
    "float16": Case(SHAPES[:4], "float16", "float16"),
    "one leaf": Case(((2049,),), param="bfloat16"),
    "split, 24 bits": Case(SHAPES, "bfloat16", "bfloat16", bits=24),
    "split, 16 bits": Case(SHAPES[:4], "bfloat16", "bfloat16", bits=16),
    "split, 32 bits": Case(SHAPES[:4], param="bfloat16", bits=32),
    "split, nearest": Case(SHAPES[:4], param="bfloat16", bits=24, stochastic=False),
    "split, float16, 24 bits": Case(SHAPES[:4], "float16", "float16", bits=24),
}


def data_of(case: Case, seed: int, t: int = 3, decades: float = 2.0) -> list[Data]:
    """Any state, and gradients of its size times a few decades; some elements have none."""
    rng = np.random.default_rng(seed)
    phases = leaf_phases([f"leaf {i}" for i in range(len(case.shapes))], jnp.int32(t))
    dtype, leaves = CORRECTIONS[case.bits], []
    for shape, phase in zip(case.shapes, phases, strict=True):
        size = 10 ** rng.uniform(-decades, decades / 4, shape)
        g = rng.normal(size=shape) * size * (rng.random(shape) < 0.9)
        mu, root = rng.normal(size=shape) * size, size * rng.uniform(0.5, 2, shape)
        moments = Moments(jnp.asarray(mu, jnp.float32), None, jnp.asarray(root**2, jnp.float32))
        correction = None if dtype is None else jnp.asarray(any_bits(rng, shape, dtype))
        param = jnp.asarray(rng.normal(size=shape), case.param)
        leaves.append(Data(jnp.asarray(g, case.gradient), moments, param, correction, phase))
    return leaves


@functools.cache
def plain_step(case: Case) -> Any:
    """`gefen_jax`'s, leaf by leaf."""

    @jax.jit
    def step(leaves: Sequence[Data], decay: Decay, learning_rate: Any, weight_decay: Any) -> Any:
        rates = Rates(None, jnp.float32(weight_decay), -jnp.float32(learning_rate))
        move = _Move(Rounding(case.bits, case.stochastic) if case.bits else None)
        results = []
        for x in leaves:
            how = {"nesterov": case.nesterov, "exact_lookup": True, "backend": None}
            how |= {"rates": rates, "weight_phase": x.phase, "phase": x.phase}
            step, weight = Step(decay, None, None, **how), Weight(x.param, x.correction)
            weight, moments = update_then_move(Exact(), weight, x.g, x.moments, step, move)
            results.append(Result(weight.high, moments, weight.low))
        return results

    return step


def kernel_step(case: Case, backend: str, interpret: Any) -> Any:
    def step(
        leaves: Sequence[Data], decay: Decay, learning_rate: Any, weight_decay: Any, **others: Any
    ) -> list[Result]:
        before = []
        for x in leaves:
            phase = x.phase if case.stochastic and case.bits < 32 else None
            split = SplitWeight(x.correction, phase) if case.bits else None
            before.append(ExactLeaf(x.param, x.moments.mu, x.moments.nu, split))
        after = exact_steps(
            [x.g for x in leaves],
            before,
            scalars=StepScalars(*decay),
            nesterov=case.nesterov,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            backend=backend,
            interpret=interpret,
            **others,
        )
        return [
            Result(x.param, Moments(x.mu, None, x.nu), x.split and x.split.correction)
            for x in after
        ]

    return step


def check_equal(case: Case, leaves: Sequence[Data], decay: Decay, plain: Any, kernel: Any) -> None:
    """The same but for rounding."""
    for x, wanted, found in zip(leaves, plain, kernel, strict=True):
        g, mu = (np.abs(np.asarray(y, np.float32)) for y in (x.g, x.moments.mu))
        with np.errstate(invalid="ignore", over="ignore"):
            _near(found.moments.mu, wanted.moments.mu, 10 * U * (g + mu))
            _near(found.moments.nu, wanted.moments.nu, 8 * U * np.asarray(wanted.moments.nu))
            nu = np.asarray(wanted.moments.nu)
            root = np.sqrt(nu / decay.correction2 + decay.eps_root) + decay.eps
            terms = LEARNING_RATE * (g + mu) / decay.correction1 / root
            if case.bits:
                check_weight(case, x, wanted, found, np.True_, 2 * terms)
                continue
            theta, out = (np.asarray(y, np.float32) for y in (x.param, wanted.out))
            bound = 32 * U * (terms + LEARNING_RATE * WEIGHT_DECAY * np.abs(theta))
            _near(found.out, out, bound + 2 * _ROUNDING[case.param] * np.abs(out))


def _near(found: Any, wanted: Any, bound: Any) -> None:
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    near = np.abs(found - wanted) <= bound + np.finfo(np.float32).tiny
    near |= (np.isnan(found) & np.isnan(wanted)) | (found == wanted)
    assert np.all(near)


class ExactStepContract:
    """What every implementation of the step fulfils; a subclass names one."""

    step: Any

    def check(self, case: Case, leaves: Sequence[Data], t: int = 3, decay: Any = None) -> Any:
        decay = decay_at(t) if decay is None else decay
        args = leaves, decay, LEARNING_RATE, WEIGHT_DECAY
        found = type(self).step(case)(*args)
        check_equal(case, leaves, decay, plain_step(case)(*args), found)
        return found

    @pytest.mark.parametrize("name", CASES)
    def test_equals_the_plain_step(self, name):
        """At the first step, where corrections are small, and at a later one."""
        for seed, t in ((0, 1), (1, 1000)):
            self.check(CASES[name], data_of(CASES[name], seed, t), t)

    @settings(BY_SEVERAL, max_examples=20)
    @given(seed=st.integers(0, 2**31), t=st.integers(1, 10**6), decades=st.floats(0, 6))
    def test_any_numbers(self, seed, t, decades):
        case = CASES["split, 24 bits"]
        self.check(case, data_of(case, seed, t, decades), t)

    # Every shape is compiled: few of them.
    @settings(BY_SEVERAL, max_examples=3)
    @given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8))
    def test_any_shapes(self, sizes):
        case = Case(tuple((size,) for size in sizes))
        self.check(case, data_of(case, 0))

    def test_no_gradient_ever(self):
        """A state of zeros stays, and so does the parameter but for its weight decay."""
        case = CASES["float32"]
        leaves = [
            x._replace(g=x.g * 0, moments=jax.tree.map(jnp.zeros_like, x.moments))
            for x in data_of(case, 0)
        ]
        for x, found in zip(leaves, self.check(case, leaves), strict=True):
            assert not np.any(found.moments.mu) and not np.any(found.moments.nu)
            decayed = np.asarray(x.param) * (1 - LEARNING_RATE * WEIGHT_DECAY)
            np.testing.assert_allclose(found.out, decayed, rtol=4 * U)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_gradient_that_is_not_finite_is_its_element_s(self, value):
        case = CASES["float32"]
        leaves = data_of(case, 0)
        leaves[3] = leaves[3]._replace(g=leaves[3].g.at[1027].set(value))
        found = self.check(case, leaves)
        nan = [np.flatnonzero(np.isnan(x.out)).tolist() for x in found]
        assert nan == [[], [], [], [1027], [], []]

    @pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e15, 1e25])
    def test_huge_and_small_gradients(self, factor):
        """From a state of zeros: nu underflows, or overflows and makes updates 0, as Adam's."""
        case = CASES["float32"]
        leaves = [
            x._replace(
                g=jnp.where(x.g == 0, 0, jnp.sign(x.g)) * jnp.float32(factor),
                moments=jax.tree.map(jnp.zeros_like, x.moments),
            )
            for x in data_of(case, 0)
        ]
        found = self.check(case, leaves, decay=decay_at(1)._replace(eps_root=jnp.float32(0)))
        assert all(np.isfinite(x.out).all() for x in found)

    def test_gradient_factor(self):
        """A power of two, so that nothing rounds otherwise."""
        case, leaves, decay = CASES["float32"], data_of(CASES["float32"], 0), decay_at(3)
        args = decay, LEARNING_RATE, WEIGHT_DECAY
        found = type(self).step(case)(leaves, *args, gradient_factor=0.25)
        leaves = [x._replace(g=x.g * 0.25) for x in leaves]
        check_equal(case, leaves, decay, plain_step(case)(leaves, *args), found)

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bits])
    def test_a_change_of_zero_leaves_split_weights(self, name):
        """Bit for bit, while the moments go on."""
        case = CASES[name]
        leaves = data_of(case, 0)
        found = type(self).step(case)(leaves, decay_at(3), 0.0, WEIGHT_DECAY)
        for x, after in zip(leaves, found, strict=True):
            same_weights((after.out, after.correction), (x.param, x.correction))
            assert np.any(np.asarray(after.moments.mu) != np.asarray(x.moments.mu))


@functools.cache
def _interpreted(backend: str, case: Case) -> Any:
    # Least effort: these programs run once, and compiling them is what the tests take.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(kernel_step(case, backend, True), compiler_options=options)


_NEEDS_TRITON = pytest.mark.skipif(
    not pallas_kernels.is_available(),
    reason=f"jax {jax.__version__} has no Triton dialect of Pallas",
)
_NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="`backend` 'mosaic' needs jax 0.11.2 or newer"
)


@_NEEDS_TRITON
@pytest.mark.once
class TestTritonInterpreted(ExactStepContract):
    """The kernel in the Triton dialect, interpreted."""

    step = staticmethod(functools.partial(_interpreted, "triton"))


@_NEEDS_MOSAIC
class TestMosaicInterpreted(ExactStepContract):
    """The kernel in Mosaic GPU, in Pallas' interpreter."""

    step = staticmethod(functools.partial(_interpreted, "mosaic"))

    # The arithmetic is that of the Triton dialect, line by line: its numbers are tested there.
    test_any_numbers = None


@_NEEDS_MOSAIC
def test_in_the_interpreter_of_mosaic():
    """In place: references as a GPU gets them. One warpgroup takes what two would."""
    case = CASES["split, 24 bits"]._replace(shapes=((7,), (1030,)))
    args = data_of(case, 0), decay_at(3), LEARNING_RATE, WEIGHT_DECAY
    found = jax.jit(kernel_step(case, "mosaic", plgpu.InterpretGPUParams()))(*args)
    check_equal(case, args[0], args[1], plain_step(case)(*args), found)


# Lowering ----------------------------------------------------------------------------------------

_CALLS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}
_WITH_TRITON, _WITH_MOSAIC = (
    pytest.param("triton", marks=_NEEDS_TRITON),
    pytest.param("mosaic", marks=_NEEDS_MOSAIC),
)
with_every_kernel = pytest.mark.parametrize("backend", [_WITH_TRITON, _WITH_MOSAIC])


def _lowered(function: Any, *args: Any, **options: Any) -> str:
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(function, **options).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", CASES)
@with_every_kernel
def test_lowers_for_cuda_in_place(backend, name):
    """One custom call for all leaves, which writes their weights and moments where they were."""
    case = CASES[name]
    leaves = jax.eval_shape(lambda: data_of(case, 0))
    written = [x._replace(g=None, phase=None) for x in leaves]

    def step(written: Any, rest: Any) -> Any:
        both = [x._replace(g=y.g, phase=y.phase) for x, y in zip(written, rest, strict=True)]
        return kernel_step(case, backend, False)(both, decay_at(3), LEARNING_RATE, WEIGHT_DECAY)

    text = _lowered(step, written, leaves, donate_argnums=0)
    assert text.count(f"@{_CALLS[backend]}") == 1 and "gefen_exact_step_fused" in text
    arrays = len(jax.tree.leaves(written))
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays


# In the optimizer --------------------------------------------------------------------------------

_SIZES = [3, 1500, 7, 1024, 33]


def _tree(seed: int, sizes: Sequence[int] = _SIZES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"b{i}": jnp.asarray(rng.normal(size=n), jnp.float32) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("split", [False, True])
@with_every_kernel
def test_small_leaves_share_kernels(backend, split, monkeypatch):
    """At most so many, those without weight decay apart; one alone and a large one stay plain."""
    monkeypatch.setattr(_groups, "_LEAVES_OF_A_KERNEL", 3)
    params = _tree(0, [40 + i for i in range(9)]) | {"large": jnp.zeros((300, 300))}
    plan = gx.plan_by_shape(params).with_kind("*", gx.Exact())
    mask = {name: name not in ("b7", "b8") for name in params}
    fused = gx.fused_gefen(1e-2, plan=plan, mask=mask, backend=backend)
    if split:
        fused = gx.with_split_weights(fused)
    weights = gx.split_weights(params)[0] if split else params
    text = _lowered(fused.step, weights, jax.eval_shape(fused.init, params), weights)
    assert text.count(f"@{_CALLS[backend]}") == 3  # of 3, 3 and 2; the seventh is alone


@with_every_kernel
def test_updates_stay_plain(backend):
    """What is done with them afterwards is a kernel for every leaf all the same."""
    tx = gx.gefen(1e-2, backend=backend)
    text = _lowered(tx.update, _tree(0), jax.eval_shape(tx.init, _tree(0)), _tree(0))
    assert _CALLS[backend] not in text


@with_every_kernel
def test_groups_of_layers_alike_are_lowered_once(backend):
    """Of 12 layers with 8 small leaves each: four groups of three layers."""
    layer = {f"b{i}": jnp.zeros(16 + i) for i in range(8)}
    params = {f"layer {i}": layer for i in range(12)}
    fused = gx.fused_gefen(1e-2, backend=backend)
    text = _lowered(fused.step, params, jax.eval_shape(fused.init, params), params)
    assert text.count(f"@{_CALLS[backend]}") == 1
    assert text.count("call @_step_in_one_kernel(") == 4


@with_every_kernel
def test_steps_of_the_optimizer(backend):
    """Ten of them beside AdamW's, clipped and masked; one leaf has no gradient."""
    params, mask = _tree(0) | {"none": jnp.ones(5)}, {f"b{i}": i % 2 == 0 for i in range(5)}
    mask |= {"none": False}
    schedule = optax.linear_schedule(1e-2, 0, 10)
    fused = gx.fused_gefen(schedule, weight_decay=0.1, mask=mask, max_norm=1.0, backend=backend)
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask)
    )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params: Any) -> Any:
        ours, state, theirs, other = params, fused.init(params), params, adamw.init(params)
        for t in range(10):
            grads = _tree(t + 1)
            ours, state = fused.step(grads | {"none": None}, state, ours)
            updates, other = adamw.update(grads | {"none": jnp.zeros(5)}, other, theirs)
            theirs = optax.apply_updates(theirs, updates)
        return ours, theirs

    ours, theirs = run(params)
    for name, x in theirs.items():
        # As above, of ten steps of a size of at most 3.2 learning rates.
        np.testing.assert_allclose(ours[name], x, rtol=20 * U, atol=32 * 32 * U * 1e-2)


@with_every_kernel
def test_an_ensemble_by_vmap(backend):
    fused = gx.fused_gefen(1e-2, backend=backend)
    both, grads = (jax.tree.map(lambda *x: jnp.stack(x), _tree(i), _tree(i + 1)) for i in (0, 2))
    states = jax.vmap(fused.init)(both)
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    new, _ = jit(jax.vmap(fused.step))(grads, states, both)
    one = jit(fused.step)
    for i in range(2):
        g, state, params = jax.tree.map(lambda x, i=i: x[i], (grads, states, both))
        for name, x in one(g, state, params)[0].items():
            np.testing.assert_allclose(new[name][i], x, rtol=4 * U, atol=32 * U * 1e-2)


@with_every_kernel
def test_derivatives_are_refused(backend):
    """With respect to gradients, and to the learning rate."""
    params = _tree(0)

    def loss(grads: Any, learning_rate: Any) -> Any:
        fused = gx.fused_gefen(learning_rate, backend=backend)
        return jnp.sum(fused.step(grads, fused.init(params), params)[0]["b0"])

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="a kernel has no derivative: use `backend`"):
            jax.eval_shape(jax.grad(loss, argnums=argument), params, jnp.float32(1e-2))


@with_every_kernel
def test_what_the_kernel_cannot_take_stays_plain(backend):
    """Leaves in a `shard_map`, or of a dtype that it does not know."""
    fused, params = gx.fused_gefen(1e-2, backend=backend), _tree(0)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def step(params: Any) -> Any:
        return fused.step(params, fused.init(params), params)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    narrow = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), params)
    assert "_step_in_one_kernel" in str(jax.make_jaxpr(step)(params))
    for function, args in ((mapped, params), (step, narrow)):
        assert "_step_in_one_kernel" not in str(jax.make_jaxpr(function)(args))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        assert "_step_in_one_kernel" not in str(jax.make_jaxpr(step)(wide))


def test_wrong_arguments_are_named():
    case, decay = CASES["float32"], decay_at(3)
    leaves = data_of(case, 0)

    def call(i: int, **wrong: Any) -> None:
        those = [x._replace(**wrong) if i == j else x for j, x in enumerate(leaves)]
        jax.eval_shape(lambda: kernel_step(case, "triton", True)(those, decay, 0.1, 0.1))

    with pytest.raises(TypeError, match="`mu` must be float32, got bfloat16"):
        call(0, moments=jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves[0].moments))
    with pytest.raises(TypeError, match="`g` must be float32 or bfloat16 or float16, got int8"):
        call(1, g=leaves[1].g.astype(jnp.int8))
    with pytest.raises(ValueError, match="`g`, `param`, `mu`, `nu` must have one shape of 1024 el"):
        call(1, param=leaves[0].param)
    narrow = [x._replace(param=x.param.astype(jnp.bfloat16)) for x in leaves]
    parts = [ExactLeaf(x.param, x.moments.mu, x.moments.nu) for x in narrow]
    parts[1] = parts[1]._replace(split=SplitWeight(None, None))
    how: dict[str, Any] = {"scalars": StepScalars(*decay), "interpret": True}
    with pytest.raises(ValueError, match="`leaves` must be split alike, all or none of them; got"):
        exact_steps([x.g for x in leaves], parts, **how)
    with pytest.raises(ValueError, match="`leaves` must be at least one, and none of them empty"):
        exact_steps([], [], **how)


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=40))
def test_programs_are_of_one_leaf_each(sizes):
    layout = ExactLayout(tuple(sizes))
    assert layout.programs[-1] * 1024 == layout.inner
    ends = [*layout.starts[1:], layout.inner]
    for size, start, end in zip(sizes, layout.starts, ends, strict=True):
        assert start % 1024 == 0 and start + size <= end < start + size + 1024
