"""What could give shared blocks the loss back that they cost, on the tasks of the quality bench.

    python examples/benchmarks/quality_shared.py --task gpt --seeds 0 1 --lr-factors 1
    python examples/benchmarks/quality_report.py

It takes the options of `quality.py` and appends to the same file, where "gefen, shared blocks" are
the blocks that `calibrate` finds in the first gradient, for the whole run.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import quality
from quality_train import Params, Trainer, clipped

import gefen_jax as gx

GRADIENTS = 8  # in one calibration
CHANGE_AFTER = 0.1  # of the run: the warm-up's length
ADAMW_RMS = 0.2  # of AdamW's updates, about (Liu et al., Muon is Scalable for LLM Training, 2025)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a run's blocks and codebook are found."""

    first: Callable[[SharedTrainer, Params], gx.Plan]
    # The plan from then on, of the trainer, parameters, state and plan; None for one that stays.
    later: Callable[[SharedTrainer, Params, Any, gx.Plan], gx.Plan] | None = None
    matched: bool = False  # every leaf's update is scaled to the same root mean square


def _calibrated(number: int, trainer: SharedTrainer, params: Params) -> gx.Plan:
    return gx.calibrate(params, trainer.gradients(params, number))


def _by_shape(_: SharedTrainer, params: Params) -> gx.Plan:
    return gx.plan_by_shape(params, kind="shared_blocks")


def _by_row(trainer: SharedTrainer, params: Params, columns: str = "", thirds: str = "") -> gx.Plan:
    """A block is one input's weights; where a path matches ``columns``, one output's.

    Where it matches ``thirds``, a third of a row: of q, k or v.
    """
    plan = _calibrated(1, trainer, params)
    for leaf in plan.leaves:
        if isinstance(leaf.kind, gx.SharedBlocks):
            axis = len(leaf.shape) - (2 if fnmatch.fnmatchcase(leaf.path, columns) else 1)
            parts = 3 if fnmatch.fnmatchcase(leaf.path, thirds) else 1
            block = tuple(n // parts if i == axis else 1 for i, n in enumerate(leaf.shape))
            plan = plan.with_kind(leaf.path, gx.SharedBlocks(block))
    return plan


def _again(trainer: SharedTrainer, params: Params, _state: Any, _plan: gx.Plan) -> gx.Plan:
    return _calibrated(GRADIENTS, trainer, params)


def _codebook_of_momentum(
    _: SharedTrainer, params: Params, opt_state: Any, plan: gx.Plan
) -> gx.Plan:
    """The same blocks, and the codebook that is best for the momentum as it is."""
    mu = optax.tree.get(gx.to_adam(opt_state, params, plan), "mu")
    learned = gx.calibrate(params, mu)
    return dataclasses.replace(plan, codebook=learned.codebook)


_ONE = functools.partial(_calibrated, 1)
VARIANTS = {
    f"gefen, shared blocks, {name}": variant
    for name, variant in {
        f"{GRADIENTS} gradients": Variant(functools.partial(_calibrated, GRADIENTS)),
        "by shape": Variant(_by_shape),
        "by row": Variant(_by_row),
        "by row, mlp_in by column": Variant(functools.partial(_by_row, columns="*mlp_in*")),
        "by row, qkv by column": Variant(functools.partial(_by_row, columns="*qkv*")),
        "by row, qkv in thirds": Variant(functools.partial(_by_row, thirds="*qkv*")),
        "planned again": Variant(_ONE, _again),
        "codebook of the momentum": Variant(_ONE, _codebook_of_momentum),
        "matched updates": Variant(_ONE, matched=True),
    }.items()
}


def _match(update: Any) -> jax.Array:
    rms = jnp.sqrt(jnp.mean(jnp.square(update)))
    return update * jnp.where(rms > 0, ADAMW_RMS / rms, 0)


class SharedTrainer(Trainer):
    """The bench's trainer; the plan may change in the middle of a run."""

    def gradients(self, params: Params, number: int) -> list[Params]:
        """On as many of the run's first batches."""
        batches = itertools.islice(self._batches(), number)
        return [
            self._cast(self._gradient(params, self._problem.frozen, batch)) for batch in batches
        ]

    def _prepare(self) -> None:
        self._gradient = jax.jit(jax.grad(self._problem.loss))
        self._variant = VARIANTS[self._recipe.variant]
        self._first = self._variant.first(self, self._params)

    def _begin(self, peak: float) -> tuple[Params, Any]:
        self._taken = 0
        self._use(self._first)
        return super()._begin(peak)

    def _use(self, plan: gx.Plan) -> None:
        """Trains with this plan from now on."""
        recipe, self._plan = self._recipe, plan
        self._tx = optax.chain(
            clipped(recipe),
            gx.scale_by_gefen(b2=recipe.b2, plan=plan),
            optax.stateless_with_tree_map(lambda u, _: _match(u))
            if self._variant.matched
            else optax.identity(),
            optax.add_decayed_weights(recipe.weight_decay, self._problem.decay),
            optax.scale_by_learning_rate(self._schedule),
        )
        self._step = jax.jit(self._one_step, donate_argnums=(0, 1))

    def _advance(
        self, params: Params, opt_state: Any, batch: Any, peak: float
    ) -> tuple[Params, Any]:
        if self._variant.later and self._taken == round(CHANGE_AFTER * self._recipe.steps):
            plan = self._variant.later(self, params, opt_state, self._plan)
            opt_state = gx.replan(opt_state, params, self._plan, plan)
            self._use(plan)
        self._taken += 1
        return super()._advance(params, opt_state, batch, peak)


def main(argv: Sequence[str] | None = None) -> None:
    quality.main(argv, tuple(VARIANTS), SharedTrainer)


if __name__ == "__main__":
    main()
