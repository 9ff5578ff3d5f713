"""SVD and PCA: the best rank-k property, three fits that agree, scikit-learn on the same data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA as SkPCA

from jaxgen.estimators import linear
from jaxgen.types import UserError


@pytest.fixture(scope="module")
def digits():
    return load_digits().data[:300].astype(np.float32) / 16  # 64 pixels in [0, 1], some of them constant


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_truncated_svd_keeps_the_largest_singular_values_of_a_known_matrix():
    svd = linear.truncated_svd(np.array([[3.0, 0.0], [0.0, -5.0], [0.0, 0.0]]), 1)
    np.testing.assert_allclose(svd.s, [5.0], rtol=1e-6)
    np.testing.assert_allclose(svd.vt, [[0.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(svd.u[:, 0], [0.0, -1.0, 0.0], atol=1e-6)


def test_full_rank_is_lossless_and_rank_k_loses_exactly_the_discarded_values(rng):
    x = rng.normal(size=(9, 6)).astype(np.float32)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    for rank in range(1, 7):
        lost = np.sum((np.asarray(linear.low_rank(linear.truncated_svd(x, rank)), np.float64) - x) ** 2)
        np.testing.assert_allclose(lost, np.sum(s[rank:] ** 2), rtol=1e-4, atol=1e-10)


def test_no_other_rank_k_matrix_is_nearer(rng):
    """Eckart & Young: 300 projections on random planes all lie further off."""
    x = rng.normal(size=(8, 5))
    best = np.sum((np.asarray(linear.low_rank(linear.truncated_svd(x, 2))) - x) ** 2)
    for _ in range(300):
        basis = np.linalg.qr(rng.normal(size=(5, 2)))[0]
        assert np.sum((x @ basis @ basis.T - x) ** 2) > best


def test_pca_is_the_truncated_svd_of_centred_data(digits):
    pca = linear.fit_pca(digits, 7)
    centred = digits - digits.mean(0)
    approximation = linear.low_rank(linear.truncated_svd(centred, 7)) + digits.mean(0)[None, :]
    np.testing.assert_allclose(linear.decode(pca, linear.encode(pca, digits)), approximation, atol=1e-5)


def test_pca_agrees_with_sklearn(digits):
    """Within 1e-4, float32 against float64; the pixels that never change stay finite."""
    ours, theirs = linear.fit_pca(digits, 10), SkPCA(10, svd_solver="full").fit(digits.astype(np.float64))
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-5)
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-4)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(ours.noise, theirs.noise_variance_, rtol=1e-4)
    np.testing.assert_allclose(linear.encode(ours, digits), theirs.transform(digits), atol=1e-4)
    np.testing.assert_allclose(
        linear.log_prob(ours, digits), theirs.score_samples(digits), rtol=1e-4, atol=1e-2
    )


def test_streamed_scatter_gives_the_same_pca_in_any_order(digits):
    exact = linear.fit_pca(digits, 8)
    scatters = [linear.scatter_of(part) for part in (digits[:7], digits[7:120], digits[120:])]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = scatters[order[0]]
        for i in order[1:]:
            merged = linear.merge_scatter(merged, scatters[i])
        streamed = linear.pca_of_scatter(merged, 8)
        assert merged.num == len(digits)
        # float32: squaring the data halves the digits.
        np.testing.assert_allclose(streamed.variance, exact.variance, rtol=1e-4)
        np.testing.assert_allclose(streamed.components, exact.components, atol=2e-3)
        np.testing.assert_allclose(streamed.noise, exact.noise, rtol=1e-3)


@pytest.mark.parametrize("num", [5, 8, 11])
def test_the_scatter_of_many_rows_is_summed_by_pieces(num, monkeypatch):
    monkeypatch.setattr(linear, "_ROWS_IN_CACHE", 4)
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(num, 3)), rng.integers(0, 2, num)
    found = jax.jit(linear.scatter_of.__wrapped__)(jnp.float32(x), mask)
    centred = x[mask == 1] - x[mask == 1].mean(0)
    np.testing.assert_allclose(found.scatter, centred.T @ centred, rtol=1e-5, atol=1e-5)


def test_merging_is_exact_far_from_the_origin():
    """Mean 1e4 and deviation 1: sums of squares in float32 would keep no digit of the variance."""
    x = (1e4 + np.random.default_rng(1).normal(size=(400, 3))).astype(np.float32)
    merged = linear.merge_scatter(linear.scatter_of(x[:150]), linear.scatter_of(x[150:]))
    expected = np.cov(x.astype(np.float64).T) * 399
    np.testing.assert_allclose(merged.scatter, expected, rtol=1e-2, atol=1.0)


def test_randomized_svd_is_exact_on_low_rank_and_close_on_real_data(rng, digits):
    low = (rng.normal(size=(40, 4)) @ rng.normal(size=(4, 30))).astype(np.float32)
    svd = linear.randomized_svd(jax.random.key(0), low, 4)
    np.testing.assert_allclose(linear.low_rank(svd), low, atol=1e-4)
    exact, randomized = linear.fit_pca(digits, 5), linear.fit_pca_randomized(jax.random.key(1), digits, 5)
    # Singular value ratio s_16/s_5 is about 0.5 here; 9 powers of it leave 2e-3, squared in the variance.
    np.testing.assert_allclose(randomized.variance, exact.variance, rtol=1e-4)
    np.testing.assert_allclose(randomized.components, exact.components, atol=1e-2)
    plain = linear.fit_pca_randomized(jax.random.key(1), digits, 5, oversample=0, power_iterations=0)
    assert jnp.sum(plain.variance) < 0.99 * jnp.sum(exact.variance)  # the iterations are what makes it close


def test_masked_rows_do_not_count_even_when_they_are_nan(digits):
    padded = np.concatenate([digits[:100], np.full((5, 64), np.nan, np.float32)])
    mask = np.arange(105) < 100
    for fit in (
        linear.fit_pca,
        lambda x, rank, mask=None: linear.fit_pca_randomized(jax.random.key(0), x, rank, mask, oversample=60),
        lambda x, rank, mask=None: linear.pca_of_scatter(linear.scatter_of(x, mask), rank),
    ):
        with_mask, without = fit(padded, 3, mask), fit(digits[:100], 3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), with_mask, without)


def test_log_prob_is_the_gaussian_and_sample_draws_from_it(rng):
    """Against the dense Gaussian; the sample covariance within 5 standard errors, sqrt(2/N) of a variance."""
    x = rng.normal(size=(200, 4)).astype(np.float32) @ np.diag([3, 2, 1, 0.5]).astype(np.float32)
    pca = linear.fit_pca(x, 2)
    v, variance, noise = (np.asarray(a, np.float64) for a in (pca.components, pca.variance, pca.noise))
    covariance = v.T @ np.diag(variance) @ v + noise * (np.eye(4) - v.T @ v)
    expected = scipy.stats.multivariate_normal(pca.mean, covariance).logpdf(x)
    np.testing.assert_allclose(linear.log_prob(pca, x), expected, rtol=1e-4)
    draws = np.asarray(linear.sample(pca, jax.random.key(2), 20_000))
    error = np.abs(np.cov(draws.T) - covariance) / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert error.max() < 5 * np.sqrt(2 / 20_000)
    np.testing.assert_allclose(linear.sample(pca, jax.random.key(2), 3), draws[:3], atol=1e-5)


def test_log_prob_at_full_rank_is_the_gaussian_whatever_the_unit(rng):
    """Rounding of 1e-3 in values of 1e4, squared, is as large as the least variance, which counts where the
    noise, rounding too, comes to 0.
    """
    x = rng.normal(size=(200, 4)).astype(np.float32) @ np.diag([3e4, 2e4, 1e4, 5e3]).astype(np.float32)
    expected = scipy.stats.multivariate_normal(x.mean(0), np.cov(x.T)).logpdf(x)
    pca = linear.fit_pca(x, 4)._replace(noise=jnp.zeros(()))
    np.testing.assert_allclose(linear.log_prob(pca, x), expected, rtol=1e-5)


@pytest.mark.parametrize("x", [np.ones((6, 3)), np.tile([[1.0, 2.0, 3.0]], (5, 1)), np.zeros((3, 4))])
def test_constant_features_and_duplicated_points_stay_finite(x):
    fits = [
        linear.fit_pca(x, 2),
        linear.fit_pca_randomized(jax.random.key(0), x, 2),
        linear.pca_of_scatter(linear.scatter_of(x), 2),
    ]
    for pca in fits:
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(pca))
        assert bool(jnp.isfinite(linear.log_prob(pca, x)).all())
        np.testing.assert_allclose(linear.sample(pca, jax.random.key(0), 2), x[:2], atol=1e-3)


def test_vmap_fits_many_problems_at_once(digits):
    problems = digits[:120].reshape(3, 40, 64)
    many = jax.vmap(lambda x: linear.fit_pca(x, 2))(problems)
    for i, x in enumerate(problems):
        np.testing.assert_allclose(many.variance[i], linear.fit_pca(x, 2).variance, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_impossible_ranks_are_refused_in_one_sentence(rank):
    with pytest.raises(UserError, match="rank must be between 1 and 3"):
        linear.fit_pca(np.zeros((5, 3)), rank)
    with pytest.raises(UserError, match="rank must be between 1 and 3"):
        linear.pca_of_scatter(linear.scatter_of(np.zeros((5, 3))), rank)


def test_wrong_shapes_are_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"x has shape \(5,\)"):
        linear.truncated_svd(np.zeros(5), 1)
    with pytest.raises(UserError, match=r"The mask has shape \(4,\)"):
        linear.fit_pca(np.zeros((5, 3)), 1, np.ones(4))
