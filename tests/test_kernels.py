"""The GPU kernels against the plain step, interpreted on a CPU; and that they lower for CUDA.

``u = 2**-24`` is the relative rounding error of float32. Two programs may take different codes
where a fraction lies within rounding of the point at which it would decide otherwise
(`tests/test_dual.py` derives how near). Per code of m that is at most 14 u slope |parts| and six
more u (slope + 16), with a slope of at most 14.5 and parts of at most 10 scales (1 / (1 - b1)):
1.4e-4 for the largest, 1e-5 for most; and either of two programs may be so far off. So at most 2e-4
of all codes may differ, and five standard deviations of such a count.

What split weights stand for differs, before it is rounded, by at most the bound that
`check_weight` derives. Rounded by the same fractions, that may become a step more, and does with a
probability of the bound divided by the step.
"""

import ast
import functools
import math
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import gefen_jax as gx
import gefen_jax._split as plain_split
import pallas_kernels
import pallas_kernels._split_weight as kernel_split
from gefen_jax._builtin import builtin_codebook
from gefen_jax._dither import dither, leaf_phases, positions
from gefen_jax._dual_code import DualCode
from gefen_jax._dual_step import advance_dual, direction_dual
from gefen_jax._levels import make_levels
from gefen_jax._packing import SHARED
from gefen_jax._split import advance, merge
from gefen_jax._types import Decay, Moments, Step
from gefen_jax._with_split_weights import _phases
from pallas_kernels import (
    DualLayout,
    DualStepConfig,
    DualStepResult,
    SplitWeight,
    StepScalars,
    dual_step,
    dual_step_config,
)
from pallas_kernels._dual_step import LEVELS, Tables, _round_to_level
from pallas_kernels._dual_step_launch import _tables

U = 2.0**-24
_DIFFER = 2e-4
# Of results: of a dtype's own rounding one step, of float32 what `_check_update` of
# `tests/test_dual.py` counts for one program, 24 u and twice b1's and b2's 4 u, for two.
TOLERANCE = {"float32": 80 * U, "bfloat16": 2.0**-7, "float16": 2.0**-10}
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
_CODEBOOK = np.asarray(builtin_codebook(16), np.float32)
_FOLDER = Path(pallas_kernels.__file__).parent

pytestmark = [
    pytest.mark.skipif(
        not pallas_kernels.is_available(),
        reason=f"jax {jax.__version__} has no Triton dialect of Pallas",
    ),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]


class Case(NamedTuple):
    """A leaf ``[blocks, stretches, 2 * half, inner]`` and a form of the step."""

    layout: DualLayout
    gradient: str = "float32"
    param: str | None = None  # the fused form's
    nesterov: bool = False
    bits: int = 0  # 16, 24 or 32 of a split weight
    stochastic: bool = True  # its rounding

    @property
    def shape(self) -> tuple[int, ...]:
        layout = self.layout
        return layout.blocks, layout.stretches, 2 * layout.half, layout.inner

    @property
    def block(self) -> tuple[int, ...]:
        return 1, self.layout.stretches, 2 * self.layout.half, 1

    @property
    def stats(self) -> tuple[int, ...]:
        return self.layout.blocks, 1, 1, self.layout.inner


class Data(NamedTuple):
    """What a step takes."""

    g: Any
    state: Moments
    param: Any
    decay: Decay
    phase: Any
    correction: Any = None  # of a split weight
    weight_phase: Any = None  # of its dither; None to round to the nearest
    learning_rate: Any = LEARNING_RATE
    weight_decay: Any = WEIGHT_DECAY


class Result(NamedTuple):
    """What a step gives: the update or the new parameter, and the state."""

    out: Any
    state: Moments
    correction: Any = None


CASES = {
    "rows": Case(DualLayout(5, 1, 128)),
    "rows, fused": Case(DualLayout(5, 1, 128), param="float32"),
    "padded, many programs": Case(DualLayout(70, 1, 48), "bfloat16", "float32"),
    "stretches": Case(DualLayout(3, 6, 10), "float16", nesterov=True),
    "one long block": Case(DualLayout(1, 1, 500), "bfloat16"),
    "columns": Case(DualLayout(1, 1, 128, 5), param="bfloat16"),
    "many columns": Case(DualLayout(3, 2, 3, 67), param="float16", nesterov=True),
    "split, 24 bits": Case(DualLayout(5, 1, 128), "bfloat16", "bfloat16", bits=24),
    "split, 16 bits": Case(DualLayout(1, 1, 128, 5), "bfloat16", "bfloat16", bits=16),
    "split, 32 bits": Case(DualLayout(20, 1, 48), param="bfloat16", bits=32),
    "split, nearest": Case(
        DualLayout(3, 2, 3, 67), "bfloat16", "bfloat16", bits=24, stochastic=False
    ),
    "split, float16, 24 bits": Case(DualLayout(5, 1, 128), "float16", "float16", bits=24),
    "split, float16, 32 bits, nearest": Case(
        DualLayout(20, 1, 48), param="float16", bits=32, stochastic=False
    ),
}
SPLIT = [name for name, case in CASES.items() if case.bits]
CORRECTIONS = {0: None, 16: None, 24: np.dtype(np.int8), 32: np.dtype(np.int16)}


def decay_at(t: int, b1: float = 0.9, b2: float = 0.999) -> Decay:
    corrections = (1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t)
    values = (b1, b2, 1 - b1, 1 - b2, 1e-8, 1e-12, *corrections)
    return Decay(*(jnp.float32(x) for x in values))


def data_of(case: Case, seed: int, t: int = 3, decades: float = 2.0) -> Data:
    """Any state, and gradients of its size times a few decades; some elements have none."""
    rng = np.random.default_rng(seed)
    exponent = rng.integers(95, 125, case.stats)
    root = 2.0 ** ((exponent - 127) / 2)
    size = root * 10 ** rng.uniform(-decades, decades / 4, case.shape)
    g = rng.normal(size=case.shape) * size * (rng.random(case.shape) < 0.9)
    state = Moments(
        jnp.asarray(rng.integers(0, 256, case.shape), jnp.uint8),
        jnp.asarray(rng.uniform(0, 3, case.stats), jnp.float32),
        jnp.asarray(exponent, jnp.uint8),
    )
    param = None
    if case.param is not None:
        param = jnp.asarray(rng.normal(size=case.shape), case.param)
    phase, weight_phase = leaf_phases([f"leaf {seed}", f"weights {seed}"], jnp.int32(t))
    dtype = CORRECTIONS[case.bits]
    correction = None if dtype is None else jnp.asarray(any_bits(rng, case.shape, dtype))
    g = jnp.asarray(g, case.gradient)
    return Data(g, state, param, decay_at(t), phase, correction, weight_phase)


def any_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return bits.view(dtype)[..., 0]


def any_weights(case: Any, data: Data) -> Data:
    """All kinds of weights, with corrections that belong to them; no gradient was ever there."""
    weight = any_bits(np.random.default_rng(1), case.shape, jnp.dtype(case.param))
    info = jnp.finfo(case.param)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max]
    special += [info.smallest_subnormal, -0.75 * float(info.tiny)]
    weight.flat[: len(special)] = special
    weight, correction = jnp.asarray(weight), data.correction
    if correction is not None:
        # Below 0 are numbers of the other sign; what is not finite has nothing to be corrected.
        correction = jnp.where(weight == 0, jnp.maximum(correction, 0), correction)
        correction = jnp.where(jnp.isfinite(weight), correction, 0)
        # In float16 with 32 bits some pairs lie between the float32 numbers.
        weight, correction = plain_split.split(merge(weight, correction), case.bits, weight.dtype)
    g, state = jax.tree.map(jnp.zeros_like, (data.g, data.state))
    return data._replace(g=g, state=state, param=weight, correction=correction)


@functools.cache
def plain_step(case: Case) -> Any:
    @jax.jit
    def step(data: Data) -> Result:
        codebook = jnp.asarray(_CODEBOOK)
        arguments = Step(
            data.decay, None, make_levels(codebook), data.phase, case.nesterov, True, None
        )
        new = advance_dual(data.g, data.state, case.block, arguments, packing=SHARED)
        if data.param is None:
            update = direction_dual(data.g, new, case.block, arguments, SHARED)
            return Result(update.astype(data.g.dtype), new)
        update = direction_dual(data.g.astype(jnp.float32), new, case.block, arguments, SHARED)
        theta = merge(data.param, data.correction) if case.bits else data.param.astype(jnp.float32)
        change = -data.learning_rate * (update + data.weight_decay * theta)
        if not case.bits:
            return Result((theta + change).astype(data.param.dtype), new)
        words, _ = dither(data.weight_phase, positions(case.shape))
        words = words if case.stochastic else None
        delta, low = advance(data.param, data.correction, change, case.bits, words)
        out = merge(data.param, None) + delta
        return Result(out.astype(data.param.dtype), new, low)

    return step


def kernel_step(case: Case, config: DualStepConfig | None = None, interpret: Any = True) -> Any:
    def step(data: Data, **others: Any) -> DualStepResult:
        weight_phase = data.weight_phase if case.stochastic else None
        split = SplitWeight(data.correction, weight_phase) if case.bits else None
        return dual_step(
            data.g,
            *data.state,
            layout=case.layout,
            scalars=StepScalars(*data.decay),
            codebook=jnp.asarray(_CODEBOOK),
            phase=data.phase,
            nesterov=case.nesterov,
            param=data.param,
            learning_rate=data.learning_rate,
            weight_decay=data.weight_decay,
            split=split,
            config=config,
            interpret=interpret,
            **others,
        )

    return step


@functools.cache
def _interpreted(case: Case, config: DualStepConfig | None = None) -> Any:
    # Least effort: these programs run once, and compiling them is what the tests take.
    return jax.jit(
        kernel_step(case, config), compiler_options={"xla_backend_optimization_level": 0}
    )


def _levels_of_nu(codes: np.ndarray) -> np.ndarray:
    first, second = np.split(codes.astype(int), 2, axis=2)
    return (first & 0xF0) | (second >> 4)


def check_equal(case: Case, data: Data, plain: Result, kernel: DualStepResult) -> None:
    """The same but for a handful of codes, next to each other, and rounding."""
    wanted, found = np.asarray(plain.state.mu), np.asarray(kernel.codes)
    np.testing.assert_array_equal(kernel.exponent, plain.state.nu)
    # What NaN is coded as, is nobody's business.
    finite = np.isfinite(np.asarray(plain.state.scale))
    np.testing.assert_array_equal(np.isfinite(np.asarray(kernel.scale)), finite)
    finite = np.broadcast_to(finite, case.shape)

    m_apart = np.where(finite, np.abs((wanted & 15).astype(int) - (found & 15)), 0)
    nu_apart = np.abs(_levels_of_nu(wanted) - _levels_of_nu(found))
    nu_apart = np.where(finite, np.concatenate([nu_apart, nu_apart], axis=2), 0)
    assert m_apart.max() <= 1 and nu_apart.max() <= 1
    expected = _DIFFER * found.size
    same = (m_apart == 0) & (nu_apart == 0)
    assert np.count_nonzero(~same) <= expected + 5 * math.sqrt(expected)

    # A nu one level off moves a scale by up to half of a sixteenth.
    blocks_same = same.all(axis=(1, 2), keepdims=True)
    rtol = np.where(blocks_same, 28 * U, 1 / 30)
    scale, ours = np.asarray(plain.state.scale), np.asarray(kernel.scale)
    with np.errstate(invalid="ignore"):
        assert np.all((np.abs(ours - scale) <= rtol * scale) | ~np.isfinite(scale))

    dtype = str(kernel.out.dtype)
    assert dtype == (case.param or case.gradient)
    if case.bits:
        check_weight(case, data, plain, kernel, same & blocks_same)
        return
    out, ours = (np.asarray(x, np.float32) for x in (plain.out, kernel.out))
    same = same & blocks_same
    # Terms of the sums that the forms end with: nesterov's have the updates' size, a parameter is
    # one itself.
    with np.errstate(invalid="ignore"):
        terms = np.abs(out) + (np.nanmax(np.abs(out[same]), initial=0) if case.nesterov else 0)
        if data.param is not None:
            terms = terms + np.abs(np.asarray(data.param, np.float32))
        near = np.abs(ours - out) <= TOLERANCE[dtype] * terms + np.finfo(np.float32).tiny
    near |= (np.isnan(ours) & np.isnan(out)) | (ours == out)
    assert np.all(near | ~same)


def check_weight(
    case: Any, data: Any, plain: Any, kernel: Any, same: Any, terms: Any = 0.0
) -> None:
    """Split weights, where the codes are the same.

    Updates differ as those in float32 do. Then come three roundings of the change and one of the
    sum, in each program. An update may have been larger than what was moved, by what rounding
    and the weight decay took; and so may the terms of a change that is a sum.
    """
    before = np.asarray(merge(data.param, data.correction))
    assert (kernel.correction is None) == (plain.correction is None)
    wanted = np.asarray(merge(plain.out, plain.correction))
    ours = np.asarray(merge(kernel.out, kernel.correction))
    # What split numbers are apart, at most; of normal weights at least half of it. With 32 bits all
    # float32 numbers are among them, but for float16's below 2^-17.
    info = jnp.finfo(kernel.out.dtype)
    step = 2.0 ** (16 - info.nmant - case.bits) * np.maximum(np.abs(wanted), float(info.tiny))
    step = np.where((case.bits == 32) & (np.abs(wanted) >= 2.0**-17), 0, step)
    decayed = LEARNING_RATE * WEIGHT_DECAY * np.abs(before)
    with np.errstate(invalid="ignore"):
        change = np.abs(wanted - before) + step + 2 * decayed + terms
        bound = (TOLERANCE["float32"] + 6 * U) * change + 2 * U * np.abs(wanted)
        # What the plain form adds to the old weight cannot say all: see `with_split_weights`.
        small = np.abs(wanted) < 2.0 ** (info.nmant - 21) * np.abs(before)
        bound = bound + np.where(small, 2.0**-22 * np.abs(before), 0)
        near = np.abs(ours - wanted) <= bound + step
    near |= np.isnan(ours) & np.isnan(wanted)
    assert np.all(near | ~same)
    if case.bits < 32:
        expected = np.sum(np.minimum(2 * bound / step, 1), where=same & np.isfinite(wanted))
        differ = np.count_nonzero((ours != wanted) & same & np.isfinite(wanted))
        assert differ <= expected + 5 * math.sqrt(expected)


def _same_bits(ours: Any, wanted: Any) -> None:
    """Equal as bits, whatever a NaN's are."""
    assert ours.dtype == wanted.dtype
    nan = np.asarray(jnp.isnan(wanted))
    np.testing.assert_array_equal(jnp.isnan(ours), nan)
    ours, wanted = (np.asarray(x).view(f"i{x.dtype.itemsize}")[~nan] for x in (ours, wanted))
    np.testing.assert_array_equal(ours, wanted)


def same_weights(ours: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    """Weights and their corrections, if there are any, equal as bits."""
    _same_bits(ours[0], wanted[0])
    np.testing.assert_array_equal(ours[1], wanted[1])


# One contract is run by several classes, on purpose. No search for the smallest that fails.
BY_SEVERAL = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.differing_executors],
)


class StepContract:
    """What every implementation of the step fulfils; a subclass names one."""

    step: Any

    def check(self, case: Case, data: Data) -> DualStepResult:
        found = type(self).step(case)(data)
        check_equal(case, data, plain_step(case)(data), found)
        return found

    def test_a_part_with_gaps(self):
        """Of rows of four blocks the middle two: the fractions of their places in the whole."""
        case = Case(DualLayout(12, 1, 24), "bfloat16", "bfloat16", bits=24)
        data, at = data_of(case, 0), np.arange(12).reshape(3, 4)[:, 1:3].reshape(-1)
        axes = ((2 * 48, 1), (3, 4 * 48))
        part = case._replace(layout=DualLayout(6, 1, 24, axes=axes))
        leaves = ("g", "state", "param", "correction")
        cut = {name: jax.tree.map(lambda x: x[at], getattr(data, name)) for name in leaves}
        found = type(self).step(part)(data._replace(**cut), offset=48)
        wanted = type(self).step(case)(data)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs[at])

    @pytest.mark.parametrize("name", CASES)
    def test_equals_the_plain_step(self, name):
        """At the first step, where corrections are small, and at a later one."""
        for seed, t in ((0, 1), (1, 1000)):
            self.check(CASES[name], data_of(CASES[name], seed, t))

    @settings(BY_SEVERAL, max_examples=20)
    @given(seed=st.integers(0, 2**31), t=st.integers(1, 10**6), decades=st.floats(0, 6))
    def test_any_numbers(self, seed, t, decades):
        case = CASES["padded, many programs"]
        self.check(case, data_of(case, seed, t, decades))

    # Every shape is compiled: few of them, and no search for the smallest that fails.
    @settings(BY_SEVERAL, max_examples=3)
    @given(
        blocks=st.integers(1, 9),
        stretches=st.integers(1, 4),
        half=st.integers(1, 128),
        inner=st.sampled_from([1, 1, 2, 17, 33]),
        dtypes=st.sampled_from(
            [
                ("float16", None),
                ("bfloat16", "float32"),
                ("float32", "float32"),
                ("bfloat16", "bfloat16", False, 24),
                ("float16", "float16", False, 24),
            ]
        ),
    )
    def test_any_shape(self, blocks, stretches, half, inner, dtypes):
        case = Case(DualLayout(blocks, stretches, half, inner), *dtypes)
        self.check(case, data_of(case, 0))

    def test_blocks_without_gradient_decay_alike(self):
        """Padding takes no part: its code of 0 would stand for the largest m of all."""
        case = CASES["padded, many programs"]
        data = data_of(case, 0)
        codes = (data.state.mu & 0xF0) | 7  # entry 7 is 0: nothing but padding has an m
        data = data._replace(g=data.g * 0, state=data.state._replace(mu=codes))
        found = self.check(case, data)
        assert not np.any(found.scale)

    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_no_gradient_ever(self, eps):
        """A state of zeros stays, and so does the parameter but for its weight decay."""
        case = CASES["rows, fused"]
        data = data_of(case, 0)
        zeros = jax.tree.map(jnp.zeros_like, data.state)
        decay = data.decay._replace(eps=jnp.float32(eps), eps_root=jnp.float32(0))
        found = self.check(case, data._replace(g=data.g * 0, state=zeros, decay=decay))
        assert not np.any(found.scale) and not np.any(found.exponent)
        decayed = np.asarray(data.param) * (1 - LEARNING_RATE * WEIGHT_DECAY)
        np.testing.assert_allclose(found.out, decayed, rtol=4 * U)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_gradients_make_their_blocks_nan(self, value):
        case = CASES["rows"]
        data = data_of(case, 0)
        found = self.check(case, data._replace(g=data.g.at[2, 0, 17, 0].set(value)))
        nan = np.isnan(found.out).all(axis=(1, 2, 3))
        assert nan.tolist() == [False, False, True, False, False]
        assert np.isfinite(np.asarray(found.out)[~nan]).all()

    @pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e-6, 1e6, 1e15, 1e25])
    def test_huge_and_small_gradients(self, factor):
        """From a state of zeros: nu underflows, or overflows and makes its elements NaN."""
        case = CASES["rows"]
        data = data_of(case, 0, t=1)
        zeros = jax.tree.map(jnp.zeros_like, data.state)
        found = self.check(case, data._replace(g=data.g * jnp.float32(factor), state=zeros))
        assert np.isfinite(found.out).all() == (factor < 1e20)

    def test_gradient_factor(self):
        """A power of two, so that nothing rounds otherwise."""
        case = CASES["rows"]
        data = data_of(case, 0)
        found = type(self).step(case)(data, gradient_factor=0.25)
        check_equal(case, data, plain_step(case)(data._replace(g=data.g * 0.25)), found)

    @pytest.mark.parametrize("config", [DualStepConfig(1, 1, 1), DualStepConfig(8, 4, 8)])
    def test_how_programs_are_cut_does_not_matter(self, config):
        case = CASES["many columns"]
        data = data_of(case, 0)
        wanted = type(self).step(case)(data)
        for ours, other in zip(wanted, type(self).step(case, config)(data), strict=True):
            np.testing.assert_array_equal(ours, other)

    def test_zero_stays_whatever_the_fraction_is(self):
        """Elements without gradient in a block that has one, over many steps."""
        case = CASES["rows"]
        data = data_of(case, 0)
        mask = np.random.default_rng(0).random(case.shape) < 0.5
        codes = jnp.where(mask, (data.state.mu & 0xF0) | 7, data.state.mu)
        data = data._replace(g=data.g * ~mask, state=data.state._replace(mu=codes))
        for t in range(1, 30):
            phase = leaf_phases(["w"], jnp.int32(t))[0]
            found = type(self).step(case)(data._replace(phase=phase))
            assert not np.any(np.asarray(found.out)[mask])
            assert np.all((np.asarray(found.codes) & 15)[mask] == 7)
            data = data._replace(state=Moments(*found[1:4]))

    @pytest.mark.parametrize("name", SPLIT)
    def test_splits_bit_for_bit(self, name):
        """Where float32 has no part in it: 1 - 2^-7 of a weight of 16 bits is exact.

        So is 1 + 2^-7 of it, which takes the largest to infinity.
        """
        case = CASES[name]
        data = any_weights(case, data_of(case, 0))
        # No subnormals, which XLA may flush on a CPU in one program and not in another.
        weight = jnp.where(jnp.abs(data.param) < 2.0**-125, 1, data.param)
        for learning_rate in (2.0**-7, -(2.0**-7)):
            data = data._replace(param=weight, learning_rate=learning_rate, weight_decay=1.0)
            wanted = plain_step(case)(data)
            found = type(self).step(case)(data)
            same_weights((found.out, found.correction), (wanted.out, wanted.correction))

    @pytest.mark.parametrize("name", SPLIT)
    def test_a_change_of_zero_leaves_split_weights(self, name):
        """Bit for bit, while the moments go on; but 0 times an infinite weight is NaN."""
        case = CASES[name]
        data = any_weights(case, data_of(case, 0))._replace(g=data_of(case, 0).g, learning_rate=0.0)
        found = type(self).step(case)(data)
        finite = jnp.where(jnp.isinf(data.param), jnp.nan, data.param)
        same_weights((found.out, found.correction), (finite, data.correction))
        assert np.any(found.scale)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_finite_gradients_make_split_weights_nan(self, value):
        case = CASES["split, 24 bits"]
        data = data_of(case, 0)
        found = self.check(case, data._replace(g=data.g.at[2, 0, 17, 0].set(value)))
        nan = np.isnan(np.asarray(found.out, np.float32))
        assert nan.all(axis=(1, 2, 3)).tolist() == [False, False, True, False, False]
        assert not nan[[0, 1, 3, 4]].any() and not np.any(np.asarray(found.correction)[nan])

    def test_is_the_step_of_fused_gefen_with_split_weights(self):
        """The whole optimizer's step, with the words that it rounds by; from its own states."""
        case = CASES["split, 24 bits"]
        shape = (case.layout.blocks, case.layout.period)
        rng = np.random.default_rng(0)
        params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        plan = gx.plan_by_shape(params).with_kind("w", DualCode((1, case.layout.period)))
        fused = gx.fused_gefen(LEARNING_RATE, eps_root=1e-12, weight_decay=0.1, plan=plan)
        tx = gx.with_split_weights(fused)
        opt_state, (weights, _) = tx.init(params), gx.split_weights(params)
        optimizer_step = jax.jit(tx.step)
        for t in range(1, 4):
            g = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
            old, old_weights = opt_state, weights
            weights, opt_state = optimizer_step({"w": g}, opt_state, weights)
            data = Data(
                g.reshape(case.shape),
                _moments(old, case),
                old_weights["w"].reshape(case.shape),
                decay_at(t),
                leaf_phases(["w"], jnp.int32(t))[0],
                old.correction["w"].reshape(case.shape),
                _phases(["w"], jnp.int32(t))[0],
            )
            wanted = weights["w"].reshape(case.shape), opt_state.correction["w"].reshape(case.shape)
            plain = Result(wanted[0], _moments(opt_state, case), wanted[1])
            check_equal(case, data, plain, type(self).step(case)(data))


def _moments(opt_state: Any, case: Case) -> Moments:
    """Of the leaf "w" of a `fused_gefen` with split weights, in a case's shapes."""
    state = opt_state.inner[0]
    mu, scale, nu = (getattr(state, name)["w"] for name in Moments._fields)
    return Moments(mu.reshape(case.shape), scale.reshape(case.stats), nu.reshape(case.stats))


@pytest.mark.once
class TestTritonInterpreted(StepContract):
    """The Triton dialect's kernel, interpreted."""

    step = staticmethod(_interpreted)


# The arithmetic of split weights, which is exact --------------------------------------------------


def float32s() -> np.ndarray:
    """All upper halves, with lower ones next to what is cut off; random bits; ties of float16."""
    rng = np.random.default_rng(0)
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x7FFF, 0x8000], np.int32)
    halves = (np.arange(1 << 16, dtype=np.int32) << 16)[:, None] | lower
    bits = np.concatenate([halves.ravel(), any_bits(rng, (1 << 16,), np.dtype(np.int32))])
    # Halfway between weights below 2^-14, and so with 24 bits, and, below 2^-17, with 32.
    odd = 2 * rng.integers(0, [[1 << 10], [1 << 18], [1 << 23]], (3, 10_000)) + 1
    ties = (odd * 2.0 ** np.array([[-25], [-33], [-41]])).astype(np.float32)
    return np.concatenate([bits.view(np.float32), ties.ravel(), -ties.ravel()])


_WEIGHTS = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", _WEIGHTS)
@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("stochastic", [False, True])
def test_weights_are_split_and_merged_as_in_the_plain_form(dtype, bits, stochastic):
    theta, dtype = jnp.asarray(float32s()), jnp.dtype(dtype)
    rng = np.random.default_rng(1)
    words = jnp.asarray(rng.integers(0, 1 << 32, theta.shape, np.uint32)) if stochastic else None

    @jax.jit
    def both(theta: Any, words: Any) -> Any:
        wanted = plain_parts(theta, bits, dtype, words)
        weight, low = kernel_split.split(theta, bits, dtype, words)
        found = weight, None if low is None else low.astype(CORRECTIONS[bits])
        return wanted, found, merge(*wanted), kernel_split.merge(*found)

    wanted, found, theta, ours = both(theta, words)
    same_weights(found, wanted)
    _same_bits(ours, theta)
    assert (found[1] is None) == (bits == 16)


def plain_parts(theta: Any, bits: int, dtype: np.dtype, words: Any) -> tuple[Any, Any]:
    """The specification's weight and correction."""
    negative, rounded, weight = plain_split._split(theta, bits, dtype, words)
    return weight, plain_split._correction(negative, rounded, weight, bits)


@pytest.mark.parametrize("dtype", _WEIGHTS)
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_every_weight_is_merged_as_in_the_plain_form(dtype, bits):
    """With the ends of corrections and a few between; what no number is split into is left out."""
    words = np.arange(1 << 16, dtype=np.uint16)
    weight, low = jnp.asarray(words.view(jnp.dtype(dtype))), None
    if bits > 16:
        most = np.iinfo(CORRECTIONS[bits]).max
        low = np.array([-most - 1, -most, -77, -2, -1, 0, 1, 2, 77, most])[:, None]
        weight = jnp.broadcast_to(weight, (low.size, words.size))
        # Below 0 are numbers of the other sign, and beyond infinity there are none.
        low = np.where((words & 0x7FFF) == 0, np.maximum(low, 0), low)
        low = np.where(jnp.isinf(weight), np.minimum(low, 0), low)
        low = jnp.asarray(low, CORRECTIONS[bits])
    _same_bits(jax.jit(kernel_split.merge)(weight, low), jax.jit(merge)(weight, low))


class _Lookup:
    """Of a program of a kernel what `_round_to_level` asks for."""

    def lookup(self, table: Any, index: Any) -> Any:
        return table[index]

    # And what a checker of types asks for.
    load = store = load_of_blocks = store_of_blocks = largest = total = gather = table = lookup
    number = row = item = column = block_row = block_column = items = turns = padded = 0


def test_the_largest_keeps_its_sign():
    """Beyond 1 by the error of a GPU's division, with the fractions that would carry it over."""
    tables = Tables(*_tables(jnp.asarray(_CODEBOOK)).reshape(3, LEVELS))
    x = jnp.array([1 + 2.0**-23, 1.0, -1.0, -1 - 2.0**-22], jnp.float32)
    fraction = jnp.array([0xFFFFFFFF, 0xFFFFFFFF, 0, 0], jnp.uint32)
    assert _round_to_level(tables, x, fraction, _Lookup()).tolist() == [15, 15, 0, 0]


# Lowering ----------------------------------------------------------------------------------------

H200 = AbstractMesh(
    (1,),
    ("x",),
    axis_types=(AxisType.Auto,),
    # From jax 0.11 on, lowering asks which GPU it is for.
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda"),
)


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        (name, gradient)
        for name, case in CASES.items()
        for gradient in ("float32", "bfloat16", "float16")[: 1 if case.bits else 3]
    ],
)
def test_lowers_for_cuda_in_place(name, gradient):
    """One custom call, which writes all state, and the parameter, where it was."""
    case = CASES[name]._replace(gradient=gradient)
    shapes = jax.eval_shape(lambda: data_of(case, 0)._replace(phase=jnp.zeros(2, jnp.uint32)))
    step = kernel_step(case, interpret=False)
    jitted = jax.jit(
        lambda written, rest: step(rest._replace(**written)),
        donate_argnums=0,
    )
    written = {name: getattr(shapes, name) for name in ("state", "param", "correction")}
    with jax.sharding.use_abstract_mesh(H200):
        traced = jitted.trace(written, shapes._replace(**dict.fromkeys(written)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    kernel = "gefen_dual_step" if case.param is None else "gefen_dual_step_fused"
    assert f'name = "{kernel}"' in text
    arrays = len(jax.tree.leaves(written))
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays


# Arguments ---------------------------------------------------------------------------------------


def _call(case: Case, data: Data, layout: DualLayout | None = None) -> Any:
    return jax.eval_shape(lambda: kernel_step(case._replace(layout=layout or case.layout))(data))


def test_wrong_arguments_are_named():
    case = CASES["rows"]
    data = data_of(case, 0)
    with pytest.raises(ValueError, match="`g`, `codes` must have one shape of 1536 elements"):
        _call(case, data, DualLayout(6, 1, 128))
    with pytest.raises(ValueError, match="`scale`, `exponent` must have one shape of 10 elements"):
        _call(case, data, DualLayout(10, 1, 64))
    with pytest.raises(TypeError, match="`exponent` must be uint8, got int32"):
        wrong = data.state._replace(nu=data.state.nu.astype(jnp.int32))
        _call(case, data._replace(state=wrong))
    with pytest.raises(TypeError, match="`g` must be float32 or bfloat16 or float16, got int8"):
        _call(case, data._replace(g=data.g.astype(jnp.int8)))
    weight = jnp.zeros(case.shape, jnp.bfloat16)
    split = case._replace(bits=24)
    with pytest.raises(ValueError, match="`split` needs `param`"):
        _call(split, data)
    with pytest.raises(TypeError, match="`param` of `split` must be bfloat16 or float16, got f"):
        _call(split, data._replace(param=weight.astype(jnp.float32)))
    with pytest.raises(TypeError, match="`correction` must be int8 or int16, got int32"):
        _call(split, data._replace(param=weight, correction=weight.astype(jnp.int32)))
    with pytest.raises(ValueError, match="`param`, `correction` must have one shape of 1280"):
        _call(split, data._replace(param=weight, correction=jnp.zeros(5, jnp.int8)))
    with pytest.raises(ValueError, match="`half` of a layout must be at least 1, got 0"):
        DualLayout(1, 1, 0)
    with pytest.raises(ValueError, match="`axes` of a layout of 96 elements have others"):
        DualLayout(2, 1, 24, axes=((48, 1), (3, 96)))
    with pytest.raises(ValueError, match="`rows` of a config must be a power of two, got 3"):
        DualStepConfig(3, 1, 1)
    with pytest.raises(ValueError, match="`num_warps` must be at most 32, got 64"):
        DualStepConfig(1, 1, 64)


@pytest.mark.parametrize("layout", [DualLayout(1, 1, 4097), DualLayout(2**21, 1, 512)])
def test_too_large_for_the_kernel(layout):
    case = Case(layout)
    shapes = [(case.shape, "float32"), (case.shape, "uint8")]
    shapes += [(case.stats, "float32"), (case.stats, "uint8")]

    def step(g: Any, *state: Any) -> Any:
        return kernel_step(case)(
            Data(g, Moments(*state), None, decay_at(1), jnp.zeros(2, jnp.uint32))
        )

    with pytest.raises(NotImplementedError, match="use the XLA backend for this leaf"):
        jax.eval_shape(step, *(jax.ShapeDtypeStruct(*x) for x in shapes))


@given(st.integers(1, 10**6), st.integers(1, 8), st.integers(1, 512), st.integers(1, 10**5))
def test_configs_cover_their_blocks(blocks, stretches, half, inner):
    """Whole blocks per program; 4 pairs per thread, or fewer in one warp and in many."""
    layout = DualLayout(blocks, stretches, half, inner)
    config = dual_step_config(layout)
    in_all = config.rows * config.columns * (1 << (layout.items - 1).bit_length())
    assert config.num_warps == (32 if in_all > 1024 else max(1, in_all // 128))
    assert config.rows < 2 * layout.blocks and config.columns < 2 * layout.inner


# The package -------------------------------------------------------------------------------------


def test_imports_neither_optax_nor_gefen_jax():
    for path in _FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"optax", "gefen_jax"}


def test_a_jax_without_the_dialect_is_refused_at_the_launch_only(monkeypatch):
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    module = runpy.run_path(str(_FOLDER / "_triton.py"))
    assert not module["is_available"]()
    with pytest.raises(NotImplementedError, match="has no Triton dialect of Pallas"):
        module["compiler_params"](4)
