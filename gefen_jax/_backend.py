"""The one place that knows which device it is on, and which implementation runs there."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, UInt32

from gefen_jax._blocks import Shape
from gefen_jax._by_platform import by_platform
from gefen_jax._chunks import Chunk
from gefen_jax._dither import Place
from gefen_jax._joined import advance_joined
from gefen_jax._laid_out import by_the_compiler
from gefen_jax._not_differentiable import not_differentiable
from gefen_jax._shards import free_axes, is_spread, shards_of
from gefen_jax._specs import Partition
from gefen_jax._step import by_equal_runs
from gefen_jax._types import JoinedKind, Kind, Moments, Step

_KERNELS = ("triton", "mosaic", "jax_triton")
BACKENDS = ("xla", *_KERNELS)


@runtime_checkable
class Advance(Protocol):
    """A step of one leaf in equal blocks; with ``chunk``, in pieces.

    The state is the moments, or they and the parameter, or any tree of arrays like these.
    """

    def __call__(
        self, g: Array, state: Any, block: Shape, step: Step, /, *, chunk: Chunk | None = None
    ) -> Any: ...


# Elements of a piece on a CPU: its few float32 intermediates fit in the second-level cache.
CHUNK = 1 << 18

# Of a turn through several leaves: the more, the less its many small copies cost.
JOINED_CHUNK = 1 << 19

# And on a GPU: many enough that its kernels take longer than their start, and few
# enough for temporaries of 20 to 40 MB.
GPU_CHUNK = 1 << 22

_GPUS = ("cuda", "rocm")


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is no backend; None lets the library choose."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"`backend` must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )


# By the kind of leaf, the module with its kernels. Exact leaves never ask: XLA makes one kernel of
# the step of a leaf.
_MODULES = {
    "dual_code": "_dual_kernel",
    "shared_blocks": "_shared_kernel",
    "flat_periods": "_shared_kernel",
}

# And that with a kernel for many leaves at once, which a GPU steps in less time than it takes to
# start a kernel for each.
_MODULES_OF_MANY = {"exact": "_exact_kernel"}
_BACKENDS_OF_MANY = ("triton", "mosaic")
_SMALL = 1 << 16  # elements of such a leaf, at most


def kernel_of(kind: str, g: Array, backend: str | None) -> Any:
    """The module with the kernels of a kind of leaf; None if no backend with kernels was named.

    None, too, for a leaf without elements. On a CPU those of "triton" and "mosaic" are interpreted,
    slowly: to try them, and for tests.

    Raises:
      NotImplementedError: For a kind without a kernel, and for a leaf on several devices, whose
        shards a kernel does not know.
    """
    if not has_kernels(backend) or not g.size:
        return None
    if kind not in _MODULES:
        raise NotImplementedError(
            f"`backend` {backend!r} has no kernel for a leaf of kind {kind!r}, as one of {g.shape}"
            f" is: use None or 'xla', or a plan with one of {', '.join(map(repr, _MODULES))}"
        )
    if _on_a_mesh(g):
        raise NotImplementedError(
            f"`backend` {backend!r} takes leaves on one device, found one of {g.shape} on"
            f" {jax.typeof(g).sharding.mesh}: use None or 'xla'"
        )
    # Here, as it takes time, and Pallas, where it is asked for.
    return importlib.import_module(f"gefen_jax.{_MODULES[kind]}")


def kernel_of_many(kind: str, backend: str | None) -> Any:
    """The module with a kernel that takes many small leaves a step further; None if there is none.

    With their weights: what follows an update that is not fused is a kernel for every leaf anyway.
    """
    if backend not in _BACKENDS_OF_MANY or kind not in _MODULES_OF_MANY:
        return None
    return importlib.import_module(f"gefen_jax.{_MODULES_OF_MANY[kind]}")


def in_best_form(
    advance: Advance,
    g: Array,
    state: Any,
    block: Shape,
    step: Step,
    *,
    on_gpu: Advance | None = None,
    at_once: bool = False,
    results: Callable[[Array, Any], Any] = lambda g, state: state,
) -> Any:
    """``advance(g, state, block, step)`` in the form that is best on the device at hand.

    A large leaf is worked through in pieces: on a CPU in such that fit in its cache, on a GPU in
    much larger ones, so that temporaries are those of a piece, and by ``on_gpu`` if that is given.
    So is what a device of a mesh has of it, in `Shards.map` or in anybody's `shard_map`. Outside of
    these a mesh gets the whole-leaf form, as a loop over slices of a sharded axis would gather the
    leaf; so do TPUs, where neither was measured. With ``at_once``, a GPU gets it, too, for leaves
    that are no larger than a piece: half as many kernels as in two pieces, but if the new state is
    not written in place, which loops always do, XLA keeps that of all leaves. Of ``g`` and
    ``state``, ``results`` makes a tree of arrays with the shapes and dtypes of what comes out.
    """

    # Forms take arrays, and hold none: JAX keeps them for as long as the program.
    arrays, static = [getattr(step, name) for name in _TRACED], step._replace(**_NO_ARRAYS)

    def one_size(g: Array, state: Any, block: Shape) -> Any:
        def form(advance: Advance, chunk: Chunk | None) -> Callable[..., Any]:
            def run(g: Array, state: Any, *arrays: Any) -> Any:
                here = static._replace(**dict(zip(_TRACED, arrays, strict=True)))
                return advance(g, state, block, here, chunk=chunk)

            return run

        whole, args = form(advance, None), (g, state, *arrays)
        if g.size <= CHUNK or any(map(_on_a_mesh, jax.tree.leaves((g, state)))):
            return whole(*args)

        def apart_from_what_follows(*args: Any) -> Any:
            # Which would be computed from parts of the state that XLA keeps of all leaves, to do it
            # last.
            return jax.lax.optimization_barrier(whole(*args))

        # At least two pieces: kernels of several leaves may run in any order, which keeps the
        # temporaries of all of them; loops run one after the other.
        large = form(on_gpu or advance, Chunk(min(GPU_CHUNK, g.size // 2)))
        if at_once and g.size <= GPU_CHUNK:
            large = apart_from_what_follows
        small = form(advance, Chunk(CHUNK, narrow_in_place=False))
        forms = dict.fromkeys(_GPUS, large) | {"cpu": small}
        return by_platform(results(g, state), *args, **forms, default=whole)

    g, state = not_differentiable((g, state), NO_DERIVATIVE)
    return by_equal_runs(one_size, g, state, block)


def has_kernels(backend: str | None) -> bool:
    """Whether a backend was named that has kernels, which work in place."""
    return backend in _KERNELS


def joined_run(kind: Kind, g: ArrayLike, moments: Moments, backend: str | None) -> int | None:
    """The run of a leaf's blocks, if leaves of equal runs can be stepped together, else None.

    With kernels that is 1, of small leaves without blocks. Inside of a `shard_map` JAX wants to
    know of a kernel over which axes its results vary: there they stay plain.
    """
    if any(map(is_placed, jax.tree.leaves((g, moments)))):
        return None
    if has_kernels(backend):
        small = 0 < jnp.size(g) <= _SMALL and not jax.typeof(g).sharding.mesh.manual_axes
        return 1 if small and kernel_of_many(kind.name, backend) is not None else None
    return kind.run(jnp.shape(g)) if isinstance(kind, JoinedKind) else None


class Leaf(NamedTuple):
    """The arrays of a leaf that can be stepped together with others."""

    weight: Array | None  # of a fused step
    g: Array
    moments: Moments


OfLeaf = Callable[[int, Leaf, dict[str, Any]], Any]


def in_joined_form(
    advance: Advance,
    leaves: Sequence[Leaf],
    arrays: dict[str, Any],
    phases: UInt32[Array, "leaves two"],
    *,
    run: int,
    size: int,
    static: dict[str, Any],
    alone: OfLeaf,
    after: OfLeaf,
    results: list[Any],
) -> list[Any]:
    """The steps of leaves that have a `joined_run`, and the same one.

    On a CPU ``after(number, leaf, arrays)`` of leaves with the moments that ``advance`` makes of
    all in one loop, about ``size`` elements a turn. Elsewhere it is ``alone(number, leaf, arrays)``
    one after the other: what loops cost there was not measured, and more leaves at a time are more
    temporaries. ``arrays``, to which phases are added, and ``static`` are the fields of a `Step`;
    what comes out has the shapes and dtypes of ``results``.
    """

    def in_turn(leaves: Sequence[Leaf], arrays: Any, phases: Any) -> list[Any]:
        new, last = [], None
        for i, x in enumerate(leaves):
            moments, own = behind(last, x.moments, arrays | {"phase": phases[i]})
            new.append(alone(i, x._replace(moments=moments), own))
            last = new[-1][1].mu
        return new

    def together(leaves: Sequence[Leaf], arrays: Any, phases: Any) -> list[Any]:
        step = Step(**arrays, **static, phase=phases[0])
        gradients, moments = [x.g for x in leaves], [x.moments for x in leaves]
        new = advance_joined(advance, gradients, moments, run, step, phases, size)
        stepped = [x._replace(moments=m) for x, m in zip(leaves, new, strict=True)]
        return [after(i, x, arrays | {"phase": phases[i]}) for i, x in enumerate(stepped)]

    leaves = not_differentiable(leaves, NO_DERIVATIVE)
    args = leaves, arrays, phases
    return by_platform(results, *args, cpu=together, default=in_turn)


# The fields of a Step that hold arrays.
_TRACED = ("decay", "encoder", "levels", "phase", "rates", "place", "weight_phase")
_NO_ARRAYS: dict[str, Any] = dict.fromkeys(_TRACED)
_TABLES = ("encoder", "levels")  # of them, those that are arrays of all leaves' kernels


def update_leaf(
    kind: Kind,
    partition: Partition | None,
    g: Array,
    moments: Moments,
    arrays: dict[str, Any],
    static: Any,
) -> tuple[Array, Moments]:
    """The update of a leaf, in the gradient's dtype, and its moments, on any mesh.

    Where no block crosses shards every device steps its own; else the compiler steps the leaf.
    """

    def update(leaf: tuple[Array, Moments], arrays: Any, place: Place | None) -> Any:
        (g, moments), step = leaf, Step(**arrays, **static, place=place)
        direction, new = kind.update(g, *_with_tables_apart(moments, step))
        return direction.astype(g.dtype), new

    def whole(leaf: tuple[Array, Moments], arrays: Any, place: Place | None) -> Any:
        return by_the_compiler(update, leaf[0], leaf, leaf, arrays, place)

    shards = shards_of(kind, partition, g, moments)
    if shards is None:
        return whole((g, moments), arrays, None)
    direction, new = shards.map(update, (g, moments), arrays, whole=whole)
    return shards.back_home(direction), new


NO_DERIVATIVE = (
    "a quantised momentum has no useful derivative: gefen's update cannot be differentiated"
    " with respect to gradients or state. Use optax.adamw, or gefen_jax.Exact() for every"
    ' leaf (`plan.with_kind("*", gefen_jax.Exact())`), where you need it.'
)


def apart(tree: Any) -> Any:
    """The same, so that no kernel of a GPU computes the directions of several leaves.

    XLA makes one of leaves of one shape that read one table, and all that such a kernel reads is
    kept until then: temporaries of all leaves, instead of those of the largest.
    """
    # On a CPU it changes neither temporaries nor time; a branch of a GPU's own would give results
    # of another type than the others under `shard_map`.
    return jax.lax.optimization_barrier(tree)


def behind(
    last: Array | None, moments: Moments, arrays: dict[str, Any]
) -> tuple[Moments, dict[str, Any]]:
    """What a leaf's step reads, once ``last``, the codes of the leaf before it, are there.

    Left to itself, XLA begins the steps of all leaves before it ends one, which keeps the
    temporaries of all. (On a CPU that holds from jax 0.11 on: before, XLA drops barriers too soon.)
    Without effect where leaves are no part of one program.
    """
    if not isinstance(last, Tracer):
        return moments, arrays
    own = {name: arrays[name] for name in ("phase", *_TABLES)}
    moments, own, _ = jax.lax.optimization_barrier((moments, own, last))
    return moments, arrays | own


def _with_tables_apart(moments: Moments, step: Step) -> tuple[Moments, Step]:
    if has_kernels(step.backend):  # which read them alone; what is made of them is made once
        return moments, step
    moments, tables = apart((moments, tuple(getattr(step, name) for name in _TABLES)))
    return moments, step._replace(**dict(zip(_TABLES, tables, strict=True)))


def is_placed(x: ArrayLike) -> bool:
    """Whether an array lies on a mesh, if only one of one device: its axes may not be reshaped."""
    return bool(free_axes(jax.typeof(x).sharding.mesh))


def _on_a_mesh(x: Array) -> bool:
    """Whether an array is spread over several devices, as far as tracing can know."""
    return is_spread(jax.typeof(x).sharding.mesh)
