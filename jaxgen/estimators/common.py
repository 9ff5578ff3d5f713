"""What the estimators share: floats of the right width, masks, logarithms that stay finite, keys by index."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.types import Array, Key, UserError

TINY = 1e-30  # the least probability: log(TINY) = -69 is finite in float32 and as good as never


def as_float(x: ArrayLike) -> Array:
    """`x` as a floating array: float32 for integers and booleans, its own width for floats."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(x: Array, mask: ArrayLike | None, num_axes: int = 1) -> Array:
    """The mask of `x` in its dtype: ones `x.shape[:num_axes]` where none is given.

    Raises:
        UserError: the mask's shape is not `x.shape[:num_axes]`.
    """
    if mask is None:
        return jnp.ones(x.shape[:num_axes], x.dtype)
    mask = jnp.asarray(mask)
    if mask.shape != x.shape[:num_axes]:
        raise UserError(f"The mask has shape {mask.shape}; give it the shape {x.shape[:num_axes]}.")
    return (mask > 0).astype(x.dtype)


def masked(x: Array, mask: Array) -> Array:
    """`x` with zeros where `mask` (its leading axes) is 0, whatever stood there: 0 * NaN would be NaN."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) > 0, x, jnp.zeros_like(x))


def safe_log(probability: Array) -> Array:
    """log max(p, 1e-30): finite for a probability of zero."""
    return jnp.log(jnp.maximum(probability, TINY))


def log_normalize(count: Array) -> Array:
    """Log probabilities `[..., K]` from counts `[..., K]` >= 0; uniform where all counts are zero."""
    total = jnp.sum(count, axis=-1, keepdims=True)
    uniform = jnp.full_like(count, 1.0 / count.shape[-1])
    return safe_log(jnp.where(total > 0, count / jnp.where(total > 0, total, 1.0), uniform))


def index_keys(key: Key, num: int) -> Key:
    """Keys `[num]`, the i-th a function of (key, i) alone, so that sample i does not depend on `num`."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))


def require_matrix(x: Array, name: str = "x") -> None:
    """Raises:
    UserError: `x` is not `[N, D]` with at least one row and one column.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"{name} has shape {x.shape}; give it as [N, D] with N and D at least 1.")
