import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import network_calls
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
    share_of_the_second_mode,
    two_modes_denoiser,
)
from scipy import stats

from jaxgen import mixtures
from jaxgen.denoising import geometric_sigmas
from jaxgen.samplers.langevin import (
    annealed_langevin_chain,
    langevin_chain,
    langevin_step,
    mala_chain,
    mala_log_ratio,
)
from jaxgen.types import UserError


def gaussian_score(x):
    return (MEAN - x) / STD**2


def gaussian_log_density(x):
    return -0.5 * jnp.sum(jnp.square(x - MEAN), axis=1) / STD**2


def two_modes_score(x):
    return mixtures.score(TWO_MODES, x, jnp.zeros(len(x)))


def two_modes_log_density(x):
    return mixtures.log_density(TWO_MODES, x, jnp.zeros(len(x)))


def uniform(keys, shape):
    """All over the square that holds both modes."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, -8.0, 8.0))(keys)


# --- Langevin dynamics ---


@pytest.mark.parametrize(("num_steps", "step_size"), [(3, 0.1), (100, 0.2)])
def test_langevin_has_the_moments_of_its_recursion(num_steps, step_size):
    # x <- (1 - alpha / 2V) x + alpha / 2V mean + sqrt(alpha) z from N(0, 1), in float64.
    samples = draw(langevin_chain(gaussian_score, num_steps=num_steps, step_size=step_size), 4000)
    mean, variance, keep = 0.0, 1.0, 1.0 - 0.5 * step_size / STD**2
    for _ in range(num_steps):
        mean, variance = keep * mean + (1.0 - keep) * MEAN, keep**2 * variance + step_size
    if num_steps == 100:  # at rest, where the step size makes it too wide
        np.testing.assert_allclose(variance, STD**2 / (1.0 - step_size / (4.0 * STD**2)), rtol=1e-6)
    assert_moments(samples, mean, np.sqrt(variance))


def test_langevin_step_by_hand():
    x, score, noise = (jnp.full((1, 2), v) for v in (1.0, -3.0, 2.0))
    np.testing.assert_allclose(langevin_step(x, score, 0.25, noise), [[1.625, 1.625]])


# --- MALA ---


def test_the_ratio_of_mala_is_that_of_its_proposals():
    x, y, sx, sy = (jax.random.normal(k, (4, 3)) for k in jax.random.split(jax.random.key(1), 4))
    there = stats.norm(x + 0.35 * sx, np.sqrt(0.7)).logpdf(y).sum(axis=1)
    back = stats.norm(y + 0.35 * sy, np.sqrt(0.7)).logpdf(x).sum(axis=1)
    np.testing.assert_allclose(mala_log_ratio(x, sx, y, sy, 0.7), back - there, rtol=1e-4, atol=1e-5)


def test_mala_has_the_right_variance_where_langevin_has_not():
    # alpha = 2 V makes Langevin's variance twice too large.
    chain = mala_chain(gaussian_log_density, num_steps=60, step_size=2.0 * STD**2)
    assert_moments(draw(chain, 4000), MEAN, STD)
    accepted = draw(chain._replace(finish=lambda state: state.num_accepted), 4000) / 60
    assert 0.3 < accepted.mean() < 0.9
    timid = mala_chain(gaussian_log_density, num_steps=20, step_size=1e-3)
    assert draw(timid._replace(finish=lambda state: state.num_accepted), 50).mean() / 20 > 0.99
    unadjusted = draw(langevin_chain(gaussian_score, num_steps=60, step_size=2.0 * STD**2), 4000)
    assert_moments(unadjusted, MEAN, np.sqrt(2.0) * STD)


def test_mala_leaves_a_mixture_unchanged():
    start = lambda keys, shape: jax.vmap(lambda key: mixtures.sample(TWO_MODES, key, 1)[0])(keys)
    chain = mala_chain(two_modes_log_density, num_steps=40, step_size=1.0, init=start)
    assert_the_modes_are_right(draw(chain, 4000))


def test_mala_refuses_what_has_no_density():
    # p is uniform on the unit square, and NaN outside.
    inside = lambda x: jnp.where(jnp.all(jnp.abs(x) < 1.0, axis=1), 0.0, jnp.nan)
    start = lambda keys, shape: jnp.zeros((len(keys), *shape))
    samples = draw(mala_chain(inside, num_steps=30, step_size=0.5, init=start), 2000)
    assert np.abs(samples).max() < 1.0
    # Uniform on [-1, 1]: mean 0, variance 1/3, in 4 standard errors (the kurtosis of a uniform is 1.8).
    assert np.abs(samples.mean(axis=0)).max() < 4 * np.sqrt(1 / 3 / 2000)
    assert np.abs(samples.var(axis=0) - 1 / 3).max() < 4 * np.sqrt(0.8 / 2000) / 3


# --- Annealing ---

SIGMAS = geometric_sigmas(20.0, 0.3, 12)
EPSILON = 0.3 * 0.3**2


def test_annealed_langevin_finds_the_weights_of_two_modes_and_plain_langevin_does_not():
    # Row G8 (Song & Ermon 2019, section 3.2 and figure 3): between modes far apart there is no density to
    # say what they weigh, so plain Langevin keeps the shares that it began with.
    n = 2000
    annealed = annealed_langevin_chain(
        two_modes_denoiser, SIGMAS, steps_per_level=50, step_size=EPSILON, init=uniform
    )
    # The anneal's own bias, of steps that are not small and levels that are not close: 8,000 chains gave a
    # weight of 0.780 +- 0.004 for 0.8, and the end at sigma_L = 0.3 costs the mode 0.06 of its variance.
    assert_the_modes_are_right(draw(annealed, n), bias=0.03)
    plain = langevin_chain(two_modes_score, num_steps=600, step_size=0.1, init=uniform)
    began, error = share_of_the_second_mode(draw(plain._replace(xs=plain.xs[:0]), n))
    ended, _ = share_of_the_second_mode(draw(plain, n))
    assert abs(ended - began) < 0.05
    assert abs(ended - 0.8) > 20 * error


@pytest.mark.parametrize("denoise", [True, False])
def test_annealed_langevin_has_the_moments_of_its_recursion(denoise):
    sigmas, steps, epsilon = geometric_sigmas(3.0, 0.2, 4), 5, 0.02
    chain = annealed_langevin_chain(
        gaussian_denoiser, sigmas, steps_per_level=steps, step_size=epsilon, denoise=denoise
    )
    mean, variance = 0.0, sigmas[0] ** 2
    for sigma in np.repeat(sigmas, steps):
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        keep = 1.0 - 0.5 * alpha / (STD**2 + sigma**2)
        mean, variance = keep * mean + (1.0 - keep) * MEAN, keep**2 * variance + alpha
    if denoise:
        gain = STD**2 / (STD**2 + sigmas[-1] ** 2)
        mean, variance = gain * mean + (1.0 - gain) * MEAN, gain**2 * variance
    assert_moments(draw(chain, 4000), mean, np.sqrt(variance))


def test_denoising_at_the_end_is_the_denoiser():
    sigmas = geometric_sigmas(3.0, 0.2, 3)
    noisy, clean = (
        draw(
            annealed_langevin_chain(
                two_modes_denoiser, sigmas, steps_per_level=2, step_size=0.01, denoise=denoise
            ),
            5,
        )
        for denoise in (False, True)
    )
    np.testing.assert_allclose(clean, two_modes_denoiser(jnp.asarray(noisy), jnp.full(5, 0.2)), atol=1e-5)


# --- What holds for all three ---

CHAINS = {
    "langevin": (
        lambda net, n: langevin_chain(lambda x: net(x, x[:, 0]), num_steps=n, step_size=0.1),
        lambda x, sigma: gaussian_score(x),
    ),
    "mala": (
        lambda net, n: mala_chain(lambda x: net(x, x[:, 0]), num_steps=n, step_size=0.1),
        lambda x, sigma: gaussian_log_density(x),
    ),
    "annealed": (
        lambda net, n: annealed_langevin_chain(
            net, geometric_sigmas(1.0, 0.5, 2), steps_per_level=n, step_size=0.1
        ),
        gaussian_denoiser,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_samples_do_not_depend_on_the_batch(name):
    make, network = CHAINS[name]
    assert_samples_do_not_depend_on_the_batch(make(network, 5))


@pytest.mark.parametrize("name", CHAINS)
def test_the_network_is_traced_as_often_for_any_number_of_steps(name):
    make, network = CHAINS[name]
    assert (
        num_traces(lambda net: make(net, 3), network)
        == num_traces(lambda net: make(net, 40), network)
        == (2 if name == "mala" else 1)
    )


def test_the_number_of_network_calls():
    for name, expected in (("langevin", 6), ("mala", 7)):
        make, network = CHAINS[name]
        counted, calls = network_calls(network)
        assert len(calls_of(make(counted, 6), calls)) == expected
    counted, calls = network_calls(gaussian_denoiser)
    for denoise in (True, False):
        calls.clear()
        chain = annealed_langevin_chain(
            counted, [1.0, 0.5], steps_per_level=2, step_size=0.1, denoise=denoise
        )
        assert calls_of(chain, calls) == [1.0, 1.0, 0.5, 0.5, 0.5][: 5 if denoise else 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: langevin_chain(gaussian_score, num_steps=0, step_size=0.1), "at least 1 step"),
        (lambda: mala_chain(gaussian_log_density, num_steps=5, step_size=0.0), "a positive step size"),
        (
            lambda: annealed_langevin_chain(gaussian_denoiser, [0.1, 1.0], steps_per_level=1, step_size=0.1),
            "the largest first",
        ),
        (
            lambda: annealed_langevin_chain(gaussian_denoiser, [], steps_per_level=1, step_size=0.1),
            "the largest first",
        ),
        (
            lambda: annealed_langevin_chain(gaussian_denoiser, [1.0], steps_per_level=0, step_size=0.1),
            "at least 1 step",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
