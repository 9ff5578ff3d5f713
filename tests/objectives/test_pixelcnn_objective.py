"""Likelihoods of a pixel: they sum to 1, agree with closed forms, and draws follow them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxgen.objectives import pixelcnn as objective
from jaxgen.types import UserError

LIKELIHOODS = {
    "bernoulli": (objective.bernoulli_likelihood(2), 2, 2),
    "categorical": (objective.categorical_likelihood(5), 1, 5),
    "mixture of one channel": (objective.logistic_mixture_likelihood(3, 1, 7), 1, 7),
    "mixture of three channels": (objective.logistic_mixture_likelihood(2, 3, 4), 3, 4),
}


def _pixels(channels, num_levels):
    levels = 2.0 * np.arange(num_levels) / (num_levels - 1) - 1.0
    return jnp.asarray(list(itertools.product(levels, repeat=channels)), jnp.float32)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_probabilities_sum_to_one_and_draws_follow_them(name):
    """All pixels by enumeration; 5,000 draws within 4.5 standard errors each."""
    likelihood, channels, num_levels = LIKELIHOODS[name]
    pixels = _pixels(channels, num_levels)
    parameters = jax.random.normal(jax.random.key(0), (likelihood.num_parameters,))
    p = np.exp(likelihood.log_prob(jnp.broadcast_to(parameters, (len(pixels), parameters.size)), pixels))
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    num = 5000
    keys = jax.random.split(jax.random.key(1), num)
    drawn = jax.jit(jax.vmap(likelihood.draw, in_axes=(0, None)))(keys, parameters)
    levels = np.asarray(objective.to_level(drawn, num_levels))
    np.testing.assert_allclose(drawn, objective.from_level(jnp.asarray(levels), num_levels), atol=1e-6)
    counts = np.bincount(levels @ num_levels ** np.arange(channels)[::-1], minlength=len(p))
    assert np.all(np.abs(counts / num - p) < 4.5 * np.sqrt(p * (1 - p) / num) + 1e-9)


def test_the_logistic_mass_is_the_difference_of_two_sigmoids():
    """Salimans et al. 2017, eq. 2, in float64 by SciPy."""
    x = np.linspace(-1, 1, 17)
    for mean, scale in ((0.1, 0.3), (-1.2, 0.05)):
        above = np.where(x > 0.999, np.inf, x + 1 / 16)
        below = np.where(x < -0.999, -np.inf, x - 1 / 16)
        expected = expit((above - mean) / scale) - expit((below - mean) / scale)
        arguments = [jnp.full(17, value, jnp.float32) for value in (mean, math.log(scale))]
        got = objective.discretized_logistic_log_likelihood(jnp.asarray(x, jnp.float32), *arguments, 17)
        np.testing.assert_allclose(np.exp(got), expected, rtol=2e-4, atol=1e-9)


def test_far_from_the_mean_the_logarithm_and_its_gradient_stay_finite():
    """(x - mean) / scale is -1,096 here: the mass underflows, its logarithm is that distance."""
    value, gradient = jax.value_and_grad(objective.discretized_logistic_log_likelihood, argnums=1)(
        jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(-7.0), 256
    )
    assert float(value) == pytest.approx(-(1.0 - 1 / 255) * math.exp(7.0), rel=1e-3)
    assert float(gradient) == pytest.approx(-math.exp(7.0), rel=1e-4)


def test_the_mean_of_a_channel_follows_the_channels_before_it():
    """Salimans et al. 2017, eq. 3, for blue: mean + beta red + gamma green."""
    parameters = jnp.arange(10, dtype=jnp.float32) / 10
    mixture = objective.split_mixture_parameters(parameters, 1, 3)
    x = jnp.asarray([0.5, -0.25, 1.0])
    expected = 0.3 + math.tanh(0.8) * 0.5 + math.tanh(0.9) * -0.25
    assert float(objective.channel_mean(mixture, 2, x)[0]) == pytest.approx(expected, rel=1e-6)
    assert objective.num_mixture_parameters(10, 3) == 100


def test_the_loss_is_in_bits_per_dim_and_nats_and_masks():
    """Uniform logits on 4 levels cost 2 bits/dim; the masked example, which costs more, weighs nothing."""
    likelihood = objective.categorical_likelihood(4)
    loss = objective.make_loss(
        lambda params, x, label, key: params[:, None, None] * jnp.ones((2, 3, 3, 4)), likelihood
    )
    params = jnp.asarray([[0.0, 0, 0, 0], [0, 0, 0, 30]])
    batch = {"image": -jnp.ones((2, 3, 3, 1)), "mask": jnp.asarray([1.0, 0.0])}
    value, (metrics, _) = loss(params, {}, batch, jax.random.key(0))
    assert float(value) == pytest.approx(2.0, rel=1e-6)
    assert float(metrics["nats"].value) == pytest.approx(9 * math.log(4), rel=1e-6)
    assert float(metrics["loss"].count) == 1


def test_a_conditional_loss_without_labels_is_told():
    loss = objective.make_loss(
        lambda *_: jnp.zeros((1, 2, 2, 1)), objective.bernoulli_likelihood(1), conditional=True
    )
    with pytest.raises(UserError, match="labels"):
        loss({}, {}, {"image": jnp.ones((1, 2, 2, 1))}, jax.random.key(0))
