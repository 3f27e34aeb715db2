"""How far updates are from Adam's, on made-up gradients, without training.

    python examples/benchmarks/update_error.py

Losses of short runs do not see what a rare setting does (a first moment that remembers a thousand
steps, an epoch of as many batches as a Fibonacci number); these numbers do, in two minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _common import write
from jax import random
from jaxtyping import Array, Float
from rich.console import Console

import gefen_jax as gx

SHAPE = (32, 256)
STEPS, SKIPPED = 3000, 1000
KINDS = ("dual_code", "wide_dual_code", "shared_blocks")
_KEY, _SEEN = random.key(0), random.key(1)

Gradient = Callable[[Any], Float[Array, "*shape"]]


def _noise(step: Any) -> Float[Array, "*shape"]:
    return random.normal(random.fold_in(_KEY, step), SHAPE)


def _with_mean(step: Any) -> Float[Array, "*shape"]:
    """Elements have means of their own, half as large as the noise."""
    return _noise(step) + 0.5 * random.normal(_SEEN, SHAPE)


def _seldom(shape: tuple[int, ...], step: Any) -> Float[Array, "*shape"]:
    return jnp.where(random.uniform(random.fold_in(_SEEN, step), shape) < 0.01, _noise(step), 0)


def _heavy(step: Any) -> Float[Array, "*shape"]:
    return random.t(random.fold_in(_KEY, step), 2.0, SHAPE)


class Case(NamedTuple):
    """A stream of gradients, and what both optimizers are called with."""

    gradient: Gradient
    arguments: dict[str, Any] = {}


_B1 = (0.9, 0.95, 0.98, 0.99, 0.999)
CASES = {
    **{f"noise around a mean, b1 {b1}": Case(_with_mean, {"b1": b1}) for b1 in _B1},
    **{f"noise, b2 {b2}": Case(_noise, {"b2": b2}) for b2 in (0.95, 0.99, 0.999, 0.9999)},
    "noise, heavy tails": Case(_heavy),
    "rows seen once in 100 steps": Case(lambda step: _seldom((SHAPE[0], 1), step)),
    "elements seen once in 100 steps": Case(lambda step: _seldom(SHAPE, step)),
    "noise, again every 89 steps": Case(lambda step: _noise(step % 89)),
    "noise, again every 90 steps": Case(lambda step: _noise(step % 90)),
}


def measure(case: Case, kind: Any) -> dict[str, float]:
    """Root mean squares over elements and steps of Adam's updates, of ours and of the difference.

    ``drift`` is that of the mean over steps: what is left of errors in the long run; ``largest`` is
    of our updates. All after a warm-up.
    """
    params = {"w": jnp.zeros(SHAPE)}
    adam = optax.scale_by_adam(**case.arguments)
    ours = gx.scale_by_gefen(**case.arguments, plan=gx.plan_by_shape(params, kind=kind))

    def step(carry: Any, number: Any) -> Any:
        adam_state, state, sums = carry
        g = {"w": case.gradient(number)}
        updates, adam_state = adam.update(g, adam_state)
        our_updates, state = ours.update(g, state)
        expected, found = jax.tree.leaves((updates, our_updates))
        error = found - expected
        new = (jnp.square(expected), jnp.square(found), jnp.square(error), error)
        sums = tuple(s + jnp.where(number < SKIPPED, 0, x) for s, x in zip(sums, new, strict=True))
        return (adam_state, state, sums), jnp.where(number < SKIPPED, 0, jnp.abs(found).max())

    def run() -> Any:
        start = adam.init(params), ours.init(params), (jnp.zeros(SHAPE),) * 4
        (_, _, sums), largest = jax.lax.scan(step, start, jnp.arange(STEPS))
        return sums, largest.max()

    (square, own, error, drift), largest = jax.jit(run)()
    counted = STEPS - SKIPPED
    return {
        "adam": math.sqrt(square.mean() / counted),
        "ours": math.sqrt(own.mean() / counted),
        "error": math.sqrt(error.mean() / counted),
        "drift": math.sqrt(jnp.mean(jnp.square(drift / counted))),
        "largest": float(largest),
    }


def main() -> None:
    console, results = Console(), {}
    for name, case in CASES.items():
        results[name] = {kind: measure(case, kind) for kind in KINDS}
        console.print(name, {kind: f"{of['error']:.3f}" for kind, of in results[name].items()})
    write("update_error.json", "python examples/benchmarks/update_error.py", results)


if __name__ == "__main__":
    main()
