"""Bayes' rule in closed form: posterior = likelihood x prior / evidence, and MLE beside MAP.

Three conjugate pairs: a coin with a beta prior, the mean of a Gaussian whose variance is known, and mean and
variance of a Gaussian under the normal-inverse-gamma prior. Data are `[N]` with an optional mask `[N]`; use
`jax.vmap` for many coins or features.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, gammaln, xlog1py, xlogy
from jax.scipy.stats import t as student_t
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float, as_mask, index_keys, masked
from jaxgen.types import Array, Key


class Beta(NamedTuple):
    """The density theta^(a-1) (1-theta)^(b-1) / B(a, b) on [0, 1]; scalars a, b > 0."""

    a: Array | float
    b: Array | float


class Normal(NamedTuple):
    """The Gaussian density of a mean: scalars `mean`, `variance` > 0."""

    mean: Array | float
    variance: Array | float


class NormalInverseGamma(NamedTuple):
    """sigma^2 ~ InverseGamma(alpha, beta), mu given sigma^2 ~ N(mean, sigma^2 / kappa); all scalars, > 0 but
    mean."""

    mean: Array | float
    kappa: Array | float
    alpha: Array | float
    beta: Array | float


class GaussianPoint(NamedTuple):
    """A point estimate of a Gaussian: scalars `mean` and `variance`."""

    mean: Array
    variance: Array


def _moments(x: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array, Array]:
    """(count, mean, centred sum of squares), scalars, of the rows `x` `[N]` that count; zeros for no data."""
    x = as_float(x)
    mask = as_mask(x, mask)
    count = jnp.sum(mask)
    mean = jnp.sum(masked(x, mask)) / jnp.maximum(count, 1.0)
    return count, mean, jnp.sum(masked(x - mean, mask) ** 2)


@jax.jit
def beta_posterior(prior: Beta, x: ArrayLike, mask: ArrayLike | None = None) -> Beta:
    """Beta(a + heads, b + tails) after the tosses `x` `[N]`, 0 or 1 (Murphy 2012, eq. 3.21)."""
    count, mean, _ = _moments(x, mask)
    return Beta(prior.a + count * mean, prior.b + count * (1.0 - mean))


@jax.jit
def beta_mean(beta: Beta) -> Array:
    """E[theta] = a / (a + b), also the probability that the next toss is 1 (Murphy 2012, eq. 3.23)."""
    return as_float(beta.a) / (beta.a + beta.b)


@jax.jit
def beta_map(beta: Beta) -> Array:
    """The mode (a - 1) / (a + b - 2) (Murphy 2012, eq. 3.22); at 0 or 1 where the other parameter is at most
    1.

    Where neither a nor b is above 1 there is no single inner mode, and the mean is returned.
    """
    a, b = jnp.maximum(beta.a - 1.0, 0.0), jnp.maximum(beta.b - 1.0, 0.0)
    return jnp.where(a + b > 0, a / jnp.where(a + b > 0, a + b, 1.0), beta_mean(beta))


@jax.jit
def bernoulli_mle(x: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """The share of ones in `x` `[N]`: the maximum-likelihood coin, and the MAP one under Beta(1, 1); 0 of no
    data.
    """
    return _moments(x, mask)[1]


@jax.jit
def beta_log_prob(beta: Beta, theta: ArrayLike) -> Array:
    """Log density, nats, at `theta` (any shape, within [0, 1])."""
    theta = as_float(theta)
    return xlogy(beta.a - 1.0, theta) + xlog1py(beta.b - 1.0, -theta) - betaln(beta.a, beta.b)


@jax.jit
def beta_log_evidence(prior: Beta, x: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """log p(x) = log B(a', b') - log B(a, b), nats, of the sequence of tosses `x` `[N]` (Murphy 2012, eq.
    3.80).
    """
    posterior = beta_posterior(prior, x, mask)
    return betaln(posterior.a, posterior.b) - betaln(prior.a, prior.b)


@partial(jax.jit, static_argnames="num")
def beta_sample(beta: Beta, key: Key, num: int) -> Array:
    """Draws `[num]` of theta; draw i depends on (key, i) alone."""
    return jax.vmap(lambda key: jax.random.beta(key, beta.a, beta.b))(index_keys(key, num))


@jax.jit
def normal_posterior(
    prior: Normal, x: ArrayLike, variance: ArrayLike, mask: ArrayLike | None = None
) -> Normal:
    """The posterior of the mean of a Gaussian whose `variance` is known, after `x` `[N]`.

    Precisions add: 1/v' = 1/v + N/variance; the mean weighs prior mean and average by them (Murphy 2012,
    eq. 4.127-4.130). Its mean is also its mode, the MAP estimate.
    """
    count, mean, _ = _moments(x, mask)
    precision = 1.0 / jnp.asarray(prior.variance) + count / variance
    return Normal(
        (prior.mean / jnp.asarray(prior.variance) + count * mean / variance) / precision, 1.0 / precision
    )


@jax.jit
def normal_log_prob(normal: Normal, mean: ArrayLike) -> Array:
    """Log density, nats, at `mean` (any shape)."""
    mean = as_float(mean)
    return -0.5 * ((mean - normal.mean) ** 2 / normal.variance + jnp.log(2 * jnp.pi * normal.variance))


@partial(jax.jit, static_argnames="num")
def normal_sample(normal: Normal, key: Key, num: int) -> Array:
    """Draws `[num]` of the mean; draw i depends on (key, i) alone."""
    noise = jax.vmap(jax.random.normal)(index_keys(key, num))
    return as_float(normal.mean) + jnp.sqrt(as_float(normal.variance)) * noise


@jax.jit
def normal_predictive(posterior: Normal, variance: ArrayLike) -> Normal:
    """The density of the next observation: the variance of the mean adds to the known one (Murphy 2012, eq.
    4.131).
    """
    return Normal(posterior.mean, jnp.asarray(posterior.variance) + variance)


@jax.jit
def gaussian_mle(x: ArrayLike, mask: ArrayLike | None = None) -> GaussianPoint:
    """Average and variance (divisor N) of `x` `[N]`: the maximum-likelihood Gaussian; zeros of no data."""
    count, mean, squares = _moments(x, mask)
    return GaussianPoint(mean, squares / jnp.maximum(count, 1.0))


@jax.jit
def nig_posterior(
    prior: NormalInverseGamma, x: ArrayLike, mask: ArrayLike | None = None
) -> NormalInverseGamma:
    """The posterior of mean and variance after `x` `[N]` (Murphy 2007, eq. 197-201; Bishop 2006, section
    2.3.6).
    """
    count, average, squares = _moments(x, mask)
    kappa = prior.kappa + count
    gap = average - prior.mean
    return NormalInverseGamma(
        mean=prior.mean + count / kappa * gap,
        kappa=kappa,
        alpha=prior.alpha + count / 2,
        beta=prior.beta + squares / 2 + prior.kappa * count * gap**2 / (2 * kappa),
    )


@jax.jit
def nig_map(nig: NormalInverseGamma) -> GaussianPoint:
    """The joint mode: mu = mean, sigma^2 = beta / (alpha + 3/2), from setting both derivatives to zero."""
    return GaussianPoint(as_float(nig.mean), as_float(nig.beta) / (nig.alpha + 1.5))


@jax.jit
def nig_log_prob(nig: NormalInverseGamma, mean: ArrayLike, variance: ArrayLike) -> Array:
    """Log density, nats, at (`mean`, `variance`), of one shape, variance > 0 (Murphy 2007, eq. 180)."""
    mean, variance = as_float(mean), as_float(variance)
    inverse_gamma = nig.alpha * jnp.log(nig.beta) - gammaln(nig.alpha)
    inverse_gamma += -(nig.alpha + 1.0) * jnp.log(variance) - nig.beta / variance
    return inverse_gamma + normal_log_prob(Normal(nig.mean, variance / nig.kappa), mean)


@jax.jit
def nig_log_evidence(prior: NormalInverseGamma, x: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """log p(x), nats, with mean and variance integrated out of `x` `[N]` (Murphy 2007, eq. 203)."""
    posterior, count = nig_posterior(prior, x, mask), _moments(x, mask)[0]

    def log_partition(nig: NormalInverseGamma) -> Array:
        return gammaln(nig.alpha) - nig.alpha * jnp.log(nig.beta) - 0.5 * jnp.log(nig.kappa)

    return log_partition(posterior) - log_partition(prior) - 0.5 * count * jnp.log(2 * jnp.pi)


@jax.jit
def nig_predictive_log_prob(posterior: NormalInverseGamma, x: ArrayLike) -> Array:
    """Log density, nats, of a next observation `x` (any shape): Student's t with 2 alpha degrees of freedom.

    Location mean, squared scale beta (kappa + 1) / (alpha kappa) (Murphy 2007, eq. 206).
    """
    scale = jnp.sqrt(
        posterior.beta * (posterior.kappa + 1.0) / (jnp.asarray(posterior.alpha) * posterior.kappa)
    )
    return student_t.logpdf(as_float(x), 2.0 * jnp.asarray(posterior.alpha), posterior.mean, scale)


@partial(jax.jit, static_argnames="num")
def nig_sample(nig: NormalInverseGamma, key: Key, num: int) -> GaussianPoint:
    """Draws of (mean `[num]`, variance `[num]`); draw i depends on (key, i) alone."""

    def draw(key: Key) -> GaussianPoint:
        for_variance, for_mean = jax.random.split(key)
        variance = as_float(nig.beta) / jax.random.gamma(for_variance, nig.alpha)
        mean = nig.mean + jnp.sqrt(variance / nig.kappa) * jax.random.normal(for_mean)
        return GaussianPoint(mean, variance)

    return jax.vmap(draw)(index_keys(key, num))
