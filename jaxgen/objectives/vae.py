"""Bounds on log p(x) of models with Gaussian latent variables: ELBO, IWAE, and importance sampling.

The latent variables are z of `[B, K]`, or two layers of them, z1 and z2 (models/vae.py says how they hang
together); every Gaussian is diagonal and given as (mean, log variance). Images are in [-1, 1]. Bounds and
log-likelihoods are in nats per image; those of the Gaussian likelihood are of a density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.objectives import label_of
from jaxgen.objectives.pixelcnn import (
    bernoulli_log_likelihood,
    discretized_logistic_log_likelihood,
    from_level,
    to_level,
)
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree, UserError

Bound: TypeAlias = Literal["elbo", "iwae"]

_LEAST_LOG_SCALE = -7.0  # about a quarter of a level of 8 bits; below, a pixel's distribution is a point


class Gaussian(NamedTuple):
    """mean and log variance, `[..., K]` each."""

    mean: Array
    log_var: Array


# ---- Gaussians


def gaussian_kl(q: Gaussian) -> Array:
    """KL(q || N(0, I)) = 1/2 (exp(s) - (1 + s) + m^2) for each dimension, nats, s the log variance of q.

    Kingma & Welling 2014, appendix B. The lectures' sum_i exp(s_i) - (1 + s_i) + m_i^2 is twice its sum.
    """
    return 0.5 * (jnp.exp(q.log_var) - (1.0 + q.log_var) + jnp.square(q.mean))


def gaussian_log_prob(z: Array, p: Gaussian) -> Array:
    """log N(z; mean, exp(log_var)) for each dimension, nats."""
    return -0.5 * (math.log(2.0 * math.pi) + p.log_var + jnp.square(z - p.mean) * jnp.exp(-p.log_var))


def reparameterise(q: Gaussian, eps: Array) -> Array:
    """z = mean + exp(log_var / 2) eps (Kingma & Welling 2014, section 2.4)."""
    return q.mean + jnp.exp(0.5 * q.log_var) * eps


def standard(like: Array) -> Gaussian:
    """N(0, I) of the shape of an array."""
    return Gaussian(jnp.zeros_like(like), jnp.zeros_like(like))


# ---- likelihoods


class Likelihood(NamedTuple):
    """p(x|z), the pixels independent given z.

    num_parameters: P, how many numbers describe a pixel
    log_prob: (outputs [..., H, W, P], x [..., H, W, C]) -> [...], nats
    mean: outputs [..., H, W, P] -> E[x|z] [..., H, W, C] in [-1, 1], for the discretised logistic its centre
    draw: (key, outputs [..., H, W, P]) -> x [..., H, W, C]
    """

    num_parameters: int
    log_prob: Callable[[Array, Array], Array]
    mean: Callable[[Array], Array]
    draw: Callable[[Key, Array], Array]


def bernoulli_likelihood(channels: int) -> Likelihood:
    """Binary images, x in {-1, 1}; the outputs are the logits of white."""

    def draw(key: Key, logits: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, jax.nn.sigmoid(logits)), 1.0, -1.0)

    return Likelihood(
        channels,
        lambda logits, x: jnp.sum(bernoulli_log_likelihood(logits, x), axis=(-3, -2, -1)),
        lambda logits: jnp.tanh(0.5 * logits),  # 2 sigmoid - 1
        draw,
    )


def gaussian_likelihood(channels: int, std: float) -> Likelihood:
    """N(x; outputs, std^2): -log p is C ||x - outputs||^2 and a constant, with the lectures' C = 1/(2 std^2).

    Raises UserError unless std > 0.
    """
    if not std > 0.0:
        raise UserError(f"a Gaussian likelihood needs a standard deviation above 0, not {std}.")

    def log_prob(mean: Array, x: Array) -> Array:
        log_var = jnp.full_like(mean, 2.0 * math.log(std))
        return jnp.sum(gaussian_log_prob(x, Gaussian(mean, log_var)), axis=(-3, -2, -1))

    return Likelihood(
        channels,
        log_prob,
        lambda mean: jnp.clip(mean, -1.0, 1.0),
        lambda key, mean: mean + std * jax.random.normal(key, mean.shape),
    )


def discretized_logistic_likelihood(channels: int, num_levels: int) -> Likelihood:
    """A logistic distribution on `num_levels` levels a pixel; the outputs are its centres and log scales.

    Kingma et al. 2016; the masses are those of Salimans et al. 2017, eq. 2, with one component.
    """

    def split(outputs: Array) -> tuple[Array, Array]:
        return outputs[..., :channels], jnp.maximum(outputs[..., channels:], _LEAST_LOG_SCALE)

    def log_prob(outputs: Array, x: Array) -> Array:
        mean, log_scale = split(outputs)
        log_mass = discretized_logistic_log_likelihood(x, mean, log_scale, num_levels)
        return jnp.sum(log_mass, axis=(-3, -2, -1))

    def draw(key: Key, outputs: Array) -> Array:
        mean, log_scale = split(outputs)
        value = mean + jnp.exp(log_scale) * jax.random.logistic(key, mean.shape)
        return from_level(to_level(value, num_levels), num_levels)

    return Likelihood(2 * channels, log_prob, lambda outputs: jnp.clip(split(outputs)[0], -1.0, 1.0), draw)


def binarise(key: Key, x: Array) -> Array:
    """Each pixel white, 1, with its brightness (x + 1) / 2 as probability, else black, -1.

    Salakhutdinov & Murray 2008; drawn anew at every step as Burda et al. 2016 train.
    """
    return jnp.where(jax.random.bernoulli(key, 0.5 * (x + 1.0)), 1.0, -1.0).astype(x.dtype)


# ---- draws from q(z|x)


class Networks(NamedTuple):
    """The functions of a VAE. label is int32 `[B]` or None; the last two are None for one layer of latents.

    encode: (params, x [B, H, W, C], label) -> q(z|x) or q(z1|x), [B, K]
    decode: (params, z [B, K], label) -> outputs [B, H, W, P]
    encode_above: (params, z1 [B, K]) -> q(z2|z1), [B, K2]
    prior_below: (params, z2 [B, K2]) -> p(z1|z2), [B, K]
    latent_sizes: (K,) or (K, K2)
    """

    encode: Callable[[PyTree, Array, Array | None], Gaussian]
    decode: Callable[[PyTree, Array, Array | None], Array]
    latent_sizes: tuple[int, ...]
    encode_above: Callable[[PyTree, Array], Gaussian] | None = None
    prior_below: Callable[[PyTree, Array], Gaussian] | None = None


class Draws(NamedTuple):
    """S draws from q for each of B images.

    z: [S, B, K], what the decoder is given
    log_ratio: [S, B], log q(z|x) - log p(z) at the draw (of both layers where there are two)
    kl: [S, B, K] or [S, B, K + K2], the same for each dimension, in closed form where there is one: all of
        it with one layer, that of z2 given z1 with two
    """

    z: Array
    log_ratio: Array
    kl: Array


def draw_posterior(networks: Networks, params: PyTree, key: Key, q: Gaussian, num_samples: int) -> Draws:
    """`num_samples` draws of z ~ q(z|x), or of z1 ~ q(z1|x), z2 ~ q(z2|z1); q is [B, K]."""
    key, above_key = jax.random.split(key)
    shape = (num_samples, *q.mean.shape)
    q = Gaussian(*(jnp.broadcast_to(leaf[None], shape) for leaf in q))
    z = reparameterise(q, jax.random.normal(key, shape))
    log_q = gaussian_log_prob(z, q)
    if networks.encode_above is None or networks.prior_below is None:
        return Draws(z, jnp.sum(log_q - gaussian_log_prob(z, standard(z)), axis=-1), gaussian_kl(q))
    q2 = jax.vmap(networks.encode_above, in_axes=(None, 0))(params, z)
    z2 = reparameterise(q2, jax.random.normal(above_key, q2.mean.shape))
    below = log_q - gaussian_log_prob(z, jax.vmap(networks.prior_below, in_axes=(None, 0))(params, z2))
    above = gaussian_log_prob(z2, q2) - gaussian_log_prob(z2, standard(z2))
    log_ratio = jnp.sum(below, axis=-1) + jnp.sum(above, axis=-1)
    return Draws(z, log_ratio, jnp.concatenate([below, gaussian_kl(q2)], axis=-1))


def prior_draw(networks: Networks, params: PyTree, eps: tuple[Array, ...]) -> Array:
    """z [B, K] ~ p(z) from standard normals of `networks.latent_sizes`, ([B, K],) or ([B, K], [B, K2])."""
    if networks.prior_below is None:
        return eps[0]
    return reparameterise(networks.prior_below(params, eps[1]), eps[0])


def log_likelihoods(
    networks: Networks, likelihood: Likelihood, params: PyTree, z: Array, x: Array, label: Array | None
) -> Array:
    """log p(x|z) [S, B] of z [S, B, K] and x [B, H, W, C]."""
    outputs = jax.vmap(lambda z: networks.decode(params, z, label))(z)
    return likelihood.log_prob(outputs, x[None])


# ---- bounds


def negative_elbo(log_likelihood: Array, kl: Array) -> Array:
    """-E_q log p(x|z) + KL(q || p): distortion plus rate, elementwise (Kingma & Welling 2014, eq. 3)."""
    return kl - log_likelihood


def free_bits(kl: Array, least: float, mask: Array | None = None) -> Array:
    """sum_j max(least, mean over the batch of KL_j), a scalar (Kingma et al. 2016), kl [B, K].

    A dimension whose KL is below `least` nats has no gradient, so that it is not switched off early on.
    """
    weight = jnp.ones(kl.shape[0]) if mask is None else mask
    mean = jnp.sum(weight[:, None] * kl, axis=0) / jnp.maximum(jnp.sum(weight), 1.0)
    return jnp.sum(jnp.maximum(mean, least))


def iwae_bound(log_weights: Array) -> Array:
    """L_k = log 1/k sum_i w_i, [k, B] -> [B], log w = log p(x, z) - log q(z|x) (Burda et al. 2016).

    In expectation it rises with k, from the ELBO at k = 1 to log p(x) (theorem 1).
    """
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def log_mean_weight(
    log_weights: Callable[[Key, int], Array], key: Key, *, num_samples: int, chunk: int
) -> Array:
    """`iwae_bound` of `num_samples` draws, [B], of which at most `chunk` are in memory at a time.

    log_weights: (key, num) -> [num, B]; called in a `lax.scan`, with num at most `chunk`

    Raises UserError unless num_samples and chunk are at least 1.
    """
    if num_samples < 1 or chunk < 1:
        raise UserError(
            f"importance sampling needs at least 1 sample and a chunk of at least 1, not {num_samples} and "
            f"{chunk}."
        )
    chunk = min(chunk, num_samples)
    num_chunks = -(-num_samples // chunk)

    def add(total: Array, number: Array) -> tuple[Array, None]:
        log_w = log_weights(jax.random.fold_in(key, number), chunk)
        counts = number * chunk + jnp.arange(chunk) < num_samples  # the last chunk may be too many
        log_w = jnp.where(counts[:, None], log_w, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_w, axis=0)), None

    num_images = jax.eval_shape(lambda key: log_weights(key, chunk), key).shape[1]
    start = jnp.full(num_images, -jnp.inf)
    total, _ = jax.lax.scan(add, start, jnp.arange(num_chunks))
    return total - math.log(num_samples)


def make_log_evidence(
    networks: Networks, likelihood: Likelihood, *, num_samples: int, chunk: int = 50
) -> Callable[[PyTree, Array, Array | None, Key], Array]:
    """(params, x [B, H, W, C], label, key) -> an estimate of log p(x) [B], or of log p(x|label).

    Importance sampling with q(z|x) as proposal (Rezende et al. 2014, appendix E): a lower bound in
    expectation, which `num_samples` draws for each image bring close to log p(x).
    """

    def log_evidence(params: PyTree, x: Array, label: Array | None, key: Key) -> Array:
        q = networks.encode(params, x, label)

        def log_weights(key: Key, num: int) -> Array:
            draws = draw_posterior(networks, params, key, q, num)
            log_likelihood = log_likelihoods(networks, likelihood, params, draws.z, x, label)
            return log_likelihood - draws.log_ratio

        return log_mean_weight(log_weights, key, num_samples=num_samples, chunk=chunk)

    return log_evidence


def make_loss(
    networks: Networks,
    likelihood: Likelihood,
    *,
    bound: Bound = "elbo",
    num_samples: int = 1,
    beta: float = 1.0,
    least_rate: float = 0.0,
    conditional: bool = False,
    binary: bool = False,
) -> LossFn:
    """A negative bound on log p(x), nats per image, with `num_samples` draws of z for each image.

    bound: elbo, the mean over draws of distortion + beta * rate (Higgins et al. 2017 for beta); or iwae
    least_rate: `free_bits` for each latent dimension, nats; a batch is one minibatch of the paper's, so each
        part of an accumulated batch has its own
    binary: `binarise` the images with the step's key

    Metrics: "loss"; "rate" KL(q || p) and "distortion" -log p(x|z), which do not know of beta; and their sum
    "negative_elbo". Uses batch["image"] [B, H, W, C] in [-1, 1], batch["label"] int32 [B] where conditional,
    and batch["mask"] [B] where there. Raises UserError, when traced, where labels are missing; and at once
    for beta or free bits with the IWAE bound, which has no KL to weigh.
    """
    if bound == "iwae" and (beta != 1.0 or least_rate):
        raise UserError("the IWAE bound has no KL to weigh: take beta = 1 and no free bits, or the ELBO.")

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        x, mask, label = batch["image"], batch.get("mask"), label_of(batch, conditional)
        pixel_key, latent_key = jax.random.split(key)
        if binary:
            x = binarise(pixel_key, x)
        draws = draw_posterior(networks, params, latent_key, networks.encode(params, x, label), num_samples)
        log_likelihood = log_likelihoods(networks, likelihood, params, draws.z, x, label)
        rate, distortion = jnp.mean(jnp.sum(draws.kl, axis=-1), axis=0), -jnp.mean(log_likelihood, axis=0)
        elbo = negative_elbo(-distortion, rate)
        if bound == "iwae":
            per_example = -iwae_bound(log_likelihood - draws.log_ratio)
        elif least_rate:
            kept = free_bits(jnp.mean(draws.kl, axis=0), least_rate, mask)
            per_example = negative_elbo(-distortion, beta * jnp.broadcast_to(kept, rate.shape))
        else:
            per_example = negative_elbo(-distortion, beta * rate)
        parts = {"loss": per_example, "rate": rate, "distortion": distortion, "negative_elbo": elbo}
        metrics = {name: Mean.of(values, mask) for name, values in parts.items()}
        return metrics["loss"].value_or_zero, (metrics, model_state)

    return loss_fn
