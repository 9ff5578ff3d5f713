"""Gaussian mixtures: scikit-learn's EM from the same start, EM that never falls, and what degenerates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from jaxgen.estimators import families, gmm, mixture
from jaxgen.types import UserError

KINDS = {
    "full": families.GAUSSIAN_FULL,
    "tied": families.GAUSSIAN_TIED,
    "diag": families.GAUSSIAN_DIAGONAL,
    "spherical": families.GAUSSIAN_SPHERICAL,
}
rng = np.random.default_rng(0)
X = np.concatenate(
    [
        rng.normal(size=(60, 2)) @ np.array([[1.0, 0.6], [0.0, 0.5]]),
        rng.normal(size=(40, 2)) * [0.4, 1.2] + [3.0, 1.0],
        rng.normal(size=(30, 2)) * 0.7 + [0.0, 4.0],
    ]
).astype(np.float32)
# A rough start, far from the optimum: which third of the plane a point's first coordinate lies in.
START = np.eye(3, dtype=np.float32)[np.digitize(X[:, 0], [0.0, 1.5])]


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def initial(kind):
    return mixture.estimate(KINDS[kind], jnp.asarray(X), jnp.asarray(START), 1e-6, 0.0)


def covariance(params):
    return params.covariance if hasattr(params, "covariance") else params.variance


@pytest.mark.parametrize("kind", KINDS)
def test_em_agrees_with_sklearn_and_never_falls(kind):
    """12 steps of each from one start: float32 against float64, and rounding of 1e-6 a step in the mean."""
    start = initial(kind)
    fit = gmm.fit_from(KINDS[kind], start, X, max_steps=12, tolerance=-1.0)
    peer = GaussianMixture(
        3,
        covariance_type=kind,
        weights_init=START.mean(0),
        means_init=np.asarray(start.components.mean, np.float64),
        precisions_init=(
            1.0 / np.asarray(start.components.variance, np.float64)
            if kind in ("diag", "spherical")
            else np.linalg.inv(np.asarray(start.components.covariance, np.float64))
        ),
        reg_covar=0.0,
        max_iter=12,
        tol=0.0,
    )
    with pytest.warns(match="did not converge"):
        peer.fit(X.astype(np.float64))
    assert fit.num_steps == 12
    np.testing.assert_allclose(jnp.exp(fit.params.log_weight), peer.weights_, rtol=1e-3)
    np.testing.assert_allclose(fit.params.components.mean, peer.means_, atol=2e-3)
    np.testing.assert_allclose(covariance(fit.params.components), peer.covariances_, atol=3e-3)
    np.testing.assert_allclose(
        gmm.predict_log_proba(KINDS[kind], fit.params, X), np.log(peer.predict_proba(X)), rtol=1e-2, atol=1e-2
    )
    log_prob = gmm.log_prob(KINDS[kind], fit.params, X)
    np.testing.assert_allclose(log_prob, peer.score_samples(X), rtol=1e-3, atol=1e-3)
    objective = np.asarray(fit.objective, np.float64)
    assert np.all(np.diff(objective) > -2e-6)
    assert objective[-1] > objective[0] + 0.01
    np.testing.assert_allclose(objective[-1], log_prob.mean(), rtol=1e-5)


def test_log_prob_is_the_weighted_sum_of_scipy_s_gaussians_and_integrates_to_one():
    """Against SciPy point by point; a Riemann sum over [-8, 12]^2 at step 0.1 to 1e-3."""
    fit = gmm.fit_from(KINDS["full"], initial("full"), X, max_steps=5).params
    density = sum(
        np.exp(float(w)) * scipy.stats.multivariate_normal(np.asarray(m), np.asarray(c)).pdf(X)
        for w, m, c in zip(fit.log_weight, fit.components.mean, fit.components.covariance, strict=True)
    )
    np.testing.assert_allclose(gmm.log_prob(KINDS["full"], fit, X), np.log(density), atol=1e-3)
    axis = np.arange(-8, 12, 0.1)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    np.testing.assert_allclose(jnp.exp(gmm.log_prob(KINDS["full"], fit, grid)).sum() * 0.01, 1, atol=1e-3)


def test_the_floored_covariance_is_the_constrained_maximum():
    """Points on a line: no covariance with eigenvalues of at least the floor, of 200 tried, is likelier."""
    x = jnp.asarray(np.outer(np.linspace(-1, 1, 9), [1.0, 2.0]).astype(np.float32))
    family = KINDS["full"]
    best = family.estimate(x, jnp.ones((9, 1)), 0.1)
    np.testing.assert_allclose(best.variance[0, 0], 0.1, rtol=1e-6)
    top = family.log_likelihood(best, x).sum()
    random = np.random.default_rng(1)
    axes = np.linalg.qr(random.normal(size=(200, 2, 2)))[0].astype(np.float32)
    variance = (0.1 + random.exponential(size=(200, 2)) * 2).astype(np.float32)
    rivals = families.RotatedGaussians(jnp.zeros((200, 2)), jnp.asarray(axes), jnp.asarray(variance))
    assert family.log_likelihood(rivals, x).sum(0).max() < top


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_constant_features_and_empty_components_stay_finite(kind):
    """Two distinct points, five components, one feature constant: at least three components are empty."""
    x = np.array([[0.0, 100.0, 1e3]] * 6 + [[1.0, -100.0, 1e3]] * 5, np.float32)
    fit = gmm.fit(KINDS[kind], jax.random.key(0), x, 5, max_steps=6, tolerance=-1.0)
    assert finite(fit)
    assert finite(gmm.log_joint(KINDS[kind], fit.params, x))
    assert np.all(np.diff(np.asarray(fit.objective)) > -1e-5 * np.abs(fit.objective).max())
    np.testing.assert_allclose(jnp.exp(fit.params.log_weight).sum(), 1, rtol=1e-5)
    predicted = np.asarray(gmm.predict(KINDS[kind], fit.params, x))
    if kind != "tied":  # one covariance for all may give both points to one
        assert predicted[0] != predicted[-1]


def test_kmeans_plus_plus_draws_in_proportion_to_the_squared_distance():
    """Points 0, 1 and 3, counted over 600 keys: P(3 | first = 0) = 9/10, within 5 standard errors."""
    x = np.array([[0.0], [1.0], [3.0], [np.nan]], np.float32)
    keys = jax.random.split(jax.random.key(0), 600)
    centres = jax.vmap(lambda key: gmm.kmeans_plus_plus(key, x, 2, np.array([1, 1, 1, 0])))(keys)[..., 0]
    first, second = np.asarray(centres).T
    for i, p in {0.0: 9 / 10, 1.0: 4 / 5}.items():
        hits = second[first == i] == 3.0
        assert abs(hits.mean() - p) < 5 * np.sqrt(p * (1 - p) / len(hits))
    assert abs((first == 1).mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / 600)
    assert np.all(first != second)


def test_fit_finds_well_parted_clusters_masks_what_is_padded_and_vmaps():
    """Three clusters 10 deviations apart, the likeliest of 3 starts in one vmap, NaN rows masked.

    A single start may put two centres in one cluster, where EM stays.
    """
    true = np.arange(60) % 3
    x = (np.random.default_rng(3).normal(size=(60, 2)) + 10 * np.eye(3, 2)[true]).astype(np.float32)
    padded, mask = np.concatenate([x, np.full((4, 2), np.nan, np.float32)]), np.arange(64) < 60
    family = KINDS["diag"]
    fits = jax.vmap(lambda key: gmm.fit(family, key, padded, 3, mask))(jax.random.split(jax.random.key(1), 3))
    best = int(jnp.argmax(fits.objective[:, -1]))
    params = jax.tree.map(lambda leaf: leaf[best], fits.params)
    index = np.asarray(gmm.predict(family, params, x))
    assert all(len(set(index[true == k])) == 1 for k in range(3))
    order = np.array([index[true == k][0] for k in range(3)])
    means = [x[true == k].mean(0) for k in range(3)]
    np.testing.assert_allclose(params.components.mean[order], means, atol=1e-3)
    np.testing.assert_allclose(fits.objective[best, -1], gmm.log_prob(family, params, x).mean(), rtol=1e-5)
    assert np.all(fits.num_steps < 200)  # the tolerance, not max_steps, ends it


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mixture_s_mean_and_covariance(kind):
    """3000 draws: the mean within 5 standard errors, the covariance within 15 % (5 times sqrt(2/3000))."""
    params = initial(kind)
    z, x = gmm.sample(KINDS[kind], params, jax.random.key(2), 3000)
    weight, mean = np.exp(np.asarray(params.log_weight)), np.asarray(params.components.mean)
    cov = np.asarray(covariance(params.components))
    each = {
        "full": cov,
        "tied": np.stack([cov] * 3) if kind == "tied" else None,
        "diag": cov[:, :, None] * np.eye(2) if kind == "diag" else None,
        "spherical": cov[:, None, None] * np.eye(2) if kind == "spherical" else None,
    }[kind]
    expected = np.einsum("k,kij->ij", weight, each + mean[:, :, None] * mean[:, None, :])
    centre = weight @ mean
    expected -= np.outer(centre, centre)
    assert np.all(np.abs(x.mean(0) - centre) < 5 * np.sqrt(np.diag(expected) / 3000))
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.all(np.abs(np.cov(np.asarray(x).T) - expected) / scale < 0.15)
    assert np.all(np.abs(np.bincount(np.asarray(z), minlength=3) / 3000 - weight) < 5 * 0.5 / np.sqrt(3000))


def test_impossible_numbers_of_components_are_refused_in_one_sentence():
    for number in (0, 131):
        with pytest.raises(UserError, match="1 to 130 clusters"):
            gmm.fit(KINDS["full"], jax.random.key(0), X, number)
