"""Normalising flows on images: RealNVP (Dinh et al. 2017) and Glow (Kingma & Dhariwal 2018).

A layer called with `reverse=False` maps x to (y, log|det dy/dx| [B]), and with `reverse=True` y to
(x, log|det dx/dy| [B]). Everything between layers is float32; `dtype` is that of the couplings' networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.typing import DTypeLike

from jaxgen.models.convolution import conv2d
from jaxgen.types import Array, Key

Kind: TypeAlias = Literal["glow", "realnvp"]
Mask: TypeAlias = Literal["channels", "checkerboard"]

_LEAST_SCALE = 0.05  # of a coupling of Glow


def squeeze(x: Array) -> Array:
    """Each 2x2 square of pixels becomes one pixel: `[B, 2H, 2W, C]` -> `[B, H, W, 4C]`."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(b, h // 2, w // 2, 4 * c)


def unsqueeze(x: Array) -> Array:
    """The inverse of `squeeze`."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(b, 2 * h, 2 * w, c // 4)


def _repeat(value: Array, x: Array) -> Array:
    """A log-determinant that is the same for all examples: [] -> [B]."""
    return jnp.broadcast_to(value, (x.shape[0],))


class ActNorm(nn.Module):
    """y = exp(log_scale) (x + bias) per channel; starts with zero mean and unit variance on the first batch.

    Kingma & Dhariwal 2018, section 3.1. `init` must run it forward on data.
    """

    @nn.compact
    def __call__(self, x: Array, reverse: bool = False) -> tuple[Array, Array]:
        def from_data(statistic: Callable[[Array], Array]) -> Callable[[Key], Array]:
            return lambda key: statistic(x.astype(jnp.float32))

        bias = self.param("bias", from_data(lambda x: -jnp.mean(x, axis=(0, 1, 2))))
        log_scale = self.param("log_scale", from_data(lambda x: -jnp.log(jnp.std(x, axis=(0, 1, 2)) + 1e-6)))
        log_det = x.shape[1] * x.shape[2] * jnp.sum(log_scale)
        if reverse:
            y = x * jnp.exp(-log_scale)[None, None, None] - bias[None, None, None]
            return y, _repeat(-log_det, x)
        return (x + bias[None, None, None]) * jnp.exp(log_scale)[None, None, None], _repeat(log_det, x)


class LUStart(NamedTuple):
    """W = permutation lower (upper + diag(sign exp(log_s))), float32 arrays over the channels C.

    permutation, lower (unit diagonal left out), upper (diagonal left out) [C, C]; sign, log_s [C].
    """

    permutation: np.ndarray
    sign: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    log_s: np.ndarray


def rotation_start(channels: int, seed: int) -> LUStart:
    """The LU factors of a random rotation (or reflection) of the channels, the same for the same seed."""
    noise = np.random.default_rng([channels, seed]).normal(size=(channels, channels))
    permutation, lower, upper = scipy.linalg.lu(np.linalg.qr(noise)[0])
    diagonal = np.diag(upper)
    parts = (
        permutation,
        np.sign(diagonal),
        np.tril(lower, -1),
        np.triu(upper, 1),
        np.log(np.abs(diagonal)),
    )
    return LUStart(*(np.asarray(part, np.float32) for part in parts))


class InvertibleConv(nn.Module):
    """y = W x at every pixel with W = P L (U + diag(s)) (Kingma & Dhariwal 2018, section 3.2).

    P and the signs of s stay those of `start`; L, U and log|s| are learned from there.
    """

    @nn.compact
    def __call__(self, x: Array, start: LUStart, reverse: bool = False) -> tuple[Array, Array]:
        lower = jnp.tril(self.param("lower", lambda key: jnp.asarray(start.lower)), -1)
        upper = jnp.triu(self.param("upper", lambda key: jnp.asarray(start.upper)), 1)
        log_s = self.param("log_s", lambda key: jnp.asarray(start.log_s))
        lower = lower + jnp.eye(x.shape[-1])
        upper = upper + jnp.diag(jnp.asarray(start.sign) * jnp.exp(log_s))
        permutation = jnp.asarray(start.permutation)
        log_det = x.shape[1] * x.shape[2] * jnp.sum(log_s)
        if reverse:
            solve = jax.scipy.linalg.solve_triangular
            inverse = solve(upper, solve(lower, permutation.T, lower=True, unit_diagonal=True))
            return _matmul(x, inverse.T), _repeat(-log_det, x)
        return _matmul(x, _matmul(_matmul(permutation, lower), upper).T), _repeat(log_det, x)


def _matmul(x: Array, matrix: Array) -> Array:
    # Full precision: on accelerators that round products, the inverse would not be one.
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


class _FreeConv(nn.Module):
    """A 3x3 or 1x1 convolution without bias, for `ActNorm` to follow."""

    features: int
    size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.05), shape, jnp.float32)
        half = self.size // 2
        return conv2d(
            x.astype(self.dtype), kernel.astype(self.dtype), 1, ((half, half), (half, half))
        ).astype(jnp.float32)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at zero, times exp(3 log_scale), learned per channel; float32."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros = nn.initializers.zeros_init()
        kernel = self.param("kernel", zeros, (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        log_scale = self.param("log_scale", zeros, (self.features,), jnp.float32)
        y = conv2d(x, kernel, 1, ((1, 1), (1, 1))) + bias[None, None, None]
        return y * jnp.exp(3.0 * log_scale)[None, None, None]


def coupling_mask(mask: Mask, odd: bool, shape: tuple[int, ...]) -> np.ndarray:
    """1 for what a coupling leaves as it is, `[1, H, W, C]`: half the channels, or a checkerboard."""
    height, width, channels = shape
    if mask == "channels":
        kept = np.broadcast_to(np.arange(channels) < channels // 2, shape)
    else:
        kept = np.broadcast_to((np.add.outer(np.arange(height), np.arange(width)) % 2 == 0)[..., None], shape)
    return (kept != odd).astype(np.float32)[None]


class AffineCoupling(nn.Module):
    """y = b x + (1 - b) (x exp(s(b x)) + t(b x)) with a mask b (Dinh et al. 2017, eq. 9).

    The scale is bounded, so that no update can make the flow or its inverse explode: exp(s) goes from 0.05 to
    1 as sigmoid(raw + 2) does from 0 to 1 for Glow; s = a tanh(raw) with a learned a per channel for RealNVP.
    The network's last layer starts at zero. Deviations: Glow's published code has no lower bound; RealNVP's
    network is Glow's (3x3, 1x1, 3x3 convolutions), not a ResNet.
    """

    kind: Kind
    mask: Mask
    odd: bool
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, reverse: bool = False) -> tuple[Array, Array]:
        channels = x.shape[-1]
        kept = jnp.broadcast_to(jnp.asarray(coupling_mask(self.mask, self.odd, x.shape[1:])), x.shape)
        h = x * kept
        for size in (3, 1):
            h = _FreeConv(self.width, size, self.dtype)(h)
            h = jax.nn.relu(ActNorm()(h)[0])
        raw, shift = jnp.split(ZeroConv(2 * channels)(h), 2, axis=-1)
        if self.kind == "glow":
            log_s = jnp.log(_LEAST_SCALE + (1.0 - _LEAST_SCALE) * jax.nn.sigmoid(raw + 2.0))
        else:
            bound = self.param("bound", nn.initializers.ones_init(), (channels,), jnp.float32)
            log_s = bound[None, None, None] * jnp.tanh(raw)
        log_s, shift = log_s * (1.0 - kept), shift * (1.0 - kept)
        log_det = jnp.sum(log_s, axis=(1, 2, 3))
        if reverse:
            return (x - shift) * jnp.exp(-log_s), -log_det
        return x * jnp.exp(log_s) + shift, log_det


class _Standardise(nn.Module):
    """z = (x - mean) exp(-log_scale) for a learned Gaussian, so that z is standard normal.

    The Gaussian is told `context` [B, H, W, D], the half of the channels that goes on, or is the same at all
    pixels; and the class where there are `num_classes`.
    """

    num_classes: int | None = None

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None, label: Array | None, reverse: bool = False
    ) -> tuple[Array, Array]:
        channels = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        if context is None:
            prior = self.param("prior", zeros, (2 * channels,), jnp.float32)[None, None, None]
        else:
            prior = ZeroConv(2 * channels)(context)
        if self.num_classes is not None:
            of_class = nn.Embed(self.num_classes, 2 * channels, embedding_init=zeros)(label)
            prior = prior + of_class[:, None, None]
        prior = jnp.broadcast_to(prior, (*x.shape[:-1], 2 * channels))
        mean, raw = jnp.split(prior, 2, axis=-1)
        log_scale = 3.0 * jnp.tanh(raw / 3.0)  # bounded, for the same reason as the couplings' scales
        log_det = -jnp.sum(log_scale, axis=(1, 2, 3))
        if reverse:
            return x * jnp.exp(log_scale) + mean, -log_det
        return (x - mean) * jnp.exp(-log_scale), log_det


Carry: TypeAlias = tuple[Array, Array]  # x and the log-determinant so far


class GlowStep(nn.Module):
    """`ActNorm`, `InvertibleConv`, `AffineCoupling` by channels (Kingma & Dhariwal 2018, figure 2)."""

    width: int
    dtype: DTypeLike
    reverse: bool = False

    @nn.compact
    def __call__(self, carry: Carry, start: LUStart) -> tuple[Carry, None]:
        norm, mix = ActNorm(name="norm"), InvertibleConv(name="mix")
        couple = AffineCoupling("glow", "channels", False, self.width, self.dtype, name="couple")
        layers = [norm, lambda x, reverse: mix(x, start, reverse), couple]
        return _through(layers, carry, self.reverse), None


class RealNVPStep(nn.Module):
    """`ActNorm` and an `AffineCoupling`, twice: with the mask and with its complement."""

    mask: Mask
    width: int
    dtype: DTypeLike
    reverse: bool = False

    @nn.compact
    def __call__(self, carry: Carry, _: None) -> tuple[Carry, None]:
        layers: list[Any] = []
        for odd in (False, True):
            layers.append(ActNorm(name=f"norm_{odd:d}"))
            name = f"couple_{odd:d}"
            layers.append(AffineCoupling("realnvp", self.mask, odd, self.width, self.dtype, name=name))
        return _through(layers, carry, self.reverse), None


def _through(layers: list[Any], carry: Carry, reverse: bool) -> Carry:
    x, total = carry
    for layer in reversed(layers) if reverse else layers:
        x, log_det = layer(x, reverse)
        total = total + log_det
    return x, total


class Flow(nn.Module):
    """A multi-scale flow; at each scale: squeeze, `num_steps` steps, and half the channels are done.

    kind: "glow" or "realnvp"; the latter has `num_steps` steps with the checkerboard before the squeeze, and
        as many by channels after it. Deviation: RealNVP has ActNorm in the place of batch normalisation.
    num_scales: images must be divisible by 2^num_scales.
    num_classes: with it, the prior of the last scale is the class's own.

    The steps of a scale are one `nn.scan`, their parameters stacked [num_steps, ...]: one is compiled.
    """

    kind: Kind
    num_scales: int
    num_steps: int
    width: int
    num_classes: int | None = None
    dtype: DTypeLike = jnp.float32

    def __call__(self, x: Array, label: Array | None = None) -> tuple[list[Array], Array]:
        """x `[B, H, W, C]` -> (z, each standard normal under the model, log|det dz/dx| `[B]`).

        z[i] has shape `latent_shapes(x.shape[1:], num_scales)[i]`; label int32 `[B]` where conditional.
        """
        zs, total = self._run([x.astype(jnp.float32)], label, False)
        return zs, total

    def inverse(self, zs: list[Array], label: Array | None = None) -> Array:
        """The x `[B, H, W, C]` that the call maps to zs."""
        return self._run(zs, label, True)[0][0]

    @nn.compact
    def _run(self, arrays: list[Array], label: Array | None, reverse: bool) -> tuple[list[Array], Array]:
        """[x] -> (zs, log-determinant), or zs -> ([x], log-determinant) where `reverse`."""

        def steps(name: str, step: Any, carry: Carry, xs: Any, *fields: Any) -> Carry:
            scanned = nn.scan(
                step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_steps,
                reverse=reverse,
            )
            return cast(Carry, scanned(*fields, self.width, self.dtype, reverse, name=name)(carry, xs)[0])

        def by_channels(scale: int, carry: Carry) -> Carry:
            name = f"channels_{scale}"
            if self.kind == "realnvp":
                return steps(name, RealNVPStep, carry, None, "channels")
            seeds = range(scale * self.num_steps, (scale + 1) * self.num_steps)
            starts = [rotation_start(carry[0].shape[-1], seed) for seed in seeds]
            return steps(name, GlowStep, carry, LUStart(*map(np.stack, zip(*starts, strict=True))))

        def by_squares(scale: int, carry: Carry) -> Carry:
            if self.kind == "glow":
                return carry
            return steps(f"squares_{scale}", RealNVPStep, carry, None, "checkerboard")

        def standardise(scale: int, x: Array, context: Array | None) -> tuple[Array, Array]:
            num_classes = self.num_classes if scale == self.num_scales - 1 else None
            return _Standardise(num_classes, name=f"prior_{scale}")(x, context, label, reverse)

        total, last = jnp.zeros(arrays[0].shape[0]), self.num_scales - 1
        if reverse:
            x = arrays[last]
            for scale in reversed(range(self.num_scales)):
                done, log_det = standardise(scale, arrays[scale], None if scale == last else x)
                x = done if scale == last else jnp.concatenate([x, done], axis=-1)
                x, total = by_channels(scale, (x, total + log_det))
                x, total = by_squares(scale, (unsqueeze(x), total))
            return [x], total
        x, zs = arrays[0], []
        for scale in range(self.num_scales):
            x, total = by_squares(scale, (x, total))
            x, total = by_channels(scale, (squeeze(x), total))
            x, done = (x, x) if scale == last else jnp.split(x, 2, axis=-1)
            z, log_det = standardise(scale, done, None if scale == last else x)
            zs.append(z)
            total = total + log_det
        return zs, total


def latent_shapes(shape: tuple[int, ...], num_scales: int) -> list[tuple[int, ...]]:
    """The shapes of z, without the batch, for images [H, W, C]; ValueError where they do not fit."""
    height, width, channels = shape
    if (height | width) % 2**num_scales:
        raise ValueError(f"images of {height}x{width} cannot be halved {num_scales} times")
    shapes: list[tuple[int, ...]] = []
    for scale in range(1, num_scales + 1):
        height, width, channels = height // 2, width // 2, channels * 4
        channels = channels if scale == num_scales else channels // 2
        shapes.append((height, width, channels))
    assert sum(map(math.prod, shapes)) == math.prod(shape)
    return shapes
