"""Whether an Optax transformation steps every leaf by itself, read off its own program.

Gradient release steps some leaves before the gradients of others exist. What lets one gradient
decide the update of another (clipping by the global norm, skipping of steps that are not finite)
would then go wrong without a word; and so would random numbers, the same ones for every part, as
all parts are stepped from one key. So the update is traced once, without running, and what each
result depends on is followed through the program.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax
from jax.extend.core import Jaxpr, Literal

from gefen_jax._by_platform import of_default
from gefen_jax._paths import path_name
from gefen_jax._release_part import flatten

_Sources = frozenset[int]
_INSIDE = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def _follow(jaxpr: Jaxpr, sources: Iterable[_Sources]) -> list[_Sources]:
    """What the results of a program depend on, from what its inputs do."""
    known: dict[Any, _Sources] = dict(zip(jaxpr.invars, sources, strict=True))

    def of(x: Any) -> _Sources:
        return frozenset() if isinstance(x, Literal) else known.get(x, frozenset())

    by_platform = set()
    for equation in jaxpr.eqns:
        inputs = [of(x) for x in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if (stepped := of_default(equation)) is not None:
            # As for the forms below.
            outputs = _follow(stepped, inputs)
        elif equation.primitive.name in _INSIDE and inner is not None:
            outputs = _follow(getattr(inner, "jaxpr", inner), inputs)
        elif equation.primitive.name == "cond" and id(equation.invars[0]) in by_platform:
            # Forms for platforms (`jax.lax.platform_dependent`) do the same: the last is that of
            # no platform in particular, where each leaf is stepped by itself.
            outputs = _follow(equation.params["branches"][-1].jaxpr, inputs[1:])
        elif equation.primitive.name == "optimization_barrier":
            outputs = inputs  # it says when, and not what
        else:
            outputs = [frozenset().union(*inputs)] * len(equation.outvars)
        if equation.primitive.name == "platform_index":
            by_platform.update(map(id, equation.outvars))  # a literal has no hash
        known.update(zip(equation.outvars, outputs, strict=True))
    return [of(x) for x in jaxpr.outvars]


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all operations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if isinstance(inner, Jaxpr):
                yield from _primitives(inner)


def used_inputs(function: Any, *args: Any) -> list[bool]:
    """For every leaf of the first argument, whether the result depends on it."""
    closed, number = jax.make_jaxpr(function)(*args), len(jax.tree.leaves(args[0]))
    inputs = [frozenset([i]) if i < number else frozenset() for i in range(len(closed.in_avals))]
    reached = frozenset().union(*_follow(closed.jaxpr, inputs))
    return [i in reached for i in range(number)]


def check_separable(
    tx: optax.GradientTransformationExtraArgs, state: Any, params: Any, owner: list[int | None]
) -> None:
    """Raises ValueError if a leaf's update depends on another's gradient or state, or on chance.

    ``owner`` says to which parameter each leaf of the state belongs.
    """
    flat, treedef = flatten(params)
    own: list[int | None] = list(range(len(flat)))

    def update(grads: list[Any], state: list[Any], params: list[Any]) -> Any:
        trees = (treedef.unflatten(grads), state_def.unflatten(state), treedef.unflatten(params))
        updates, new = tx.update(*trees)
        return treedef.flatten_up_to(updates), state_def.flatten_up_to(new)

    state_leaves, state_def = flatten(state)
    args = [x for _, x in flat], [x for _, x in state_leaves], [x for _, x in flat]
    pairs = zip((x for part in args for x in part), (*own, *owner, *own), strict=True)
    inputs = [i for x, i in pairs for _ in jax.tree.leaves(x)]
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*args)
    if "random_bits" in _primitives(closed.jaxpr):
        raise ValueError(_RANDOM)
    results = zip((*shapes[0], *shapes[1]), (*own, *owner), strict=True)
    outputs = [i for x, i in results for _ in jax.tree.leaves(x)]
    sources = [frozenset() if i is None else frozenset([i]) for i in inputs]
    for i, reached in zip(outputs, _follow(closed.jaxpr, sources), strict=True):
        if others := reached - {i}:
            names = [path_name(path) for path, _ in flat]
            target = "what all leaves share" if i is None else f"`{names[i]}`"
            raise ValueError(
                f"`optimizer` lets the gradient or the state of `{names[min(others)]}` decide the"
                f" next value of {target}, but with gradient release they never exist together."
                " For clipping by the global norm use `max_norm`, to skip steps that are not"
                " finite `skip_nonfinite`, instead of a transformation."
            )


_RANDOM = (
    "`optimizer` draws random numbers (as `optax.add_noise` does): with gradient release all layers"
    " would get the same ones. Leave that transformation out, or take the ordinary step."
)
