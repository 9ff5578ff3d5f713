"""Encoders, decoders, the auto-encoder and the VAE's networks: against NumPy, PCA and published sizes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from jaxgen.estimators import linear
from jaxgen.models import autoencoder as models
from jaxgen.models.vae import VAE
from jaxgen.objectives import autoencoder as objective
from jaxgen.types import UserError

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 5, 7, 2)), jnp.float32)


def _deep(shape, code_size, widths):
    return models.AutoEncoder(
        models.MlpEncoder(widths, code_size), models.MlpDecoder(widths[::-1], shape[:2], shape[2])
    )


def test_the_network_of_hinton_and_salakhutdinov_has_its_parameters():
    """784-1000-500-250-30 and back, weights and biases by hand: 2,837,314."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    expected = sum(a * b + b for a, b in itertools.pairwise(sizes))
    model = _deep((28, 28, 1), 30, (1000, 500, 250))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 2_837_314


def test_the_mlp_encoder_is_the_loop_in_numpy():
    encoder = models.MlpEncoder((4, 3), 2, "tanh")
    variables = encoder.init(jax.random.key(0), IMAGES)
    layers = variables["params"]["mlp"]
    h = np.asarray(IMAGES).reshape(3, -1)
    for name in ("dense_0", "dense_1", "out"):
        h = h @ np.asarray(layers[name]["kernel"]) + np.asarray(layers[name]["bias"])
        h = h if name == "out" else np.tanh(h)
    np.testing.assert_allclose(encoder.apply(variables, IMAGES), h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widths", [(), (4, 3)])
def test_convolutions_take_odd_sizes_down_and_back_up(widths):
    encoder, decoder = models.ConvEncoder(widths, 6), models.ConvDecoder(widths, (5, 7), 2)
    code, variables = jax.jit(encoder.init_with_output)(jax.random.key(0), IMAGES)
    assert code.shape == (3, 6)
    again, _ = jax.jit(decoder.init_with_output)(jax.random.key(1), code)
    assert again.shape == IMAGES.shape
    for i, width in enumerate(widths):
        assert variables["params"][f"conv_{i}"]["kernel"].shape[-1] == width


@pytest.mark.parametrize("encoder", [models.MlpEncoder((4,), 3), models.ConvEncoder((4,), 3)])
def test_context_and_every_pixel_reach_the_code_and_examples_stay_apart(encoder):
    context = jnp.eye(3)
    variables = jax.jit(encoder.init)(jax.random.key(0), IMAGES, context)
    apply = jax.jit(encoder.apply)
    code, other = apply(variables, IMAGES, context), apply(variables, IMAGES, context[::-1])
    assert np.abs(other - code).max(axis=1)[0] > 1e-3
    np.testing.assert_allclose(other[1], code[1], atol=1e-6)
    alone = apply(variables, IMAGES[:1], context[:1])
    np.testing.assert_allclose(alone, code[:1], rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(encoder.apply(variables, x, context) ** 2)))(IMAGES)
    assert np.count_nonzero(slope) > 0.9 * slope.size


def test_bfloat16_computes_so_and_keeps_float32_around_it():
    model = models.AutoEncoder(
        models.ConvEncoder((4,), 3, dtype=jnp.bfloat16),
        models.ConvDecoder((4,), (5, 7), 2, dtype=jnp.bfloat16),
    )
    image, variables = jax.jit(model.init_with_output)(jax.random.key(0), IMAGES)
    assert image.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    code = model.apply(variables, IMAGES, method="encode")
    full = models.ConvEncoder((4,), 3).apply({"params": variables["params"]["encoder"]}, IMAGES)
    assert 0 < np.abs(code - full).max() < 0.05


def test_a_reconstruction_is_an_image():
    model = _deep((5, 7, 2), 3, (4,))
    image, variables = jax.jit(model.init_with_output)(jax.random.key(0), 100 * IMAGES)
    assert np.abs(image).max() <= 1
    outputs = model.apply(variables, model.apply(variables, 100 * IMAGES, method="encode"), method="decode")
    np.testing.assert_allclose(image, 2 * expit(np.asarray(outputs)) - 1, atol=1e-6)
    np.testing.assert_array_equal(models.image_of(outputs, "linear"), outputs)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="choose one of tanh"):
        models.MlpEncoder((4,), 3, "tan").init(jax.random.key(0), IMAGES)


def test_a_linear_autoencoder_spans_the_space_of_the_principal_components():
    """Baldi & Hornik 1989: its only minima are the projections on the first components (row R2).

    Adam for 1,500 updates on all 200 rows; the error is PCA's to 1e-3 and the projector to 0.03, which is
    what remains of the descent.
    """
    rng = np.random.default_rng(0)
    rows = (
        rng.normal(size=(200, 6)) * [2.0, 1.5, 0.5, 0.4, 0.3, 0.2] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    )
    images = jnp.asarray(rows.reshape(200, 2, 3, 1), jnp.float32)
    model = models.AutoEncoder(models.MlpEncoder((), 2), models.MlpDecoder((), (2, 3), 1), output="linear")
    loss = objective.make_loss(
        lambda params, x: model.apply({"params": params}, x, method="encode"),
        lambda params, code: model.apply({"params": params}, code, method="decode"),
        lambda outputs: outputs,
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            slope, _ = jax.grad(loss, has_aux=True)(params, {}, {"image": images}, jax.random.key(0))
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=1500)
        return params, loss(params, {}, {"image": images}, jax.random.key(0))[0]

    params, error = fit(model.init(jax.random.key(1), images)["params"])
    pca = linear.fit_pca(rows.astype(np.float32), 2)
    best = float(jnp.mean(linear.reconstruction_error(pca, rows.astype(np.float32)))) / 4  # on [0, 1]
    assert float(error) == pytest.approx(best, rel=1e-3)
    basis, _ = np.linalg.qr(np.asarray(params["decoder"]["mlp"]["out"]["kernel"]).T)
    np.testing.assert_allclose(basis @ basis.T, np.asarray(pca.components.T @ pca.components), atol=0.03)


@pytest.fixture(scope="module")
def two_layers():
    model = VAE(
        models.MlpEncoder((4,), 2 * 3),
        models.MlpDecoder((4,), (5, 7), 2),
        num_classes=10,
        above=models.Mlp((4,), 2 * 2),
        prior=models.Mlp((4,), 2 * 3),
    )
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES, jnp.arange(3))


def test_the_networks_of_a_vae_of_two_layers(two_layers):
    model, variables = two_layers
    mean, log_var = model.apply(variables, IMAGES, jnp.arange(3), method="encode")
    assert mean.shape == log_var.shape == (3, 3)
    above = model.apply(variables, mean, method="encode_above")
    assert [x.shape for x in above] == [(3, 2), (3, 2)]
    below = model.apply(variables, above[0], method="prior_below")
    assert [x.shape for x in below] == [(3, 3), (3, 3)]
    assert set(variables["params"]) == {"encoder", "decoder", "above", "prior"}


def test_the_class_reaches_encoder_and_decoder(two_layers):
    model, variables = two_layers
    labels = jnp.arange(3)
    mean, _ = model.apply(variables, IMAGES, labels, method="encode")
    other, _ = model.apply(variables, IMAGES, labels + 1, method="encode")
    assert np.abs(mean - other).min(axis=1).max() > 1e-4
    first, second = (model.apply(variables, mean, labels + i, method="decode") for i in (0, 1))
    assert first.shape == IMAGES.shape
    assert np.abs(first - second).max() > 1e-3
