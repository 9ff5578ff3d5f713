"""Reconstruction, penalties and noise of auto-encoders, against NumPy, brute force and their own moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import autoencoder as objective
from jaxgen.objectives.score_matching import sum_dims
from jaxgen.types import UserError

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, (4, 3, 2, 1)), jnp.float32)


def test_squared_error_is_on_the_scale_of_pca():
    """Black against white is 1 a pixel, as of images with pixels in [0, 1]."""
    black, white = -jnp.ones((1, 28, 28, 1)), jnp.ones((1, 28, 28, 1))
    assert float(sum_dims(objective.squared_error(black, white))[0]) == 784
    np.testing.assert_allclose(
        objective.squared_error(IMAGES, IMAGES[::-1]),
        np.square((np.asarray(IMAGES) + 1) / 2 - (np.asarray(IMAGES[::-1]) + 1) / 2),
        rtol=1e-4,
        atol=1e-7,
    )


def test_cross_entropy_is_numpys_and_least_at_the_pixel_itself():
    logits = jnp.asarray(RNG.normal(size=IMAGES.shape), jnp.float32)
    p, r = (np.asarray(IMAGES, np.float64) + 1) / 2, 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = -(p * np.log(r) + (1 - p) * np.log(1 - r))
    np.testing.assert_allclose(objective.cross_entropy(logits, IMAGES), expected, rtol=1e-5)
    at_itself = jnp.log((1 + IMAGES) / (1 - IMAGES))
    slope = jax.grad(lambda logits: jnp.sum(objective.cross_entropy(logits, IMAGES)))(at_itself)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert np.isfinite(objective.cross_entropy(jnp.asarray(1e4), jnp.asarray(-1.0)))


def test_sparsity_is_a_divergence_of_the_mean_activation():
    code = jnp.asarray([[0.1, 0.9], [0.3, 0.5], [0.99, 0.99]])
    mask = jnp.asarray([1.0, 1.0, 0.0])
    rho, means = 0.2, np.asarray([0.2, 0.7])
    expected = np.sum(rho * np.log(rho / means) + (1 - rho) * np.log((1 - rho) / (1 - means)))
    assert float(objective.sparsity_penalty(code, rho, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(objective.sparsity_penalty(jnp.full((3, 5), 0.05), 0.05)) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(objective.sparsity_penalty(jnp.zeros((3, 5)), 0.05))


def test_the_contractive_penalty_is_the_whole_jacobians_norm():
    """Brute force by jacrev of each example, and Rifai's formula where there is one layer."""
    weights = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 5), (5, 4))]

    def one_layer(x):
        return jax.nn.sigmoid(x.reshape(x.shape[0], -1) @ weights[0])

    def deep(x):
        return jnp.tanh(one_layer(x) @ weights[1])

    for encode in (one_layer, deep):
        whole = jax.vmap(jax.jacrev(lambda x, encode=encode: encode(x[None])[0]))(IMAGES)
        expected = np.square(np.asarray(whole)).reshape(4, -1).sum(axis=1)
        np.testing.assert_allclose(objective.jacobian_norm(encode, IMAGES), expected, rtol=1e-5)
    formula = objective.sigmoid_jacobian_norm(one_layer(IMAGES), weights[0])
    np.testing.assert_allclose(formula, objective.jacobian_norm(one_layer, IMAGES), rtol=1e-5)


NUM = 40_000  # pixels


def _within(share, expected, num=NUM):
    """Within 4 standard errors of a share."""
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / num)


def test_masking_blackens_its_share_and_leaves_the_rest():
    x = jnp.full((4, 100, 100, 1), 0.3)
    seen, chosen = objective.masking_noise(0.25)(jax.random.key(3), x)
    assert _within(float(chosen.mean()), 0.25)
    np.testing.assert_array_equal(seen, np.where(np.asarray(chosen) > 0, np.float32(-1), np.asarray(x)))


def test_salt_and_pepper_are_fair():
    x = jnp.full((4, 100, 100, 1), 0.3)
    seen, chosen = (np.asarray(leaf) for leaf in objective.salt_and_pepper_noise(0.2)(jax.random.key(3), x))
    assert _within(chosen.mean(), 0.2)
    assert _within((seen == 1).mean(), 0.1)
    assert _within((seen == -1).mean(), 0.1)
    np.testing.assert_array_equal(seen[chosen == 0], np.float32(0.3))


def test_gaussian_noise_has_its_deviation_and_touches_all():
    """The standard error of a standard deviation is sigma / sqrt(2 n)."""
    x = jnp.full((4, 100, 100, 1), 0.3)
    seen, chosen = objective.gaussian_noise(0.5)(jax.random.key(3), x)
    assert float(chosen.min()) == 1
    noise = np.asarray(seen - x)
    assert abs(noise.mean()) < 4 * 0.5 / np.sqrt(NUM)
    assert abs(noise.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * NUM)


def test_emphasis_weighs_corrupted_and_other_pixels():
    errors = jnp.asarray(RNG.uniform(size=IMAGES.shape), jnp.float32)
    chosen = jnp.asarray(RNG.integers(0, 2, IMAGES.shape), jnp.float32)
    e, c = (np.asarray(x).reshape(4, -1) for x in (errors, chosen))
    expected = [2 * row[mark > 0].sum() + 0.5 * row[mark == 0].sum() for row, mark in zip(e, c, strict=True)]
    np.testing.assert_allclose(objective.emphasised(errors, chosen, 2.0, 0.5), expected, rtol=1e-5)
    np.testing.assert_allclose(objective.emphasised(errors, chosen, 1.0, 1.0), e.sum(axis=1), rtol=1e-5)


def _loss(**settings):
    """Of the encoder h = sigmoid(a x) with its inverse as decoder, which rebuilds whatever it sees."""
    encode = lambda a, x: jax.nn.sigmoid(a * x.reshape(x.shape[0], -1))
    decode = lambda a, code: (jnp.log(code / (1 - code)) / a).reshape(-1, *IMAGES.shape[1:])
    return objective.make_loss(encode, decode, lambda outputs: outputs, **settings)


BATCH = {"image": IMAGES, "mask": jnp.asarray([1.0, 1.0, 1.0, 0.0])}


def test_the_loss_of_a_perfect_code_is_what_the_noise_did():
    a = jnp.asarray(1.5)
    value, _ = _loss()(a, {}, BATCH, jax.random.key(5))
    assert float(value) == pytest.approx(0, abs=1e-9)
    noise = objective.masking_noise(0.5)
    value, (metrics, _) = _loss(corrupt=noise, alpha=2.0, beta=7.0)(a, {}, BATCH, jax.random.key(5))
    seen, _ = noise(jax.random.key(5), IMAGES)
    expected = np.square(np.asarray(seen - IMAGES) / 2)[:3].sum() / 3  # the others are rebuilt: beta is idle
    assert float(value) == pytest.approx(2 * expected, rel=1e-4)
    assert float(metrics["squared_error"].value) == pytest.approx(expected, rel=1e-4)


def test_penalties_add_with_their_weights():
    contraction = lambda a, x: sum_dims(a * x)
    loss = _loss(sparsity_weight=0.3, sparsity_target=0.4, contraction=contraction, contraction_weight=0.2)
    value, (metrics, _) = jax.jit(loss)(jnp.asarray(1.5), {}, BATCH, jax.random.key(5))
    code = jax.nn.sigmoid(1.5 * IMAGES.reshape(4, -1))
    sparsity = float(objective.sparsity_penalty(code, 0.4, BATCH["mask"]))
    contracted = float(jnp.mean(contraction(1.5, IMAGES)[:3]))
    assert float(value) == pytest.approx(0.3 * sparsity + 0.2 * contracted, rel=1e-4)
    assert float(metrics["sparsity"].value) == pytest.approx(sparsity, rel=1e-5)
    assert float(metrics["contraction"].value) == pytest.approx(contracted, rel=1e-5)


def test_a_batch_that_is_masked_whole_costs_nothing():
    batch = {"image": IMAGES, "mask": jnp.zeros(4)}
    value, _ = _loss(sparsity_weight=1.0)(jnp.asarray(1.5), {}, batch, jax.random.key(5))
    assert float(value) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: objective.masking_noise(0.0),
        lambda: objective.salt_and_pepper_noise(1.0),
        lambda: objective.gaussian_noise(-0.1),
    ],
)
def test_noise_that_makes_no_sense_is_refused(make):
    with pytest.raises(UserError, match="but it is"):
        make()
