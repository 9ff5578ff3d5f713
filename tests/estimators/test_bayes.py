"""Conjugate updates: hand-worked posteriors, integrals by quadrature, SciPy, and draws within standard
errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.integrate import dblquad, quad

from jaxgen.estimators import bayes

TOSSES = np.array([1, 1, 0, 1, 0, 1, 1])
HEIGHTS = np.array([1.2, 0.4, 2.0, 1.1, 1.7], np.float32)
NIG = bayes.NormalInverseGamma(0.5, 2.0, 3.0, 1.5)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def test_beta_bernoulli_by_hand():
    """Beta(2, 2) and 5 heads of 7: Beta(7, 4), MAP 6/9, mean 7/11, MLE 5/7."""
    posterior = bayes.beta_posterior(bayes.Beta(2.0, 2.0), TOSSES)
    np.testing.assert_allclose(posterior, (7.0, 4.0))
    np.testing.assert_allclose(bayes.beta_map(posterior), 6 / 9, rtol=1e-6)
    np.testing.assert_allclose(bayes.beta_mean(posterior), 7 / 11, rtol=1e-6)
    np.testing.assert_allclose(bayes.bernoulli_mle(TOSSES), 5 / 7, rtol=1e-6)
    flat = bayes.beta_posterior(bayes.Beta(1.0, 1.0), TOSSES)
    np.testing.assert_allclose(bayes.beta_map(flat), bayes.bernoulli_mle(TOSSES), rtol=1e-6)


def test_beta_posterior_is_likelihood_times_prior_over_evidence():
    """Bayes' rule point by point, with the evidence by quadrature; float32 gammaln keeps about 1e-5."""
    prior = bayes.Beta(2.5, 1.5)
    density = lambda theta: scipy.stats.beta(2.5, 1.5).pdf(theta) * theta**5 * (1 - theta) ** 2
    evidence = quad(density, 0, 1)[0]
    np.testing.assert_allclose(bayes.beta_log_evidence(prior, TOSSES), np.log(evidence), atol=2e-5)
    theta = np.linspace(0.05, 0.95, 7)
    ours = jnp.exp(bayes.beta_log_prob(bayes.beta_posterior(prior, TOSSES), theta))
    np.testing.assert_allclose(ours, density(theta) / evidence, rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "mode"), [(1, 3, 0.0), (3, 1, 1.0), (0.5, 2, 0.0), (1, 1, 0.5), (0.5, 0.5, 0.5)]
)
def test_beta_modes_at_the_ends_stay_finite(a, b, mode):
    assert bayes.beta_map(bayes.Beta(float(a), float(b))) == mode


def test_normal_posterior_by_hand_and_by_quadrature():
    """Prior N(0, 4), variance 1, five points of mean 1.28: precision 5.25, mean 6.4 / 5.25."""
    prior = bayes.Normal(0.0, 4.0)
    posterior = bayes.normal_posterior(prior, HEIGHTS, 1.0)
    np.testing.assert_allclose(posterior, (6.4 / 5.25, 1 / 5.25), rtol=1e-6)
    joint = lambda mu: scipy.stats.norm(0, 2).pdf(mu) * scipy.stats.norm(mu, 1).pdf(HEIGHTS).prod()
    evidence = quad(joint, -10, 10)[0]
    for mu in (0.3, 1.2, 2.0):
        density = jnp.exp(bayes.normal_log_prob(posterior, mu))
        np.testing.assert_allclose(density, joint(mu) / evidence, rtol=1e-4)
    predictive = bayes.normal_predictive(posterior, 1.0)
    expected = quad(lambda mu: joint(mu) / evidence * scipy.stats.norm(mu, 1).pdf(0.7), -10, 10)[0]
    np.testing.assert_allclose(jnp.exp(bayes.normal_log_prob(predictive, 0.7)), expected, rtol=1e-4)


def test_normal_map_goes_from_prior_to_mle_as_data_grow():
    x = np.random.default_rng(0).normal(3.0, 1.0, 4000).astype(np.float32)
    gaps = []
    for n in (0, 10, 4000):
        posterior = bayes.normal_posterior(bayes.Normal(-1.0, 0.1), x, 1.0, np.arange(4000) < n)
        gaps.append(abs(float(posterior.mean) - x[: max(n, 1)].mean()) if n else float(posterior.mean))
    assert gaps[0] == -1.0
    assert gaps[1] > 1.0
    assert gaps[2] < 0.02


def test_nig_map_is_the_top_of_its_density_and_mle_is_its_flat_limit():
    posterior = bayes.nig_posterior(NIG, HEIGHTS)
    top = bayes.nig_map(posterior)
    best = bayes.nig_log_prob(posterior, top.mean, top.variance)
    for dm, dv in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
        assert bayes.nig_log_prob(posterior, top.mean + dm, top.variance + dv) < best
    np.testing.assert_allclose(
        jax.grad(bayes.nig_log_prob, argnums=(1, 2))(posterior, *top), (0, 0), atol=1e-4
    )
    # alpha = -3/2, beta = 0, kappa = 0 is the flat density, under which MAP is MLE.
    flat = bayes.nig_posterior(bayes.NormalInverseGamma(0.0, 0.0, -1.5, 0.0), HEIGHTS)
    np.testing.assert_allclose(bayes.nig_map(flat), bayes.gaussian_mle(HEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(bayes.gaussian_mle(HEIGHTS), (HEIGHTS.mean(), HEIGHTS.var()), rtol=1e-5)


def test_nig_log_prob_agrees_with_scipy_and_evidence_with_quadrature():
    expected = scipy.stats.invgamma(3.0, scale=1.5).logpdf(0.8) + scipy.stats.norm(0.5, np.sqrt(0.4)).logpdf(
        0.9
    )
    np.testing.assert_allclose(bayes.nig_log_prob(NIG, 0.9, 0.8), expected, rtol=1e-5)

    def joint(mu, variance):
        prior = scipy.stats.invgamma.pdf(variance, 3.0, scale=1.5)
        prior *= np.exp(-0.5 * (mu - 0.5) ** 2 * 2 / variance) / np.sqrt(np.pi * variance)
        return prior * np.exp(-0.5 * np.sum((HEIGHTS[:2] - mu) ** 2) / variance) / (2 * np.pi * variance)

    evidence = dblquad(joint, 1e-3, 60, -8, 9, epsabs=1e-7)[0]
    np.testing.assert_allclose(bayes.nig_log_evidence(NIG, HEIGHTS[:2]), np.log(evidence), atol=1e-3)


def test_nig_evidence_is_the_product_of_predictives():
    """The chain rule p(x1..xN) = prod p(x_n | x_<n): Student's t against the normalising constants."""
    total = 0.0
    for n in range(len(HEIGHTS)):
        posterior = bayes.nig_posterior(NIG, HEIGHTS, np.arange(len(HEIGHTS)) < n)
        total += float(bayes.nig_predictive_log_prob(posterior, HEIGHTS[n]))
    np.testing.assert_allclose(bayes.nig_log_evidence(NIG, HEIGHTS), total, atol=1e-4)


def test_draws_have_the_closed_form_moments():
    """Means within 5 standard errors of 1000 draws."""
    num, key = 1000, jax.random.key(0)
    beta, normal = bayes.Beta(3.0, 2.0), bayes.Normal(1.0, 4.0)
    nig = bayes.nig_sample(bayes.NormalInverseGamma(0.5, 2.0, 6.0, 5.0), key, num)
    draws_and_means = [
        (bayes.beta_sample(beta, key, num), 0.6),
        (bayes.normal_sample(normal, key, num), 1.0),
        (nig.mean, 0.5),
        (nig.variance, 5.0 / (6.0 - 1.0)),
    ]
    for draws, mean in draws_and_means:
        draws = np.asarray(draws)
        assert abs(draws.mean() - mean) < 5 * draws.std() / np.sqrt(num)
    np.testing.assert_array_equal(bayes.beta_sample(beta, key, 5), draws_and_means[0][0][:5])


def test_masked_values_do_not_count_even_when_they_are_nan_and_no_data_is_the_prior():
    padded, mask = np.append(HEIGHTS, np.nan).astype(np.float32), np.arange(6) < 5
    np.testing.assert_allclose(bayes.nig_posterior(NIG, padded, mask), bayes.nig_posterior(NIG, HEIGHTS))
    np.testing.assert_allclose(bayes.nig_posterior(NIG, padded, np.zeros(6)), NIG)
    np.testing.assert_allclose(bayes.beta_posterior(bayes.Beta(2.0, 3.0), padded, np.zeros(6)), (2.0, 3.0))
    assert finite((bayes.gaussian_mle(padded, np.zeros(6)), bayes.bernoulli_mle(padded, np.zeros(6))))


def test_vmap_updates_many_coins_at_once():
    coins = np.array([[1, 1, 1], [0, 1, 0]])
    many = jax.vmap(bayes.beta_posterior, in_axes=(None, 0))(bayes.Beta(1.0, 1.0), coins)
    np.testing.assert_allclose(many, [[4.0, 2.0], [1.0, 3.0]], rtol=1e-6)
