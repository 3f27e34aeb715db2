"""What a step becomes on a GPU, as far as it can be seen without one, and how the bench counts."""

import re

import jax
import jax.numpy as jnp
import pytest
from gpu_memory import Cost, computations, cost

import gefen_jax as gx
from gefen_jax import _backend
from gefen_jax._flash_step import update_leaf
from gefen_jax._transform import _update_leaf

# Kernels and traffic of compiled HLO -----------------------------------------------------------

_HLO = """\
HloModule m, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%in_place (p.0: f32[8,4], p.1: u32[], p.2: f32[4]) -> f32[8,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.2 = f32[4]{0} parameter(2)
  %p.1 = u32[] parameter(1)
  %slice = f32[2,4]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={2,4}
  %many = f32[2,4]{1,0} broadcast(%p.2), dimensions={1}
  %sum = f32[2,4]{1,0} add(%slice, %many)
  ROOT %update = f32[8,4]{1,0} dynamic-update-slice(%p.0, %sum, %p.1, %p.1)
}

%next (q: u32[]) -> u32[] {
  %q = u32[] parameter(0)
  ROOT %r = u32[] add(%q, %q)
}

%body (arg: (u32[], f32[8,4], f32[4])) -> (u32[], f32[8,4], f32[4]) {
  %arg = (u32[], f32[8,4]{1,0}, f32[4]{0}) parameter(0)
  %n = u32[] get-tuple-element(%arg), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %y = f32[4]{0} get-tuple-element(%arg), index=2
  %fusion.1 = f32[8,4]{1,0} fusion(%x, %n, %y), kind=kLoop, calls=%in_place
  %fusion.2 = u32[] fusion(%n), kind=kLoop, calls=%next
  ROOT %out = (u32[], f32[8,4]{1,0}, f32[4]{0}) tuple(%fusion.2, %fusion.1, %y)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %ones = f32[4]{0} constant({1, 1, 1, 1})
  %copy.1 = f32[8,4]{1,0} copy(%a)
  %start = (u32[], f32[8,4]{1,0}, f32[4]{0}) tuple(%zero, %copy.1, /*index=2*/%ones)
  %while.1 = (u32[], f32[8,4]{1,0}, f32[4]{0}) while(%start), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %b = f32[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""

# A piece of 2 x 4 floats is read and written, with 4 floats and a counter; then the counter, twice.
_TURN = Cost(2, (32 + 16 + 4) + 32 + (4 + 4), 0)


def test_slices_count_what_they_take_and_loops_all_turns():
    """A copy of 128 bytes, and four turns."""
    expected = Cost(1, 2 * 128, 128).plus(_TURN, 4)
    assert cost(computations(_HLO)) == expected


def test_a_loop_without_a_known_number_of_turns_is_an_error():
    """It would wait for the host at every turn: nothing that the bench may overlook."""
    with pytest.raises(ValueError):
        cost(computations(_HLO.replace("known_trip_count", "other")))


# Which form each platform gets -------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Of 8 rows of 512 on a CPU, of 16 on a GPU; compiled leaves know the last size."""
    monkeypatch.setattr(_backend, "CHUNK", 8 * 512)
    monkeypatch.setattr(_backend, "GPU_CHUNK", 16 * 512)
    _update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    yield
    _update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)


def _lowered(platform: str, rows: int) -> str:
    """The step of a leaf with so many rows of 512, for a platform that need not be there."""
    params = {"w": jax.ShapeDtypeStruct((rows, 512), jnp.float32)}
    plan = gx.plan_by_shape(params)
    tx = gx.scale_by_gefen(plan=plan)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    return traced.lower(lowering_platforms=(platform,)).as_text()


# Platform and rows, of which 8 are no more than a piece of a CPU's, and 16 one of a GPU's; how many
# loops, and barriers: one in a loop or behind a leaf that a GPU steps at once, one before the step
# of a leaf. The latter is for GPUs, but everywhere: under `shard_map` a branch of theirs has a type
# of its own.
_FORMS = [
    ("cpu", 16, 1, 2),
    ("cuda", 8, 0, 1),
    ("cuda", 16, 0, 2),
    ("cuda", 32, 1, 2),
    ("rocm", 32, 1, 2),
    ("tpu", 32, 0, 1),
]


@pytest.mark.parametrize("platform, rows, loops, barriers", _FORMS)
def test_large_leaves_are_loops_and_leaves_apart(platform, rows, loops, barriers, small_pieces):
    """For GPUs, where temporaries would add up over leaves: each ends before the next begins."""
    text = _lowered(platform, rows)
    assert text.count("stablehlo.while") == loops
    assert text.count("stablehlo.optimization_barrier") == barriers


# Platform and the gradient's dtype; how many loops and barriers, and whether the loop hands the
# gradient's array on as the update's.
_FLASH = [
    ("cpu", jnp.bfloat16, False),
    ("cuda", jnp.float32, False),
    ("cuda", jnp.bfloat16, True),
]


@pytest.mark.parametrize("platform, dtype, in_place", _FLASH)
def test_flash_writes_narrow_updates_over_the_gradient(platform, dtype, in_place, monkeypatch):
    """On a GPU, where an update that is stored would be a second array of the gradient's size."""
    monkeypatch.setattr(_backend, "CHUNK", 8 * 512)
    tx, params = gx.scale_by_flash_adam(), jax.ShapeDtypeStruct((16, 512), dtype)
    update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    update_leaf.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] (of jit)
    (loop,) = [line for line in text.splitlines() if "stablehlo.while" in line]
    body = text[text.index(loop) :]
    written = re.findall(r"dynamic_update_slice.*: \(tensor<256x32x(\w+)>", body)
    assert sorted(written) == sorted(["i8", "ui8"] + ["bf16"] * in_place)
