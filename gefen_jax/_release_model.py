"""A model in layers: its passes forward and backward, of which a part is in memory at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gefen_jax._release_check import used_inputs
from gefen_jax._release_part import flatten, is_none
from gefen_jax._state import describe


class Model(NamedTuple):
    """The three functions of a model, and where its layers are in the parameters."""

    embed: Callable[[Any, Any], Any]
    layer: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Any], Any]
    treedef: Any  # of the parameters
    trees: list[Any]  # one per layer, or one for all that are stacked: of the leaves' indices
    stacked: int | None  # how many layers are stacked; None for a list

    @property
    def number(self) -> int:
        """Of layers."""
        return len(self.trees) if self.stacked is None else self.stacked

    def inside(self) -> set[int]:
        """The indices of all layers' leaves."""
        return set(jax.tree.leaves(self.trees))

    def outside(self, leaves: list[Any]) -> Any:
        """The parameters with None in place of all layers' leaves."""
        inside = self.inside()
        return self.treedef.unflatten([None if i in inside else x for i, x in enumerate(leaves)])

    def at(self, leaves: list[Any], number: Any) -> Any:
        """The parameters of a layer."""
        if self.stacked is None:
            return jax.tree.map(lambda i: leaves[i], self.trees[number])
        # Tied to the turn of the loop: XLA on a CPU, which computes in float32, would otherwise
        # widen all layers at once, in front of the loop.
        stacked = jax.tree.map(lambda i: leaves[i], self.trees[0])
        stacked, number = jax.lax.optimization_barrier((stacked, number))
        return jax.tree.map(lambda x: _at(x, number), stacked)

    def indices(self, number: Any) -> list[int]:
        """Those of a layer's leaves."""
        return jax.tree.leaves(self.trees[0 if self.stacked is not None else number])


def _at(x: Array, number: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


_NOT_PICKED = (
    "`layers` must pick leaves of the parameters, each of them once: arrays that it makes cannot be"
    " updated, and a layer that is used twice would be stepped twice. Write two uses of the same"
    " parameters as one layer."
)


_NOT_FOUND = (
    "`layers` does not find the layers in the parameters ({!r}): give `release` a function that"
    " does, as in `layers=lambda params: params['decoder']['blocks']`"
)
_NUMBERED = (
    "`layers` found a dict with numbers for keys, which `release` takes for the stacked parameters"
    " of every layer. If these are layers, make a list of them, as in `layers=lambda params:"
    " [params['layers'][key] for key in sorted(params['layers'], key=int)]`."
)


def find_layers(
    functions: tuple[Any, Any, Any], params: Any, where: Callable[[Any], Any]
) -> tuple[Model, list[Any]]:
    """The model, and the parameters' leaves."""
    flat, treedef = flatten(params)
    leaves = [x for _, x in flat]
    try:
        found = where(treedef.unflatten(range(len(flat))))
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(_NOT_FOUND.format(error)) from error
    indices = jax.tree.leaves(found)
    if not all(type(i) is int for i in indices) or len(set(indices)) < len(indices):
        raise ValueError(_NOT_PICKED)
    if isinstance(found, list | tuple) and not hasattr(found, "_fields"):
        return Model(*functions, treedef, list(found), None), leaves
    sizes = {jnp.shape(leaves[i])[:1] for i in jax.tree.leaves(found) if leaves[i] is not None}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "`layers` must find a list of the layers' parameters, or one tree of arrays whose"
            f" first axes are as long as there are layers; found first axes {sorted(sizes)}"
        )
    return Model(*functions, treedef, [found], sizes.pop()[0]), leaves


def is_float(x: Any) -> bool:
    """Whether it is trained, or has a gradient."""
    return x is not None and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def pullback(function: Callable[..., Any], *trees: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`jax.vjp` through the floating leaves of trees; gradients of the others are None."""
    leaves, treedef = jax.tree.flatten(trees, is_leaf=is_none)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]
    structure: list[Any] = []

    def of_floats(*values: Any) -> tuple[list[Any], list[Any]]:
        merged = list(leaves)
        for i, value in zip(floats, values, strict=True):
            merged[i] = value
        out, out_def = jax.tree.flatten(function(*treedef.unflatten(merged)), is_leaf=is_none)
        structure[:] = [out_def]
        return [x if is_float(x) else None for x in out], [None if is_float(x) else x for x in out]

    out, pull, others = jax.vjp(of_floats, *(leaves[i] for i in floats), has_aux=True)
    merged = [x if y is None else y for x, y in zip(out, others, strict=True)]

    def pulled(cotangent: Any) -> Any:
        flat = jax.tree.leaves(cotangent, is_leaf=is_none)
        grads: list[Any] = [None] * len(leaves)
        wanted = [None if x is None else g for x, g in zip(out, flat, strict=True)]
        for i, g in zip(floats, pull(wanted), strict=True):
            grads[i] = g
        return treedef.unflatten(grads)

    return structure[0].unflatten(merged), pulled


def forward(model: Model, leaves: list[Any], batch: Any) -> tuple[Any, Any, Any]:
    """The layers' inputs, stacked if the layers are, the last one's output, and the batch."""
    x = model.embed(model.outside(leaves), batch)
    if model.stacked is not None:

        def body(x: Any, number: Any) -> tuple[Any, Any]:
            try:
                y = model.layer(model.at(leaves, number), x)
            except Exception as error:
                found = model.trees[0]
                if isinstance(found, Mapping) and all(str(key).isdigit() for key in found):
                    error.add_note(_NUMBERED)
                raise
            _check_form(x, y)
            return y, x

        x, inputs = jax.lax.scan(body, x, jnp.arange(model.number))
        return inputs, x, batch
    inputs = []
    for number in range(model.number):
        inputs.append(x)
        x = model.layer(model.at(leaves, number), x)
    return inputs, x, batch


def _check_form(x: Any, y: Any) -> None:
    """Stacked layers are one program: what comes out of one has to fit into the next."""
    found, wanted = (
        [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in jax.tree.leaves(tree)]
        for tree in (y, x)
    )
    if found != wanted:
        raise ValueError(
            "`layer` must return what has the shapes and dtypes of its input, as layers are"
            f" stacked; found {', '.join(found)} for {', '.join(wanted)}. Cast what `layer`"
            " returns, or give layers that change shapes as a list."
        )


class Visit(NamedTuple):
    """A part whose gradients are there now, by index, in a backward pass."""

    grads: dict[int, Any]
    layer: Any = None  # its number
    is_last: bool = False  # of all parts
    run: Any = None  # whether to go on at all; None for yes


def sweep(
    model: Model,
    passed: tuple[Any, Any, Any],
    read: Callable[[Any], list[Any]],
    visit: Callable[[Any, Visit], Any],
    carry: Any,
    run: Any = None,
) -> tuple[Array, Any]:
    """The loss, and the carry after ``visit(carry, part)`` of every part, from the head down.

    ``passed`` is what `forward` returned, ``read(carry)`` the leaves of the parameters. A part's
    gradients are dead before those of the next exist: the carry of the one is that of the next.
    """
    inputs, x, batch = passed
    outer = model.outside(read(carry))
    places = jax.tree.leaves(model.outside(list(range(model.treedef.num_leaves))))
    present = [i for i in places if read(carry)[i] is not None]
    trained = [i for i in present if is_float(read(carry)[i])]
    used = zip(present, used_inputs(model.embed, outer, batch), strict=True)
    embedded = {i for i, is_used in used if is_used}

    loss, pull = pullback(lambda outer, x: model.head(outer, x, batch), outer, x)
    if not jax.tree_util.all_leaves([loss]) or jnp.shape(loss) != () or not is_float(loss):
        raise ValueError(
            "`head` must return the loss, one floating scalar, and nothing beside it; found"
            f" {describe(loss)}"
        )
    of_head, dx = pull(jnp.ones_like(loss))
    of_head = jax.tree.leaves(of_head, is_leaf=is_none)
    carry = visit(carry, Visit({i: of_head[i] for i in trained if i not in embedded}, run=run))
    # True, but XLA cannot know. What is in a branch is not shared with what is outside (the forward
    # pass), nor put into one fusion with what writes its results, which would copy stacked arrays
    # that others are still computed from.
    go = jnp.logical_not(loss < -jnp.inf) if run is None else run

    def back(number: Any, carry: Any, dx: Any, x: Any, run: Any) -> tuple[Any, Any]:
        _, pull = pullback(model.layer, model.at(read(carry), number), x)
        of_layer, dx = pull(dx)
        grads = zip(model.indices(number), jax.tree.leaves(of_layer, is_leaf=is_none), strict=True)
        grads = {i: g for i, g in grads if g is not None}
        return visit(carry, Visit(grads, number, run=run)), dx

    if model.stacked is not None:

        def body(i: Any, both: Any) -> Any:
            number, (carry, dx) = model.number - 1 - i, both
            x = jax.tree.map(lambda x: _at(x, number), inputs)
            return back(number, carry, dx, x, go)

        carry, dx = jax.lax.fori_loop(0, model.number, body, (carry, dx))
    else:
        for number in reversed(range(model.number)):

            def turn(carry: Any, dx: Any, x: Any, number: int = number) -> Any:
                return back(number, carry, dx, x, None)

            def left_out(carry: Any, dx: Any, x: Any) -> Any:
                return carry, jax.tree.map(lambda x: jnp.zeros_like(x) if is_float(x) else None, x)

            args = jax.lax.optimization_barrier((carry, dx, inputs[number]))
            carry, dx = jax.lax.cond(go, turn, left_out, *args)
    outer, dx = jax.lax.optimization_barrier((model.outside(read(carry)), dx))
    _, pull = pullback(lambda outer: model.embed(outer, batch), outer)
    of_embed = jax.tree.leaves(pull(dx)[0], is_leaf=is_none)
    late = {i: of_head[i] + of_embed[i] for i in trained if i in embedded}
    return loss, visit(carry, Visit(late, is_last=True, run=run))
