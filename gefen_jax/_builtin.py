"""The codebooks that need no data, and their derivation.

Momentum that was divided by its block's largest magnitude, for blocks of elements drawn half
from a normal and half from a Laplace distribution of the same variance: between them lie the
gradients of most layers. The expected histogram follows in closed form, and the dynamic programme
of `gefen_jax._codebook` does the rest. `builtin_codebooks.json` holds the results;
``python -m gefen_jax._builtin`` writes it again, and a test compares the two.
"""

import functools
import importlib.resources
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np

from gefen_jax._codebook import bin_centers, solve
from gefen_jax._constants import CODES, DUAL_BLOCK, HISTOGRAM_BINS, LEVELS, TARGET_BLOCK
from gefen_jax._levels import on_grid

_FILE = "builtin_codebooks.json"
# By the number of entries, the elements of the blocks that they are used for.
_BLOCKS = {CODES: TARGET_BLOCK, LEVELS: DUAL_BLOCK}
_QUANTILES = 512  # of the block's maximum


@functools.cache
def builtin_codebook(codes: int = CODES) -> tuple[float, ...]:
    """The 256 or 16 entries, float32 values, sorted, with -1, 0 and 1 among them."""
    text = importlib.resources.files("gefen_jax").joinpath(_FILE).read_text(encoding="utf-8")
    return tuple(np.asarray(json.loads(text)[str(codes)], np.float32).tolist())


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _laplace_cdf(x: np.ndarray) -> np.ndarray:
    tail = 0.5 * np.exp(-math.sqrt(2) * np.abs(x))
    return np.where(x < 0, tail, 1 - tail)


def _maximum_quantiles(cdf: Callable[[np.ndarray], np.ndarray], block: int) -> np.ndarray:
    """Equally likely values of max |z| over a block, by inverting (2 F(m) - 1)^n."""
    grid = np.linspace(0, 40, 400_001)
    return np.interp((np.arange(_QUANTILES) + 0.5) / _QUANTILES, (2 * cdf(grid) - 1) ** block, grid)


def expected_histogram(block: int) -> np.ndarray:
    """The expected share of z / max |z| over a block in every bin."""
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    total = np.zeros(HISTOGRAM_BINS)
    for cdf in (_normal_cdf, _laplace_cdf):
        for maximum in _maximum_quantiles(cdf, block):
            mass = np.diff(cdf(edges * maximum))
            total += mass / mass.sum()
    return (total + total[::-1]) / (4 * _QUANTILES)


def derive(codes: int = CODES, block: int | None = None) -> np.ndarray:
    """A codebook from its distribution, float32; of 16 entries, on the grid that rounding wants."""
    histogram = expected_histogram(_BLOCKS[codes] if block is None else block)
    codebook = solve(bin_centers(), histogram, codes)
    return on_grid(codebook) if codes == LEVELS else codebook


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name(_FILE)
    entries = (f'"{n}": [{", ".join(str(c) for c in derive(n))}]' for n in _BLOCKS)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
