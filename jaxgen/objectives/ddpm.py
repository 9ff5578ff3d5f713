"""The losses of denoising diffusion models (Ho et al. 2020), and their variational bound in bits/dim."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jaxgen.objectives.score_matching import sum_dims
from jaxgen.processes import (
    DiffusionSchedule,
    Prediction,
    Variance,
    p_mean_log_variance,
    prediction_target,
    q_posterior,
    q_sample,
    to_x0_and_eps,
)
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree, UserError

Loss: TypeAlias = Literal["simple", "vlb"]

# (params, x_t [B, ...], t int32 [B], label int32 [B] or None, dropout key or None) -> output [B, ...].
# A label equal to num_classes means "no label"; no key means no dropout.
Apply: TypeAlias = Callable[[PyTree, Array, Array, Array | None, Key | None], Array]


def _num_dims(x: Array) -> int:
    return math.prod(x.shape[1:])


def simple_loss(target: Array, output: Array) -> Array:
    """L_simple, the squared error averaged over dimensions: [B, ...] -> [B] (Ho et al. 2020, eq. 14)."""
    return sum_dims(jnp.square(target - output)) / _num_dims(target)


def gaussian_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) in nats, for each dimension."""
    difference = log_variance1 - log_variance2
    return 0.5 * (jnp.expm1(difference) - difference + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Array, mean: Array, log_scale: Array, num_levels: int) -> Array:
    """log of the mass that N(mean, e^(2 log_scale)) puts on the bin of x, per dimension, in nats, [B, ...].

    Ho et al. 2020, eq. 13, for x on `num_levels` levels evenly spaced in [-1, 1] (256 for images of 8 bits):
    the bin of x is x +- 1 / (num_levels - 1), and the outer bins reach to infinity, so the masses sum to 1.

    Computed in the logarithm, from whichever tail is nearer: there is no floor on the probability, and
    gradients live however far the mean is from x. log_scale [B, ...] must broadcast with x.
    """
    half = 1.0 / (num_levels - 1)
    inverse_scale = jnp.exp(-log_scale)
    offset = x - mean
    distance = jnp.abs(offset)
    # The mass of [a, b] is that of [-b, -a], so the interval is taken on the left, where log_ndtr is exact.
    edges = jnp.stack([half - distance, -half - distance, half + offset, half - offset])
    log_near, log_far, first, last = log_ndtr(edges * inverse_scale[None])
    inner = log_near + jnp.log(-jnp.expm1(log_far - log_near))
    return jnp.where(x < half - 1.0, first, jnp.where(x > 1.0 - half, last, inner))


def prior_kl(schedule: DiffusionSchedule, x0: Array) -> Array:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, [B, ...] -> [B] (Ho et al. 2020, eq. 5)."""
    alpha_bar = schedule.alpha_bar[-1]
    return 0.5 * sum_dims(alpha_bar * jnp.square(x0) - alpha_bar - jnp.log1p(-alpha_bar))


def posterior_kl(
    schedule: DiffusionSchedule, x0: Array, x_t: Array, t: Array, x0_hat: Array, variance: Variance
) -> Array:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, [B], t > 0 (Ho et al. 2020, eq. 5)."""
    mean, _, log_variance = q_posterior(schedule, x0, x_t, t)
    p_mean, p_log_variance = p_mean_log_variance(schedule, x0_hat, x_t, t, variance)
    return sum_dims(gaussian_kl(mean, log_variance, p_mean, p_log_variance))


def decoder_nll(
    schedule: DiffusionSchedule,
    x0: Array,
    x_t: Array,
    t: Array,
    x0_hat: Array,
    variance: Variance,
    num_levels: int,
) -> Array:
    """L_0 = -log p(x_0 | x_1) in nats, [B], the discretised decoder of t = 0 (Ho et al. 2020, eq. 13)."""
    mean, log_variance = p_mean_log_variance(schedule, x0_hat, x_t, t, variance)
    return -sum_dims(discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance, num_levels))


def vlb_term(
    schedule: DiffusionSchedule,
    x0: Array,
    x_t: Array,
    t: Array,
    x0_hat: Array,
    *,
    variance: Variance,
    num_levels: int,
) -> Array:
    """The term of the variational bound at t in nats, [B]: `posterior_kl`, or `decoder_nll` at t = 0.

    Its sum over t, plus `prior_kl`, bounds -log p(x_0) from above in expectation over x_t (Ho et al. 2020,
    eq. 5).
    """
    rate = posterior_kl(schedule, x0, x_t, t, x0_hat, variance)
    distortion = decoder_nll(schedule, x0, x_t, t, x0_hat, variance, num_levels)
    return jnp.where(t == 0, distortion, rate)


def _labels(batch: Batch, num_classes: int | None) -> Array | None:
    if num_classes is None:
        return None
    if "label" not in batch:
        raise UserError(
            "the model is conditional on a class but the data have no labels; set num_classes to None "
            "or take a data set with labels."
        )
    return batch["label"]


def make_loss(
    apply: Apply,
    schedule: DiffusionSchedule,
    *,
    prediction: Prediction = "eps",
    loss: Loss = "simple",
    variance: Variance = "fixed_small",
    num_levels: int | None = None,
    label_dropout: float = 0.0,
    num_classes: int | None = None,
) -> LossFn:
    """The training loss at a time drawn uniformly for each example (Ho et al. 2020, Algorithm 1).

    loss: "simple" is the squared error of the predicted quantity. "vlb" is T `vlb_term` / dimensions, an
        unbiased estimate in nats/dim of the bound less L_T, which has nothing to learn; it alone uses
        `variance` and `num_levels`.
    num_classes: the number of labels of a conditional model, or None for one that is told no label
    label_dropout: the share of labels replaced by `num_classes`, "no label", for classifier-free guidance

    Uses batch["image"] [B, ...] in [-1, 1], batch["label"] int32 [B] where conditional, and batch["mask"] [B]
    where there. metrics["loss"] is the Mean over examples.

    Raises UserError for an unknown option, "vlb" without num_levels, a dropout of labels outside [0, 1] or
    without num_classes, and, when traced, for a conditional model without labels.
    """
    if loss not in get_args(Loss):
        raise UserError(f"unknown loss {loss!r}; choose one of {', '.join(get_args(Loss))}.")
    if not 0.0 <= label_dropout <= 1.0:
        raise UserError(
            f"label_dropout is a share of the labels and must be in [0, 1], but it is {label_dropout}."
        )
    if label_dropout > 0.0 and num_classes is None:
        raise UserError("label_dropout needs a conditional model; set num_classes or set label_dropout to 0.")

    if loss == "simple":

        def loss_of(x0: Array, x_t: Array, t: Array, eps: Array, output: Array) -> Array:
            return simple_loss(prediction_target(schedule, prediction, x0, t, eps), output)

    else:
        levels = _checked_num_levels(num_levels)

        def loss_of(x0: Array, x_t: Array, t: Array, eps: Array, output: Array) -> Array:
            x0_hat, _ = to_x0_and_eps(schedule, prediction, output, x_t, t)
            term = vlb_term(schedule, x0, x_t, t, x0_hat, variance=variance, num_levels=levels)
            return term * (schedule.num_steps / _num_dims(x0))

    def per_example(params: PyTree, batch: Batch, key: Key) -> Array:
        x0 = batch["image"]
        time_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        t = jax.random.randint(time_key, x0.shape[:1], 0, schedule.num_steps, jnp.int32)
        eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
        label = _labels(batch, num_classes)
        if label is not None and label_dropout > 0.0:
            dropped = jax.random.bernoulli(label_key, label_dropout, label.shape)
            label = jnp.where(dropped, jnp.asarray(num_classes, label.dtype), label)
        x_t = q_sample(schedule, x0, t, eps)
        output = apply(params, x_t, schedule.timestep[t], label, dropout_key).astype(x0.dtype)
        return loss_of(x0, x_t, t, eps, output)

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        mean = Mean.of(per_example(params, batch, key), batch.get("mask"))
        return mean.value_or_zero, ({"loss": mean}, model_state)

    return loss_fn


def _checked_num_levels(num_levels: int | None) -> int:
    if num_levels is None or num_levels < 2:
        raise UserError(
            f"the variational bound needs num_levels >= 2, the number of values a pixel can take "
            f"(256 for images of 8 bits), but it is {num_levels}."
        )
    return num_levels


def make_bits_per_dim(
    apply: Apply,
    schedule: DiffusionSchedule,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
    num_levels: int,
    num_classes: int | None = None,
    clip: bool = True,
) -> Callable[[PyTree, Batch, Key], dict[str, Mean]]:
    """The variational bound on -log2 p(x_0) per dimension, term by term (Ho et al. 2020, eq. 5 and table 1).

    Returns (params, batch, key) -> Means over examples, all in bits/dim: "bits_per_dim", the bound, which is
    the sum of "prior_bits_per_dim" (L_T), "rate_bits_per_dim" (L_1 to L_{T-1}) and "distortion_bits_per_dim"
    (L_0); and "terms", a stacked Mean [T] whose entry t is L_t.

    One scan over all T steps, with one network call and one draw of noise each; the noise of example i at t
    comes from key folded with i and t, so padding a batch changes nothing for the examples before it. A
    respaced schedule gives the bound of the model that samples with it, in as many calls.

    num_classes: as in `make_loss`; if set, the bound is that of p(x_0 | label)
    clip: hold the predicted x0 in [-1, 1], as the sampler does; the paper's evaluation does so too
    """
    _checked_num_levels(num_levels)

    def bits_per_dim(params: PyTree, batch: Batch, key: Key) -> dict[str, Mean]:
        x0, mask = batch["image"], batch.get("mask")
        label = _labels(batch, num_classes)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(x0.shape[0]))

        def noise(key: Key, t: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(key, t), x0.shape[1:], x0.dtype)

        def term(t: Array) -> Array:
            times = jnp.full(x0.shape[:1], t)
            x_t = q_sample(schedule, x0, times, jax.vmap(noise, in_axes=(0, None))(keys, t))
            output = apply(params, x_t, schedule.timestep[times], label, None).astype(x0.dtype)
            x0_hat, _ = to_x0_and_eps(schedule, prediction, output, x_t, times)
            if clip:
                x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
            return vlb_term(schedule, x0, x_t, times, x0_hat, variance=variance, num_levels=num_levels)

        nats = jax.lax.map(term, jnp.arange(schedule.num_steps, dtype=jnp.int32))
        bits = nats / (_num_dims(x0) * math.log(2.0))  # [T, B]
        prior = prior_kl(schedule, x0) / (_num_dims(x0) * math.log(2.0))
        rate, distortion = jnp.sum(bits[1:], axis=0), bits[0]
        return {
            "bits_per_dim": Mean.of(prior + rate + distortion, mask),
            "prior_bits_per_dim": Mean.of(prior, mask),
            "rate_bits_per_dim": Mean.of(rate, mask),
            "distortion_bits_per_dim": Mean.of(distortion, mask),
            "terms": jax.vmap(lambda values: Mean.of(values, mask))(bits),
        }

    return bits_per_dim
