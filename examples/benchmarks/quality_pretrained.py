"""Fine-tuning for the quality bench: a pre-trained GPT, kept on disk, and LoRA pairs for it.

Pre-training takes minutes and is the same for every run, so its result is kept in a folder beside
this file, under a name made from everything that it depends on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from char_lm import path_of
from quality_train import Problem, Recipe, Trainer

CACHE = Path(__file__).parent / ".cache"
RANK, SCALE = 8, 2.0
_ADAPTED = re.compile(r"blocks/(\d+)/(\w+)/kernel")

Params = Any


def pretrained(problem: Problem, name: str, steps: int, lr: float) -> Params:
    """The parameters of seed 0 after AdamW; `name` says which model and data these are."""
    recipe = Recipe("adamw", steps, b2=0.99, weight_decay=0.1)
    what = f"{name} {recipe} {lr} {problem.data.sha256} jax {jax.__version__}"
    path = CACHE / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"
    leaves, structure = jax.tree.flatten(problem.init(0))
    if not path.exists():
        trained = jax.tree.leaves(Trainer(problem, recipe, seed=0).run(lr).params)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: two processes may be at it.
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, *trained)
        partial.replace(path)
    with np.load(path) as stored:
        loaded = [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, loaded)


def _kernels(base: Params) -> dict[str, list[jax.Array]]:
    """The blocks' matrices by name, layer after layer."""
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        if match := _ADAPTED.match(path_of(path)):
            found.setdefault(match[2], []).append(leaf)
    return found


def lora_init(base: Params, seed: int) -> Params:
    """Pairs a [layers, in, rank] and b [layers, rank, out], b being zero: no change at first.

    Stacked, because the pairs of a single layer are so small here that they would be left to exact
    moments, and nothing would be compared.
    """
    kernels = _kernels(base)
    keys = jax.random.split(jax.random.key(seed), len(kernels))
    pairs = {}
    for key, (name, layers) in zip(keys, kernels.items(), strict=True):
        into, out = layers[0].shape
        a = into**-0.5 * jax.random.normal(key, (len(layers), into, RANK))
        pairs[name] = {"a": a, "b": jnp.zeros((len(layers), RANK, out))}
    return pairs


def lora_loss(loss: Callable[[Params, Any, Any], jax.Array]) -> Callable[..., jax.Array]:
    """The loss of a model as a function of (pairs, frozen model, batch)."""

    def of_pairs(pairs: Params, base: Params, batch: Any) -> jax.Array:
        def adapted(path: Any, weight: jax.Array) -> jax.Array:
            match = _ADAPTED.match(path_of(path))
            if match is None:
                return weight
            layer, pair = int(match[1]), pairs[match[2]]
            return weight + SCALE * pair["a"][layer] @ pair["b"][layer]

        return loss(jax.tree_util.tree_map_with_path(adapted, base), (), batch)

    return of_pairs
