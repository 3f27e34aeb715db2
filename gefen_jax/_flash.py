"""FlashOptim's rescalings: Adam, Lion and momentum from companded moments of eight bits."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Int

from gefen_jax._companding import FIRST, SECOND, Coded
from gefen_jax._dither import leaf_phases
from gefen_jax._flash_step import Kept, Real, Rule, check_layer, check_leaf, init, update_leaf
from gefen_jax._paths import leaf_spec, path_name
from gefen_jax._placed import placed_beside, placed_like
from gefen_jax._release_part import Part
from gefen_jax._state import check_type, leaves_of
from gefen_jax._transform import check_number, decay_at
from gefen_jax._types import Decay

_SCALE_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


class ScaleByFlashAdamState(NamedTuple):
    """State of `scale_by_flash_adam`: four trees like the parameters.

    A group is 32 neighbours, the last one may be shorter. Its scales have the parameter's shape,
    the last axis divided by 32 where that divides it, and else are a vector. A leaf that is no
    float has None in all four.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    mu: Any  # follows the params: int8 of the parameter's shape
    mu_scale: Any  # follows the params: bfloat16 or float32, one per group
    nu: Any  # follows the params: uint8 of the parameter's shape
    nu_scale: Any  # follows the params: bfloat16 or float32, one per group


class ScaleByFlashMomentumState(NamedTuple):
    """State of `scale_by_flash_lion` and `scale_by_flash_momentum`: see `ScaleByFlashAdamState`."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    mu: Any  # follows the params: int8 of the parameter's shape
    mu_scale: Any  # follows the params: bfloat16 or float32, one per group


_State = ScaleByFlashAdamState | ScaleByFlashMomentumState


def _by_slot(treedef: Any, kept: Sequence[Kept | None], number: int) -> list[Any]:
    """Codes and scales of every moment, a tree each; None for a leaf without any."""
    none = (Coded(None, None),) * number  # pyright: ignore[reportArgumentType]
    leaves = [none if k is None else k for k in kept]
    return [
        treedef.unflatten([leaf[i][j] for leaf in leaves]) for i in range(number) for j in range(2)
    ]


def _transformation(
    rule: Rule,
    make_state: type[_State],
    scale_dtype: DTypeLike,
    b1: Any,
    b2: Any = 0.0,
    eps: Any = 0.0,
    eps_root: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule."""
    scale_dtype = jnp.dtype(scale_dtype)
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"`scale_dtype` must be bfloat16 or float32, got {scale_dtype}")
    number = len(make_state._fields) // 2
    dtypes = (FIRST, SECOND)[:number]

    def init_fn(params: optax.Params) -> _State:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        specs = [leaf_spec(path_name(path), leaf) for path, leaf in flat]
        kept = [
            placed_like(x, init(s.shape, dtypes, scale_dtype)) if s.trained else None
            for (_, x), s in zip(flat, specs, strict=True)
        ]
        count = placed_beside(params, jnp.zeros([], jnp.int32))
        return make_state(count, *_by_slot(treedef, kept, number))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, _State]:
        del params
        part = extra_args.get("gefen_part", Part())
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
        check_type(state, make_state)
        slots = leaves_of(state, make_state._fields[1:], [path for path, _ in flat], treedef)
        kept = [
            None if leaf[0] is None else tuple(map(Coded, leaf[::2], leaf[1::2])) for leaf in slots
        ]
        paths, results = [path_name(path) for path, _ in flat], [g for _, g in flat]
        trained = [i for i, g in enumerate(results) if g is not None and kept[i] is not None]
        for i in trained:
            check_leaf(paths[i], results[i], kept[i], scale_dtype)
            if part.layer is not None:
                check_layer(paths[i], jnp.shape(results[i]))
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = decay_at(b1, b2, eps, eps_root, count)
        phases = leaf_phases(paths, count)
        for i in trained:
            # Scales of a layer are rounded by the fractions that they have in the whole leaf.
            place = part.place(jnp.shape(slots[i][1]))
            args = results[i], kept[i], scalars, phases[i], place
            results[i], kept[i] = update_leaf(*args, rule=rule)
        new_state = make_state(count, *_by_slot(treedef, kept, number))
        return treedef.unflatten(results), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _adam(g: Array, moments: Real, decay: Decay) -> tuple[Array, Real]:
    mu, nu = moments
    # In the order of `optax.scale_by_adam`.
    mu = decay.one_minus_b1 * g + decay.b1 * mu
    nu = decay.one_minus_b2 * (g * g) + decay.b2 * nu
    root = jnp.sqrt(nu / decay.correction2 + decay.eps_root) + decay.eps
    # A square that overflowed would give an update of 0: inf * 0 makes it NaN.
    root = root + root * 0
    # What never had a gradient stays where it is, with eps = 0 too.
    return mu / decay.correction1 / jnp.where(root == 0, jnp.inf, root), (mu, nu)


def _lion(g: Array, moments: Real, decay: Decay) -> tuple[Array, Real]:
    (mu,) = moments
    update = jnp.sign(decay.one_minus_b1 * g + decay.b1 * mu)
    return update, (decay.one_minus_b2 * g + decay.b2 * mu,)


def _momentum(g: Array, moments: Real, decay: Decay) -> tuple[Array, Real]:
    trace = g + decay.b1 * moments[0]
    return trace, (trace,)


def _nesterov(g: Array, moments: Real, decay: Decay) -> tuple[Array, Real]:
    trace = g + decay.b1 * moments[0]
    return g + decay.b1 * trace, (trace,)


def scale_by_flash_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    scale_dtype: DTypeLike = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, from moments in 8 bits each: 2.125 bytes per parameter.

    With :math:`\hat m, \hat v` what codes and scales of the last step stand for,

    .. math::
      m_t &= b_1 \hat m_{t-1} + (1 - b_1) g_t, \quad
      v_t = b_2 \hat v_{t-1} + (1 - b_2) g_t^2, \quad
      u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t) + \bar\varepsilon} + \varepsilon} \\
      c_t &= \mathrm{round}\left(127 \cdot 2 x / (1 + |x|)\right), \quad x = m_t / \max |m_t|, \quad
      d_t = \mathrm{round}\left(255 \sqrt{v_t} / \max \sqrt{v_t}\right)

    with maxima over 32 neighbours, the scales. All leaves are kept so, small ones, too, in the same
    groups as in FlashOptim's package. Beyond it, a second moment that is not 0 never gets the code
    0, and scales have the range of float32.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      scale_dtype: bfloat16, rounded up or down so that scales are right on average; or float32,
        for 2.25 bytes per parameter.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByFlashAdamState`, with its
      final shapes from ``init`` on. Arithmetic is float32; updates leave in the gradient's dtype. A
      None gradient leaves that leaf's state as it is; a leaf that is no float has none.

    Raises:
      ValueError: For arguments out of range; in ``update`` for a gradient or a state that does not
        fit, by name.
      TypeError: In ``init`` for a complex leaf.
      NotImplementedError: When the update is differentiated.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"kernel": jnp.ones((8, 64)), "bias": jnp.zeros(5)}
      >>> tx = gx.scale_by_flash_adam()
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(updates["kernel"][0, :2].round(3), updates["bias"][:2])
      [1. 1.] [0. 0.]
      >>> print(state.mu["kernel"].dtype, state.nu["kernel"].dtype, state.nu_scale["kernel"].shape)
      int8 uint8 (8, 2)

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026

    .. note::
      Codes are rounded to the nearest, as published. An element's second moment stays where it is
      while it moves by less than half a code in a step: with ``b2 = 0.999``, until a gradient is
      some times larger than it, or the largest of its group changes.
    """
    check_number("b1", b1, 0.0, 1.0, open_end=True)
    check_number("b2", b2, 0.0, 1.0, open_end=True)
    check_number("eps", eps, 0.0, math.inf, open_end=True)
    check_number("eps_root", eps_root, 0.0, math.inf, open_end=True)
    return _transformation(_adam, ScaleByFlashAdamState, scale_dtype, b1, b2, eps, eps_root)


def scale_by_flash_lion(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.99, *, scale_dtype: DTypeLike = "bfloat16"
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Lion does, from a momentum in 8 bits: 1.0625 bytes per parameter.

    .. math::
      u_t = \mathrm{sign}(b_1 \hat m_{t-1} + (1 - b_1) g_t), \quad
      m_t = b_2 \hat m_{t-1} + (1 - b_2) g_t

    with :math:`m_t` kept as in `scale_by_flash_adam`.

    Args:
      b1: Rate that combines momentum and gradient, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      scale_dtype: bfloat16 or float32, for 1.125 bytes per parameter.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByFlashMomentumState`; else
      as `scale_by_flash_adam`.

    Raises:
      ValueError, TypeError, NotImplementedError: As `scale_by_flash_adam`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> tx = gx.scale_by_flash_lion()
      >>> updates, state = tx.update(jnp.array([2.0, -0.1, 0.0]), tx.init(jnp.zeros(3)))
      >>> print(updates, state.mu)
      [ 1. -1.  0.] [127 -12   0]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023

      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026
    """
    check_number("b1", b1, 0.0, 1.0, open_end=True)
    check_number("b2", b2, 0.0, 1.0, open_end=True)
    return _transformation(_lion, ScaleByFlashMomentumState, scale_dtype, b1, b2)


def scale_by_flash_momentum(
    decay: ArrayLike = 0.9, nesterov: bool = False, *, scale_dtype: DTypeLike = "bfloat16"
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.trace` with a momentum in 8 bits: 1.0625 bytes per parameter.

    .. math::
      m_t = g_t + \beta \hat m_{t-1}, \quad
      u_t = m_t \;\text{ or, with Nesterov momentum, }\; g_t + \beta m_t

    with :math:`m_t` kept as in `scale_by_flash_adam`.

    Args:
      decay: Decay rate of the momentum, in [0, 1).
      nesterov: Whether to use Nesterov momentum.
      scale_dtype: bfloat16 or float32, for 1.125 bytes per parameter.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByFlashMomentumState`; else
      as `scale_by_flash_adam`.

    Raises:
      ValueError, TypeError, NotImplementedError: As `scale_by_flash_adam`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> tx = gx.scale_by_flash_momentum(0.5)
      >>> g, state = jnp.array([2.0, -2.0, 0.0]), tx.init(jnp.zeros(3))
      >>> for _ in range(2):
      ...   updates, state = tx.update(g, state)
      >>> print(updates)
      [ 3. -3.  0.]

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026
    """
    check_number("decay", decay, 0.0, 1.0, open_end=True)
    rule = _nesterov if nesterov else _momentum
    return _transformation(rule, ScaleByFlashMomentumState, scale_dtype, decay)
