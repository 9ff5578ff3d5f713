"""Two-dimensional convolution of NHWC images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dense import flat_matmul
from jaxgen.types import Array

Padding = Sequence[tuple[int, int]]


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Cross-correlation of x `[B, H, W, C]` with kernel `[KH, KW, C, D]` -> `[B, H', W', D]`.

    On CPU it has reverse-mode derivatives of any order, but no forward mode (`jax.jvp`).
    """
    padding = tuple((before, after) for before, after in padding)
    if jax.default_backend() != "cpu":
        return _conv(x, kernel, stride, padding)
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return flat_matmul(x, kernel[0, 0])  # half the time of the convolution, forwards and backwards
    return _conv_with_own_gradient(x, kernel, stride, padding)


def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


# XLA's CPU compiler brings convolutions into the layout that its fast kernels take, but not in a loop, and
# the gradient of the kernel, as jax.grad writes it, is not in that layout: in a `lax.scan` it is 30 to 100
# times slower (jax 0.10.2 and 0.12.0). Written in that layout from the start it is fast, and the same bits.
_conv_with_own_gradient = jax.custom_vjp(_conv, nondiff_argnums=(2, 3))


def _conv_forward(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _conv_with_own_gradient(x, kernel, stride, padding), (x, kernel)


def _conv_backward(
    stride: int, padding: Padding, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    """The gradients of x and kernel from g `[B, H', W', D]`, that of the result."""
    x, kernel = saved
    sizes, kernel_sizes = x.shape[1:3], kernel.shape[:2]
    spread = [(n - 1) * stride + 1 for n in g.shape[1:3]]  # the size of g with zeros between its entries
    x_padding = [
        (k - 1 - before, n + before - m)
        for k, n, m, (before, _) in zip(kernel_sizes, sizes, spread, padding, strict=True)
    ]
    kernel_padding = [
        (before, k + m - 1 - n - before)
        for k, n, m, (before, _) in zip(kernel_sizes, sizes, spread, padding, strict=True)
    ]
    x_gradient = jax.lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        x_padding,
        lhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    kernel_gradient = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        kernel_padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return x_gradient, kernel_gradient.transpose(1, 2, 0, 3)


_conv_with_own_gradient.defvjp(_conv_forward, _conv_backward)


class Conv(nn.Module):
    """`conv2d` with a learned `kernel` `[size, size, C, features]` and, with `use_bias`, `bias` `[features]`.

    Padding is half the size on each side, so that stride 1 keeps the image's size, unless given.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    use_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        half = self.size // 2
        padding = self.padding if self.padding is not None else ((half, half), (half, half))
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        return y + bias.astype(self.dtype)[None, None, None]
