"""The plan: a value that can be kept, read, compared, changed by hand, and trusted once loaded."""

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gefen_jax as gx
from gefen_jax._blocks import (
    Cut,
    as_block,
    block_size,
    check_block,
    flat_view,
    make_block,
    read_cut,
    runs_divide,
    stats_shape,
)

pytestmark = pytest.mark.once


def _params():
    return {
        "embedding": jnp.zeros((300, 64)),
        "layers": [
            {"kernel": jnp.zeros((64, 128), jnp.bfloat16), "bias": jnp.zeros(128)},
            {"kernel": jnp.zeros((3, 3, 16, 64)), "bias": jnp.zeros(64)},
        ],
        "steps": jnp.zeros(3, jnp.int32),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.zeros(()),
    }


def _codebook(**changes):
    values = np.linspace(-1, 1, 256)
    for index, value in changes.items():
        values[int(index[1:])] = value
    return tuple(values.tolist())


@pytest.fixture
def plan() -> gx.Plan:
    return gx.plan_by_shape(_params())


# A value ----------------------------------------------------------------------------------------


def test_frozen(plan):
    for holder, field in ((plan, "rule"), (plan["embedding"], "kind"), (gx.Exact(), "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, field, None)


def test_equal_plans_are_equal_and_hash_equal(plan):
    again = gx.plan_by_shape(_params())
    assert again is not plan and again == plan and hash(again) == hash(plan)
    assert len({plan, again}) == 1


_OTHER_LEAF = gx.LeafPlan("other", (3,), gx.Exact(), "small")
_CHANGES = {
    "rule": lambda plan: {"rule": "axis"},
    "codebook_reason": lambda plan: {"codebook_reason": "learned"},
    "codebook": lambda plan: {"codebook": _codebook()},
    "a leaf more": lambda plan: {"leaves": (*plan.leaves, _OTHER_LEAF)},
    "a leaf less": lambda plan: {"leaves": plan.leaves[1:]},
    "order": lambda plan: {"leaves": plan.leaves[::-1]},
    "kind": lambda plan: {"leaves": plan.with_kind("embedding", gx.Exact()).leaves},
}


@pytest.mark.parametrize("change", _CHANGES)
def test_equal_exactly_when_all_is_equal(plan, change):
    assert dataclasses.replace(plan, **_CHANGES[change](plan)) != plan


def test_copies_are_equal(plan):
    plan.exact_lookup  # noqa: B018 (cached values travel along)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan and hash(other) == hash(plan)


def test_codebook_is_float32(plan):
    # What the plan holds is what the state starts with.
    thirds = tuple(i / 383 for i in range(-128, 128))
    kept = dataclasses.replace(plan, codebook=thirds).codebook
    assert kept != thirds and np.array_equal(kept, np.float32(thirds))
    assert dataclasses.replace(plan, codebook=kept).codebook == kept


def test_repr_is_short():
    layers = {
        f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "f4")} for i in range(99)
    }
    plan = gx.plan_by_shape(layers)
    assert len(repr(plan)) < 200 and repr(plan) == str(plan)
    for words in ("99 leaves", "1,660,944,384 parameters", "1.0195 bytes per parameter"):
        assert words in repr(plan)
    assert len(repr(gx.Plan((), plan.codebook, "built in", "shape"))) < 200


def test_table(plan):
    table = plan.table()
    assert [row.path for row in table] == [
        "embedding",
        "empty",
        "layers/0/bias",
        "layers/0/kernel",
        "layers/1/bias",
        "layers/1/kernel",
        "scalar",
        "steps",
    ]
    rows = {row.path: row for row in table}
    kernel = rows["layers/0/kernel"]
    assert kernel.shape == (64, 128) and kernel.kind == "dual_code"
    assert kernel.block == "x".join(map(str, plan["layers/0/kernel"].kind.block))
    blocks = 64 * 128 // block_size(plan["layers/0/kernel"].kind.block)
    assert kernel.nbytes == 64 * 128 + 5 * blocks
    assert rows["steps"] == ("steps", (3,), "untrained", "-", 0, "not a float: no state")
    assert rows["scalar"].nbytes == 8 and rows["empty"].nbytes == 0
    assert all(row.reason for row in table)


_PARTS = {
    "whole": lambda params: params,
    "blocks only": lambda params: params["embedding"],
    "exact only": lambda params: params["layers"][0]["bias"],
    "with integers": lambda params: {"e": params["embedding"], "s": params["steps"]},
}


@pytest.mark.parametrize("part", _PARTS)
def test_bytes_per_param_is_what_init_allocates(part):
    params = _PARTS[part](_params())
    plan = gx.plan_by_shape(params)
    trained = sum(x.size for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating))
    for tx in (gx.scale_by_gefen(plan=plan), gx.gefen(1e-3, plan=plan)):
        report = gx.memory_report(tx.init(params))
        assert plan.bytes_per_param == report.total_bytes / trained
        rows = {row.path: row.nbytes for row in plan.table() if row.nbytes}
        assert {path: n for path, n in report.by_tensor.items() if n} == rows


def test_bytes_per_param_without_parameters():
    assert gx.plan_by_shape({}).bytes_per_param == 0.0


def test_every_kind_reports_its_bytes():
    params = {"w": jnp.zeros((64, 128))}
    kinds = (
        gx.Exact(),
        gx.SharedBlocks((1, 128)),
        gx.SharedBlocks((5, 128)),  # a shorter last run
        gx.FlatPeriods(1, 256),
        gx.FlatPeriods(512, 512),
    )
    for kind in kinds:
        plan = gx.plan_by_shape(params).with_kind("w", kind)
        report = gx.memory_report(gx.scale_by_gefen(plan=plan).init(params))
        assert plan.bytes_per_param == report.total_bytes / (64 * 128), kind


# Changed by hand --------------------------------------------------------------------------------

_PATTERNS = {
    "*": {"embedding", "empty", "scalar"}  # not "steps", integers
    | {f"layers/{i}/{name}" for i in (0, 1) for name in ("kernel", "bias")},
    "embedding": {"embedding"},
    "*kernel": {"layers/0/kernel", "layers/1/kernel"},
    "layers/?/bias": {"layers/0/bias", "layers/1/bias"},
    "layers/[1-9]/*": {"layers/1/kernel", "layers/1/bias"},
}


@pytest.mark.parametrize("pattern", _PATTERNS)
def test_with_kind(plan, pattern):
    changed = plan.with_kind(pattern, gx.Exact())
    for old, new in zip(plan.leaves, changed.leaves, strict=True):
        hit = new.path in _PATTERNS[pattern]
        expected = dataclasses.replace(old, kind=gx.Exact(), reason="set by hand") if hit else old
        assert new == expected
    assert dataclasses.replace(changed, leaves=plan.leaves) == plan


_BAD_KINDS = {
    "no match": ("Embedding", gx.Exact(), r"`pattern` 'Embedding' matches no leaf"),
    "integers": ("steps", gx.Exact(), "`pattern` 'steps' matches no leaf.*trained"),
    "rank": ("embedding", gx.SharedBlocks((64,)), r"`embedding`.*rank.*\(300, 64\)"),
    "size": ("embedding", gx.SharedBlocks((1, 65)), r"`embedding`.*\(1, 65\).*between 1 and"),
    "zero": ("embedding", gx.SharedBlocks((0, 64)), r"`embedding`.*\(0, 64\).*between 1 and"),
    "no box": ("embedding", gx.SharedBlocks((2, 32)), r"`embedding`.*\(2, 32\).*whole"),
    "scalar": ("scalar", gx.SharedBlocks(()), r"`scalar`"),
    "period": ("embedding", gx.FlatPeriods(7, 7), r"`embedding`.*`period` 7.*divide 19200"),
    "group": ("embedding", gx.FlatPeriods(64, 32), r"`embedding`.*`group` 32"),
    "one of several": ("layers/*", gx.SharedBlocks((1, 128)), r"`layers/0/bias`"),
}


@pytest.mark.parametrize("case", _BAD_KINDS)
def test_with_kind_refuses(plan, case):
    pattern, kind, match = _BAD_KINDS[case]
    with pytest.raises(ValueError, match=match):
        plan.with_kind(pattern, kind)


_NO_INTEGERS: dict[str, Any] = {
    "a part": lambda: as_block((1, 127.5)),
    "one number": lambda: as_block(256),
    "a float": lambda: gx.FlatPeriods(128.0, 128),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("case", _NO_INTEGERS)
def test_sizes_of_blocks_are_integers(case):
    with pytest.raises(TypeError, match="(?s)period|must be integers.*got"):
        _NO_INTEGERS[case]()


def test_a_class_is_no_kind(plan):
    kind: Any = gx.Exact
    with pytest.raises(TypeError, match="`kind` of `embedding` must be a kind of state.*Exact"):
        plan.with_kind("embedding", kind)


def test_exact_everywhere_trains_beside_integers():
    params = {"w": jnp.ones(3), "steps": jnp.arange(3)}
    tx = gx.scale_by_gefen(plan=gx.plan_by_shape(params).with_kind("*", gx.Exact()))
    grads = {"w": jnp.ones(3), "steps": None}
    assert tx.update(grads, tx.init(params))[1].mu["steps"] is None


def test_unknown_leaf_names_the_nearest(plan):
    with pytest.raises(KeyError, match=r"no leaf `embeding`.*nearest.*'embedding'"):
        plan["embeding"]


def test_duplicate_paths_are_refused(plan):
    with pytest.raises(ValueError, match="`leaves` names `other` twice"):
        dataclasses.replace(plan, leaves=(*plan.leaves, _OTHER_LEAF, _OTHER_LEAF))


_BAD_CODEBOOKS = {
    "too short": (_codebook()[:-1], r"256 finite numbers.*255"),
    "too long": ((0.0,) * 257, r"256 finite numbers.*257"),
    "empty": ((), "256 finite numbers"),
    "NaN": (_codebook(_7=np.nan), "256 finite numbers"),
    "infinite": (_codebook(_255=np.inf), "256 finite numbers"),
    "unsorted": (_codebook(_7=0.5), "sorted"),
    "below -1": (_codebook(_0=-1.01), r"\[-1, 1\]"),
    "above 1": (_codebook(_255=1.01), r"\[-1, 1\]"),
}


@pytest.mark.parametrize("case", _BAD_CODEBOOKS)
def test_codebook_is_validated(plan, case):
    codebook, match = _BAD_CODEBOOKS[case]
    with pytest.raises(ValueError, match=f"`codebook`.*{match}"):
        dataclasses.replace(plan, codebook=codebook)


# Kept in a file ---------------------------------------------------------------------------------


@st.composite
def _shapes(draw, most: int = 4):
    return tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=most)))


@st.composite
def _cuts(draw):
    shape = draw(_shapes())
    axis = draw(st.integers(0, len(shape) - 1))
    return shape, Cut(
        axis, draw(st.integers(axis, len(shape) - 1)), draw(st.integers(1, shape[axis]))
    )


# Plain data: the library is not called inside of strategies, where beartype's sampling of
# containers would count as unseeded randomness.
_leaves = st.tuples(st.text(), _cuts(), st.integers(0, 4), st.integers(1, 100), st.text())


def _leaf(path, shape_and_cut, kind, period, reason):
    shape, cut = shape_and_cut
    period = math.gcd(period, math.prod(shape))
    kinds = (
        gx.Exact(),
        gx.Untrained(),
        gx.SharedBlocks(make_block(shape, cut)),
        gx.FlatPeriods(period, period),
        gx.FlatPeriods(1, period),
    )
    return gx.LeafPlan(path, shape, kinds[kind], reason)


@st.composite
def _codebooks(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Down to the subnormal numbers, with duplicates and both zeros.
    size = draw(st.sampled_from([0, -10, -45]))
    values = random.uniform(-1, 1, 256) * 10.0 ** random.integers(size, 1, 256)
    values[: draw(st.integers(0, 8))] = draw(st.sampled_from([0.0, -0.0, 1.0, -1.0]))
    return tuple(np.sort(np.clip(values, -1, 1).astype(np.float32)).tolist())


@given(
    st.lists(_leaves, max_size=5, unique_by=lambda leaf: leaf[0]),
    _codebooks(),
    st.text(),
    st.sampled_from(["axis", "reference", "shape"]),
)
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory, leaves, codebook, reason, rule):
    plan = gx.Plan(tuple(_leaf(*leaf) for leaf in leaves), codebook, reason, rule)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    loaded = gx.Plan.load(path)
    assert loaded == plan and hash(loaded) == hash(plan)
    assert np.array_equal(
        np.asarray(loaded.codebook, np.float32).view(np.int32),
        np.asarray(plan.codebook, np.float32).view(np.int32),
    )


def test_round_trip_of_a_path_as_string(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan.save("plan.json")  # without a folder
    assert gx.Plan.load("plan.json") == plan == gx.Plan.load(str(tmp_path / "plan.json"))


def test_threads_that_write_one_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(4) as threads:
        for written in [threads.submit(plan.save, path) for _ in range(40)]:
            written.result()
    assert gx.Plan.load(path) == plan
    assert [x.name for x in tmp_path.iterdir()] == ["plan.json"]


def test_file_is_readable(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    data = json.loads(text)
    assert data["format"] == "gefen_jax plan" and data["version"] == 3
    assert data["rule"] == "shape" and len(data["codebook"]) == 256
    # One leaf per line, findable by its path; nothing but the codebook is long.
    lines = text.splitlines()
    for leaf in plan.leaves:
        (line,) = (x for x in lines if f'"path": {json.dumps(leaf.path)}' in x)
        assert json.loads(line.strip().rstrip(","))["reason"] == leaf.reason
    assert len(lines) == len(plan.leaves) + 10
    assert [len(x) > 200 for x in lines].count(True) == 1


def test_file_can_be_read_by_others(plan, tmp_path):
    # As any file that is written here: on a cluster one process makes the plan, others read it.
    ordinary, path = tmp_path / "ordinary", tmp_path / "plan.json"
    ordinary.write_text("")
    plan.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def _unchecked(text):
    """As version 2 wrote it, without a checksum, which would find most of these damages first."""
    return {k: v for k, v in json.loads(text).items() if k != "checksum"} | {"version": 2}


def _edit(**changes):
    return lambda text: json.dumps({**_unchecked(text), **changes})


def _edit_leaf(**changes):
    def edit(text):
        data = _unchecked(text)
        data["leaves"][3] |= changes  # layers/0/kernel
        return json.dumps(data)

    return edit


def _without(key):
    return lambda text: json.dumps({k: v for k, v in _unchecked(text).items() if k != key})


# A damaged file, and what the message says besides the file's name.
_DAMAGES = {
    "empty": (lambda text: "", ""),
    "truncated early": (lambda text: text[:40], ""),
    "truncated in a leaf": (lambda text: text[: text.index("layers/1")], ""),
    "truncated at the end": (lambda text: text.rstrip()[:-1], ""),
    "not JSON": (lambda text: "a plan", ""),
    "a list": (lambda text: "[]", ""),
    "a number": (lambda text: "1", ""),
    "null": (lambda text: "null", ""),
    "other JSON": (lambda text: '{"a": 1}', "format"),
    "other format": (_edit(format="something"), "format.*something"),
    "version 4": (_edit(version=4), "version is 4.*reads 3"),
    "no checksum": (_edit(version=3), "checksum does not fit"),
    "edited": (lambda text: text.replace("128", "64"), "checksum does not fit"),
    "called older": (lambda text: text.replace('"version": 3', '"version": 2'), "checksum"),
    "old dual code": (_edit(version=1), "version is 1, whose dual code.*make the plan anew"),
    "version of wrong type": (_edit(version="2"), "version is '2'"),
    "no version": (_without("version"), "version"),
    "no leaves": (_without("leaves"), "leaves"),
    "no codebook": (_without("codebook"), "codebook"),
    "no rule": (_without("rule"), "rule"),
    "leaves of wrong type": (_edit(leaves=3), ""),
    "a leaf of wrong type": (_edit(leaves=["x"]), ""),
    "short codebook": (_edit(codebook=[0.0]), "codebook"),
    "codebook of words": (_edit(codebook=["x"] * 256), ""),
    "unsorted codebook": (_edit(codebook=[1.0] + [0.0] * 255), "sorted"),
    "unknown kind": (_edit_leaf(kind="tiles"), "`layers/0/kernel`.*unknown kind 'tiles'"),
    "bad block": (_edit_leaf(block=[2, 64]), r"`layers/0/kernel`.*\(2, 64\)"),
    "block of wrong rank": (_edit_leaf(block=[128]), r"`layers/0/kernel`.*\(128,\)"),
    "block of words": (_edit_leaf(block="ab"), ""),
    "no block": (_edit_leaf(block=None), ""),
    "a field more": (_edit_leaf(stride=2), "stride"),
    "other shape": (_edit_leaf(shape=[4, 4]), "`layers/0/kernel`"),
    "twice": (_edit_leaf(path="layers/1/kernel", shape=[64, 128]), "`layers/1/kernel` twice"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_files_are_refused(plan, tmp_path, damage):
    edit, match = _DAMAGES[damage]
    path = tmp_path / "my plan.json"
    plan.save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=rf"(?s)my plan\.json.*{match}"):
        gx.Plan.load(path)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"weights\.bin"):
        gx.Plan.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gx.Plan.load(tmp_path / "plan.json")


def _fail(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("call", ["replace"])
def test_a_failing_save_keeps_the_previous_file(plan, tmp_path, monkeypatch, call):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, call, _fail)
    with pytest.raises(OSError, match="No space"):
        plan.with_kind("*", gx.Exact()).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_saving_into_a_missing_folder_says_so(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan.save(tmp_path / "nowhere" / "plan.json")


# Blocks -----------------------------------------------------------------------------------------


@given(_cuts())
@settings(max_examples=200, deadline=None)
def test_a_cut_makes_a_block_that_reads_back(case):
    shape, cut = case
    block = make_block(shape, cut)
    check_block(shape, block)
    # Axes of 1 make cuts ambiguous; the blocks that they stand for are the same.
    assert make_block(shape, read_cut(shape, block)) == block
    assert block_size(block) == cut.run * math.prod(shape[cut.axis + 1 : cut.end + 1])


@given(_shapes(3), st.data())
@settings(max_examples=200, deadline=None)
def test_check_block_accepts_exactly_the_boxes_of_cuts(shape, data):
    block = tuple(data.draw(st.integers(0, d + 1)) for d in shape)
    boxes = {
        make_block(shape, Cut(axis, end, run))
        for axis, end in itertools.combinations_with_replacement(range(len(shape)), 2)
        for run in range(1, shape[axis] + 1)
    }
    try:
        check_block(shape, block)
    except ValueError as error:
        assert block not in boxes and str(block) in str(error) and str(shape) in str(error)
    else:
        assert block in boxes


@given(_cuts())
@settings(max_examples=100, deadline=None)
def test_statistics_have_one_entry_per_block(case):
    shape, cut = case
    block = make_block(shape, cut)
    stats = stats_shape(shape, block)
    assert len(stats) == len(shape)
    # Count the blocks: the distinct positions of elements, divided by the block.
    positions = {
        tuple(i // b for i, b in zip(index, block, strict=True)) for index in np.ndindex(*shape)
    }
    assert len(positions) == math.prod(stats)
    assert runs_divide(shape, block) == (shape[cut.axis] % cut.run == 0)
    state = jax.eval_shape(lambda: gx.SharedBlocks(block).init(shape))
    assert state.mu.shape == shape and state.scale.shape == state.nu.shape == stats
    if runs_divide(shape, block):
        view = flat_view(shape, block)
        assert view.period == block_size(block)
        assert math.prod(view.shape) == math.prod(shape)
        assert math.prod(view.stats_shape) == math.prod(stats)


_NOT_BLOCKS = {
    "rank": ((4, 4), (4,), "rank"),
    "too large": ((4, 4), (1, 5), "between 1 and"),
    "zero": ((4, 4), (0, 4), "between 1 and"),
    "negative": ((4, 4), (-1, 4), "between 1 and"),
    "a scalar leaf": ((), (), "between 1 and"),
    "an empty leaf": ((0, 4), (1, 4), "between 1 and"),
    "a tile": ((4, 4), (2, 2), "cut one axis"),
    "a hole": ((4, 4, 4), (2, 1, 4), "cut one axis"),
    "two cuts": ((4, 4, 4), (1, 2, 2), "cut one axis"),
}


@pytest.mark.parametrize("case", _NOT_BLOCKS)
def test_what_is_no_block(case):
    shape, block, match = _NOT_BLOCKS[case]
    with pytest.raises(ValueError, match=re.escape(str(block)) + f".*{match}"):
        check_block(shape, block)


# Pairs along another axis -------------------------------------------------------------------------


def test_pair_axis_puts_pairs_there():
    """By path; the others, and leaves too small for codes, as without."""
    params = {
        "linear": {"weight": jnp.zeros((512, 256)), "bias": jnp.zeros(512)},
        "embedding": {"weight": jnp.zeros((1000, 256))},
        "conv": {"weight": jnp.zeros((64, 32, 3, 3))},
        "odd": {"weight": jnp.zeros((333, 256))},
    }
    usual = gx.plan_by_shape(params)
    plan = gx.plan_by_shape(params, pair_axis={"*weight": 0, "embedding/*": -1})
    assert plan["linear/weight"].kind == gx.DualCode((256, 1))
    assert plan["conv/weight"].kind == gx.DualCode((64, 1, 1, 1))
    for path in ("linear/bias", "embedding/weight", "odd/weight"):
        assert plan[path].kind == usual[path].kind
    assert gx.plan_by_shape(params, kind="shared_blocks", pair_axis={"*": 0}) == gx.plan_by_shape(
        params, kind="shared_blocks"
    )


@pytest.mark.parametrize(
    ("pair_axis", "message"),
    [
        ({"*kernel": 0}, "pattern '\\*kernel' matches no leaf"),
        ({"*weight": 2}, "`linear/weight`, of shape \\(512, 256\\), has no axis 2"),
        ({"*weight": -3}, "has no axis -3"),
    ],
)
def test_pair_axis_that_does_not_fit(pair_axis, message):
    params = {"linear": {"weight": jax.ShapeDtypeStruct((512, 256), jnp.float32)}}
    with pytest.raises(ValueError, match=message):
        gx.plan_by_shape(params, pair_axis=pair_axis)


def test_output_layers_pair_inputs():
    """By name, as long as there are more columns than rows, or by shape; else the last axis."""
    params = {
        "LM_Head": {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.float32)},
        "head": jax.ShapeDtypeStruct((256, 128), jnp.float32),
        "heads": {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.float32)},
        "vocabulary": jax.ShapeDtypeStruct((128, 128 * 9), jnp.float32),
        "mlp": jax.ShapeDtypeStruct((128, 128 * 8), jnp.float32),
    }
    plan = gx.plan_by_shape(params)
    blocks = {leaf.path: leaf.kind.scale_block for leaf in plan.leaves}
    assert blocks == {
        "LM_Head/kernel": (128, 1),
        "head": (1, 128),
        "heads/kernel": (1, 256),
        "vocabulary": (128, 1),
        "mlp": (1, 256),
    }
    assert plan["LM_Head/kernel"].reason == "an output layer: 128 along axis 0"
