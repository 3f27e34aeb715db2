"""`scale_by_gefen`: Adam's rescaling from a state of about one byte per parameter."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gefen_jax._backend import (
    JOINED_CHUNK,
    Leaf,
    check_backend,
    has_kernels,
    in_joined_form,
    update_leaf,
)
from gefen_jax._builtin import builtin_codebook
from gefen_jax._candidates import kinds_by_shape
from gefen_jax._constants import LEVELS
from gefen_jax._dither import leaf_phases
from gefen_jax._encoder import lookup_is_exact, make_encoder
from gefen_jax._groups import Joined, LeafStep, groups
from gefen_jax._levels import make_levels
from gefen_jax._paths import LeafSpec, check_names, leaf_spec, path_name
from gefen_jax._placed import placed_beside, placed_like
from gefen_jax._plan import Plan
from gefen_jax._state import check_state, check_type, describe, state_leaves
from gefen_jax._types import Decay, Kind, Moments, Step


class ScaleByGefenState(NamedTuple):
    """State of `scale_by_gefen`: mu, scale and nu are trees like the parameters.

    A leaf's kind in the plan says what stands there. A dual code keeps both moments in the bytes of
    mu, one per element, and per block a scale and, in nu, an exponent. Shared blocks keep codes in
    mu (the first moment is ``codebook[mu] * scale``) and per block a scale and a second moment. An
    exact leaf keeps float32 moments in mu and nu and None in scale.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    codebook: Float[Array, "codes"]  # shape (256,), float32: what codes of 8 bits stand for
    codebook4: Float[Array, "levels"]  # shape (16,), float32: what codes of 4 bits stand for
    mu: Any  # follows the params: uint8 codes or float32, of the parameter's shape
    scale: Any  # follows the params: float32, shape // block, or None
    nu: Any  # follows the params: uint8 or float32, shape // block, or float32 of its shape


def check_number(name: str, value: Any, low: float, high: float, *, open_end: bool) -> None:
    """Raises ValueError for a plain number outside its range; traced values cannot be checked."""
    if isinstance(value, Tracer) or callable(value):
        return
    try:
        number = math.nan if isinstance(value, str) or np.ndim(value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (low <= number < high or (number == high and not open_end)):
        bracket = ")" if open_end else "]"
        raise ValueError(f"`{name}` must lie in [{low}, {high}{bracket}, got {value!r}")


def decay_at(b1: Any, b2: Any, eps: Any, eps_root: Any, count: Any) -> Decay:
    """The scalars of the step that this count numbers, from 1."""
    # Cast here: under jax_enable_x64 a number of NumPy's would make the moments float64.
    one_minus_b1, one_minus_b2 = (jnp.asarray(1 - b, jnp.float32) for b in (b1, b2))
    b1, b2, eps, eps_root = (jnp.asarray(x, jnp.float32) for x in (b1, b2, eps, eps_root))
    # `1 - b ** t` as Optax writes it, so that exact leaves are Adam to the last bit.
    following = jnp.asarray(optax.safe_increment(count), jnp.float32)
    count = count.astype(jnp.float32)
    corrections = 1 - b1**count, 1 - b1**following, 1 - b2**count
    return Decay(b1, b2, one_minus_b1, one_minus_b2, eps, eps_root, *corrections)


_STATIC = ("kind", "partition", "nesterov", "exact_lookup", "backend")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _update_leaf(g, moments, arrays, *, kind, partition, **static):
    """One leaf. Jitted so that leaves of equal shape are traced and lowered once."""
    return update_leaf(kind, partition, g, moments, arrays, static)


@functools.partial(jax.jit, static_argnames=("kinds", "run", "size", *_STATIC[2:]))
def _update_joined(leaves, arrays, phases, *, kinds, run, size, **static):
    """What `_update_leaf` gives of each; leaves that can be stepped together."""

    def alone(i, leaf, arrays):
        about = {"kind": kinds[i], "partition": None, **static}
        return _update_leaf(*leaf[1:], arrays, **about)

    def after(i, leaf, arrays):
        return _direction(*leaf[1:], arrays, kind=kinds[i], **static), leaf.moments

    how = {"run": run, "size": size, "static": static, "alone": alone, "after": after}
    results = [(leaf.g, leaf.moments) for leaf in leaves]
    return in_joined_form(kinds[0].advance, leaves, arrays, phases, results=results, **how)


@functools.partial(jax.jit, static_argnames=("kind", *_STATIC[2:]))
def _direction(g, moments, arrays, *, kind, **static):
    """The update of one leaf after its step, in the gradient's dtype."""
    return kind.direction(g, moments, Step(**arrays, **static)).astype(g.dtype)


class Recipe(NamedTuple):
    """The arguments of `scale_by_gefen`, checked."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    eps_root: ArrayLike
    nesterov: bool
    plan: Plan | None
    exact_lookup: bool
    backend: str | None


def check_plan(name: str, plan: Any) -> None:
    """Raises TypeError unless the argument is a plan or None, for the plan by shape."""
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"`{name}` must be a gefen_jax.Plan or None, got {type(plan).__name__}")


def kinds_of(specs: list[LeafSpec], plan: Plan | None) -> dict[str, Kind]:
    """The kinds of the given leaves, by the plan or by shape."""
    check_names(spec.path for spec in specs)
    if plan is None:
        return {path: kind for path, (kind, _) in kinds_by_shape(specs).items()}
    return plan.kinds(specs)


def codebook_of(plan: Plan | None) -> tuple[Float[np.ndarray, "codes"], bool]:
    """The codebook that a state starts with, and whether its lookup table is exact."""
    if plan is not None:
        return np.asarray(plan.codebook, np.float32), plan.exact_lookup
    codebook = np.asarray(builtin_codebook(), np.float32)
    return codebook, lookup_is_exact(codebook)


def scale_by_gefen(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    plan: Plan | None = None,
    backend: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, from about one byte of state per parameter.

    Adam's moments, stored in one of two ways; the plan says which for every leaf. Without a plan,
    both moments are in one byte per element (`DualCode`):

    .. math::
      v_t = b_2 \hat v_{t-1} + (1 - b_2)\, \mathrm{mean}_{pair}(g_t^2), \quad
      m_t = b_1 \hat m_{t-1} + (1 - b_1) g_t, \quad
      u_t = \frac{\hat m_t / (1 - b_1^t)}{\sqrt{\hat v_t / (1 - b_2^t) + \bar\varepsilon} +
      \varepsilon}

    where the hats are the values that codes can stand for beside their block's scale and exponent:
    four bits of every first moment, eight of the second moment that two elements share; rounded so
    that they are right on average. In a plan from `calibrate` blocks share a second moment
    (`SharedBlocks`): per block, with :math:`c` the codebook, :math:`s` its scale and :math:`k` the
    codes of its elements,

    .. math::
      v_t &= b_2 v_{t-1} + (1 - b_2)\, \mathrm{mean}_{block}(g_t^2) \\
      m_t &= b_1 c[k_{t-1}] s_{t-1} + (1 - b_1) g_t, \quad
      s_t = \max_{block} |m_t|, \quad k_t = \mathrm{nearest}(c, m_t / s_t) \\
      u_t &= \frac{c[k_t] s_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\varepsilon} +
      \varepsilon}

    Small leaves keep exact float32 moments and Adam's own update. Arithmetic is float32 whatever
    the gradient's dtype; updates leave in the gradient's dtype.

    Args:
      b1: Decay rate of the first moment, in [0, 1). Four bits do not carry one above 0.99: leaves
        with dual codes then have noisier updates than Adam's, up to too large ones at 0.999.
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      nesterov: Whether to use Nesterov momentum, as in `optax.scale_by_adam`.
      plan: From `calibrate` or `plan_by_shape`; None for dual codes by shape.
      backend: None for the implementation that is known to be best on the device at hand, "xla", or
        "mosaic", "triton" or "jax_triton" for the kernels of `pallas_kernels` in these languages
        (on NVIDIA GPUs; not measured on one yet, so None never takes them). A backend by name is
        obeyed: a `WideDualCode` has no kernel and raises. Exact leaves stay plain.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByGefenState`: about 1 byte
      per parameter, with its final shapes from ``init`` on. A None gradient leaves that leaf's
      state as it is.

    Raises:
      ValueError: For arguments out of range; in ``init`` and ``update`` for a leaf or a state that
        does not fit the plan, by name.
      TypeError: In ``init`` for a complex leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"kernel": jnp.ones((128, 256)), "bias": jnp.zeros(256)}
      >>> tx = gx.scale_by_gefen()
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": params["kernel"], "bias": jnp.ones(256)}, state)
      >>> print(updates["bias"][:2].round(3), state.mu["kernel"].dtype, state.nu["kernel"].shape)
      [1. 1.] uint8 (128, 1)

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

    .. note::
      Differentiating through the update with respect to the gradients or the state is not
      supported: rounding to codes has no useful derivative.
    """
    check_number("b1", b1, 0.0, 1.0, open_end=True)
    check_number("b2", b2, 0.0, 1.0, open_end=True)
    check_number("eps", eps, 0.0, math.inf, open_end=True)
    check_number("eps_root", eps_root, 0.0, math.inf, open_end=True)
    check_backend(backend)
    check_plan("plan", plan)
    codebook, exact_lookup = codebook_of(plan)
    recipe = Recipe(b1, b2, eps, eps_root, nesterov, plan, exact_lookup, backend)

    def init_fn(params: optax.Params) -> ScaleByGefenState:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        specs = [leaf_spec(path_name(path), leaf) for path, leaf in flat]
        kinds = kinds_of(specs, plan)
        moments = [
            placed_like(x, kinds[s.path].init(s.shape))
            for (_, x), s in zip(flat, specs, strict=True)
        ]
        # Fresh buffers: state may be donated.
        tables = (
            jnp.zeros([], jnp.int32),
            jnp.array(codebook),
            jnp.array(builtin_codebook(LEVELS), jnp.float32),
        )
        return ScaleByGefenState(*placed_beside(params, tables), **by_slot(treedef, moments))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGefenState]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)

        def visit(leaf: LeafStep) -> Moments:
            args = leaf.g, leaf.moments, leaf.arrays | {"phase": leaf.phase}
            about = {"kind": leaf.kind, "partition": leaf.partition, **leaf.static}
            leaves[leaf.number], new = _update_leaf(*args, **about)
            return new

        def visit_joined(joined: Joined) -> list[Moments]:
            about = {"kinds": joined.kinds, "run": joined.run, "size": JOINED_CHUNK}
            parts = [Leaf(None, leaf.g, leaf.moments) for leaf in joined.leaves]
            first = joined.leaves[0]
            results = _update_joined(parts, first.arrays, joined.phases, **about, **first.static)
            for leaf, (update, _) in zip(joined.leaves, results, strict=True):
                leaves[leaf.number] = update
            return [new for _, new in results]

        def apart(leaf: LeafStep) -> Any:
            return None if has_kernels(leaf.static["backend"]) else ()

        new_state = step_leaves(recipe, updates, state, visit, visit_joined, apart=apart)
        return treedef.unflatten(leaves), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def step_leaves(
    recipe: Recipe,
    grads: optax.Updates,
    state: Any,  # checked
    visit: Callable[[LeafStep], Moments],
    visit_joined: Callable[[Joined], Sequence[Moments]],
    kinds: Mapping[str, Kind] | None = None,
    apart: Callable[[LeafStep], Any] = lambda leaf: (),
) -> ScaleByGefenState:
    """The state after ``visit`` of every leaf that has a gradient, which returns its new moments.

    Several leaves that can be stepped together are given to ``visit_joined``; ``apart`` says what
    else they must have in common, or None for a leaf that stays alone. Of leaves at hand that are
    parts of others, ``kinds`` says what the whole ones are.
    """
    check_type(state, ScaleByGefenState, takes_adam=True)
    flat, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None)
    specs, moments = state_leaves(state, [path for path, _ in flat], treedef)
    kinds = kinds_of(specs, recipe.plan) if kinds is None else kinds
    for spec, old in zip(specs, moments, strict=True):
        check_state(spec, kinds[spec.path], old)
    count = optax.safe_increment(state.count)
    arrays: dict[str, Any] = {
        "decay": decay_at(recipe.b1, recipe.b2, recipe.eps, recipe.eps_root, count),
        "encoder": make_encoder(state.codebook),
        "levels": make_levels(state.codebook4),
    }
    static = {name: getattr(recipe, name) for name in ("nesterov", "exact_lookup", "backend")}
    phases, leaves = leaf_phases([spec.path for spec in specs], jnp.asarray(count)), []
    for i, ((_, g), spec) in enumerate(zip(flat, specs, strict=True)):
        if g is not None and spec.trained:
            _check_gradient(spec, g)
            partition = None if recipe.plan is None else recipe.plan[spec.path].partition
            about = kinds[spec.path], partition, g, moments[i], phases[i], arrays, static
            leaves.append(LeafStep(i, spec, *about))
    last = None
    for run, alike in groups(leaves, apart):
        group = [leaf.after(last) for leaf in alike]
        if len(group) == 1:
            new = [visit(group[0])]
        else:
            new = visit_joined(Joined(run, group, phases[np.array([x.number for x in group])]))
        for leaf, of_leaf in zip(group, new, strict=True):
            moments[leaf.number] = of_leaf
        if group[-1].kind.scale_block is not None:
            last = new[-1].mu
    slots = by_slot(treedef, moments)
    return ScaleByGefenState(jnp.asarray(count), state.codebook, state.codebook4, **slots)


def by_slot(treedef: Any, moments: list[Moments]) -> dict[str, Any]:
    """The moments of all leaves as one tree per slot."""
    return {
        slot: treedef.unflatten([getattr(leaf, slot) for leaf in moments])
        for slot in Moments._fields
    }


def _check_gradient(spec: LeafSpec, g: Any) -> None:
    if jnp.shape(g) != spec.shape or not jnp.issubdtype(jnp.result_type(g), jnp.floating):
        raise ValueError(
            f"`updates[{spec.path}]` must be a real floating array of shape {spec.shape}, as at"
            f" `init`; found {describe(g)}"
        )


def check_parameter(spec: LeafSpec, p: Any) -> None:
    """Raises ValueError for a parameter that is not the one that the state was made for."""
    if jnp.shape(p) != spec.shape or not jnp.issubdtype(jnp.result_type(p), jnp.floating):
        raise ValueError(
            f"`params[{spec.path}]` must be a real floating array of shape {spec.shape}, as at"
            f" `init`; found {describe(p)}"
        )
