"""Restoration under priors whose posterior has a closed form, on images of 4x6 pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import mixtures, operators
from jaxgen.mixtures import gaussian_mixture
from jaxgen.samplers import restoration as r
from jaxgen.samplers import restoration_baselines as baselines
from jaxgen.samplers.chain import run_chain
from jaxgen.types import UserError

H, W = 4, 6
SHAPE, D = (H, W, 1), H * W
SIGMA, NOISE = 0.3, 0.2
RNG = np.random.default_rng(0)
POSITIONS = np.stack(np.meshgrid(np.arange(H), np.arange(W), indexing="ij"), -1).reshape(-1, 2)
# Smooth images: the covariance falls with the distance of two pixels.
DISTANCE = ((POSITIONS[:, None] - POSITIONS[None]) ** 2).sum(-1)
COVARIANCE = 0.5 * np.exp(-DISTANCE / 4.0) + 0.05 * np.eye(D)
MEAN = np.full(D, 0.2)
PRIOR = gaussian_mixture([1.0], MEAN[None], COVARIANCE[None])
MIXTURE = gaussian_mixture([0.4, 0.6], np.stack([MEAN, -MEAN]), np.stack([COVARIANCE, 0.3 * COVARIANCE]))
KERNEL = np.array([[0.05, 0.1, 0.05], [0.1, 0.4, 0.1], [0.0, 0.1, 0.1]])
BLUR = operators.blur(KERNEL, "periodic")
A = np.asarray(BLUR.apply(jnp.eye(D).reshape(-1, *SHAPE))).reshape(D, D).T.astype(np.float64)
TRUTH = mixtures.sample(PRIOR, jax.random.key(0), 3).reshape(-1, *SHAPE)
Y = operators.observe(BLUR, TRUTH, NOISE, jax.random.key(1))
START = jnp.zeros_like(TRUTH)


def denoiser(x, sigma):
    return mixtures.denoise(PRIOR, x, sigma)


def restore(chain, num=3, seed=2):
    return np.asarray(jax.jit(lambda: run_chain(chain, jax.random.key(seed), jnp.arange(num), SHAPE))())


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def solution(prior_precision, noise=NOISE):
    """argmin ||A x - y||^2 / (2 noise^2) + (x - MEAN)^T P (x - MEAN) / 2, P = prior_precision."""
    data = A.T @ A / noise**2
    return np.linalg.solve(data + prior_precision, (flat(Y) @ A / noise**2 + MEAN @ prior_precision).T).T


def smoothed_precision(sigma):
    return np.linalg.inv(COVARIANCE + sigma**2 * np.eye(D))


def test_admm_goes_to_the_posterior_mean():
    chain = r.admm_chain(denoiser, BLUR, Y, START, sigma=SIGMA, noise_std=NOISE, num_steps=200, num_cg=30)
    np.testing.assert_allclose(flat(restore(chain)), solution(np.linalg.inv(COVARIANCE)), atol=1e-3)


def test_red_and_dmsp_descend_to_the_same_closed_form():
    # (x - A(x)) / sigma^2 = (C + sigma^2 I)^-1 (x - MEAN): the prior smoothed by sigma.
    expected = solution(smoothed_precision(SIGMA))
    options = {"sigma": SIGMA, "noise_std": NOISE, "clip": None}
    red = r.red_chain(denoiser, BLUR, Y, START, num_steps=2000, **options)
    np.testing.assert_allclose(flat(restore(red)), expected, atol=1e-3)
    # DMSP's noise has mean 0, so many chains together end there too.
    n = 600
    many = r.dmsp_chain(
        denoiser,
        BLUR,
        jnp.repeat(Y[:1], n, axis=0),
        jnp.zeros((n, *SHAPE)),
        num_steps=1000,
        **options,
    )
    samples = flat(restore(many, n))
    error = samples.std(axis=0) / np.sqrt(n)
    assert (error > 1e-4).all()
    assert (np.abs(samples.mean(axis=0) - expected[0]) < 4.5 * error + 1e-3).all()


def test_daep_descends_to_its_closed_form():
    # A(x) - x = -M (x - MEAN) with M = sigma^2 (C + sigma^2 I)^-1, so the prior is gamma / (2 sigma^2) M^T M.
    gamma = 5.0
    m = SIGMA**2 * smoothed_precision(SIGMA)
    chain = r.daep_chain(
        denoiser, BLUR, Y, START, sigma=SIGMA, noise_std=NOISE, gamma=gamma, num_steps=4000, clip=None
    )
    np.testing.assert_allclose(flat(restore(chain)), solution(gamma / (2 * SIGMA**2) * m @ m), atol=2e-3)


def test_the_gradient_of_daep_is_that_of_its_prior():
    # A mixture of two, whose denoiser is not linear; finite differences in every pixel.
    mixture_denoiser = lambda x, sigma: mixtures.denoise(MIXTURE, x, sigma)
    x = 0.5 * TRUTH[:1]

    @jax.jit
    def prior(x):
        moved = mixture_denoiser(x, jnp.full(len(x), SIGMA)) - x
        return 0.5 * jnp.sum(moved**2, axis=(1, 2, 3))

    step = 1e-2 * jnp.eye(D).reshape(-1, *SHAPE)
    numeric = (prior(x + step) - prior(x - step)) / 2e-2
    gradient = r.daep_prior_gradient(mixture_denoiser, x, SIGMA)
    np.testing.assert_allclose(gradient.ravel(), numeric, atol=2e-4)
    assert np.abs(numeric).max() > 0.02


def test_the_mean_shift_is_the_gradient_of_the_smoothed_log_density():
    """Row G6: -(x - A(x)) / sigma^2 = grad log (g_sigma * p)(x), here against its finite differences."""
    mixture_denoiser = lambda x, sigma: mixtures.denoise(MIXTURE, x, sigma)
    x = 0.5 * TRUTH[:1]
    step = 1e-2 * jnp.eye(D).reshape(-1, *SHAPE)
    density = lambda x: mixtures.log_density(MIXTURE, x, jnp.full(len(x), SIGMA))
    numeric = (density(x + step) - density(x - step)) / 2e-2
    gradient = r.dmsp_prior_gradient(mixture_denoiser, x, SIGMA, jnp.zeros_like(x))
    np.testing.assert_allclose(-gradient.ravel() / SIGMA**2, numeric, atol=2e-3)
    # Noise is added before the denoiser and not taken off after it.
    noise = jax.random.normal(jax.random.key(3), x.shape)
    noisy = r.dmsp_prior_gradient(mixture_denoiser, x, SIGMA, noise)
    expected = x - mixture_denoiser(x + SIGMA * noise, jnp.array([SIGMA]))
    np.testing.assert_allclose(noisy, expected, atol=1e-6)


def test_noise_blind_precision_by_hand():
    error = jnp.stack([jnp.full(SHAPE, 0.5), jnp.zeros(SHAPE)])
    precision = r.noise_blind_precision(error, sigma=0.1, row_energy=0.25)
    np.testing.assert_allclose(precision.ravel(), [1 / (0.25 + 0.02 * 0.25), 1 / (0.02 * 0.25)], rtol=1e-5)


def test_noise_blind_ends_near_where_the_true_noise_would():
    options = {"sigma": 0.1, "num_steps": 600, "clip": None}
    energy = float((KERNEL**2).sum())
    blind = r.dmsp_chain(denoiser, BLUR, Y, START, row_energy=energy, **options)
    told = r.dmsp_chain(denoiser, BLUR, Y, START, noise_std=NOISE, **options)
    blind, told = restore(blind), restore(told)
    assert np.sqrt(((blind - told) ** 2).mean()) < 0.3 * np.sqrt(((told - TRUTH) ** 2).mean()) + 0.05
    assert ((blind - TRUTH) ** 2).mean() < ((Y - TRUTH) ** 2).mean()


def test_hqs_against_its_recursion():
    sigmas = [0.5, 0.3, 0.2]
    chain = r.hqs_chain(denoiser, BLUR, Y, START, sigmas=sigmas, noise_std=NOISE, num_cg=40)
    x = np.zeros((3, D))
    for sigma in sigmas:
        weight = 0.23 * (NOISE / sigma) ** 2
        z = np.linalg.solve(A.T @ A + weight * np.eye(D), (flat(Y) @ A + weight * x).T).T
        x = MEAN + (z - MEAN) @ (COVARIANCE @ smoothed_precision(sigma))
    np.testing.assert_allclose(flat(restore(chain)), x, atol=2e-3)


def test_kernel_blind_finds_the_kernel_of_images_that_the_prior_knows():
    # With next to no doubt about the image, the kernel is found by least squares.
    rng = np.random.default_rng(4)
    image = rng.uniform(-1, 1, (12, 12))
    known = gaussian_mixture([1.0], image.reshape(1, -1), 1e-4 * np.eye(144)[None])
    y = operators.blur(KERNEL / KERNEL.sum(), "valid").apply(jnp.asarray(image, jnp.float32)[None, ..., None])
    chain = r.dmsp_kernel_blind_chain(
        lambda x, sigma: mixtures.denoise(known, x, sigma),
        y,
        jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"),
        jnp.full((1, 3, 3), 1 / 9),
        sigma=0.1,
        num_steps=400,
    )
    run = jax.jit(
        lambda: run_chain(
            chain._replace(finish=lambda s: s.kernel.x), jax.random.key(5), jnp.arange(1), (12, 12, 1)
        )
    )
    kernel = np.asarray(run())[0]
    assert np.abs(kernel.sum() - 1) < 1e-5
    assert kernel.min() >= 0
    start_error = np.abs(1 / 9 - KERNEL / KERNEL.sum()).max()
    assert np.abs(kernel - KERNEL / KERNEL.sum()).max() < 0.15 * start_error


def test_every_chain_is_traced_once_and_keeps_pixels_in_their_range():
    for make in (r.dmsp_chain, r.daep_chain, r.red_chain, r.admm_chain):
        traces = []

        def counted(x, sigma, traces=traces):
            traces.append(1)
            return denoiser(x, sigma)

        chain = make(counted, BLUR, 30 * Y, START, sigma=SIGMA, noise_std=NOISE, num_steps=7)
        restored = restore(chain)
        assert len(traces) == 1
        if make is not r.admm_chain:
            assert np.abs(restored).max() == 1.0


# --- Baselines ---


def test_wiener_is_the_posterior_mean_of_a_white_prior():
    variance = 0.5
    expected = np.linalg.solve(A.T @ A / NOISE**2 + np.eye(D) / variance, (flat(Y) @ A / NOISE**2).T).T
    np.testing.assert_allclose(flat(baselines.wiener(Y, KERNEL, NOISE**2 / variance)), expected, atol=1e-4)


def test_the_adjoint_of_the_image_gradient():
    x = jnp.asarray(RNG.normal(size=(2, 5, 7, 2)), jnp.float32)
    p = jnp.asarray(RNG.normal(size=(2, 2, 5, 7, 2)), jnp.float32)
    left = np.vdot(baselines.image_gradient(x), p)
    np.testing.assert_allclose(np.vdot(x, baselines.image_gradient_adjoint(p)), left, rtol=1e-4)
    np.testing.assert_array_equal(baselines.image_gradient(x)[0, :, :-1], x[:, 1:] - x[:, :-1])


def test_total_variation_of_a_step_moves_its_two_levels():
    # In one dimension a step of two levels with n samples each keeps its place; the levels move by
    # strength / n towards one another (Strong & Chan 2003).
    y = jnp.array([0.0] * 4 + [1.0] * 4).reshape(1, 1, 8, 1)
    identity = operators.identity()
    chain = baselines.total_variation_chain(identity, y, y, strength=0.4, num_steps=500)
    run = jax.jit(lambda: run_chain(chain, jax.random.key(6), jnp.arange(1), (1, 8, 1)))
    np.testing.assert_allclose(run().ravel(), [0.1] * 4 + [0.9] * 4, atol=1e-4)
    np.testing.assert_allclose(baselines.total_variation(y), [1.0])


def test_total_variation_deblurring_is_a_minimum():
    strength = 0.05
    chain = baselines.total_variation_chain(BLUR, Y, START, strength=strength, num_steps=3000)
    x = jnp.asarray(restore(chain))

    @jax.jit
    def objective(x):
        return 0.5 * jnp.sum((BLUR.apply(x) - Y) ** 2, axis=(1, 2, 3)) + strength * baselines.total_variation(
            x
        )

    least = objective(x)
    for i in range(20):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), i), x.shape)
        assert (objective(x + 0.01 * noise) > least - 1e-5).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: r.dmsp_chain(denoiser, BLUR, Y, START, sigma=0.0),
        lambda: r.dmsp_chain(denoiser, BLUR, Y, START, sigma=0.1, noise_std=0.0),
        lambda: r.red_chain(denoiser, BLUR, Y, START, sigma=0.1, noise_std=0.1, momentum=1.0),
        lambda: r.daep_chain(denoiser, BLUR, Y, START, sigma=0.1, noise_std=0.1, num_steps=0),
        lambda: r.hqs_chain(denoiser, BLUR, Y, START, sigmas=[], noise_std=0.1),
        lambda: r.admm_chain(denoiser, BLUR, Y, START, sigma=0.1, noise_std=-1.0),
        lambda: r.dmsp_kernel_blind_chain(denoiser, Y, START, jnp.ones((3, 3, 3)), sigma=0.1, num_steps=0),
        lambda: baselines.total_variation_chain(BLUR, Y, START, strength=0.0),
        lambda: baselines.wiener(Y, np.ones((2, 2)), 0.1),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
