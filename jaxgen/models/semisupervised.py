"""The networks of the generative semi-supervised model M2 (Kingma, Rezende, Mohamed & Welling 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxgen.types import Array


class _Joined(nn.Module):
    """A multilayer perceptron of two inputs, whose leading axes are broadcast to one another.

    Each input has its own first layer and the two are added, which is one layer of both side by side: so a
    batch is worked through once however many classes it is set beside.
    """

    hidden: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        h = nn.Dense(self.hidden[0], name="first_a")(a)
        h = nn.softplus(h + nn.Dense(self.hidden[0], use_bias=False, name="first_b")(b))
        for width in self.hidden[1:]:
            h = nn.softplus(nn.Dense(width)(h))
        return nn.Dense(self.outputs)(h)


class M2(nn.Module):
    """q(y|x), q(z|x, y) and p(x|y, z) as perceptrons with softplus, section 2.1 and 4.

    num_pixels: D; num_classes: K; latent_dim: Z; hidden: widths of the hidden layers of each of the three

    Images are rows `[..., D]` in [-1, 1] and classes y one-hot `[..., K]`; leading axes are broadcast.
    """

    num_pixels: int
    num_classes: int
    latent_dim: int
    hidden: Sequence[int]

    def setup(self) -> None:
        self.classifier_layers = [nn.Dense(width) for width in self.hidden]
        self.classifier_head = nn.Dense(self.num_classes)
        self.encoder = _Joined(self.hidden, 2 * self.latent_dim)
        self.decoder = _Joined(self.hidden, self.num_pixels)

    def classify(self, x: Array) -> Array:
        """The logits `[..., K]` of q(y|x)."""
        for layer in self.classifier_layers:
            x = nn.softplus(layer(x))
        return self.classifier_head(x)

    def encode(self, x: Array, y: Array) -> tuple[Array, Array]:
        """(mean, log variance) of q(z|x, y), `[..., Z]` each."""
        mean, log_var = jnp.split(self.encoder(x, y), 2, axis=-1)
        return mean, log_var

    def decode(self, z: Array, y: Array) -> Array:
        """The logits `[..., D]` of white, of p(x|y, z)."""
        return self.decoder(z, y)

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        """(logits of q(y|x), those of p(x|y, z) at the mean of q(z|x, y)); runs all networks, for `init`."""
        return self.classify(x), self.decode(self.encode(x, y)[0], y)
