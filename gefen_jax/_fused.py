"""`fused_gefen`: the optimizer and `optax.apply_updates` in one pass over the parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gefen_jax._alias import gefen
from gefen_jax._fused_leaf import step_part
from gefen_jax._paths import param_specs, resolved
from gefen_jax._plan import Plan
from gefen_jax._release_part import Part
from gefen_jax._state import OTHER_PARAMS, advice, leaves_like
from gefen_jax._transform import (
    Recipe,
    ScaleByGefenState,
    check_number,
    codebook_of,
    kinds_of,
)
from gefen_jax._types import Clip, Kind, Rates


class FusedGefen(NamedTuple):
    """What `fused_gefen` returns: pure functions, to be jitted with the rest of a training step.

    ``init(params)`` gives the state, `step` goes on from there. The other two fields are what
    `with_split_weights` and `release` build on.
    """

    init: Callable[[Any], Any]  # params -> opt_state
    # grads, opt_state, params, part of them -> params, opt_state, corrections
    step_part: Callable[[Any, Any, Any, Part], tuple[Any, Any, Any]]
    kinds: Callable[[Any], dict[str, Kind]]  # params -> how the moments of every leaf are kept

    def step(self, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        """The next parameters and the next state."""
        return self.step_part(grads, opt_state, params, Part())[:2]

    @property
    def update(self) -> Any:
        """What this has not: it is asked for where an Optax transformation is expected."""
        raise AttributeError(
            "`fused_gefen` has no `update`, and nothing can be chained to it: call"
            " `params, opt_state = tx.step(grads, opt_state, params)`, or use `gefen`, the same as"
            " an Optax transformation with the same state"
        )


def fused_gefen(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    nesterov: bool = False,
    plan: Plan | None = None,
    backend: str | None = None,
    max_norm: ArrayLike | None = None,
) -> FusedGefen:
    r"""`gefen` and `optax.apply_updates` in one step, piece by piece through large leaves.

    An Optax transformation returns updates, for others to work on; this one applies them itself:

    .. math::
      \bar g_t = g_t \min(1, c / \lVert g_t \rVert), \quad
      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_gefen` on :math:`\bar g_t`, and :math:`c` = ``max_norm``: what
    clips all gradients by their norm cannot be chained in front of it, so it is an argument. On one
    CPU a leaf of dual codes is read and written piece by piece while it is in the cache; where
    several share a loop, to compile in less time, weights follow after it, without an array of
    updates.

    The state is that of the Optax transformation it stands for, ``gefen(...)`` with the same
    arguments, or with ``max_norm`` ``optax.chain(optax.clip_by_global_norm(max_norm),
    gefen(...))``: a run may go over from one to the other at any step, and a checkpoint of one
    loads in the other. So are its results, but for rounding. The parameters are computed in
    float32 and rounded to their dtype once; with gradients or parameters in bfloat16 or float16
    that is more exact than updates that leave in the gradient's dtype. Parameters that are no
    floats stay as they are, and so do those without a gradient (None).

    Args:
      learning_rate: A number >= 0 or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      weight_decay: Strength of the decoupled weight decay, >= 0, or a schedule.
      mask: Which leaves the weight decay applies to: a tree of bools or a function of the params.
      nesterov: Whether to use Nesterov momentum.
      plan: From `calibrate` or `plan_by_shape`; None for dual codes by shape.
      backend: None for the implementation that is known to be best on the device at hand, "xla", or
        "mosaic", "triton" or "jax_triton" for the kernels of `pallas_kernels` in these languages
        (on NVIDIA GPUs; not measured on one yet, so None never takes them). A backend by name is
        obeyed: a `WideDualCode` has no kernel and raises. With the first two, small exact leaves
        share kernels; else these stay plain.
      max_norm: The largest global norm of the gradients, >= 0; None to leave them as they are.

    Returns:
      A `FusedGefen`: ``init(params)`` gives the state, ``step(grads, opt_state, params)`` the new
      parameters, in their shapes and dtypes, and the new state. Jitted with both donated, no array
      of a leaf's size is made or copied; but on a CPU parameters in 16 bits are written anew.

    Raises:
      ValueError: For arguments out of range; in ``step`` for a gradient, a parameter or a state
        that does not fit the plan, by name.
      TypeError: In ``init`` for a complex leaf.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> def loss(params):
      ...   return jnp.mean((params["w"] - jnp.arange(64.0)[:, None] / 64) ** 2)
      >>> optimizer = gx.fused_gefen(0.05, max_norm=1.0)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def train_step(params, opt_state):
      ...   return optimizer.step(jax.grad(loss)(params), opt_state, params)
      >>> params = {"w": jnp.zeros((64, 128))}
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(100):
      ...   params, opt_state = train_step(params, opt_state)
      >>> print(bool(loss(params) < 1e-3))
      True

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

      Pascanu et al., `On the difficulty of training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2012

    .. note::
      A jitted function should take what it donates in the order in which it returns it, as above:
      XLA pairs buffers of one shape in that order, and copies those that it paired wrongly.
    """
    replaced = gefen(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        plan=plan,
        backend=backend,
    )
    if max_norm is not None:
        check_number("max_norm", max_norm, 0.0, math.inf, open_end=False)
        replaced = optax.chain(optax.clip_by_global_norm(max_norm), replaced)
    recipe = Recipe(b1, b2, eps, eps_root, nesterov, plan, codebook_of(plan)[1], backend)

    def step(grads: Any, opt_state: Any, params: Any, part: Part) -> tuple[Any, Any, Any]:
        if max_norm is not None and part.kinds is not None:
            raise ValueError(_CLIPPED_PART)
        *clip_state, links = (opt_state,) if max_norm is None else _links(opt_state, 2)
        state, decay_state, rate_state = _links(links, 3)
        if not isinstance(state, ScaleByGefenState):
            raise _strange(state)
        decay, decay_state = _ask_decay(weight_decay, mask, decay_state)
        scale, rate_state = _ask_rate(learning_rate, rate_state)
        clip = None if max_norm is None else _clip(grads, max_norm)
        flat, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None)
        paths = [path for path, _ in flat]
        leaves_like(treedef, paths, "params", params, OTHER_PARAMS)  # raises by name
        decayed = treedef.flatten_up_to(_decayed(mask, params))
        rates = [Rates(clip, decay if flag else None, scale) for flag in decayed]
        params, state, lows = step_part(recipe, part, grads, state, params, rates)
        links = (state, decay_state, rate_state)
        return params, links if max_norm is None else (*clip_state, links), lows

    def kinds(params: Any) -> dict[str, Kind]:
        return kinds_of(param_specs(params), plan)

    return FusedGefen(replaced.init, step, kinds)


_CLIPPED_PART = (
    "`max_norm` of `fused_gefen` would clip every layer by its own norm: give it to"
    " `release` instead"
)


def _strange(found: Any, where: str = "") -> ValueError:
    """What to raise for something else in the place of a chain, or of one of its links."""
    return ValueError(
        "`opt_state` must be what `init` returns: the state of `gefen` with the same arguments, or"
        " with `max_norm` of `optax.chain(optax.clip_by_global_norm(max_norm), gefen(...))`; found"
        f" {type(found).__name__}{where}. {advice(found)}"
    )


def _links(state: Any, number: int) -> tuple[Any, ...]:
    """The states of a chain's links."""
    if not isinstance(state, tuple) or len(state) != number:
        raise _strange(state, f" where the states of {number} links should be")
    return tuple(state)


# Schedules and counts are Optax's: the chain's last links are asked what they make of 0 and 1.


def _ask_decay(weight_decay: Any, mask: Any, state: Any) -> tuple[Any, Any]:
    """The weight decay of this step, None for a constant 0, and the link's next state."""
    link = optax.add_decayed_weights(weight_decay)
    if isinstance(state, optax.MaskedState) == (mask is None):
        raise _strange(state, f", of a run with{'' if mask is None else 'out'} a `mask`")
    inner = state if mask is None else state.inner_state
    _check_link(link, inner, "weight_decay")
    decay, inner = link.update(jnp.zeros([]), inner, jnp.ones([]))
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        decay = None
    return decay, inner if mask is None else optax.MaskedState(inner)


def _ask_rate(learning_rate: Any, state: Any) -> tuple[Any, Any]:
    """Minus the learning rate of this step, and the link's next state."""
    link = optax.scale_by_learning_rate(learning_rate)
    _check_link(link, state, "learning_rate")
    return link.update(jnp.ones([]), state)


def _check_link(link: optax.GradientTransformation, state: Any, argument: str) -> None:
    if jax.tree.structure(jax.eval_shape(link.init, ())) != jax.tree.structure(state):
        what = "number" if isinstance(state, optax.EmptyState) else "schedule"
        raise _strange(state, f", of a run whose `{argument}` was a {what}")


def _clip(grads: Any, max_norm: Any) -> Clip:
    """As `optax.clip_by_global_norm`, of all that is float, in float32."""
    leaves = (g for g in jax.tree.leaves(grads) if jnp.issubdtype(jnp.result_type(g), jnp.floating))
    norm = optax.tree.norm([jnp.asarray(g, jnp.float32) for g in leaves])
    most = jnp.asarray(max_norm, jnp.float32)
    return Clip(norm, most, norm < most)


def _decayed(mask: Any, params: Any) -> Any:
    """For every parameter, whether its weight decays."""
    flags = True if mask is None else resolved(mask, params)
    return jax.tree.map(lambda flag, part: jax.tree.map(lambda _: bool(flag), part), flags, params)
