"""The kernel of the step of shared blocks against the plain step, interpreted; and it lowers.

``u = 2**-24`` is the relative rounding error of float32. Either program computes an m of

    parts = |c s| + (1 - b1) |g|

within 4 u parts: a product, a difference, its product and a sum, of numbers not above that. So a
block's scale is off by at most 4 u of its largest parts P, and what is coded, m / scale, by at most
d = (8 P / scale + 4) u, with two roundings of the quotient and of the inverse. Codes are nearest to
an x within d of the true one (`_reference`, in float64): where two programs differ, a border lies
within d of x. How many such x there are is counted, not guessed.

Squares are added up in an order of their own. A sum of n of them, none negative, is off by about
u sqrt(n / 3) as roundings go up and down alike; five such deviations, of either program, are less
than 6 u sqrt(n). With the mean's and the moving average's own: nu is within (16 + 6 sqrt(n)) u.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    BY_SEVERAL,
    CORRECTIONS,
    H200,
    LEARNING_RATE,
    TOLERANCE,
    WEIGHT_DECAY,
    Data,
    Result,
    any_bits,
    any_weights,
    check_weight,
    decay_at,
    same_weights,
)

import pallas_kernels
from gefen_jax._builtin import builtin_codebook
from gefen_jax._dither import dither, leaf_phases, positions
from gefen_jax._encoder import encode, exact_thresholds, make_encoder
from gefen_jax._split import advance as advance_weight
from gefen_jax._split import merge
from gefen_jax._step import advance, direction
from gefen_jax._types import Moments, Step
from pallas_kernels import (
    SharedLayout,
    SharedStepConfig,
    SharedStepResult,
    SharedTables,
    SplitWeight,
    StepScalars,
    shared_step,
    shared_step_config,
)
from pallas_kernels._shared_step import Encoder
from pallas_kernels._shared_step import encode as kernel_encode

U = 2.0**-24
_CODEBOOK = np.asarray(builtin_codebook(), np.float32)
_ZERO = 128  # the code of 0

pytestmark = [
    pytest.mark.skipif(
        not pallas_kernels.is_available(),
        reason=f"jax {jax.__version__} has no Triton dialect of Pallas",
    ),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]


class Case(NamedTuple):
    """A leaf ``[blocks, period, inner]`` and a form of the step."""

    layout: SharedLayout
    gradient: str = "float32"
    param: str | None = None  # the fused form's
    nesterov: bool = False
    bits: int = 0  # 16, 24 or 32 of a split weight
    stochastic: bool = True  # its rounding
    exact_lookup: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.blocks, self.layout.period, self.layout.inner

    @property
    def stats(self) -> tuple[int, ...]:
        return self.layout.blocks, 1, self.layout.inner

    @property
    def nu(self) -> tuple[int, ...]:
        return self.shape if self.layout.nu_per_element else self.stats


CASES = {
    "rows": Case(SharedLayout(5, 96)),
    "rows, fused": Case(SharedLayout(5, 96), param="float32"),
    "single elements": Case(SharedLayout(70, 1), "bfloat16", "float32"),
    "many short blocks": Case(SharedLayout(700, 9), "bfloat16", "float32"),
    "a prime": Case(SharedLayout(3, 257), "float16", nesterov=True),
    "padded": Case(SharedLayout(2, 1000), "bfloat16", param="bfloat16"),
    "4096 at once": Case(SharedLayout(1, 4096)),
    "16384 in turns": Case(SharedLayout(1, 16384), param="float32"),
    "turns, padded": Case(SharedLayout(2, 4999), "float16", nesterov=True),
    "columns": Case(SharedLayout(1, 96, 5), param="bfloat16"),
    "many columns": Case(SharedLayout(3, 6, 67), param="float16", nesterov=True),
    "columns in turns": Case(SharedLayout(1, 1100, 3), "bfloat16"),
    "searched": Case(SharedLayout(3, 257), exact_lookup=False),
    "a nu per element": Case(SharedLayout(4, 60, nu_per_element=True), param="float32"),
    "split, 24 bits": Case(SharedLayout(5, 96), "bfloat16", "bfloat16", bits=24),
    "split, 16 bits": Case(SharedLayout(1, 96, 5), "bfloat16", "bfloat16", bits=16),
    "split, float16, 32 bits, nearest": Case(
        SharedLayout(2, 768), param="float16", bits=32, stochastic=False
    ),
}
SPLIT = [name for name, case in CASES.items() if case.bits]


def data_of(case: Case, seed: int, t: int = 3, decades: float = 2.0) -> Data:
    """Any state, and gradients of its size times a few decades; some elements have none."""
    rng = np.random.default_rng(seed)
    root = 10 ** rng.uniform(-4, 0, case.stats)
    size = root * 10 ** rng.uniform(-decades, decades / 4, case.shape)
    g = rng.normal(size=case.shape) * size * (rng.random(case.shape) < 0.9)
    state = Moments(
        jnp.asarray(rng.integers(0, 256, case.shape), jnp.uint8),
        jnp.asarray(root * rng.uniform(0, 3, case.stats), jnp.float32),
        jnp.asarray(root**2 * rng.uniform(0.1, 3, case.nu), jnp.float32),
    )
    param = None
    if case.param is not None:
        param = jnp.asarray(rng.normal(size=case.shape), case.param)
    (weight_phase,) = leaf_phases([f"weights {seed}"], jnp.int32(t))
    dtype = CORRECTIONS[case.bits]
    correction = None if dtype is None else jnp.asarray(any_bits(rng, case.shape, dtype))
    g = jnp.asarray(g, case.gradient)
    return Data(g, state, param, decay_at(t), None, correction, weight_phase)


@functools.cache
def plain_step(case: Case) -> Any:
    @jax.jit
    def step(data: Data) -> Result:
        encoder, block = make_encoder(jnp.asarray(_CODEBOOK)), (1, case.layout.period, 1)
        arguments = Step(data.decay, encoder, None, None, case.nesterov, case.exact_lookup, None)
        new = advance(data.g, data.state, block, arguments)
        update = direction(data.g, new, block, arguments)
        if data.param is None:
            return Result(update.astype(data.g.dtype), new)
        theta = merge(data.param, data.correction) if case.bits else data.param.astype(jnp.float32)
        change = -data.learning_rate * (update + data.weight_decay * theta)
        if not case.bits:
            return Result((theta + change).astype(data.param.dtype), new)
        words = dither(data.weight_phase, positions(case.shape))[0] if case.stochastic else None
        delta, low = advance_weight(data.param, data.correction, change, case.bits, words)
        return Result((merge(data.param, None) + delta).astype(data.param.dtype), new, low)

    return step


def kernel_step(case: Case, config: SharedStepConfig | None = None, interpret: Any = True) -> Any:
    def step(data: Data, **others: Any) -> SharedStepResult:
        encoder = make_encoder(jnp.asarray(_CODEBOOK))
        weight_phase = data.weight_phase if case.stochastic else None
        return shared_step(
            data.g,
            *data.state,
            layout=case.layout,
            scalars=StepScalars(*data.decay),
            tables=SharedTables(*(encoder if case.exact_lookup else encoder[:1])),
            nesterov=case.nesterov,
            param=data.param,
            learning_rate=data.learning_rate,
            weight_decay=data.weight_decay,
            split=SplitWeight(data.correction, weight_phase) if case.bits else None,
            config=config,
            interpret=interpret,
            **others,
        )

    return step


@functools.cache
def _interpreted(case: Case, config: SharedStepConfig | None = None) -> Any:
    # Least effort: these programs run once, and compiling them is what the tests take.
    return jax.jit(
        kernel_step(case, config), compiler_options={"xla_backend_optimization_level": 0}
    )


class _Reference(NamedTuple):
    """In float64 what is coded, and per block how far off it may be in float32.

    So far, relative to themselves, may scales be.
    """

    x: np.ndarray
    bound: np.ndarray


def _reference(data: Data) -> _Reference:
    g = np.asarray(data.g, np.float64)
    m = _CODEBOOK[np.asarray(data.state.mu)].astype(np.float64) * np.asarray(data.state.scale)
    part = float(data.decay.one_minus_b1)
    parts = np.max(np.abs(m) + part * np.abs(g), axis=1, keepdims=True)
    m = m + part * (g - m)
    scale = np.max(np.abs(m), axis=1, keepdims=True)
    divisor = np.maximum(scale, 1e-300)
    return _Reference(m / divisor, (8 * parts / divisor + 4) * U)


_BORDERS = exact_thresholds(_CODEBOOK).astype(np.float64)


def check_equal(case: Case, data: Data, plain: Result, kernel: SharedStepResult) -> None:
    """The same but for codes beside a border, next to each other, and rounding."""
    wanted, found = np.asarray(plain.state.mu).astype(int), np.asarray(kernel.codes).astype(int)
    nu, ours = np.asarray(plain.state.nu), np.asarray(kernel.nu)
    finite = np.isfinite(nu)
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    items = 1 if case.layout.nu_per_element else case.layout.period
    with np.errstate(invalid="ignore"):
        near = np.abs(ours - nu) <= (16 + 6 * math.sqrt(items)) * U * nu + np.finfo(np.float32).tiny
    assert np.all(near | ~finite)

    # What NaN is coded as, is nobody's business: the block's nu is none either.
    blocks = finite.all(axis=1, keepdims=True)
    finite = np.broadcast_to(blocks, case.shape)
    true = _reference(data)
    scale, ours = np.asarray(plain.state.scale), np.asarray(kernel.scale)
    with np.errstate(invalid="ignore"):
        near = np.abs(ours - scale) <= 2 * true.bound * scale + np.finfo(np.float32).tiny
    assert np.all(near | (ours == scale) | ~blocks)
    same = (wanted == found) | ~finite
    lower = np.minimum(wanted, found)[~same]
    assert np.all(np.abs(wanted - found)[~same] == 1)
    bound = np.broadcast_to(true.bound, case.shape)
    assert np.all(np.abs(true.x[~same] - _BORDERS[lower]) <= bound[~same])
    # One of some dozens at most: a border lies within the bound of so few.
    places = np.searchsorted(_BORDERS, true.x)
    beside = np.minimum(
        *(np.abs(true.x - _BORDERS[np.clip(i, 0, 254)]) for i in (places - 1, places))
    )
    assert np.count_nonzero((beside <= bound) & finite) <= 3 + 0.01 * found.size

    assert str(kernel.out.dtype) == (case.param or case.gradient)
    same &= finite
    if case.bits:
        check_weight(case, data, plain, kernel, same)
        return
    dtype = str(kernel.out.dtype)
    # An update is a code times its block's scale and the inverse root of its nu.
    rounding = 0 if dtype == "float32" else TOLERANCE[dtype]
    tolerance = 2 * true.bound + (24 + 3 * math.sqrt(items)) * U + rounding
    tolerance = np.broadcast_to(tolerance, case.shape)
    out, ours = (np.asarray(x, np.float32) for x in (plain.out, kernel.out))
    with np.errstate(invalid="ignore"):
        terms = np.abs(out) + (np.nanmax(np.abs(out[same]), initial=0) if case.nesterov else 0)
        if data.param is not None:
            terms = terms + np.abs(np.asarray(data.param, np.float32))
        near = np.abs(ours - out) <= tolerance * terms + np.finfo(np.float32).tiny
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(out))
    assert np.all(near | (ours == out) | np.isnan(out) | ~same)


class SharedStepContract:
    """What every implementation of the step fulfils; a subclass names one."""

    step: Any

    def check(self, case: Case, data: Data) -> SharedStepResult:
        found = type(self).step(case)(data)
        check_equal(case, data, plain_step(case)(data), found)
        return found

    @pytest.mark.parametrize("name", CASES)
    def test_equals_the_plain_step(self, name):
        """At the first step, where corrections are small, and at a later one."""
        for seed, t in ((0, 1), (1, 1000)):
            self.check(CASES[name], data_of(CASES[name], seed, t))

    @settings(BY_SEVERAL, max_examples=20)
    @given(seed=st.integers(0, 2**31), t=st.integers(1, 10**6), decades=st.floats(0, 6))
    def test_any_numbers(self, seed, t, decades):
        case = CASES["many columns"]
        self.check(case, data_of(case, seed, t, decades))

    # Every shape is compiled: few of them, and no search for the smallest that fails.
    @settings(BY_SEVERAL, max_examples=3)
    @given(
        blocks=st.integers(1, 9),
        period=st.integers(1, 700),
        inner=st.sampled_from([1, 1, 2, 17]),
        dtypes=st.sampled_from(
            [
                ("float16", None),
                ("bfloat16", "float32"),
                ("float32", "float32", True),
                ("float16", "float16", False, 24),
            ]
        ),
    )
    def test_any_shape(self, blocks, period, inner, dtypes):
        case = Case(SharedLayout(blocks, period, inner), *dtypes)
        self.check(case, data_of(case, 0))

    @pytest.mark.parametrize("name", ["padded", "turns, padded"])
    def test_padding_takes_no_part(self, name):
        """Its code of 0 would stand for the largest m of all."""
        case = CASES[name]
        data = data_of(case, 0)
        state = data.state._replace(mu=jnp.full(case.shape, _ZERO, jnp.uint8))
        found = self.check(case, data._replace(g=data.g * 0, state=state))
        assert not np.any(found.scale)

    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_no_gradient_ever(self, eps):
        """A state of zeros stays, and so does the parameter but for its weight decay."""
        case = CASES["rows, fused"]
        data = data_of(case, 0)
        zeros = jax.tree.map(jnp.zeros_like, data.state)
        decay = data.decay._replace(eps=jnp.float32(eps), eps_root=jnp.float32(0))
        found = self.check(case, data._replace(g=data.g * 0, state=zeros, decay=decay))
        assert not np.any(found.scale) and not np.any(found.nu)
        decayed = np.asarray(data.param) * (1 - LEARNING_RATE * WEIGHT_DECAY)
        np.testing.assert_allclose(found.out, decayed, rtol=4 * U)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_gradients_make_their_blocks_nan(self, value):
        """And so for ever: the next gradient is one like all others."""
        case = CASES["rows"]
        data = data_of(case, 0)
        spoiled = data._replace(g=data.g.at[2, 17, 0].set(value))
        found = type(self).step(case)(spoiled)
        after = type(self).step(case)(data._replace(state=Moments(*found[1:4])))
        for out in (plain_step(case)(spoiled).out, found.out, after.out):
            nan = np.isnan(out).all(axis=(1, 2))
            assert nan.tolist() == [False, False, True, False, False]
            assert np.isfinite(np.asarray(out)[~nan]).all()

    @pytest.mark.parametrize("factor", [1e-16, 1e-6, 1e6, 1e15, 1e25])
    def test_huge_and_small_gradients(self, factor):
        """From a state of zeros: squares overflow and make their blocks NaN."""
        case = CASES["rows"]
        data = data_of(case, 0, t=1)
        zeros = jax.tree.map(jnp.zeros_like, data.state)
        found = self.check(case, data._replace(g=data.g * jnp.float32(factor), state=zeros))
        assert np.isfinite(found.out).all() == (factor < 1e20)

    def test_a_correction_that_overflows(self):
        """Does not freeze its block either: nu is finite, and 1,000 of it are not."""
        case = CASES["rows"]
        data = data_of(case, 0, t=1)
        nu = data.state.nu.at[2].set(1e37)
        found = self.check(case, data._replace(state=data.state._replace(nu=nu)))
        assert np.isnan(found.out).all(axis=(1, 2)).tolist() == [False, False, True, False, False]

    def test_gradient_factor(self):
        """A power of two, so that nothing rounds otherwise."""
        case = CASES["rows"]
        data = data_of(case, 0)
        found = type(self).step(case)(data, gradient_factor=0.25)
        scaled = data._replace(g=data.g * 0.25)
        check_equal(case, scaled, plain_step(case)(scaled), found)

    @pytest.mark.parametrize(
        ("name", "rows", "items"), [("columns", 1, 64), ("many columns", 8, 8)]
    )
    def test_how_programs_are_cut_does_not_matter(self, name, rows, items):
        """In turns or at once, but that sums are taken in another order."""
        config, case = SharedStepConfig(rows, 2, 1, items), CASES[name]
        data = data_of(case, 0)
        found = type(self).step(case, config)(data)
        check_equal(case, data, plain_step(case)(data), found)
        np.testing.assert_array_equal(found.codes, type(self).step(case)(data).codes)

    def test_a_part_with_gaps(self):
        """Of rows of four blocks the middle two: the fractions of their places in the whole."""
        case = Case(SharedLayout(12, 48), "bfloat16", "bfloat16", bits=24)
        data, at = data_of(case, 0), np.arange(12).reshape(3, 4)[:, 1:3].reshape(-1)
        axes = ((2 * 48, 1), (3, 4 * 48))
        part = case._replace(layout=SharedLayout(6, 48, axes=axes))
        leaves = ("g", "state", "param", "correction")
        cut = {name: jax.tree.map(lambda x: x[at], getattr(data, name)) for name in leaves}
        found = type(self).step(part)(data._replace(**cut), offset=48)
        wanted = type(self).step(case)(data)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs[at])

    @pytest.mark.parametrize("name", SPLIT)
    def test_splits_bit_for_bit(self, name):
        """Where float32 has no part in it: see tests/test_kernels.py."""
        case = CASES[name]
        data = any_weights(case, data_of(case, 0))
        weight = jnp.where(jnp.abs(data.param) < 2.0**-125, 1, data.param)
        data = data._replace(param=weight, learning_rate=2.0**-7, weight_decay=1.0)
        wanted, found = plain_step(case)(data), type(self).step(case)(data)
        same_weights((found.out, found.correction), (wanted.out, wanted.correction))

    @pytest.mark.parametrize("name", SPLIT)
    def test_a_change_of_zero_leaves_split_weights(self, name):
        """Bit for bit, while the moments go on; but 0 times an infinite weight is NaN."""
        case = CASES[name]
        data = any_weights(case, data_of(case, 0))
        data = data._replace(g=data_of(case, 0).g, learning_rate=0.0)
        found = type(self).step(case)(data)
        finite = jnp.where(jnp.isinf(data.param), jnp.nan, data.param)
        same_weights((found.out, found.correction), (finite, data.correction))
        assert np.any(found.scale)


@pytest.mark.once
class TestTritonInterpreted(SharedStepContract):
    """The Triton dialect's kernel, interpreted."""

    step = staticmethod(_interpreted)


# Nearest codes, which are exact -------------------------------------------------------------------


class _Gather:
    """Of a program of a kernel what `encode` asks for."""

    def gather(self, table: Any, index: Any) -> Any:
        return table[index]

    # And what a checker of types asks for.
    load = store = load_of_blocks = store_of_blocks = largest = total = table = lookup = gather
    number = row = item = column = block_row = block_column = items = turns = padded = 0


@pytest.mark.parametrize("exact_lookup", [True, False])
def test_every_border_is_where_it_is(exact_lookup):
    """Codes of the float32s around every border, and of what a division may give beyond 1."""
    encoder = make_encoder(jnp.asarray(_CODEBOOK))
    border = np.float32(_BORDERS)
    x = [border, np.nextafter(border, np.float32(2)), np.nextafter(border, np.float32(-2))]
    x = jnp.asarray(np.concatenate([*x, _CODEBOOK, np.float32([-0.0])]))
    tables = Encoder(*(encoder if exact_lookup else encoder[:1]))
    wanted = encode(encoder, x, exact_lookup=exact_lookup)
    np.testing.assert_array_equal(kernel_encode(x, tables, _Gather()), wanted)
    beyond = jnp.array([1 + 2.0**-23, 1.5, -1 - 2.0**-22], jnp.float32)
    assert kernel_encode(beyond, tables, _Gather()).tolist() == [255, 255, 0]
    nan = kernel_encode(jnp.array([jnp.nan]), tables, _Gather())
    assert 0 <= int(nan[0]) <= 255


# Lowering ----------------------------------------------------------------------------------------


def lowered(step: Any, case: Case) -> tuple[str, int]:
    """For CUDA, with donated arguments; and how many arrays are written."""
    shapes = jax.eval_shape(lambda: data_of(case, 0))
    written = {name: getattr(shapes, name) for name in ("state", "param", "correction")}
    jitted = jax.jit(
        lambda written, rest: step(rest._replace(**written)),
        donate_argnums=0,
    )
    with jax.sharding.use_abstract_mesh(H200):
        traced = jitted.trace(written, shapes._replace(**dict.fromkeys(written)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, len(jax.tree.leaves(written))


@pytest.mark.parametrize("gradient", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["rows", "rows, fused", "16384 in turns", "searched", "split, 24 bits"]
)
def test_lowers_for_cuda_in_place(name, gradient):
    """One custom call, which writes all state, and the parameter, where it was."""
    case = CASES[name]._replace(gradient=gradient)
    text, arrays = lowered(kernel_step(case, interpret=False), case)
    assert text.count("__gpu$xla.gpu.triton") == 1
    kernel = "gefen_shared_step" if case.param is None else "gefen_shared_step_fused"
    assert f'name = "{kernel}"' in text
    assert text.count("#stablehlo.output_operand_alias<") == arrays
    assert text.count("tf.aliasing_output") == arrays


# Arguments ---------------------------------------------------------------------------------------


def _call(case: Case, data: Data, layout: SharedLayout | None = None, **others: Any) -> Any:
    case = case._replace(layout=layout or case.layout)
    return jax.eval_shape(lambda: kernel_step(case)(data, **others))


def test_wrong_arguments_are_named():
    case = CASES["rows"]
    data = data_of(case, 0)
    with pytest.raises(ValueError, match="`g`, `codes` must have one shape of 576 elements"):
        _call(case, data, SharedLayout(6, 96))
    with pytest.raises(ValueError, match="`scale` must have one shape of 10 elements"):
        _call(case, data, SharedLayout(10, 48))
    with pytest.raises(ValueError, match="`nu` must have one shape of 480 elements"):
        _call(case, data, SharedLayout(5, 96, nu_per_element=True))
    with pytest.raises(TypeError, match="`nu` must be float32, got int32"):
        wrong = data.state._replace(nu=data.state.nu.astype(jnp.int32))
        _call(case, data._replace(state=wrong))
    with pytest.raises(TypeError, match="`g` must be float32 or bfloat16 or float16, got int8"):
        _call(case, data._replace(g=data.g.astype(jnp.int8)))
    with pytest.raises(ValueError, match="`split` needs `param`"):
        _call(case._replace(bits=24), data)
    with pytest.raises(ValueError, match="`period` of a layout must be at least 1, got 0"):
        SharedLayout(1, 0)
    with pytest.raises(ValueError, match="`items` of a config must be a power of two, got 3"):
        SharedStepConfig(1, 1, 1, 3)
    with pytest.raises(ValueError, match="must have both or neither of count_below, next_thresh"):
        _ = SharedTables(jnp.asarray(_CODEBOOK), jnp.zeros(8192, jnp.uint8)).lookup


def test_too_large_for_the_kernel():
    case = Case(SharedLayout(2**21, 1024))
    shapes = [(case.shape, "float32"), (case.shape, "uint8")] + 2 * [(case.stats, "float32")]

    def step(g: Any, *state: Any) -> Any:
        return kernel_step(case)(Data(g, Moments(*state), None, decay_at(1), None))

    with pytest.raises(NotImplementedError, match="leaves of at most .* use the XLA backend for"):
        jax.eval_shape(step, *(jax.ShapeDtypeStruct(*x) for x in shapes))


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**5))
def test_configs_cover_their_blocks(blocks, period, inner):
    """4 elements per thread, or fewer in one warp; whole blocks, or one in turns."""
    layout = SharedLayout(blocks, period, inner)
    config = shared_step_config(layout)
    per_thread = config.rows * config.columns * config.items / (32 * config.num_warps)
    assert per_thread == 4 or (config.num_warps == 1 and per_thread < 4)
    assert config.rows < 2 * layout.blocks and config.columns < 2 * layout.inner
    assert config.items >= period or (config.rows == 1 and period > (4096 if inner == 1 else 1024))
