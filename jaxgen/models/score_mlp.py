"""A multilayer perceptron for scores of points: small data that can be seen whole."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from jaxgen.types import Array


class ScoreMLP(nn.Module):
    """s(x, sigma) = F(x / sqrt(1 + sigma^2), log sigma) / sigma, F with SiLU between its layers.

    The division by sigma is that of the score itself, which is -eps / sigma, so that F is of one size at all
    levels (Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", technique 3).

    Attributes:
        widths: of the hidden layers.
    """

    widths: tuple[int, ...] = (128, 128, 128)

    @nn.compact
    def __call__(self, x: Array, sigma: Array) -> Array:
        """The score float32 `[B, D]` at x `[B, D]` for noise of sigma `[B]`."""
        scaled = x / jnp.sqrt(1.0 + jnp.square(sigma))[:, None]
        h = jnp.concatenate([scaled, jnp.log(sigma)[:, None]], axis=-1)
        for i, width in enumerate(self.widths):
            h = nn.silu(nn.Dense(width, name=f"dense_{i}")(h))
        return nn.Dense(x.shape[-1], name="dense_out")(h) / sigma[:, None]
