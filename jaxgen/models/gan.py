"""Generators and discriminators of adversarial networks: a DCGAN and the residual nets of SNGAN.

A generator's batch norm has no running averages: in training (`train=True`) it uses the statistics of the
batch, and `standing_statistics` measures them on many latents for whatever weights are about to be sampled
from (Brock et al. 2019, section 3.1), averaged weights included. A discriminator treats every image on its
own, as penalties on its gradient ask; its spectral norms keep their vectors in the collection "spectral".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv, conv2d
from jaxgen.types import Array, Key, PyTree

_TINY = 1e-12
_LEAK = 0.1  # slope below 0 of the discriminator's activations (Miyato et al. 2018, table 3)


# ---- spectral normalisation


def power_iteration(matrix: Array, u: Array) -> tuple[Array, Array]:
    """One step towards the largest singular value: (sigma, the next u) (Miyato et al. 2018, algorithm 1).

    matrix: `[N, D]`; u: `[D]` of length 1. v = W u / |W u|, then u = W^T v / |W^T v|, and sigma = v^T W u,
    whose gradient in W is v u^T: the vectors count as constants.
    """
    fixed = jax.lax.stop_gradient(matrix)
    v = _unit(fixed @ u)
    u = _unit(v @ fixed)
    return v @ matrix @ u, u


def _unit(x: Array) -> Array:
    return x / (jnp.linalg.norm(x) + _TINY)


class Kernel(nn.Module):
    """A learned array of `shape`; with `spectral`, divided by its spectral norm as a matrix [-1, last axis].

    Each call with `train` moves the vector "u" on by a power iteration, for which the collection "spectral"
    must be mutable; other calls leave it.
    """

    shape: tuple[int, ...]
    initializer: Callable[..., Any]
    spectral: bool

    @nn.compact
    def __call__(self, train: bool) -> Array:
        kernel: Array = self.param("kernel", self.initializer, self.shape, jnp.float32)
        if not self.spectral:
            return kernel
        start = lambda: _unit(jax.random.normal(self.make_rng("params"), self.shape[-1:]))
        u = self.variable("spectral", "u", start)
        sigma, after = power_iteration(kernel.reshape(-1, self.shape[-1]), u.value)
        if train and not self.is_initializing():
            u.value = after
        return kernel / sigma


def _xavier(gain: float) -> Callable[..., Any]:
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class _Conv(nn.Module):
    """A convolution with bias whose kernel may be spectrally normalised; padding keeps or halves the size."""

    features: int
    size: int
    stride: int
    spectral: bool
    gain: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = Kernel(shape, _xavier(self.gain), self.spectral, name="weight")(train)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        half = (self.size - 1) // 2
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, ((half, half),) * 2)
        return y + bias.astype(self.dtype)[None, None, None]


class _Head(nn.Module):
    """Features `[B, H, W, C]` -> logits `[B]`, float32: a linear form, and the projection on the class.

    flat: the linear form is of all features, else of their sum over positions, as the projection always is:
    logit = psi(h) + <V_y, h> (Miyato and Koyama 2018, eq. 4).
    """

    flat: bool
    num_classes: int | None
    spectral: bool

    @nn.compact
    def __call__(self, x: Array, label: Array | None, train: bool) -> Array:
        x = x.astype(jnp.float32)
        pooled = jnp.sum(x, axis=(1, 2))
        features = x.reshape(x.shape[0], -1) if self.flat else pooled
        weight = Kernel((features.shape[-1], 1), _xavier(1.0), self.spectral, name="linear")(train)
        bias = self.param("bias", nn.initializers.zeros_init(), (1,), jnp.float32)
        logits = (features @ weight + bias[None])[:, 0]
        if self.num_classes is None or label is None:
            return logits
        shape = (self.num_classes, pooled.shape[-1])
        classes = Kernel(shape, _xavier(1.0), self.spectral, name="projection")(train)
        return logits + jnp.sum(classes[label] * pooled, axis=-1)


# ---- what the generators share


class _BatchNorm(nn.Module):
    """Batch norm whose scale and shift are learned, for each class where there are classes.

    Conditional: Dumoulin et al. 2017, eq. 5, as in Miyato and Koyama 2018. The collection "batch_stats"
    holds the statistics of the last batch seen with `train`, not an average.
    """

    num_classes: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, label: Array | None, train: bool) -> Array:
        conditional = self.num_classes is not None
        y = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.0,
            epsilon=1e-5,
            use_scale=not conditional,
            use_bias=not conditional,
            dtype=self.dtype,
            name="norm",
        )(x)
        if self.num_classes is None:
            return y
        options: dict[str, Any] = {"dtype": self.dtype}
        scale = nn.Embed(
            self.num_classes, x.shape[-1], embedding_init=nn.initializers.ones_init(), name="scale", **options
        )
        shift = nn.Embed(
            self.num_classes,
            x.shape[-1],
            embedding_init=nn.initializers.zeros_init(),
            name="shift",
            **options,
        )
        return y * scale(label)[:, None, None] + shift(label)[:, None, None]


def double(x: Array) -> Array:
    """Every pixel twice in both directions: `[B, H, W, C]` -> `[B, 2 H, 2 W, C]`."""
    num, height, width, channels = x.shape
    spread = jnp.broadcast_to(x[:, :, None, :, None], (num, height, 2, width, 2, channels))
    return spread.reshape(num, 2 * height, 2 * width, channels)


def halve(x: Array) -> Array:
    """The mean of each 2x2 block: `[B, H, W, C]` -> `[B, H / 2, W / 2, C]`."""
    num, height, width, channels = x.shape
    return jnp.mean(x.reshape(num, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def _plain_conv(features: int, size: int, gain: float, dtype: DTypeLike, name: str) -> Conv:
    return Conv(features, size, kernel_init=_xavier(gain), dtype=dtype, name=name)


# ---- DCGAN


class DCGANGenerator(nn.Module):
    """Latents to images by doubling the size `num_levels` times (Radford et al. 2016; widths of Miyato's).

    shape: of an image, `(H, W, C)`, H and W divisible by 2^num_levels
    channels: at the image's size; each level below has twice as many

    Deviation: a doubling of pixels and a 3x3 convolution in place of the transposed convolution, against
    checkerboards (Odena et al. 2016).
    """

    shape: tuple[int, int, int]
    channels: int
    num_levels: int
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array | None = None, *, train: bool) -> Array:
        """z `[B, L]`, labels int32 `[B]` where conditional -> images `[B, H, W, C]` in (-1, 1), float32."""
        height, width, colours = self.shape
        low = (height >> self.num_levels, width >> self.num_levels)
        wide = self.channels << self.num_levels
        dense = nn.Dense(low[0] * low[1] * wide, kernel_init=_xavier(1.0), dtype=self.dtype, name="start")
        x = dense(z).reshape(-1, *low, wide)
        norm = lambda name: _BatchNorm(self.num_classes, self.dtype, name=name)
        x = nn.relu(norm("start_norm")(x, label, train))
        for level in reversed(range(self.num_levels)):
            x = _plain_conv(self.channels << level, 3, 1.0, self.dtype, f"conv{level}")(double(x))
            x = nn.relu(norm(f"norm{level}")(x, label, train))
        return jnp.tanh(_plain_conv(colours, 3, 1.0, self.dtype, "image")(x).astype(jnp.float32))


class DCGANDiscriminator(nn.Module):
    """Images to logits, halving the size `num_levels` times (Miyato et al. 2018, table 3).

    channels: at the image's size; each level below has twice as many

    Deviation from Radford et al. 2016: no batch norm, in place of which the spectral norm may stand.
    """

    channels: int
    num_levels: int
    spectral: bool
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None = None, *, train: bool) -> Array:
        """Images `[B, H, W, C]` in [-1, 1], labels int32 `[B]` where conditional -> logits `[B]`."""

        def conv(level: int, size: int, stride: int, name: str) -> _Conv:
            return _Conv(self.channels << level, size, stride, self.spectral, 1.0, self.dtype, name=name)

        for level in range(self.num_levels):
            x = nn.leaky_relu(conv(level, 3, 1, f"conv{level}")(x, train), _LEAK)
            x = nn.leaky_relu(conv(level + 1, 4, 2, f"down{level}")(x, train), _LEAK)
        x = nn.leaky_relu(conv(self.num_levels, 3, 1, "last")(x, train), _LEAK)
        return _Head(True, self.num_classes, self.spectral, name="head")(x, label, train)


# ---- SNGAN's residual nets


class ResNetGenerator(nn.Module):
    """Latents to images by `num_levels` residual blocks that double the size (Miyato et al. 2018, table 4).

    For 32x32 the published one has 3 levels of 256 channels: 4.28M parameters with latents of 128. The fields
    are those of `DCGANGenerator`, but for the channels, which are the same in all blocks.
    """

    shape: tuple[int, int, int]
    channels: int
    num_levels: int
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array | None = None, *, train: bool) -> Array:
        """z `[B, L]`, labels int32 `[B]` where conditional -> images `[B, H, W, C]` in (-1, 1), float32."""
        height, width, colours = self.shape
        low, wide = (height >> self.num_levels, width >> self.num_levels), self.channels
        dense = nn.Dense(low[0] * low[1] * wide, kernel_init=_xavier(1.0), dtype=self.dtype, name="start")
        norm = lambda name: _BatchNorm(self.num_classes, self.dtype, name=name)
        conv = lambda size, gain, name: _plain_conv(wide, size, gain, self.dtype, name)
        x = dense(z).reshape(-1, *low, wide)
        for block in range(self.num_levels):
            y = double(nn.relu(norm(f"block{block}_norm1")(x, label, train)))
            y = conv(3, 2**0.5, f"block{block}_conv1")(y)
            y = nn.relu(norm(f"block{block}_norm2")(y, label, train))
            y = conv(3, 2**0.5, f"block{block}_conv2")(y)
            # A 1x1 convolution before the doubling does what one after it would, on a quarter of the pixels.
            x = y + double(conv(1, 1.0, f"block{block}_shortcut")(x))
        # The last norm has no classes, as in the published code.
        x = nn.relu(_BatchNorm(None, self.dtype, name="norm")(x, None, train))
        return jnp.tanh(_plain_conv(colours, 3, 1.0, self.dtype, "image")(x).astype(jnp.float32))


class ResNetDiscriminator(nn.Module):
    """Images to logits by four residual blocks, the first two halving the size (Miyato et al. 2018, table 4).

    channels: of all blocks, 128 published (1.05M parameters on RGB)
    """

    channels: int
    spectral: bool
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None = None, *, train: bool) -> Array:
        """Images `[B, H, W, C]` in [-1, 1], labels int32 `[B]` where conditional -> logits `[B]`."""

        def conv(x: Array, size: int, gain: float, name: str) -> Array:
            layer = _Conv(self.channels, size, 1, self.spectral, gain, self.dtype, name=name)
            return layer(x, train)

        for block in range(4):
            y = x if block == 0 else nn.relu(x)  # pixels are not to be cut off at 0
            y = nn.relu(conv(y, 3, 2**0.5, f"block{block}_conv1"))
            y = conv(y, 3, 2**0.5, f"block{block}_conv2")
            if block < 2:
                y, x = halve(y), conv(halve(x), 1, 1.0, f"block{block}_shortcut")
            x = x + y
        return _Head(False, self.num_classes, self.spectral, name="head")(nn.relu(x), label, train)


Generator: TypeAlias = DCGANGenerator | ResNetGenerator
Discriminator: TypeAlias = DCGANDiscriminator | ResNetDiscriminator


# ---- the players as functions


def generate_in_training(generator: Generator, params: PyTree, z: Array, label: Array | None) -> Array:
    """Images of latents z `[B, L]`, normalised with the statistics of this batch."""
    images, _ = generator.apply({"params": params}, z, label, train=True, mutable=["batch_stats"])
    return cast(Array, images)


def standing_statistics(generator: Generator, params: PyTree, key: Key, num: int, latent_dim: int) -> PyTree:
    """The "batch_stats" of a generator: those of `num` latents, of all classes in turn.

    Images made with them (`train=False`) do not depend on the batch that they are made in.
    """
    z = jax.random.normal(key, (num, latent_dim))
    label = None if generator.num_classes is None else jnp.arange(num) % generator.num_classes
    _, found = generator.apply({"params": params}, z, label, train=True, mutable=["batch_stats"])
    return found["batch_stats"]


def discriminate(
    discriminator: Discriminator, params: PyTree, state: PyTree, x: Array, label: Array | None, train: bool
) -> tuple[Array, PyTree]:
    """(logits `[B]`, the spectral vectors after it); without `train` these stay. `state` is {} where there
    is no spectral norm."""
    variables = {"params": params, "spectral": state}
    if not train:
        return cast(Array, discriminator.apply(variables, x, label, train=False)), state
    logits, changed = discriminator.apply(variables, x, label, train=True, mutable=["spectral"])
    return cast(Array, logits), changed.get("spectral", {})


def init_players(
    generator: Generator, discriminator: Discriminator, key: Key, image: Array, latent_dim: int
) -> tuple[PyTree, PyTree]:
    """(params, model_state) of both, as `systems.alternating_system` wants them; image `[B, H, W, C]`."""
    generator_key, discriminator_key = jax.random.split(key)
    num = image.shape[0]
    label = None if generator.num_classes is None else jnp.zeros(num, jnp.int32)
    made = generator.init(generator_key, jnp.zeros((num, latent_dim)), label, train=True)
    judge = discriminator.init(discriminator_key, image, label, train=True)
    params = {"generator": made["params"], "discriminator": judge["params"]}
    return params, {"generator": {}, "discriminator": judge.get("spectral", {})}
