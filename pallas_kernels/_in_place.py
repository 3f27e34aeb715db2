"""`pl.pallas_call` of a kernel that writes some of its arguments in place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array


def call_in_place(
    kernel: Callable[..., None],
    inputs: list[Array],
    written: list[Array],
    out: list[jax.ShapeDtypeStruct],
    programs: int,
    **options: Any,
) -> Sequence[Array]:
    """What a kernel gives: ``out``, and ``written`` where it was.

    The kernel gets lists of refs: the inputs', those of the old numbers and those of the new ones,
    first ``out``'s. ``options`` are `pl.pallas_call`'s.
    """
    given = len(inputs) + len(written)

    def body(*refs: Any) -> None:
        kernel(refs[: len(inputs)], refs[len(inputs) : given], refs[given:])

    places = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written]
    call = pl.pallas_call(
        body,
        out_shape=[*out, *places],
        grid=(programs,),
        input_output_aliases={len(inputs) + i: len(out) + i for i in range(len(written))},
        **options,
    )
    return call(*inputs, *written)
