"""All that the kernels take from Pallas' Triton dialect, in one place.

The dialect is deprecated since jax 0.11 and will be removed: where it is missing, this package
still imports, and a launch raises.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

try:
    from jax.experimental.pallas import triton
except ImportError:  # a jax after the dialect's removal
    triton: Any = None

LANES = 16  # entries of a table that `lookup` reads: a half-warp holds each of them once


def is_available() -> bool:
    """Whether this jax has the Triton dialect of Pallas."""
    return triton is not None


def compiler_params(num_warps: int) -> Any:
    """The parameters of a launch; NotImplementedError where the dialect is missing."""
    if triton is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton dialect of Pallas"
            " (jax.experimental.pallas.triton): use the XLA backend, or an older jax"
        )
    # One stage: there is no loop to pipeline.
    return triton.CompilerParams(num_warps=num_warps, num_stages=1)


def load(ref: Any, at: tuple[Array, ...], mask: Array) -> Array:
    """The elements at arrays of indices, 0 where the mask is False."""
    return triton.load(ref.at[at], mask=mask, other=0)


def store(ref: Any, at: tuple[Array, ...], value: Array, mask: Array) -> None:
    """Writes where the mask is True, in the dtype that the memory has."""
    triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def lookup_assembly() -> str:
    """PTX: the lane's own entry by four levels of selections, and one shuffle.

    Only the shuffle is left per lookup: the selections are the same for all of a table, and ptxas
    keeps one copy. Inside one piece of assembly all the same: what holds one value per lane must
    never be an array that Triton may hand from lane to lane.
    """
    lines = [
        f".reg .b32 lane, bit, t<{LANES - 1}>;",
        ".reg .pred p<4>;",
        "mov.u32 lane, %laneid;",
    ]
    entries, used = [f"${i + 2}" for i in range(LANES)], 0
    for level in range(4):
        lines += [f"and.b32 bit, lane, {1 << level};", f"setp.ne.b32 p{level}, bit, 0;"]
        chosen = []
        for low, high in zip(entries[::2], entries[1::2], strict=True):
            lines.append(f"selp.b32 t{used}, {high}, {low}, p{level};")
            chosen.append(f"t{used}")
            used += 1
        entries = chosen
    # Lanes 16 to 31 hold the entries once more; an index takes them from the first half.
    lines.append(f"shfl.sync.idx.b32 $0, {entries[0]}, $1, 0x1f, 0xffffffff;")
    return "{ " + " ".join(lines) + " }"


class Table(NamedTuple):
    """16 numbers for `lookup`."""

    entries: Sequence[Float[Array, ""]] | Float[Array, "16"]
    interpret: bool

    @classmethod
    def read(cls, ref: Any, number: int, interpret: bool) -> "Table":
        """One of the tables that lie in memory one behind the other."""
        at = range(number * LANES, (number + 1) * LANES)
        # Interpreted, one vector: programs of many small operations take long to compile.
        return cls(ref[...][at.start : at.stop] if interpret else [ref[i] for i in at], interpret)


def lookup(table: Table, index: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entries of a table, at indices from 0 to 15.

    A load at computed addresses would do, but Triton lays such loads out one element per thread and
    moves addresses and results through shared memory: 29 barriers in a kernel that needs 3.
    """
    if table.interpret:  # which has no assembly
        return jnp.asarray(table.entries)[index]
    entries = (jnp.broadcast_to(entry, index.shape) for entry in table.entries)
    (result,) = triton.elementwise_inline_asm(
        lookup_assembly(),
        args=[index, *entries],
        constraints="=f,r" + ",f" * LANES,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(index.shape, jnp.float32)],
    )
    return result
