"""Mixtures of Gaussians under added noise: exact density, score and denoiser at every noise level.

If x0 ~ sum_k w_k N(m_k, C_k) and x = x0 + sigma eps, then x ~ sum_k w_k N(m_k, C_k + sigma^2 I), and all
that a denoising network is trained to approximate has a closed form. This is the reference that samplers,
objectives and priors are tested against, and a source of toy data.

Samples have any shape whose sizes multiply to D: `x` is float32 [B, ...], and `sigma` is float32 [B], where 0
means no noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxgen.types import Array, Key, UserError


class GaussianMixture(NamedTuple):
    """K Gaussians in D dimensions, each in its principal axes; all fields float32. See `gaussian_mixture`.

    log_weight: [K], whose exponentials sum to 1
    mean: [K, D]
    axes: [K, D, D], whose rows are the principal axes
    variance: [K, D], along those axes
    """

    log_weight: Array
    mean: Array
    axes: Array
    variance: Array


def gaussian_mixture(weight: ArrayLike, mean: ArrayLike, covariance: ArrayLike) -> GaussianMixture:
    """The mixture of N(mean[k], covariance[k]) with probability weight[k].

    weight: [K], positive; scaled to sum to 1
    mean: [K, D]
    covariance: [K, D, D], symmetric and positive semidefinite; zero makes a point mass, which has a density
        wherever sigma > 0

    Raises UserError for shapes that disagree, a weight that is not positive, or an indefinite covariance.
    """
    w, m, c = (np.asarray(a, np.float64) for a in (weight, mean, covariance))
    if m.ndim != 2 or w.shape != m.shape[:1] or c.shape != (*m.shape, m.shape[1]):
        raise UserError(
            f"a mixture needs weights [K], means [K, D] and covariances [K, D, D], but their shapes are "
            f"{list(w.shape)}, {list(m.shape)} and {list(c.shape)}."
        )
    if not (w > 0.0).all():
        raise UserError(f"the weights of a mixture must be positive, but they are {w.tolist()}.")
    variance, vectors = np.linalg.eigh(c)
    if not np.allclose(c, np.swapaxes(c, 1, 2)) or variance.min() < -1e-9 * max(variance.max(), 1.0):
        raise UserError("the covariances of a mixture must be symmetric and positive semidefinite.")
    fields = (np.log(w / w.sum()), m, np.swapaxes(vectors, 1, 2), np.maximum(variance, 0.0))
    return GaussianMixture(*(jnp.asarray(field, jnp.float32) for field in fields))


def _flat(mixture: GaussianMixture, x: Array) -> Array:
    if math.prod(x.shape[1:]) != mixture.mean.shape[1]:
        raise ValueError(f"x has shape {x.shape} but the mixture has {mixture.mean.shape[1]} dimensions")
    return x.reshape(x.shape[0], -1)


def _coordinates(mixture: GaussianMixture, x: Array) -> Array:
    """x - m_k in the axes of component k, [B, K, D]."""
    offset = x[:, None, :] - mixture.mean[None]
    return jnp.einsum("kij,bkj->bki", mixture.axes, offset, precision="highest")


def _from_coordinates(mixture: GaussianMixture, weight: Array, coordinates: Array) -> Array:
    """sum_k weight_k (the vector of these coordinates in the axes of component k), [B, D]."""
    return jnp.einsum("bk,kij,bki->bj", weight, mixture.axes, coordinates, precision="highest")


def _variances(mixture: GaussianMixture, sigma: Array) -> Array:
    return mixture.variance[None] + jnp.square(sigma)[:, None, None]


def _joint(mixture: GaussianMixture, coordinates: Array, variances: Array) -> Array:
    """log (w_k N(x; m_k, C_k + sigma^2 I)), [B, K]."""
    squares = jnp.sum(jnp.square(coordinates) / variances, axis=-1)
    log_det = jnp.sum(jnp.log(variances), axis=-1)
    constant = mixture.mean.shape[1] * math.log(2.0 * math.pi)
    return mixture.log_weight[None] - 0.5 * (squares + log_det + constant)


def log_density(mixture: GaussianMixture, x: Array, sigma: Array) -> Array:
    """log p_sigma(x) = log sum_k w_k N(x; m_k, C_k + sigma^2 I) in nats, [B]."""
    coordinates = _coordinates(mixture, _flat(mixture, x))
    return jax.nn.logsumexp(_joint(mixture, coordinates, _variances(mixture, sigma)), axis=1)


def responsibilities(mixture: GaussianMixture, x: Array, sigma: Array) -> Array:
    """p(component k | x), [B, K]; the rows sum to 1."""
    coordinates = _coordinates(mixture, _flat(mixture, x))
    return jax.nn.softmax(_joint(mixture, coordinates, _variances(mixture, sigma)), axis=1)


def score(mixture: GaussianMixture, x: Array, sigma: Array) -> Array:
    """grad log p_sigma(x) = sum_k p(k | x) (C_k + sigma^2 I)^-1 (m_k - x), [B, ...]."""
    coordinates, variances = _coordinates(mixture, _flat(mixture, x)), _variances(mixture, sigma)
    weight = jax.nn.softmax(_joint(mixture, coordinates, variances), axis=1)
    return _from_coordinates(mixture, weight, -coordinates / variances).reshape(x.shape)


def denoise(mixture: GaussianMixture, x: Array, sigma: Array) -> Array:
    """E[x0 | x] = sum_k p(k | x) (m_k + C_k (C_k + sigma^2 I)^-1 (x - m_k)), [B, ...].

    The best possible `Denoiser`. It is formed without the score, so that it is exact as sigma goes to 0.
    """
    coordinates, variances = _coordinates(mixture, _flat(mixture, x)), _variances(mixture, sigma)
    weight = jax.nn.softmax(_joint(mixture, coordinates, variances), axis=1)
    gain = mixture.variance[None] / variances
    means = jnp.einsum("bk,kj->bj", weight, mixture.mean, precision="highest")
    return (means + _from_coordinates(mixture, weight, gain * coordinates)).reshape(x.shape)


def sample(mixture: GaussianMixture, key: Key, num: int) -> Array:
    """Draws x0, float32 [num, D]; draw i depends on (key, i) alone. A `SampleFn`."""

    def draw(key: Key) -> Array:
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, mixture.log_weight)
        noise = jax.random.normal(noise_key, mixture.mean.shape[1:], jnp.float32)
        spread = jnp.dot(jnp.sqrt(mixture.variance[k]) * noise, mixture.axes[k], precision="highest")
        return mixture.mean[k] + spread

    return jax.vmap(draw)(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num)))


def moments(mixture: GaussianMixture) -> tuple[Array, Array]:
    """The mean [D] and the covariance [D, D] of x0."""
    weight = jnp.exp(mixture.log_weight)
    mean = jnp.einsum("k,kj->j", weight, mixture.mean, precision="highest")
    offset = mixture.mean - mean[None]
    axes = mixture.axes
    within = jnp.einsum("k,kd,kdi,kdj->ij", weight, mixture.variance, axes, axes, precision="highest")
    between = jnp.einsum("k,ki,kj->ij", weight, offset, offset, precision="highest")
    return mean, within + between
