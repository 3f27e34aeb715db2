"""Statistics of the quality bench: learning rates and paired differences, from rows of results.

A loss of None, a run that diverged, counts as infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev
from typing import Any, NamedTuple

Row = dict[str, Any]
# Runs are compared only if they share all of these.
SETUP = ("task", "steps", "b2", "grad_dtype", "data_sha256")
BASELINE = "adamw"
# 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Paired(NamedTuple):
    """A mean difference over seeds, and half the width of its 95 % interval."""

    mean: float
    half_width: float  # NaN for fewer than two pairs
    pairs: int


class Comparison(NamedTuple):
    """A variant beside the baseline in one setup."""

    variant: str
    lr: float  # the baseline's best
    loss: float | None  # at that learning rate, mean over seeds; None: not run
    difference: Paired | None  # to the baseline, both at that learning rate; None: no pairs
    own_lr: float
    own_loss: float
    own_difference: Paired | None  # each at its own best
    rates: int  # how many learning rates were run
    seeds: int
    bytes_per_parameter: float


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t.

    Beyond the table, Cornish and Fisher's expansion, which is good to 3 decimals there.
    """
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def paired(differences: Sequence[float]) -> Paired:
    """Mean and interval of differences that belong to one seed each."""
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return Paired(mean(differences), math.nan, count)
    half_width = t_quantile(count - 1) * stdev(differences) / math.sqrt(count)
    return Paired(mean(differences), half_width, count)


def by_setup(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that may be compared; of two of the same job the later."""
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        job = row["variant"], row["lr"], row["seed"]
        groups.setdefault(tuple(row[name] for name in SETUP), {})[job] = row
    return {setup: list(of.values()) for setup, of in groups.items()}


def losses(rows: Sequence[Row], variant: str) -> dict[float, dict[int, float]]:
    """Final losses of a variant, by learning rate and seed."""
    found: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["variant"] == variant:
            loss = math.inf if row["loss"] is None else row["loss"]
            found.setdefault(row["lr"], {})[row["seed"]] = loss
    return found


def of_shared_seeds(of_lr: dict[float, dict[int, float]]) -> dict[float, list[float]]:
    """By learning rate the losses of the seeds that the most rates have run, where there are any.

    A rate with fewer seeds might win by their luck, and one with none of them cannot be judged.
    """
    counts = {
        seed: sum(seed in of for of in of_lr.values()) for of in of_lr.values() for seed in of
    }
    shared = {seed for seed, count in counts.items() if count == max(counts.values())}
    judged = {lr: [of[s] for s in shared if s in of] for lr, of in of_lr.items()}
    return {lr: of for lr, of in judged.items() if of}


def best_lr(of_lr: dict[float, dict[int, float]]) -> float:
    """The learning rate of the lowest mean loss, over the seeds that the most rates have run."""
    judged = of_shared_seeds(of_lr)
    return min(judged, key=lambda lr: mean(judged[lr]))


def _difference(of: dict[int, float], base: dict[int, float]) -> Paired | None:
    seeds = sorted(of.keys() & base.keys())
    return paired([of[seed] - base[seed] for seed in seeds]) if seeds else None


def compare(rows: Sequence[Row], against: str = BASELINE) -> list[Comparison]:
    """Every variant of one setup at the baseline's best rate; nothing without a baseline.

    Differences are to the variant ``against``, at that same rate.
    """
    base = losses(rows, BASELINE)
    if not base:
        return []
    lr = best_lr(base)
    other = losses(rows, against).get(lr, {})
    result = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of_lr = losses(rows, variant)
        here, own_lr = of_lr.get(lr), best_lr(of_lr)
        result.append(
            Comparison(
                variant=variant,
                lr=lr,
                loss=mean(here.values()) if here else None,
                difference=_difference(here, other) if here else None,
                own_lr=own_lr,
                own_loss=mean(of_lr[own_lr].values()),
                own_difference=_difference(of_lr[own_lr], other),
                rates=len(of_lr),
                seeds=len(here or of_lr[own_lr]),
                bytes_per_parameter=mean(
                    row["state_bytes_per_parameter"] for row in rows if row["variant"] == variant
                ),
            )
        )
    return sorted(result, key=lambda c: c.variant != BASELINE)  # stable: the others as they ran
