import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import processes
from jaxgen.processes import cosine_schedule, linear_schedule, respace, spaced_timesteps
from jaxgen.types import UserError

SCHEDULES = {
    "linear": lambda: linear_schedule(1000),
    "linear_short": lambda: linear_schedule(50, 2e-3, 0.4),
    "cosine": lambda: cosine_schedule(1000),
    "respaced": lambda: respace(linear_schedule(1000), 40),
}


def betas_in_long_double(name):
    """The same betas from their definitions, in 80-bit arithmetic and by plain products."""
    long = np.longdouble
    if name == "cosine":
        f = np.cos((np.arange(1001, dtype=long) / 1000 + long(0.008)) / long(1.008) * np.arccos(long(0))) ** 2
        return np.minimum(1 - f[1:] / f[:-1], long(0.999))
    start, end, steps = {"linear": ("1e-4", "0.02", 1000), "linear_short": ("2e-3", "0.4", 50)}[name]
    return long(start) + (long(end) - long(start)) * np.arange(steps, dtype=long) / (steps - 1)


@pytest.mark.parametrize("name", ["linear", "linear_short", "cosine"])
def test_coefficients_are_exact_to_float32_rounding(name):
    schedule = SCHEDULES[name]()
    beta = betas_in_long_double(name)
    alpha_bar = np.cumprod(1 - beta)
    previous = np.concatenate([[np.longdouble(1)], alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    expected = {
        "beta": beta,
        "alpha_bar": alpha_bar,
        "sqrt_alpha_bar": np.sqrt(alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
        "sqrt_alpha_bar_prev": np.sqrt(previous),
        "sqrt_one_minus_alpha_bar_prev": np.sqrt(1 - previous),
        "posterior_mean_x0": np.sqrt(previous) * beta / (1 - alpha_bar),
        "posterior_mean_xt": np.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.concatenate([variance[1:2], variance[1:]])),
    }
    for field, value in expected.items():
        actual = getattr(schedule, field)
        assert actual.dtype == jnp.float32, field
        # float32 rounds to 6e-8; the float64 arithmetic adds nothing visible.
        np.testing.assert_allclose(actual, value.astype(np.float64), rtol=1.2e-7, err_msg=field)
    np.testing.assert_array_equal(schedule.timestep, np.arange(len(beta)))
    assert schedule.num_steps == len(beta)


def test_the_last_state_is_noise():
    # Ho et al. 2020, section 4, state L_T of about 1e-5 bits/dim; alpha_bar_T of their schedule is 4.0e-5.
    np.testing.assert_allclose(linear_schedule(1000).alpha_bar[-1], 4.036e-5, rtol=1e-3)
    assert float(cosine_schedule(1000).alpha_bar[-1]) < 1e-8
    assert float(cosine_schedule(20).alpha_bar[-1]) < 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_is_the_single_steps_chained(name):
    schedule = SCHEDULES[name]()
    t = jnp.arange(schedule.num_steps)
    signal = processes.q_sample(schedule, jnp.ones((len(t), 1)), t, jnp.zeros((len(t), 1)))[:, 0]
    noise = processes.q_sample(schedule, jnp.zeros((len(t), 1)), t, jnp.ones((len(t), 1)))[:, 0]
    mean, variance, means, variances = 1.0, 0.0, [], []
    beta = np.asarray(schedule.beta, np.float64)
    for b in beta:
        mean, variance = np.sqrt(1 - b) * mean, (1 - b) * variance + b
        means.append(mean)
        variances.append(variance)
    # The recursion starts from betas rounded to float32: 1 - beta is off by 6e-8 beta / (1 - beta) of itself.
    rounding = 6e-8 * np.cumsum(beta / (1 - beta))
    assert np.all(np.abs(signal / np.array(means) - 1) < 1e-6 + rounding)
    assert np.all(np.abs(noise**2 / np.array(variances) - 1) < 1e-6)


def test_q_sample_has_the_moments_of_simulated_steps():
    schedule, n = linear_schedule(20, 1e-3, 0.3), 20_000
    rng = np.random.default_rng(0)
    x = np.full(n, 0.7)
    for beta in np.asarray(schedule.beta, np.float64)[:12]:
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(n)
    eps = jax.random.normal(jax.random.key(1), (n, 1))
    y = np.asarray(processes.q_sample(schedule, jnp.full((n, 1), 0.7), jnp.full(n, 11), eps))[:, 0]
    # Two independent samples: 4 standard errors of the difference of means and of standard deviations.
    assert abs(x.mean() - y.mean()) < 4 * np.sqrt((x.var() + y.var()) / n)
    assert abs(x.std() - y.std()) < 4 * np.sqrt((x.var() + y.var()) / (2 * n))


def test_x_of_any_rank_uses_the_time_of_its_own_example():
    schedule = linear_schedule(10)
    t = jnp.array([0, 9, 4])
    for shape in [(), (2,), (4, 4, 3)]:
        x0, eps = (jax.random.normal(k, (3, *shape)) for k in jax.random.split(jax.random.key(0)))
        x_t = processes.q_sample(schedule, x0, t, eps)
        chex.assert_shape(x_t, (3, *shape))
        for i in range(3):
            ab = np.asarray(schedule.alpha_bar)[t[i]]
            expected = np.sqrt(ab) * np.asarray(x0)[i] + np.sqrt(1 - ab) * np.asarray(eps)[i]
            # 1 - ab in float32 is off by up to 6e-8 / 1e-4.
            np.testing.assert_allclose(x_t[i], expected, atol=1e-5)


@pytest.mark.parametrize("t", [1, 7, 19])
def test_posterior_is_bayes_on_a_grid(t):
    schedule = linear_schedule(20, 1e-2, 0.3)
    x0, x_t = 0.4, -0.9
    beta, ab_prev = float(schedule.beta[t]), float(schedule.alpha_bar[t - 1])
    grid = np.linspace(-8, 8, 200_001)
    log_joint = -0.5 * (grid - np.sqrt(ab_prev) * x0) ** 2 / (1 - ab_prev)
    log_joint -= 0.5 * (x_t - np.sqrt(1 - beta) * grid) ** 2 / beta
    weight = np.exp(log_joint - log_joint.max())
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    ours = processes.q_posterior(schedule, jnp.full((1, 1), x0), jnp.full((1, 1), x_t), jnp.array([t]))
    # The oracle uses alpha_bar and beta rounded to float32.
    np.testing.assert_allclose(np.ravel(ours), [mean, variance, np.log(variance)], rtol=1e-5)


def test_posterior_of_the_first_step_is_the_data():
    schedule = linear_schedule(20)
    x0, x_t = jnp.array([[0.3, -0.8]]), jnp.array([[5.0, 5.0]])
    mean, variance, log_variance = processes.q_posterior(schedule, x0, x_t, jnp.array([0]))
    chex.assert_trees_all_equal(mean, x0)
    chex.assert_trees_all_equal(variance, jnp.zeros((1, 1)))
    np.testing.assert_allclose(log_variance[0, 0], np.log(schedule.posterior_variance[1]), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_targets_give_back_x0_and_eps(name, prediction):
    schedule = SCHEDULES[name]()
    t = jnp.arange(schedule.num_steps)
    x0, eps = (jax.random.normal(k, (len(t), 3)) for k in jax.random.split(jax.random.key(0)))
    x_t = processes.q_sample(schedule, x0, t, eps)
    target = processes.prediction_target(schedule, prediction, x0, t, eps)
    x0_back, eps_back = processes.to_x0_and_eps(schedule, prediction, target, x_t, t)
    # Dividing by sqrt(alpha_bar) or sqrt(1 - alpha_bar) amplifies the rounding of x_t, 6e-8 of up to 4.
    x0_error = np.abs(x0_back - x0) * np.asarray(schedule.sqrt_alpha_bar)[:, None]
    eps_error = np.abs(eps_back - eps) * np.asarray(schedule.sqrt_one_minus_alpha_bar)[:, None]
    assert x0_error.max() < 1e-6
    assert eps_error.max() < 1e-6


def test_the_three_conversions_agree_with_one_another():
    schedule = linear_schedule(100, 1e-3, 0.2)
    t = jnp.arange(100)
    x0, eps = (jax.random.normal(k, (100, 3)) for k in jax.random.split(jax.random.key(3)))
    x_t, v = processes.q_sample(schedule, x0, t, eps), processes.v_target(schedule, x0, t, eps)
    # v and x_t are a rotation of x0 and eps, so its length is kept.
    np.testing.assert_allclose(v**2 + x_t**2, x0**2 + eps**2, rtol=1e-5)
    np.testing.assert_allclose(processes.predict_x0_from_v(schedule, x_t, t, v), x0, atol=2e-6)
    np.testing.assert_allclose(processes.predict_eps_from_v(schedule, x_t, t, v), eps, atol=2e-6)
    np.testing.assert_allclose(processes.predict_x0_from_eps(schedule, x_t, t, eps), x0, atol=2e-4)
    np.testing.assert_allclose(processes.predict_eps_from_x0(schedule, x_t, t, x0), eps, atol=2e-5)


def test_reverse_variances():
    schedule = linear_schedule(30)
    t, x = jnp.arange(30), jnp.ones((30, 2))
    small = processes.p_mean_log_variance(schedule, x, x, t, "fixed_small")[1][:, 0]
    large = processes.p_mean_log_variance(schedule, x, x, t, "fixed_large")[1][:, 0]
    np.testing.assert_allclose(jnp.exp(small[1:]), schedule.posterior_variance[1:], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(large[1:]), schedule.beta[1:], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(small[:1]), schedule.posterior_variance[1:2], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(large[:1]), schedule.posterior_variance[1:2], rtol=1e-5)


def test_spacings():
    np.testing.assert_array_equal(spaced_timesteps(10, 4, "even"), [0, 3, 6, 9])
    np.testing.assert_array_equal(spaced_timesteps(10, 1, "even"), [9])
    np.testing.assert_array_equal(spaced_timesteps(10, 4, "leading"), [0, 2, 4, 6])
    np.testing.assert_array_equal(spaced_timesteps(10, 4, "trailing"), [3, 5, 7, 9])
    np.testing.assert_array_equal(spaced_timesteps(20, 5, "quadratic"), [0, 1, 4, 9, 16])
    for spacing in ("even", "leading", "trailing"):
        np.testing.assert_array_equal(spaced_timesteps(7, 7, spacing), np.arange(7))


@pytest.mark.parametrize("spacing", ["even", "leading", "trailing", "quadratic"])
def test_respacing_keeps_the_marginals(spacing):
    schedule = cosine_schedule(200)
    spaced = respace(schedule, 13, spacing)
    times = spaced_timesteps(200, 13, spacing)
    np.testing.assert_array_equal(spaced.timestep, times)
    # Betas are float32 in between: the last, 0.999, leaves 1 - beta a relative 6e-5.
    np.testing.assert_allclose(spaced.alpha_bar, schedule.alpha_bar[times], rtol=6e-5)
    np.testing.assert_allclose(
        spaced.sqrt_one_minus_alpha_bar, schedule.sqrt_one_minus_alpha_bar[times], rtol=1e-6
    )
    previous = np.concatenate([[1.0], np.asarray(schedule.alpha_bar, np.float64)[times[:-1]]])
    beta = 1 - np.asarray(schedule.alpha_bar, np.float64)[times] / previous
    np.testing.assert_allclose(spaced.beta, beta, rtol=1e-4, atol=1e-6)


def test_respacing_to_every_step_changes_nothing_and_respacing_composes():
    schedule = linear_schedule(60)
    chex.assert_trees_all_close(respace(schedule, 60), schedule, rtol=1e-6)
    twice = respace(respace(schedule, 30, "leading"), 10, "leading")
    chex.assert_trees_all_close(twice, respace(schedule, 10, "leading"), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_schedule(0), "at least 1 step"),
        (lambda: linear_schedule(10, 0.0, 0.1), "0 < beta_start <= beta_end < 1"),
        (lambda: linear_schedule(10, 0.2, 0.1), "0 < beta_start <= beta_end < 1"),
        (lambda: linear_schedule(10, 0.2, 1.0), "0 < beta_start <= beta_end < 1"),
        (lambda: cosine_schedule(-1), "at least 1 step"),
        (lambda: cosine_schedule(10, s=-0.1), "s >= 0"),
        (lambda: cosine_schedule(10, max_beta=1.0), "max_beta < 1"),
        (lambda: respace(linear_schedule(10), 11), "in 1..10"),
        (lambda: respace(linear_schedule(10), 0), "in 1..10"),
        (lambda: respace(linear_schedule(10), 5, "uniform"), "unknown spacing 'uniform'"),
        (lambda: respace(linear_schedule(10), 9, "quadratic"), "9 different times"),
        (
            lambda: processes.prediction_target(linear_schedule(3), "noise", None, None, None),
            "unknown prediction 'noise'",
        ),
        (
            lambda: processes.to_x0_and_eps(linear_schedule(3), "noise", None, None, None),
            "unknown prediction 'noise'",
        ),
        (
            lambda: processes.p_mean_log_variance(
                linear_schedule(3), jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.array([0]), "learned"
            ),
            "unknown variance 'learned'",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
