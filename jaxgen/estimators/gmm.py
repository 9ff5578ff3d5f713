"""Gaussian mixtures by EM from a k-means++ start (Bishop 2006, section 9.2; Arthur & Vassilvitskii 2007).

The covariances' kind is a family of `estimators.families`: `GAUSSIAN_FULL`, `GAUSSIAN_TIED`,
`GAUSSIAN_DIAGONAL` or `GAUSSIAN_SPHERICAL`; the fitted `Mixture` is used with this module's `log_prob`,
`predict_log_proba`, `predict` and `sample`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.estimators import mixture
from jaxgen.estimators.common import as_float, as_mask, masked, require_matrix
from jaxgen.estimators.em import EMFit
from jaxgen.estimators.families import Family
from jaxgen.estimators.mixture import Mixture, log_joint, log_prob, predict, predict_log_proba, sample
from jaxgen.types import Array, Key, UserError

__all__ = [
    "fit",
    "fit_from",
    "kmeans",
    "kmeans_plus_plus",
    "log_joint",
    "log_prob",
    "nearest",
    "predict",
    "predict_log_proba",
    "sample",
]


def _squared_distances(x: Array, centres: Array) -> Array:
    """|x_n - c_k|^2 `[N, K]`, from the differences: no digit is lost far from the origin."""
    return jax.vmap(lambda centre: jnp.sum((x - centre[None, :]) ** 2, axis=1), out_axes=1)(centres)


@jax.jit
def nearest(x: ArrayLike, centres: ArrayLike) -> Array:
    """The index `[N]`, int32, of the centre `[K, D]` nearest to each row of `x` `[N, D]` (Lloyd 1982)."""
    return jnp.argmin(_squared_distances(as_float(x), as_float(centres)), axis=1).astype(jnp.int32)


@partial(jax.jit, static_argnames="num_clusters")
def kmeans_plus_plus(key: Key, x: ArrayLike, num_clusters: int, mask: ArrayLike | None = None) -> Array:
    """Centres `[K, D]` among the rows of `x` `[N, D]` (Arthur & Vassilvitskii 2007, section 2.2, steps
    1a-1c).

    Each next centre is drawn with a probability in proportion to the squared distance to the nearest so far;
    where all rows are taken (duplicates), from all rows alike. mask: `[N]`, 1 for the rows that count.

    Raises:
        UserError: `x` is not a matrix, or `num_clusters` is not in 1..N.
    """
    x = as_float(x)
    require_matrix(x)
    if not 1 <= num_clusters <= x.shape[0]:
        raise UserError(f"There must be 1 to {x.shape[0]} clusters for these rows, not {num_clusters}.")
    mask = as_mask(x, mask)
    x = masked(x, mask)

    def draw(i: ArrayLike, share: Array) -> Array:
        return x[jax.random.categorical(jax.random.fold_in(key, i), jnp.log(share))]

    def distance_to(centre: Array) -> Array:
        return mask * jnp.sum((x - centre[None, :]) ** 2, axis=1)

    def step(distance: Array, i: Array) -> tuple[Array, Array]:
        furthest = jnp.max(distance)
        centre = draw(i, jnp.where(furthest > 0, distance / jnp.where(furthest > 0, furthest, 1.0), mask))
        return jnp.minimum(distance, distance_to(centre)), centre

    first = draw(0, mask)
    others = jax.lax.scan(step, distance_to(first), jnp.arange(1, num_clusters))[1]
    return jnp.concatenate([first[None, :], others])


@partial(jax.jit, static_argnames=("num_clusters", "num_steps"))
def kmeans(
    key: Key, x: ArrayLike, num_clusters: int, mask: ArrayLike | None = None, *, num_steps: int = 10
) -> Array:
    """Centres `[K, D]` after `num_steps` of Lloyd's algorithm (Lloyd 1982) from a k-means++ start.

    A cluster that loses all its rows keeps its centre. Arguments and errors as for `kmeans_plus_plus`.
    """
    x = as_float(x)
    centres = kmeans_plus_plus(key, x, num_clusters, mask)
    mask = as_mask(x, mask)
    x = masked(x, mask)

    def step(centres: Array, _: None) -> tuple[Array, None]:
        index = nearest(x, centres)
        count = jnp.zeros(num_clusters, x.dtype).at[index].add(mask)[:, None]
        total = jnp.zeros_like(centres).at[index].add((x - centres[index]) * mask[:, None])
        return centres + total / jnp.maximum(count, 1.0), None

    return jax.lax.scan(step, centres, None, length=num_steps)[0]


@partial(jax.jit, static_argnames=("family", "max_steps"))
def fit_from(
    family: Family,
    initial: Mixture,
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    variance_floor: ArrayLike = 1e-6,
    max_steps: int = 200,
    tolerance: ArrayLike = 1e-5,
) -> EMFit:
    """EM from a given mixture: its `objective` is the mean log p(x_n) in nats, and never falls.

    Bishop 2006, eq. 9.23-9.28. `x` is `[N, D]`, `mask` `[N]` 1 for the rows that count. No variance
    (eigenvalue of a covariance) goes below `variance_floor`: the maximum under that constraint, not an
    addition to the diagonal. A component that loses all rows takes the covariance of all, with weight 1e-30.
    Ends when a step gains at most `tolerance` nats a row.

    Raises:
        UserError: `x` is not a matrix, the mask does not fit, or `max_steps` is negative.
    """
    x = as_float(x)
    require_matrix(x)
    mask = as_mask(x, mask)
    return mixture.em(
        family,
        initial,
        masked(x, mask),
        jnp.zeros((x.shape[0], initial.log_weight.shape[0]), x.dtype),
        mask,
        smoothing=variance_floor,
        weight_smoothing=0.0,
        max_steps=max_steps,
        tolerance=tolerance,
    )


@partial(jax.jit, static_argnames=("family", "num_components", "max_steps"))
def fit(
    family: Family,
    key: Key,
    x: ArrayLike,
    num_components: int,
    mask: ArrayLike | None = None,
    *,
    variance_floor: ArrayLike = 1e-6,
    max_steps: int = 200,
    tolerance: ArrayLike = 1e-5,
) -> EMFit:
    """`fit_from` the M-step of the clusters that `kmeans` finds (Bishop 2006, section 9.2.2).

    Raises:
        UserError: as `fit_from`, or `num_components` is not in 1..N.
    """
    x = as_float(x)
    require_matrix(x)
    mask = as_mask(x, mask)
    x = masked(x, mask)
    index = nearest(x, kmeans(key, x, num_components, mask))
    one_hot = jax.nn.one_hot(index, num_components, dtype=x.dtype) * mask[:, None]
    initial = mixture.estimate(family, x, one_hot, variance_floor, 0.0)
    return fit_from(
        family,
        initial,
        x,
        mask,
        variance_floor=variance_floor,
        max_steps=max_steps,
        tolerance=tolerance,
    )
