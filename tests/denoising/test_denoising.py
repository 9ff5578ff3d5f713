import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser, network_calls

from jaxgen import denoising, mixtures
from jaxgen.denoising import denoiser_from_ddpm, over, schedule_sigmas
from jaxgen.mixtures import gaussian_mixture
from jaxgen.processes import at, cosine_schedule, linear_schedule, q_sample, respace, v_target
from jaxgen.types import UserError

MEAN, STD = 0.3, 0.5  # of the Gaussian data
MIXTURE = gaussian_mixture(
    [0.3, 0.7], [[-1.0, 0.5], [2.0, -0.3]], [[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.6], [-0.6, 0.8]]]
)
X = jax.random.normal(jax.random.key(0), (6, 2))
SIGMA = jnp.array([0.01, 0.1, 0.5, 1.0, 5.0, 50.0])


def mixture_denoiser(x, sigma):
    return mixtures.denoise(MIXTURE, x, sigma)


# --- The four guises ---


@pytest.mark.parametrize("guise", ["score", "eps", "v"])
def test_conversions_invert_one_another(guise):
    noisy = X * over(1.0 + SIGMA, X)
    denoised = mixture_denoiser(noisy, SIGMA)
    there = getattr(denoising, f"{guise}_from_denoised")(noisy, denoised, SIGMA)
    back = getattr(denoising, f"denoised_from_{guise}")(noisy, there, SIGMA)
    np.testing.assert_allclose(back, denoised, rtol=1e-4, atol=2e-5)  # float32: x - A(x) at x up to 100


def test_the_score_of_a_denoiser_is_that_of_the_smoothed_data():
    # Row G7: S = (A(x) - x) / sigma^2 = grad log (g_sigma * p). At sigma = 0.01 the difference A(x) - x of
    # values near 1 is known to 1e-7, so S to 1e-3.
    noisy = X * over(1.0 + SIGMA, X)
    ours, exact = (
        f(noisy, SIGMA)
        for f in (denoising.score_of(mixture_denoiser), lambda *a: mixtures.score(MIXTURE, *a))
    )
    np.testing.assert_allclose(ours[0], exact[0], atol=5e-3)
    np.testing.assert_allclose(ours[1:], exact[1:], rtol=1e-4, atol=5e-5)
    again = denoising.denoiser_from_score(denoising.score_of(mixture_denoiser))(noisy, SIGMA)
    np.testing.assert_allclose(again, mixture_denoiser(noisy, SIGMA), atol=1e-4)


def test_eps_and_v_are_those_of_the_variance_preserving_process():
    schedule = linear_schedule(100)
    t = jnp.array([0, 3, 20, 50, 80, 99])
    eps = jax.random.normal(jax.random.key(1), X.shape)
    x = q_sample(schedule, X, t, eps) / at(schedule.sqrt_alpha_bar, t, X)
    sigma = schedule_sigmas(schedule)[t]
    np.testing.assert_allclose(denoising.eps_from_denoised(x, X, sigma), eps, atol=2e-5)
    v = v_target(schedule, X, t, eps)
    np.testing.assert_allclose(denoising.v_from_denoised(x, X, sigma), v, atol=2e-5)


# --- DDPM networks ---


@pytest.mark.parametrize("make", [lambda: linear_schedule(1000), lambda: cosine_schedule(1000)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_ddpm_network_is_an_exact_denoiser_at_the_sigmas_of_its_schedule(make, prediction):
    schedule = make()
    predict, calls = network_calls(exact_denoiser(schedule, prediction, MEAN, STD))
    t = jnp.array([0, 10, 100, 500, 700, 900])
    sigma = schedule_sigmas(schedule)[t]
    x = MEAN + X * over(jnp.sqrt(STD**2 + sigma**2), X)
    ours = jax.jit(denoiser_from_ddpm(predict, schedule, prediction))(x, sigma)
    jax.effects_barrier()
    assert calls == [t.tolist()]
    gain = over(STD**2 / (STD**2 + sigma**2), x)
    # float32; eps and v at a large sigma subtract sigma eps from x: 6e-8 sigma.
    np.testing.assert_allclose(ours, MEAN + gain * (x - MEAN), atol=2e-6 * (10 + float(sigma.max())))


def test_between_the_steps_the_error_is_that_of_the_time():
    schedule = linear_schedule(1000)
    predict = exact_denoiser(schedule, "x0", MEAN, STD)
    sigma = jnp.sqrt(schedule_sigmas(schedule)[500:506] * schedule_sigmas(schedule)[501:507])
    x = MEAN + X
    exact = MEAN + over(STD**2 / (STD**2 + sigma**2), x) * (x - MEAN)
    error = jnp.abs(denoiser_from_ddpm(predict, schedule, "x0")(x, sigma) - exact)
    # Half a step of 1 % in sigma: E[x0 | x] moves by at most about 1 %.
    assert 1e-5 < float(error.max()) < 0.01


def test_continuous_times_interpolate_and_nearest_times_round():
    schedule = respace(linear_schedule(1000), 50)
    sigmas = schedule_sigmas(schedule)
    continuous = denoising.ddpm_times(schedule, sigmas, "continuous")
    np.testing.assert_allclose(continuous, schedule.timestep, atol=2e-2)
    assert continuous.dtype == jnp.float32
    np.testing.assert_array_equal(denoising.ddpm_times(schedule, sigmas), schedule.timestep)
    between = sigmas[:-1] ** 0.75 * sigmas[1:] ** 0.25
    middle = denoising.ddpm_times(schedule, between, "continuous")
    np.testing.assert_allclose(
        middle, 0.75 * schedule.timestep[:-1] + 0.25 * schedule.timestep[1:], atol=2e-2
    )
    np.testing.assert_array_equal(denoising.ddpm_times(schedule, between), schedule.timestep[:-1])


@pytest.mark.parametrize("times", ["nearest", "continuous"])
def test_noise_outside_the_schedule_gets_the_first_or_the_last_time(times):
    schedule = linear_schedule(100)
    outside = denoising.ddpm_times(schedule, jnp.array([0.0, 1e-6, 1e3, jnp.inf]), times)
    np.testing.assert_array_equal(outside, [0, 0, 99, 99])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_denoiser_serves_as_a_ddpm_network(prediction):
    schedule = linear_schedule(1000)
    t = jnp.array([0, 10, 100, 500, 800, 999])
    x_t = at(schedule.sqrt_alpha_bar, t, X) * MEAN + X
    gaussian = gaussian_mixture([1.0], np.full((1, 2), MEAN), STD**2 * np.eye(2)[None])
    denoiser = lambda x, sigma: mixtures.denoise(gaussian, x, sigma)
    ours = denoising.ddpm_from_denoiser(denoiser, schedule, prediction)(x_t, t)
    expected = exact_denoiser(schedule, prediction, MEAN, STD)(x_t, t)
    # At t = 0 eps is a difference divided by 0.01.
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=5e-5)


def test_a_bfloat16_network_gives_a_float32_denoiser():
    denoiser = denoiser_from_ddpm(lambda x, t: x.astype(jnp.bfloat16), linear_schedule(10), "x0")
    assert denoiser(X, SIGMA).dtype == jnp.float32


# --- Noise levels and SDEs ---


def test_geometric_sigmas():
    sigmas = denoising.geometric_sigmas(1.0, 0.01, 10)
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.01, 10)
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], np.full(9, 0.01 ** (1 / 9)))
    np.testing.assert_array_equal(denoising.geometric_sigmas(0.5, 0.5, 1), [0.5])


SDES = {
    "ve": lambda: denoising.ve_sde(0.01, 50.0),
    "vp": lambda: denoising.vp_sde(),
    "sub_vp": lambda: denoising.sub_vp_sde(),
}


@pytest.mark.parametrize("name", SDES)
def test_the_marginals_solve_the_moment_equations(name):
    # d scale / dt = drift scale and d std^2 / dt = 2 drift std^2 + diffusion^2 (Ito), by autodiff.
    sde = SDES[name]()
    t = jnp.linspace(0.02, 1.0, 50)
    scale, d_scale = jax.jvp(sde.scale, (t,), (jnp.ones_like(t),))
    variance, d_variance = jax.jvp(lambda t: sde.std(t) ** 2, (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(d_scale, sde.drift(t) * scale, rtol=1e-5, atol=1e-6)
    expected = 2.0 * sde.drift(t) * variance + sde.diffusion(t) ** 2
    np.testing.assert_allclose(d_variance, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", SDES)
def test_the_ends_of_the_sdes(name):
    sde = SDES[name]()
    zero, one = jnp.float32(0.0), jnp.float32(1.0)
    assert float(sde.scale(zero)) == 1.0
    assert float(sde.std(zero)) == pytest.approx(0.01 if name == "ve" else 0.0, rel=1e-6)
    assert float(sde.std(one)) == pytest.approx(sde.prior_std, rel=1e-4)
    assert float(sde.scale(one)) < (1.1 if name == "ve" else 0.01)


def test_vp_is_the_limit_of_the_linear_schedule_of_ddpm():
    # beta_t = beta(t) / T with beta from 0.1 to 20 is 1e-4 to 0.02 at T = 1000.
    schedule, sde = linear_schedule(1000), denoising.vp_sde(0.1, 20.0)
    t = jnp.arange(1, 1001) / 1000.0
    np.testing.assert_allclose(schedule.sqrt_alpha_bar, sde.scale(t), rtol=0.04, atol=1e-4)


@pytest.mark.parametrize("name", SDES)
def test_the_score_along_an_sde_is_that_of_its_marginal(name):
    sde = SDES[name]()
    t = jnp.array([0.05, 0.1, 0.3, 0.5, 0.8, 1.0])
    scale, std = np.asarray(sde.scale(t), np.float64), np.asarray(sde.std(t), np.float64)
    gaussian = gaussian_mixture([1.0], np.full((1, 2), MEAN), STD**2 * np.eye(2)[None])
    score = denoising.sde_score(lambda x, sigma: mixtures.denoise(gaussian, x, sigma), sde)
    variance = (scale * STD) ** 2 + std**2
    expected = (scale[:, None] * MEAN - np.asarray(X)) / variance[:, None]
    # float32: A(x) - x is divided by std^2, which is 2e-4 for the VE SDE at t = 0.05.
    np.testing.assert_allclose(score(X, t), expected, rtol=5e-4, atol=1e-3)


# --- Traces ---


def curved(x):
    """A map whose Jacobian is full and depends on x; [B, 2, 2] -> [B, 2, 2]."""
    return jnp.sin(x) * jnp.cumsum(x, axis=1) + jnp.swapaxes(x, 1, 2) ** 2


def full_traces(f, x):
    one = lambda x: f(x[None])[0]
    jacobian = jax.vmap(jax.jacrev(one))(x).reshape(x.shape[0], 4, 4)
    return jacobian, jnp.trace(jacobian, axis1=1, axis2=2)


def test_the_exact_trace_is_that_of_the_full_jacobian_with_one_call():
    x = jax.random.normal(jax.random.key(4), (3, 2, 2))
    counted, calls = network_calls(lambda x, t: curved(x))
    value, trace = jax.jit(lambda x: denoising.value_and_trace(lambda x: counted(x, jnp.zeros(3)), x))(x)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_allclose(value, curved(x), rtol=1e-6)
    np.testing.assert_allclose(trace, full_traces(curved, x)[1], rtol=1e-5)


def test_the_sliced_trace_is_the_quadratic_form():
    x, v, w = (jax.random.normal(k, (3, 2, 2)) for k in jax.random.split(jax.random.key(5), 3))
    value, sliced = denoising.value_and_sliced_trace(curved, x, jnp.stack([v, w]))
    jacobian, _ = full_traces(curved, x)
    forms = [jnp.einsum("bi,bij,bj->b", u, jacobian, u) for u in (v.reshape(3, 4), w.reshape(3, 4))]
    np.testing.assert_allclose(sliced, (forms[0] + forms[1]) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, curved(x), rtol=1e-6)


def test_conversions_are_traced_once_under_jit():
    traced = jax.jit(chex.assert_max_traces(denoiser_from_ddpm(lambda x, t: x, linear_schedule(9), "v"), n=1))
    for sigma in (0.1, 0.2):
        traced(X, jnp.full(6, sigma))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: denoiser_from_ddpm(lambda x, t: x, linear_schedule(9), "noise"),
            "unknown prediction 'noise'",
        ),
        (lambda: denoising.ddpm_times(linear_schedule(9), SIGMA, "exact"), "unknown rule for times 'exact'"),
        (lambda: denoising.geometric_sigmas(0.1, 1.0, 5), "0 < sigma_min <= sigma_max"),
        (lambda: denoising.geometric_sigmas(1.0, 0.1, 1), "ask for more"),
        (lambda: denoising.ve_sde(1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: denoising.vp_sde(0.0, 20.0), "0 < beta_min <= beta_max"),
        (lambda: denoising.sub_vp_sde(20.0, 0.1), "0 < beta_min <= beta_max"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
