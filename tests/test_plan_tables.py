"""The plan by shape of whole architectures, tensor by tensor, as tables that one can read.

``tests/plans/*.txt`` hold what `gefen` decides when it is given no plan. A change of a rule shows
up there as a difference, to be looked at before it is accepted with

    python tests/test_plan_tables.py

A dual code takes 1 + 5 / 256 bytes per element with the blocks aimed at, and 1 + 5 / 64 with the
smallest; the bound of 1.05 on whole models leaves the rest to small leaves and to few narrow ones.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import gefen_jax as gx
from gefen_jax._constants import DUAL_MIN, SMALL_LEAF

pytestmark = pytest.mark.once

_FOLDER = pathlib.Path(__file__).parent / "plans"
_BOUND = 1.05

Tree = dict[str, Any]


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _kernel(*shape: int) -> Tree:
    return {"kernel": _array(*shape)}


def _scale(*shape: int) -> Tree:
    return {"scale": _array(*shape)}


def _dense(*shape: int) -> Tree:
    return _kernel(*shape) | {"bias": _array(shape[-1])}


def _norm(*shape: int) -> Tree:
    return _scale(*shape) | {"bias": _array(*shape)}


def _decoder_layer(width: int, kv: int, mlp: int, *stacked: int) -> Tree:
    """Llama's layer; with ``stacked``, several of them along leading axes."""
    return {
        "attention_norm": _scale(*stacked, width),
        "q": _kernel(*stacked, width, width),
        "k": _kernel(*stacked, width, kv),
        "v": _kernel(*stacked, width, kv),
        "o": _kernel(*stacked, width, width),
        "mlp_norm": _scale(*stacked, width),
        "gate": _kernel(*stacked, width, mlp),
        "up": _kernel(*stacked, width, mlp),
        "down": _kernel(*stacked, mlp, width),
    }


def _llama() -> Tree:
    """Llama 3's 8B: two of its layers, and its vocabulary of 128k rows."""
    return {
        "embed": {"embedding": _array(128_256, 4096)},
        "layers": {str(i): _decoder_layer(4096, 1024, 14_336) for i in range(2)},
        "norm": _scale(4096),
        "head": _kernel(4096, 128_256),
    }


def _scanned() -> Tree:
    """A decoder whose layers are scanned over: one leaf holds them all."""
    return {
        "embed": {"embedding": _array(32_000, 2048)},
        "layers": _decoder_layer(2048, 512, 5632, 22),
        "norm": _scale(2048),
    }


def _experts(*stacked: int) -> Tree:
    width, mlp, experts = 2048, 1408, 64
    return {
        "norm": _scale(*stacked, width),
        "router": {"kernel": _array(*stacked, width, experts), "bias": _array(*stacked, experts)},
        "gate": _kernel(*stacked, experts, width, mlp),
        "up": _kernel(*stacked, experts, width, mlp),
        "down": _kernel(*stacked, experts, mlp, width),
    }


def _mixture_of_experts() -> Tree:
    """64 experts of a fine-grained mixture: one layer, and a scanned stack of 12."""
    return {"layer": _experts(), "stack": _experts(12)}


def _convolutions() -> Tree:
    """ResNet's and MobileNet's kinds of kernels, [height, width, in, out]."""
    return {
        "stem": _kernel(7, 7, 3, 64) | {"norm": _norm(64)},
        "conv1x1": _kernel(1, 1, 512, 2048) | {"norm": _norm(2048)},
        "conv3x3": {str(n): _kernel(3, 3, n, n) | {"norm": _norm(n)} for n in (64, 256, 512)},
        "depthwise": {str(n): _kernel(3, 3, 1, n) for n in (32, 144, 384, 512, 960)},
        "depthwise5x5": {str(n): _kernel(5, 5, 1, n) for n in (72, 240, 1152)},
        "depthwise7x7": {str(n): _kernel(7, 7, 1, n) for n in (96, 768)},
        "head": _dense(2048, 1000),
    }


def _attention_heads() -> Tree:
    """flax's attention: projections in [width, heads, size] and back in [heads, size, width]."""

    def attention(width: int, heads: int, size: int) -> Tree:
        project = {"kernel": _array(width, heads, size), "bias": _array(heads, size)}
        back = {"kernel": _array(heads, size, width), "bias": _array(width)}
        return {"query": project, "key": project, "value": project, "out": back}

    return {
        "small": attention(384, 6, 64),
        "base": attention(768, 12, 64),
        "wide": attention(4096, 32, 128),
        "one_kv_head": {"key": {"kernel": _array(2048, 1, 256)}},
        "scanned": {
            "query": {"kernel": _array(24, 1024, 16, 64), "bias": _array(24, 16, 64)},
            "out": {"kernel": _array(24, 16, 64, 1024), "bias": _array(24, 1024)},
        },
    }


def _adapters(width: int, kv: int, mlp: int, rank: int, *stacked: int) -> Tree:
    def pair(into: int, out: int) -> Tree:
        return {"lora_a": _array(*stacked, into, rank), "lora_b": _array(*stacked, rank, out)}

    return {"q": pair(width, width), "v": pair(width, kv), "down": pair(mlp, width)}


def _lora() -> Tree:
    """Adapters of rank 8 and 16 beside an 8B decoder, one by one and scanned over 32 layers."""
    return {
        "rank8": _adapters(4096, 1024, 14_336, 8),
        "rank16": _adapters(4096, 1024, 14_336, 16),
        "scanned8": _adapters(4096, 1024, 14_336, 8, 32),
    }


def _lora_small() -> Tree:
    """Adapters beside a model of width 256."""
    return {"rank8": _adapters(256, 256, 512, 8), "rank16": _adapters(256, 64, 256, 16)}


def _tied_and_frozen() -> Tree:
    """A tied head is no leaf; a frozen tensor is None, or integers (quantised, or counters)."""
    return {
        "embed": {"embedding": _array(50_257, 768)},
        "head": None,
        "frozen": {"kernel": None, "quantised": _array(768, 3072, dtype=jnp.int8)},
        "mlp": _dense(768, 3072),
        "step": _array(dtype=jnp.int32),
        "mask": _array(1024, 1024, dtype=jnp.bool_),
        "temperature": _array(),
        "empty": _array(0, 768),
    }


def _odd_sizes() -> Tree:
    """Axes that few numbers divide: GPT-2's vocabulary as a head, a prime one, a ragged bias."""
    return {
        "embed": {"embedding": _array(50_257, 1600)},
        "head": _kernel(1600, 50_257),
        "prime_head": _kernel(1024, 32_003),
        "prime_embed": {"embedding": _array(32_003, 1021)},
        "positions": _array(1, 197, 768),
        "relative_bias": _array(12, 169, 169),
        "kernel1d": _kernel(4, 1, 8192),
        "tall": _kernel(65_537, 7),
    }


def _narrow_embeddings() -> Tree:
    """Tables of a recommender: rows of 16 to 128 numbers, seen at very different rates."""
    return {str(n): {"embedding": _array(1_000_000, n)} for n in (16, 32, 64, 128)} | {
        "mlp": _dense(240, 1024)
    }


def _classifier() -> Tree:
    """A model of small leaves only: there a byte saved would be worth nothing."""
    return {
        "hidden": {str(i): _dense(64, 64) for i in range(3)},
        "norm": _norm(64),
        "head": _dense(64, 10),
    }


_ARCHITECTURES: dict[str, Callable[[], Tree]] = {
    "llama": _llama,
    "scanned": _scanned,
    "mixture_of_experts": _mixture_of_experts,
    "convolutions": _convolutions,
    "attention_heads": _attention_heads,
    "lora": _lora,
    "lora_small": _lora_small,
    "tied_and_frozen": _tied_and_frozen,
    "odd_sizes": _odd_sizes,
    "narrow_embeddings": _narrow_embeddings,
    "classifier": _classifier,
}
# Every leaf has at most 4,096 elements and keeps exact moments, 8 bytes per parameter: all state
# of such a model is smaller than a picture.
_SMALL_LEAVES_ONLY = {"lora_small", "classifier"}


def text(name: str) -> str:
    """The plan by shape of an architecture, one tensor per line."""
    make = _ARCHITECTURES[name]
    plan = gx.plan_by_shape(make())
    rows = [("path", "shape", "kind", "block", "bytes", "reason")]
    for row in plan.table():
        shape = "x".join(map(str, row.shape)) or "scalar"
        rows.append((row.path, shape, row.kind, row.block, f"{row.nbytes:,}", row.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"# {make.__doc__}"]
    for row in rows:
        cells = [
            cell.rjust(w) if i == 4 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    total = sum(leaf.size for leaf in plan.leaves if leaf.nbytes)
    lines.append(f"{total:,} trained parameters, {plan.bytes_per_param:.4f} bytes per parameter")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_table_is_the_golden_one(name):
    golden = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert text(name) == golden, "look at the difference; then python tests/test_plan_tables.py"


def test_every_golden_file_has_an_architecture():
    assert {path.stem for path in _FOLDER.glob("*.txt")} == set(_ARCHITECTURES)


@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_bytes_per_parameter(name):
    plan = gx.plan_by_shape(_ARCHITECTURES[name]())
    if name in _SMALL_LEAVES_ONLY:
        assert all(isinstance(leaf.kind, gx.Exact) for leaf in plan.leaves)
    else:
        assert plan.bytes_per_param < _BOUND


@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_no_large_leaf_is_heavy(name):
    for leaf in gx.plan_by_shape(_ARCHITECTURES[name]()).leaves:
        if isinstance(leaf.kind, gx.Exact):
            assert leaf.size <= SMALL_LEAF, leaf.path
        else:
            assert leaf.nbytes <= (1 + 5 / DUAL_MIN) * leaf.size, leaf.path


if __name__ == "__main__":
    _FOLDER.mkdir(exist_ok=True)
    for each in _ARCHITECTURES:
        (_FOLDER / f"{each}.txt").write_text(text(each), encoding="utf-8")
