"""The noise-conditional score network of Song & Ermon 2019: a RefineNet with dilated convolutions.

Four pairs of residual blocks go down, only the second of which halves the image; the last two widen their
view by dilation instead. Four RefineNet blocks (Lin et al. 2017) come back up. The noise level is told
through every norm (conditional instance norm++). The arithmetic is that of the paper's code, class
CondRefineNetDilated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv
from jaxgen.types import Array, Key, UserError

_EPSILON = 1e-5
# PyTorch's default, which the paper's code takes: uniform in +-1 / sqrt(fan in).
_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class DilatedConv(nn.Module):
    """A 3x3 convolution whose taps are `dilation` pixels apart, padded with zeros to keep the size.

    The image is dealt out into dilation^2 images of every dilation-th pixel, which a plain convolution sees
    side by side in the batch: the same sums.
    """

    features: int
    dilation: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d, (batch, height, width, channels) = self.dilation, x.shape
        rows, columns = -(-height // d), -(-width // d)
        x = jnp.pad(x, ((0, 0), (0, rows * d - height), (0, columns * d - width), (0, 0)))
        x = x.reshape(batch, rows, d, columns, d, channels).transpose(0, 2, 4, 1, 3, 5)
        conv = Conv(
            self.features, kernel_init=_uniform, dtype=self.dtype, param_dtype=self.param_dtype, name="conv"
        )
        y = conv(x.reshape(batch * d * d, rows, columns, channels))
        y = y.reshape(batch, d, d, rows, columns, self.features).transpose(0, 3, 1, 4, 2, 5)
        return y.reshape(batch, rows * d, columns * d, self.features)[:, :height, :width]


class ConditionalInstanceNorm(nn.Module):
    """gamma[k] (instance_norm(x) + alpha[k] z) + beta[k], z the channels' means standardised over the
    channels.

    Song & Ermon 2019, appendix A.1 (eq. 15), for the noise level k.
    """

    num_levels: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        """Map x `[B, H, W, C]` and level int `[B]` to `[B, H, W, C]`."""
        features = x.shape[-1]

        def init(key: Key, shape: Sequence[int], dtype: DTypeLike) -> Array:
            scales = 1.0 + 0.02 * jax.random.normal(key, (shape[0], 2 * features), dtype)
            return jnp.concatenate([scales, jnp.zeros((shape[0], features), dtype)], axis=-1)

        table = self.param("embedding", init, (self.num_levels, 3 * features), self.param_dtype)
        gamma, alpha, beta = jnp.split(table[level][:, None, None], 3, axis=-1)
        values = x.astype(jnp.float32)
        means = jnp.mean(values, axis=(1, 2), keepdims=True)
        centred = values - means
        normalised = centred * jax.lax.rsqrt(
            jnp.mean(jnp.square(centred), axis=(1, 2), keepdims=True) + _EPSILON
        )
        spread = means - jnp.mean(means, axis=-1, keepdims=True)
        # The variance over channels is the unbiased one, as in the paper's code.
        variance = jnp.sum(jnp.square(spread), axis=-1, keepdims=True) / max(features - 1, 1)
        out = gamma * (normalised + alpha * spread * jax.lax.rsqrt(variance + _EPSILON)) + beta
        return out.astype(x.dtype)


def mean_pool(x: Array) -> Array:
    """The means of 2x2 pixels, [B, H, W, C] -> [B, H/2, W/2, C]."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def mean_of_window(x: Array, size: int = 5) -> Array:
    """Sums of size x size pixels over size^2, zeros outside, [B, H, W, C] of the same shape."""
    half = size // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    height, width = x.shape[1:3]
    rows = functools.reduce(jnp.add, (padded[:, i : i + height] for i in range(size)))
    columns = functools.reduce(jnp.add, (rows[:, :, i : i + width] for i in range(size)))
    return columns / size**2


def resize_corners(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear interpolation [B, H, W, C] -> [B, *size, C] in which corners fall on corners."""
    if x.shape[1:3] == size:
        return x

    def weights(old: int, new: int) -> Array:
        position = np.linspace(0.0, old - 1.0, new)
        return jnp.asarray(np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(old))), x.dtype)

    rows, columns = (weights(o, n) for o, n in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


class NCSN(nn.Module):
    """s_theta(x, sigma_k); the defaults are the paper's CIFAR-10 network.

    Attributes:
        features: "ngf", the width at full size; twice that below. 128 for CIFAR-10 and CelebA, 64 for MNIST.
        num_levels: noise levels that it can be told.
        dtype, param_dtype: types of the arithmetic (norms' moments stay float32) and of the parameters.
    """

    features: int = 128
    num_levels: int = 10
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        """The score.

        Args:
            x: images `[B, H, W, C]` in [-1, 1] plus noise; H and W even.
            level: int `[B]` in [0, num_levels).

        Returns:
            float32 `[B, H, W, C]`.

        Raises:
            UserError: for images of odd size, or fields below 1.
        """
        if self.features < 1 or self.num_levels < 1:
            raise UserError(
                f"the network needs features and noise levels, not {self.features} and {self.num_levels}."
            )
        if x.shape[1] % 2 or x.shape[2] % 2:
            raise UserError(f"images of {x.shape[1]}x{x.shape[2]} cannot be halved: use even sizes.")
        narrow, wide = self.features, 2 * self.features
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(h: Array, name: str) -> Array:
            module = ConditionalInstanceNorm(self.num_levels, self.param_dtype, name=name)
            return module(h, level)

        def conv(h: Array, features: int, name: str, *, size: int = 3, use_bias: bool = True) -> Array:
            module = Conv(features, size, use_bias=use_bias, kernel_init=_uniform, name=name, **types)
            return module(h)

        def dilated(h: Array, features: int, dilation: int, name: str) -> Array:
            if dilation == 1:
                return conv(h, features, name)
            return DilatedConv(features, dilation, name=name, **types)(h)

        def residual(h: Array, features: int, name: str, *, dilation: int = 1, first: bool = False) -> Array:
            """norm, ELU, conv, norm, ELU, conv; `first` of its level, it halves the image or is dilated."""
            inner = h.shape[-1] if first else features
            y = dilated(nn.elu(norm(h, f"{name}_norm_1")), inner, dilation, f"{name}_conv_1")
            y = dilated(nn.elu(norm(y, f"{name}_norm_2")), features, dilation, f"{name}_conv_2")
            if not first:
                return h + y
            if dilation > 1:
                return dilated(h, features, dilation, f"{name}_shortcut") + y
            return mean_pool(conv(h, features, f"{name}_shortcut", size=1)) + mean_pool(y)

        def residual_units(h: Array, blocks: int, name: str) -> Array:
            for i in range(blocks):
                y = h
                for j in range(2):
                    y = nn.elu(norm(y, f"{name}_{i}_norm_{j}"))
                    y = conv(y, h.shape[-1], f"{name}_{i}_conv_{j}", use_bias=False)
                h = h + y
            return h

        def refine(inputs: list[Array], features: int, name: str, *, last: bool = False) -> Array:
            """RefineNet: residual units, fusion at the size of the first input, chained pooling, units."""
            units = [residual_units(h, 2, f"{name}_adapt_{i}") for i, h in enumerate(inputs)]
            h = units[0]
            if len(units) > 1:
                size = (inputs[0].shape[1], inputs[0].shape[2])
                fused = [
                    resize_corners(conv(norm(u, f"{name}_fuse_norm_{i}"), features, f"{name}_fuse_{i}"), size)
                    for i, u in enumerate(units)
                ]
                h = fused[0] + fused[1]
            h = path = nn.elu(h)
            for i in range(2):
                path = mean_of_window(norm(path, f"{name}_pool_norm_{i}"))
                path = conv(path, features, f"{name}_pool_conv_{i}", use_bias=False)
                h = h + path
            return residual_units(h, 3 if last else 1, f"{name}_out")

        h = conv(x.astype(self.dtype), narrow, "conv_in")
        level_1 = residual(residual(h, narrow, "down_1_0"), narrow, "down_1_1")
        level_2 = residual(residual(level_1, wide, "down_2_0", first=True), wide, "down_2_1")
        level_3 = residual(
            residual(level_2, wide, "down_3_0", dilation=2, first=True), wide, "down_3_1", dilation=2
        )
        level_4 = residual(
            residual(level_3, wide, "down_4_0", dilation=4, first=True), wide, "down_4_1", dilation=4
        )
        h = refine([level_4], wide, "refine_1")
        h = refine([level_3, h], wide, "refine_2")
        h = refine([level_2, h], narrow, "refine_3")
        h = refine([level_1, h], narrow, "refine_4", last=True)
        h = nn.elu(norm(h, "norm_out"))
        return conv(h, x.shape[-1], "conv_out").astype(jnp.float32)
