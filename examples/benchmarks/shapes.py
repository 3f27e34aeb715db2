"""Parameter trees of real models, as shapes: nothing here allocates.

Kernels are [in, out], as Flax has them; convolutions are [height, width, in, out].
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dense(*shape: int) -> Tree:
    return {"kernel": _array(*shape), "bias": _array(shape[-1])}


def _norm(width: int) -> Tree:
    return {"scale": _array(width), "bias": _array(width)}


def transformer_block(width: int, mlp: int) -> Tree:
    """A layer of GPT-2 or ViT: twelve leaves."""
    return {
        "ln_1": _norm(width),
        "attn": {"qkv": _dense(width, 3 * width), "out": _dense(width, width)},
        "ln_2": _norm(width),
        "mlp": {"up": _dense(width, mlp), "down": _dense(mlp, width)},
    }


def gpt2_small() -> Tree:
    """GPT-2 small, 124M: learned positions, tied head."""
    width = 768
    return {
        "wte": {"embedding": _array(50_257, width)},
        "wpe": {"embedding": _array(1024, width)},
        "h": {str(i): transformer_block(width, 4 * width) for i in range(12)},
        "ln_f": _norm(width),
    }


def llama_1b() -> Tree:
    """A Llama-like decoder of 1.5B: RMSNorm, SwiGLU, 8 key-value heads of 64, untied head."""
    width, mlp, vocabulary, kv = 2048, 8192, 128_256, 8 * 64

    def block() -> Tree:
        return {
            "attention_norm": {"scale": _array(width)},
            "q": {"kernel": _array(width, width)},
            "k": {"kernel": _array(width, kv)},
            "v": {"kernel": _array(width, kv)},
            "o": {"kernel": _array(width, width)},
            "mlp_norm": {"scale": _array(width)},
            "gate": {"kernel": _array(width, mlp)},
            "up": {"kernel": _array(width, mlp)},
            "down": {"kernel": _array(mlp, width)},
        }

    return {
        "embed": {"embedding": _array(vocabulary, width)},
        "layers": {str(i): block() for i in range(16)},
        "norm": {"scale": _array(width)},
        "head": {"kernel": _array(width, vocabulary)},
    }


def vit_b16() -> Tree:
    """ViT-B/16 for 224 x 224 images and 1,000 classes, 86.6M."""
    width = 768
    return {
        "patches": _dense(16, 16, 3, width),
        "cls": _array(1, 1, width),
        "positions": _array(1, 197, width),
        "blocks": {str(i): transformer_block(width, 4 * width) for i in range(12)},
        "norm": _norm(width),
        "head": _dense(width, 1000),
    }


def resnet50() -> Tree:
    """ResNet-50, 25.6M: bottlenecks of 1x1, 3x3 and 1x1 convolutions, each with BatchNorm."""

    def conv(side: int, into: int, out: int) -> Tree:
        return {"conv": {"kernel": _array(side, side, into, out)}, "norm": _norm(out)}

    tree: Tree = {"stem": conv(7, 3, 64)}
    into = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for i in range(count):
            block = {
                "1": conv(1, into, width),
                "2": conv(3, width, width),
                "3": conv(1, width, 4 * width),
            }
            if i == 0:
                block["shortcut"] = conv(1, into, 4 * width)
            tree[f"stage{stage}_{i}"] = block
            into = 4 * width
    return tree | {"head": _dense(into, 1000)}
