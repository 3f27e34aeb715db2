"""What one second moment per block costs, kernel by kernel: AdamW goes on with it for some steps.

    python examples/benchmarks/shared_nu.py

A run of AdamW on a task of the quality bench is taken up at some of its steps; from there, the
leaves of one name have the mean of nu over every block, all others nu as it is, and the first
moment is exact everywhere. After some steps the validation loss, less that of AdamW on the same
batches, says what sharing costs there; whole runs would scatter more than these differ. Written to
`shared_nu.json`.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import write
from quality import TASKS  # which knows where the tasks' models are
from quality_train import Params, Recipe, Trainer, clipped
from rich.console import Console

At = tuple[Params, Any]  # where a run is: parameters and state

BLOCKS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "row": lambda shape: (*(1 for _ in shape[:-1]), shape[-1]),
    "third of a row": lambda shape: (*(1 for _ in shape[:-1]), shape[-1] // 3),
    "two rows": lambda shape: (*(1 for _ in shape[:-2]), 2, shape[-1]),
    "column": lambda shape: (*(1 for _ in shape[:-2]), shape[-2], 1),
}
_ROWS = "row", "column"
_GPT = {
    "qkv": (*_ROWS, "third of a row"),
    "mlp_in": _ROWS,
    "mlp_out": (*_ROWS, "two rows"),
    "attention_out": _ROWS,
    "tokens": _ROWS,
}
# By task: which blocks are tried where a leaf's path holds a name.
LEAVES = {
    "gpt": _GPT,
    "finetune": _GPT,
    "llama": dict.fromkeys(("embed", "head", "q", "v", "gate", "down"), _ROWS),
}
STARTS, STEPS = (0.2, 0.5), 40  # where a run is taken up, of its steps, and for how many


def shared(nu: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """The mean over every block, in every element of it."""
    split = [k for n, b in zip(nu.shape, block, strict=True) for k in (n // b, b)]
    means = nu.reshape(split).mean(axis=tuple(range(1, len(split), 2)), keepdims=True)
    return jnp.broadcast_to(means, split).reshape(nu.shape)


def scale_by_adam(b2: float, leaves: str, blocks: str) -> optax.GradientTransformation:
    """Adam's update, with nu shared where the path matches ``leaves``; its state is Optax's."""
    inner = optax.scale_by_adam(b2=b2)

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        _, state = inner.update(updates, state)

        def of(path: Any, mu: jax.Array, nu: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if nu.ndim > 1 and fnmatch.fnmatchcase(name, leaves):
                nu = shared(nu, BLOCKS[blocks](nu.shape))
            mu_hat, nu_hat = mu / (1 - 0.9**state.count), nu / (1 - b2**state.count)
            return mu_hat / (jnp.sqrt(nu_hat) + 1e-8)

        return jax.tree_util.tree_map_with_path(of, state.mu, state.nu), state

    return optax.GradientTransformation(inner.init, update)


class SharedNu(Trainer):
    """AdamW as in the bench; ``go_on`` takes it up with another nu."""

    def _prepare(self) -> None:
        self.use("", "row")

    def use(self, leaves: str, blocks: str) -> None:
        recipe = self._recipe
        self._tx = optax.chain(
            clipped(recipe),
            scale_by_adam(recipe.b2, leaves, blocks),
            optax.add_decayed_weights(recipe.weight_decay, self._problem.decay),
            optax.scale_by_learning_rate(self._schedule),
        )
        self._step = jax.jit(self._one_step)

    def advance(self, at: At, batches: Sequence[Any], peak: float) -> At:
        """Parameters and state after a step on every batch."""
        for batch in batches:
            at = self._advance(*at, batch, peak)
        return at

    def after(self, at: At, batches: Sequence[Any], peak: float) -> float:
        """The validation loss after going on."""
        params, _ = self.advance(at, batches, peak)
        return float(self._validate(params, self._problem.frozen, self._problem.data.validation))


def excesses(task_name: str, seed: int) -> dict[str, dict[str, list[float]]]:
    """By leaves and by blocks, the loss less AdamW's from every start."""
    task, leaves = TASKS[task_name], LEAVES[task_name]
    recipe = Recipe("adamw", task.steps, task.b2, task.weight_decay)
    trainer, peak = SharedNu(task.prepare(False), recipe, seed), task.best_lr
    batches = list(itertools.islice(trainer._batches(), task.steps))
    starts = [round(task.steps * part) for part in STARTS]
    taken: dict[int, At] = {}
    at = trainer._begin(peak)
    for before, start in itertools.pairwise([0, *starts]):
        at = taken[start] = trainer.advance(at, batches[before:start], peak)
    ahead = {start: batches[start : start + STEPS] for start in starts}
    exact = {start: trainer.after(taken[start], ahead[start], peak) for start in starts}
    found: dict[str, dict[str, list[float]]] = {}
    for name, blocks in ((name, blocks) for name, of in leaves.items() for blocks in of):
        trainer.use(f"*{name}*", blocks)
        losses = (trainer.after(taken[start], ahead[start], peak) for start in starts)
        of = [round(loss - exact[start], 5) for start, loss in zip(starts, losses, strict=True)]
        found.setdefault(name, {})[blocks] = of
        Console().print(f"{task_name}, {name}, {blocks}: {of}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", nargs="+", choices=LEAVES, default=list(LEAVES))
    options = parser.parse_args(argv)
    results = {task: excesses(task, options.seed) for task in options.task}
    write("shared_nu.json", "python examples/benchmarks/shared_nu.py", results)


if __name__ == "__main__":
    main()
