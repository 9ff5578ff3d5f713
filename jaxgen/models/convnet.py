"""A small convolutional classifier of images, whose features also judge generated samples."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv
from jaxgen.models.dropout import Dropout
from jaxgen.types import Array


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, SiLU and 2x2 average pooling, then one hidden layer and the class logits.

    After LeCun et al. 1998, with SiLU for tanh: ReLU leaves a quarter of the features at zero for all digits,
    and a Fréchet distance is blind there. No normalisation, so the model has no state. The parameters fit the
    size that `init` saw (8x8, 28x28 and 32x32 are meant); pooling drops the last row of an odd side.

    widths: channels of each stage
    hidden: number of features D
    num_classes: K
    dropout: rate on the features, in training only
    dtype: of the computation; param_dtype: of the parameters
    """

    widths: tuple[int, ...] = (32, 64)
    hidden: int = 128
    num_classes: int = 10
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.lecun_normal()
        self.convs = [Conv(width, kernel_init=init, **types) for width in self.widths]
        self.embed = nn.Dense(self.hidden, **types)
        self.drop = Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes, **types)

    def features(self, x: Array) -> Array:
        """The last hidden layer, `[B, D]` in the compute dtype, of images `[B, H, W, C]` in [-1, 1]."""
        for conv in self.convs:
            x = nn.avg_pool(nn.silu(conv(x)), (2, 2), strides=(2, 2))
        return nn.silu(self.embed(x.reshape(x.shape[0], -1)))

    def __call__(self, x: Array, *, train: bool) -> Array:
        """The logits `[B, K]`, float32, of images `[B, H, W, C]` in [-1, 1].

        With `train` and a dropout rate above 0, `apply` needs the random stream `dropout`.
        """
        features = self.drop(self.features(x), deterministic=not train)
        return self.head(features).astype(jnp.float32)
