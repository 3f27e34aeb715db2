"""The axis rule: which box of a leaf explains the size of its gradient.

With y the magnitude of the gradient, element by element (the root mean square over the gradients
given), a box explains the share

    R^2 = Var(mean of y over each box) / Var(y),   less the 1/n that n independent values give,

of the variance of y. That is what sharing nu inside the box keeps; the rest is lost. Among the
boxes that come within a tenth of the best one, the one nearest to the target size is taken: larger
boxes save bytes, smaller ones give the momentum shorter scale groups. The reference looks at the
logarithm of y^2 (`gefen_jax._period`), along flat runs, and by its local peaks. Here it misled:
the tokens that a batch does not hold make up most of its variance, so that two tokens may share,
and nearly as much is explained in an output layer by what all tokens have in common.

Everything is float32 and jitted, and works on sharded gradients: only one number per candidate
reaches the host.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from gefen_jax._blocks import Shape, block_size, runs_divide, split
from gefen_jax._candidates import (
    block_by_shape,
    candidate_blocks,
    describe_block,
    distance_to_target,
    is_output_layer,
)
from gefen_jax._paths import LeafSpec
from gefen_jax._replicated import replicated

_NO_STRUCTURE = 0.01  # explained share below which blocks are noise
_NEAR_BEST = 0.9


class Evidence(NamedTuple):
    """What the axis rule knows of a leaf."""

    finite: bool
    zero: bool
    explained: tuple[float, ...]  # one share per candidate block


def _evidence(
    *grads: Float[Array, "*shape"], blocks: tuple[Shape, ...]
) -> tuple[Array, Array, Array]:
    peak = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(g)).astype(jnp.float32) for g in grads])
    # Divided by the peak first, no square overflows, and none of size 1e-20 vanishes.
    safe = jnp.where(peak > 0, peak, 1)
    squares = [jnp.square(g.astype(jnp.float32) / safe) for g in grads]
    square = functools.reduce(jnp.add, squares) / len(grads)
    size = jnp.sqrt(square)
    mean = _staged_mean(size)
    y = size - mean
    variance = _staged_mean(y * y)
    explained = _explained(y, blocks) / jnp.where(variance > 0, variance, 1)
    # XLA's maximum on a CPU passes over NaN; a mean does not.
    return jnp.isfinite(peak) & jnp.isfinite(mean), peak == 0, explained


def _staged_mean(x: Array) -> Array:
    """The mean, axis by axis: one float32 sum over 1e8 elements would lose digits."""
    while x.ndim:
        x = jnp.mean(x, axis=-1)
    return x


def _explained(y: Float[Array, "*shape"], blocks: tuple[Shape, ...]) -> Float[Array, "blocks"]:
    """Variance of the block means of a centred y, for every block."""
    variances = []
    for block in blocks:
        blocked, inside = split(y, block)
        variances.append(_staged_mean(jnp.square(jnp.mean(blocked, axis=inside))))
    return jnp.stack(variances)


def find_evidence(
    grads: tuple[Array, ...], local: Shape | None = None
) -> tuple[Evidence, tuple[Shape, ...]]:
    """The evidence in one leaf's gradients, and the blocks, in its shards, that it speaks of."""
    shape = grads[0].shape
    blocks = tuple(b for b in candidate_blocks(shape, local) if runs_divide(shape, b))
    finite, zero, explained = replicated(_evidence, *grads, blocks=blocks or (shape,))
    adjusted = tuple(
        float((r - 1 / n) / (1 - 1 / n))
        for r, n in zip(explained, map(block_size, blocks), strict=False)
    )
    return Evidence(bool(finite), bool(zero), adjusted), blocks


def choose_block(
    spec: LeafSpec, blocks: tuple[Shape, ...], evidence: Evidence, local: Shape | None = None
) -> tuple[Shape, str]:
    """The block of a leaf and the reason."""
    shape = spec.shape
    by_shape = block_by_shape(shape, local, is_output=is_output_layer(spec))
    if evidence.zero:
        return by_shape, f"zero gradient: by shape, {describe_block(shape, by_shape, local)}"
    if not blocks:
        return by_shape, f"no run divides {shape}: {describe_block(shape, by_shape, local)}"
    best = max(evidence.explained)
    if not best >= _NO_STRUCTURE:
        return by_shape, f"no structure: {describe_block(shape, by_shape, local)}"
    near = [i for i, r in enumerate(evidence.explained) if r >= _NEAR_BEST * best]
    chosen = min(near, key=lambda i: (distance_to_target(blocks[i]), -evidence.explained[i]))
    share = evidence.explained[chosen]
    words = describe_block(shape, blocks[chosen], local)
    return blocks[chosen], f"peak at {words}: {share:.0%} of the variance of |g|"
