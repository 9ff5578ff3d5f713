"""Two-dimensional convolution of NHWC images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.types import Array

Padding = Sequence[tuple[int, int]]


def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Cross-correlation of x `[B, H, W, C]` with kernel `[KH, KW, C, D]` -> `[B, H', W', D]`."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), tuple(padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nn.Module):
    """`conv2d` with a learned `kernel` `[size, size, C, features]` and `bias` `[features]`.

    Padding is half the size on each side, so that stride 1 keeps the image's size, unless given.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    kernel_init: Callable[..., Any] = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        half = self.size // 2
        padding = self.padding if self.padding is not None else ((half, half), (half, half))
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
        return y + bias.astype(self.dtype)[None, None, None]
