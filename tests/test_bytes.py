"""Bytes of state per parameter on the shapes of real models: by shape, calibrated, and at worst.

Why these bounds can hold: a leaf of shared blocks takes 1 byte per element and 8 per block, 1 +
8 / 1024 with the blocks aimed at, 1 + 8 / 256 with the smallest runs and 1 + 8 / 64 where a whole
axis is that narrow; a dual code 1 + 5 / 256 but where axes are short, its blocks go by shape alone;
a leaf of at most 4,096 elements and the vectors, under 1 % of these models, take 8 bytes per
element. Every number below is exact arithmetic on shapes: the bounds have no tolerance.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

import gefen_jax as gx
from gefen_jax._blocks import stats_shape
from gefen_jax._candidates import block_by_shape, candidate_blocks
from gefen_jax._constants import NARROW_BLOCK

pytestmark = pytest.mark.once

# Model, parameters; bounds: shared blocks by shape and calibrated, dual codes, any gradient.
MODELS = {
    "gpt2_small": (shapes.gpt2_small, 124_439_808, 1.02, 1.03, 1.05),
    "llama_1b": (shapes.llama_1b, 1_498_482_688, 1.02, 1.02, 1.05),
    "vit_b16": (shapes.vit_b16, 86_567_656, 1.02, 1.03, 1.05),
    "resnet50": (shapes.resnet50, 25_557_032, 1.04, 1.04, 1.05),
}

# Vocabularies are calibrated on a divisor of their rows: a block of the part also divides the
# whole (the test checks it), and no gradient of a gigabyte has to be drawn.
VOCABULARIES = {50_257: 50_257 // 29, 128_256: 128_256 // 48}

# Standard deviation of log|g| over input units and over output units.
UNIT_DEVIATION = 1.0

# Of many shapes, those that hold less of the model than this are not calibrated but get their
# heaviest block.
CALIBRATED_SHARE = 0.02


def coded(leaf: gx.LeafPlan) -> bool:
    return isinstance(leaf.kind, gx.SharedBlocks)


def with_blocks(plan: gx.Plan, block_of: Callable[[tuple[int, ...]], tuple[int, ...]]) -> gx.Plan:
    """The plan with another block at every coded leaf."""
    return dataclasses.replace(
        plan,
        leaves=tuple(
            dataclasses.replace(leaf, kind=gx.SharedBlocks(block_of(leaf.shape)))
            if coded(leaf)
            else leaf
            for leaf in plan.leaves
        ),
    )


def heaviest(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block with the most statistics among all that a leaf can get."""
    blocks = [*candidate_blocks(shape), block_by_shape(shape)]
    return max(blocks, key=lambda block: math.prod(stats_shape(shape, block)))


def report(record_property: Callable[[str, object], None], model: str, plan: gx.Plan) -> None:
    record_property(f"bytes_per_param {model}", round(plan.bytes_per_param, 4))


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_of_the_model(model):
    build, size, *_ = MODELS[model]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(build())) == size


@pytest.mark.parametrize("kind", ["shared_blocks", "dual_code"])
@pytest.mark.parametrize("model", MODELS)
def test_by_shape(model, kind, record_property):
    build, _, shared, dual, _ = MODELS[model]
    plan = gx.plan_by_shape(build(), kind=kind)
    report(record_property, model, plan)
    assert plan.bytes_per_param <= {"shared_blocks": shared, "dual_code": dual}[kind]


@pytest.mark.parametrize("kind", ["shared_blocks", "dual_code", "wide_dual_code"])
@pytest.mark.parametrize("model", MODELS)
def test_state_weighs_what_the_plan_says(model, kind):
    build, size, *_ = MODELS[model]
    params = build()
    plan = gx.plan_by_shape(params, kind=kind)
    state = jax.eval_shape(gx.scale_by_gefen(plan=plan).init, params)
    assert gx.memory_report(state).total_bytes == round(plan.bytes_per_param * size)


def structured_gradient(shape: tuple[int, ...]) -> np.ndarray:
    """A normal sample times a lognormal size per input unit and per output unit."""
    rng = np.random.default_rng(shape)
    g = rng.standard_normal(shape, np.float32)
    for axis in (-2, -1):
        sizes = np.exp(UNIT_DEVIATION * rng.standard_normal(shape[axis], np.float32))
        g *= np.expand_dims(sizes, tuple(range(axis + 1, 0)))
    return g


@pytest.mark.parametrize("model", MODELS)
def test_calibrated_on_structured_gradients(model, record_property):
    build, size, bound, *_ = MODELS[model]
    by_shape = gx.plan_by_shape(build(), kind="shared_blocks")
    held = Counter()
    for leaf in filter(coded, by_shape.leaves):
        held[leaf.shape] += leaf.size
    distinct = {str(shape): shape for shape in held if held[shape] >= CALIBRATED_SHARE * size}
    grads = {
        name: structured_gradient(tuple(VOCABULARIES.get(d, d) for d in shape))
        for name, shape in distinct.items()
    }
    calibrated = gx.calibrate(grads, grads)

    def block_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        if str(shape) not in distinct:
            return heaviest(shape)
        block = calibrated[str(shape)].kind.block
        assert block in candidate_blocks(shape)
        return block

    plan = with_blocks(by_shape, block_of)
    report(record_property, model, plan)
    assert plan.bytes_per_param <= bound


@pytest.mark.parametrize("model", MODELS)
def test_whatever_the_gradient(model, record_property):
    # Any gradient gives a leaf one of its candidates or its block by shape (tested below): the
    # heaviest of them at every leaf bounds them all.
    build, *_, bound = MODELS[model]

    plan = with_blocks(gx.plan_by_shape(build(), kind="shared_blocks"), heaviest)
    report(record_property, model, plan)
    assert plan.bytes_per_param <= bound


# Divided by some run, and by none; in the first, blocks along every axis and over several.
SHAPES = ((64, 128), (5, 7, 256), (3, 3, 32, 48), (1, 5000))
UNDIVIDED = ((4099,), (4099, 2), (67, 4099))


def _periodic(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Runs of a length that divides nothing, their sizes seven decades apart."""
    run = int(rng.choice([2, 7, 13, 255, 257, 1031]))
    sizes = 10.0 ** rng.uniform(-6, 1, math.prod(shape) // run + 1)
    return np.repeat(sizes, run)[: math.prod(shape)].reshape(shape)


def _one_hot(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    g = np.zeros(math.prod(shape))
    g[rng.integers(g.size)] = rng.normal()
    return g.reshape(shape)


def _every_other(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Large and tiny in turn: no run of one axis explains anything."""
    return np.where(np.indices(shape).sum(0) % 2, 1e-6, 1.0) * rng.standard_normal(shape)


GRADIENTS = {
    "zero": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, rng.normal()),
    "one-hot": _one_hot,
    "heavy-tailed": lambda rng, shape: rng.standard_cauchy(shape),
    "periodic": _periodic,
    "every other": _every_other,
    "subnormal": lambda rng, shape: np.float32(1e-42) * rng.standard_normal(shape),
    "near overflow": lambda rng, shape: 1e38 * rng.uniform(-1, 1, shape),
}


def check_block(shape: tuple[int, ...], gradient: str, seed: int) -> None:
    g = {"w": jnp.asarray(GRADIENTS[gradient](np.random.default_rng(seed), shape), jnp.float32)}
    leaf = gx.calibrate(g, g)["w"]
    assert leaf.kind.block in (*candidate_blocks(shape), block_by_shape(shape))
    assert leaf.nbytes <= leaf.size * (1 + 8 / NARROW_BLOCK)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from(SHAPES),
    gradient=st.sampled_from(sorted(GRADIENTS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_block_is_a_candidate(shape, gradient, seed):
    check_block(shape, gradient, seed)


@pytest.mark.parametrize("gradient", ["zero", "one-hot", "constant"])
@pytest.mark.parametrize("shape", UNDIVIDED)
def test_every_block_is_a_candidate_where_no_run_divides(shape, gradient):
    check_block(shape, gradient, 0)
