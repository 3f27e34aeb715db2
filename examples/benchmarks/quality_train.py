"""Training for the quality bench: one optimizer on one problem from one seed.

What a seed decides, the initialisation and the batches, is the same for every optimizer, so that
their losses can be compared in pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quality_data import Data
from quality_variants import NARROW, VARIANTS

import gefen_jax as gx

Params = Any
CURVE_POINTS, LAST_EVALUATIONS = 8, 3


class Problem(NamedTuple):
    """All of a task but the optimizer."""

    init: Callable[[int], Params]  # the trained parameters at the start, by seed
    frozen: Any  # what the loss reads and nobody trains; () for nothing
    loss: Callable[[Params, Any, Any], jax.Array]  # of (params, frozen, batch)
    decay: Callable[[Params], Any]  # which leaves the weight decay applies to
    data: Data


@dataclass(frozen=True)
class Recipe:
    """How to train, but for the learning rate and the seed."""

    variant: str
    steps: int
    b2: float
    weight_decay: float
    grad_dtype: str = "float32"
    spike: float = 1.0  # what one gradient, in the middle of the run, is multiplied by


class Outcome(NamedTuple):
    """What a run leaves behind."""

    loss: float  # validation, mean of the last evaluations
    curve: list[tuple[int, float]]  # (step, validation loss)
    state_bytes: int
    seconds: float
    cpu_seconds: float  # what it takes on a core of its own
    params: Params


def clipped(recipe: Recipe) -> optax.GradientTransformation:
    """What happens to a gradient before an optimizer sees it.

    A spike comes after the clipping, which would take it back.
    """
    clip = optax.clip_by_global_norm(1.0)
    if recipe.spike == 1.0:
        return clip

    def spike(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.where(state == recipe.steps // 2, recipe.spike, 1.0)
        return optax.tree.scale(factor, updates), state + 1

    count = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), spike)
    return optax.chain(clip, count)


class PeakSchedule:
    """Warm-up over a tenth of the steps, then a cosine down to a tenth of the peak.

    The peak is set while a step is traced, to an argument of that step: one compilation then serves
    all learning rates.
    """

    def __init__(self, steps: int):
        warmup = max(1, steps // 10)
        total = max(steps, warmup + 1)
        self._peak: Any = 1.0
        self._shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total, end_value=0.1)

    def __call__(self, count: Any) -> Any:
        return self._peak * self._shape(count)

    @contextmanager
    def at(self, peak: Any) -> Iterator[None]:
        """Only within may the schedule be traced: a tracer must not outlive its trace."""
        self._peak = peak
        try:
            yield
        finally:
            self._peak = 1.0


class Trainer:
    """A problem, a recipe and a seed, compiled once for all learning rates.

    To train with something else than Optax, a subclass replaces `_prepare`, `_begin`, `_advance`
    and `_state_bytes`.
    """

    versions: Mapping[str, str] = {}  # of what else trains, for the rows

    def __init__(self, problem: Problem, recipe: Recipe, seed: int):
        self._problem, self._recipe, self._seed = problem, recipe, seed
        self._params = problem.init(seed)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        self._schedule = PeakSchedule(recipe.steps)
        self._validate = jax.jit(self._validation_loss)
        self._prepare()

    def _prepare(self) -> None:
        """Makes what all learning rates share."""
        problem, recipe = self._problem, self._recipe
        gradient = jax.jit(jax.grad(problem.loss))
        first = gradient(self._params, problem.frozen, next(self._batches()))
        variant = VARIANTS[recipe.variant](
            self._schedule,
            b2=recipe.b2,
            weight_decay=recipe.weight_decay,
            mask=problem.decay,
            params=self._params,
            grads=self._cast(first),
        )
        self._tx = optax.chain(clipped(recipe), variant)
        self._step = jax.jit(self._one_step, donate_argnums=(0, 1))

    def _begin(self, peak: float) -> tuple[Params, Any]:
        """Parameters and state before the first step."""
        params = jax.tree.map(jnp.copy, self._params)  # the step donates them
        opt_state = self._tx.init(params)
        if self._recipe.variant in NARROW:
            params, _ = gx.split_weights(params)
        return params, opt_state

    def _advance(
        self, params: Params, opt_state: Any, batch: Any, peak: float
    ) -> tuple[Params, Any]:
        return self._step(params, opt_state, self._problem.frozen, batch, peak)

    def _state_bytes(self, opt_state: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))

    def _batches(self) -> Iterator[Any]:
        rng = np.random.default_rng(self._seed)
        while True:
            yield self._problem.data.batch(rng)

    def _cast(self, grads: Params) -> Params:
        if self._recipe.variant in NARROW:
            return grads  # in the weights' dtype
        return jax.tree.map(lambda g: g.astype(self._recipe.grad_dtype), grads)

    def _one_step(
        self, params: Params, opt_state: Any, frozen: Any, batch: Any, peak: jax.Array
    ) -> tuple[Params, Any]:
        grads = self._cast(jax.grad(self._loss)(params, frozen, batch))
        with self._schedule.at(peak):
            updates, opt_state = self._tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _validation_loss(self, params: Params, frozen: Any, validation: Any) -> jax.Array:
        return jax.lax.map(lambda batch: self._loss(params, frozen, batch), validation).mean()

    def _loss(self, params: Params, frozen: Any, batch: Any) -> jax.Array:
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return self._problem.loss(wide, frozen, batch)

    def run(self, peak: float) -> Outcome:
        """Trains from the start at one learning rate."""
        started, cpu_started = time.perf_counter(), time.process_time()
        problem, steps = self._problem, self._recipe.steps
        params, opt_state = self._begin(peak)
        on_curve, last = evaluation_steps(steps)
        losses: dict[int, float] = {}
        for step, batch in zip(range(1, steps + 1), self._batches(), strict=False):
            params, opt_state = self._advance(params, opt_state, batch, peak)
            if step in on_curve | last:
                evaluated = self._validate(params, problem.frozen, problem.data.validation)
                losses[step] = float(evaluated)
        curve = [(step, losses[step]) for step in sorted(on_curve)]
        final = float(np.mean([losses[step] for step in last]))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        state_bytes = self._state_bytes(opt_state)
        return Outcome(final, curve, state_bytes, seconds, cpu_seconds, params)


def evaluation_steps(steps: int) -> tuple[set[int], set[int]]:
    """Evenly spaced steps for the curve, and the last ones, two hundredths of the run apart."""
    on_curve = {max(1, round(steps * k / CURVE_POINTS)) for k in range(1, CURVE_POINTS + 1)}
    gap = max(1, steps // 50)
    return on_curve, {max(1, steps - k * gap) for k in range(LAST_EVALUATIONS)}
