import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxgen import mixtures
from jaxgen.mixtures import gaussian_mixture
from jaxgen.types import UserError

WEIGHT = np.array([0.3, 0.7])
MEAN = np.array([[-1.0, 0.5], [2.0, -0.3]])
COVARIANCE = np.array([[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.6], [-0.6, 0.8]]])
MIXTURE = gaussian_mixture(WEIGHT, MEAN, COVARIANCE)
SIGMAS = [0.0, 0.1, 1.0, 10.0]
X = jax.random.normal(jax.random.key(0), (40, 2)) * 3.0


def scipy_log_density(x, sigma):
    smooth = sigma**2 * np.eye(2)
    parts = [stats.multivariate_normal(m, c + smooth).pdf(x) for m, c in zip(MEAN, COVARIANCE, strict=True)]
    return np.log(np.stack(parts, axis=1) @ WEIGHT)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_density_agrees_with_scipy(sigma):
    ours = mixtures.log_density(MIXTURE, X, jnp.full(40, sigma))
    np.testing.assert_allclose(
        ours, scipy_log_density(np.asarray(X, np.float64), sigma), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_score_is_the_gradient_of_the_density(sigma):
    sigmas = jnp.full(40, sigma)
    gradient = jax.jit(jax.grad(lambda x: mixtures.log_density(MIXTURE, x, sigmas).sum()))(X)
    np.testing.assert_allclose(mixtures.score(MIXTURE, X, sigmas), gradient, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_denoiser_is_x_plus_sigma_squared_times_the_score(sigma):
    # Row G4. float32 values up to 100 (sigma^2) times a score that is known to 1e-7.
    sigmas = jnp.full(40, sigma)
    expected = X + sigma**2 * mixtures.score(MIXTURE, X, sigmas)
    np.testing.assert_allclose(mixtures.denoise(MIXTURE, X, sigmas), expected, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.2, 1.5])
def test_the_denoiser_is_the_posterior_mean_by_integration(sigma):
    weights, means, stds = [0.4, 0.6], [-1.0, 2.0], [0.3, 0.8]
    mixture = gaussian_mixture(weights, np.array(means)[:, None], np.square(stds)[:, None, None])

    def prior(x0):
        return sum(w * stats.norm(m, s).pdf(x0) for w, m, s in zip(weights, means, stds, strict=True))

    for x in (-2.0, 0.4, 3.0):
        joint = lambda x0: prior(x0) * stats.norm(x0, sigma).pdf(x)
        evidence = integrate.quad(joint, -12, 12, points=[x, *means])[0]
        first = integrate.quad(lambda x0: x0 * joint(x0), -12, 12, points=[x, *means])[0]
        ours = mixtures.denoise(mixture, jnp.full((1, 1), x), jnp.full(1, sigma))[0, 0]
        np.testing.assert_allclose(ours, first / evidence, atol=2e-6)


def test_every_example_has_its_own_sigma():
    sigmas = jnp.linspace(0.1, 5.0, 40)
    for f in (mixtures.log_density, mixtures.score, mixtures.denoise, mixtures.responsibilities):
        together = f(MIXTURE, X, sigmas)
        np.testing.assert_allclose(together[7], f(MIXTURE, X[7:8], sigmas[7:8])[0], rtol=1e-5, atol=1e-6)


def test_no_noise_leaves_x_and_much_noise_leaves_the_mean():
    np.testing.assert_allclose(mixtures.denoise(MIXTURE, X, jnp.zeros(40)), X, atol=1e-6)
    mean, _ = mixtures.moments(MIXTURE)
    blind = mixtures.denoise(MIXTURE, X, jnp.full(40, 1e4))
    np.testing.assert_allclose(blind, np.broadcast_to(mean, (40, 2)), atol=1e-4)


def test_point_masses_are_attractors():
    points = np.array([[1.0, 0.0], [-1.0, 0.0]])
    mixture = gaussian_mixture([1, 1], points, np.zeros((2, 2, 2)))
    x = jnp.array([[0.4, 0.3], [0.0, 2.0]])
    # E[x0 | x] = tanh(x_1 / sigma^2) in the first coordinate: the mean of +-1 weighed by the likelihoods.
    expected = [[np.tanh(0.4 / 0.25), 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(mixtures.denoise(mixture, x, jnp.full(2, 0.5)), expected, atol=1e-6)


def test_samples_have_the_moments_and_the_weights():
    n = 20_000
    x = np.asarray(jax.jit(mixtures.sample, static_argnums=2)(MIXTURE, jax.random.key(1), n), np.float64)
    mean, covariance = (np.asarray(a) for a in mixtures.moments(MIXTURE))
    exact_mean = WEIGHT @ MEAN
    offset = MEAN - exact_mean
    np.testing.assert_allclose(mean, exact_mean, atol=1e-6)
    within = np.einsum("k,kij->ij", WEIGHT, COVARIANCE)
    np.testing.assert_allclose(covariance, within + offset.T @ (WEIGHT[:, None] * offset), atol=1e-6)
    # 4 standard errors, of the mean and of each product of deviations.
    assert (np.abs(x.mean(0) - mean) < 4 * x.std(0) / np.sqrt(n)).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert (np.abs(products.mean(0) - covariance) < 4 * products.std(0) / np.sqrt(n)).all()
    share = np.asarray(mixtures.responsibilities(MIXTURE, jnp.asarray(x, jnp.float32), jnp.zeros(n))).mean(0)
    assert np.abs(share - WEIGHT).max() < 4 * np.sqrt(0.3 * 0.7 / n)


def test_a_sample_depends_on_its_number_alone():
    few, many = (mixtures.sample(MIXTURE, jax.random.key(2), n) for n in (3, 8))
    np.testing.assert_array_equal(few, many[:3])


def test_samples_of_any_shape():
    mixture = gaussian_mixture(
        [1, 2], np.array([[0.0] * 4, [1.0] * 4]), np.stack([np.eye(4), 0.2 * np.eye(4)])
    )
    x = jax.random.normal(jax.random.key(3), (5, 2, 2, 1))
    sigma = jnp.full(5, 0.7)
    for f in (mixtures.score, mixtures.denoise):
        assert f(mixture, x, sigma).shape == x.shape
        np.testing.assert_array_equal(f(mixture, x, sigma).reshape(5, 4), f(mixture, x.reshape(5, 4), sigma))
    assert mixtures.log_density(mixture, x, sigma).shape == (5,)
    with pytest.raises(ValueError, match="4 dimensions"):
        mixtures.denoise(mixture, x[:, :1], sigma)


@pytest.mark.parametrize(
    ("weight", "mean", "covariance", "message"),
    [
        ([1.0], MEAN, COVARIANCE, "their shapes are"),
        (WEIGHT, MEAN, COVARIANCE[:, :1], "their shapes are"),
        ([0.0, 1.0], MEAN, COVARIANCE, "must be positive"),
        (WEIGHT, MEAN, -COVARIANCE, "semidefinite"),
        (WEIGHT, MEAN, COVARIANCE * np.array([[1.0, 0.5], [1.0, 1.0]]), "symmetric"),
    ],
)
def test_mistakes_are_named(weight, mean, covariance, message):
    with pytest.raises(UserError, match=message):
        gaussian_mixture(weight, mean, covariance)
