"""`from_adam` and `to_adam`: the state of a running AdamW as ours, and back."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gefen_jax._builtin import builtin_codebook
from gefen_jax._constants import LEVELS
from gefen_jax._laid_out import laid_out_like
from gefen_jax._paths import LeafSpec, named_leaves, path_name
from gefen_jax._placed import placed_beside
from gefen_jax._plan import Plan
from gefen_jax._replan import check_known, known_leaves, tables_of
from gefen_jax._state import check_state, state_leaves
from gefen_jax._transform import (
    ScaleByGefenState,
    by_slot,
    check_plan,
    codebook_of,
    kinds_of,
)
from gefen_jax._types import Codebooks, Kind, Moments
from gefen_jax._untrained import Untrained


@functools.partial(jax.jit, static_argnames=("kind", "exact_lookup"))
def _write_leaf(mu, nu, tables, *, kind, exact_lookup):
    """Jitted so that leaves of equal shape are compiled once."""

    def write(mu, nu, tables):
        mu, nu = mu.astype(jnp.float32), nu.astype(jnp.float32)
        return kind.write(mu, nu, Codebooks(**tables, exact_lookup=exact_lookup))

    return laid_out_like(mu, write, mu, nu, tables)


@functools.partial(jax.jit, static_argnames=("kind", "mu_dtype", "nu_dtype"))
def _read_leaf(moments, tables, *, kind, mu_dtype, nu_dtype):
    """Jitted so that leaves of equal shape are compiled once."""

    def read(moments, tables):
        # An exact lookup or not: it makes no difference to reading.
        mu, nu = kind.read(moments, Codebooks(**tables, exact_lookup=True))
        return mu.astype(mu_dtype), nu.astype(nu_dtype)

    return laid_out_like(moments.mu, read, moments, tables)


def from_adam(
    opt_state: optax.OptState, params: optax.Params, plan: Plan | None = None
) -> optax.OptState:
    r"""The state of a run with `optax.adamw`, as the state with which `gefen` goes on.

    Every `optax.ScaleByAdamState` becomes a `ScaleByGefenState` with the same count and with
    Adam's moments :math:`m` and :math:`v` as the plan's kinds write them. With :math:`c` the
    plan's codebook and for every block of a leaf,

    .. math::
      s &= \max_{block} |m|, \quad k = \mathrm{nearest}(c, m / s), \quad v' =
      \mathrm{mean}_{block}(v) \quad \text{(shared blocks)} \\
      v' &= \mathrm{nearest\ level}(\mathrm{mean}_{pair}(v)), \quad
      s = \max_{block} |m / \sqrt{v'}|, \quad
      k = \mathrm{nearest}(c_4, m / \sqrt{v'} / s) \quad \text{(dual code)}

    and exact leaves keep them as they are; `replan` says how far a moment moves. All else in the
    state stays what it is: the count of a schedule, the numbers of `optax.inject_hyperparams`, the
    accumulator of `optax.MultiSteps`. So where ``optax.adamw(...)`` was,
    ``gefen(..., plan=plan)`` with the same arguments takes over, and `scale_by_gefen` where
    `optax.scale_by_adam` was.

    Args:
      opt_state: An optimizer state that holds a `optax.ScaleByAdamState` anywhere: in a chain,
        masked, in a partition, under another transformation. Its moments may have any floating
        dtype. Where there are several, each is converted.
      params: The parameters, or their `jax.ShapeDtypeStruct`s: names, shapes and dtypes are read.
      plan: The plan of the optimizer to come; None for the plan by shape that `gefen` uses without
        one.

    Returns:
      The state in the structure that ``init`` of the optimizer to come gives: about 1 byte per
      parameter. What stays is not copied.

    Raises:
      ValueError: If there is no `optax.ScaleByAdamState`; for the first leaf, by name, whose
        moments do not fit the parameters or the plan, or that has none.
      TypeError: If the plan is something else; for a complex leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.zeros((128, 256))}
      >>> grads = {"w": jax.random.normal(jax.random.key(0), (128, 256))}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
      >>> _, opt_state = tx.update(grads, tx.init(params), params)
      >>> opt_state = gx.from_adam(opt_state, params)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), gx.gefen(1e-3))
      >>> _, opt_state = tx.update(grads, opt_state, params)
      >>> print(optax.tree.get(opt_state, "count"), optax.tree.get(opt_state, "mu")["w"].dtype)
      2 uint8

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014

      Benedek, Koren and Fried, `Gefen: Optimized Stochastic Optimizer
      <https://arxiv.org/abs/2606.13894>`_, 2026

    .. note::
      In `jax.jit` the plan is static: ``jax.jit(gx.from_adam, static_argnums=2)``. A restored
      checkpoint must have its NamedTuples again, not dicts: restore it into the structure of
      ``jax.eval_shape(optax.adamw(...).init, params)``.

    .. note::
      With flax nnx, ``nnx.update(optimizer.opt_state, nnx.state(converted))`` puts what this made
      of ``nnx.as_pure(old.opt_state)`` into the new `nnx.Optimizer`.

    .. warning::
      Some other optimizers keep other things in a `optax.ScaleByAdamState`: `optax.adamax` the
      largest gradients, which are no second moment. Nothing in the state tells.
    """
    check_plan("plan", plan)
    known = known_leaves(params)
    return _convert(
        opt_state,
        optax.ScaleByAdamState,
        known,
        lambda state: _gefen_state(state, known, plan),
        "optax.adam or optax.adamw",
    )


def to_adam(
    opt_state: optax.OptState,
    params: optax.Params,
    plan: Plan | None = None,
    *,
    mu_dtype: Any = None,
) -> optax.OptState:
    r"""The state of a run with `gefen`, as the state with which `optax.adamw` goes on.

    The reverse of `from_adam`: every `ScaleByGefenState` becomes a `optax.ScaleByAdamState` with
    the same count and with the moments as the plan's kinds read them. With :math:`c` the state's
    codebook, :math:`s` the scale and :math:`k` the code of an element,

    .. math::
      m &= c[k]\, s, \quad v = v_{block} \quad \text{(shared blocks)} \\
      v &= \mathrm{level}, \quad m = c_4[k]\, s \sqrt{v} \quad \text{(dual code)}

    To Adam and back with the same plan, the moments stay what they are, to the bit but for the
    dual code's first ones, which can be off by 8 roundings of float32 (and provided that Adam's
    dtype is float32). From Adam and back, exact ones do.

    Args:
      opt_state: An optimizer state that holds a `ScaleByGefenState` anywhere.
      params: The parameters, or their `jax.ShapeDtypeStruct`s: names, shapes and dtypes are read.
      plan: The plan of the state; None for the plan by shape that `gefen` uses without one.
      mu_dtype: As in `optax.adamw`: the dtype of Adam's first moments; None for the parameters'.

    Returns:
      The state in the structure that ``init`` of the optimizer with `optax.adamw` (or
      `optax.scale_by_adam`) gives, in its dtypes: mu in ``mu_dtype``, nu in the parameters'.

    Raises:
      ValueError: If there is no `ScaleByGefenState`; for the first leaf, by name, whose state does
        not fit the parameters or the plan, or that has none.
      TypeError: If the plan is something else; for a complex leaf.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gefen_jax as gx
      >>> params = {"w": jnp.ones((128, 256))}
      >>> tx = gx.gefen(1e-3)
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> opt_state = gx.to_adam(opt_state, params)
      >>> _, opt_state = optax.adamw(1e-3).update(params, opt_state, params)
      >>> print(type(opt_state[0]).__name__, opt_state[0].count, opt_state[0].mu["w"].dtype)
      ScaleByAdamState 2 float32

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014

    .. note::
      In `jax.jit` the plan is static: ``jax.jit(gx.to_adam, static_argnums=2)``. With flax nnx, see
      `from_adam`.

    .. warning::
      Optax does not refuse a state of gefen's that was not converted: it finds ``mu`` and ``nu`` in
      it, and takes codes for moments.
    """
    check_plan("plan", plan)
    known = known_leaves(params)
    dtypes = {
        p: jax.eval_shape(jnp.asarray, x).dtype for p, x in named_leaves(params) if p in known
    }

    def dtype_of(path: str) -> Any:
        # Of a vector that all were put into (`optax.flatten`), there may be none of that name.
        return dtypes[path] if path in dtypes else jnp.result_type(*dtypes.values())

    return _convert(
        opt_state,
        ScaleByGefenState,
        known,
        lambda state: _adam_state(state, known, plan, dtype_of, mu_dtype),
        "gefen or scale_by_gefen",
    )


def _convert(
    opt_state: optax.OptState,
    kind_of_state: type,
    known: dict[str, LeafSpec],
    convert: Callable[[Any], Any],
    origin: str,
) -> optax.OptState:
    """Converts all states of one type, wherever they are."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kind_of_state)

    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=is_one)
    states = [node for node in nodes if is_one(node)]
    if not states:
        raise ValueError(
            f"`opt_state` holds no {kind_of_state.__name__}, as the state of an optimizer with"
            f" {origin} does. Restored from a checkpoint, it must have its NamedTuples again, not"
            " dicts: restore it into the structure of `jax.eval_shape(tx.init, params)`."
        )
    _check_whole(known, (state.mu for state in states))
    return treedef.unflatten([convert(node) if is_one(node) else node for node in nodes])


def _check_whole(known: dict[str, LeafSpec], trees: Iterable[Any]) -> None:
    """Every parameter must stand in one of the trees, if only masked."""

    def is_place(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    places = {
        path_name(path)
        for tree in trees
        for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_place)[0]
    }
    for path in known:
        parts = path.split("/")
        above = {"/".join(parts[: i + 1]) for i in range(len(parts))} | {"."}
        if path != "." and not above & places:
            raise ValueError(
                f"`params` has `{path}`, of which `opt_state` has no moments: it has"
                f" {sorted(places)[:3]} ... Give the parameters that the state was made for."
            )


def _gefen_state(
    state: optax.ScaleByAdamState, known: dict[str, LeafSpec], plan: Plan | None
) -> ScaleByGefenState:
    """One Adam state as ours."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(state.mu)
    nus = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(state.nu)[0]}
    pairs = [(path_name(path), mu, nus.pop(path_name(path), None)) for path, mu in flat]
    pairs += [(path, None, nu) for path, nu in nus.items()]
    specs = [_checked(path, mu, nu, known) for path, mu, nu in pairs]
    kinds = kinds_of(specs, plan)
    for spec in specs:
        _check_kept(spec, kinds[spec.path])
    codebook, exact_lookup = codebook_of(plan)
    codebook, codebook4 = jnp.array(codebook), jnp.array(builtin_codebook(LEVELS), jnp.float32)
    tables = tables_of(codebook, codebook4)
    moments: list[Moments] = [
        _write_leaf(mu, nu, tables, kind=kinds[spec.path], exact_lookup=exact_lookup)
        for spec, (_, mu, nu) in zip(specs, pairs, strict=True)
    ]
    count = jnp.asarray(state.count)
    codebooks = placed_beside(state.mu, (codebook, codebook4))
    return ScaleByGefenState(count, *codebooks, **by_slot(treedef, moments))


def _checked(path: str, mu: Any, nu: Any, known: dict[str, LeafSpec]) -> LeafSpec:
    """The spec of a leaf of an Adam state, once its moments fit the parameters."""
    if mu is None or nu is None:
        has, lacks = ("nu", "mu") if mu is None else ("mu", "nu")
        raise ValueError(f"`opt_state` has a {has} of `{path}` and no {lacks}: no Adam's moments")
    if jnp.shape(mu) != jnp.shape(nu):
        raise ValueError(
            f"`opt_state` has a mu of `{path}` of shape {jnp.shape(mu)} and a nu of shape"
            f" {jnp.shape(nu)}: no Adam's moments"
        )
    check_known(LeafSpec(path, tuple(jnp.shape(mu)), True), known)
    spec = known[path]
    floats = all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in (mu, nu))
    if spec.trained and not floats:
        raise ValueError(
            f"`opt_state` has moments of `{path}` of dtypes {jnp.result_type(mu)} and"
            f" {jnp.result_type(nu)}: Adam's are floats"
        )
    return spec


def _check_kept(spec: LeafSpec, kind: Kind) -> None:
    if spec.trained == isinstance(kind, Untrained):
        what = "has moments, and none" if spec.trained else "is no float, and has some"
        raise ValueError(
            f"`{spec.path}` {what} under `plan`, {kind}: moments are neither dropped nor made up."
            " Make the plan from these parameters."
        )


def _adam_state(
    state: ScaleByGefenState,
    known: dict[str, LeafSpec],
    plan: Plan | None,
    dtype_of: Callable[[str], Any],
    mu_dtype: Any,
) -> optax.ScaleByAdamState:
    """One Gefen state as Adam's."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(state.mu, is_leaf=lambda x: x is None)
    specs, moments = state_leaves(state, [path for path, _ in flat], treedef)
    kinds = kinds_of(specs, plan)
    tables = tables_of(state.codebook, state.codebook4)
    mus, nus = [], []
    for spec, leaf in zip(specs, moments, strict=True):
        check_known(spec, known)
        check_state(spec, kinds[spec.path], leaf)
        param = known.get(spec.path)
        mu = nu = None
        if spec.trained:
            nu_dtype = dtype_of(spec.path)
            mu, nu = _read_leaf(
                leaf,
                tables,
                kind=kinds[spec.path],
                mu_dtype=nu_dtype if mu_dtype is None else jnp.dtype(mu_dtype),
                nu_dtype=nu_dtype,
            )
        elif param is not None:
            _check_kept(param, kinds[spec.path])
            # What Adam keeps of a leaf that is no float, two buffers that can be donated.
            mu = jnp.zeros(param.shape, mu_dtype or dtype_of(spec.path))
            nu = jnp.zeros(param.shape, dtype_of(spec.path))
        mus.append(mu)
        nus.append(nu)
    return optax.ScaleByAdamState(state.count, treedef.unflatten(mus), treedef.unflatten(nus))
