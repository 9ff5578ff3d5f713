"""Linear layers whose product is one of two matrices, however many axes come before the features."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.products import affine, inner_products
from jaxgen.types import Array


class Dense(nn.Module):
    """x W + b with the parameters of `flax.linen.Dense`, by `affine`.

    Linen's layer sums the gradient of b in `dtype`: in bfloat16 wrong in its third digit, and a tenth of what
    a step of the medium LSTM of Zaremba et al. takes on CPU.

    dtype: of the factors. out_dtype: of the result; None is `dtype`.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` -> `[..., features]`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = (
            self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        )
        y = affine(x.astype(self.dtype), kernel, bias)
        return y.astype(self.dtype if self.out_dtype is None else self.out_dtype)


def embedding_logits(embedding: nn.Embed, x: Array) -> Array:
    """The products of x `[..., D]` with every row of the embedding, float32 `[..., V]`: a head tied to it."""
    flat = x.astype(embedding.dtype).reshape(-1, x.shape[-1])
    return inner_products(flat, embedding.embedding).reshape(*x.shape[:-1], -1)
