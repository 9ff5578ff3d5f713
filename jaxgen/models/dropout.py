"""Dropout that draws half as many random numbers as Linen's, a third of some models' time on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.types import Array, Key

_LEVELS = 1 << 16


def drop(key: Key, x: Array, rate: float, mask_shape: Sequence[int] | None = None) -> Array:
    """x with a share `rate` of its numbers 0 and the others divided by 1 - rate (Srivastava et al. 2014).

    Two numbers share the 32 bits of one random word, so the rate is rounded to a multiple of 2⁻¹⁶; what is
    kept is divided by the rounded one, and the mean over masks is x.

    Args:
        mask_shape: of what is drawn, broadcast to x; None is x's.
    """
    kept = round((1.0 - rate) * _LEVELS)
    if kept == _LEVELS:
        return x
    if kept == 0:
        return jnp.zeros_like(x)
    *rows, columns = x.shape if mask_shape is None else mask_shape
    words = jax.random.bits(key, (*rows, (columns + 1) // 2))
    halves = jnp.concatenate([words % _LEVELS, words // _LEVELS], axis=-1)[..., :columns]
    grown = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / (kept / _LEVELS)
    return jnp.where(halves < kept, grown, 0.0).astype(x.dtype)


class Dropout(nn.Module):
    """`drop` with the random stream "dropout", unless `deterministic`, given here or in the call.

    broadcast_dims: axes along which all share one mask.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """x of any shape `[..., D]`, of x's shape and dtype."""
        if nn.merge_param("deterministic", self.deterministic, deterministic) or self.rate == 0.0:
            return x
        shape = [1 if axis in self.broadcast_dims else size for axis, size in enumerate(x.shape)]
        return drop(self.make_rng("dropout"), x, self.rate, shape)
