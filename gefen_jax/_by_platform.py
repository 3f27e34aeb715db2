"""One computation in several forms, of which only the one for the device at hand is traced.

`jax.lax.platform_dependent` traces and lowers all of them, and lets the compiler take one. The
forms of a step are most of what there is to trace. So they are behind a primitive, whose forms JAX
asks for when it lowers, and then it knows the platform. Where a transformation has to look inside
(`jax.vmap`, derivatives), and on a mesh, it is `jax.lax.platform_dependent` again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir

from gefen_jax._varying import varying_alike

_PLATFORMS = ("cpu", "cuda", "rocm")  # that have forms of their own


class _Forms(NamedTuple):
    """Functions of flat arguments that return the same list of arrays."""

    default: Callable[..., list[Any]]
    others: tuple[tuple[str, Callable[..., list[Any]]], ...]  # by platform

    def on(self, platform: str | None) -> Callable[..., list[Any]]:
        """The form for a platform; None for any other."""
        return next((form for name, form in self.others if name == platform), self.default)

    def traced(self, *args: Any) -> list[Any]:
        """All of them, of which the compiler takes one."""
        return jax.lax.platform_dependent(*args, default=self.default, **dict(self.others))


_by_platform = Primitive("gefen_by_platform")
_by_platform.multiple_results = True


@_by_platform.def_abstract_eval
def _types(*args: Any, forms: _Forms, types: tuple[Any, ...]) -> list[Any]:
    del args, forms
    return list(types)


@_by_platform.def_impl
def _run(*args: Any, forms: _Forms, types: Any) -> list[Any]:
    del types
    return forms.traced(*args)


def _batched(args: Any, axes: Any, *, forms: _Forms, types: Any) -> tuple[list[Any], list[int]]:
    return jax.vmap(forms.traced, in_axes=tuple(axes))(*args), [0] * len(types)


def _derivative(primals: Any, tangents: Any, *, forms: _Forms, types: Any) -> Any:
    del types
    return jax.jvp(forms.traced, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _lowering(platform: str | None) -> Any:
    def lowered(*args: Any, forms: _Forms, types: tuple[Any, ...]) -> list[Any]:
        results = forms.on(platform)(*args)
        found = [(x.shape, x.dtype) for x in results]
        assert found == [(t.shape, t.dtype) for t in types], (found, types)
        return results

    return mlir.lower_fun(lowered, multiple_results=True)


batching.primitive_batchers[_by_platform] = _batched
ad.primitive_jvps[_by_platform] = _derivative
for _platform in (None, *_PLATFORMS):
    mlir.register_lowering(_by_platform, _lowering(_platform), platform=_platform)


def by_platform(
    results: Any, *args: Any, default: Callable[..., Any], **forms: Callable[..., Any]
) -> Any:
    """``forms[platform](*args)`` on the device at hand, ``default(*args)`` where it has no form.

    The forms, for "cpu", "cuda" or "rocm", return a tree of arrays with the shapes and dtypes of
    ``results``. They must not hold a traced array: all of these are arguments.
    """
    assert set(forms) <= set(_PLATFORMS), forms.keys()
    args = varying_alike(args)
    if any(not jax.typeof(x).sharding.mesh.empty for x in jax.tree.leaves(args)):
        # What a form makes there has to know the mesh that it is traced on.
        return jax.lax.platform_dependent(*args, default=default, **forms)
    flat, treedef = jax.tree.flatten(args)
    expected, result_def = jax.tree.flatten(results)

    def flattened(form: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda *flat: result_def.flatten_up_to(form(*treedef.unflatten(flat)))

    by_name = tuple((name, flattened(form)) for name, form in forms.items())
    types = tuple(jax.typeof(x).update(weak_type=False) for x in expected)
    found = _by_platform.bind(*flat, forms=_Forms(flattened(default), by_name), types=types)
    return result_def.unflatten(found)


def of_default(equation: Any) -> Jaxpr | None:
    """The default form's program, of an equation that is one of `by_platform`; else None."""
    if equation.primitive is not _by_platform:
        return None
    avals = [x.aval for x in equation.invars]
    return jax.make_jaxpr(equation.params["forms"].default)(*avals).jaxpr
