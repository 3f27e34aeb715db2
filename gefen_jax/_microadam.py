"""MicroAdam as an Optax transformation: Adam's moments from a window of sparse gradients."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from gefen_jax._constants import SMALL_LEAF
from gefen_jax._laid_out import laid_out_like
from gefen_jax._paths import LeafSpec, leaf_spec, path_name
from gefen_jax._placed import placed_beside, placed_like
from gefen_jax._sparse_window import (
    Geometry,
    Scalars,
    Sparse,
    divided,
    geometry,
    init,
    scalars,
    step,
)
from gefen_jax._state import check_type, leaves_of
from gefen_jax._transform import check_number, decay_at


class ScaleByMicroAdamState(NamedTuple):
    """State of `scale_by_microadam`: trees like the parameters.

    A large leaf has what `gefen_jax._sparse_window` says in the first five, and None in mu and nu;
    a small one exact moments there, and None in the others.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    error: Any  # uint8 [blocks, elements / 2]: what the window left out, 4 bits for each element
    low: Any  # bfloat16 [blocks, elements / 64]: what the codes of the error lie between
    high: Any
    place: Any  # int16 [blocks, window, kept]: of what was taken, in its block
    value: Any  # bfloat16, alike
    mu: Any  # float32, of a small leaf
    nu: Any


class _Leaf(NamedTuple):
    """The state of one leaf, sparse or exact."""

    error: Any = None
    low: Any = None
    high: Any = None
    place: Any = None
    value: Any = None
    mu: Any = None
    nu: Any = None


def _cut(spec: LeafSpec, density: float, window: int) -> Geometry | None:
    """How a leaf is cut; None where it keeps exact moments."""
    return None if spec.size <= SMALL_LEAF else geometry(spec.shape, density, window)


def _init_leaf(spec: LeafSpec, cut: Geometry | None) -> _Leaf:
    if not spec.trained:
        return _Leaf()
    if cut is not None:
        return _Leaf(*init(cut))
    mu, nu = (jnp.zeros(spec.shape, jnp.float32) for _ in range(2))
    return _Leaf(mu=mu, nu=nu)


@functools.partial(jax.jit, static_argnames=("cut", "window"))
def _update_leaf(g, leaf, decay, count, *, cut, window):
    """One leaf. Jitted so that leaves of equal shape are traced and lowered once."""
    if cut is not None:

        def cut_step(g: Array, old: Sparse, now: Scalars) -> tuple[Array, Sparse]:
            return step(g, old, cut, now)

        old, now = Sparse(*leaf[: len(Sparse._fields)]), scalars(decay, window, count)
        update, new = laid_out_like(g, cut_step, g, old, now)
        return update.astype(g.dtype), _Leaf(*new)
    wide = g.astype(jnp.float32)
    mu = decay.b1 * leaf.mu + decay.one_minus_b1 * wide
    nu = decay.b2 * leaf.nu + decay.one_minus_b2 * jnp.square(wide)
    update = divided(mu / decay.correction1, jnp.sqrt(nu / decay.correction2) + decay.eps)
    return update.astype(g.dtype), _Leaf(mu=mu, nu=nu)


def _check(density: Any, window: Any) -> None:
    if isinstance(density, jax.Array) or isinstance(window, jax.Array):
        raise TypeError(
            "`density` and `window` decide shapes and must be plain numbers: name them in the"
            " `static_args` of `optax.inject_hyperparams`"
        )
    if not isinstance(density, numbers.Real) or not 0 < float(density) <= 1:
        raise ValueError(f"`density` must lie in (0, 1], got {density!r}")
    if not isinstance(window, numbers.Integral) or window < 1:
        raise ValueError(f"`window` must be an integer of at least 1, got {window!r}")


def _check_leaf(spec: LeafSpec, cut: Geometry | None, leaf: _Leaf, g: Any) -> None:
    """The gradient and the state must have the shapes that they had at `init`."""
    expected = jax.eval_shape(lambda: _init_leaf(spec, cut))
    same = jax.tree.structure(expected) == jax.tree.structure(leaf) and all(
        e.shape == jnp.shape(x) and e.dtype == jnp.result_type(x)
        for e, x in zip(jax.tree.leaves(expected), jax.tree.leaves(leaf), strict=True)
    )
    if not same:
        raise ValueError(
            f"the state of `{spec.path}` is not that of a gradient of shape {spec.shape}: give"
            " gradients of the shapes that `init` saw, the same `density` and `window`, and keep"
            f" the state's dtypes; found {jax.tree.map(jnp.shape, leaf)}, gradient"
            f" {jnp.result_type(g)}{list(jnp.shape(g))}"
        )


def scale_by_microadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    density: float = 0.01,
    window: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam's moments of the last few gradients, of which little is kept.

    With :math:`e` what was left out so far, in every block of at most 32768 elements

    .. math::
      a_t = g_t + e_{t-1}, \quad V_t = \mathrm{TopK}(a_t), \quad e_t = Q_4(a_t - V_t)

    and over the last ``window`` steps

    .. math::
      m_t = \frac{1 - b_1}{1 - b_1^t} \sum_s b_1^{t-s} V_s, \quad
      v_t = \frac{1 - b_2}{1 - b_2^t} \sum_s b_2^{t-s} V_s^2, \quad
      u_t = \frac{m_t}{\sqrt{v_t} + \varepsilon}

    TopK keeps the share ``density`` of largest magnitude, in bfloat16; :math:`Q_4` keeps 4 bits of
    every element, evenly spaced between the least and the largest of 64. That is
    ``0.5 + 4 / 64 + 4 * window * density`` bytes per parameter, 0.96 as it stands. Leaves of at
    most 4096 elements keep exact moments, which is Adam. An element that was not among the largest
    for ``window`` steps stays where it is; its gradients wait in the error.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      density: The share of a block that enters the window at every step, in (0, 1].
      window: Steps that the window holds, at least 1.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByMicroAdamState`. The age of
      a row follows from the count in it, so a run resumes as it stopped. A None gradient leaves its
      leaf's state as it is.

    Raises:
      ValueError: For arguments out of range; in ``update`` for a state that does not fit, by name.
      TypeError: In ``init`` for a complex leaf.
      NotImplementedError: When the update of a large leaf is differentiated.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> tx = gx.scale_by_microadam()
      >>> state = tx.init({"w": jnp.zeros((512, 512))})
      >>> print(round(gx.memory_report(state).by_tensor["w"] / 512**2, 2))
      0.96
      >>> updates, state = tx.update({"w": jnp.ones((512, 512))}, state)
      >>> print(jnp.sum(updates["w"] != 0))  # 1 % of every block of 32768
      2624

    References:
      Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and
      Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024

    .. note::
      The state has a shape of its own, not the parameter's: on a mesh it is best replicated, and a
      sharded leaf is gathered. NaN in a gradient stays in its block's error; use
      `optax.apply_if_finite`.
    """
    check_number("b1", b1, 0.0, 1.0, open_end=True)
    check_number("b2", b2, 0.0, 1.0, open_end=True)
    check_number("eps", eps, 0.0, math.inf, open_end=True)
    _check(density, window)

    def init_fn(params: optax.Params) -> ScaleByMicroAdamState:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        specs = [leaf_spec(path_name(path), leaf) for path, leaf in flat]
        leaves = [
            placed_like(x, _init_leaf(spec, _cut(spec, density, window)))
            for (_, x), spec in zip(flat, specs, strict=True)
        ]
        count = placed_beside(params, jnp.zeros([], jnp.int32))
        return _state(count, treedef, leaves)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByMicroAdamState]:
        del params, extra_args
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
        check_type(state, ScaleByMicroAdamState)
        slots = leaves_of(state, _Leaf._fields, [path for path, _ in flat], treedef)
        leaves = [_Leaf(*leaf) for leaf in slots]
        count = optax.safe_increment(state.count)
        decay = decay_at(b1, b2, eps, 0.0, count)
        results = []
        for i, (path, g) in enumerate(flat):
            if g is not None:
                spec = leaf_spec(path_name(path), g)
                cut = _cut(spec, density, window)
                _check_leaf(spec, cut, leaves[i], g)
                if spec.trained:
                    g, leaves[i] = _update_leaf(g, leaves[i], decay, count, cut=cut, window=window)
            results.append(g)
        return treedef.unflatten(results), _state(jnp.asarray(count), treedef, leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _state(count: Array, treedef: Any, leaves: list[_Leaf]) -> ScaleByMicroAdamState:
    slots = (treedef.unflatten([getattr(x, slot) for x in leaves]) for slot in _Leaf._fields)
    return ScaleByMicroAdamState(count, *slots)


def microadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    density: float = 0.01,
    window: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""MicroAdam: AdamW with 0.96 bytes of state per parameter, for fine-tuning.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_microadam`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      weight_decay: Strength of the decoupled weight decay, >= 0, or a schedule.
      mask: Which leaves the weight decay applies to: a tree of bools or a function of the params.
      density: The share of a block that enters the window at every step, in (0, 1].
      window: Steps that the window holds, at least 1.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_microadam`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> target = jax.random.normal(jax.random.key(0), (80, 64))
      >>> def loss(params):
      ...   return jnp.mean((params["w"] - target) ** 2)
      >>> params = {"w": jnp.zeros((80, 64))}
      >>> tx = gx.microadam(0.05, density=0.1)
      >>> opt_state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(bool(loss(params) < 0.1))
      True

    References:
      Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and
      Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024
    """
    check_number("learning_rate", learning_rate, 0.0, math.inf, open_end=True)
    check_number("weight_decay", weight_decay, 0.0, math.inf, open_end=True)
    return optax.chain(
        scale_by_microadam(b1, b2, eps, density=density, window=window),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
