"""The reference's period search: flat runs of the squared gradient (host side, float64).

For every divisor p of N that leaves at least four blocks, L_i is the mean of log(g^2 + 1e-12)
over block i and

    score(p) = mean_i |L_{i+1} - L_i|.

The period is the best strict interior local maximum among the candidates above 8; a period above
1024 becomes the smallest divisor of N above 1024 that divides it. (Gefen, arXiv 2606.13894, as its
package does it, with one logarithm in all instead of one per divisor.)
"""

import math

import numpy as np
from jaxtyping import Float, Float64, Int64

_FLOOR = 1e-12
_MIN_BLOCKS = 4
_SMALLEST_PEAK = 8  # a peak must lie above this
_CAP = 1024
_GROUP_CAP = 256


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def period_scores(
    square: Float[np.ndarray, "n"],
) -> tuple[Int64[np.ndarray, "candidates"], Float64[np.ndarray, "candidates"]]:
    """The candidate periods, ascending, and their scores."""
    n = square.size
    divisors = _divisors(n)
    periods = [p for p in divisors if p < n and n // p >= _MIN_BLOCKS]
    sums = {1: np.log(square.astype(np.float64) + _FLOOR)}
    scores = []
    for p in periods:
        if p > 1:
            # From the longest runs already summed that divide p. Equal blocks get equal sums, to
            # the last bit, which a cumulative sum's differences would not give them.
            q = max(q for q in sums if p % q == 0)
            sums[p] = np.einsum("ij->i", sums[q].reshape(-1, p // q))
        scores.append(np.mean(np.abs(np.diff(sums[p] / p))))
    return np.asarray(periods, np.int64), np.asarray(scores, np.float64)


def find_period(square: Float[np.ndarray, "n"]) -> int:
    """The period of a flattened squared gradient, float32; 1 where nothing peaks."""
    n = square.size
    periods, scores = period_scores(square)
    peaks = [
        (scores[i], int(periods[i]))
        for i in range(1, len(periods) - 1)
        if periods[i] > _SMALLEST_PEAK and scores[i - 1] < scores[i] > scores[i + 1]
    ]
    if not peaks:
        return 1
    period = max(peaks)[1]  # ties: the larger period
    if period <= _CAP:
        return period
    return min(d for d in _divisors(n) if d > _CAP and period % d == 0)


def scale_group(n: int, period: int) -> int:
    """Elements that share a momentum scale: the period, or for 1 a divisor of at most 256."""
    if period > 1:
        return period
    return max((d for d in _divisors(n) if d <= _GROUP_CAP), default=1)
