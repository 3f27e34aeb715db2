"""How far updates are from AdamW's if two elements' second moments have eight bits together.

    python examples/benchmarks/nu_codes.py

AdamW trains a task of the quality bench, and every way to keep nu sees the same gradients beside
it: rounded at each step, from what it was rounded to before. For the large leaves, with the first
moment exact: the root mean square of Adam's update made of that nu less Adam's own, over elements
and the last two thirds of the steps, relative to Adam's; and the size of that update, likewise. No
run here is trained by what is kept, so seeds hardly matter. Written to `nu_codes.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import write
from quality import TASKS  # which knows where the tasks' models are
from quality_train import Recipe, Trainer
from research_moments import Kept, _fraction, _group, _keep_nu, _round, _ungroup
from rich.console import Console
from rich.table import Table

from gefen_jax._constants import SMALL_LEAF
from gefen_jax._dither import leaf_phases

Keep = Callable[[jax.Array, jax.Array], jax.Array]  # nu and a phase to nu as kept
_B1, _EPS = 0.9, 1e-8
_TINY = np.finfo(np.float32).tiny
_PAIRS = Kept(nu="maximum", nu_levels=256, nu_ratio="float", nu_rounding="golden", nu_pairs=True)


def _as(kept: Kept) -> Keep:
    """As `Kept` says."""

    def keep(nu: jax.Array, phase: jax.Array) -> jax.Array:
        return _keep_nu(nu, nu, nu, kept, _fraction("golden", 0, phase, nu))

    return keep


def _mean_and_share(per_octave: int, octaves: int, shares: Sequence[float]) -> Keep:
    """Of a pair's mean one of equal steps per octave, and the first one's share of the two."""
    levels = np.sort(
        [(1 + i / per_octave) * 2.0**-k for k in range(1, octaves + 1) for i in range(per_octave)]
    )
    kept = Kept()

    def keep(nu: jax.Array, phase: jax.Array) -> jax.Array:
        halves = jnp.split(_group(nu, kept), 2, -1)
        of_mean, of_share = (
            jnp.split(_group(_fraction("golden", i, phase, nu), kept), 2, -1)[0] for i in (0, 1)
        )
        mean = (halves[0] + halves[1]) / 2
        top = 2.0 ** jnp.ceil(jnp.log2(jnp.maximum(jnp.max(mean, -1, keepdims=True), _TINY)))
        both = 2 * top * _round(mean / top, levels, of_mean)
        share = jnp.clip(halves[0] / jnp.maximum(2 * mean, _TINY), shares[0], shares[-1])
        share = _round(share, np.asarray(shares), of_share)
        return _ungroup(jnp.concatenate([both * share, both * (1 - share)], -1), nu, kept)

    return keep


_EIGHT = (0.03, 0.12, 0.25, 0.42, 0.58, 0.75, 0.88, 0.97)
_FOUR = (0.1, 0.36, 0.64, 0.9)
WAYS: dict[str, Keep] = {
    "8 bits, shared (the default)": _as(_PAIRS),
    "4 + 4 bits, one octave apart": _as(Kept(nu="maximum", nu_rounding="golden")),
    "4 + 4 bits, mixed levels": _as(Kept(nu="maximum", nu_ratio="mixed", nu_rounding="golden")),
    "6 bits of the mean, 16 octaves, 2 of the share": _mean_and_share(4, 16, _FOUR),
    "6 bits of the mean, 8 octaves, 2 of the share": _mean_and_share(8, 8, _FOUR),
    "5 bits of the mean, 8 octaves, 3 of the share": _mean_and_share(4, 8, _EIGHT),
    "4 bits of the mean, 8 octaves, 4 of the share": _mean_and_share(
        2, 8, tuple((i + 0.5) / 16 for i in range(16))
    ),
    "10 bits of the mean, 3 of the share": _mean_and_share(64, 16, _EIGHT),
    "8 + 8 bits (wide codes)": _as(
        Kept(nu="maximum", nu_levels=256, nu_ratio="float", nu_rounding="golden")
    ),
}


class Beside(Trainer):
    """AdamW as in the bench, and what is kept beside it."""

    def _prepare(self) -> None:
        super()._prepare()
        self._watch = jax.jit(self._watched, donate_argnums=2)

    def _watched(self, params: Any, opt_state: Any, kept: Any, batch: Any, t: Any) -> Any:
        """What is kept a step later, and sums of squares; ``opt_state`` is AdamW's after it."""
        recipe, problem = self._recipe, self._problem
        grads = jax.grad(problem.loss)(params, problem.frozen, batch)
        grads = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]
        leaves, phases = _large(grads), leaf_phases([str(i) for i in range(len(kept[0]))], t)
        mus, nus = (_large(optax.tree.get(opt_state, name)) for name in ("mu", "nu"))

        def directions(nus: list[jax.Array]) -> list[jax.Array]:
            return [_direction(mu, nu, t, recipe.b2) for mu, nu in zip(mus, nus, strict=True)]

        exact, new, sums = directions(nus), [], []
        for keep, old in zip(WAYS.values(), kept, strict=True):
            next_nus = [
                recipe.b2 * nu + (1 - recipe.b2) * g * g for nu, g in zip(old, leaves, strict=True)
            ]
            new.append([keep(nu, phase) for nu, phase in zip(next_nus, phases, strict=True)])
            ours = directions(new[-1])
            off = [a - b for a, b in zip(ours, exact, strict=True)]
            sums.append(jnp.stack([optax.tree.norm(x, squared=True) for x in (off, ours, exact)]))
        return new, jnp.stack(sums)

    def errors(self, peak: float) -> dict[str, dict[str, float]]:
        """By the way to keep nu."""
        params, opt_state = self._begin(peak)
        kept = [[jnp.zeros_like(x) for x in _large(params)] for _ in WAYS]
        total, steps = np.zeros((len(WAYS), 3)), self._recipe.steps
        for step, batch in zip(range(1, steps + 1), self._batches(), strict=False):
            before = jax.tree.map(jnp.copy, params)  # the step donates them
            params, opt_state = self._advance(params, opt_state, batch, peak)
            kept, sums = self._watch(before, opt_state, kept, batch, jnp.int32(step))
            total += np.asarray(sums) * (step > steps // 3)
        rows = zip(WAYS, np.sqrt(total / total[:, 2:]), strict=True)
        return {
            name: {"error": round(error, 3), "size": round(size, 3)}
            for name, (error, size, _) in rows
        }


def _large(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if x.ndim > 1 and x.size > SMALL_LEAF]


def _direction(mu: jax.Array, nu: jax.Array, t: jax.Array, b2: float) -> jax.Array:
    correction1, correction2 = (1 - b ** t.astype(jnp.float32) for b in (_B1, b2))
    return mu / correction1 / (jnp.sqrt(nu / correction2) + _EPS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="finetune")
    parser.add_argument("--steps", type=int, help="instead of the task's own")
    options = parser.parse_args(argv)
    task = TASKS[options.task]
    recipe = Recipe("adamw", options.steps or task.steps, task.b2, task.weight_decay)
    rows = Beside(task.prepare(False), recipe, 0).errors(task.best_lr)
    write("nu_codes.json", "python examples/benchmarks/nu_codes.py", {options.task: rows})
    table = Table("nu", "error", "size", title=options.task)
    for name, row in rows.items():
        table.add_row(name, *map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
