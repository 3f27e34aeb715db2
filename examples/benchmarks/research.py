"""What to keep of Adam's two moments: a simulation of many ways. `research.md` says what came out.

Moments stay float32 arrays here, rounded to what codes could stand for: no byte is saved, but the
losses are those that a state of that kind would give.

    python examples/benchmarks/research.py --variant adamw pairs --seeds 0 1    # minutes
    python examples/benchmarks/research.py --problem mlp scaled --variant adamw nearest pairs

Each run appends one line to `examples/results/research.jsonl`. A new variant is a new entry of
`VARIANTS`; "adamw", where nothing is rounded, is what the others are compared with.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

sys.path.append(str(Path(__file__).parent.parent))  # where char_lm is
import char_lm  # noqa: E402
from _common import RESULTS, environment  # noqa: E402
from research_moments import Kept, State, depths, scale_by_kept  # noqa: E402

Params = Any
OUT = RESULTS / "research.jsonl"

_PLAIN = Kept(mu_levels=16, nu="maximum", group=64, mu_used="uncoded", nu_used="uncoded")
_RELATIVE = replace(_PLAIN, mu_relative=True)
_CODED = Kept(mu_levels=16, mu_relative=True, nu="maximum")
_GOLDEN = replace(_CODED, mu_rounding="golden", nu_rounding="golden")
_ROOT = math.sqrt(2)
_PAIRS = replace(_GOLDEN, nu_levels=256, nu_ratio="float", nu_pairs=True)

VARIANTS: dict[str, Kept] = {
    "adamw": Kept(),
    "shared-nu": Kept(mu_levels=256, nu="mean", group=1024),
    "shared-nu-alone": Kept(nu="mean", group=1024),
    "factored-nu": Kept(mu_levels=256, nu="factored", group=1024),
    "mu-4-bits": Kept(mu_levels=16, group=64, mu_used="uncoded"),
    "nu-4-bits": Kept(nu="maximum", group=64, nu_used="uncoded"),
    "row-column": replace(_PLAIN, nu="row-column"),
    "plain": _PLAIN,
    "plain-mu-coded": replace(_PLAIN, mu_used="coded"),
    "plain-32": replace(_PLAIN, group=32),
    "plain-128": replace(_PLAIN, group=128),
    "plain-128-random": replace(_PLAIN, group=128, mu_rounding="random"),
    "plain-axis-0": replace(_PLAIN, axis=-2),
    "plain-ratio-1.5": replace(_PLAIN, nu_ratio=1.5),
    "plain-5+3-ratio-4": replace(_PLAIN, mu_levels=32, nu_levels=8, nu_ratio=4.0),
    "relative": _RELATIVE,
    "relative-128": replace(_RELATIVE, group=128),
    "relative-128-random": replace(_RELATIVE, group=128, mu_rounding="random"),
    "relative-128-mu-coded": replace(_RELATIVE, group=128, mu_used="coded"),
    "relative-axis-0": replace(_RELATIVE, axis=-2),
    "relative-128-axis-0": replace(_RELATIVE, group=128, axis=-2),
    "relative-256": replace(_RELATIVE, group=256),
    "relative-1024": replace(_RELATIVE, group=1024),
    "nearest-mu-coded": replace(_CODED, nu_used="uncoded"),
    "nearest-nu-coded": replace(_CODED, mu_used="uncoded"),
    "nearest": _CODED,
    "nearest-root": replace(_CODED, nu_ratio=_ROOT),
    "nearest-5+3": replace(_CODED, mu_levels=32, nu_levels=8),
    "random": replace(_CODED, mu_rounding="random"),
    "random-root": replace(_CODED, mu_rounding="random", nu_ratio=_ROOT),
    "random-5+3": replace(_CODED, mu_levels=32, nu_levels=8, mu_rounding="random"),
    "golden": _GOLDEN,
    "golden-root": replace(_GOLDEN, nu_ratio=_ROOT),
    "golden-mixed": replace(_GOLDEN, nu_ratio="mixed"),
    "golden-mixed-mu": replace(_GOLDEN, nu="exact"),
    "golden-mixed-nu": replace(_GOLDEN, mu_levels=0, nu_ratio="mixed"),
    "pairs": _PAIRS,
    "pairs-axis-0": replace(_PAIRS, axis=-2),
    "pairs-nu": replace(_PAIRS, mu_levels=0),
    "golden-5+3": replace(_GOLDEN, mu_levels=32, nu_levels=8),
}

# -------------------------------------------------------------------------------- the problems


class Problem(NamedTuple):
    """Data and model follow from a seed: parameters, batches, and batches to be judged by."""

    make: Callable[[int, int, int], tuple[Params, Iterator[Any], Any]]  # of seed, batch, steps
    loss: Callable[[Params, Any], Array]
    schedule: Callable[[float, int], optax.Schedule]
    steps: int
    b2: float
    clip: float
    weight_decay: float
    cases: tuple[tuple[int, float], ...]  # batch and learning rate


@functools.cache
def _corpus() -> char_lm.Corpus:
    return char_lm.load_corpus(None, char_lm.Config.corpus_bytes)


def _gpt_make(seed: int, batch: int, steps: int) -> tuple[Params, Iterator[Any], Any]:
    config = char_lm.Config(batch=batch)
    params = nnx.split(char_lm.GPT(config, nnx.Rngs(seed)), nnx.Param)[1]
    rng = np.random.default_rng(seed)
    batches = (char_lm.random_batch(rng, _corpus().train, config) for _ in range(steps))
    return params, batches, char_lm.validation_set(_corpus().validation, config)


def _gpt_loss(params: Params, windows: Array) -> Array:
    model = nnx.eval_shape(lambda: char_lm.GPT(char_lm.Config(), nnx.Rngs(0)))
    return char_lm.loss_fn(params, nnx.split(model, nnx.Param)[0], windows)


def _warmup(lr: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps, end_value=0.1 * lr)


def _regression(
    scaled: bool, seed: int, batch: int, steps: int
) -> tuple[Params, Iterator[Any], Any]:
    """512 noisy examples of a random layer; inputs of very different size, or a layer to learn."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, 128)).astype(np.float32)
    if scaled:
        x *= 10 ** rng.uniform(-2, 0, (1, 128)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((128, 64)).astype(np.float32) / np.sqrt(128))
    y = (y + 0.1 * rng.standard_normal((512, 64))).astype(np.float32)
    sizes = [(128, 64)] if scaled else [(128, 128), (128, 64)]
    gain = 0 if scaled else 128**-0.5
    params = [jnp.asarray(gain * rng.standard_normal(size), jnp.float32) for size in sizes]
    order = np.random.default_rng(seed + 9)
    rows = (order.permutation(512)[:batch] for _ in range(steps))
    return params, ((x[i], y[i]) for i in rows), (x[None], y[None])


def _regression_loss(params: Params, batch: Any) -> Array:
    x, y = batch
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def _regression_problem(scaled: bool, cases: tuple[tuple[int, float], ...]) -> Problem:
    make = functools.partial(_regression, scaled)
    schedule = optax.cosine_decay_schedule
    return Problem(make, _regression_loss, schedule, 600, 0.999, math.inf, 0.0, cases)


_MLP = ((512, 3e-3), (512, 3e-2), (32, 1e-2), (32, 1.7e-2), (32, 3e-2))
PROBLEMS = {
    "gpt": Problem(_gpt_make, _gpt_loss, _warmup, 500, 0.99, 1.0, 0.1, ((8, 2e-3),)),
    "mlp": _regression_problem(False, _MLP),
    "scaled": _regression_problem(True, ((512, 3e-3),)),
}

# ------------------------------------------------------------------------------------ the runs


def make_run(
    problem: Problem, kept: Kept, lr: float, batch: int, steps: int
) -> Callable[[int], tuple[float, State]]:
    """A function of the seed; the seeds share compiled steps."""
    tx = optax.chain(
        optax.clip_by_global_norm(problem.clip),
        scale_by_kept(kept, problem.b2),
        optax.add_decayed_weights(problem.weight_decay, char_lm.decay_mask),
        optax.scale_by_learning_rate(problem.schedule(lr, steps)),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: Any, batch: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(problem.loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def judge(params: Params, batches: Any) -> Array:
        return jnp.mean(jax.lax.map(lambda batch: problem.loss(params, batch), batches))

    def run(seed: int) -> tuple[float, State]:
        params, batches, held_out = problem.make(seed, batch, steps)
        opt_state: Any = tx.init(params)
        for one in batches:
            params, opt_state = step(params, opt_state, one)
        return float(judge(params, held_out)), opt_state[1]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=["gpt"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["adamw", "pairs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", nargs="+", type=float, help="instead of each problem's own")
    parser.add_argument("--steps", type=int, help="instead of each problem's own")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    versions = {name: environment()[name] for name in ("python", "jax")}
    for name, variant in itertools.product(options.problem, options.variant):
        problem, kept = PROBLEMS[name], VARIANTS[variant]
        steps = options.steps or problem.steps
        batches = dict.fromkeys(batch for batch, _ in problem.cases)
        cases = itertools.product(batches, options.lr) if options.lr else problem.cases
        for batch, lr in cases:
            run = make_run(problem, kept, lr, batch, steps)
            for seed in options.seeds:
                start = time.perf_counter()
                loss, state = run(seed)
                row = dict(problem=name, variant=variant, seed=seed, lr=lr, steps=steps)
                row |= dict(b2=problem.b2, batch=batch, loss=loss)
                row |= dict(seconds=round(time.perf_counter() - start, 1), **versions)
                row |= dict(script="research.py", kept=asdict(kept))
                if kept == Kept() and name == "gpt":
                    row["depths"] = depths(problem.make(seed, batch, 0)[0], state)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, {variant}, batch {batch}, lr {lr:g}, seed {seed}: {loss:.5f}")


if __name__ == "__main__":
    main()
