"""The dual code in runs: the same in whatever form, no movement without gradient, close to AdamW.

``u = 2**-24`` is the relative rounding error of float32. That two programs may differ in a code
where a fraction decides within rounding, and how seldom, is derived in `test_dual`. Comparisons
start every step from one state, so that such a code has no sequel.
"""

import functools
import itertools
import math
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_dual import (
    BUILTIN,
    FLOAT_MIN,
    LAYOUTS,
    LEAVES,
    Layout,
    U,
    blocks_of,
    for_both,
    gradients,
    halves_of,
    joined,
    mean_of_pairs,
    moments_of,
    plan_of,
    zeros_of,
)

import gefen_jax as gx
from gefen_jax._blocks import flat_view
from gefen_jax._chunks import Chunk, map_pieces
from gefen_jax._dither import leaf_phases
from gefen_jax._dual_step import advance_dual
from gefen_jax._levels import make_levels
from gefen_jax._packing import OWN, SHARED
from gefen_jax._paired_pieces import PairedPiece, Pairs
from gefen_jax._pairs import stretches
from gefen_jax._transform import decay_at
from gefen_jax._types import Moments, Step

pytestmark = pytest.mark.once

# One result, in whatever form ---------------------------------------------------------------------


def _assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def _assert_same_but_for_a_group(
    ours: Moments, theirs: Moments, block: tuple[int, ...], layout: Layout = LAYOUTS["shared"]
) -> None:
    """One step of two programs: equal bits, scales to an ulp or two; one group may have a flip.

    Of a scale of 24 bits, an ulp is 2^-15 at most.
    """
    rtol = max(4 * U, layout.scale_error[1])
    ours, theirs = (Moments(*(np.asarray(x) for x in moments)) for moments in (ours, theirs))
    differ = 0
    for i, at in blocks_of(ours.mu.shape, block):
        a, b = (layout.read(moments, i, at) for moments in (ours, theirs))
        same = np.array_equal(a.k, b.k) and np.array_equal(a.h, b.h) and a.exponent == b.exponent
        differ += not (same and np.isclose(a.scale, b.scale, rtol=rtol, atol=0))
    assert differ <= 1


@functools.partial(jax.jit, static_argnames=("block", "chunk", "packing"))
def _advance(g, state, count, block, chunk, packing=SHARED):
    step = Step(
        decay=decay_at(0.9, 0.999, 1e-8, 0.0, count),
        encoder=None,  # pyright: ignore[reportArgumentType] (that of codes of 8 bits)
        levels=make_levels(jnp.asarray(BUILTIN)),
        phase=leaf_phases(["w"], count)[0],
        nesterov=False,
        exact_lookup=True,
        backend=None,
    )
    return advance_dual(g, state, block, step, packing=packing, chunk=chunk and Chunk(chunk))


# Shape, block, elements of a piece. Rows of blocks with a last piece that reaches back (5 of 22, 2
# of 5 and of 7, and 4 of 10, with an inner axis); columns of an inner axis that do (64 of 67); one
# block at a time. Pairs lie along a run, along the last axis of a box, and along one before it.
_PIECES = {
    "rows": ((11, 32), (1, 16), 80),
    "heads": ((5, 4, 16), (1, 4, 16), 150),
    "odd heads": ((7, 4, 9), (1, 4, 9), 80),
    "rows of an inner axis": ((5, 4, 7), (1, 2, 1), 60),
    "boxes of an inner axis": ((6, 4, 7), (1, 4, 1), 120),
    "columns": ((32, 67), (8, 1), 300),
    "columns of boxes": ((4, 6, 67), (2, 6, 1), 1),
    "single blocks": ((3, 2, 4, 9), (1, 2, 4, 9), 1),
}


# A wide code's pairs need runs of four.
_TOO_SHORT = [("rows of an inner axis", "wide")]
_IN_PIECES = [(n, kind) for n in _PIECES for kind in LAYOUTS if (n, kind) not in _TOO_SHORT]


@pytest.mark.parametrize(("name", "kind"), _IN_PIECES)
def test_pieces_give_the_same_state(name, kind):
    shape, block, chunk = _PIECES[name]
    leaf, layout = {name: (shape, block)}, LAYOUTS[kind]
    packing = {"shared": SHARED, "wide": OWN}[kind]
    state = packing.init(shape, block)
    for t in range(1, 6):
        g = jnp.asarray(gradients(leaf, t)[name])
        both = (_advance(g, state, jnp.int32(t), block, c, packing) for c in (None, chunk))
        whole, pieces = both
        _assert_same_but_for_a_group(pieces, whole, block, layout)
        state = whole


def _first_block(leaf: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    return leaf[tuple(slice(0, n) for n in block)]


@pytest.mark.parametrize("narrow_in_place", [True, False])
@pytest.mark.parametrize("name", ["rows", "heads", "rows of an inner axis", "columns"])
def test_pieces_that_overlap_write_nothing_twice(name, narrow_in_place):
    """Of any dtype. Small integers: every sum is exact in all of them."""
    shape, block, size = _PIECES[name]
    constant = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape) % 7
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8)
    arrays = {jnp.dtype(d).name: jnp.full(shape, 3 + i, d) for i, d in enumerate(dtypes)}

    def doubled(piece: PairedPiece, g: Pairs, read: Any) -> Any:
        def of_one(x: Pairs) -> jax.Array:
            halves = (2 * a + b for a, b in zip(x.halves, g.halves, strict=True))
            return piece.joined(tuple(half.astype(x.both.dtype) for half in halves))

        return {name: of_one(x) for name, x in read.items()}

    chunk = Chunk(size, narrow_in_place=narrow_in_place)
    view, number = flat_view(shape, block), stretches(block)
    new = map_pieces(doubled, constant, arrays, view, chunk, stretches=number)
    for dtype, x in arrays.items():
        assert new[dtype].dtype == dtype
        np.testing.assert_array_equal(new[dtype], (2 * x + constant).astype(dtype))


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("name", _PIECES)
def test_which_bits_a_gradient_decides(name, in_pieces):
    """In one step from zero, in a block whose scale and exponent another pair decides.

    That pair has one gradient of 64, so the ratio of a moment to the root is sqrt(2) times as large
    as for two equal ones, against 1.09 for two that differ by a fifth, and levels are a sixteenth
    apart. Signs change first moments alone, so low halves. A quarter of both gradients of a pair is
    a sixteenth of nu: four octaves, 64 codes, so 4 in the high half of its first byte and 0 in that
    of its second; what rounds is the same, and so are the first moments by their root.
    """
    shape, block, chunk = _PIECES[name]
    rng = np.random.default_rng(0)
    gradient = (rng.uniform(1, 1.2, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    pairs = np.arange(math.prod(block) // 2).reshape(halves_of(np.zeros(block))[0].shape)
    one, other = (joined(*x, block) for x in ((pairs, -1 - pairs), (-1 - pairs, pairs)))
    _first_block(gradient, block)[one == 0], _first_block(gradient, block)[other == 0] = 64, 0

    def after(element: np.ndarray, factor: float) -> Moments:
        changed = np.copy(gradient)
        _first_block(changed, block)[element] *= np.float32(factor)
        state = gx.DualCode(block).init(shape)
        new = _advance(changed, state, jnp.int32(1), block, chunk if in_pieces else None)
        return Moments(*(np.asarray(x).astype(int) if x.dtype == jnp.uint8 else x for x in new))

    before = after(one == 0, 1.0)
    for pair in {1, pairs.size // 2, pairs.size - 1} - {0}:
        first, second = one == pair, other == pair
        for element in (first, second):
            new = after(element, -1.0)
            _assert_equal((new.scale, new.nu), (before.scale, before.nu))
            at = np.argwhere(new.mu != before.mu)
            np.testing.assert_array_equal(at, np.argwhere(element))
            _assert_equal(new.mu >> 4, before.mu >> 4)
        new = after(first | second, 0.25)
        _assert_equal((new.scale, new.nu), (before.scale, before.nu))
        difference = np.copy(before.mu)
        _first_block(difference, block)[first] -= 4 << 4
        _assert_equal(new.mu, difference)


@pytest.mark.parametrize("name", _PIECES)
def test_swapped_pairs_have_swapped_moments(name):
    """One step with the halves of every block swapped, in state and gradient.

    To the bit: exponents, scales, and codes of nu, which the same fraction rounds. Other fractions
    round the first moments: codes are the swapped ones or a neighbour. (Gradients of bfloat16's
    precision have squares that are floats, so a contracted sum of two is the same either way.)
    """
    shape, block, _ = _PIECES[name]
    leaf, state = {name: (shape, block)}, gx.DualCode(block).init(shape)

    def swapped(x: Any) -> np.ndarray:
        x = np.array(x)
        for _, at in blocks_of(shape, block):
            first, second = halves_of(x[at])
            x[at] = joined(second, first, block)
        return x

    for t in range(1, 6):
        g = np.asarray(jnp.asarray(gradients(leaf, t)[name], jnp.bfloat16).astype(jnp.float32))
        # The low halves are swapped, the high ones are the pair's.
        turned = state._replace(mu=jnp.asarray((swapped(state.mu) & 15) | (state.mu & 0xF0)))
        state, other = (
            _advance(jnp.asarray(x), s, jnp.int32(t), block, None)
            for x, s in ((g, state), (swapped(g), turned))
        )
        _assert_equal((other.scale, other.nu), (state.scale, state.nu))
        _assert_equal(other.mu >> 4, state.mu >> 4)
        codes, others = (np.asarray(x, int) & 15 for x in (swapped(state.mu), other.mu))
        assert np.all(np.abs(codes - others) <= 1)


# Leaves that get blocks of (1, 256) by their shape, and how they lie: on shards of whole rows, of
# two blocks, of a quarter of a block, so that the two elements of every pair are on two devices.
_SPREADS = {
    "rows": ((16, 512), P("x", None)),
    "blocks": ((8, 1024), P("x", "y")),
    "parts of blocks": ((16, 512), P(None, ("x", "y"))),
}
_ON_A_MESH = list(itertools.product([AxisType.Auto, AxisType.Explicit], _SPREADS))


@pytest.mark.parametrize("axis_type, name", _ON_A_MESH)
def test_a_mesh_sees_what_one_device_sees(axis_type, name):
    """Every step from the state of one device; results lie as the parameters do."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    leaf, sharding = {name: _SPREADS[name]}, NamedSharding(mesh, _SPREADS[name][1])
    params, tx, block = zeros_of(leaf), gx.scale_by_gefen(), (1, 256)
    assert gx.plan_by_shape(params)[name].kind == gx.DualCode(block)
    update, alone = jax.jit(tx.update), tx.init(params)
    state = jax.jit(tx.init)(jax.device_put(params, sharding))
    for t in range(1, 4):
        grads = gradients(leaf, t)
        _, alone = update(grads, alone)
        updates, state = update(jax.device_put(grads, sharding), state)
        assert updates[name].sharding.is_equivalent_to(sharding, 2)
        assert state.mu[name].sharding.is_equivalent_to(sharding, 2)
        _assert_same_but_for_a_group(moments_of(state, name), moments_of(alone, name), block)
        lie = jax.tree.map(lambda x: x.sharding, state)
        state = jax.device_put(jax.device_get(alone), lie)


# One compiled optimizer without eps, for all that follows: rows and columns of four groups each.
_SOME = {"rows": ((4, 64), (1, 64)), "columns": ((64, 4), (64, 1))}
_NO_EPS = gx.scale_by_gefen(eps=0.0, plan=plan_of(_SOME))
_update = jax.jit(_NO_EPS.update)


def _run(sequence: Any, state: Any = None) -> tuple[list[Any], Any]:
    """The updates, as NumPy, and the last state."""
    state, updates = _NO_EPS.init(zeros_of(_SOME)) if state is None else state, []
    for grads in sequence:
        u, state = _update(grads, state)
        updates.append(jax.device_get(u))
    return updates, state


_SEQUENCE = [gradients(_SOME, t) for t in range(1, 21)]


def test_a_run_resumes_bit_for_bit():
    updates, state = _run(_SEQUENCE)
    _, halfway = _run(_SEQUENCE[:10])
    saved = jax.tree.map(np.array, jax.device_get(halfway))
    resumed_updates, resumed = _run(_SEQUENCE[10:], jax.tree.map(jnp.asarray, saved))
    _assert_equal(resumed_updates, updates[10:])
    _assert_equal(resumed, state)


# What must not happen -----------------------------------------------------------------------------


def _largest(t: int) -> float:
    """Adam's largest update at step t, whatever the gradients were (Cauchy and Schwarz).

    1 at first, 1.16 at step 20, and 7.3 at last.
    """
    ratio = 0.9**2 / 0.999
    moments = 0.1 / math.sqrt(0.001) * math.sqrt((1 - ratio**t) / (1 - ratio))
    return moments * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)


def test_without_gradient_no_movement():
    """Elements in groups that move, and whole groups, though eps is 0; then a late first gradient.

    Some of those that stay share a nu with one that moves. Late ones move as far as Adam's, or
    sqrt(2) times as far where they share a nu with an element that had none: the largest of its
    group has code 1 exactly, and nu's level is a sixteenth of a level away from nu at most.
    """
    first = {"rows": np.zeros((4, 64), np.float32), "columns": np.zeros((64, 4), np.float32)}
    late = jax.tree.map(np.copy, first)
    first["rows"][:2, ::24], first["columns"][5, 1:3] = 1e-3, [1.0, -1e4]
    late["rows"][3, 7], late["columns"][[9, 41], 0] = -1e-6, 1e6
    larger = {"rows": math.sqrt(2), "columns": 1.0}
    updates, state = _run([first] * 40)
    for u, name in itertools.product(updates, _SOME):
        np.testing.assert_array_equal(np.sign(u[name]), np.sign(first[name]))
    (u,), _ = _run([late], state)
    adam = 0.1 / (1 - 0.9**41) / math.sqrt(1e-3 / (1 - 0.999**41))
    for name in _SOME:
        moved = late[name] != 0
        ratio = u[name][moved] / (np.sign(late[name][moved]) * adam * larger[name])
        most = math.sqrt(17 / 16) * (1 + 2**-20)
        assert np.all((ratio >= 1 / most) & (ratio <= most))
        idle = ~moved & (first[name] == 0)
        assert not u[name][idle].any()


def test_zero_gradients_for_ever():
    """From the first step on nothing moves; after others, steps fade as Adam's do, to 0.

    Adam's fade by b1 / sqrt(b2), but for the corrections. Ours fade from the last update before, by
    a level that is a sixteenth away from nu, and another that chance may be late: 1.06 in the root.
    Roundings of m are right on average, and codes of 0 stay, so some elements fade faster and the
    others slower: what is left of a block's |m| is ever less even. For that, most of a factor of 2
    is allowed (over all of 700 steps). At last m is subnormal: some CPUs then flush it to 0, on
    others 0.9 m rounds back to m, for good. Divided by the root of nu, here above 2^-20, that is an
    update below 2^20 FLOAT_MIN = 1e-32.
    """
    zeros = zeros_of(_SOME)
    _, untouched = _run([zeros] * 3)
    assert not any(np.any(x) for x in jax.tree.leaves((untouched.scale, untouched.nu)))

    def step(state, _):
        updates, state = _NO_EPS.update(zeros, state)
        largest = jax.tree.map(lambda u: jnp.max(jnp.abs(u)), updates)
        return state, jnp.stack(jax.tree.leaves(largest))

    before, state = _run(_SEQUENCE)
    _, largest = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1000))(state)
    t = 20 + np.arange(1001)[:, None]
    fade = 0.9**t / (1 - 0.9**t) * np.sqrt((1 - 0.999**t) / 0.999**t)
    start = [np.abs(u).max() for u in jax.tree.leaves(before[-1])]
    bound = 2 * np.asarray(start) * (fade / fade[0])[1:]
    assert np.all(np.isfinite(largest)) and np.all(largest <= np.maximum(bound, 2**20 * FLOAT_MIN))


_LOUD = {"nan": np.nan, "-nan": -np.nan, "inf": np.inf, "-inf": -np.inf, "g^2 overflows": 1e25}


@pytest.mark.parametrize("name", _LOUD)
def test_what_is_not_finite_is_loud_and_stays(name):
    """Its pair at once, its group at the next step at the latest and ever after; no other."""
    expected, _ = _run(_SEQUENCE)
    sequence = [jax.tree.map(np.copy, grads) for grads in _SEQUENCE]
    sequence[3]["rows"][1, 5], sequence[3]["columns"][5, 2] = _LOUD[name], _LOUD[name]
    updates, _ = _run(sequence)
    assert not np.isfinite(updates[3]["rows"][1, [5, 37]]).any()
    assert not np.isfinite(updates[3]["columns"][[5, 37], 2]).any()
    for before, u in zip(expected[4:], updates[4:], strict=True):
        assert not np.isfinite(u["rows"][1]).any() and not np.isfinite(u["columns"][:, 2]).any()
        np.testing.assert_array_equal(u["rows"][[0, 2, 3]], before["rows"][[0, 2, 3]])
        np.testing.assert_array_equal(u["columns"][:, [0, 1, 3]], before["columns"][:, [0, 1, 3]])


@pytest.mark.parametrize("k", [-40, -20, -7, 1, 20, 50])
def test_scale_invariance(k):
    """Gradients times 2^k: the same updates, codes and scales to the bit, exponents 2 k more.

    From gradients of 5e-18 (half its square, times 1 - b2, is just a normal float; the levels of
    nu, sixteen octaves, end at 2^-103) to 3e15.
    """
    expected, expected_state = _run(_SEQUENCE)
    updates, state = _run([jax.tree.map(lambda g: g * np.float32(2.0**k), s) for s in _SEQUENCE])
    _assert_equal(updates, expected)
    _assert_equal((state.mu, state.scale), (expected_state.mu, expected_state.scale))
    for name in _SOME:
        seen = np.asarray(expected_state.nu[name]) > 0
        shift = np.asarray(state.nu[name], int) - np.asarray(expected_state.nu[name])
        np.testing.assert_array_equal(shift, 2 * k * seen)


@pytest.mark.parametrize("k", [-100, -66, -60, -58, -56, -54])
def test_gradients_whose_squares_underflow_do_no_harm(k):
    """The smaller they are, the more elements have a nu of 0 and stay: never a wild step.

    At most Adam's largest, but that the nu of a pair is down to half of what one of them alone has,
    and that a subnormal level may be half of nu: sqrt(2) each.
    """
    largest = 2 * max(_largest(t) for t in range(1, len(_SEQUENCE) + 1))
    factor = np.float32(2.0**k)
    updates, _ = _run([jax.tree.map(lambda g: g * factor, grads) for grads in _SEQUENCE])
    for name in _SOME:
        seen = np.cumsum([grads[name] != 0 for grads in _SEQUENCE], axis=0)
        u = np.stack([u[name] for u in updates])
        assert np.all(np.abs(u) <= largest) and not u[seen == 0].any()
        assert k > -66 or not u.any()


@pytest.mark.parametrize(("spike", "until"), [(1e2, 20), (1e6, 170)])
def test_one_wild_gradient_slows_its_group_for_as_long_as_it_is_remembered(spike, until):
    """An element's nu rises by 0.1 spike^2 / 2 at step 20, to 2^9 and 2^35.5 times the others'.

    Levels reach 16 octaves down. So the first is no harm at once. At the second the others of its
    group get the lowest level, 2^19 and more times their own nu. Relative to its root their first
    moments, 5 at most, are below the codebook's first entry: the steps are that entry or 0. With b2
    = 0.9, nu falls by 0.152 octaves a step: 16 octaves remain after 130 steps, and 10 more forget
    what was too large. From then on they are as far from Adam's as those of the other groups: 254
    elements, 130 steps of which each is remembered for 10, and 10 % are five deviations and more.
    Those other groups see nothing of it, to the bit.
    """
    shape, at, steps = (32, 256), 20, 300
    tx = gx.scale_by_gefen(b2=0.9)
    adam = optax.scale_by_adam(b2=0.9)
    g = np.random.default_rng(0).standard_normal((steps, *shape), np.float32)
    g[at, 0, 7] = 1.0
    wild = g.copy()
    wild[at, 0, 7] = spike

    def run(tx, grads):
        def step(state, g):
            updates, state = tx.update({"w": g}, state)
            return state, updates["w"]

        return jax.lax.scan(step, tx.init({"w": jnp.zeros(shape)}), grads)[1]

    found, quiet, expected = (
        np.asarray(jax.jit(functools.partial(run, tx))(x))
        for tx, x in ((tx, wild), (tx, g), (adam, wild))
    )
    np.testing.assert_array_equal(found[:, 1:], quiet[:, 1:])
    others = np.delete(np.arange(256), [7, 7 + 128])
    if spike > 2**8:
        first_level = np.sort(np.abs(BUILTIN))[2]  # of both signs; 0 comes before
        largest = np.abs(found[at, 0, 7]) * first_level * (1 + 4 * U)
        assert np.abs(found[at, 0, others]).max() <= largest
    error = np.square(found - expected)[until:]
    assert np.sqrt(error[:, 0, others].mean() / error[:, 1:].mean()) < 1.1


# Close to Adam ------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [False, True])
def test_constant_gradients_give_their_sign(equal):
    """Of nu over ten octaves in a group, each within the levels around it; equal ones in a pair.

    Where those of a pair differ, it is g over the root of their mean square, up to sqrt(2).

    Levels are up to a sixteenth apart: a factor of sqrt(17 / 16) in the update, either way, for as
    long as nu takes, 1 / (1 - b2) steps. m is right on average; roundings are off by half a gap of
    0.29 scales, which are the largest update, 0.145 / sqrt(3) of it on average, for 1 / (1 - b1)
    steps: over 1000 steps, as if independent, by 0.84 / sqrt(1000) = 0.0265 of the scale, which a
    level below nu makes larger. Five of these are allowed.

    The average of 1 / sqrt(nu) over two levels a sixteenth apart is above 1 / sqrt of their
    average, by at most 3 / 8 of a 32nd squared: 0.04 %. The average of all 512 may be above what it
    should be by that, and off by five deviations: half a level's range, 0.031, of 256 pairs, and
    the first moment's of 512 elements.
    """
    rng, grads, expected = np.random.default_rng(0), {}, {}
    for name, (shape, block) in _SOME.items():
        g, root = np.zeros(shape), np.zeros(shape)
        for _, at in blocks_of(shape, block):
            size = 2.0 ** -rng.uniform(0, 5, block)
            size = joined(halves_of(size)[0], halves_of(size)[equal - 1], block)
            root[at] = np.sqrt(for_both(mean_of_pairs(size**2), block))
            g[at] = size * rng.choice([-1, 1], block)
        grads[name], expected[name] = jnp.asarray(g, jnp.float32), g / root

    def step(state, _):
        updates, state = _NO_EPS.update(grads, state)
        return state, updates

    start = _NO_EPS.init(zeros_of(_SOME))
    _, updates = jax.jit(lambda s: jax.lax.scan(step, s, None, length=2000))(start)
    averages = np.stack([np.asarray(updates[k])[1000:].mean(axis=0).ravel() for k in _SOME])
    wanted = np.stack([x.ravel() for x in expected.values()])
    averages, wanted = averages * np.sign(wanted), np.abs(wanted)
    gap, largest = math.sqrt(17 / 16), 1.0 if equal else math.sqrt(2)
    deviation = 0.0265 * largest * gap
    assert np.all(averages >= wanted / gap - 5 * deviation)
    assert np.all(averages <= wanted * gap + 5 * deviation)
    share = 5 * math.hypot(0.031 * largest / math.sqrt(256), deviation / math.sqrt(512))
    assert -share <= np.mean(averages - wanted) <= 0.0004 * largest + share


class _Training(NamedTuple):
    """Arguments of both optimizers, and what is special about the gradients."""

    kwargs: dict[str, Any] = {}
    dtype: Any = jnp.float32
    spike: float = 1.0  # what the gradients of one step are multiplied by


_TRAININGS = {
    "default": _Training(),
    "b2 = 0.95": _Training({"b2": 0.95}),
    "b1 = 0": _Training({"b1": 0.0}),
    "nesterov": _Training({"nesterov": True}),
    "weight decay": _Training({"weight_decay": 0.1}),
    "bfloat16 gradients": _Training(dtype=jnp.bfloat16),
    "spike": _Training(spike=100.0),
    "spike, b2 = 0.95": _Training({"b2": 0.95}, spike=100.0),
}


@pytest.mark.parametrize("name", _TRAININGS)
def test_noisy_quadratic(name):
    """Curvatures over two decades in a group: AdamW's descent, and nearly its noise floor.

    The two of a pair have one curvature: else one nu is not what AdamW has.

    While the gradient decides, the losses agree within 10 % (sums of 2,048 elements; an update is
    right on average). At the floor the loss goes with the square of the updates, so with 1 / nu.
    Nu's roundings, of a gap d each, add up over 1 / (1 - b2) steps to a variance of up to d / 2
    times nu, as if independent: for gaps of at most a 16th of nu, a 32nd of nu^2, and so much is
    1 / nu larger on average. The first moment adds its own: gaps of 0.1 scales of three deviations
    are 0.09 / 6 of m's variance at b1 = 0, and five times that at b1 = 0.9, where they add up.
    Together that is 10.6 %.

    Chance: what roundings add, of a tenth of the variance, is as if independent of the rest. Where
    one step decides, a spike, their product deviates by 2 sqrt(0.106 / n) of the loss, with n = 290
    elements that count: 2048 with weights of curvature times a squared normal number (2048 / 2.35
    for the former, and a third of that for both). Two deviations are 0.076.
    """
    training = _TRAININGS[name]
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(np.tile(10 ** rng.uniform(-1, 1, (8, 128)), 2), jnp.float32)
    start = jnp.asarray(rng.choice([-1.0, 1.0], (8, 256)), jnp.float32)
    plan = plan_of({"w": (start.shape, (1, 256))})
    arguments: dict[str, Any] = {"weight_decay": 0.0} | training.kwargs
    optimizers = (
        optax.adamw(0.01, **arguments),
        gx.gefen(0.01, plan=plan, **arguments),
    )

    def losses(tx):
        def step(carry, t):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), start.shape)
            g = curvature * (params["w"] + noise) * jnp.where(t == 300, training.spike, 1.0)
            updates, state = tx.update({"w": g.astype(training.dtype)}, state, params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
            return (params, state), jnp.mean(curvature * params["w"] ** 2)

        params = {"w": start}
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(500))[1]

    adam, ours = (np.asarray(jax.jit(functools.partial(losses, tx))()) for tx in optimizers)
    np.testing.assert_allclose(ours[:100], adam[:100], rtol=0.1)
    assert 1 - 0.076 < ours[400:].mean() / adam[400:].mean() < 1.106 + 0.076


@pytest.mark.parametrize("name", LEAVES)
def test_bytes(name):
    """One byte per element; per block a float32 and a byte."""
    shape, block = LEAVES[name]
    blocks = len(list(blocks_of(shape, block)))
    leaf = gx.LeafPlan(name, shape, gx.DualCode(block), "test")
    assert leaf.nbytes == math.prod(shape) + 5 * blocks


def test_a_leafs_own_word_is_a_constant():
    """Else a kernel for GPUs, which reads it, would wait for one that computes it."""
    name = jax.jit(lambda count: leaf_phases(["a", "b"], count)[1, 0])
    text = name.lower(jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert f"constant({zlib.crc32(b'b')})" in text
    assert not re.search("multiply|add|fusion", text.split("ENTRY")[1])
