"""`gefen`: the optimizer, as `optax.adamw` is one."""

import math
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike

from gefen_jax._plan import Plan
from gefen_jax._transform import check_number, scale_by_gefen


def gefen(
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
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with about one byte of state per parameter.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    with :math:`u_t` from `scale_by_gefen`. Names, defaults and meanings of the arguments are those
    of `optax.adamw`; those after ``eps_root`` are keyword-only, because the next positional of
    adamw is ``mu_dtype``, which has no meaning here.

    Args:
      learning_rate: A number >= 0 or a schedule.
      b1: Decay rate of the first moment, in [0, 1). Four bits do not carry one above 0.99: leaves
        with dual codes then have noisier updates than Adam's, up to too large ones at 0.999.
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root.
      eps_root: Added inside the square root.
      weight_decay: Strength of the decoupled weight decay, >= 0, or a schedule.
      mask: Which leaves the weight decay applies to: a tree of bools or a function of the params.
      nesterov: Whether to use Nesterov momentum.
      plan: From `calibrate` or `plan_by_shape`; None for dual codes by shape, which need no
        calibration.
      backend: None for the implementation that is known to be best on the device at hand, "xla", or
        "mosaic", "triton" or "jax_triton" for the kernels of `pallas_kernels` in these languages
        (on NVIDIA GPUs; not measured on one yet, so None never takes them). A backend by name is
        obeyed: a `WideDualCode` has no kernel and raises. Exact leaves stay plain.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For arguments out of range; see also `scale_by_gefen`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> def loss(params):
      ...   return jnp.mean((params["w"] - jnp.arange(64.0)[:, None] / 64) ** 2)
      >>> params = {"w": jnp.zeros((64, 128))}
      >>> tx = gx.gefen(0.05)
      >>> opt_state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(bool(loss(params) < 1e-3))
      True

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019

    .. note::
      With `optax.inject_hyperparams`, name ``mask`` in its ``static_args`` if it is a function:
      else Optax takes it for a schedule and weight decay may be lost, as with `optax.adamw`.
    """
    check_number("learning_rate", learning_rate, 0.0, math.inf, open_end=True)
    check_number("weight_decay", weight_decay, 0.0, math.inf, open_end=True)
    return optax.chain(
        scale_by_gefen(b1, b2, eps, eps_root, nesterov=nesterov, plan=plan, backend=backend),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
