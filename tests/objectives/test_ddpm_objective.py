import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser
from scipy import integrate, stats

from jaxgen.objectives import ddpm
from jaxgen.processes import cosine_schedule, linear_schedule, q_posterior, q_sample, respace, v_target
from jaxgen.types import Mean, UserError

LN2 = np.log(2.0)
SHORT = linear_schedule(8, 0.02, 0.6)


def levels(num_levels):
    return jnp.linspace(-1.0, 1.0, num_levels)


# --- The mathematics, without a network ---


def test_simple_loss_is_the_mean_over_dimensions():
    target = jnp.arange(12.0).reshape(2, 2, 3)
    output = jnp.zeros((2, 2, 3)).at[1].set(target[1] + 2.0)
    np.testing.assert_allclose(ddpm.simple_loss(target, output), [55.0 / 6.0, 4.0], rtol=1e-6)


def test_gaussian_kl_against_numerical_integration():
    for mean1, std1, mean2, std2 in [(0.3, 0.5, -0.2, 1.5), (1.0, 2.0, 1.0, 2.0), (0.0, 2.0, 1.0, 0.7)]:
        p, q = stats.norm(mean1, std1), stats.norm(mean2, std2)
        expected = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -25, 25)[0]
        ours = ddpm.gaussian_kl(mean1, jnp.log(std1**2), mean2, jnp.log(std2**2))
        np.testing.assert_allclose(ours, expected, atol=1e-6)


log_likelihood = jax.jit(ddpm.discretized_gaussian_log_likelihood, static_argnums=3)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_discretized_likelihood_sums_to_one_over_the_levels(num_levels):
    scales, means = [1e-3, 0.01, 0.3, 3.0], [-1.3, -0.5, 0.0, 0.4321, 1.0]
    x, scale, mean = np.meshgrid(levels(num_levels), scales, means, indexing="ij")
    log_p = log_likelihood(jnp.asarray(x), jnp.asarray(mean), jnp.log(scale), num_levels)
    # Bins narrow against the scale (1/255 in 3) are differences of close numbers: 6e-8 / (bin / scale).
    np.testing.assert_allclose(jnp.exp(log_p).sum(axis=0), np.ones((4, 5)), atol=1e-4)


def test_discretized_likelihood_is_the_integral_over_the_bin_far_into_the_tails():
    x, scale, mean = np.meshgrid(np.linspace(-1, 1, 17), [0.005, 0.05, 1.0], [-0.9, 0.03, 0.5], indexing="ij")
    ours = log_likelihood(*(jnp.asarray(a, jnp.float32) for a in (x, mean, np.log(scale))), 17)
    low, high = (x - 1 / 16 - mean) / scale, (x + 1 / 16 - mean) / scale
    low[0], high[-1] = -np.inf, np.inf
    left = stats.norm.logcdf(np.where(low + high > 0, -high, low))
    right = stats.norm.logcdf(np.where(low + high > 0, -low, high))
    expected = right + np.log(-np.expm1(left - right))
    assert expected.min() < -60_000
    # The rounding of (x - mean) / scale is squared, so the error is relative.
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_discretized_likelihood_has_a_useful_gradient_everywhere():
    x, log_scale = (jnp.asarray(a) for a in np.meshgrid(levels(256), [-7.0, -4.6, 0.0], indexing="ij"))
    mean = jnp.full_like(x, 0.25)
    total = lambda mean, log_scale: log_likelihood(x, mean, log_scale, 256).sum()
    slope, slope_of_scale = jax.jit(jax.grad(total, argnums=(0, 1)))(mean, log_scale)
    assert np.all(np.isfinite(slope))
    assert np.all(np.isfinite(slope_of_scale))
    # The likelihood grows as the mean comes nearer to x.
    far = np.abs(np.asarray(x) - 0.25) > 0.01
    assert np.all(np.sign(slope)[far] == np.sign(np.asarray(x) - 0.25)[far])


def test_prior_kl_is_the_kl_of_the_last_marginal():
    for schedule in (SHORT, linear_schedule(1000), cosine_schedule(1000)):
        x0 = jnp.array([[0.0, 0.0], [1.0, -0.5]])
        ab = np.float64(schedule.alpha_bar[-1])
        expected = 0.5 * (ab * np.square(x0) - ab - np.log1p(-ab)).sum(axis=1)
        np.testing.assert_allclose(ddpm.prior_kl(schedule, x0), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_terms_are_the_kl_between_the_two_reverse_steps_and_the_decoder(variance):
    t = jnp.arange(8)
    x0, x_t, x0_hat = (0.5 * jax.random.normal(k, (8, 3)) for k in jax.random.split(jax.random.key(0), 3))
    x0 = jnp.round(x0 * 8) / 8
    vlb_term = functools.partial(ddpm.vlb_term, variance=variance, num_levels=17)
    terms = jax.jit(vlb_term)(SHORT, x0, x_t, t, x0_hat)
    mean, q_variance, _ = (np.asarray(a, np.float64) for a in q_posterior(SHORT, x0, x_t, t))
    p_mean = np.asarray(q_posterior(SHORT, x0_hat, x_t, t)[0], np.float64)
    width = np.asarray(SHORT.posterior_variance if variance == "fixed_small" else SHORT.beta, np.float64)
    for i in range(1, 8):
        ratio = q_variance[i] / width[i]
        kl = 0.5 * (ratio - 1 - np.log(ratio) + (mean[i] - p_mean[i]) ** 2 / width[i])
        np.testing.assert_allclose(terms[i], kl.sum(), rtol=2e-5)
    decoder = stats.norm(np.asarray(x0_hat[0]), np.sqrt(float(SHORT.posterior_variance[1])))
    mass = decoder.cdf(np.asarray(x0[0]) + 1 / 16) - decoder.cdf(np.asarray(x0[0]) - 1 / 16)
    np.testing.assert_allclose(terms[0], -np.log(mass).sum(), rtol=2e-5)


# --- The bound, with exact denoisers ---


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_of_gaussian_data_has_its_closed_form(variance):
    mean, std, schedule = 0.1, 0.4, linear_schedule(20, 1e-3, 0.4)
    denoiser = exact_denoiser(schedule, "v", mean, std)
    bits_per_dim = ddpm.make_bits_per_dim(
        lambda params, x_t, t, label, key: denoiser(x_t, t),
        schedule,
        prediction="v",
        variance=variance,
        num_levels=256,
        clip=False,
    )
    x0 = mean + std * jax.random.normal(jax.random.key(0), (400, 16))
    terms = jax.jit(bits_per_dim)({}, {"image": x0}, jax.random.key(1))["terms"].value
    # E |x0 - x0_hat|^2 is the posterior variance of x0 given x_t.
    ab = np.asarray(schedule.alpha_bar, np.float64)
    error = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
    small = np.asarray(schedule.posterior_variance, np.float64)[1:]
    width = small if variance == "fixed_small" else np.asarray(schedule.beta, np.float64)[1:]
    square = np.asarray(schedule.posterior_mean_x0, np.float64)[1:] ** 2 * error[1:] / width
    expected = 0.5 * (small / width - 1 - np.log(small / width) + square) / LN2
    # The squared error of 6400 dimensions is a chi-square: its relative standard error is sqrt(2 / 6400).
    tolerance = 4 * np.sqrt(2 / 6400) * 0.5 * square / LN2
    assert np.all(np.abs(np.asarray(terms)[1:] - expected) < tolerance)


def discrete_gaussian():
    """17 levels with Gaussian masses."""
    p = stats.norm(0.2, 0.4).pdf(np.linspace(-1, 1, 17))
    return p / p.sum()


def bound_by_quadrature(schedule, p, variance="fixed_small"):
    """The expected bound in nats for discrete 1-D data and its exact denoiser; no sampling anywhere."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    t, k, q = (
        jnp.asarray(a.ravel())
        for a in np.meshgrid(np.arange(schedule.num_steps), np.arange(17), np.arange(24), indexing="ij")
    )

    @jax.jit
    def terms():
        x0 = levels(17)[k][:, None]
        x_t = q_sample(schedule, x0, t, jnp.asarray(nodes, jnp.float32)[q][:, None])
        ab = schedule.alpha_bar[t][:, None]
        distance = (x_t - jnp.sqrt(ab) * levels(17)[None]) ** 2
        log_posterior = jnp.log(jnp.asarray(p, jnp.float32))[None] - distance / (2 * (1 - ab))
        x0_hat = jax.nn.softmax(log_posterior, axis=1) @ levels(17)
        return ddpm.vlb_term(schedule, x0, x_t, t, x0_hat[:, None], variance=variance, num_levels=17)

    weight = p[np.asarray(k)] * (weights / weights.sum())[np.asarray(q)]
    prior = (p * np.asarray(ddpm.prior_kl(schedule, levels(17)[:, None]))).sum()
    return (weight * np.asarray(terms(), np.float64)).sum() + prior


def test_the_bound_comes_down_to_the_entropy_as_steps_are_added():
    # No model of the data has a negative log-likelihood below the entropy; the exact denoiser reaches it.
    p = discrete_gaussian()
    entropy = -(p * np.log(p)).sum()
    gaps = [bound_by_quadrature(cosine_schedule(steps), p) - entropy for steps in (200, 400, 800)]
    # Measured 0.496, 0.212, 0.100 nats of 2.519: an error of the order of 1 / T.
    assert 0.0 < gaps[2] < 0.05 * entropy
    assert gaps[2] < 0.6 * gaps[1] < 0.6 * 0.6 * gaps[0]


@pytest.mark.parametrize("num_steps", [5, 25, 100])
def test_no_bound_is_below_the_entropy(num_steps):
    p = discrete_gaussian()
    entropy = -(p * np.log(p)).sum()
    for variance in ("fixed_small", "fixed_large"):
        assert bound_by_quadrature(cosine_schedule(num_steps), p, variance) > entropy


def test_the_bound_is_above_the_likelihood_of_the_model_by_brute_force():
    # Any denoiser defines a model; p(x_0) of a 1-D one is a chain of integrals, done on a grid.
    schedule, num_levels, x = linear_schedule(5, 0.05, 0.7), 5, levels(5)
    denoise = lambda x_t, t: jnp.tanh(1.5 * x_t + 0.1 * t[:, None])
    grid = np.linspace(-7.0, 7.0, 1401)
    spacing = grid[1] - grid[0]

    @jax.jit
    def reverse_means(t):
        x_t, t = jnp.asarray(grid, jnp.float32)[:, None], jnp.full(len(grid), t)
        return q_posterior(schedule, denoise(x_t, t), x_t, t)[0][:, 0]

    density = stats.norm.pdf(grid)  # of x_T
    for t in range(4, 0, -1):
        mean = np.asarray(reverse_means(t), np.float64)
        step = stats.norm.pdf(grid[:, None], mean[None], np.sqrt(float(schedule.posterior_variance[t])))
        density = step @ density * spacing
    decoder = stats.norm(
        np.asarray(reverse_means(0), np.float64), np.sqrt(float(schedule.posterior_variance[1]))
    )
    edges = np.array([-np.inf, -0.75, -0.25, 0.25, 0.75, np.inf])
    likelihood = np.array([
        ((decoder.cdf(high) - decoder.cdf(low)) * density).sum() * spacing
        for low, high in itertools.pairwise(edges)
    ])  # fmt: skip
    np.testing.assert_allclose(likelihood.sum(), 1.0, atol=1e-4)  # the grid's error

    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    k, t, q = (jnp.asarray(a.ravel()) for a in np.meshgrid(*map(np.arange, (5, 5, 64)), indexing="ij"))

    @jax.jit
    def terms():
        x0 = x[k][:, None]
        x_t = q_sample(schedule, x0, t, jnp.asarray(nodes, jnp.float32)[q][:, None])
        options = {"variance": "fixed_small", "num_levels": num_levels}
        return ddpm.vlb_term(schedule, x0, x_t, t, denoise(x_t, t), **options), ddpm.prior_kl(
            schedule, x[:, None]
        )

    values, prior = (np.asarray(a, np.float64) for a in terms())
    bound = (values.reshape(5, 5, 64) @ (weights / weights.sum())).sum(axis=1) + prior
    assert np.all(bound > -np.log(likelihood))
    assert np.all(bound < -np.log(likelihood) + 5.0)


# --- The loss and the evaluation, with a network ---

IMAGES = jnp.round(8 * jax.random.uniform(jax.random.key(7), (6, 4, 4, 1), minval=-1, maxval=1)) / 8


def network(params, x_t, t, label, key):
    """A network that uses all that it is given."""
    out = jnp.tanh(params["w"] * x_t + 0.1 * t[:, None, None, None])
    if label is not None:
        out = out + 0.1 * label[:, None, None, None]
    if key is not None:
        out = out * (1.0 + 0.1 * jax.random.normal(key, x_t.shape))
    return out


PARAMS = {"w": jnp.float32(0.7)}
OPTIONS = {
    "eps": {},
    "x0": {"prediction": "x0"},
    "v": {"prediction": "v"},
    "vlb_eps": {"loss": "vlb", "num_levels": 17},
    "vlb_x0": {"prediction": "x0", "loss": "vlb", "num_levels": 17},
    "vlb_v": {"prediction": "v", "loss": "vlb", "num_levels": 17},
    "vlb_large": {"loss": "vlb", "num_levels": 17, "variance": "fixed_large"},
    "vlb_256": {"loss": "vlb", "num_levels": 256},
    "labels": {"num_classes": 10},
    "labels_dropped": {"num_classes": 10, "label_dropout": 0.5},
}


def test_every_option_gives_another_loss_and_a_finite_gradient():
    batch, state = {"image": IMAGES, "label": jnp.arange(6)}, {"s": jnp.ones(2)}
    losses = {name: ddpm.make_loss(network, SHORT, **options) for name, options in OPTIONS.items()}

    @jax.jit  # all in one program, which compiles faster than ten
    def values_and_gradients(key):
        return {
            name: jax.value_and_grad(loss, has_aux=True)(PARAMS, state, batch, key)
            for name, loss in losses.items()
        }

    with jax.debug_key_reuse(False):  # the losses are compared on the same draws
        results = values_and_gradients(jax.random.key(0))
    for (value, (metrics, new_state)), gradient in results.values():
        assert np.isfinite(gradient["w"])
        assert gradient["w"] != 0.0
        np.testing.assert_allclose(value, metrics["loss"].value, rtol=1e-6)
        assert metrics["loss"].count == 6
        np.testing.assert_array_equal(new_state["s"], np.ones(2))
    assert len({round(float(value), 5) for (value, _), _ in results.values()}) == len(OPTIONS)


def test_a_network_that_knows_the_target_has_no_loss_to_speak_of():
    # All the examples are one image, so that x_t gives eps away.
    image = jnp.full((64, 2), 0.5)

    def oracle(prediction):
        def apply(params, x_t, t, label, key):
            ab = SHORT.alpha_bar[t][:, None]
            eps = (x_t - jnp.sqrt(ab) * image) / jnp.sqrt(1 - ab)
            return {"eps": eps, "x0": image, "v": v_target(SHORT, image, t, eps)}[prediction]

        return apply

    @jax.jit
    def losses(key):
        return {
            (prediction, loss): ddpm.make_loss(
                oracle(prediction), SHORT, prediction=prediction, loss=loss, num_levels=17
            )({}, {}, {"image": image}, key)[0]
            for prediction in ("eps", "x0", "v")
            for loss in ("simple", "vlb")
        }

    with jax.debug_key_reuse(False):  # the losses are compared on the same draws
        values = losses(jax.random.key(0))
    for (prediction, loss), value in values.items():
        if loss == "simple":
            assert 0.0 <= value < 1e-9
        else:  # what is left is the decoder, which is wider than the bins, at the times that are 0
            np.testing.assert_allclose(value, values["x0", "vlb"], rtol=1e-3, err_msg=prediction)
    assert 0.0 < values["x0", "vlb"] < 2.0


def test_the_times_and_the_noise_are_drawn_as_the_algorithm_says():
    seen = {}

    def spy(params, x_t, t, label, key):
        seen.update(x_t=x_t, t=t, label=label, key=key)
        return jnp.zeros_like(x_t)

    n = 8000
    batch = {"image": jnp.full((n, 2), 0.3), "label": jnp.full(n, 4)}
    schedule = respace(linear_schedule(1000), 8)
    loss = ddpm.make_loss(spy, schedule, num_classes=10, label_dropout=0.2)
    value, _ = loss({}, {}, batch, jax.random.key(0))
    # Zero output leaves |eps|^2: mean 1, standard error sqrt(2 / 16000).
    assert abs(float(value) - 1) < 4 * np.sqrt(2 / (2 * n))
    # The network is asked at the times of the schedule that it was trained on, each equally often (4 SE).
    times, counts = np.unique(seen["t"], return_counts=True)
    np.testing.assert_array_equal(times, schedule.timestep)
    assert np.all(np.abs(counts / n - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / n))
    for t, ab in zip(times, np.asarray(schedule.alpha_bar), strict=True):
        x_t = np.asarray(seen["x_t"])[np.asarray(seen["t"]) == t]
        assert abs(x_t.mean() - np.sqrt(ab) * 0.3) < 4 * np.sqrt((1 - ab) / x_t.size)
        assert abs(x_t.std() - np.sqrt(1 - ab)) < 4 * np.sqrt((1 - ab) / (2 * x_t.size))
    dropped = np.asarray(seen["label"]) == 10
    assert set(np.unique(seen["label"]).tolist()) == {4, 10}
    assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / n)
    assert seen["key"] is not None


def test_labels_are_given_only_to_conditional_models():
    seen = []

    def spy(params, x_t, t, label, key):
        seen.append(label)
        return x_t

    batch = {"image": IMAGES, "label": jnp.arange(6)}
    ddpm.make_loss(spy, SHORT)({}, {}, batch, jax.random.key(0))
    assert seen.pop() is None
    ddpm.make_loss(spy, SHORT, num_classes=6, label_dropout=0.0)({}, {}, batch, jax.random.key(0))
    np.testing.assert_array_equal(seen.pop(), np.arange(6))
    with pytest.raises(UserError, match="no labels"):
        ddpm.make_loss(spy, SHORT, num_classes=6)({}, {}, {"image": IMAGES}, jax.random.key(0))
    with pytest.raises(UserError, match="no labels"):
        ddpm.make_bits_per_dim(spy, SHORT, num_classes=6, num_levels=17)(
            {}, {"image": IMAGES}, jax.random.key(0)
        )


def test_masked_examples_count_for_nothing_even_when_not_finite():
    loss = jax.jit(ddpm.make_loss(network, SHORT))
    poisoned = IMAGES.at[4:].set(jnp.nan)
    mask = jnp.array([1.0, 1, 1, 1, 0, 0])
    value, (metrics, _) = loss(PARAMS, {}, {"image": poisoned, "mask": mask}, jax.random.key(0))
    clean, _ = loss(PARAMS, {}, {"image": IMAGES, "mask": mask}, jax.random.key(0))
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    assert metrics["loss"].count == 4
    assert loss(PARAMS, {}, {"image": poisoned, "mask": 0 * mask}, jax.random.key(0))[0] == 0.0

    evaluate = jax.jit(ddpm.make_bits_per_dim(network, SHORT, num_levels=17))
    masked = evaluate(PARAMS, {"image": poisoned, "mask": mask}, jax.random.key(1))
    short = evaluate(PARAMS, {"image": IMAGES[:4]}, jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, short)
    assert masked["bits_per_dim"].count == 4
    np.testing.assert_array_equal(masked["terms"].count, np.full(8, 4.0))


def test_bits_per_dim_is_the_sum_of_its_terms():
    evaluate = jax.jit(ddpm.make_bits_per_dim(network, SHORT, num_levels=17, prediction="v"))
    means = evaluate(PARAMS, {"image": IMAGES}, jax.random.key(1))
    assert all(isinstance(m, Mean) for m in means.values())
    values = {name: np.asarray(m.value) for name, m in means.items()}
    assert values["terms"].shape == (8,)
    np.testing.assert_allclose(values["distortion_bits_per_dim"], values["terms"][0], rtol=1e-6)
    np.testing.assert_allclose(values["rate_bits_per_dim"], values["terms"][1:].sum(), rtol=1e-5)
    prior = ddpm.prior_kl(SHORT, IMAGES).mean() / (16 * LN2)
    np.testing.assert_allclose(values["prior_bits_per_dim"], prior, rtol=1e-5)
    np.testing.assert_allclose(values["bits_per_dim"], values["terms"].sum() + prior, rtol=1e-5)


def test_the_bound_asks_the_network_once_a_step_with_fresh_noise():
    seen = []

    def spy(params, x_t, t, label, key):
        assert key is None
        jax.debug.callback(lambda *args: seen.append([np.asarray(a) for a in args]), x_t, t, ordered=True)
        return x_t

    schedule = respace(linear_schedule(1000), 6)
    evaluate = jax.jit(ddpm.make_bits_per_dim(spy, schedule, num_levels=17))
    jax.block_until_ready(evaluate({}, {"image": jnp.zeros((3, 500))}, jax.random.key(0)))
    jax.effects_barrier()
    np.testing.assert_array_equal([t for _, t in seen], np.tile(schedule.timestep[:, None], 3))
    noise = np.concatenate([x_t for x_t, _ in seen])  # of 6 times and 3 examples, scaled
    # 4 standard errors of a correlation of 500 pairs, and of a standard deviation.
    assert np.abs(np.corrcoef(noise) - np.eye(18)).max() < 4 / np.sqrt(500)
    scale = np.repeat(np.asarray(schedule.sqrt_one_minus_alpha_bar), 3)
    assert np.abs(noise.std(axis=1) / scale - 1).max() < 4 / np.sqrt(2 * 500)


def test_the_vlb_loss_estimates_the_bound():
    # Without dropout, the expectation of the loss over t and noise is the bound less L_T, in nats/dim.
    clean = lambda params, x_t, t, label, key: network(params, x_t, t, label, None)
    options = {"prediction": "x0", "num_levels": 17}
    batch = {"image": jnp.tile(IMAGES, (3000, 1, 1, 1))}
    loss = jax.jit(ddpm.make_loss(clean, SHORT, loss="vlb", **options))
    value, (metrics, _) = loss(PARAMS, {}, batch, jax.random.key(0))
    evaluate = jax.jit(ddpm.make_bits_per_dim(clean, SHORT, clip=False, **options))
    means = evaluate(PARAMS, batch, jax.random.key(1))
    expected = float(means["rate_bits_per_dim"].value + means["distortion_bits_per_dim"].value) * LN2
    # A term drawn at random among 8 has at most sqrt(8 - 1) times the spread of their mean's value.
    assert abs(float(value) - expected) < 4 * np.sqrt(7) * expected / np.sqrt(18_000)
    assert metrics["loss"].count == 18_000


def test_clipping_changes_the_bound_of_a_network_that_leaves_the_range():
    wild = lambda params, x_t, t, label, key: 3.0 * x_t
    values = []
    for clip in (True, False):
        evaluate = ddpm.make_bits_per_dim(wild, SHORT, prediction="x0", num_levels=17, clip=clip)
        values.append(
            float(jax.jit(evaluate)({}, {"image": IMAGES}, jax.random.key(0))["bits_per_dim"].value)
        )
    assert values[0] < values[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddpm.make_loss(network, SHORT, loss="hybrid"), "unknown loss 'hybrid'"),
        (lambda: ddpm.make_loss(network, SHORT, loss="vlb"), "num_levels >= 2"),
        (lambda: ddpm.make_loss(network, SHORT, loss="vlb", num_levels=1), "num_levels >= 2"),
        (lambda: ddpm.make_bits_per_dim(network, SHORT, num_levels=1), "num_levels >= 2"),
        (lambda: ddpm.make_loss(network, SHORT, label_dropout=1.5, num_classes=3), r"must be in \[0, 1\]"),
        (lambda: ddpm.make_loss(network, SHORT, label_dropout=0.1), "needs a conditional model"),
        (
            lambda: ddpm.make_loss(network, SHORT, prediction="noise")(
                PARAMS, {}, {"image": IMAGES}, jax.random.key(0)
            ),
            "unknown prediction 'noise'",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
