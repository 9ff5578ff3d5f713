"""The networks of a variational auto-encoder, with one or two layers of latent variables.

One layer (Kingma & Welling 2014; Rezende et al. 2014): q(z|x) and p(x|z). Two (Burda et al. 2016, section 5):
q(z1|x) q(z2|z1) against p(z2) p(z1|z2) p(x|z1), with p(z2) = N(0, I). All Gaussians are diagonal and are
given by their mean and log variance, both `[B, K]` float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from jaxgen.models.autoencoder import one_hot
from jaxgen.types import Array


class VAE(nn.Module):
    """encoder: images -> mean and log variance of q(z|x), `[B, 2 K]`; decoder: `[B, K]` -> `[B, H, W, P]`.

    num_classes: None, or how many classes there are of which encoder and decoder are told (Kingma et al. 2014
        condition both; Sohn et al. 2015 call it CVAE)
    above: z1 `[B, K]` -> mean and log variance of q(z2|z1) `[B, 2 K2]`; None for one layer
    prior: z2 `[B, K2]` -> those of p(z1|z2) `[B, 2 K]`; None for one layer
    """

    encoder: nn.Module
    decoder: nn.Module
    num_classes: int | None = None
    above: nn.Module | None = None
    prior: nn.Module | None = None

    def encode(self, x: Array, label: Array | None = None) -> tuple[Array, Array]:
        """(mean, log variance) of q(z|x), or q(z1|x): images `[B, H, W, C]` in [-1, 1] -> `[B, K]` each."""
        return _mean_and_log_variance(self.encoder(x, one_hot(label, self.num_classes)))

    def decode(self, z: Array, label: Array | None = None) -> Array:
        """The parameters `[B, H, W, P]` of p(x|z), float32."""
        return self.decoder(z, one_hot(label, self.num_classes))

    def encode_above(self, z1: Array) -> tuple[Array, Array]:
        """(mean, log variance) of q(z2|z1), `[B, K2]` each."""
        assert self.above is not None
        return _mean_and_log_variance(self.above(z1))

    def prior_below(self, z2: Array) -> tuple[Array, Array]:
        """(mean, log variance) of p(z1|z2), `[B, K]` each."""
        assert self.prior is not None
        return _mean_and_log_variance(self.prior(z2))

    def __call__(self, x: Array, label: Array | None = None) -> Array:
        """The parameters of p(x|z) at the mean of q; runs every network, as `init` needs."""
        z, _ = self.encode(x, label)
        if self.above is not None:
            z, _ = self.prior_below(self.encode_above(z)[0])
        return self.decode(z, label)


def _mean_and_log_variance(outputs: Array) -> tuple[Array, Array]:
    mean, log_var = jnp.split(outputs, 2, axis=-1)
    return mean, log_var
