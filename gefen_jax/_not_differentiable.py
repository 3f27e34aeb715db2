"""What nobody may differentiate, because the derivative would be wrong or 0."""

import functools
from typing import Any, NoReturn

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def not_differentiable(x: Any, why: str) -> Any:
    """The tree as it is; NotImplementedError, with the reason, if it is differentiated."""
    return x


@not_differentiable.defjvp
def _refuse(why: str, primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(why)
