import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser, network_calls

from jaxgen.processes import cosine_schedule, linear_schedule, respace, spaced_timesteps
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddim import ddim_chain, ddim_step
from jaxgen.samplers.ddpm import ancestral_step
from jaxgen.types import UserError

MEAN, STD = 0.3, 0.5  # of the data
SCHEDULES = {"linear": lambda: linear_schedule(1000), "cosine": lambda: cosine_schedule(1000)}


def final_moments(full, schedule, prediction, eta):
    """Mean and standard deviation of x_0, exactly: the steps are affine, x <- a x + b + c noise."""
    predict = exact_denoiser(full, prediction, MEAN, STD)
    t = jnp.arange(schedule.num_steps)

    @jax.jit
    def step(x, noise):
        x, noise = jnp.full((len(t), 1), x), jnp.full((len(t), 1), noise)
        output = predict(x, schedule.timestep[t])
        return ddim_step(schedule, x, t, output, noise, eta=eta, prediction=prediction, clip=False)[:, 0]

    zero, one, noisy = (np.asarray(step(*args), np.float64) for args in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    mean, second = 0.0, 1.0
    for b, a, c in zip(zero[::-1], (one - zero)[::-1], (noisy - zero)[::-1], strict=True):
        mean, second = a * mean + b, a**2 * second + c**2
    return mean, np.sqrt(second)


def moments_in_closed_form(schedule, eta):
    """The same in float64 from Song et al. 2021, eqs. 12 and 16, and E[x0 | x_t] of Gaussian data."""
    ab = np.cumprod(1 - np.asarray(schedule.beta, np.float64))
    prev = np.concatenate([[1.0], ab[:-1]])
    mean, var = 0.0, 1.0
    for t in range(len(ab))[::-1]:
        gain = np.sqrt(ab[t]) * STD**2 / (ab[t] * STD**2 + 1 - ab[t])
        sigma = eta * np.sqrt((1 - prev[t]) / (1 - ab[t])) * np.sqrt(1 - ab[t] / prev[t])
        direction = np.sqrt(max(1 - prev[t] - sigma**2, 0.0))
        x0 = MEAN + gain * (mean - np.sqrt(ab[t]) * MEAN)
        eps = (mean - np.sqrt(ab[t]) * x0) / np.sqrt(1 - ab[t])
        slope = np.sqrt(prev[t]) * gain + direction * (1 - np.sqrt(ab[t]) * gain) / np.sqrt(1 - ab[t])
        mean = np.sqrt(prev[t]) * x0 + direction * eps
        var = slope**2 * var + sigma**2
    return mean, np.sqrt(var)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 50), ("trailing", 20), ("quadratic", 25)])
def test_every_parametrisation_gives_the_moments_of_the_closed_form(name, spacing, num_steps):
    full = SCHEDULES[name]()
    schedule = respace(full, num_steps, spacing)
    for eta in (0.0, 0.5, 1.0):
        expected = moments_in_closed_form(schedule, eta)
        for prediction in ("eps", "x0", "v"):
            moments = final_moments(full, schedule, prediction, eta)
            # float32 rounding, measured below 3e-6.
            np.testing.assert_allclose(moments, expected, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_gives_the_data_back(eta):
    full = cosine_schedule(1000)
    errors = []
    for num_steps in (10, 100, 1000):
        mean, std = final_moments(full, respace(full, num_steps, "trailing"), "v", eta)
        errors.append(abs(std - STD) + abs(mean - MEAN))
    # A discretisation of first order, below 1 % at 1000 steps.
    assert errors[2] < 0.01 * STD
    assert errors[2] < 0.2 * errors[1] < 0.1 * errors[0]


def test_deterministic_chain_is_the_probability_flow_of_the_gaussian():
    # eta = 0 carries x_T to x_0 = mean + std (x_T - sqrt(ab) mean) / sqrt(ab std^2 + 1 - ab) as steps shrink.
    full = linear_schedule(1000)
    chain = ddim_chain(
        exact_denoiser(full, "eps", MEAN, STD), full, num_steps=1000, eta=0.0, prediction="eps", clip=False
    )
    start = chain._replace(xs=chain.xs[:0])
    x_T = run_chain(start, jax.random.key(0), jnp.arange(64), (2,))
    x_0 = run_chain(chain, jax.random.key(0), jnp.arange(64), (2,))
    ab = full.alpha_bar[-1]
    expected = MEAN + STD * (x_T - jnp.sqrt(ab) * MEAN) / jnp.sqrt(ab * STD**2 + 1 - ab)
    np.testing.assert_allclose(x_0, expected, atol=0.02)  # an error of the order of 1 / T


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_moments(eta):
    full, n = linear_schedule(1000), 4000
    chain = ddim_chain(
        exact_denoiser(full, "v", MEAN, STD), full, num_steps=20, eta=eta, prediction="v", clip=False
    )
    samples = jax.jit(lambda i: run_chain(chain, jax.random.key(0), i, (2,)))(jnp.arange(n))
    mean, std = moments_in_closed_form(respace(full, 20, "leading"), eta)
    # 4 standard errors of a mean and of a standard deviation.
    assert np.abs(samples.mean(axis=0) - mean).max() < 4 * std / np.sqrt(n)
    assert np.abs(samples.std(axis=0) - std).max() < 4 * std / np.sqrt(2 * n)


@pytest.mark.parametrize("clip", [True, False])
def test_eta_one_is_ancestral_sampling_with_the_small_variance(clip):
    schedule = respace(linear_schedule(1000), 50, "leading")
    t = jnp.arange(50)
    x, output, noise = (jax.random.normal(k, (50, 8)) for k in jax.random.split(jax.random.key(0), 3))
    args = (schedule, x, t, output, noise)
    ddim = ddim_step(*args, eta=1.0, prediction="v", clip=clip)
    ddpm = ancestral_step(*args, prediction="v", variance="fixed_small", clip=clip)
    np.testing.assert_allclose(ddim, ddpm, atol=5e-6)  # float32, values up to 4


def test_the_noise_of_eta_zero_has_no_effect_and_of_eta_one_has():
    schedule = respace(linear_schedule(1000), 10)
    t, x = jnp.arange(10), jnp.full((10, 2), 0.3)

    def step(noise, eta):
        return ddim_step(schedule, x, t, x, jnp.full_like(x, noise), eta=eta, prediction="eps", clip=False)

    np.testing.assert_array_equal(step(1.0, 0.0), step(0.0, 0.0))
    moved = step(1.0, 1.0) - step(0.0, 1.0)
    np.testing.assert_allclose(moved[:, 0] ** 2, schedule.posterior_variance, atol=1e-6)


@pytest.mark.parametrize(("num_steps", "spacing"), [(1, "trailing"), (5, "leading"), (9, "quadratic")])
def test_num_steps_is_the_number_of_network_calls_at_the_times_of_the_spacing(num_steps, spacing):
    predict, calls = network_calls(lambda x, t: 0.5 * x)
    chain = ddim_chain(predict, linear_schedule(100), num_steps=num_steps, spacing=spacing)
    jax.jit(lambda i: run_chain(chain, jax.random.key(0), i, (2, 2, 1)))(jnp.arange(3)).block_until_ready()
    jax.effects_barrier()
    assert calls == [[t] * 3 for t in spaced_timesteps(100, num_steps, spacing).tolist()[::-1]]


def test_clipping_holds_the_samples_in_range():
    schedule = linear_schedule(100, 1e-3, 0.1)
    predict = exact_denoiser(schedule, "v", 0.0, 3.0)
    largest = {}
    for clip in (True, False):
        chain = ddim_chain(predict, schedule, num_steps=10, prediction="v", clip=clip)
        largest[clip] = float(jnp.abs(run_chain(chain, jax.random.key(0), jnp.arange(50), ())).max())
    assert largest[True] <= 1.0
    assert largest[False] > 2.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 5, "eta": 1.5}, r"eta must be in \[0, 1\]"),
        ({"num_steps": 5, "eta": -0.1}, r"eta must be in \[0, 1\]"),
        ({"num_steps": 0}, "in 1..20"),
        ({"num_steps": 21}, "in 1..20"),
        ({"num_steps": 5, "spacing": "log"}, "unknown spacing 'log'"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        ddim_chain(lambda x, t: x, linear_schedule(20), **kwargs)
