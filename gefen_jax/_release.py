"""`release`: a training step in which no tree of gradients ever exists."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gefen_jax._fused import FusedGefen
from gefen_jax._release_check import check_separable
from gefen_jax._release_model import Model, Visit, find_layers, forward, sweep
from gefen_jax._release_part import Choice, Part, check_layers, flatten, owners, put, take
from gefen_jax._scale_by_muon import ScaleByGefenMuonState
from gefen_jax._transform import ScaleByGefenState, check_number


def release(
    optimizer: optax.GradientTransformation | FusedGefen,
    embed: Callable[[Any, Any], Any],
    layer: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], Any],
    *,
    layers: Callable[[Any], Any] = lambda params: params["layers"],
    max_norm: ArrayLike | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[Any, Any, Any], tuple[Any, Any, Array]]:
    r"""A training step that updates every layer as soon as its gradient is there.

    For a model of layers :math:`f` with parameters :math:`\theta_1, \ldots, \theta_L` and the
    others :math:`\phi`,

    .. math::
      x_0 = \mathrm{embed}(\phi, b), \quad x_l = f(\theta_l, x_{l-1}), \quad
      \mathrm{loss} = \mathrm{head}(\phi, x_L, b)

    the forward pass keeps the layers' inputs. Then, from the last layer to the first, one layer is
    computed again, differentiated and updated, before the gradient of the next one exists. What
    only the head uses is updated before the layers, what ``embed`` uses after them; with tied
    embeddings, by the sum of both gradients. So temporaries are those of one layer.

    The results are those of `jax.value_and_grad` and the optimizer's own step, but for the order in
    which XLA adds up. Parameters and state are the ordinary ones, ``optimizer.init(params)``: a run
    may go over from one to the other at any step. To be jitted with both donated.

    Args:
      optimizer: A `fused_gefen`, also in `with_split_weights`; or an Optax transformation that
        gives final updates, each leaf's from its own gradient. With stacked layers also each
        layer's: what takes norms or means of whole leaves takes them of layers.
      embed: ``embed(params, batch)`` gives the first layer's input, a tree of arrays.
      layer: ``layer(layer_params, x)`` gives the next layer's input; where layers are stacked, of
        the shapes and dtypes of ``x``. Random keys, masks and sums of auxiliary losses can be parts
        of ``x``.
      head: ``head(params, x, batch)`` gives the loss, a scalar, and nothing beside it. Like
        ``embed``, it sees the parameters with None in place of the layers' leaves.
      layers: Finds the layers in the parameters: ``layers(params)`` is a list or tuple with one
        tree for each, or one tree of stacked arrays, ``[layers, ...]``, as `jax.lax.scan` and
        ``nnx.scan`` want them.
      max_norm: Clips gradients by their exact global norm, >= 0, as `optax.clip_by_global_norm`
        does. Costs a second backward pass; None for no clipping.
      skip_nonfinite: Whether a step with a gradient that is not finite changes nothing, no count
        either. Costs a second backward pass, which is the same as that for ``max_norm``. What is
        looked at is the norm, in float32: finite gradients beyond 1e19 overflow it, so their step
        is skipped, too (and ``max_norm`` alone makes them 0, as Optax does).

    Returns:
      ``step(params, opt_state, batch)``: the new parameters, the new state, and the loss before
      the step. ``batch`` is any tree. Parameters that are no floats stay as they are.

    Raises:
      ValueError: In ``step``: for layers that are not found, a loss that is no scalar, blocks of a
        state that cross layers, stacked layers whose outputs have other shapes or dtypes than their
        inputs,
        an optimizer in which one leaf's gradient decides another's update or that draws random
        numbers, and `gefen` itself with stacked layers (`fused_gefen` has the same state), or
        `gefen_muon`.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> import gefen_jax as gx
      >>> def embed(params, batch):
      ...   return batch[0] @ params["in"]
      >>> def layer(params, x):
      ...   return x + jnp.tanh(x @ params["w"])
      >>> def head(params, x, batch):
      ...   return jnp.mean((x @ params["in"].T - batch[1]) ** 2)  # tied
      >>> optimizer = gx.fused_gefen(1e-2)
      >>> step = gx.release(optimizer, embed, layer, head)
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params = {"in": jnp.eye(8, 64), "layers": {"w": jnp.zeros((3, 64, 64))}}
      >>> opt_state = optimizer.init(params)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8))
      >>> for _ in range(50):
      ...   params, opt_state, loss = step(params, opt_state, (x, jnp.sin(x)))
      >>> print(bool(loss < 0.05))
      True

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023. Its updates are fused with the backward pass, too.

    .. note::
      On a mesh with Auto axes, give `jax.jit` ``out_shardings``: the compiler may lay out results
      in another way than what came in.

    .. note::
      In stacked layers no block of a state may cross layers. Those by shape do not where a layer
      of the leaf has several axes; give others blocks that fit by `Plan.with_kind`.
    """
    if max_norm is not None:
        check_number("max_norm", max_norm, 0.0, math.inf, open_end=False)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        model, leaves = find_layers((embed, layer, head), params, layers)
        update = _updater(optimizer, model, params, opt_state)
        passed = forward(model, leaves, batch)
        norm: Any = None
        if max_norm is not None or skip_nonfinite:
            norm = _norm(model, leaves, passed)
            # Or XLA takes the two backward passes for one, and keeps its gradients.
            passed, norm = jax.lax.optimization_barrier((passed, norm))

        def visit(carry: Any, part: Visit) -> Any:
            if max_norm is not None:
                grads = {i: _clipped(g, norm, max_norm) for i, g in part.grads.items()}
                part = part._replace(grads=grads)
            return update(carry, part)

        def read(carry: Any) -> list[Any]:
            return [x for _, x in flatten(carry[0])[0]]

        run = jnp.isfinite(norm) if skip_nonfinite else None
        loss, (params, opt_state) = sweep(model, passed, read, visit, (params, opt_state), run)
        return params, opt_state, loss

    return step


def _norm(model: Model, leaves: list[Any], passed: Any) -> Float[Array, ""]:
    """The global norm of all gradients, by a backward pass that throws them away."""

    def visit(total: Any, part: Visit) -> Any:
        squares = (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in part.grads.values())
        return sum(squares, start=total)

    zero = jnp.zeros([], jnp.float32)
    return jnp.sqrt(sweep(model, passed, lambda _: leaves, visit, zero)[1])


def _clipped(g: Array, norm: Any, max_norm: Any) -> Array:
    """As `optax.clip_by_global_norm`, in float32."""
    most = jnp.asarray(max_norm, jnp.float32)
    return jnp.where(norm < most, g, (g.astype(jnp.float32) / norm * most).astype(g.dtype))


_STACKED_MUON = (
    "`optimizer` must not be `gefen_muon` with stacked layers, as it cannot know which layer of a"
    " leaf it steps: give the layers as a list, with a matrix for each"
)
_STACKED_GEFEN = (
    "`optimizer` must be a `gx.fused_gefen` with stacked layers, where `gefen` cannot know which"
    " layer of a leaf it steps: give `gx.fused_gefen` with the same arguments, or"
    " `gx.with_split_weights` of it. The state is the same."
)

_BLOCKS = "Its blocks cross layers: give this leaf blocks with a 1 there (`plan.with_kind`)."
_STATE_OF_LAYERS = (
    "Give the layers as a list, with an array for each, or take an optimizer whose state of a layer"
    " is a slice of the stacked leaf's."
)


def _holds(opt_state: Any, kind_of_state: type) -> bool:
    def is_one(node: Any) -> bool:
        return isinstance(node, kind_of_state)

    return any(map(is_one, jax.tree.leaves(opt_state, is_leaf=is_one)))


def _updater(
    optimizer: Any, model: Model, params: Any, opt_state: Any
) -> Callable[[Any, Visit], Any]:
    """``update((params, state), part)``: the next two."""
    owner = owners(opt_state, params)
    own: list[int | None] = list(range(model.treedef.num_leaves))
    fused = isinstance(optimizer, FusedGefen)
    tx: Any = optimizer if fused else optax.with_extra_args_support(optimizer)
    kinds = tx.kinds(params) if fused else None
    if not fused:
        check_separable(tx, opt_state, params, owner)
    if model.stacked is not None:
        if not fused and _holds(opt_state, ScaleByGefenMuonState):
            raise ValueError(_STACKED_MUON)
        if not fused and _holds(opt_state, ScaleByGefenState):
            raise ValueError(_STACKED_GEFEN)
        choice = Choice(model.inside(), 0, model.number)
        check_layers(opt_state, owner, params, choice, _BLOCKS if fused else _STATE_OF_LAYERS)

    def update(carry: Any, visit: Visit) -> Any:
        params, state = carry
        layer = None if model.stacked is None else visit.layer
        choice, part = Choice(visit.grads, layer, model.number), Part(kinds, layer)

        def grad(i: int) -> Any:
            g = visit.grads.get(i)
            return optax.MaskedNode() if g is None else g if layer is None else g[None]

        def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            if fused:
                return tx.step_part(grads, state, params, part)[:2]
            updates, state = tx.update(grads, state, params, gefen_part=part)
            return optax.apply_updates(params, updates), state

        grads = model.treedef.unflatten([grad(i) for i in range(len(own))])
        args = grads, take(state, owner, choice), take(params, own, choice)
        if visit.run is None:
            new, new_state = step(*args)
        else:
            new, new_state = jax.lax.cond(visit.run, step, lambda g, s, p: (p, s), *args)
        params = put(params, new, own, choice, shared=False)
        return params, put(state, new_state, owner, choice, shared=visit.is_last)

    return update
