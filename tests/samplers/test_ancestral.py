import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser, network_calls

from jaxgen.processes import cosine_schedule, linear_schedule, respace
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddpm import ancestral_chain, ancestral_step
from jaxgen.types import UserError

MEAN, STD = 0.3, 0.5  # of the data
SCHEDULES = {
    "linear": lambda: linear_schedule(1000),
    "cosine": lambda: cosine_schedule(1000),
    "respaced": lambda: respace(linear_schedule(1000), 100),
}


def final_moments(schedule, prediction, variance):
    """Mean and standard deviation of x_0, exactly: the steps are affine, x <- a x + b + c noise."""
    full = linear_schedule(1000) if schedule.timestep[-1] > schedule.num_steps else schedule
    predict = exact_denoiser(full, prediction, MEAN, STD)
    t = jnp.arange(schedule.num_steps)

    @jax.jit
    def step(x, noise):
        x, noise = jnp.full((len(t), 1), x), jnp.full((len(t), 1), noise)
        output = predict(x, schedule.timestep[t])
        return ancestral_step(
            schedule, x, t, output, noise, prediction=prediction, variance=variance, clip=False
        )[:, 0]

    zero, one, noisy = (np.asarray(step(*args), np.float64) for args in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    mean, second = 0.0, 1.0
    for b, a, c in zip(zero[::-1], (one - zero)[::-1], (noisy - zero)[::-1], strict=True):
        mean, second = a * mean + b, a**2 * second + c**2
    return mean, np.sqrt(second)


def moments_in_closed_form(schedule, variance):
    """The same in float64 from Ho et al. 2020, eqs. 6-7, and E[x0 | x_t] of Gaussian data."""
    beta = np.asarray(schedule.beta, np.float64)
    ab = np.cumprod(1 - beta)
    prev = np.concatenate([[1.0], ab[:-1]])
    mean, var = 0.0, 1.0
    for t in range(len(beta))[::-1]:
        gain = np.sqrt(ab[t]) * STD**2 / (ab[t] * STD**2 + 1 - ab[t])
        on_x0 = np.sqrt(prev[t]) * beta[t] / (1 - ab[t])
        on_xt = np.sqrt(1 - beta[t]) * (1 - prev[t]) / (1 - ab[t])
        mean = on_x0 * (MEAN + gain * (mean - np.sqrt(ab[t]) * MEAN)) + on_xt * mean
        small = beta[t] * (1 - prev[t]) / (1 - ab[t])
        noise = 0.0 if t == 0 else {"fixed_small": small, "fixed_large": beta[t]}[variance]
        var = (on_x0 * gain + on_xt) ** 2 * var + noise
    return mean, np.sqrt(var)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_parametrisation_gives_the_moments_of_the_closed_form(name, variance):
    schedule = SCHEDULES[name]()
    expected = moments_in_closed_form(schedule, variance)
    for prediction in ("eps", "x0", "v"):
        moments = final_moments(schedule, prediction, variance)
        # float32 rounding of up to 1000 steps, measured below 4e-7.
        np.testing.assert_allclose(moments, expected, atol=2e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_exact_denoiser_gives_the_data_back(variance):
    errors = []
    for num_steps in (10, 100, 1000):
        mean, std = final_moments(cosine_schedule(num_steps), "v", variance)
        errors.append(abs(std - STD) + abs(mean - MEAN))
    # The variance of a reverse step is off by an amount of the order of 1 / T; below 1 % at T = 1000.
    assert errors[2] < 0.01 * STD
    assert errors[2] < 0.2 * errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("prediction", "variance"), [("eps", "fixed_small"), ("x0", "fixed_large"), ("v", "fixed_small")]
)
def test_samples_have_the_moments(prediction, variance):
    full = linear_schedule(1000)
    schedule, n = respace(full, 25), 4000
    predict = exact_denoiser(full, prediction, MEAN, STD)
    chain = ancestral_chain(predict, schedule, prediction=prediction, variance=variance, clip=False)
    samples = jax.jit(lambda i: run_chain(chain, jax.random.key(0), i, (2,)))(jnp.arange(n))
    chex.assert_shape(samples, (n, 2))
    mean, std = moments_in_closed_form(schedule, variance)
    # 4 standard errors of a mean and of a standard deviation.
    assert np.abs(samples.mean(axis=0) - mean).max() < 4 * std / np.sqrt(n)
    assert np.abs(samples.std(axis=0) - std).max() < 4 * std / np.sqrt(2 * n)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 4 / np.sqrt(n)


def test_one_network_call_a_step_at_the_times_it_knows():
    schedule = respace(linear_schedule(1000), 7)
    predict, calls = network_calls(lambda x, t: 0.5 * x)
    chain = ancestral_chain(predict, schedule)
    jax.jit(lambda i: run_chain(chain, jax.random.key(0), i, (2, 2, 1)))(jnp.arange(3)).block_until_ready()
    jax.effects_barrier()
    assert calls == [[t] * 3 for t in schedule.timestep.tolist()[::-1]]


def test_clipping_holds_the_samples_in_range_and_its_absence_does_not():
    schedule = linear_schedule(30, 1e-3, 0.4)
    predict = exact_denoiser(schedule, "v", 0.0, 3.0)
    sample = {
        clip: run_chain(
            ancestral_chain(predict, schedule, prediction="v", clip=clip),
            jax.random.key(0),
            jnp.arange(50),
            (),
        )
        for clip in (True, False)
    }
    assert float(jnp.abs(sample[True]).max()) <= 1.0
    assert float(jnp.abs(sample[False]).max()) > 2.0


def test_the_last_step_adds_no_noise_and_the_variances_differ():
    schedule = linear_schedule(10)
    t, x = jnp.array([0, 5]), jnp.full((2, 3), 0.2)

    def step(noise, variance):
        return ancestral_step(
            schedule, x, t, 0.1 * x, jnp.full_like(x, noise), prediction="x0", variance=variance, clip=True
        )

    for variance, width in (("fixed_small", schedule.posterior_variance), ("fixed_large", schedule.beta)):
        moved = step(1.0, variance) - step(0.0, variance)
        np.testing.assert_array_equal(moved[0], np.zeros(3))
        np.testing.assert_allclose(moved[1], np.full(3, np.sqrt(width[5])), rtol=1e-4)
    np.testing.assert_allclose(step(1.0, "fixed_small")[0], np.full(3, 0.02), rtol=1e-6)


def test_bfloat16_networks_keep_the_chain_in_float32():
    schedule = linear_schedule(4)
    chain = ancestral_chain(lambda x, t: x.astype(jnp.bfloat16), schedule)
    assert run_chain(chain, jax.random.key(0), jnp.arange(2), (3,)).dtype == jnp.float32


def test_mistakes_are_named():
    for kwargs in ({"prediction": "noise"}, {"variance": "learned"}):
        chain = ancestral_chain(lambda x, t: x, linear_schedule(4), **kwargs)
        with pytest.raises(UserError, match="choose one of"):
            run_chain(chain, jax.random.key(0), jnp.arange(2), (3,))
