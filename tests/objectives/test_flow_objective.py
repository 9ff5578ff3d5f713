"""The likelihood of a flow in bits/dim, against closed forms; latents at a temperature and on a line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.objectives import flow as objective
from jaxgen.samplers.flow import draw_latents, interpolate


def test_dequantising_and_quantising_undo_each_other_at_every_level():
    x = jnp.linspace(-1, 1, 17)
    for u in (0.001, 0.5, 0.999):
        y = objective.dequantise(x, jnp.full(17, u), 17)
        assert float(y.min()) >= -0.5
        assert float(y.max()) < 0.5
        np.testing.assert_allclose(objective.quantise(y, 17), x, atol=1e-6)
    np.testing.assert_array_equal(objective.quantise(jnp.asarray([-3.0, 3.0]), 17), [-1.0, 1.0])


def test_the_normal_density_is_scipys():
    zs = [jnp.asarray([[0.3, -2.0]]), jnp.asarray([[[1.5]]])]
    expected = stats.norm.logpdf([0.3, -2.0, 1.5]).sum()
    assert float(objective.standard_normal_log_prob(zs)[0]) == pytest.approx(expected, rel=1e-6)


def test_a_density_that_is_uniform_on_the_cube_costs_log2_of_the_levels():
    """p(y) = 1 on [-1/2, 1/2)^D is the uniform distribution on num_levels^D images: log2(17) bits/dim."""
    assert float(objective.discrete_bits_per_dim(jnp.zeros(1), 12, 17)[0]) == pytest.approx(math.log2(17))


def test_the_loss_of_a_known_flow():
    """z = exp(a) y: the bits/dim of a Gaussian of scale exp(-a), from the same noise by hand."""
    forward = lambda a, y, label: ([jnp.exp(a) * y], jnp.full(y.shape[0], 4 * a))
    loss = objective.make_loss(forward, num_levels=2)
    batch = {"image": jnp.ones((3, 2, 2, 1)), "mask": jnp.asarray([1.0, 1.0, 0.0])}
    key, a = jax.random.key(0), jnp.asarray(0.7)
    value, (metrics, _) = loss(a, {}, batch, key)
    u = np.asarray(objective.dequantisation_noise(key, (3, 2, 2, 1)))
    y = (1 + u[:2]) / 2 - 0.5
    log_p = stats.norm.logpdf(y, scale=math.exp(-0.7)).reshape(2, 4).sum(1)
    expected = np.mean((4 * math.log(2) - log_p) / (4 * math.log(2)))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    parts = float(metrics["prior"].value) + float(metrics["volume"].value)
    assert parts == pytest.approx(expected, rel=1e-5)


def test_latents_scale_with_the_temperature_and_do_not_see_their_batch():
    """8,000 standard normals: the standard deviation's own standard error is 0.8 %."""
    shapes, key = [(2, 2, 1), (1, 1, 4)], jax.random.key(0)
    warm = draw_latents(key, jnp.arange(1000), shapes)
    cold = draw_latents(key, jnp.asarray([7, 3]), shapes, 0.5)
    for w, c, shape in zip(warm, cold, shapes, strict=True):
        assert c.shape == (2, *shape)
        np.testing.assert_allclose(c, 0.5 * w[jnp.asarray([7, 3])], rtol=1e-6)
    values = np.concatenate([w.reshape(-1) for w in warm])
    assert abs(values.std() - 1) < 4 * 0.008
    assert abs(np.corrcoef(warm[0].reshape(-1), warm[1].reshape(-1))[0, 1]) < 4 / math.sqrt(4000)


def test_interpolation_starts_and_ends_at_its_ends():
    a, b = [jnp.zeros((2, 3))], [jnp.ones((2, 3))]
    [path] = interpolate(a, b, 5)
    np.testing.assert_allclose(path[:, 0, 0], [0, 0.25, 0.5, 0.75, 1.0])
