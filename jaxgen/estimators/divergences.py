"""Kullback-Leibler divergences in closed form: KL(q || p) = E_q[log q - log p], nats, >= 0, not symmetric."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float
from jaxgen.types import Array, UserError


@jax.jit
def kl_gaussian_diagonal(
    mean_q: ArrayLike, variance_q: ArrayLike, mean_p: ArrayLike, variance_p: ArrayLike
) -> Array:
    """KL(N(mean_q, diag variance_q) || N(mean_p, diag variance_p)), nats `[...]`, of arrays `[..., D]`.

    Half the sum over D of v_q/v_p + (m_p - m_q)^2/v_p - 1 - log(v_q/v_p) (Kingma & Welling 2014, appendix B,
    for a general p). The variances are > 0.

    Raises:
        UserError: the four shapes differ.
    """
    mean_q, variance_q, mean_p, variance_p = map(as_float, (mean_q, variance_q, mean_p, variance_p))
    shapes = {mean_q.shape, variance_q.shape, mean_p.shape, variance_p.shape}
    if len(shapes) > 1:
        raise UserError(f"The means and variances of q and p must share one shape, not {sorted(shapes)}.")
    # log1p keeps the digits that v - 1 - log v loses where q is near p, but has none where v_q/v_p is tiny.
    excess = (variance_q - variance_p) / variance_p
    near = jnp.log1p(jnp.maximum(excess, -0.5))
    log_ratio = jnp.where(excess > -0.5, near, jnp.log(variance_q) - jnp.log(variance_p))
    terms = excess - log_ratio + (mean_p - mean_q) ** 2 / variance_p
    return 0.5 * jnp.sum(terms, axis=-1)


@jax.jit
def kl_gaussian_full(mean_q: ArrayLike, cov_q: ArrayLike, mean_p: ArrayLike, cov_p: ArrayLike) -> Array:
    """KL(N(mean_q, cov_q) || N(mean_p, cov_p)), a scalar in nats, of means `[D]` and covariances `[D, D]`.

    Half of tr(P^-1 Q) + (m_p - m_q)^T P^-1 (m_p - m_q) - D + log det P - log det Q (Rasmussen & Williams
    2006, eq. A.23). Both covariances are positive definite.

    Raises:
        UserError: the shapes are not `[D]` and `[D, D]`.
    """
    mean_q, cov_q, mean_p, cov_p = map(as_float, (mean_q, cov_q, mean_p, cov_p))
    dim = mean_q.shape[0]
    if mean_p.shape != (dim,) or cov_q.shape != (dim, dim) or cov_p.shape != (dim, dim):
        raise UserError(f"Give means [D] and covariances [D, D], not {mean_p.shape}, {cov_p.shape}.")
    chol_q, chol_p = jnp.linalg.cholesky(cov_q), jnp.linalg.cholesky(cov_p)
    whiten = partial(solve_triangular, chol_p, lower=True)
    distance = jnp.sum(whiten(chol_q) ** 2) + jnp.sum(whiten(mean_p - mean_q) ** 2)
    log_ratio = jnp.sum(jnp.log(jnp.diagonal(chol_p)) - jnp.log(jnp.diagonal(chol_q)))
    return 0.5 * (distance - dim) + log_ratio


@jax.jit
def kl_categorical(q: ArrayLike, p: ArrayLike) -> Array:
    """sum_k q_k log(q_k / p_k), nats `[...]`, of probabilities `[..., K]` (Kullback & Leibler 1951, eq. 2.2).

    0 log 0 is 0; where q > 0 = p the divergence is infinite, as it should be.

    Raises:
        UserError: the shapes differ.
    """
    q, p = as_float(q), as_float(p)
    if q.shape != p.shape:
        raise UserError(f"q and p must share one shape, not {q.shape} and {p.shape}.")
    ratio = jnp.log(jnp.where(q > 0, q, 1.0)) - jnp.log(jnp.where(q > 0, p, 1.0))
    return jnp.sum(q * ratio, axis=-1)
