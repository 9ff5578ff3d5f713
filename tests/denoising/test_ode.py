import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser, network_calls
from sampler_checks import (
    MEAN,
    STD,
    TWO_MODES,
    assert_moments,
    assert_samples_do_not_depend_on_the_batch,
    assert_the_modes_are_right,
    calls_of,
    draw,
    gaussian_denoiser,
    num_traces,
    two_modes_denoiser,
)

from jaxgen import mixtures
from jaxgen.denoising import denoiser_from_ddpm, geometric_sigmas, schedule_sigmas
from jaxgen.mixtures import gaussian_mixture
from jaxgen.processes import linear_schedule, respace
from jaxgen.samplers.chain import normal
from jaxgen.samplers.ddim import ddim_chain
from jaxgen.samplers.ode import (
    bits_per_dim,
    dpm_solver_2m_chain,
    euler_chain,
    flow_log_density,
    heun_chain,
    karras_sigmas,
    rademacher_probes,
)
from jaxgen.types import UserError

CHAINS = {"euler": euler_chain, "heun": heun_chain, "dpm_solver_2m": dpm_solver_2m_chain}


def beginning_of(chain):
    return chain._replace(xs=jax.tree.map(lambda leaf: leaf[:0], chain.xs))


# --- Noise levels ---


def test_karras_sigmas_are_those_of_the_paper():
    # Karras et al. 2022, eq. 5, with the table 1 settings of EDM and N = 18.
    sigmas = karras_sigmas(18, 0.002, 80.0)
    assert sigmas.shape == (19,)
    np.testing.assert_allclose(sigmas[[0, -2, -1]], [80.0, 0.002, 0.0], rtol=1e-12)
    i = 5
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigmas[i], expected, rtol=1e-12)


# --- Samplers ---


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_2m", 2)])
def test_the_error_falls_with_the_order_of_the_method(name, order):
    # The flow carries x at sigma to MEAN + (x - MEAN) sqrt((STD^2 + sigma'^2) / (STD^2 + sigma^2)).
    errors = []
    for num_steps in (16, 32, 64):
        chain = CHAINS[name](gaussian_denoiser, geometric_sigmas(5.0, 0.1, num_steps + 1))
        begin, end = draw(beginning_of(chain), 20), draw(chain, 20)
        exact = MEAN + (begin - MEAN) * np.sqrt((STD**2 + 0.1**2) / (STD**2 + 5.0**2))
        errors.append(np.abs(end - exact).max())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(rates - order).max() < 0.35
    assert errors[-1] < (0.1 if order == 1 else 0.005)


@pytest.mark.parametrize("name", CHAINS)
def test_samples_have_the_moments_of_the_gaussian(name):
    samples = draw(CHAINS[name](gaussian_denoiser, karras_sigmas(60, 0.01, 40.0)), 3000)
    # N(0, 40^2 I) in place of N(MEAN, 40^2 + STD^2) moves nothing by more than MEAN STD / 40 = 0.004.
    assert_moments(samples, MEAN, STD, bias=0.004 + (0.02 if name == "euler" else 0.002))


@pytest.mark.parametrize("name", [*CHAINS, "heun with churn"])
def test_the_modes_of_a_mixture_are_right(name):
    sigmas = karras_sigmas(100 if name == "euler" else 40, 0.01, 60.0)
    if name == "heun with churn":
        chain = heun_chain(two_modes_denoiser, sigmas, s_churn=10.0)
    else:
        chain = CHAINS[name](two_modes_denoiser, sigmas)
    assert_the_modes_are_right(draw(chain, 2000), bias=0.06 if name == "euler" else 0.03)


def test_churn_has_the_moments_of_its_recursion():
    # One step at a time in float64 with the slope (x - A) / sigma = sigma (x - MEAN) / (STD^2 + sigma^2).
    sigmas = karras_sigmas(12, 0.05, 10.0)
    settings = {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.1}
    mean, variance = -MEAN, sigmas[0] ** 2  # of x - MEAN
    for sigma, after in itertools.pairwise(sigmas):
        gamma = min(6.0 / 12, np.sqrt(2) - 1) if 0.1 <= sigma <= 5.0 else 0.0
        grown = sigma * (1 + gamma)
        variance += 1.1**2 * (grown**2 - sigma**2)
        slope = grown / (STD**2 + grown**2)
        keep = 1 + (after - grown) * slope
        if after > 0:
            keep = 1 + 0.5 * (after - grown) * (slope + keep * after / (STD**2 + after**2))
        mean, variance = keep * mean, keep**2 * variance
    samples = draw(heun_chain(gaussian_denoiser, sigmas, **settings), 4000)
    assert_moments(samples, MEAN + mean, np.sqrt(variance))


def test_the_euler_chain_at_the_sigmas_of_ddpm_is_ddim():
    full = linear_schedule(1000)
    spaced = respace(full, 20, "leading")
    predict = exact_denoiser(full, "eps", MEAN, STD)
    ddim = ddim_chain(predict, full, num_steps=20, eta=0.0, clip=False, spacing="leading")
    sigmas = np.append(np.asarray(schedule_sigmas(spaced), np.float64)[::-1], 0.0)
    euler = euler_chain(denoiser_from_ddpm(predict, full, "eps"), sigmas)
    # DDIM begins at x_T ~ N(0, I), which is N(0, (1 + sigma^2) I) in these coordinates.
    widen = float(np.sqrt(1.0 + sigmas[0] ** 2))
    euler = euler._replace(init=lambda keys, shape: widen * normal(keys, shape))
    np.testing.assert_allclose(draw(euler, 10), draw(ddim, 10), atol=2e-5)


SIGMAS = [4.0, 2.0, 1.0, 0.0]
CALLS = {
    "euler": [4.0, 2.0, 1.0],
    "heun": [4.0, 2.0, 2.0, 1.0, 1.0],
    "dpm_solver_2m": [4.0, 2.0, 1.0],
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_network_calls_and_their_noise_levels(name):
    counted, calls = network_calls(gaussian_denoiser)
    assert calls_of(CHAINS[name](counted, SIGMAS), calls) == CALLS[name]
    calls.clear()
    above_zero = calls_of(CHAINS[name](counted, SIGMAS[:-1]), calls)
    assert above_zero == ([4.0, 2.0, 2.0, 1.0] if name == "heun" else [4.0, 2.0])


def test_churn_asks_at_the_level_that_it_grew_to():
    counted, calls = network_calls(gaussian_denoiser)
    seen = calls_of(heun_chain(counted, [4.0, 2.0, 1.0, 0.0], s_churn=0.3, s_tmax=2.0), calls)
    np.testing.assert_allclose(seen, [4.0, 2.0, 2.2, 1.0, 1.1], rtol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_batches_and_traces(name):
    assert_samples_do_not_depend_on_the_batch(CHAINS[name](gaussian_denoiser, SIGMAS))
    counts = [
        num_traces(lambda network: CHAINS[name](network, karras_sigmas(n, 0.1, 5.0)), gaussian_denoiser)
        for n in (3, 40)
    ]
    assert counts == ([2, 2] if name == "heun" else [1, 1])


def test_churned_samples_do_not_depend_on_the_batch():
    assert_samples_do_not_depend_on_the_batch(heun_chain(gaussian_denoiser, SIGMAS, s_churn=2.0))


# --- Likelihood ---

CORRELATED = gaussian_mixture(
    [0.3, 0.7], [[-1.0, 0.5], [2.0, -0.3]], [[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.6], [-0.6, 0.8]]]
)


def correlated_denoiser(x, sigma):
    return mixtures.denoise(CORRELATED, x, sigma)


@pytest.mark.parametrize("mixture", [CORRELATED, TWO_MODES], ids=["correlated", "two_modes"])
def test_the_exact_likelihood_is_the_density_of_the_smoothed_mixture(mixture):
    x = mixtures.sample(mixture, jax.random.key(0), 30)
    found, latent = jax.jit(
        lambda x: flow_log_density(
            lambda x, sigma: mixtures.denoise(mixture, x, sigma),
            x,
            sigma_min=0.1,
            sigma_max=200.0,
            num_steps=60,
        )
    )(x)
    # The prior N(0, 200^2 I) in place of the smoothed mixture: |mean| |latent| / 200^2, below 0.05 at 3
    # standard deviations of TWO_MODES; the method's own error is less.
    exact = mixtures.log_density(mixture, x, jnp.full(30, 0.1))
    np.testing.assert_allclose(found, exact, atol=0.05)
    # Given that density in place of the prior, little is left: float32, and the steps.
    prior = -0.5 * jnp.sum(jnp.square(latent / 200.0), axis=1) - 2 * np.log(200.0 * np.sqrt(2 * np.pi))
    mended = found - prior + mixtures.log_density(mixture, latent, jnp.full(30, 200.0))
    np.testing.assert_allclose(mended, exact, atol=3e-3)


def test_the_estimated_likelihood_is_right_on_average():
    # Many probes of one x, each along the whole path: 4 standard errors of their mean.
    n, settings = 1000, {"sigma_min": 0.1, "sigma_max": 50.0, "num_steps": 20}
    x = jnp.broadcast_to(jnp.array([0.4, -0.2]), (n, 2))
    keys = jax.random.split(jax.random.key(1), n)
    probes = rademacher_probes(keys, 1, (2,))
    estimates, _ = jax.jit(
        lambda x, probes: flow_log_density(correlated_denoiser, x, probes=probes, **settings)
    )(x, probes)
    exact, _ = jax.jit(lambda x: flow_log_density(correlated_denoiser, x, **settings))(x[:1])
    error = np.std(estimates) / np.sqrt(n)
    assert error > 1e-3
    assert abs(float(np.mean(estimates)) - float(exact[0])) < 4 * error


def test_probes_belong_to_the_example_and_are_signs():
    probes = rademacher_probes(jax.random.split(jax.random.key(2), 5), 3, (2, 2))
    assert probes.shape == (3, 5, 2, 2)
    assert set(np.unique(probes)) == {-1.0, 1.0}
    two = rademacher_probes(jax.random.split(jax.random.key(2), 5)[2:4], 3, (2, 2))
    np.testing.assert_array_equal(two, probes[:, 2:4])


@pytest.mark.parametrize("num_probes", [None, 2])
def test_a_likelihood_of_n_steps_calls_the_network_4_n_times(num_probes):
    counted, calls = network_calls(gaussian_denoiser)
    probes = None if num_probes is None else jnp.ones((num_probes, 1, 2))
    run = jax.jit(
        lambda x: flow_log_density(counted, x, sigma_min=0.5, sigma_max=2.0, num_steps=2, probes=probes)
    )
    jax.block_until_ready(run(jnp.zeros((1, 2))))
    jax.effects_barrier()
    r = 2.0**0.5
    expected = [0.5, 0.5 * r, 0.5 * r, 1.0, 1.0, r, r, 2.0]
    np.testing.assert_allclose(np.ravel(calls), expected, rtol=1e-5)


def test_the_prior_of_a_variance_preserving_model():
    # Data N(0, I) stay N(0, I) in VP coordinates at every time, so the likelihood is exact at any sigma_max.
    x = jax.random.normal(jax.random.key(3), (6, 2))
    log_p, _ = flow_log_density(
        lambda x, sigma: x / (1.0 + jnp.square(sigma))[:, None],
        x,
        sigma_min=1e-3,
        sigma_max=3.0,
        num_steps=30,
        prior_std=float(np.sqrt(10.0)),
    )
    exact = -0.5 * np.sum(np.square(x), axis=1) - np.log(2 * np.pi)
    np.testing.assert_allclose(log_p, exact, atol=1e-4)


def test_bits_per_dim_of_the_uniform_distribution_are_the_bits_of_its_levels():
    # Uniform over the 256 bins of width 2 / 255: log p = -D log(256 * 2 / 255).
    log_p = jnp.full(3, -12 * np.log(256 * 2 / 255))
    np.testing.assert_allclose(bits_per_dim(log_p, 12, 256), np.full(3, 8.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_sigmas(1, 0.1, 1.0), "num_steps >= 2"),
        (lambda: karras_sigmas(5, 1.0, 0.1), "0 < sigma_min < sigma_max"),
        (lambda: euler_chain(gaussian_denoiser, [1.0, 2.0]), "decrease and end at 0"),
        (lambda: heun_chain(gaussian_denoiser, [1.0]), "at least two"),
        (lambda: dpm_solver_2m_chain(gaussian_denoiser, [1.0, -1.0]), "end at 0 or above"),
        (lambda: heun_chain(gaussian_denoiser, SIGMAS, s_churn=-1.0), "cannot be negative"),
        (
            lambda: flow_log_density(
                gaussian_denoiser, jnp.zeros((1, 2)), sigma_min=1.0, sigma_max=0.5, num_steps=5
            ),
            "0 < sigma_min < sigma_max",
        ),
        (
            lambda: flow_log_density(
                gaussian_denoiser,
                jnp.zeros((1, 2)),
                sigma_min=0.5,
                sigma_max=1.0,
                num_steps=5,
                prior_std=0.0,
            ),
            "must be positive",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
