import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import denoising, mixtures
from jaxgen.denoising import over
from jaxgen.mixtures import gaussian_mixture
from jaxgen.objectives import continuous_time as ct
from jaxgen.objectives import score_matching as sm
from jaxgen.types import UserError

SDES = {"ve": denoising.ve_sde(0.05, 5.0), "vp": denoising.vp_sde(), "sub_vp": denoising.sub_vp_sde()}
MEAN, STD = 0.3, 0.5
MIXTURE = gaussian_mixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]])


def gaussian_score(sde, t, x, mean=MEAN, std=STD):
    """The score at t of the diffused N(mean, std^2), x [B, 1]."""
    scale, noise = sde.scale(t)[:, None], sde.std(t)[:, None]
    return (scale * mean - x) / (jnp.square(scale) * std**2 + jnp.square(noise))


@pytest.mark.parametrize("name", SDES)
def test_time_is_the_way_back_from_sigma(name):
    sde = SDES[name]
    t = jnp.linspace(0.01, 1.0, 40)
    # Near t = 0 the noise of VP is 1e-2, and float32's 1e-7 under its root becomes 1e-5.
    np.testing.assert_allclose(sde.time(sde.std(t) / sde.scale(t)), t, rtol=2e-4)


@pytest.mark.parametrize("name", SDES)
def test_the_exact_noise_makes_the_exact_denoiser(name):
    sde = SDES[name]

    def eps(x_t, t):
        denoised = mixtures.denoise(MIXTURE, x_t / over(sde.scale(t), x_t), sde.std(t) / sde.scale(t))
        return (x_t - over(sde.scale(t), x_t) * denoised) / over(sde.std(t), x_t)

    sigma = jnp.array([0.1, 0.5, 1.0, 4.0])
    x = jax.random.normal(jax.random.key(0), (4, 1)) * 2.0
    denoised = denoising.denoiser_from_sde_eps(eps, sde)(x, sigma)
    np.testing.assert_allclose(denoised, mixtures.denoise(MIXTURE, x, sigma), rtol=2e-3, atol=2e-4)


def test_the_loss_is_denoising_score_matching_with_its_weight():
    key = jax.random.key(1)
    x0, eps, eps_hat = (jax.random.normal(k, (5, 2, 3)) for k in jax.random.split(key, 3))
    t = jnp.array([0.1, 0.3, 0.5, 0.8, 1.0])
    std, weight = SDES["ve"].std(t), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    expected = weight * sm.denoising_score_matching(
        -eps_hat / over(std, x0), x0, x0 + over(std, x0) * eps, std
    )
    np.testing.assert_allclose(ct.continuous_loss(eps, eps_hat, weight, std), expected, rtol=1e-4)


@pytest.mark.parametrize("name", SDES)
def test_likelihood_weighting_measures_the_divergence(name):
    """KL(p_0 || q_0) = KL(p_1 || q_1) + int 1/2 g^2 E ||s_p - s_q||^2 dt (Song et al. 2021b, appendix A)."""
    sde, other_mean, other_std = SDES[name], 0.5, 0.6
    t_min = 0.01

    def divergence(t):
        scale, noise = float(sde.scale(t)), float(sde.std(t))
        p, q = (np.sqrt((scale * s) ** 2 + noise**2) for s in (STD, other_std))
        return np.log(q / p) + (p**2 + (scale * (MEAN - other_mean)) ** 2) / (2 * q**2) - 0.5

    def apply(params, x_t, t, key):
        mean, std = params
        return -over(sde.std(t), x_t) * gaussian_score(sde, t, x_t, mean, std)

    loss = ct.make_sde_loss(apply, sde, weighting="likelihood", t_min=t_min)

    @jax.jit
    @jax.vmap
    def excess(image, key):
        both = jnp.array([[other_mean, other_std], [MEAN, STD]])
        other, best = jax.vmap(lambda params: loss(params, {}, {"image": image}, key)[0])(both)
        return (other - best) * (1.0 - t_min)

    images = MEAN + STD * jax.random.normal(jax.random.key(2), (200, 2000, 1))
    each = np.asarray(excess(images, jax.random.split(jax.random.key(3), 200)), np.float64)
    error = each.std() / np.sqrt(len(each))
    expected = divergence(jnp.float32(t_min)) - divergence(jnp.float32(1.0))
    assert abs(each.mean() - expected) < 4 * error
    assert error < 0.05 * expected


@pytest.mark.parametrize("name", [*SDES, "edm"])
def test_the_losses_are_stationary_at_the_exact_network_of_gaussian_data(name):
    def factor_of_exact(params, x, sigma_or_t, key):
        if name == "edm":
            gain = STD**2 / (STD**2 + jnp.square(sigma_or_t))
            return params * (MEAN + over(gain, x) * (x - MEAN))
        sde = SDES[name]
        return -params * over(sde.std(sigma_or_t), x) * gaussian_score(sde, sigma_or_t, x)

    if name == "edm":
        loss = ct.make_edm_loss(factor_of_exact, sigma_data=STD)
    else:
        loss = ct.make_sde_loss(factor_of_exact, SDES[name], t_min=1e-2)
    images = MEAN + STD * jax.random.normal(jax.random.key(4), (200, 100, 1))

    @jax.jit
    def gradients(factor):
        keys = jax.random.split(jax.random.key(5), 200)
        gradient = jax.grad(lambda p, x, k: loss(p, {}, {"image": x}, k)[0])
        return jax.vmap(gradient, in_axes=(None, 0, 0))(factor, images, keys)

    for factor, is_best in ((1.0, True), (0.5, False)):
        each = np.asarray(gradients(jnp.float32(factor)), np.float64)
        error = each.std() / np.sqrt(len(each))
        assert (abs(each.mean()) < 4 * error) == is_best


def test_edm_preconditioning_gives_unit_variances():
    """Karras et al. 2022, appendix B.6, eqs. 114 to 138, for data N(0, sigma_data^2): in closed form."""
    sigma_data = 0.5
    sigma = jnp.array([0.002, 0.1, 0.5, 2.0, 80.0])
    c = denoising.edm_preconditioning(sigma, sigma_data)
    np.testing.assert_allclose(jnp.square(c.scale) * (sigma**2 + sigma_data**2), 1.0, rtol=1e-5)
    # The target (x0 - skip (x0 + sigma eps)) / out has the variance 1, and skip is what makes `out` least.
    target = (1 - c.skip) ** 2 * sigma_data**2 + (c.skip * sigma) ** 2
    np.testing.assert_allclose(target / c.out**2, 1.0, rtol=1e-3)
    # With F = 0 it is the best linear denoiser of that data.
    x = jax.random.normal(jax.random.key(6), (5, 2))
    denoiser = denoising.preconditioned_denoiser(lambda x, noise: jnp.zeros_like(x), sigma_data)
    gaussian = gaussian_mixture([1.0], [[0.0, 0.0]], sigma_data**2 * np.eye(2)[None])
    np.testing.assert_allclose(denoiser(x, sigma), mixtures.denoise(gaussian, x, sigma), rtol=1e-5, atol=1e-6)
    # lambda = 1 / out^2: the loss is that of F.
    x0, f = jnp.ones((5, 2)), jnp.full((5, 2), 0.3)
    denoised = over(c.skip, x) * x + over(c.out, x) * f
    network_target = (x0 - over(c.skip, x) * x) / over(c.out, x)
    np.testing.assert_allclose(
        ct.edm_loss(denoised, x0, sigma, sigma_data), jnp.sum((f - network_target) ** 2, axis=1), rtol=1e-3
    )


def test_the_network_sees_the_scaled_input_and_the_quarter_log():
    seen = {}

    def network(x, noise):
        seen.update(x=x, noise=noise)
        return jnp.ones_like(x)

    x = jnp.full((2, 3), 3.0)
    out = denoising.preconditioned_denoiser(network, 1.0)(x, jnp.array([1.0, np.sqrt(8.0)]))
    np.testing.assert_allclose(seen["x"][:, 0], [3 / np.sqrt(2), 1.0], rtol=1e-6)
    np.testing.assert_allclose(seen["noise"], [0.0, 0.25 * np.log(np.sqrt(8.0))], atol=1e-6)
    np.testing.assert_allclose(out[:, 0], [1.5 + 1 / np.sqrt(2), 1 / 3 + np.sqrt(8) / 3], rtol=1e-6)


def no_network(*args):
    raise AssertionError("called")


@pytest.mark.parametrize(
    "call",
    [
        lambda: ct.make_sde_loss(no_network, SDES["vp"], weighting="other"),
        lambda: ct.make_sde_loss(no_network, SDES["vp"], t_min=0.0),
        lambda: ct.make_edm_loss(no_network, sigma_data=0.0),
        lambda: ct.make_edm_loss(no_network, sigma_data=1.0, p_std=0.0),
        lambda: denoising.preconditioned_denoiser(no_network, 0.0),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)


def test_masked_examples_do_not_count():
    loss = ct.make_sde_loss(lambda params, x, t, key: jnp.zeros_like(x), SDES["vp"])
    image, mask = jnp.ones((4, 2)), jnp.array([1.0, 0.0, 1.0, 0.0])
    value, (metrics, _) = loss({}, {}, {"image": image, "mask": mask}, jax.random.key(7))
    assert float(metrics["loss"].count) == 2.0
    whole, _ = loss({}, {}, {"image": image, "mask": jnp.zeros(4)}, jax.random.key(7))
    assert float(value) > 0.0
    assert float(whole) == 0.0
