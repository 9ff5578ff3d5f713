"""What tells a Transformer where a token stands: sinusoidal codes added to it, or rotations of its heads."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxgen.types import Array


def sinusoidal_positions(positions: Array, dim: int) -> Array:
    """PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) = cos(the same) (Vaswani et al. 2017, 3.5).

    Args:
        positions: int `[...]`; dim: even.

    Returns:
        float32 `[..., dim]`, sines and cosines interleaved, in [-1, 1].
    """
    angles = positions.astype(jnp.float32)[..., None] * _frequencies(dim, positions.ndim)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, dim)


def rotate(x: Array, positions: Array) -> Array:
    """Rotary positions: the pair (x_i, x_{i + D/2}) turned by pos / 10000^(2i/D) (Su et al. 2021, eq. 15).

    Inner products of two vectors so turned depend on the difference of their positions alone. Halves are
    paired (as in GPT-NeoX and Llama), where the paper pairs neighbours: the same but for their order.

    Args:
        x: `[B, heads, N, D]`, D even; positions: int `[B, N]` or `[1, N]`.

    Returns:
        As x.
    """
    angles = positions.astype(jnp.float32)[:, None, :, None] * _frequencies(x.shape[-1], 3)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _frequencies(dim: int, leading: int) -> np.ndarray:
    """10000^(-2i/dim), float32, with `leading` axes of one before it."""
    frequencies = 10_000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return frequencies.astype(np.float32).reshape((1,) * leading + (-1,))
