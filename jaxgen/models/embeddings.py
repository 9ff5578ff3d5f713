"""Embeddings of scalars: the sinusoidal code of a time step."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxgen.types import Array


def sinusoidal_embedding(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sines, then cosines, of `t` at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    With h = dim // 2 and w_i = max_period^(-i / (h - 1)), i = 0 … h-1, the result is
    [sin(t w_0) … sin(t w_{h-1}), cos(t w_0) … cos(t w_{h-1})], as in the code of Ho et al. 2020: sines
    and cosines are not interleaved, and the slowest frequency is exactly 1 / max_period.

    Args:
        t: times `[B]`, int or float, in steps (0 … T-1; fractions are allowed).
        dim: width, at least 4; an odd width ends in one column of zeros.
        max_period: the ratio of the fastest to the slowest frequency.

    Returns:
        float32 `[B, dim]`, in [-1, 1].
    """
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(max_period) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(code, ((0, 0), (0, dim - 2 * half)))
