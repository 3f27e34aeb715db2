"""The body of the kernel of Adam's own step, for many small leaves at once.

A leaf of a few thousand elements takes a GPU no longer than a kernel takes to start, and a model
has more of these than of large ones. So they are laid one behind the other, as if they were one
leaf, each from a new program on; a program finds out whose it is, and steps that one.

Its specification is `gefen_jax._exact`, in plain jnp. The same numbers come out but for rounding:
m + (1 - b1) (g - m) stands for b1 m + (1 - b1) g.

What every language of kernels does in its own way is a `pallas_kernels._program.Program`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._exact_step_config import ExactLayout
from pallas_kernels._program import Program
from pallas_kernels._step import Form, Leaf, Move, read_scalars, root_of


def exact_step_body(
    inputs: Sequence[Any],
    old: Sequence[Any],
    new: Sequence[Any],
    program: Program,
    layout: ExactLayout,
    form: Form,
) -> None:
    """What a program does: see `pallas_kernels._step.Call`.

    Inputs: scalars, the words of the leaves and of the step, and every leaf's g. Old and new: every
    leaf's parameter, then every leaf's mu, and so on. The words are for the weights, if fractions
    round them; the last of the leaves' is their position.
    """
    scalars_ref, leaf_ref, step_ref, *gradients = inputs
    scalars, number = read_scalars(scalars_ref), len(layout.sizes)
    every = zip(gradients, _by_leaf(old, layout), _by_leaf(new, layout), strict=True)
    for i, (g_ref, old_refs, new_refs) in enumerate(every):
        words = (leaf_ref[i], step_ref[0], leaf_ref[number]) if form.stochastic else None
        move = Move(old_refs, new_refs, scalars, words, program, layout, form)
        first, end = layout.programs[i : i + 2]
        ours = (program.number >= first) & (program.number < end)
        at = program.column - layout.starts[i]
        pl.when(ours)(functools.partial(_step, g_ref, at, at < layout.sizes[i], move))


def _by_leaf(refs: Sequence[Any], layout: ExactLayout) -> list[Leaf]:
    number, found = len(layout.sizes), []
    for i in range(number):
        param, mu, nu, *correction = refs[i::number]
        found.append(Leaf(param, mu, None, nu, *correction))
    return found


def _step(g_ref: Any, at: Any, mask: Any, move: Move) -> None:
    """Of the elements there."""
    (old, new), program, scalars = move[:2], move.program, move.scalars
    g = program.load(g_ref, at, mask).astype(jnp.float32) * scalars["gradient_factor"]
    mu, nu = program.load(old.mu, at, mask), program.load(old.nu, at, mask)
    mu = mu + scalars["one_minus_b1"] * (g - mu)
    nu = scalars["b2"] * nu + scalars["one_minus_b2"] * (g * g)
    program.store(new.mu, at, mu, mask)
    program.store(new.nu, at, nu, mask)
    out = mu * scalars["m_factor"]
    if move.form.nesterov:
        out = out + g * scalars["g_factor"]
    move(at, mask, out / root_of(nu, scalars))
