"""What the mixtures, naive Bayes and hidden Markov models are made of: K densities of one family.

A family is four pure functions on the parameters of its K densities; how the classes, components or states
are drawn is the business of who uses it. `smoothing` is the least variance of a Gaussian and the pseudo-count
of a discrete family. With it each `estimate` is the exact maximum of the weighted log-likelihood plus
`log_prior` (for Gaussians under the constraint on the variance), which is why EM with it never falls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from jaxgen.estimators.common import TINY, log_normalize
from jaxgen.types import Array, Key, PyTree

_matmul = partial(jnp.matmul, precision="highest")


class Family(NamedTuple):
    """K densities p_k(x) of one kind; N observations `x` `[N, D]` (`[N]` for categories).

    estimate: (x, weight `[N, K]` >= 0, smoothing) -> params. A density whose weights are all zero is fitted
    to all
        observations, so that it stays finite.
    log_likelihood: (params, x) -> log p_k(x_n) `[N, K]`, nats
    log_prior: (params, smoothing) -> scalar, what smoothing adds to the log-likelihood
    sample: (params, k, key) -> one observation of p_k
    """

    estimate: Callable[[Array, Array, ArrayLike], PyTree]
    log_likelihood: Callable[[PyTree, Array], Array]
    log_prior: Callable[[PyTree, ArrayLike], Array]
    sample: Callable[[PyTree, Array, Key], Array]


class Gaussians(NamedTuple):
    """K Gaussians without correlations: mean `[K, D]`, variance `[K, D]` (diagonal) or `[K]` (spherical)."""

    mean: Array
    variance: Array


class RotatedGaussians(NamedTuple):
    """K Gaussians with covariance axes diag(variance) axes^T, kept so because no floor can be lost in
    rounding.

    mean: [K, D]
    axes: [K, D, D], or [D, D] where tied; orthonormal columns
    variance: [K, D], or [D] where tied; along the columns of `axes`
    """

    mean: Array
    axes: Array
    variance: Array

    @property
    def covariance(self) -> Array:
        """`[K, D, D]`, or `[D, D]` where tied."""
        return _matmul(self.axes * self.variance[..., None, :], jnp.swapaxes(self.axes, -1, -2))


class Categoricals(NamedTuple):
    """K tables: log_prob `[K, V]`, each row normalised."""

    log_prob: Array


class Bernoullis(NamedTuple):
    """K tables of coins: log_on and log_off `[K, D]`, the log probabilities of 1 and of 0."""

    log_on: Array
    log_off: Array


class Multinomials(NamedTuple):
    """K tables: log_prob `[K, D]`, each row normalised; length, the (rounded mean) total count that is
    sampled.
    """

    log_prob: Array
    length: Array


def _no_log_prior(params: PyTree, smoothing: ArrayLike) -> Array:
    return jnp.zeros(())


def _columns(weight: Array) -> tuple[Array, Array]:
    """(weights `[K, N]` that sum to 1 for each density, those of all observations `[N]`)."""
    pooled = jnp.sum(weight, axis=1)
    pooled = pooled / jnp.maximum(jnp.sum(pooled), TINY)
    total = jnp.sum(weight, axis=0)[:, None]
    return jnp.where(total > 0, weight.T / jnp.where(total > 0, total, 1.0), pooled[None, :]), pooled


def _weighted_means(x: Array, columns: Array, pooled: Array) -> Array:
    """Means `[K, D]`; about the mean of all, so that data far from the origin keep their digits."""
    centre = _matmul(pooled, x)
    return centre[None, :] + _matmul(columns, x - centre[None, :])


def _estimate_diagonal(x: Array, weight: Array, smoothing: ArrayLike) -> Gaussians:
    columns, pooled = _columns(weight)
    mean = _weighted_means(x, columns, pooled)

    def variance(column: Array, mean: Array) -> Array:
        return jnp.sum(column[:, None] * (x - mean[None, :]) ** 2, axis=0)

    return Gaussians(mean, jnp.maximum(jax.vmap(variance)(columns, mean), smoothing))


def _log_likelihood_diagonal(params: Gaussians, x: Array) -> Array:
    def one(mean: Array, variance: Array) -> Array:
        distance = jnp.sum((x - mean[None, :]) ** 2 / variance[None, :], axis=1)
        return -0.5 * (distance + jnp.sum(jnp.log(2 * jnp.pi * variance)))

    return jax.vmap(one, out_axes=1)(params.mean, params.variance)


def _sample_diagonal(params: Gaussians, k: Array, key: Key) -> Array:
    mean = params.mean[k]
    return mean + jnp.sqrt(params.variance[k]) * jax.random.normal(key, mean.shape, mean.dtype)


def _estimate_spherical(x: Array, weight: Array, smoothing: ArrayLike) -> Gaussians:
    mean, variance = _estimate_diagonal(x, weight, 0.0)
    return Gaussians(mean, jnp.maximum(jnp.mean(variance, axis=1), smoothing))


def _log_likelihood_spherical(params: Gaussians, x: Array) -> Array:
    variance = jnp.broadcast_to(params.variance[:, None], params.mean.shape)
    return _log_likelihood_diagonal(Gaussians(params.mean, variance), x)


def _rotate(scatter: Array, smoothing: ArrayLike) -> tuple[Array, Array]:
    """(axes, variance) of the likeliest covariance with eigenvalues of at least `smoothing`, given the
    scatter.

    It has the scatter's eigenvectors, and its eigenvalues clipped: von Neumann's trace inequality settles the
    vectors, and -log v - s/v is unimodal in each v.
    """
    variance, axes = jnp.linalg.eigh(scatter)
    return axes, jnp.maximum(variance, smoothing)


def _scatters(x: Array, columns: Array, mean: Array) -> Array:
    """Weighted covariances `[K, D, D]`, one after another: memory of order N D, not N D K."""

    def one(column_and_mean: tuple[Array, Array]) -> Array:
        column, mean = column_and_mean
        centred = x - mean[None, :]
        return _matmul((column[:, None] * centred).T, centred)

    return jax.lax.map(one, (columns, mean))


def _estimate_full(x: Array, weight: Array, smoothing: ArrayLike) -> RotatedGaussians:
    columns, pooled = _columns(weight)
    mean = _weighted_means(x, columns, pooled)
    return RotatedGaussians(mean, *_rotate(_scatters(x, columns, mean), smoothing))


def _log_likelihood_full(params: RotatedGaussians, x: Array) -> Array:
    def one(params: RotatedGaussians) -> Array:
        turned = _matmul(x - params.mean[None, :], params.axes)
        distance = jnp.sum(turned**2 / params.variance[None, :], axis=1)
        return -0.5 * (distance + jnp.sum(jnp.log(2 * jnp.pi * params.variance)))

    return jax.lax.map(one, params).T


def _sample_rotated(mean: Array, axes: Array, variance: Array, key: Key) -> Array:
    return mean + _matmul(axes, jnp.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype))


def _sample_full(params: RotatedGaussians, k: Array, key: Key) -> Array:
    return _sample_rotated(params.mean[k], params.axes[k], params.variance[k], key)


def _estimate_tied(x: Array, weight: Array, smoothing: ArrayLike) -> RotatedGaussians:
    columns, pooled = _columns(weight)
    mean = _weighted_means(x, columns, pooled)
    share = jnp.sum(weight, axis=0) / jnp.maximum(jnp.sum(weight), TINY)
    scatter = jnp.sum(share[:, None, None] * _scatters(x, columns, mean), axis=0)
    return RotatedGaussians(mean, *_rotate(scatter, smoothing))


def _log_likelihood_tied(params: RotatedGaussians, x: Array) -> Array:
    centre = jnp.mean(params.mean, axis=0, keepdims=True)
    turned, mean = _matmul(x - centre, params.axes), _matmul(params.mean - centre, params.axes)
    return _log_likelihood_diagonal(
        Gaussians(mean, jnp.broadcast_to(params.variance[None, :], mean.shape)), turned
    )


def _sample_tied(params: RotatedGaussians, k: Array, key: Key) -> Array:
    return _sample_rotated(params.mean[k], params.axes, params.variance, key)


def _estimate_bernoulli(x: Array, weight: Array, smoothing: ArrayLike) -> Bernoullis:
    on = _matmul(weight.T, x) + smoothing
    off = _matmul(weight.T, 1.0 - x) + smoothing
    log_prob = log_normalize(jnp.stack([on, off], axis=-1))
    return Bernoullis(log_prob[..., 0], log_prob[..., 1])


def _log_likelihood_bernoulli(params: Bernoullis, x: Array) -> Array:
    return _matmul(x, params.log_on.T) + _matmul(1.0 - x, params.log_off.T)


def _estimate_multinomial(x: Array, weight: Array, smoothing: ArrayLike) -> Multinomials:
    total = jnp.sum(weight, axis=1)
    length = jnp.sum(total * jnp.sum(x, axis=1)) / jnp.maximum(jnp.sum(total), TINY)
    return Multinomials(log_normalize(_matmul(weight.T, x) + smoothing), jnp.round(length))


def _log_likelihood_multinomial(params: Multinomials, x: Array) -> Array:
    ways = gammaln(jnp.sum(x, axis=1) + 1.0) - jnp.sum(gammaln(x + 1.0), axis=1)
    return ways[:, None] + _matmul(x, params.log_prob.T)


def _sample_multinomial(params: Multinomials, k: Array, key: Key) -> Array:
    def draw_one(i: Array, count: Array) -> Array:
        return count.at[jax.random.categorical(jax.random.fold_in(key, i), params.log_prob[k])].add(1)

    # One item after another: jax.random.multinomial reuses a key, by JAX's own check.
    count = jnp.zeros(params.log_prob.shape[1:], params.log_prob.dtype)
    return jax.lax.fori_loop(0, params.length.astype(jnp.int32), draw_one, count)


@cache
def categorical(num_categories: int) -> Family:
    """K tables of probabilities over `num_categories` values; `x` is `[N]`, integers from 0.

    The estimate is (count + smoothing) / (total + smoothing V) (Manning et al. 2008, eq. 13.7).
    """

    def estimate(x: Array, weight: Array, smoothing: ArrayLike) -> Categoricals:
        count = jnp.zeros((num_categories, weight.shape[1]), weight.dtype).at[x.astype(jnp.int32)].add(weight)
        return Categoricals(log_normalize(count.T + smoothing))

    def log_likelihood(params: Categoricals, x: Array) -> Array:
        return params.log_prob.T[x.astype(jnp.int32)]

    def log_prior(params: Categoricals, smoothing: ArrayLike) -> Array:
        return jnp.asarray(smoothing) * jnp.sum(params.log_prob)

    def sample(params: Categoricals, k: Array, key: Key) -> Array:
        return jax.random.categorical(key, params.log_prob[k])

    return Family(estimate, log_likelihood, log_prior, sample)


# Bishop 2006, eq. 9.24-9.25, and for the others the same maximum within the narrower kind of covariance.
GAUSSIAN_FULL = Family(_estimate_full, _log_likelihood_full, _no_log_prior, _sample_full)
GAUSSIAN_TIED = Family(_estimate_tied, _log_likelihood_tied, _no_log_prior, _sample_tied)
GAUSSIAN_DIAGONAL = Family(_estimate_diagonal, _log_likelihood_diagonal, _no_log_prior, _sample_diagonal)
GAUSSIAN_SPHERICAL = Family(_estimate_spherical, _log_likelihood_spherical, _no_log_prior, _sample_diagonal)

# Manning et al. 2008, chapter 13: x [N, D] is 0 or 1; the smoothing is added to the ones and to the zeros.
BERNOULLI = Family(
    _estimate_bernoulli,
    _log_likelihood_bernoulli,
    lambda params, smoothing: jnp.asarray(smoothing) * jnp.sum(params.log_on + params.log_off),
    lambda params, k, key: jax.random.bernoulli(key, jnp.exp(params.log_on[k])).astype(params.log_on.dtype),
)

# Manning et al. 2008, eq. 13.7, with the multinomial coefficient: x [N, D] holds counts.
MULTINOMIAL = Family(
    _estimate_multinomial,
    _log_likelihood_multinomial,
    lambda params, smoothing: jnp.asarray(smoothing) * jnp.sum(params.log_prob),
    _sample_multinomial,
)
