"""KL divergences: hand-worked values, Monte-Carlo within standard errors, asymmetry, the range [0, inf)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxgen.estimators import divergences as kl
from jaxgen.types import UserError

rng = np.random.default_rng(0)
A, B = rng.normal(size=(2, 3, 3))
COV_Q, COV_P = A @ A.T + np.eye(3), B @ B.T + np.eye(3)
MEAN_Q, MEAN_P = np.array([0.5, -1.0, 0.0]), np.array([0.0, 0.3, 1.0])


def test_gaussians_by_hand_and_asymmetry():
    """N(0, 1) against N(1, 4): log 2 + 2/8 - 1/2 one way, -log 2 + 5/2 - 1/2 the other."""
    forward = kl.kl_gaussian_diagonal(np.zeros(1), np.ones(1), np.ones(1), np.full(1, 4.0))
    backward = kl.kl_gaussian_diagonal(np.ones(1), np.full(1, 4.0), np.zeros(1), np.ones(1))
    np.testing.assert_allclose(forward, np.log(2) + 2 / 8 - 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(backward, -np.log(2) + 5 / 2 - 1 / 2, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1e-4, 1e-7, 1e-10, 1e-30])
def test_gaussians_with_a_small_variance_ratio(ratio):
    """(r - 1 - log r) / 2; its derivative in v_q is (1 - 1/r) / 2 at v_p = 1."""
    zero, one, v = np.zeros(1, np.float32), np.ones(1, np.float32), np.full(1, ratio, np.float32)
    divergence = lambda v: kl.kl_gaussian_diagonal(zero, v, zero, one)
    np.testing.assert_allclose(divergence(v), (ratio - 1 - np.log(ratio)) / 2, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(divergence)(v)[0], (1 - 1 / ratio) / 2, rtol=1e-5)


def test_categoricals_by_hand_and_asymmetry():
    """(1/2, 1/2) against (1/4, 3/4): log 2 - log(3)/2 one way, 3/4 log 3 - log 2 the other."""
    q, p = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    np.testing.assert_allclose(kl.kl_categorical(q, p), np.log(2) - np.log(3) / 2, rtol=1e-5)
    np.testing.assert_allclose(kl.kl_categorical(p, q), 0.75 * np.log(3) - np.log(2), rtol=1e-5)
    np.testing.assert_allclose(kl.kl_categorical(p, q), scipy.stats.entropy(p, q), rtol=1e-5)


def test_full_equals_diagonal_on_diagonal_covariances():
    v_q, v_p = np.diag(COV_Q), np.diag(COV_P)
    diagonal = kl.kl_gaussian_diagonal(MEAN_Q, v_q, MEAN_P, v_p)
    np.testing.assert_allclose(
        kl.kl_gaussian_full(MEAN_Q, np.diag(v_q), MEAN_P, np.diag(v_p)), diagonal, rtol=1e-5
    )


@pytest.mark.parametrize("swap", [False, True])
def test_full_gaussian_agrees_with_monte_carlo(swap):
    """E_q[log q - log p] over 50,000 draws, within 5 standard errors; the error is at most 1 % of it."""
    q, p = (MEAN_Q, COV_Q), (MEAN_P, COV_P)
    if swap:
        q, p = p, q
    x = np.random.default_rng(1).multivariate_normal(*q, size=50_000)
    ratio = scipy.stats.multivariate_normal(*q).logpdf(x) - scipy.stats.multivariate_normal(*p).logpdf(x)
    error = ratio.std() / np.sqrt(len(ratio))
    exact = float(kl.kl_gaussian_full(*q, *p))
    assert error < 0.01 * exact
    assert abs(exact - ratio.mean()) < 5 * error


def test_categorical_agrees_with_monte_carlo():
    q, p = np.random.default_rng(2).dirichlet(np.ones(6), size=2)
    draws = np.random.default_rng(3).choice(6, size=50_000, p=q)
    ratio = np.log(q[draws] / p[draws])
    assert abs(float(kl.kl_categorical(q, p)) - ratio.mean()) < 5 * ratio.std() / np.sqrt(50_000)


def test_zero_only_at_equality_and_never_below():
    assert kl.kl_gaussian_diagonal(MEAN_Q, np.diag(COV_Q), MEAN_Q, np.diag(COV_Q)) == 0.0
    np.testing.assert_allclose(kl.kl_gaussian_full(MEAN_Q, COV_Q, MEAN_Q, COV_Q), 0.0, atol=1e-5)
    q = np.random.default_rng(4).dirichlet(np.ones(4), size=(200, 2)).astype(np.float32)
    values = kl.kl_categorical(q[:, 0], q[:, 1])
    assert values.shape == (200,)
    assert values.min() > 0
    # Near equality v - 1 - log v would be rounding; the series v^2/4 is the truth.
    near = kl.kl_gaussian_diagonal(np.zeros(1), np.full(1, 1 + 2**-12), np.zeros(1), np.ones(1))
    np.testing.assert_allclose(near, 2**-24 / 4, rtol=1e-2)


def test_zero_probabilities():
    assert kl.kl_categorical(np.array([0.0, 1.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    assert kl.kl_categorical(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.0
    assert kl.kl_categorical(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == np.inf


def test_argmin_of_kl_from_the_data_is_argmax_of_likelihood():
    """Row P4: over a grid of coins, KL(data || coin) is least where the mean log-likelihood is most."""
    data = np.array([1, 0, 1, 1, 0, 1, 1, 1])
    theta = np.linspace(0.05, 0.95, 19)
    coins = np.stack([1 - theta, theta], axis=1)
    empirical = np.broadcast_to(np.array([0.25, 0.75]), coins.shape)
    log_likelihood = np.log(coins)[:, data].sum(1)
    divergence = kl.kl_categorical(empirical, coins)
    assert jnp.argmin(divergence) == np.argmax(log_likelihood)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(divergence, -entropy - log_likelihood / 8, atol=1e-5)


def test_vmap_and_wrong_shapes():
    many = jax.vmap(kl.kl_gaussian_full)(*(np.stack([a, a]) for a in (MEAN_Q, COV_Q, MEAN_P, COV_P)))
    np.testing.assert_allclose(many, [kl.kl_gaussian_full(MEAN_Q, COV_Q, MEAN_P, COV_P)] * 2, rtol=1e-5)
    with pytest.raises(UserError, match="share one shape"):
        kl.kl_categorical(np.ones(2), np.ones(3))
    with pytest.raises(UserError, match="share one shape"):
        kl.kl_gaussian_diagonal(np.zeros(2), np.ones(1), np.zeros(2), np.ones(2))
    with pytest.raises(UserError, match=r"covariances \[D, D\]"):
        kl.kl_gaussian_full(np.zeros(2), np.eye(2), np.zeros(2), np.ones(2))
