"""Flows: the inverse, the log-determinant against the full Jacobian, and the data-dependent start."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import flows

SHAPE = (4, 4, 2)


def _perturbed(params, scale=0.05):
    """Off the start, where couplings are the identity."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), params
    )


@pytest.fixture(scope="module", params=["glow", "realnvp"])
def flow(request):
    """(model, params at the start, params off it, images, labels)."""
    model = flows.Flow(request.param, num_scales=2, num_steps=1, width=4, num_classes=3)
    x = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, (8, *SHAPE)), jnp.float32)
    label = jnp.arange(8) % 3
    params = jax.jit(model.init)(jax.random.key(0), x, label)["params"]
    return model, params, _perturbed(params), x, label


def test_the_inverse_gives_back_the_images(flow):
    model, _, params, x, label = flow

    @jax.jit
    def there_and_back(x):
        zs, _ = model.apply({"params": params}, x, label)
        return zs, model.apply({"params": params}, zs, label, method="inverse")

    zs, back = there_and_back(x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert [z.shape[1:] for z in zs] == flows.latent_shapes(SHAPE, 2)


def test_the_log_determinant_is_that_of_the_full_jacobian(flow):
    """slogdet of the 32 x 32 Jacobian; float32 sums of 32 logarithms agree to 1e-3."""
    model, _, params, x, label = flow

    def flat(x, label):
        zs, _ = model.apply({"params": params}, x[None], label[None])
        return jnp.concatenate([z.reshape(-1) for z in zs])

    jacobian = jax.jit(jax.vmap(jax.jacrev(flat)))(x[:2], label[:2]).reshape(2, 32, 32)
    _, log_det = model.apply({"params": params}, x[:2], label[:2])
    assert float(jnp.min(jnp.abs(log_det))) > 0.1
    np.testing.assert_allclose(log_det, np.linalg.slogdet(np.asarray(jacobian, np.float64))[1], atol=1e-3)


def test_the_class_moves_the_last_prior_only(flow):
    model, _, params, x, _ = flow
    zeros, ones = (model.apply({"params": params}, x, jnp.full(8, k)) for k in (0, 1))
    chex.assert_trees_all_equal(zeros[0][0], ones[0][0])
    assert float(jnp.min(jnp.abs(zeros[0][1] - ones[0][1]))) > 0


def test_jit_changes_nothing(flow):
    model, _, params, x, label = flow
    plain = model.apply({"params": params}, x, label)
    compiled = jax.jit(lambda x: model.apply({"params": params}, x, label))(x)
    chex.assert_trees_all_close(compiled, plain, atol=2e-4)  # float32, another order of sums


def test_actnorm_starts_with_zero_mean_and_unit_variance():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (16, 3, 3, 4))
    (y, log_det), variables = flows.ActNorm().init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(jnp.mean(y, axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(jnp.var(y, axis=(0, 1, 2)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(
        log_det, -9.0 * np.sum(np.log(np.std(np.asarray(x), axis=(0, 1, 2)))), rtol=1e-4
    )
    again, _ = flows.ActNorm().apply(variables, x[:2])
    np.testing.assert_allclose(again, y[:2], atol=1e-6)


def test_every_actnorm_of_a_flow_starts_from_what_the_layers_before_it_make_of_the_data():
    """Two steps of Glow by hand, from their stacked parameters: each ActNorm normalises."""
    model = flows.Flow("glow", num_scales=1, num_steps=2, width=3)
    images = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    carry = (flows.squeeze(images), jnp.zeros(8))
    for k in range(2):
        of_step = jax.tree.map(lambda leaf: leaf[k], params["channels_0"])
        y, _ = flows.ActNorm().apply({"params": of_step["norm"]}, carry[0])
        np.testing.assert_allclose(jnp.mean(y, axis=(0, 1, 2)), 0.0, atol=1e-4)
        np.testing.assert_allclose(jnp.var(y, axis=(0, 1, 2)), 1.0, rtol=1e-3)
        step = flows.GlowStep(3, jnp.float32)
        carry, _ = step.apply({"params": of_step}, carry, flows.rotation_start(4, k))
    zs, log_det = model.apply({"params": params}, images)
    np.testing.assert_allclose(zs[0], carry[0], atol=1e-4)  # the prior starts as standard normal
    np.testing.assert_allclose(log_det, carry[1], rtol=1e-5)


def test_the_invertible_convolution_starts_as_a_rotation():
    layer, start = flows.InvertibleConv(), flows.rotation_start(6, 0)
    x = jnp.eye(6)[:, None, None]
    (y, log_det), variables = layer.init_with_output(jax.random.key(0), x, start)
    matrix = np.asarray(y)[:, 0, 0]
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(log_det, 0.0, atol=1e-5)
    params = _perturbed(variables["params"])
    y, log_det = layer.apply({"params": params}, x, start)
    np.testing.assert_allclose(log_det[0], np.linalg.slogdet(np.asarray(y)[:, 0, 0])[1], atol=1e-5)
    # On CPU rounded products do not show.
    program = jax.jit(lambda x: layer.apply({"params": params}, x, start)).lower(x).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_coupling_starts_as_a_fixed_scale_and_leaves_the_masked_part():
    """0.05 + 0.95 sigmoid(2) for Glow, the identity for RealNVP."""
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 4))
    for kind, scale in (("glow", 0.05 + 0.95 / (1 + np.exp(-2))), ("realnvp", 1.0)):
        layer = flows.AffineCoupling(kind, "channels", False, 3)
        (y, _), _ = layer.init_with_output(jax.random.key(1), x)
        np.testing.assert_allclose(y, x * jnp.asarray([1, 1, scale, scale])[None, None, None], rtol=1e-5)


def test_squeeze_keeps_squares_together_and_masks_alternate():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(flows.squeeze(x)[0, 0, 1], [2, 3, 6, 7])
    np.testing.assert_array_equal(flows.unsqueeze(flows.squeeze(x)), x)
    even, odd = (flows.coupling_mask("checkerboard", odd, (4, 4, 1)) for odd in (False, True))
    np.testing.assert_array_equal(even + odd, np.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(even[0, :2, :2, 0], [[1, 0], [0, 1]])


def test_images_that_cannot_be_halved_are_told():
    with pytest.raises(ValueError, match="halved 3 times"):
        flows.latent_shapes((28, 28, 1), 3)
