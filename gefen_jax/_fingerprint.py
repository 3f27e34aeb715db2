r"""Sums over the arrays of a tree: whether what was restored is what was saved.

Checkpoint libraries do not notice all that can go wrong: Orbax casts what it reads to the dtypes
that are asked for, so that a state restored for another plan may have numbers that mean nothing,
and its files have no checksums of arrays. What is summed does not depend on where an array lies:
with w the words of 32 bits or less that its elements consist of, and p their row-major positions,

    sum = sum_p mix(w_p ^ mix(p + 1))   mod 2^32,

where mix is a bijection of 32-bit integers ("lowbias32", as in `gefen_jax._dither`). So one word
that differs is always found; of more, one case in 2^32 is missed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, UInt32

from gefen_jax._dither import positions
from gefen_jax._paths import check_names, named_leaves
from gefen_jax._replicated import replicated

_MIX1, _MIX2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def fingerprint(tree: Any) -> dict[str, str]:
    """Dtype, shape and a 32-bit sum of the bits of every array of a tree, by path.

    The same on any mesh, any number of processes and any device. It is plain data, to be saved as
    JSON beside a checkpoint; `check_fingerprint` compares what was restored with it.

    Args:
      tree: Parameters, an optimizer's state, or both: a tree of arrays. None has no entry.

    Returns:
      A string for every leaf, such as ``"uint8[64, 512] 1f83a0c2"``.

    Raises:
      ValueError: If two leaves have one path name.
      TypeError: In `jax.jit`, where there are no numbers yet.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> gx.fingerprint({"w": jnp.zeros((2, 3))})
      {'w': 'float32[2, 3] 61c7f1c0'}
    """
    return dict(_entries(tree))


def check_fingerprint(tree: Any, saved: Mapping[str, str]) -> None:
    """Raises unless a tree is, to the last bit, the one of which ``saved`` is the `fingerprint`.

    Args:
      tree: What was restored.
      saved: What `fingerprint` returned before it was saved.

    Returns:
      None: what fits, passes.

    Raises:
      ValueError: For the first leaf, by name, that has other bits, another dtype or shape, or is in
        one of the two only.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> saved = gx.fingerprint({"w": jnp.zeros((2, 3))})
      >>> gx.check_fingerprint({"w": jnp.zeros((2, 3))}, saved)
      >>> gx.check_fingerprint({"w": jnp.ones((2, 3))}, saved)
      Traceback (most recent call last):
        ...
      ValueError: `w` is damaged: its bits are not those that were saved (float32[2, 3])
    """
    left = dict(saved)
    for path, found in _entries(tree):
        if path not in left:
            raise ValueError(f"`{path}` was not saved: what was saved is of another model or state")
        expected = left.pop(path)
        form, expected_form = (entry.rpartition(" ")[0] for entry in (found, expected))
        if form != expected_form:
            raise ValueError(
                f"`{path}` is {form}, what was saved was {expected_form}: a state is restored with"
                " the plan that it was made with (`Plan.load` of what was saved beside it)"
            )
        if found != expected:
            raise ValueError(
                f"`{path}` is damaged: its bits are not those that were saved ({form})"
            )
    if left:
        raise ValueError(f"`{next(iter(left))}` was saved, and is not in what was restored")


def _entries(tree: Any) -> Iterator[tuple[str, str]]:
    leaves = [(path, x) for path, x in named_leaves(tree) if x is not None]
    check_names(path for path, _ in leaves)
    for path, x in leaves:
        if isinstance(x, Tracer):
            raise TypeError(f"`{path}` has no numbers inside of `jit`: call this outside of it")
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if x.dtype == object or x.dtype == jax.dtypes.float0:
            raise TypeError(f"`{path}` has no numbers: expected an array, found {x!r}")
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        yield path, f"{x.dtype}{list(x.shape)} {_sum_of(x):08x}"


def _sum_of(x: Any) -> int:
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(jnp.int8)
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = jax.lax.bitcast_convert_type(jnp.asarray(x), f"uint{jnp.finfo(x.dtype).bits}")
        x = x.astype(jnp.uint8)
    if isinstance(x, np.ndarray):
        # On the host, where 64 bits are what they are: JAX would make them 32.
        words = np.ascontiguousarray(x).reshape(-1).view(f"u{min(x.itemsize, 4)}")
        return int(replicated(_sum, jnp.asarray(words)))
    if x.sharding.memory_kind == "pinned_host":
        x = jax.device_put(x, x.sharding.with_memory_kind("device"))
    return int(replicated(_sum, x))


def _sum(x: Array) -> UInt32[Array, ""]:
    words = _words(x)
    return jnp.sum(_mix(words ^ _mix(positions(words.shape) + 1)), dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of every element, row-major: a word each, or on a last axis those that it has."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    parts = jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x
    width = min(8 * parts.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(parts, f"uint{width}").astype(jnp.uint32)
    return words if words.ndim <= x.ndim + 1 else words.reshape(*x.shape, -1)


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    word = (word ^ (word >> 16)) * _MIX1
    word = (word ^ (word >> 15)) * _MIX2
    return word ^ (word >> 16)
