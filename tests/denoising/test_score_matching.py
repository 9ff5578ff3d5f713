import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import network_calls

from jaxgen import denoising, mixtures
from jaxgen.denoising import over
from jaxgen.mixtures import gaussian_mixture
from jaxgen.objectives import score_matching as sm
from jaxgen.types import Mean, UserError

MIXTURE = gaussian_mixture(
    [0.3, 0.7], [[-1.0, 0.5], [2.0, -0.3]], [[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.6], [-0.6, 0.8]]]
)


def curved(x):
    """A score of no density, whose Jacobian is full and depends on x."""
    return jnp.sin(x) * jnp.cumsum(x, axis=1) - x


def smoothed_score(x, sigma):
    return mixtures.score(MIXTURE, x, sigma)


def data(n, seed=0):
    return mixtures.sample(MIXTURE, jax.random.key(seed), n)


def assert_mean_is_zero(values):
    """Within 4 standard errors."""
    values = np.asarray(values, np.float64)
    assert np.abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))


# --- The mathematics, without a network ---


def test_explicit_score_matching_against_the_full_jacobian():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    jacobian = jax.vmap(jax.jacrev(lambda x: curved(x[None])[0]))(x)
    expected = jnp.trace(jacobian, axis1=1, axis2=2) + 0.5 * jnp.sum(curved(x) ** 2, axis=1)
    np.testing.assert_allclose(sm.explicit_score_matching(curved, x), expected, rtol=1e-5, atol=1e-5)


def test_explicit_score_matching_is_the_fisher_divergence_up_to_a_constant():
    # Hyvärinen 2005, theorem 1: E [tr grad s + 1/2 |s|^2] = 1/2 E |s - grad log p|^2 - 1/2 E |grad log p|^2.
    x = data(20_000)
    true = smoothed_score(x, jnp.zeros(len(x)))
    for score in (curved, lambda x: -0.5 * x):
        fisher = 0.5 * jnp.sum((score(x) - true) ** 2 - true**2, axis=1)
        assert_mean_is_zero(sm.explicit_score_matching(score, x) - fisher)


@pytest.mark.parametrize("sliced", [sm.sliced_score_matching, sm.sliced_score_matching_vr])
def test_the_average_over_all_signs_is_explicit_score_matching(sliced):
    # E[v v^T] = I holds exactly over the 2^3 sign vectors, so there is no sampling error.
    x = jax.random.normal(jax.random.key(1), (4, 3))
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    mean = sliced(curved, x, jnp.broadcast_to(signs[:, None], (8, 4, 3)))
    np.testing.assert_allclose(mean, sm.explicit_score_matching(curved, x), rtol=1e-5, atol=2e-6)


def test_sliced_is_explicit_score_matching_in_expectation_and_reduced_variance_is_less():
    x = data(20_000)
    v = jax.random.normal(jax.random.key(2), (1, *x.shape))
    explicit = sm.explicit_score_matching(curved, x)
    plain = sm.sliced_score_matching(curved, x, v) - explicit
    reduced = sm.sliced_score_matching_vr(curved, x, v) - explicit
    assert_mean_is_zero(plain)
    assert_mean_is_zero(reduced)
    assert np.std(reduced) < 0.8 * np.std(plain)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_optimum_of_denoising_score_matching_is_the_smoothed_score(sigma):
    # Vincent 2011: E |s - target|^2 - E |s - s*|^2 does not depend on s, where s* = grad log (g_sigma * p).
    x = data(20_000)
    sigmas = jnp.full(len(x), sigma)
    noisy = x + sigma * jax.random.normal(jax.random.key(3), x.shape)
    best = smoothed_score(noisy, sigmas)
    at_best = sm.denoising_score_matching(best, x, noisy, sigmas)
    for score in (curved(noisy), -noisy, smoothed_score(noisy, 0.5 * sigmas)):
        excess = sm.denoising_score_matching(score, x, noisy, sigmas) - at_best
        fisher = 0.5 * jnp.sum((score - best) ** 2, axis=1)
        assert_mean_is_zero(excess - fisher)
        assert float(fisher.mean()) > 0.01  # the scores do differ


def test_a_denoising_autoencoder_is_denoising_score_matching():
    # Row G7: with s = (A(x~) - x~) / sigma^2 the losses differ by the factor 2 sigma^4 alone.
    x, reconstruction, eps = (jax.random.normal(k, (6, 2, 2)) for k in jax.random.split(jax.random.key(4), 3))
    sigma = jnp.array([0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
    noisy = x + over(sigma, x) * eps
    score = denoising.score_from_denoised(noisy, reconstruction, sigma)
    dsm = sm.denoising_score_matching(score, x, noisy, sigma)
    np.testing.assert_allclose(sm.dae_loss(x, reconstruction), 2.0 * sigma**4 * dsm, rtol=2e-5)


def test_the_noise_conditional_loss_is_weighted_by_sigma_squared():
    x, score, eps = (jax.random.normal(k, (6, 2, 2)) for k in jax.random.split(jax.random.key(5), 3))
    sigma = jnp.array([0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
    dsm = sm.denoising_score_matching(score, x, x + over(sigma, x) * eps, sigma)
    np.testing.assert_allclose(sm.noise_conditional_loss(score, eps, sigma), sigma**2 * dsm, rtol=1e-4)


def test_corruptions():
    x = jnp.full((2000, 3), 7.0)
    noise = np.asarray(sm.gaussian_corruption(0.5)(jax.random.key(6), x)) - 7.0
    assert np.abs(noise.mean()) < 4 * 0.5 / np.sqrt(6000)
    assert np.abs(noise.std() - 0.5) < 4 * 0.5 / np.sqrt(12_000)


# --- The losses ---


def affine(params, x, *_):
    return params["a"] * x + params["b"]


def gradients(loss_fn, params, batches, seed=8):
    """The mean over the batches of the loss's gradient, and its standard error."""

    @jax.jit
    @jax.vmap
    def gradient(x, key):
        return jax.grad(lambda p: loss_fn(p, {}, {"image": x}, key)[0])(params)

    each = gradient(batches, jax.random.split(jax.random.key(seed), len(batches)))
    flat = np.concatenate([np.asarray(leaf).reshape(len(batches), -1) for leaf in jax.tree.leaves(each)], 1)
    return flat.mean(axis=0), flat.std(axis=0) / np.sqrt(len(batches))


MEAN, STD = jnp.array([0.3, -1.0]), 0.5
LOSSES = {
    # name: (the loss, the variance of the smoothed data whose score it finds)
    "exact": (sm.make_score_matching_loss(affine), STD**2),
    "sliced": (sm.make_score_matching_loss(affine, trace="sliced", num_slices=2), STD**2),
    "sliced_vr": (sm.make_score_matching_loss(affine, trace="sliced_vr"), STD**2),
    "exact with noise": (sm.make_score_matching_loss(affine, noise_std=0.3), STD**2 + 0.09),
    "denoising": (sm.make_noise_conditional_loss(affine, [0.4]), STD**2 + 0.16),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_stationary_at_the_score_of_gaussian_data_and_nowhere_near(name):
    loss_fn, variance = LOSSES[name]
    batches = MEAN[None, None] + STD * jax.random.normal(jax.random.key(9), (200, 100, 2))
    best = {"a": jnp.full((1, 2), -1.0 / variance), "b": MEAN[None] / variance}
    gradient, error = gradients(loss_fn, best, batches)
    assert (np.abs(gradient) < 4 * error).all()
    gradient, error = gradients(loss_fn, {**best, "a": 0.5 * best["a"]}, batches)
    assert (np.abs(gradient) > 10 * error).all()


def test_a_denoising_autoencoder_is_stationary_at_the_posterior_mean():
    sigma = 0.4
    gain = STD**2 / (STD**2 + sigma**2)
    loss_fn = sm.make_dae_loss(affine, sm.gaussian_corruption(sigma))
    batches = MEAN[None, None] + STD * jax.random.normal(jax.random.key(10), (200, 100, 2))
    best = {"a": jnp.full((1, 2), gain), "b": (1.0 - gain) * MEAN[None]}
    gradient, error = gradients(loss_fn, best, batches)
    assert (np.abs(gradient) < 4 * error).all()
    gradient, error = gradients(loss_fn, {"a": jnp.ones((1, 2)), "b": jnp.zeros((1, 2))}, batches)
    assert (np.abs(gradient)[:2] > 10 * error[:2]).all()


def test_data_on_a_line_need_a_little_noise_for_the_loss_to_settle():
    # Row G7: s = -p x on data whose second coordinate is 0 has the loss -p_2 + p_2^2 E[x_2^2] / 2 there: it
    # falls for ever without noise, and settles at p_2 = 1e4 with noise N(0, 1e-4).
    batches = jax.random.normal(jax.random.key(11), (200, 100, 2)) * jnp.array([[[1.0, 0.0]]])
    precise = {"a": jnp.array([[-1.0, -1e4]]), "b": jnp.zeros((1, 2))}
    gradient, _ = gradients(sm.make_score_matching_loss(affine), precise, batches)
    np.testing.assert_allclose(gradient[1], 1.0, rtol=1e-6)  # d loss / d a_2, at any a_2 however large
    gradient, error = gradients(sm.make_score_matching_loss(affine, noise_std=0.01), precise, batches)
    assert np.abs(gradient[1]) < 4 * error[1]
    assert error[1] < 0.05


def test_each_level_is_drawn_equally_often_and_shown_to_the_network():
    sigmas, n = denoising.geometric_sigmas(10.0, 0.1, 4), 4000
    apply, calls = network_calls(lambda x, sigma: smoothed_score(x, sigma))
    loss_fn = sm.make_noise_conditional_loss(lambda params, x, sigma, key: apply(x, sigma), sigmas)
    loss, (metrics, state) = jax.jit(loss_fn)({}, {"kept": 1}, {"image": data(n)}, jax.random.key(12))
    jax.effects_barrier()
    (seen,) = calls
    levels, counts = np.unique(np.asarray(seen, np.float32), return_counts=True)
    np.testing.assert_allclose(levels, sigmas[::-1], rtol=1e-6)
    assert np.abs(counts / n - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / n)
    assert state == {"kept": 1}
    assert float(metrics["loss"].count) == n
    # lambda = sigma^2 makes levels alike: at most the noise's own 1/2 |eps|^2, whose mean is 1 in 2-D.
    assert 0.0 < float(loss) < 1.0


@pytest.mark.parametrize("name", [*LOSSES, "dae"])
def test_masked_examples_do_not_count(name):
    dae = sm.make_dae_loss(affine, sm.gaussian_corruption(0.5))
    loss_fn = dae if name == "dae" else LOSSES[name][0]
    params = {"a": jnp.full((1, 2), -2.0), "b": jnp.zeros((1, 2))}
    x = data(6)
    mask = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    spoilt = {"image": x.at[4:].set(jnp.nan), "mask": mask}
    run = jax.jit(lambda batch: loss_fn(params, {}, batch, jax.random.key(13)))
    loss, (metrics, _) = run(spoilt)
    expected, _ = run({"image": x.at[4:].set(3.0), "mask": mask})
    assert isinstance(metrics["loss"], Mean)
    assert float(metrics["loss"].count) == 4.0
    assert float(loss) == float(expected)
    nothing, _ = run({"image": x, "mask": jnp.zeros(6)})
    assert float(nothing) == 0.0


def test_more_slices_take_away_variance():
    x = jnp.broadcast_to(jnp.array([0.4, -1.2, 0.8]), (2000, 3))
    spread = {}
    for n in (1, 16):
        v = jax.random.rademacher(jax.random.key(n), (n, 2000, 3), jnp.float32)
        spread[n] = np.asarray(sm.sliced_score_matching_vr(curved, x, v)).std()
    # The standard deviation falls as 1 / sqrt(16); each is known to 1 / sqrt(4000) = 1.6 %.
    np.testing.assert_allclose(spread[1] / spread[16], 4.0, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sm.make_score_matching_loss(affine, trace="hutchinson"), "unknown trace 'hutchinson'"),
        (lambda: sm.make_score_matching_loss(affine, num_slices=0), "at least 1 slice"),
        (lambda: sm.make_score_matching_loss(affine, noise_std=-0.1), "cannot be negative"),
        (lambda: sm.make_noise_conditional_loss(affine, []), "list of positive numbers"),
        (lambda: sm.make_noise_conditional_loss(affine, [1.0, 0.0]), "list of positive numbers"),
        (lambda: sm.gaussian_corruption(0.0), "sigma > 0"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
