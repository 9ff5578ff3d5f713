"""A plain stack of convolutions that finds the noise in an image: the residual denoiser of restoration."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv
from jaxgen.types import Array, UserError

_he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DnCNN(nn.Module):
    """A(x) = x - R(x), with R of `depth` 3x3 convolutions and ReLUs between them.

    Zhang et al. 2017, "Beyond a Gaussian Denoiser", section III (20 layers of 64 features for the blind
    network and for the denoiser of Bigdeli et al. 2017), without batch normalisation: as the latter, so that
    an image's result does not depend on others and gradients through the network mean what they say. The last
    layer starts at zero, so that a fresh network leaves images alone.

    Attributes:
        depth: number of convolutions, at least 2.
        features: width of all but the first input and the last output.
        conditional: give the noise level as one more channel (Zhang et al. 2018, FFDNet, section III);
            otherwise the network is blind, and `sigma` has no effect.
        dtype, param_dtype: types of the arithmetic and of the parameters.
    """

    depth: int = 20
    features: int = 64
    conditional: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, sigma: Array) -> Array:
        """The denoised images, float32 `[B, H, W, C]`, from x `[B, H, W, C]` with noise of sigma `[B]`.

        Raises:
            UserError: when depth is below 2 or features below 1.
        """
        if self.depth < 2 or self.features < 1:
            raise UserError(
                f"a residual denoiser needs a depth of at least 2 and a feature, not {self.depth} and "
                f"{self.features}."
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = x
        if self.conditional:
            level = jnp.broadcast_to(sigma.astype(x.dtype)[:, None, None, None], (*x.shape[:3], 1))
            h = jnp.concatenate([x, level], axis=-1)
        for i in range(self.depth - 1):
            h = nn.relu(Conv(self.features, kernel_init=_he, name=f"conv_{i}", **types)(h))
        zeros = nn.initializers.zeros_init()
        noise = Conv(x.shape[-1], kernel_init=zeros, name=f"conv_{self.depth - 1}", **types)(h)
        return x - noise.astype(jnp.float32)
