"""`gefen_muon`: Muon with a quantised momentum as an optimizer, as `optax.contrib.muon` is one."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gefen_jax._alias import gefen
from gefen_jax._matrices import DimensionNumbers, read_axes, shape_factor
from gefen_jax._newton_schulz import PRESETS
from gefen_jax._paths import path_name
from gefen_jax._plan import Plan
from gefen_jax._scale_by_muon import Coefficients, WeightDimensionNumbers, scale_by_gefen_muon
from gefen_jax._transform import check_number


def _scale_by_shape(
    weight_dimension_numbers: WeightDimensionNumbers, consistent_rms: Any
) -> optax.GradientTransformation:
    """Multiplies every leaf by its `shape_factor`."""

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        entries = DimensionNumbers(weight_dimension_numbers, updates if params is None else params)

        def scale_leaf(path: Any, u: Any) -> Any:
            if not jnp.issubdtype(u.dtype, jnp.floating):
                return u
            axes = read_axes(path_name(path), u.shape, entries[path])
            return (shape_factor(u.shape, axes, consistent_rms) * u).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(scale_leaf, updates)

    return optax.stateless(scale)


def _labels(weight_dimension_numbers: WeightDimensionNumbers, params: optax.Params) -> Any:
    """ "muon" or "adam" for every leaf: matrices, or those that have dimension numbers."""
    entries = DimensionNumbers(weight_dimension_numbers, params)

    def label(path: Any, leaf: Any) -> str:
        if weight_dimension_numbers is None:
            return "muon" if jnp.ndim(leaf) == 2 else "adam"
        return "adam" if entries[path] is None else "muon"

    return jax.tree_util.tree_map_with_path(label, params)


def gefen_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients = PRESETS["standard"],
    ns_steps: Any = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: WeightDimensionNumbers = None,
    consistent_rms: ArrayLike | None = None,
    plan: Plan | None = None,
    bits: int = 8,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with a momentum of one byte per parameter, or of half a one; Gefen for all else.

    .. math::
      \theta_t = \theta_{t-1} - \alpha_t \left(\sqrt{\max(1, n_{out} / n_{in})}\; u_t +
      \lambda \theta_{t-1}\right)

    for matrices, with :math:`u_t` from `scale_by_gefen_muon`. Vectors and everything else that has
    no dimension numbers go to `gefen`. Names, order, defaults and meanings of the arguments are
    those of `optax.contrib.muon`, without ``mu_dtype``, which has no meaning here, and with
    ``plan`` and ``bits``.

    Args:
      learning_rate: A number >= 0 or a schedule.
      ns_coeffs: Coefficients of the Newton-Schulz iteration: one triple for all iterations, one
        for each, or a preset, "standard" or "dion".
      ns_steps: Number of iterations, a plain integer; ignored if there is a triple for each.
      beta: Decay rate of Muon's momentum, in [0, 1).
      eps: Keeps Muon's scaling finite; also added to `gefen`'s denominator.
      weight_decay: Strength of Muon's decoupled weight decay, >= 0, or a schedule.
      weight_decay_mask: Which of Muon's leaves it applies to: a tree of bools or a function.
      nesterov: Whether to use Nesterov momentum, in Muon and in `gefen`.
      adaptive: Whether to scale the update by the dual norm of what was orthogonalised.
      preconditioning: "frobenius", "spectral", "aol" or "schatten".
      adam_b1: Decay rate of `gefen`'s first moment.
      adam_b2: Decay rate of `gefen`'s second moment.
      adam_eps_root: Added inside the square root in `gefen`.
      adam_weight_decay: Strength of `gefen`'s weight decay.
      adam_learning_rate: `gefen`'s learning rate; None for the same.
      muon_weight_dimension_numbers: `optax.contrib.MuonDimensionNumbers`: a tree like the
        parameters, a prefix of it, or a function of them. A leaf with None goes to `gefen`. None
        means that all matrices go to Muon.
      consistent_rms: If given, the factor is ``consistent_rms * sqrt(max(n_in, n_out))``: 0.2
        makes updates as large as AdamW's (Liu et al.).
      plan: From `calibrate` or `plan_by_shape`, for all parameters; or None for blocks by shape and
        a built-in codebook.
      bits: Bits of Muon's momentum per element: 8; 4, whose rounding can be seen in the loss; or
        32, Muon itself.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: For arguments out of range, and for dimension numbers that do not fit a leaf.
      TypeError: For a traced ``ns_steps``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> target = jax.random.normal(jax.random.key(0), (64, 128))
      >>> def loss(params):
      ...   return jnp.mean((params["w"] + params["b"][None] - target) ** 2)
      >>> params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(128)}
      >>> tx = gx.gefen_muon(0.3)
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def step(params, opt_state):
      ...   updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      ...   return optax.apply_updates(params, updates), opt_state
      >>> for _ in range(100):
      ...   params, opt_state = step(params, opt_state)
      >>> print(bool(loss(params) < 0.02))
      True

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025

      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

    .. note::
      With `optax.inject_hyperparams`, name ``ns_steps`` and ``bits`` in its ``static_args``: they
      decide shapes and programs.
    """
    check_number("learning_rate", learning_rate, 0.0, math.inf, open_end=True)
    check_number("weight_decay", weight_decay, 0.0, math.inf, open_end=True)
    muon = optax.chain(
        scale_by_gefen_muon(
            ns_coeffs,
            ns_steps,
            beta,
            eps,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=muon_weight_dimension_numbers,
            plan=plan,
            bits=bits,
        ),
        _scale_by_shape(muon_weight_dimension_numbers, consistent_rms),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = gefen(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        weight_decay=adam_weight_decay,
        nesterov=nesterov,
        plan=plan,
    )

    def partition(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = _labels(muon_weight_dimension_numbers, tree)
        # As a function: a tree of labels may be callable itself (an Equinox module).
        return optax.partition({"muon": muon, "adam": adam}, lambda _: labels)

    def init_fn(params: optax.Params) -> Any:
        return partition(params).init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        # Labels from the parameters, not the updates: where a gradient is None, only they know.
        labelled = partition(updates if params is None else params)
        return labelled.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
