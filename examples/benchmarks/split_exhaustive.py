"""Splits and merges all 2^32 float32 numbers, in chunks, and counts what does not hold.

    python examples/benchmarks/split_exhaustive.py

For every pattern of bits, in bfloat16 and float16, with 24 and 32 bits: the bound of the error that
`gx.split_weights` states, the sign, NaN and infinity, and that splitting what was merged gives the
same parts again.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import write
from jaxtyping import Array
from rich.console import Console
from rich.progress import track

import gefen_jax as gx

CHUNK = 1 << 24
FORMS = tuple(itertools.product(("bfloat16", "float16"), (24, 32)))


def _bits(x: Array) -> Array:
    dtype = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16
    return jax.lax.bitcast_convert_type(x, dtype)


def _within(theta: Array, back: Array, dtype: str, bits: int) -> Array:
    """Whether a finite number came back as near as stated; in integers, which nothing rounds."""
    magnitude, found = (_bits(x) & 0x7FFFFFFF for x in (theta, back))
    error = jnp.where(magnitude > found, magnitude - found, found - magnitude)
    if dtype == "bfloat16":
        return error <= (1 << 7 if bits == 24 else 0)
    # float16: in units of the last place above 2^-14 (24 bits) and 2^-17 (32), absolute below.
    normal = magnitude >= ((127 - 14) << 23 if bits == 24 else (127 - 17) << 23)
    near = error <= (1 << 4 if bits == 24 else 0)
    absolute = jnp.abs(theta - back) <= 2.0**-41 + (2.0**-33 if bits == 24 else 0)
    # What rounds to 65536 or more has an infinite weight.
    beyond = magnitude >= (127 + 16) << 23
    infinite = found == 0x7F800000
    edge = (magnitude > ((127 + 16) << 23) - (1 << 5)) & infinite
    return jnp.where(beyond, infinite, jnp.where(normal, near | edge, absolute))


@functools.partial(jax.jit, static_argnames=("dtype", "bits"))
def violations(start: Array, dtype: str, bits: int) -> dict[str, Array]:
    """How many numbers of a chunk break each rule."""
    pattern = start + jnp.arange(CHUNK, dtype=jnp.uint32)
    theta = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    weight, correction = gx.split_weights(theta, bits, dtype)
    back = gx.merge_weights(weight, correction)
    again, second = gx.split_weights(back, bits, dtype)
    is_nan = (pattern & 0x7FFFFFFF) > 0x7F800000
    is_inf = (pattern & 0x7FFFFFFF) == 0x7F800000
    found_nan = (_bits(back) & 0x7FFFFFFF) > 0x7F800000
    found_inf = (_bits(back) & 0x7FFFFFFF) == 0x7F800000
    rules = {
        "NaN stays one": is_nan == found_nan,
        "infinity stays one": ~is_inf | found_inf,
        "the sign stays": is_nan | ((_bits(back) >> 31) == pattern >> 31),
        "error within the bound": is_nan | is_inf | _within(theta, back, dtype, bits),
        "parts stay": is_nan | ((_bits(weight) == _bits(again)) & (correction == second)),
    }
    return {rule: jnp.sum(~holds) for rule, holds in rules.items()}


def main() -> None:
    """Runs all of it, prints and writes the counts."""
    totals: dict[str, Any] = {f"{dtype}, {bits} bits": {} for dtype, bits in FORMS}
    for start in track(range(0, 1 << 32, CHUNK), "Splitting"):
        for dtype, bits in FORMS:
            counts = totals[f"{dtype}, {bits} bits"]
            for rule, count in violations(np.uint32(start), dtype, bits).items():
                counts[rule] = counts.get(rule, 0) + int(count)
    Console().print(totals)
    write("split_exhaustive.json", "python examples/benchmarks/split_exhaustive.py", totals)


if __name__ == "__main__":
    main()
