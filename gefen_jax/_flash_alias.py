"""FlashOptim's optimizers, as `optax.adamw`, `adam`, `lion` and `sgd` are ones."""

import math
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from gefen_jax._flash import scale_by_flash_adam, scale_by_flash_lion, scale_by_flash_momentum
from gefen_jax._transform import check_number

_Mask = Any | Callable[[optax.Params], Any] | None


def _check_rates(learning_rate: Any, weight_decay: Any) -> None:
    check_number("learning_rate", learning_rate, 0.0, math.inf, open_end=True)
    check_number("weight_decay", weight_decay, 0.0, math.inf, open_end=True)


def _l2(weight_decay: Any, mask: _Mask) -> optax.GradientTransformation:
    """The weights' part of the gradient; for a plain 0, ``update`` works without parameters."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def flash_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: _Mask = None,
    scale_dtype: DTypeLike = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with 2.125 bytes of state per parameter: FlashAdamW.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_flash_adam`. Names, defaults and meanings of the arguments are
    those of `optax.adamw`; those after ``eps_root`` are keyword-only.

    FlashOptim's whole recipe, 7.125 bytes per parameter with weights and gradients in bfloat16, is
    ``with_split_weights(flash_adamw(learning_rate))``.

    Args:
      learning_rate: A number >= 0 or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      weight_decay: Strength of the decoupled weight decay, >= 0, or a schedule.
      mask: Which leaves the weight decay applies to: a tree of bools or a function of the params.
      scale_dtype: Of the groups' scales: bfloat16, or float32 for 2.25 bytes per parameter.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_flash_adam`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> def loss(weights):
      ...   return jnp.mean((weights["w"].astype(jnp.float32) - jnp.arange(64.0) / 64) ** 2)
      >>> params = {"w": jnp.zeros(64)}
      >>> tx = gx.with_split_weights(gx.flash_adamw(0.05))
      >>> weights, opt_state = gx.split_weights(params)[0], tx.init(params)
      >>> for _ in range(100):
      ...   updates, opt_state = tx.update(jax.grad(loss)(weights), opt_state, weights)
      ...   weights = optax.apply_updates(weights, updates)
      >>> print(weights["w"].dtype, bool(loss(weights) < 1e-3))
      bfloat16 True

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026

      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019
    """
    _check_rates(learning_rate, weight_decay)
    return optax.chain(
        scale_by_flash_adam(b1, b2, eps, eps_root, scale_dtype=scale_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def flash_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _Mask = None,
    scale_dtype: DTypeLike = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with 2.125 bytes of state per parameter: FlashAdam.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t u_t(g_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_flash_adam`: the weight decay is part of the gradient, as in
    FlashOptim's package. Without it, names, defaults and meanings are those of `optax.adam`.

    Args:
      learning_rate: A number >= 0 or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      weight_decay: Strength of the L2 regularisation, >= 0, or a schedule.
      mask: Which leaves it applies to: a tree of bools or a function of the params.
      scale_dtype: Of the groups' scales: bfloat16, or float32 for 2.25 bytes per parameter.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`. With a weight decay, its ``update``
      needs ``params``.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_flash_adam`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = gx.flash_adam(0.5)
      >>> updates, _ = tx.update(jnp.array([4.0, -0.1]), tx.init(params), params)
      >>> print(updates.round(3))
      [-0.5  0.5]

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026
    """
    _check_rates(learning_rate, weight_decay)
    return optax.chain(
        _l2(weight_decay, mask),
        scale_by_flash_adam(b1, b2, eps, eps_root, scale_dtype=scale_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


def flash_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: _Mask = None,
    scale_dtype: DTypeLike = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with 1.0625 bytes of state per parameter: FlashLion.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_flash_lion`. Names, defaults and meanings of the arguments are
    those of `optax.lion`; those after ``b2`` are keyword-only.

    Args:
      learning_rate: A number >= 0 or a schedule.
      b1: Rate that combines momentum and gradient, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      weight_decay: Strength of the decoupled weight decay, >= 0, or a schedule.
      mask: Which leaves the weight decay applies to: a tree of bools or a function of the params.
      scale_dtype: Of the groups' scales: bfloat16, or float32 for 1.125 bytes per parameter.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_flash_lion`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = gx.flash_lion(0.5, weight_decay=0.1)
      >>> updates, _ = tx.update(jnp.array([4.0, -0.1]), tx.init(params), params)
      >>> print(updates)
      [-0.55  0.4 ]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023

      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026
    """
    _check_rates(learning_rate, weight_decay)
    return optax.chain(
        scale_by_flash_lion(b1, b2, scale_dtype=scale_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def flash_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _Mask = None,
    scale_dtype: DTypeLike = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with 1.0625 bytes of momentum per parameter: FlashSGD.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t u_t(g_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_flash_momentum`: the weight decay is part of the gradient, as in
    FlashOptim's package and torch. Without it, names, defaults and meanings are those of
    `optax.sgd`.

    Args:
      learning_rate: A number >= 0 or a schedule.
      momentum: Decay rate of the momentum, in [0, 1); None for none, and no state.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength of the L2 regularisation, >= 0, or a schedule.
      mask: Which leaves it applies to: a tree of bools or a function of the params.
      scale_dtype: Of the groups' scales: bfloat16, or float32 for 1.125 bytes per parameter.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`. With a weight decay, its ``update``
      needs ``params``.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_flash_momentum`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = jnp.array([1.0, 2.0])
      >>> tx = gx.flash_sgd(0.5, momentum=0.9, weight_decay=0.1)
      >>> updates, _ = tx.update(jnp.array([4.0, -0.2]), tx.init(params), params)
      >>> print(updates)
      [-2.05 -0.  ]

    References:
      `FlashOptim: Optimizers for Memory-Efficient Training
      <https://arxiv.org/abs/2602.23349>`_, 2026

    .. note::
      With decoupled weight decay (FlashSGDW) it is ``optax.chain(scale_by_flash_momentum(0.9),
      optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(learning_rate))``.
    """
    _check_rates(learning_rate, weight_decay)
    trace = optax.identity()
    if momentum is not None:
        trace = scale_by_flash_momentum(momentum, nesterov, scale_dtype=scale_dtype)
    return optax.chain(
        _l2(weight_decay, mask),
        trace,
        optax.scale_by_learning_rate(learning_rate),
    )
