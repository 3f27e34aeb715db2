"""The tasks of the quality bench: small enough for one core, large enough to tell optimizers apart.

Each task's recipe is what people use for its kind of model; `best_lr`, the middle of the bench's
grid, is the best for AdamW of the few peaks tried while the tasks were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import char_lm
import jax
import quality_models as models
from flax import nnx
from quality_data import Data, code_text, digits, prose_text
from quality_pretrained import lora_init, lora_loss, pretrained
from quality_train import Problem

Params = Any


@dataclass(frozen=True)
class Task:
    """A problem, made when needed, with its recipe and the seconds of a run on one core."""

    prepare: Callable[[bool], Problem]  # of whether it is to be tiny, for a test
    steps: int
    best_lr: float
    b2: float
    weight_decay: float
    seconds: float
    spike: float = 1.0  # as in `Recipe`


def _decay_but_norms(params: Params) -> Params:
    """Matrices only: stacked norm scales have two axes as well, so their names decide."""

    def decays(path: Any, leaf: jax.Array) -> bool:
        return leaf.ndim >= 2 and not char_lm.path_of(path).endswith("norm")

    return jax.tree_util.tree_map_with_path(decays, params)


def _text(quick: bool, make: Callable[[int, int, int], Data] = code_text) -> Data:
    return make(*((16, 2, 4) if quick else (128, 8, 256)))


def _gpt(quick: bool, data: Data) -> Problem:
    width, layers, heads, context = (48, 1, 2, 16) if quick else (144, 4, 4, 128)
    config = char_lm.Config(d_model=width, layers=layers, heads=heads, context=context)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: char_lm.GPT(config, nnx.Rngs(0))), nnx.Param)

    def init(seed: int) -> Params:
        return nnx.split(char_lm.GPT(config, nnx.Rngs(seed)), nnx.Param)[1]

    def loss(params: Params, _: Any, windows: jax.Array) -> jax.Array:
        return char_lm.loss_fn(params, graphdef, windows)

    return Problem(init, (), loss, char_lm.decay_mask, data)


def gpt(quick: bool) -> Problem:
    """Byte-level GPT of 1.06M parameters, with a tied head, on code."""
    return _gpt(quick, _text(quick))


def llama(quick: bool) -> Problem:
    """Llama-like decoder of 0.80M parameters, with stacked layers, on code."""
    size = models.LlamaSize(48, 96, 2, 2, 1) if quick else models.LlamaSize()
    loss = models.llama_loss(size)
    return Problem(
        lambda seed: models.llama_init(size, seed), (), loss, _decay_but_norms, _text(quick)
    )


def vit(quick: bool) -> Problem:
    """Vision transformer of 0.45M parameters on digits."""
    size = models.VitSize(48, 1, 2) if quick else models.VitSize()
    data = digits(*((4, 2) if quick else (64, 16)))
    return Problem(
        lambda seed: models.vit_init(size, seed),
        (),
        models.vit_loss(size),
        char_lm.decay_mask,
        data,
    )


def finetune(quick: bool) -> Problem:
    """The GPT, pre-trained on code, goes on with prose: every parameter is trained."""
    base = _pretrained_gpt(quick)
    problem = _gpt(quick, _text(quick, prose_text))
    return problem._replace(init=lambda _: base)


def lora(quick: bool) -> Problem:
    """The same, but only pairs of rank 8 beside the blocks' matrices are trained."""
    base = _pretrained_gpt(quick)
    problem = _gpt(quick, _text(quick, prose_text))
    loss = lora_loss(problem.loss)
    return problem._replace(init=lambda seed: lora_init(base, seed), frozen=base, loss=loss)


def _pretrained_gpt(quick: bool) -> Params:
    steps = 2 if quick else TASKS["gpt"].steps
    return pretrained(gpt(quick), f"gpt, quick {quick}", steps, TASKS["gpt"].best_lr)


TASKS: dict[str, Task] = {
    "gpt": Task(gpt, 600, 4e-3, b2=0.99, weight_decay=0.1, seconds=120),
    "llama": Task(llama, 600, 2e-3, b2=0.99, weight_decay=0.1, seconds=120),
    "vit": Task(vit, 400, 1e-3, b2=0.999, weight_decay=0.1, seconds=36),
    "finetune": Task(finetune, 400, 4e-3, b2=0.999, weight_decay=0.01, seconds=80),
    "lora": Task(lora, 400, 8e-3, b2=0.999, weight_decay=0.0, seconds=80),
    "gpt_spike": Task(gpt, 600, 4e-3, b2=0.99, weight_decay=0.1, seconds=120, spike=100.0),
}
