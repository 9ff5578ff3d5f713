"""Likelihoods of a pixel given the pixels before it, and the loss of a network that predicts them.

A pixel has C channels with values on `num_levels` levels evenly spaced in [-1, 1] (256 for images of 8 bits,
17 for the bundled digits, 2 for binary images). Log-likelihoods are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.objectives import label_of
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree

# (params, x [B, H, W, C], label int32 [B] or None, dropout key or None) -> parameters [B, H, W, P]
Apply: TypeAlias = Callable[[PyTree, Array, Array | None, Key | None], Array]

_LEAST_LOG_SCALE = -7.0  # about a quarter of a level of 8 bits; below, a component is a point


class PixelLikelihood(NamedTuple):
    """A distribution of a pixel.

    num_parameters: P, how many numbers describe it
    log_prob: (parameters [..., P], x [..., C]) -> [...], nats
    draw: (key, parameters [P]) -> x [C], on the levels
    """

    num_parameters: int
    log_prob: Callable[[Array, Array], Array]
    draw: Callable[[Key, Array], Array]


def to_level(x: Array, num_levels: int) -> Array:
    """x in [-1, 1] -> the number of the nearest level, int32 in [0, num_levels)."""
    level = jnp.round((x + 1.0) * ((num_levels - 1) / 2.0)).astype(jnp.int32)
    return jnp.clip(level, 0, num_levels - 1)


def from_level(level: Array, num_levels: int) -> Array:
    """The value in [-1, 1] of a level, float32."""
    return 2.0 * level.astype(jnp.float32) / (num_levels - 1) - 1.0


def bernoulli_log_likelihood(logits: Array, x: Array) -> Array:
    """log p(x) of x in {-1, 1}: log sigmoid(x logits), elementwise."""
    return jax.nn.log_sigmoid(x * logits)


def categorical_log_likelihood(logits: Array, x: Array, num_levels: int) -> Array:
    """log softmax(logits) at the level of x: `[..., num_levels]`, `[...]` -> `[...]`."""
    chosen = to_level(x, num_levels)[..., None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]


def discretized_logistic_log_likelihood(x: Array, mean: Array, log_scale: Array, num_levels: int) -> Array:
    """log of the mass that a logistic distribution puts on the bin of x (Salimans et al. 2017, eq. 2).

    sigmoid(b) - sigmoid(a) with a, b = (x -+ 1/(num_levels - 1) - mean) / scale; the outer bins reach to
    infinity, so the masses of all levels sum to 1. As sigmoid(b) sigmoid(-a) (1 - e^(a - b)) it is exact in
    the logarithm however far x is from the mean, with no floor.

    All arguments broadcast elementwise; ranks must agree.
    """
    half = 1.0 / (num_levels - 1)
    inverse_scale = jnp.exp(-log_scale)
    a = (x - half - mean) * inverse_scale
    b = (x + half - mean) * inverse_scale
    below, above = jax.nn.log_sigmoid(b), jax.nn.log_sigmoid(-a)
    inner = below + above + jnp.log(-jnp.expm1(-2.0 * half * inverse_scale))
    return jnp.where(x < half - 1.0, below, jnp.where(x > 1.0 - half, above, inner))


class LogisticMixture(NamedTuple):
    """M logistic components for C channels: logits [..., M], means, log_scales [..., C, M] and

    coefficients [..., C (C - 1) / 2, M] in (-1, 1), by which the means of a channel follow the channels
    before it, in the order (1, 0), (2, 0), (2, 1), ....
    """

    logits: Array
    means: Array
    log_scales: Array
    coefficients: Array


def num_mixture_parameters(num_mixtures: int, channels: int) -> int:
    """P of a `LogisticMixture`: 3 M for one channel, 10 M for three."""
    return num_mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def split_mixture_parameters(parameters: Array, num_mixtures: int, channels: int) -> LogisticMixture:
    """The network's output `[..., P]` as a mixture; log-scales are at least -7."""
    pairs = channels * (channels - 1) // 2
    rows = parameters.reshape(*parameters.shape[:-1], 1 + 2 * channels + pairs, num_mixtures)
    return LogisticMixture(
        logits=rows[..., 0, :],
        means=rows[..., 1 : 1 + channels, :],
        log_scales=jnp.maximum(rows[..., 1 + channels : 1 + 2 * channels, :], _LEAST_LOG_SCALE),
        coefficients=jnp.tanh(rows[..., 1 + 2 * channels :, :]),
    )


def channel_mean(mixture: LogisticMixture, channel: int, x: Array) -> Array:
    """The components' means of a channel given those before it in x `[..., C]`: `[..., M]`.

    Salimans et al. 2017, eq. 3: linear in the channels before.
    """
    first = channel * (channel - 1) // 2
    mean = mixture.means[..., channel, :]
    for before in range(channel):
        mean = mean + mixture.coefficients[..., first + before, :] * x[..., before, None]
    return mean


def logistic_mixture_log_likelihood(mixture: LogisticMixture, x: Array, num_levels: int) -> Array:
    """log sum_m pi_m prod_c p_m(x_c | x_<c), x `[..., C]` -> `[...]` (Salimans et al. 2017, eq. 1 to 3)."""
    log_masses = jax.nn.log_softmax(mixture.logits)
    for channel in range(x.shape[-1]):
        log_masses = log_masses + discretized_logistic_log_likelihood(
            x[..., channel, None],
            channel_mean(mixture, channel, x),
            mixture.log_scales[..., channel, :],
            num_levels,
        )
    return jax.nn.logsumexp(log_masses, axis=-1)


def draw_logistic_mixture(key: Key, mixture: LogisticMixture, channels: int, num_levels: int) -> Array:
    """A pixel `[C]` of a mixture without leading axes: a component, then a level of each channel in turn.

    Each channel is rounded to its level before the next is drawn, so draws have exactly the probabilities of
    `logistic_mixture_log_likelihood`.
    """
    component_key, channels_key = jax.random.split(key)
    component = jax.random.categorical(component_key, mixture.logits)
    noise = jax.random.logistic(channels_key, (channels,))
    x = jnp.zeros(channels, jnp.float32)
    for channel in range(channels):
        mean = channel_mean(mixture, channel, x)[component]
        value = mean + jnp.exp(mixture.log_scales[channel, component]) * noise[channel]
        x = x.at[channel].set(from_level(to_level(value, num_levels), num_levels))
    return x


def bernoulli_likelihood(channels: int) -> PixelLikelihood:
    """Channels independent given the pixels before, each in {-1, 1}."""

    def draw(key: Key, logits: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, jax.nn.sigmoid(logits)), 1.0, -1.0)

    return PixelLikelihood(channels, lambda p, x: jnp.sum(bernoulli_log_likelihood(p, x), -1), draw)


def categorical_likelihood(num_levels: int) -> PixelLikelihood:
    """Any distribution on the levels of one channel."""

    def log_prob(logits: Array, x: Array) -> Array:
        return categorical_log_likelihood(logits, x[..., 0], num_levels)

    def draw(key: Key, logits: Array) -> Array:
        return from_level(jax.random.categorical(key, logits), num_levels)[None]

    return PixelLikelihood(num_levels, log_prob, draw)


def logistic_mixture_likelihood(num_mixtures: int, channels: int, num_levels: int) -> PixelLikelihood:
    """The discretised logistic mixture of PixelCNN++, each channel given those before it in the pixel."""

    def split(parameters: Array) -> LogisticMixture:
        return split_mixture_parameters(parameters, num_mixtures, channels)

    return PixelLikelihood(
        num_mixture_parameters(num_mixtures, channels),
        lambda p, x: logistic_mixture_log_likelihood(split(p), x, num_levels),
        lambda key, p: draw_logistic_mixture(key, split(p), channels, num_levels),
    )


def image_log_likelihood(likelihood: PixelLikelihood, parameters: Array, x: Array) -> Array:
    """log p(x) = sum over pixels of log p(x_i | x_<i), in nats: `[B, H, W, P]`, `[B, H, W, C]` -> `[B]`.

    van den Oord et al. 2016, eq. 1.
    """
    return jnp.sum(likelihood.log_prob(parameters, x), axis=(1, 2))


def make_loss(apply: Apply, likelihood: PixelLikelihood, *, conditional: bool = False) -> LossFn:
    """The exact negative log-likelihood: metrics "loss" in bits/dim, "nats" per image.

    Uses batch["image"] [B, H, W, C] in [-1, 1], batch["label"] int32 [B] where conditional, and
    batch["mask"] [B] where there. Raises UserError, when traced, where labels are missing.
    """

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        x, mask, label = batch["image"], batch.get("mask"), label_of(batch, conditional)
        parameters = apply(params, x, label, key)
        nats = -image_log_likelihood(likelihood, parameters, x)
        mean = Mean.of(nats / (math.prod(x.shape[1:]) * math.log(2.0)), mask)
        return mean.value_or_zero, ({"loss": mean, "nats": Mean.of(nats, mask)}, model_state)

    return loss_fn
