"""`scale_by_gefen_muon`: orthogonal updates from a quantised momentum."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from gefen_jax._builtin import builtin_codebook
from gefen_jax._constants import LEVELS
from gefen_jax._dither import leaf_phases
from gefen_jax._encoder import lookup_is_exact, make_encoder
from gefen_jax._levels import make_levels
from gefen_jax._matrices import (
    DimensionNumbers,
    from_matrices,
    read_axes,
    to_matrices,
)
from gefen_jax._momentum import (
    BITS,
    Coder,
    Dithered,
    Momentum,
    Storage,
    advance,
    init,
    storage_for,
)
from gefen_jax._newton_schulz import (
    PRESETS,
    check_preconditioning,
    orthogonalize,
    read_coefficients,
)
from gefen_jax._paths import LeafSpec, leaf_spec, path_name
from gefen_jax._placed import placed_beside, placed_like
from gefen_jax._plan import Plan
from gefen_jax._state import check_type, leaves_of
from gefen_jax._transform import check_number, kinds_of
from gefen_jax._untrained import Untrained

Coefficients = str | Sequence[Any] | ArrayLike
# One entry, a tree like the parameters or a prefix of it, or a function of them.
WeightDimensionNumbers = Any | MuonDimensionNumbers | Callable[[optax.Params], Any] | None


class ScaleByGefenMuonState(NamedTuple):
    """State of `scale_by_gefen_muon`: mu and scale are trees like the parameters.

    The momentum of a coded leaf is ``codebook[codes] * scale``; codes of 4 bits lie two in a byte.
    A small leaf, and with 32 bits every leaf, keeps float32 in mu and None in scale.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] # (): int32
    codebook: Any  # shape (256,) or (16,), float32: what the codes stand for; None for 32 bits
    mu: Any  # follows the params: uint8 codes or float32
    scale: Any  # follows the params: float32, shape // block, or None


class _Scalars(NamedTuple):
    """The numbers of one step; t is the number of this step, from 1."""

    beta: Any
    one_minus_beta: Any  # subtracted before it becomes float32
    eps: Any
    correction: Float[Array, ""]  # 1 - beta^t
    next_correction: Float[Array, ""]  # 1 - beta^(t + 1), for nesterov


class _Recipe(NamedTuple):
    """What is the same for all leaves and all steps, and decides what is compiled."""

    nesterov: bool
    adaptive: bool
    preconditioning: str
    exact_lookup: bool


def _step_leaf(g, momentum, scalars, coder, coefficients, *, storage, axes, recipe):
    """One step of one leaf: the update, in the gradient's dtype, and the new momentum."""
    g32 = g.astype(jnp.float32)
    beta, one_minus_beta, eps, correction, next_correction = scalars
    m, momentum = advance(
        g32, momentum, beta, one_minus_beta, storage, coder, exact_lookup=recipe.exact_lookup
    )
    if recipe.nesterov:
        m_hat = beta * (m / next_correction) + one_minus_beta * (g32 / correction)
    else:
        m_hat = m / correction
    update = orthogonalize(to_matrices(m_hat, axes), coefficients, recipe.preconditioning, eps)
    update = from_matrices(update, g.shape, axes)
    if recipe.adaptive:
        # The dual norm of what was orthogonalised (Bernstein and Newhouse, arXiv 2409.20325).
        update = jnp.sum(m_hat * update) * update
    return update.astype(g.dtype), momentum


@functools.partial(jax.jit, static_argnames=("storage", "axes", "recipe"))
def _update_leaf(g, momentum, scalars, coder, coefficients, *, storage, axes, recipe):
    """Jitted so that leaves of equal shape are traced and lowered once."""
    step: Callable[..., Any] = functools.partial(
        _step_leaf, storage=storage, axes=axes, recipe=recipe
    )
    mesh = jax.typeof(g).sharding.mesh
    if mesh.explicit_axes:
        # The product of a matrix and its transpose has no sharding that Explicit axes would
        # choose: the compiler does, as it does on Auto axes.
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (g, momentum))
        step = jax.sharding.auto_axes(step, axes=mesh.explicit_axes, out_sharding=shardings)
    return step(g, momentum, scalars, coder, coefficients)


def _storages(specs: list[LeafSpec], plan: Plan | None, bits: int) -> list[Storage | None]:
    """The storage of every leaf; None where there is nothing to train."""
    kinds = kinds_of(specs, plan)

    def storage(spec: LeafSpec) -> Storage | None:
        kind = kinds[spec.path]
        if not spec.trained or isinstance(kind, Untrained):
            return None
        partition = None if plan is None else plan[spec.path].partition
        local = None if partition is None else partition.share(spec.shape)
        return storage_for(kind, spec.shape, bits, local)

    return [storage(spec) for spec in specs]


def _describe(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    return ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves) or "nothing"


def _check_state(spec: LeafSpec, storage: Storage | None, momentum: Momentum) -> None:
    """The state must be the one that this leaf starts with, in all but its values."""
    expected = Momentum(None, None)
    if storage is not None:
        expected = jax.eval_shape(lambda: init(spec.shape, storage))
    if _describe(expected) != _describe(momentum):
        raise ValueError(
            f"the momentum of `{spec.path}` does not fit a gradient of shape {spec.shape}, kept as"
            f" {storage}: expected {_describe(expected)}, found {_describe(momentum)}. Use the"
            " parameters, plan and bits that the state was made with, and keep its dtypes."
        )


def scale_by_gefen_muon(
    ns_coeffs: Coefficients = PRESETS["standard"],
    ns_steps: Any = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    plan: Plan | None = None,
    bits: int = 8,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Muon does, with a momentum of one byte per parameter, or of half a one.

    Per block of a leaf, with :math:`c` the codebook, :math:`s` the block's scale and :math:`k` the
    codes of its elements,

    .. math::
      m_t &= \beta\, c[k_{t-1}] s_{t-1} + (1 - \beta) g_t, \quad
      s_t = \max_{block} |m_t|, \quad k_t = \mathrm{round}_c(m_t / s_t) \\
      u_t &= \mathrm{NewtonSchulz}\left(\beta \frac{m_t}{1 - \beta^{t+1}} +
      (1 - \beta) \frac{g_t}{1 - \beta^t}\right)

    and without Nesterov momentum of :math:`m_t / (1 - \beta^t)`. The update sees :math:`m_t` as it
    was before rounding: only what is remembered is rounded, with 8 bits to the nearest entry of
    :math:`c`, with 4 up or down so that it is right on average. That is decided by the leaf's path,
    the position in it and the count, so there is no key to thread and a run resumes bit for bit.
    Arithmetic is float32 whatever the gradient's dtype; updates leave in the gradient's dtype.

    Names, order, defaults and meanings are those of `optax.contrib.scale_by_muon`, without
    ``mu_dtype``, and with ``plan`` and ``bits``.

    Args:
      ns_coeffs: Coefficients of the Newton-Schulz iteration: one triple for all iterations, one
        for each, or a preset, "standard" or "dion".
      ns_steps: Number of iterations, a plain integer; ignored if there is a triple for each.
      beta: Decay rate of the momentum, in [0, 1).
      eps: Keeps the scaling before the iteration finite.
      nesterov: Whether to use Nesterov momentum.
      adaptive: Whether to scale the update by the dual norm of what was orthogonalised.
      preconditioning: What scales a matrix before the iteration: its norm, "frobenius",
        "spectral" or "schatten", or "aol", the norms of its rows.
      weight_dimension_numbers: `optax.contrib.MuonDimensionNumbers` that say which axes are
        input and output: a tree like the parameters, a prefix of it, or a function of them. None,
        there or for a leaf, means a matrix.
      plan: From `calibrate` or `plan_by_shape`: blocks, for 8 bits the codebook, and on a mesh
        blocks and groups that cross no shards. None for blocks by shape and a built-in codebook.
      bits: 8; 4, groups of 64 with sixteen levels, whose rounding can be seen in the loss (see
        `gefen_muon`); or 32, a momentum in float32.

    Returns:
      A `optax.GradientTransformationExtraArgs` whose state is a `ScaleByGefenMuonState` with its
      final shapes from ``init`` on: bytes per parameter 1 + 4 / block for 8 bits, 0.5625 for 4. A
      None gradient leaves that leaf's state as it is; a leaf that is no float has none.

    Raises:
      ValueError: For arguments out of range; in ``init`` and ``update`` for a leaf that is no
        matrix, or that does not fit the plan, by name.
      TypeError: For a traced ``ns_steps``; in ``init`` for a complex leaf.
      NotImplementedError: When a coded momentum is differentiated.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> params = {"kernel": jnp.zeros((128, 256))}
      >>> tx = gx.scale_by_gefen_muon(bits=4)
      >>> state = tx.init(params)
      >>> print(state.mu["kernel"].shape, state.scale["kernel"].shape)
      (128, 128) (128, 4)
      >>> grads = {"kernel": jax.random.normal(jax.random.key(0), (128, 256))}
      >>> updates, state = tx.update(grads, state)
      >>> s = jnp.linalg.svd(updates["kernel"], compute_uv=False)
      >>> print(bool(s.min() > 0.6), bool(s.max() < 1.3))
      True True

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026
    """
    _check_bits(bits)
    check_number("beta", beta, 0.0, 1.0, open_end=True)
    check_number("eps", eps, 0.0, math.inf, open_end=True)
    check_preconditioning(preconditioning)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a gefen_jax.Plan or None, got {type(plan).__name__}")
    coefficients = read_coefficients(ns_coeffs, ns_steps)
    codebook, exact_lookup = _codebook(plan, bits)
    recipe = _Recipe(nesterov, adaptive, preconditioning, exact_lookup)

    def init_fn(params: optax.Params) -> ScaleByGefenMuonState:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        specs = [leaf_spec(path_name(path), leaf) for path, leaf in flat]
        entries = DimensionNumbers(weight_dimension_numbers, params)
        moments = []
        for (path, x), spec, storage in zip(flat, specs, _storages(specs, plan, bits), strict=True):
            if storage is not None:
                read_axes(spec.path, spec.shape, entries[path])  # raises now, not in a later step
            momentum = Momentum(None, None) if storage is None else init(spec.shape, storage)
            moments.append(placed_like(x, momentum))
        # A fresh buffer: the state may be donated.
        tables = jnp.zeros([], jnp.int32), None if codebook is None else jnp.array(codebook)
        return ScaleByGefenMuonState(*placed_beside(params, tables), **_by_slot(treedef, moments))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGefenMuonState]:
        del extra_args
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
        check_type(state, ScaleByGefenMuonState)
        slots = leaves_of(state, Momentum._fields, [path for path, _ in flat], treedef)
        moments = [Momentum(*leaf) for leaf in slots]
        present = [i for i, (_, g) in enumerate(flat) if g is not None]
        specs = [leaf_spec(path_name(flat[i][0]), flat[i][1]) for i in present]
        entries = DimensionNumbers(weight_dimension_numbers, updates if params is None else params)
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = _scalars(beta, eps, count)
        coders = _coders(state.codebook, bits, specs, count)
        new_updates = [g for _, g in flat]
        storages = _storages(specs, plan, bits)
        for i, spec, storage, coder in zip(present, specs, storages, coders, strict=True):
            _check_state(spec, storage, moments[i])
            if storage is not None:
                new_updates[i], moments[i] = _update_leaf(
                    new_updates[i],
                    moments[i],
                    scalars,
                    coder,
                    coefficients,
                    storage=storage,
                    axes=read_axes(spec.path, spec.shape, entries[flat[i][0]]),
                    recipe=recipe,
                )
        new_state = ScaleByGefenMuonState(count, state.codebook, **_by_slot(treedef, moments))
        return treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_bits(bits: Any) -> None:
    if isinstance(bits, jax.Array):
        raise TypeError(
            "`bits` decides what the state is, and must be a plain integer: with"
            " `optax.inject_hyperparams`, name it in `static_args`"
        )
    if bits not in BITS:
        raise ValueError(f"`bits` must be 4, 8 or 32, got {bits}")


def _codebook(plan: Plan | None, bits: int) -> tuple[np.ndarray | None, bool]:
    """The codebook that a state starts with, and whether its lookup table is exact."""
    if bits == 32:
        return None, True
    if bits == 4:
        # The plan's codebook has 256 entries: nothing in it says which sixteen would be the best.
        return np.asarray(builtin_codebook(LEVELS), np.float32), True
    codebook = np.asarray(builtin_codebook() if plan is None else plan.codebook, np.float32)
    return codebook, lookup_is_exact(codebook) if plan is None else plan.exact_lookup


def _coders(
    codebook: Any, bits: int, specs: list[LeafSpec], count: Int[Array, ""]
) -> list[Coder | None]:
    """What the codes of every leaf are made and read with in this step."""
    if bits == 32:
        return [None] * len(specs)
    if bits == 8:
        return [make_encoder(codebook)] * len(specs)
    levels, phases = make_levels(codebook), leaf_phases([s.path for s in specs], count)
    return [Dithered(levels, phases[i]) for i in range(len(specs))]


def _scalars(beta: Any, eps: Any, count: Int[Array, ""]) -> _Scalars:
    # Cast here: under jax_enable_x64 a number of NumPy's would make the momentum float64.
    one_minus_beta = jnp.asarray(1 - beta, jnp.float32)
    beta, eps = (jnp.asarray(x, jnp.float32) for x in (beta, eps))
    # `1 - b ** t` as Optax writes it, so that 32 bits are its Muon but for rounding.
    following = jnp.asarray(optax.safe_increment(count), jnp.float32)
    corrections = 1 - beta ** count.astype(jnp.float32), 1 - beta**following
    return _Scalars(beta, one_minus_beta, eps, *corrections)


def _by_slot(treedef: Any, moments: list[Momentum]) -> dict[str, Any]:
    """The momenta of all leaves as one tree per slot."""
    return {
        slot: treedef.unflatten([getattr(leaf, slot) for leaf in moments])
        for slot in Momentum._fields
    }
