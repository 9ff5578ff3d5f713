"""Two-dimensional convolution of NHWC images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.products import affine
from jaxgen.types import Array

Padding = Sequence[tuple[int, int]]


_LAYOUT = ("NHWC", "HWIO", "NHWC")
_CACHED = 1 << 18  # entries of x and of its result that are multiplied at once; their shifts are 3 MiB then


def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Cross-correlation of x `[B, H, W, C]` with kernel `[KH, KW, C, D]` -> `[B, H', W', D]`.

    On CPU it has reverse-mode derivatives of any order, but no forward mode (`jax.jvp`).
    """
    padding = tuple((before, after) for before, after in padding)
    if jax.default_backend() != "cpu":
        return _conv(x, kernel, stride, padding)
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return affine(x, kernel[0, 0]).astype(x.dtype)  # half the time of the convolution and its gradient
    return _conv_with_own_gradient(x, kernel, stride, padding)


def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


# XLA's CPU compiler brings convolutions into the layout that its fast kernels take, but not in a loop, and
# the gradient of the kernel, as jax.grad writes it, is not in that layout: in a `lax.scan` it is 30 to 100
# times slower (jax 0.10.2 and 0.12.0). Written in that layout from the start it is fast, and the same bits;
# as a product of matrices (`_kernel_gradient_by_products`) twice as fast again.
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
    x_gradient = jax.lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        x_padding,
        lhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    if _products_are_faster(kernel):
        by_products = partial(_kernel_gradient_by_products, kernel_sizes, stride, padding)
        return x_gradient, _sum_over_pieces(by_products, x, g).astype(kernel.dtype)
    kernel_padding = [
        (before, k + m - 1 - n - before)
        for k, n, m, (before, _) in zip(kernel_sizes, sizes, spread, padding, strict=True)
    ]
    kernel_gradient = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        kernel_padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return x_gradient, kernel_gradient.transpose(1, 2, 0, 3)


def _products_are_faster(kernel: Array) -> bool:
    """Whether the gradient of this kernel is better had by products of matrices.

    Measured for kernels of 3 x 3 and 4 x 4 and 32 to 128 channels. On several devices the pieces of a batch
    would lie across them.
    """
    height, width, channels, _ = kernel.shape
    return height * width >= 9 and channels >= 16 and jax.device_count() == 1


def _kernel_gradient_by_products(
    kernel_sizes: Sequence[int], stride: int, padding: Padding, x: Array, g: Array
) -> Array:
    """The gradient of a kernel `[KH, KW, C, D]`, in float32 or better.

    Its entry `[i, j]` is the sum over h, w of x[stride h + i - top, stride w + j - left] g[h, w]. With KW
    shifts of x along the width side by side, and KH shifts of g along the height, a single product of
    `[KW C, rows]` and `[rows, KH D]` has all of these sums and no others, from KW + KH copies where patches
    of x would be KW KH. With a stride, each row of x goes with some i only: that makes `stride` products.
    """
    (top, _), (left, _) = padding
    height, width = kernel_sizes
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    gradient: dict[int, Array] = {}
    for phase in range(stride):
        taps = [i for i in range(height) if (i - top) % stride == phase]
        if not taps:
            continue
        rows = x[:, phase::stride]
        wide = jnp.concatenate([_shifted(rows, 2, j - left, g.shape[2], stride) for j in range(width)], -1)
        high = jnp.concatenate([_shifted(g, 1, -((i - top) // stride), rows.shape[1]) for i in taps], -1)
        sums = jax.lax.dot_general(
            wide, high, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=dtype
        ).reshape(width, x.shape[-1], len(taps), g.shape[-1])
        gradient |= {i: sums[:, :, number] for number, i in enumerate(taps)}
    return jnp.stack([gradient[i] for i in range(height)])


def _shifted(x: Array, axis: int, start: int, num: int, stride: int = 1) -> Array:
    """The entries start, start + stride, ... of x along an axis, `num` of them; zero outside x."""
    after = start + (num - 1) * stride + 1 - x.shape[axis]
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (-start, after, 0)
    return jax.lax.slice_in_dim(jax.lax.pad(x, jnp.zeros((), x.dtype), config), 0, None, stride, axis)


def _sum_over_pieces(function: Callable[[Array, Array], Array], x: Array, g: Array) -> Array:
    """The sum of a function over pieces of a batch so small that what it multiplies stays in cache."""
    batch = len(x)
    most = max(1, _CACHED * batch // (x.size + g.size))
    piece = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if piece == batch:
        return function(x, g)
    pieces = tuple(jnp.reshape(y, (batch // piece, piece, *y.shape[1:])) for y in (x, g))
    first = jax.tree.map(lambda y: y[0], pieces)
    total = jnp.zeros_like(jax.eval_shape(function, *first))
    return jax.lax.scan(lambda total, xg: (total + function(*xg), None), total, pieces)[0]


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
