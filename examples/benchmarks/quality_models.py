"""Models of the quality bench in plain JAX: a Llama-like decoder and a vision transformer.

The decoder's layers are stacked on a leading axis and run by `lax.scan`, so its leaves are
[layers, in, out]; the vision transformer's are a list of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any


@dataclass(frozen=True)
class LlamaSize:
    """Grouped-query attention needs `heads` to be a multiple of `kv_heads`."""

    width: int = 128
    mlp: int = 352
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2


@dataclass(frozen=True)
class VitSize:
    """Images are 8 x 8, patches 2 x 2."""

    width: int = 96
    layers: int = 4
    heads: int = 4


def _normal(key: jax.Array, *shape: int, gain: float = 1.0) -> jax.Array:
    """Variance gain^2 / fan-in, the fan-in being the last axis but one."""
    return gain * shape[-2] ** -0.5 * jax.random.normal(key, shape)


# ------------------------------------------------------------------------------- the decoder


def llama_init(size: LlamaSize, seed: int) -> Params:
    """Writers into the residual stream start smaller the deeper the model, as in GPT-2."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    width, layers, head = size.width, size.layers, size.width // size.heads
    out_gain = (2 * layers) ** -0.5
    return {
        "embed": width**-0.5 * jax.random.normal(next(keys), (256, width)),
        "layers": {
            "attention_norm": jnp.ones((layers, width)),
            "q": _normal(next(keys), layers, width, width),
            "k": _normal(next(keys), layers, width, size.kv_heads * head),
            "v": _normal(next(keys), layers, width, size.kv_heads * head),
            "o": _normal(next(keys), layers, width, width, gain=out_gain),
            "mlp_norm": jnp.ones((layers, width)),
            "gate": _normal(next(keys), layers, width, size.mlp),
            "up": _normal(next(keys), layers, width, size.mlp),
            "down": _normal(next(keys), layers, size.mlp, width, gain=out_gain),
        },
        "norm": jnp.ones(width),
        "head": _normal(next(keys), width, 256),
    }


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _rotary(x: jax.Array) -> jax.Array:
    """Turns the halves of each head's vector against each other, by angles that grow with time."""
    context, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.outer(jnp.arange(context), frequencies)[None, :, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def llama_loss(size: LlamaSize) -> Callable[[Params, Any, jax.Array], jax.Array]:
    """Mean cross entropy per byte, a function of (params, nothing, windows)."""

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, size.width // size.heads)

        y = _rms_norm(x, p["attention_norm"])
        q, k, v = _rotary(heads(y @ p["q"])), _rotary(heads(y @ p["k"])), heads(y @ p["v"])
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ p["o"]
        y = _rms_norm(x, p["mlp_norm"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    def loss(params: Params, _: Any, windows: jax.Array) -> jax.Array:
        tokens = windows.astype(jnp.int32)
        x, _ = jax.lax.scan(layer, params["embed"][tokens[:, :-1]], params["layers"])
        logits = _rms_norm(x, params["norm"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


# ------------------------------------------------------------------- the vision transformer


def vit_init(size: VitSize, seed: int) -> Params:
    """Pre-norm blocks with biases, as in ViT.

    But for the head, which starts at zero there: every other gradient of the first batch would be
    zero then, and calibration would have nothing to look at.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 4 * size.layers))
    width = size.width
    out_gain = (2 * size.layers) ** -0.5

    def dense(*shape: int, gain: float = 1.0) -> Params:
        return {"kernel": _normal(next(keys), *shape, gain=gain), "bias": jnp.zeros(shape[-1])}

    def norm() -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block() -> Params:
        return {
            "norm1": norm(),
            "qkv": dense(width, 3 * width),
            "attention_out": dense(width, width, gain=out_gain),
            "norm2": norm(),
            "mlp_in": dense(width, 4 * width),
            "mlp_out": dense(4 * width, width, gain=out_gain),
        }

    return {
        "patches": dense(4, width),
        # As large as the patches, or the first hundreds of steps go into telling them apart.
        "positions": 0.5 * jax.random.normal(next(keys), (16, width)),
        "blocks": [block() for _ in range(size.layers)],
        "norm": norm(),
        "head": dense(width, 10),
    }


def _dense(x: jax.Array, p: Params) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _layer_norm(x: jax.Array, p: Params) -> jax.Array:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-6) * p["scale"] + p["bias"]


def vit_loss(size: VitSize) -> Callable[[Params, Any, Any], jax.Array]:
    """Mean cross entropy per image, a function of (params, nothing, (images, labels))."""

    def block(x: jax.Array, p: Params) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = _dense(_layer_norm(x, p["norm1"]), p["qkv"])
        qkv = qkv.reshape(batch, tokens, 3, size.heads, width // size.heads)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + _dense(attended.reshape(x.shape), p["attention_out"])
        return x + _dense(
            jax.nn.gelu(_dense(_layer_norm(x, p["norm2"]), p["mlp_in"])), p["mlp_out"]
        )

    def loss(params: Params, _: Any, batch: Any) -> jax.Array:
        images, labels = batch
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = _dense(patches, params["patches"]) + params["positions"]
        for p in params["blocks"]:
            x = block(x, p)
        logits = _dense(_layer_norm(x, params["norm"]).mean(axis=1), params["head"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss
