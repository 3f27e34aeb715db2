"""The body of the kernel of the step of shared blocks.

Its specification is `gefen_jax._step`, in plain jnp, whose docstring has the equations, and for the
nearest code `gefen_jax._encoder`. The same numbers come out but for rounding; what is computed
otherwise, and why:

- What is divided by is a block's, so its inverse is taken once, and elements are multiplied by it.
  Divisions and roots of GPUs are approximations by themselves. So an m / scale may be two roundings
  away from the plain step's, and its code the neighbour where a border lies between the two. A
  block's largest may come out beyond 1, and so beyond all borders, as it should.
- The largest |m| is that of the floats' bits, in which NaN comes last.
- Squares are added up in another order.

A block that fits is held as a whole, and memory is read once. A longer one is read twice, in turns:
for its largest m and its squares, and to write. The second pass computes m once more, from codes
that it then writes over: every element is read before it is written, in one turn.

What every language of kernels does in its own way is a `pallas_kernels._program.Program`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._program import Program
from pallas_kernels._shared_step_config import SharedLayout
from pallas_kernels._step import (
    INFINITY,
    TINY,
    Form,
    Move,
    Scalars,
    bits_of,
    float_of,
    inverse_of,
    leaves,
    read_scalars,
    root_of,
)

CODES = 256


class Encoder(NamedTuple):
    """Refs of the tables of the nearest code: see `pallas_kernels.SharedTables`."""

    codebook: Any
    count_below: Any = None
    next_threshold: Any = None


class _Elements(NamedTuple):
    """A turn's elements: where they are, gradients, and the first moments that these give."""

    at: Int[Array, "..."]
    mask: Bool[Array, "..."]
    g: Float[Array, "..."]
    m: Float[Array, "..."]


class _Stats(NamedTuple):
    """What a block's elements share, a step later."""

    scale: Float[Array, "..."]
    inverse_scale: Float[Array, "..."]
    inverse_root: Float[Array, "..."] | None  # of nu; None where every element has its own


def encode(x: Float[Array, "..."], encoder: Encoder, program: Program) -> Int[Array, "..."]:
    """The nearest code of each x, as in `gefen_jax._encoder.encode`."""
    if encoder.count_below is None:
        return _search(x, encoder.codebook, program)
    (bins,) = encoder.count_below.shape
    # Clamped as integers, so that nothing can index outside the table, beyond 1 or NaN.
    number = jnp.minimum(jnp.maximum(((x + 1) * (bins // 2)).astype(jnp.int32), 0), bins - 1)
    code = program.gather(encoder.count_below, number).astype(jnp.int32)
    return jnp.where(x > program.gather(encoder.next_threshold, number), code + 1, code)


def _search(x: Float[Array, "..."], codebook: Any, program: Program) -> Int[Array, "..."]:
    """searchsorted (left) in eight halving steps, then the rule's own comparison."""
    i, step = jnp.zeros(x.shape, jnp.int32), CODES // 2
    while step:
        i = jnp.where(x > program.gather(codebook, i + (step - 1)), i + step, i)
        step //= 2
    below = jnp.maximum(i - 1, 0)
    distances = (jnp.abs(x - program.gather(codebook, k)) for k in (below, i))
    return jnp.where(next(distances) <= next(distances), below, i)


def _reader(
    g_ref: Any,
    codes_ref: Any,
    codebook_ref: Any,
    scale: Float[Array, "..."],
    scalars: Scalars,
    program: Program,
    layout: SharedLayout,
) -> Callable[[Any], _Elements]:
    """What reads the elements of a turn."""

    def read(turn: Any) -> _Elements:
        item = program.item + turn * program.items
        at = (program.row * layout.period + item) * layout.inner + program.column
        mask = (
            (program.row < layout.blocks) & (item < layout.period) & (program.column < layout.inner)
        )
        g = program.load(g_ref, at, mask).astype(jnp.float32) * scalars["gradient_factor"]
        codes = program.load(codes_ref, at, mask).astype(jnp.int32)
        m = program.gather(codebook_ref, codes) * scale
        m = m + scalars["one_minus_b1"] * (g - m)
        if program.padded:
            # A code of 0 stands for -1 times the scale: what pads a block must not be its maximum.
            m = jnp.where(mask, m, 0)
        return _Elements(at, mask, g, m)

    return read


def _largest_and_squares(
    read: Callable[[Any], _Elements], first: _Elements | None, program: Program
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Of every block the bits of its largest |m|, and the sum of its g^2."""
    if first is not None:
        largest, squares = bits_of(jnp.abs(first.m)), first.g * first.g
    else:

        def look(turn: Any, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            x = read(turn)
            return jnp.maximum(so_far[0], bits_of(jnp.abs(x.m))), so_far[1] + x.g * x.g

        # Zeros that lie like the elements do: Mosaic keeps constants otherwise.
        zeros = program.item & 0
        start = zeros, zeros.astype(jnp.float32)
        largest, squares = jax.lax.fori_loop(0, program.turns, look, start)
    return program.largest(largest), program.total(squares)


def shared_step_body(
    inputs: Sequence[Any],
    old: Sequence[Any],
    new: Sequence[Any],
    program: Program,
    layout: SharedLayout,
    form: Form,
) -> None:
    """What a program does: see `pallas_kernels._step.Call`. Leaves are [blocks * period * inner].

    Inputs: scalars, the words of the leaf and of the step, g, and the fields of an `Encoder`. The
    words are for the weight, if a fraction rounds it; the leaf's last is its position.
    """
    scalars_ref, leaf_ref, step_ref, g_ref, *tables = inputs
    (old_refs, new_refs), encoder = leaves(old, new, form), Encoder(*tables)
    scalars = read_scalars(scalars_ref)
    block = program.block_row * layout.inner + program.block_column
    block_mask = (program.block_row < layout.blocks) & (program.block_column < layout.inner)
    # All threads of a block read these, and one writes them: behind the reductions, for which they
    # wait for each other.
    scale = program.load_of_blocks(old_refs.scale, block, block_mask)
    nu = None
    if not layout.nu_per_element:
        nu = program.load_of_blocks(old_refs.nu, block, block_mask)
    read = _reader(g_ref, old_refs.mu, encoder.codebook, scale, scalars, program, layout)

    first = read(0) if program.turns == 1 else None
    largest, squares = _largest_and_squares(read, first, program)
    # NaN becomes inf, as an infinite scale makes the block's updates NaN.
    scale = float_of(jnp.minimum(largest, INFINITY))
    inverse = None
    if nu is not None:
        nu = _next_nu(nu, squares * np.float32(1 / layout.period), scalars)
        inverse = _inverse_root(nu, scalars)
        program.store_of_blocks(new_refs.nu, block, nu, block_mask)
    program.store_of_blocks(new_refs.scale, block, scale, block_mask)
    stats = _Stats(scale, 1 / jnp.maximum(scale, TINY), inverse)

    words = (leaf_ref[0], step_ref[0], leaf_ref[1]) if form.stochastic else None
    move = Move(old_refs, new_refs, scalars, words, program, layout, form)
    if first is not None:
        _write(first, stats, encoder, move)
        return

    def write(turn: Any, nothing: tuple[()]) -> tuple[()]:
        _write(read(turn), stats, encoder, move)
        return nothing

    jax.lax.fori_loop(0, program.turns, write, ())


def _next_nu(
    nu: Float[Array, "..."], square: Float[Array, "..."], scalars: Scalars
) -> Float[Array, "..."]:
    return scalars["b2"] * nu + scalars["one_minus_b2"] * square


def _inverse_root(nu: Float[Array, "..."], scalars: Scalars) -> Float[Array, "..."]:
    root = root_of(nu, scalars)
    # A square that overflowed would freeze its block for ever (x / inf = 0): inf * 0 makes its
    # updates NaN.
    return inverse_of(root + root * 0)


def _write(x: _Elements, stats: _Stats, encoder: Encoder, move: Move) -> None:
    """Codes the elements, and moves the weights."""
    program, scalars, old = move.program, move.scalars, move.old
    code = encode(x.m * stats.inverse_scale, encoder, program)
    program.store(move.new.mu, x.at, code, x.mask)
    inverse = stats.inverse_root
    if inverse is None:
        nu = _next_nu(program.load(old.nu, x.at, x.mask), x.g * x.g, scalars)
        inverse = _inverse_root(nu, scalars)
        program.store(move.new.nu, x.at, nu, x.mask)
    out = program.gather(encoder.codebook, code) * (stats.scale * scalars["m_factor"] * inverse)
    if move.form.nesterov:
        out = out + x.g * scalars["g_factor"] * inverse
    move(x.at, x.mask, out)
