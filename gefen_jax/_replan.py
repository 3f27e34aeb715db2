"""`replan`: the moments of a state, decoded and coded again under another plan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gefen_jax._builtin import builtin_codebook
from gefen_jax._constants import LEVELS
from gefen_jax._encoder import make_encoder
from gefen_jax._laid_out import laid_out_like
from gefen_jax._levels import make_levels
from gefen_jax._paths import LeafSpec, param_specs
from gefen_jax._placed import placed_beside
from gefen_jax._plan import Plan
from gefen_jax._state import advice, check_state, state_leaves
from gefen_jax._transform import (
    ScaleByGefenState,
    by_slot,
    check_plan,
    codebook_of,
    kinds_of,
)
from gefen_jax._types import Codebooks, Kind, Moments
from gefen_jax._untrained import Untrained


@functools.partial(jax.jit, static_argnames=("kind", "new_kind", "exact_lookup"))
def _recode_leaf(moments, tables, new_tables, *, kind, new_kind, exact_lookup):
    """Jitted so that leaves of equal shape are compiled once, and no leaf is decoded in memory."""

    def recode(moments, tables, new_tables):
        mu, nu = kind.read(moments, Codebooks(**tables, exact_lookup=exact_lookup))
        return new_kind.write(mu, nu, Codebooks(**new_tables, exact_lookup=exact_lookup))

    return laid_out_like(moments.mu, recode, moments, tables, new_tables)


def replan(
    opt_state: optax.OptState,
    params: optax.Params,
    plan: Plan | None,
    new_plan: Plan | None,
) -> optax.OptState:
    r"""The same moments, decoded and coded again under another plan.

    For a run that goes on with other blocks, another kind of state or another codebook: after a
    calibration on later gradients, or for a checkpoint from before. Every leaf is decoded to
    :math:`m` and :math:`v` per element as its old kind reads them; its new kind writes them. With
    :math:`c` the new codebook and for every new block,

    .. math::
      s &= \max_{block} |m|, \quad k = \mathrm{nearest}(c, m / s), \quad v' =
      \mathrm{mean}_{block}(v) \quad \text{(shared blocks)} \\
      v' &= \mathrm{nearest\ level}(\mathrm{mean}_{pair}(v)), \quad
      s = \max_{block} |m / \sqrt{v'}|, \quad
      k = \mathrm{nearest}(c_4, m / \sqrt{v'} / s) \quad \text{(dual code)}

    and exact moments are stored as they are. So a first moment moves by at most half the largest
    gap between entries of the codebook times :math:`s` (times :math:`\sqrt{v'}` in the dual code).
    In the dual code, a pair's second moment is within 1/32 of the mean of its two, and none is kept
    below 2^-16 of its block's largest, rounded up to a power of two.

    To exact moments, nothing is lost. To the same plan, the moments stay what they are, to the bit
    but for the dual code's first ones, which can be off by 8 roundings of float32. (Provided that
    the codebook has -1 and 1, as every calibrated or built-in one does, and that no scale is near
    the ends of the floats' range. Proof: a block's largest entry is -1 or 1, so its scale comes
    back; a quotient by it is within a few roundings of the entry it came from, and entries are
    thousands of roundings apart; the mean of equal numbers is taken as that number; and the levels
    below a largest one are among those below any power of two over it.)

    Args:
      opt_state: An optimizer state that holds a `ScaleByGefenState` anywhere: in a chain, masked,
        in a partition, under `optax.MultiSteps` or `optax.inject_hyperparams`. Where there are
        several, each is replanned. All else in it stays what it is, the count included.
      params: The parameters, or their `jax.ShapeDtypeStruct`s, of which the state may hold a part.
        Only names and shapes are read, to refuse a state that belongs to others.
      plan: The plan of the state as it is; None for the plan by shape that `gefen` uses without
        one.
      new_plan: The plan of the state to come; None as for ``plan``.

    Returns:
      The state that goes with ``gefen(..., plan=new_plan)``, with the new plan's codebook.

    Raises:
      ValueError: If a leaf does not fit the parameters, the plan or the new plan, by name; if one
        that has moments has none under the new plan, or the reverse; if there is no Gefen state.
      TypeError: If a plan is something else.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.zeros((128, 256))}
      >>> grads = {"w": jax.random.normal(jax.random.key(0), (128, 256))}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(1e-3))
      >>> _, opt_state = tx.update(grads, tx.init(params), params)
      >>> plan = gx.calibrate(params, grads)
      >>> opt_state = gx.replan(opt_state, params, None, plan)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(1e-3, plan=plan))
      >>> _, opt_state = tx.update(grads, opt_state, params)
      >>> print(optax.tree.get(opt_state, "nu")["w"].shape, plan["w"].kind)
      (128, 1) SharedBlocks(block=(1, 256))

    References:
      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

    .. note::
      In `jax.jit` the plans are static: ``jax.jit(gx.replan, static_argnums=(2, 3))``. The
      momentum of `scale_by_gefen_muon` is not replanned. With flax nnx, see `from_adam`.
    """
    check_plan("plan", plan)
    check_plan("new_plan", new_plan)
    known = known_leaves(params)
    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=_is_gefen)
    if not any(map(_is_gefen, nodes)):
        raise ValueError(
            "`opt_state` holds no ScaleByGefenState, as the state of an optimizer with gefen or"
            f" scale_by_gefen in it does. {advice(opt_state)}"
        )
    return treedef.unflatten(
        [_replan(node, known, plan, new_plan) if _is_gefen(node) else node for node in nodes]
    )


def _is_gefen(node: Any) -> bool:
    return isinstance(node, ScaleByGefenState)


def _replan(
    state: ScaleByGefenState,
    known: dict[str, LeafSpec],
    plan: Plan | None,
    new_plan: Plan | None,
) -> ScaleByGefenState:
    """One Gefen state under the new plan."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(state.mu, is_leaf=lambda x: x is None)
    specs, moments = state_leaves(state, [path for path, _ in flat], treedef)
    kinds, new_kinds = kinds_of(specs, plan), kinds_of(specs, new_plan)
    for spec, old in zip(specs, moments, strict=True):
        check_known(spec, known)
        check_state(spec, kinds[spec.path], old)
        _check_kept(spec, new_kinds[spec.path])
    codebook, exact_lookup = codebook_of(new_plan)
    codebook, codebook4 = jnp.array(codebook), jnp.array(builtin_codebook(LEVELS), jnp.float32)
    tables = tables_of(state.codebook, state.codebook4)
    new_tables = tables_of(codebook, codebook4)
    new_moments: list[Moments] = [
        _recode_leaf(
            old,
            tables,
            new_tables,
            kind=kinds[spec.path],
            new_kind=new_kinds[spec.path],
            exact_lookup=exact_lookup,
        )
        for spec, old in zip(specs, moments, strict=True)
    ]
    codebooks = placed_beside(state.mu, (codebook, codebook4))
    return ScaleByGefenState(state.count, *codebooks, **by_slot(treedef, new_moments))


@jax.jit
def tables_of(codebook, codebook4):
    """What codes are read and written with, by the fields of `Codebooks`."""
    return {"encoder": make_encoder(codebook), "levels": make_levels(codebook4)}


def known_leaves(params: optax.Params) -> dict[str, LeafSpec]:
    """The leaves of which a state may hold moments, by path."""
    known = {spec.path: spec for spec in param_specs(params)}
    # Under `optax.flatten` a state sees all parameters as one vector, a tree that is one leaf.
    total = sum(spec.size for spec in known.values())
    known.setdefault(".", LeafSpec(".", (total,), True))
    return known


def check_known(spec: LeafSpec, known: dict[str, LeafSpec]) -> None:
    """The parameters must have this leaf of the state, with its shape."""
    param = known.get(spec.path)
    if not spec.trained or (param is not None and param.shape == spec.shape):
        return
    found = f"has none in {list(known)[:3]} ..." if param is None else f"is {param.shape} there"
    raise ValueError(
        f"`opt_state` has moments of `{spec.path}`, of shape {spec.shape}, and `params` {found}."
        " Give the parameters that the state was made for."
    )


def _check_kept(spec: LeafSpec, new_kind: Kind) -> None:
    if spec.trained == isinstance(new_kind, Untrained):
        what = "has moments, and none" if spec.trained else "has no moments, and some"
        raise ValueError(
            f"`{spec.path}` {what} under `new_plan`, {new_kind}: moments are neither dropped nor"
            " made up. Train the same leaves under both plans."
        )
