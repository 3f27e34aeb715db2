"""What was restored is what was saved, or it is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gefen_jax as gx

# When orbax gives up one read, its other ones come back to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _tree():
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(0, 256, (8, 16)).astype(np.uint8),
        "w": rng.standard_normal((8, 16)).astype(np.float32),
        "half": np.array(jnp.asarray(rng.standard_normal((3, 5)), jnp.bfloat16)),
        "count": np.asarray(7, np.int32),
        "flag": rng.integers(0, 2, 9).astype(bool),
        "nothing": np.zeros((0, 4), np.float32),
        "absent": None,
    }


def test_it_is_the_sum_that_the_docstring_has():
    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    tree = _tree()
    for name, dtype in (("codes", np.uint8), ("w", np.uint32), ("half", np.uint16)):
        words = tree[name].view(dtype).reshape(-1).tolist()
        total = sum(mix(w ^ mix(p + 1)) for p, w in enumerate(words)) % 2**32
        form = f"{tree[name].dtype}{list(tree[name].shape)}"
        assert gx.fingerprint(tree)[name] == f"{form} {total:08x}"
    assert "absent" not in gx.fingerprint(tree)
    assert gx.fingerprint(tree)["nothing"] == "float32[0, 4] 00000000"


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_where_an_array_lies_does_not_matter(types):
    expected = gx.fingerprint(_tree())
    assert gx.fingerprint(jax.tree.map(jnp.asarray, _tree())) == expected
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(types,) * 2)

    def put(x):
        spec = P("y", "x") if x.shape == (8, 16) else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    assert gx.fingerprint(jax.tree.map(put, _tree())) == expected


def test_other_dtypes():
    """In NumPy as on a device; 64 bits without `jax_enable_x64`, too."""
    x = np.random.default_rng(0).standard_normal((4, 6))
    arrays = {
        "complex": (x + 1j).astype(np.complex64),
        "float8": np.asarray(jnp.asarray(x, jnp.float8_e4m3fn)),
        "float4": np.asarray(jnp.asarray(x, jnp.float4_e2m1fn)),
        "int4": np.asarray(jnp.asarray(np.round(3 * x), jnp.int4)),
        "int16": np.round(100 * x).astype(np.int16),
    }
    assert gx.fingerprint(arrays) == gx.fingerprint(jax.tree.map(jnp.asarray, arrays))
    wide = {"f": x, "i": np.arange(24).reshape(4, 6), "c": x * 1j}
    with jax.enable_x64(True):
        on_device = gx.fingerprint(jax.tree.map(jnp.asarray, wide))
    assert gx.fingerprint(wide) == on_device
    key = jax.random.key(3)
    assert gx.fingerprint(key) == gx.fingerprint(jax.random.key_data(key))
    assert gx.fingerprint(1.5) == gx.fingerprint(np.float64(1.5))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(data):
    tree, saved = _tree(), gx.fingerprint(_tree())
    name = data.draw(st.sampled_from(["codes", "w", "half", "count"]))
    flat = tree[name].reshape(-1).view(np.uint8)
    bit = data.draw(st.integers(0, 8 * flat.size - 1))
    flat[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=f"`{name}` is damaged"):
        gx.check_fingerprint(tree, saved)


def test_what_does_not_fit_is_named():
    tree = _tree()
    saved = json.loads(json.dumps(gx.fingerprint(tree)))
    gx.check_fingerprint(tree, saved)
    with pytest.raises(ValueError, match=r"`w` is float32\[16, 8\], what was saved was float32\[8"):
        gx.check_fingerprint(tree | {"w": tree["w"].T.copy()}, saved)
    with pytest.raises(ValueError, match="`w` is damaged"):
        gx.check_fingerprint(tree | {"w": tree["w"][::-1]}, saved)
    with pytest.raises(ValueError, match="`more` was not saved"):
        gx.check_fingerprint(tree | {"more": tree["w"]}, saved)
    with pytest.raises(ValueError, match="`w` was saved, and is not in what was restored"):
        gx.check_fingerprint(tree | {"w": None}, saved)
    with pytest.raises(ValueError, match="two leaves of the parameters have the name `a/b`"):
        gx.fingerprint({"a/b": 1, "a": {"b": 2}})
    for none in (jax.ShapeDtypeStruct((2,), jnp.float32), np.zeros(3, jax.dtypes.float0)):
        with pytest.raises(TypeError, match="`w` has no numbers: expected an array"):
            gx.fingerprint({"w": none})
    with pytest.raises(TypeError, match="`w` has no numbers inside of `jit`"):
        jax.eval_shape(lambda x: gx.fingerprint({"w": x}), 1.0)


_PARAMS = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((8, 512)), jnp.float32)}


def _state(plan):
    tx = gx.gefen(1e-2, plan=plan)
    return tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS)[1]


def _like(plan):
    return jax.eval_shape(gx.gefen(1e-2, plan=plan).init, _PARAMS)


def _with(kind):
    return gx.plan_by_shape(_PARAMS).with_kind("w", kind)


@pytest.mark.parametrize("there, here", [(0, 1), (1, 0)])
def test_a_state_that_orbax_casts_to_another_plan(tmp_path, there, here):
    """Same shapes, other dtypes: orbax takes it, and exponents become second moments."""
    plans = _with(gx.DualCode((1, 256))), _with(gx.SharedBlocks((1, 256)))
    state = _state(plans[there])
    with ocp.CheckpointManager(tmp_path) as manager:
        sums = ocp.args.JsonSave(gx.fingerprint(state))
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(state), sums=sums))
        manager.wait_until_finished()

        def restore(plan):
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(_like(plan)), sums=ocp.args.JsonRestore()
            )
            return manager.restore(1, args=args)

        right, wrong = restore(plans[there]), restore(plans[here])
    gx.check_fingerprint(right.state, right.sums)
    names = ["uint8", "float32"]
    expected = rf"`0/nu/w` is {names[here]}\[8, 2\], what was saved was {names[there]}\[8, 2\]"
    with pytest.raises(ValueError, match=expected):
        gx.check_fingerprint(wrong.state, wrong.sums)


def test_flipped_bits_in_orbaxs_files(tmp_path):
    """What orbax reads without an error is the same, or refused by name; the step before stays."""
    state = _state(None)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), sums=ocp.args.JsonSave(gx.fingerprint(state))
            )
            manager.save(step, args=args)
            manager.wait_until_finished()

    def restore(step):
        with ocp.CheckpointManager(tmp_path) as manager:
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(_like(None)), sums=ocp.args.JsonRestore()
            )
            return manager.restore(step, args=args)

    files = [p for p in (tmp_path / "2" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data, found = largest.read_bytes(), 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(data), 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        largest.write_bytes(flipped)
        try:
            read = restore(2)
        except Exception:  # of many types: what the bit was for decides
            continue
        with pytest.raises(ValueError, match="is damaged: its bits are not those"):
            gx.check_fingerprint(read.state, read.sums)
        found += 1
    assert found
    before = restore(1)
    gx.check_fingerprint(before.state, before.sums)
