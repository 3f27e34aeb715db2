"""The one place that knows which device it is on, and which implementation runs there."""

from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
from jax.sharding import AxisType
from jaxtyping import Array

from gefen_jax._blocks import Shape
from gefen_jax._chunks import CHUNK
from gefen_jax._step import by_equal_runs
from gefen_jax._types import Kind, Moments, Step

BACKENDS = ("xla",)


@runtime_checkable
class Advance(Protocol):
    """A step of one leaf in equal blocks; with ``chunk``, in pieces of about so many elements."""

    def __call__(
        self, g: Array, state: Moments, block: Shape, step: Step, *, chunk: int | None = None
    ) -> Any: ...


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is no backend; None lets the library choose."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"`backend` must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )


def in_best_form(advance: Advance, g: Array, state: Moments, block: Shape, step: Step) -> Any:
    """``advance(g, state, block, step)`` in the form that is best on the device at hand.

    A large leaf on one CPU is worked through in pieces that fit in the cache. Accelerators fuse
    the whole-leaf form; so does every mesh get it, where a loop over slices of a sharded axis
    would gather the leaf.
    """

    def one_size(g: Array, state: Moments, block: Shape) -> Any:
        # Branches take arrays only: what is static in the step stays outside.
        def whole(g: Array, state: Moments, *arrays: Any) -> Any:
            return advance(g, state, block, step._replace(**_named(arrays)))

        def in_pieces(g: Array, state: Moments, *arrays: Any) -> Any:
            return advance(g, state, block, step._replace(**_named(arrays)), chunk=CHUNK)

        args = (g, state, *(getattr(step, name) for name in _TRACED))
        if g.size <= CHUNK or _on_a_mesh(g) or _on_a_mesh(state.mu):
            return whole(*args)
        return jax.lax.platform_dependent(*args, cpu=in_pieces, default=whole)

    g, state = _refuse_gradient((g, state))
    return by_equal_runs(one_size, g, state, block)


_TRACED = ("decay", "encoder", "levels", "phase")  # the fields of a Step that hold arrays


def _named(arrays: Any) -> dict[str, Any]:
    return dict(zip(_TRACED, arrays, strict=True))


def update_leaf(kind: Kind, g: Array, moments: Moments, arrays: dict[str, Any], static: Any) -> Any:
    """``kind.update``, on any mesh.

    On a mesh with Explicit axes, where JAX refuses to split a sharded axis into blocks that cross
    its shards, the compiler chooses the shardings inside. What has the leaf's shape comes out as
    the gradient lies, statistics as they came in.
    """

    def update(g: Array, moments: Moments, arrays: dict[str, Any]) -> Any:
        return kind.update(g, moments, Step(**arrays, **static))

    mesh = jax.typeof(g).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return update(g, moments, arrays)
    like = jax.tree.map(
        lambda x: jax.typeof(g if x.shape == g.shape else x).sharding.spec, (g, moments)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        inside: Any = jax.sharding.auto_axes(update, out_sharding=like)
        return inside(g, moments, arrays)


@jax.custom_jvp
def _refuse_gradient(x: tuple[Array, Moments]) -> tuple[Array, Moments]:
    """The identity, which nobody may differentiate."""
    return x


@_refuse_gradient.defjvp
def _refuse_gradient_jvp(primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(
        "a quantised momentum has no useful derivative: gefen's update cannot be differentiated"
        " with respect to gradients or state. Use optax.adamw, or gefen_jax.Exact() for every"
        ' leaf (`plan.with_kind("*", gefen_jax.Exact())`), where you need it.'
    )


def _on_a_mesh(x: Array) -> bool:
    """Whether an array is spread over several devices, as far as tracing can know."""
    mesh = getattr(jax.typeof(x).sharding, "mesh", None)
    return mesh is not None and mesh.size > 1
