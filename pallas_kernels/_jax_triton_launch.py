"""The launch of a step by `jax_triton.triton_call`, where that package is installed."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels._dual_step_config import DualLayout
from pallas_kernels._layout import MAX_WARPS
from pallas_kernels._one_after_another import OLDEST_JAX, one_after_another
from pallas_kernels._step import Call

_OLDEST = (0, 4, 1)  # whose references are written in place
_WRITTEN = ("param_ptr", "codes_ptr", "scale_ptr", "nu_ptr", "correction_ptr")
_SHARED_INPUTS = 7  # of shared blocks, with the tables of a lookup
_OPTIONS = {
    # Of CUDA 12.8, the first for every Blackwell. Left alone, Triton 3.9 names that of its own
    # assembler, 9.4; what jax takes instead, of CUDA 13.0 say, refuses it.
    "ptx_version": 87,
    "enable_fp_fusion": True,  # as XLA does; the default is about to change
}
# Of programs of 16 warps: two fit on a multiprocessor, so that one reads while the other computes.
_REGISTERS = 64


def is_available() -> bool:
    """Whether there are a jax_triton and a jax that will do; Python must be 3.12 or newer."""
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return jax_triton.__version_info__ >= _OLDEST and jax.__version_info__ >= OLDEST_JAX


def launch(call: Call) -> Sequence[Array]:
    """What the call writes."""
    layout, config, form = call.layout, call.config, call.form
    if not is_available():
        raise NotImplementedError(
            "`backend` 'jax_triton' needs jax-triton 0.4.1 or newer, with Python 3.12 and jax"
            " 0.11.2 or newer: pip install 'gefen_jax[triton]', or use another backend"
        )
    if call.interpret:
        raise NotImplementedError("`backend` 'jax_triton' has no `interpret`: use another backend")
    # Here, as it takes time, and is an extra.
    import jax_triton  # pyright: ignore[reportMissingImports]

    kernel, static = _kernel_of(call)
    warps, registers = config.num_warps, _REGISTERS if config.num_warps > 8 else None
    if isinstance(layout, DualLayout) and form.bits is not None and warps == MAX_WARPS:
        # A thread of these takes more registers than there are for each of so many.
        warps, registers = warps // 2, 2 * _REGISTERS

    # Besides, it keeps the elimination of dead code away from the call: jax-triton's rule for that,
    # of 0.4.1, does not take the arguments of jax 0.12.
    @one_after_another
    def run(inputs: list[Array], written: list[Array]) -> list[Array]:
        refs = [jax.new_ref(x) for x in written]
        # Where no parameter is given, that pointer is the one to `out`.
        names = _WRITTEN if form.fused else _WRITTEN[1:]
        pointers: dict[str, Any] = {"correction_ptr": None} | dict(zip(names, refs, strict=False))
        new = jax_triton.triton_call(
            *inputs,
            **pointers,
            **static,
            faster=layout.faster,
            strides=layout.strides,
            tile=config.tile(layout),
            fused=form.fused,
            nesterov=form.nesterov,
            bits=form.bits,
            stochastic=form.stochastic,
            kernel=kernel,
            out_type=call.out,
            grid=config.programs(layout),
            num_warps=warps,
            num_stages=1,  # nothing is read ahead
            backend_options=_OPTIONS | {"maxnreg": registers},
            name=call.name,
        )
        return [*new, *map(jax.freeze, refs)]

    return run(call.inputs, call.written)


def _kernel_of(call: Call) -> tuple[Any, dict[str, Any]]:
    """The kernel that does what the call's body does, and of its arguments those of its own.

    Imports Triton.
    """
    layout = call.layout
    if isinstance(layout, DualLayout):
        from pallas_kernels._jax_triton import dual_step_kernel

        sizes = layout.blocks, layout.stretches, layout.half, layout.inner
        return dual_step_kernel, {"layout": sizes}
    from pallas_kernels._jax_triton_shared import shared_step_kernel

    static: dict[str, Any] = {
        "layout": (layout.blocks, layout.period, layout.inner),
        "nu_per_element": layout.nu_per_element,
        "bins": 0,
    }
    if len(call.inputs) == _SHARED_INPUTS:
        return shared_step_kernel, static | {"bins": call.inputs[-1].size}
    return shared_step_kernel, static | dict.fromkeys(("count_below_ptr", "next_threshold_ptr"))
