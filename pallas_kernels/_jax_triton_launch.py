"""The launch of a dual code's step by `jax_triton.triton_call`, where that package is installed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels._dual_step import Form
from pallas_kernels._dual_step_config import DualLayout, DualStepConfig, next_power_of_two

_MISSING = (
    "this kernel needs the package jax-triton 0.4.1 or newer, and so Python 3.12 and jax 0.11 or"
    " newer: pip install 'gefen_jax[triton]', or use another backend"
)


def launch(
    layout: DualLayout,
    config: DualStepConfig,
    form: Form,
    inputs: list[Array],
    written: list[Array],
    out: list[jax.ShapeDtypeStruct],
) -> list[Array]:
    """What a step writes; all but ``out``, the update, where it was.

    Inputs: scalars, phase, tables, g. Written: the parameter in the fused form, codes, scale,
    exponent, and a correction if there is one.
    """
    try:
        import jax_triton  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        from pallas_kernels._jax_triton import dual_step_kernel  # noqa: PLC0415
    except ImportError as error:
        raise NotImplementedError(_MISSING) from error

    # Its own rule for vmap, which triton_call lacks. It also keeps the elimination of dead code
    # away from the call: jax-triton's rule for that (0.4.1) does not have the arguments of jax 0.12.
    @jax.custom_batching.custom_vmap
    def call(inputs: list[Array], written: list[Array]) -> list[Array]:
        refs = [jax.new_ref(x) for x in written]
        param, codes, scale, exponent, correction = [
            *([] if form.fused else [None]),
            *refs,
            *([None] if form.bits in (None, 16) else []),
        ]
        new = jax_triton.triton_call(
            *inputs,
            # Without it, the pointer is that of `out_type`.
            **({"param_ptr": param} if form.fused else {}),
            codes_ptr=codes,
            scale_ptr=scale,
            exponent_ptr=exponent,
            correction_ptr=correction,
            layout=(layout.blocks, layout.stretches, layout.half, layout.inner),
            tile=(config.rows, next_power_of_two(layout.pairs), config.columns),
            fused=form.fused,
            nesterov=form.nesterov,
            bits=form.bits,
            stochastic=form.stochastic,
            kernel=dual_step_kernel,
            out_type=out,
            grid=pl.cdiv(layout.blocks, config.rows) * pl.cdiv(layout.inner, config.columns),
            num_warps=config.num_warps,
            num_stages=1,  # there is no loop to pipeline
            name="gefen_dual_step_fused" if form.fused else "gefen_dual_step",
        )
        return [*new, *map(jax.freeze, refs)]

    @call.def_vmap
    def one_by_one(size: int, batched: Any, *arrays: Any) -> Any:
        def stacked(x: Array, batched: bool) -> Array:
            return x if batched else jnp.broadcast_to(x, (size, *x.shape))

        new = jax.lax.map(lambda x: call(*x), jax.tree.map(stacked, arrays, tuple(batched)))
        return new, [True] * len(new)

    return call(inputs, written)
