r"""Newton-Schulz: an almost orthogonal matrix with the singular vectors of a given one.

With X scaled so that its singular values lie in [0, 1], every iteration is an odd polynomial,

    X <- a X + (b A + c A A) X,    A = X X^T,

which moves each singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone. The
coefficients are chosen for a steep slope at 0, not to converge: the singular values end up around
1, not at it (Keller Jordan, Muon, 2024). X lies on its side, so that A is the smaller product.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# (a, b, c): one row for all iterations, or one row for each.
_STANDARD = (3.4445, -4.7750, 2.0315)  # Jordan 2024
_DION = (  # Ahn et al., arXiv 2504.05295
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
PRESETS: dict[str, Any] = {"standard": _STANDARD, "dion": _DION}

# The matrix on its side, scaled, and its Gram matrix.
_Start = tuple[Float[Array, "*batch m n"], Float[Array, "*batch m m"]]


def _gram(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m m"]:
    return x @ x.mT


def _norm(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def _frobenius(x: Float[Array, "*batch m n"], eps: Any) -> _Start:
    """Divides by the Frobenius norm, which is at least the largest singular value."""
    x = x / (_norm(x) + eps)
    return x, _gram(x)


def _spectral(x: Float[Array, "*batch m n"], eps: Any) -> _Start:
    """Divides by the largest singular value itself."""
    x = x / (jnp.linalg.norm(x, ord=2, axis=(-2, -1), keepdims=True) + eps)
    return x, _gram(x)


def _aol(x: Float[Array, "*batch m n"], eps: Any) -> _Start:
    """Scales row i by (sum_j |A_ij|)^(-1/2): almost orthogonal layers (arXiv 2512.04632)."""
    gram = _gram(x)
    s = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.abs(gram), axis=-1, keepdims=True), eps))
    return x * s, gram * s * s.mT


def _schatten(x: Float[Array, "*batch m n"], eps: Any) -> _Start:
    """Divides by the Schatten-4 norm, the root of the Gram matrix's norm (arXiv 2506.10935)."""
    gram = _gram(x)
    s = jax.lax.rsqrt(jnp.maximum(_norm(gram), eps))
    return x * s, gram * (s * s)


PRECONDITIONINGS: dict[str, Callable[..., _Start]] = {
    "frobenius": _frobenius,
    "spectral": _spectral,
    "aol": _aol,
    "schatten": _schatten,
}


def check_preconditioning(preconditioning: str) -> None:
    """Raises ValueError for a name that is none of `PRECONDITIONINGS`."""
    if preconditioning not in PRECONDITIONINGS:
        names = ", ".join(map(repr, PRECONDITIONINGS))
        raise ValueError(f"`preconditioning` must be one of {names}, got {preconditioning!r}")


def read_coefficients(ns_coeffs: Any, ns_steps: Any) -> Float[Array | np.ndarray, "steps 3"]:
    """One row (a, b, c) per iteration.

    Args:
      ns_coeffs: The name of a preset, one row for all iterations, or one row for each.
      ns_steps: The number of iterations if there is one row for all, a plain integer >= 1: it
        unrolls a loop.

    Returns:
      The rows, float32.

    Raises:
      ValueError: For an unknown preset, a wrong shape, or no iteration.
      TypeError: For a traced ``ns_steps``.

    Examples:
      >>> from gefen_jax._newton_schulz import read_coefficients
      >>> read_coefficients("standard", 2)
      array([[ 3.4445, -4.775 ,  2.0315],
             [ 3.4445, -4.775 ,  2.0315]], dtype=float32)
    """
    # An array is a number that `optax.inject_hyperparams` hands on, and traces later.
    if isinstance(ns_steps, jax.Array) or not hasattr(ns_steps, "__index__"):
        raise TypeError(
            "`ns_steps` must be a plain integer, as it decides what is compiled; with"
            " `optax.inject_hyperparams`, name it in `static_args`"
        )
    steps = operator.index(ns_steps)
    if steps < 1:
        raise ValueError(f"`ns_steps` must be at least 1, got {steps}")
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in PRESETS:
            names = ", ".join(map(repr, PRESETS))
            raise ValueError(f"`ns_coeffs` must be numbers or one of {names}, got {ns_coeffs!r}")
        ns_coeffs = PRESETS[ns_coeffs]
    traced = any(isinstance(c, jax.Array) for c in jax.tree.leaves(ns_coeffs))
    rows = (jnp if traced else np).asarray(ns_coeffs, jnp.float32)
    if rows.shape != (3,) and (rows.ndim != 2 or rows.shape[1:] != (3,) or not len(rows)):
        raise ValueError(f"`ns_coeffs` must have shape (3,) or (n, 3), got {rows.shape}")
    return rows[None].repeat(steps, axis=0) if rows.ndim == 1 else rows


def orthogonalize(
    x: Float[Array, "*batch rows columns"],
    coefficients: Float[Array | np.ndarray, "steps 3"],
    preconditioning: str = "frobenius",
    eps: Any = 1e-8,
) -> Float[Array, "*batch rows columns"]:
    r"""Moves the singular values of every matrix towards 1.

    .. math::
      X \leftarrow a X + (b A + c A^2) X, \quad A = X X^T

    once per row (a, b, c), from X scaled as ``preconditioning`` says. A row or column of zeros
    stays one.

    Args:
      x: Matrices in the last two axes, float32.
      coefficients: From `read_coefficients`.
      preconditioning: "frobenius", "spectral", "aol" or "schatten".
      eps: Keeps the scaling finite; added to the norm, or the least that it can be.

    Returns:
      Matrices of the same shapes.

    Examples:
      >>> import jax
      >>> from gefen_jax._newton_schulz import orthogonalize, read_coefficients
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 16))
      >>> y = orthogonalize(x, read_coefficients("standard", 5))
      >>> s = jnp.linalg.svd(y, compute_uv=False)
      >>> print(bool(s.min() > 0.6), bool(s.max() < 1.3))
      True True

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    on_its_side = x.shape[-2] <= x.shape[-1]
    y, gram = PRECONDITIONINGS[preconditioning](x if on_its_side else x.mT, eps)
    for step in range(len(coefficients)):
        if step:
            gram = _gram(y)
        a, b, c = coefficients[step]
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y if on_its_side else y.mT
