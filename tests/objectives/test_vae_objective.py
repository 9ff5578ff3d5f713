"""The bounds of VAEs on models whose evidence is known: linear Gaussian ones, of one layer and of two."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxgen.objectives import vae as objective
from jaxgen.objectives.vae import Gaussian, Networks
from jaxgen.types import UserError

STD = 0.5
RNG = np.random.default_rng(0)


def test_the_closed_form_kl_is_the_mean_log_ratio():
    """20,000 draws, within 4 standard errors; and the lectures' sum is twice it."""
    q = Gaussian(jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray([0.3, -2.0, 1.0]))
    z = objective.reparameterise(
        Gaussian(*(x[None] for x in q)), jax.random.normal(jax.random.key(0), (20_000, 3))
    )
    ratio = stats.norm.logpdf(z, q.mean, np.exp(0.5 * q.log_var)) - stats.norm.logpdf(z)
    kl = np.asarray(objective.gaussian_kl(q))
    assert np.all(np.abs(ratio.mean(axis=0) - kl) < 4 * ratio.std(axis=0) / math.sqrt(20_000))
    m, s = np.asarray(q.mean), np.asarray(q.log_var)
    assert 2 * kl.sum() == pytest.approx(np.sum(np.exp(s) - (1 + s) + m**2), rel=1e-6)
    np.testing.assert_allclose(objective.gaussian_kl(objective.standard(q.mean)), 0)


def test_the_normal_density_is_scipys():
    z, p = jnp.asarray([0.3, -2.0]), Gaussian(jnp.asarray([1.0, 0.5]), jnp.asarray([0.4, -1.0]))
    expected = stats.norm.logpdf(z, p.mean, np.exp(0.5 * p.log_var))
    np.testing.assert_allclose(objective.gaussian_log_prob(z, p), expected, rtol=1e-5)


# ---- likelihoods


def test_bernoulli_and_discretised_logistic_sum_to_one_over_all_images():
    binary = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3))).reshape(8, 1, 3, 1)
    logits = jnp.asarray([0.5, -2.0, 3.0]).reshape(1, 1, 3, 1)
    total = jnp.exp(objective.bernoulli_likelihood(1).log_prob(logits, binary)).sum()
    assert float(total) == pytest.approx(1, rel=1e-5)
    levels = np.linspace(-1, 1, 17)
    images = jnp.asarray(list(itertools.product(levels, repeat=2)), jnp.float32).reshape(-1, 1, 1, 2)
    outputs = jnp.asarray([0.3, -2.5, -2.0, -9.0]).reshape(1, 1, 1, 4)  # the second beyond all levels
    total = jnp.exp(objective.discretized_logistic_likelihood(2, 17).log_prob(outputs, images)).sum()
    assert float(total) == pytest.approx(1, rel=1e-5)


def test_the_gaussian_likelihood_is_the_lectures_squared_error():
    """C ||x - x'||^2 with C = 1 / (2 std^2), but for a constant: two outputs differ by just that."""
    x, first, second = (jnp.asarray(RNG.normal(size=(2, 3, 1, 2)), jnp.float32) for _ in range(3))
    likelihood = objective.gaussian_likelihood(2, STD)
    expected = stats.norm.logpdf(x, first, STD).reshape(2, -1).sum(axis=1)
    np.testing.assert_allclose(likelihood.log_prob(first, x), expected, rtol=1e-5)
    gap = likelihood.log_prob(first, x) - likelihood.log_prob(second, x)
    far, near = (np.square(np.asarray(x - y)).reshape(2, -1).sum(1) / (2 * STD**2) for y in (second, first))
    np.testing.assert_allclose(gap, far - near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bernoulli", "discretized_logistic", "gaussian"])
def test_draws_follow_the_likelihood(name):
    """10,000 draws of a pixel: each value's share, or the moments, within 4 standard errors."""
    num = 10_000
    if name == "gaussian":
        likelihood, outputs = objective.gaussian_likelihood(1, STD), jnp.full((num, 1, 1, 1), 0.2)
        drawn = np.asarray(likelihood.draw(jax.random.key(1), outputs))
        assert abs(drawn.mean() - 0.2) < 4 * STD / math.sqrt(num)
        assert abs(drawn.std() - STD) < 4 * STD / math.sqrt(2 * num)
        return
    if name == "bernoulli":
        likelihood, one, levels = objective.bernoulli_likelihood(1), [0.8], [-1.0, 1.0]
    else:
        likelihood, one = objective.discretized_logistic_likelihood(1, 5), [0.3, -1.0]
        levels = [-1.0, -0.5, 0.0, 0.5, 1.0]
    outputs = jnp.broadcast_to(jnp.asarray(one).reshape(1, 1, 1, -1), (num, 1, 1, len(one)))
    drawn = np.asarray(likelihood.draw(jax.random.key(1), outputs)).reshape(-1)
    for level in levels:
        p = math.exp(float(likelihood.log_prob(outputs[0], jnp.full((1, 1, 1), level))))
        assert abs((drawn == level).mean() - p) < 4 * math.sqrt(p * (1 - p) / num)


def test_the_mean_of_a_binary_pixel():
    likelihood = objective.bernoulli_likelihood(1)
    assert float(likelihood.mean(jnp.asarray([0.8]))[0]) == pytest.approx(2 / (1 + math.exp(-0.8)) - 1)


def test_binarised_pixels_are_as_bright_in_the_mean():
    grey = jnp.broadcast_to(jnp.asarray([-1.0, -0.4, 1.0])[None], (10_000, 3))
    binary = np.asarray(objective.binarise(jax.random.key(2), grey))
    assert set(np.unique(binary)) == {-1, 1}
    np.testing.assert_array_equal(binary[:, [0, 2]], grey[:, [0, 2]])
    assert abs((binary[:, 1] == 1).mean() - 0.3) < 4 * math.sqrt(0.21 / 10_000)


# ---- a linear Gaussian model: x = W z + b + STD e; W's columns are orthogonal, so its posterior is diagonal


W = np.linalg.qr(RNG.normal(size=(4, 2)))[0] * [1.5, 0.7]
OFFSET = np.asarray([0.1, -0.2, 0.3, 0.0])
EVIDENCE = stats.multivariate_normal(OFFSET, W @ W.T + STD**2 * np.eye(4))
ROWS = RNG.multivariate_normal(EVIDENCE.mean, EVIDENCE.cov, 5)
X = jnp.asarray(ROWS.reshape(5, 2, 2, 1), jnp.float32)
LIKELIHOOD = objective.gaussian_likelihood(1, STD)


def _decode(params, z, label):
    return (z @ params["w"].T + params["b"][None]).reshape(-1, 2, 2, 1)


def _linear_encode(params, x, label):
    mean = x.reshape(x.shape[0], -1) @ params["a"].T + params["c"][None]
    return Gaussian(mean, jnp.broadcast_to(params["log_var"][None], mean.shape))


NETWORKS = Networks(encode=_linear_encode, decode=_decode, latent_sizes=(2,))


def _exact(w, b):
    """The parameters whose q(z|x) is the posterior: precision I + W^T W / STD^2, diagonal."""
    precision = 1 + np.sum(w**2, axis=0) / STD**2
    a = (w / STD**2 / precision).T
    params = {"w": w, "b": b, "a": a, "c": -a @ b, "log_var": -np.log(precision)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


EXACT = _exact(W, OFFSET)
# A q that is off: its importance weights vary, and its ELBO is below the evidence.
WRONG = {**EXACT, "c": EXACT["c"] + 0.3, "log_var": EXACT["log_var"] + 0.5}


@functools.partial(jax.jit, static_argnames="num")
def _log_weights(params, key, num):
    q = NETWORKS.encode(params, X, None)
    draws = objective.draw_posterior(NETWORKS, params, key, q, num)
    return objective.log_likelihoods(NETWORKS, LIKELIHOOD, params, draws.z, X, None) - draws.log_ratio


def test_with_the_exact_posterior_every_weight_is_the_evidence():
    log_w = _log_weights(EXACT, jax.random.key(0), 3)
    np.testing.assert_allclose(log_w, np.broadcast_to(EVIDENCE.logpdf(ROWS), (3, 5)), rtol=1e-4)


def test_importance_sampling_with_another_proposal_gives_the_evidence():
    """20,000 samples: log-mean-exp within 4 standard errors, std(w) / mean(w) / sqrt(k)."""
    estimate = objective.make_log_evidence(NETWORKS, LIKELIHOOD, num_samples=20_000, chunk=6000)
    found = jax.jit(estimate)(WRONG, X, None, jax.random.key(1))
    w = np.exp(np.asarray(_log_weights(WRONG, jax.random.key(2), 5000), np.float64))
    error = w.std(axis=0) / w.mean(axis=0) / math.sqrt(20_000)
    assert np.all(np.abs(found - EVIDENCE.logpdf(ROWS)) < 4 * error)
    assert np.all(error < 0.02)


def test_the_iwae_bound_rises_with_k_from_the_elbo_to_the_evidence():
    """2,000 bounds for each k, the mean over 5 images; the steps are far above the standard errors."""
    exact, bounds, errors = EVIDENCE.logpdf(ROWS).mean(), [], []
    log_w = np.asarray(_log_weights(WRONG, jax.random.key(3), 64_000))
    bound_of = jax.jit(objective.iwae_bound)
    for k in (1, 4, 32):
        each = np.asarray(bound_of(log_w.reshape(k, -1, 5))).mean(axis=1)
        bounds.append(each.mean())
        errors.append(each.std() / math.sqrt(len(each)))
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] < exact + 4 * errors[-1]
    assert exact - bounds[-1] < 0.1 * (exact - bounds[0])
    q = NETWORKS.encode(WRONG, X, None)
    mean = np.asarray(q.mean @ WRONG["w"].T + WRONG["b"][None])
    spread = np.sum(np.asarray(jnp.exp(WRONG["log_var"])) * np.sum(W**2, axis=0))
    distortion = -stats.norm.logpdf(ROWS, mean, STD).sum(axis=1) + spread / (2 * STD**2)
    elbo = -objective.negative_elbo(-distortion, np.asarray(objective.gaussian_kl(q)).sum(axis=1)).mean()
    assert abs(bounds[0] - elbo) < 4 * errors[0]


def test_chunks_change_nothing_and_do_not_count_beyond_the_number():
    weights = lambda key, num: jax.random.normal(key, (num, 3))
    key = jax.random.key(4)
    of = jax.jit(
        lambda num, chunk: objective.log_mean_weight(weights, key, num_samples=num, chunk=chunk),
        static_argnums=(0, 1),
    )
    found = of(10, 4)
    whole = jnp.concatenate([weights(jax.random.fold_in(key, i), 4) for i in range(3)])[:10]
    np.testing.assert_allclose(found, objective.iwae_bound(whole), rtol=1e-5)
    single = of(2, 50)
    np.testing.assert_allclose(
        single, objective.iwae_bound(weights(jax.random.fold_in(key, 0), 2)), rtol=1e-5
    )
    with pytest.raises(UserError, match="at least 1 sample"):
        objective.log_mean_weight(weights, key, num_samples=0, chunk=4)


def test_a_linear_gaussian_vae_reaches_the_exact_evidence():
    """Adam on the ELBO of 300 points from a random start, against the best model of its kind in closed form.

    With STD fixed, the best covariance is that of the data with each of the first two variances, and STD^2
    for the others (Tipping & Bishop 1999); the trained model's own evidence must come within 0.01 nats of it,
    and its ELBO as near to that: the posterior is of q's kind.
    """
    data = RNG.multivariate_normal(EVIDENCE.mean, EVIDENCE.cov, 300)
    mean, covariance = data.mean(axis=0), np.cov(data.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    kept = np.where(np.arange(4) >= 2, np.maximum(values, STD**2), STD**2)
    best = stats.multivariate_normal(mean, vectors @ np.diag(kept) @ vectors.T).logpdf(data).mean()
    loss = objective.make_loss(NETWORKS, LIKELIHOOD, num_samples=4)
    batch = {"image": jnp.asarray(data.reshape(300, 2, 2, 1), jnp.float32)}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 1200))
    shapes = {"w": (4, 2), "b": (4,), "a": (2, 4), "c": (2,), "log_var": (2,)}
    start = {name: jnp.asarray(0.3 * RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    @jax.jit
    def fit(params):
        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(5), number)
            slope, _ = jax.grad(loss, has_aux=True)(params, {}, batch, key)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1200))
        return params

    params = fit(start)
    w, b = (np.asarray(params[name], np.float64) for name in ("w", "b"))
    reached = stats.multivariate_normal(b, w @ w.T + STD**2 * np.eye(4)).logpdf(data).mean()
    assert best - 0.01 < reached <= best + 1e-5
    many = objective.make_loss(NETWORKS, LIKELIHOOD, num_samples=200)  # 60,000 draws: an error of 0.006
    value, _ = jax.jit(many)(params, {}, batch, jax.random.key(6))
    assert -float(value) == pytest.approx(reached, abs=0.03)


# ---- the loss


def test_beta_weighs_the_rate_and_the_mask_counts():
    batch = {"image": X, "mask": jnp.asarray([1.0, 1.0, 1.0, 0.0, 0.0])}

    @jax.jit
    def at(beta, batch):
        return objective.make_loss(NETWORKS, LIKELIHOOD, beta=beta)(WRONG, {}, batch, jax.random.key(7))

    results = [at(beta, batch) for beta in (1.0, 4.0)]
    rate = np.asarray(objective.gaussian_kl(NETWORKS.encode(WRONG, X, None))).sum(axis=1)[:3].mean()
    for beta, (value, (metrics, _)) in zip((1.0, 4.0), results, strict=True):
        assert float(metrics["rate"].value) == pytest.approx(rate, rel=1e-5)
        assert float(value) == pytest.approx(float(metrics["distortion"].value) + beta * rate, rel=1e-5)
        assert float(metrics["negative_elbo"].value) == pytest.approx(float(results[0][0]), rel=1e-5)
    assert float(at(1.0, {"image": X, "mask": jnp.zeros(5)})[0]) == 0


def test_free_bits_do_not_pull_on_dimensions_below_them():
    kl = jnp.asarray([[0.1, 2.0], [0.3, 4.0], [9.0, 9.0]])
    mask = jnp.asarray([1.0, 1.0, 0.0])
    value, slope = jax.value_and_grad(objective.free_bits)(kl, 0.5, mask)
    assert float(value) == pytest.approx(0.5 + 3.0)
    np.testing.assert_allclose(slope, [[0, 0.5], [0, 0.5], [0, 0]])
    loss = objective.make_loss(NETWORKS, LIKELIHOOD, least_rate=50.0)
    total, (metrics, _) = jax.jit(loss)(WRONG, {}, {"image": X}, jax.random.key(8))
    assert float(total) == pytest.approx(float(metrics["distortion"].value) + 100, rel=1e-5)


def test_the_iwae_loss_is_the_bound_and_has_no_kl_to_weigh():
    loss = objective.make_loss(NETWORKS, LIKELIHOOD, bound="iwae", num_samples=8)
    value, _ = jax.jit(loss)(EXACT, {}, {"image": X}, jax.random.key(9))
    assert -float(value) == pytest.approx(EVIDENCE.logpdf(ROWS).mean(), rel=1e-4)
    for settings in ({"beta": 2.0}, {"least_rate": 0.1}):
        with pytest.raises(UserError, match="IWAE"):
            objective.make_loss(NETWORKS, LIKELIHOOD, bound="iwae", **settings)


def test_the_step_key_binarises_the_images():
    loss = jax.jit(objective.make_loss(NETWORKS, LIKELIHOOD, binary=True))
    grey = {"image": jnp.zeros((5, 2, 2, 1))}
    values = {float(loss(EXACT, {}, grey, jax.random.key(seed))[1][0]["rate"].value) for seed in (0, 1, 0)}
    assert len(values) == 2


def test_labels_reach_both_networks_and_must_be_there():
    seen = []
    spy = lambda f: lambda params, x, label: (seen.append(label.shape), f(params, x, label))[1]
    networks = NETWORKS._replace(encode=spy(NETWORKS.encode), decode=spy(NETWORKS.decode))
    loss = objective.make_loss(networks, LIKELIHOOD, conditional=True)
    jax.eval_shape(loss, EXACT, {}, {"image": X, "label": jnp.arange(5)}, jax.random.key(0))
    assert set(seen) == {(5,)}
    assert len(seen) == 2
    with pytest.raises(UserError, match="labels"):
        loss(EXACT, {}, {"image": X}, jax.random.key(0))


# ---- two layers: z2 -> z1 = A z2 + T e1 -> x = z1 + STD e2, all scalars with known posteriors

A, T = 1.2, 0.6


def _two_layers():
    prior = A**2 + T**2  # the variance of z1
    precision = 1 / prior + 1 / STD**2
    above = 1 + A**2 / T**2

    def gaussian(mean, variance):
        return Gaussian(mean, jnp.full_like(mean, math.log(variance)))

    return Networks(
        encode=lambda params, x, label: gaussian(x[:, 0, 0] / STD**2 / precision, 1 / precision),
        decode=lambda params, z, label: z[:, None, None],
        latent_sizes=(1, 1),
        encode_above=lambda params, z: gaussian(A / T**2 / above * z, 1 / above),
        prior_below=lambda params, z: gaussian(A * z, T**2),
    )


def test_with_two_exact_layers_every_weight_is_the_evidence():
    networks, x = _two_layers(), jnp.asarray([0.5, -2.0, 1.0]).reshape(3, 1, 1, 1)
    estimate = objective.make_log_evidence(networks, LIKELIHOOD, num_samples=5, chunk=2)
    expected = stats.norm.logpdf(x[:, 0, 0, 0], 0, math.sqrt(A**2 + T**2 + STD**2))
    np.testing.assert_allclose(jax.jit(estimate)({}, x, None, jax.random.key(0)), expected, rtol=1e-4)
    q = networks.encode({}, x, None)
    draws = jax.jit(lambda key: objective.draw_posterior(networks, {}, key, q, 4000))(jax.random.key(1))
    assert draws.kl.shape == (4000, 3, 2)
    gap = np.asarray(
        draws.kl.sum(axis=-1) - draws.log_ratio
    )  # the closed form of z2's part against its draws
    assert np.all(np.abs(gap.mean(axis=0)) < 4 * gap.std(axis=0) / math.sqrt(4000))


def test_draws_from_a_prior_of_two_layers_have_its_variance():
    """4,000 draws: the standard error of a variance is sqrt(2 / n) of it."""
    eps = tuple(jax.random.normal(jax.random.key(i), (4000, 1)) for i in (1, 2))
    z = np.asarray(objective.prior_draw(_two_layers(), {}, eps))
    assert z.var() == pytest.approx(A**2 + T**2, rel=4 * math.sqrt(2 / 4000))
    np.testing.assert_array_equal(objective.prior_draw(NETWORKS, EXACT, eps[:1]), eps[0])
