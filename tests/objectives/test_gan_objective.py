"""The adversarial losses against closed forms on densities in one dimension, and the gradient penalties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import gan
from jaxgen.types import UserError

GRID = np.linspace(-4.0, 4.0, 81)


def _normal(mean, deviation):
    """A normal density on the grid, as probabilities that sum to 1."""
    p = np.exp(-0.5 * ((GRID - mean) / deviation) ** 2)
    return p / p.sum()


P_DATA, P_G = _normal(0.5, 0.8), _normal(-0.5, 1.2)
LOGITS = jnp.asarray([-30.0, -1.5, -1.0, 0.0, 0.4, 1.0, 30.0])


def test_losses_are_the_written_formulas():
    d = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    logistic = {"real": -np.log(d), "fake": np.logaddexp(0, np.asarray(LOGITS, np.float64))}
    expected = {
        "minimax": (logistic["real"], logistic["fake"], -logistic["fake"], d),
        "non_saturating": (logistic["real"], logistic["fake"], logistic["real"], d),
        "wasserstein": (-LOGITS, LOGITS, -LOGITS, LOGITS),
        "hinge": (np.maximum(0, 1 - LOGITS), np.maximum(0, 1 + LOGITS), -LOGITS, LOGITS),
    }
    for game, wanted in expected.items():
        for loss, values in zip(gan.adversarial_losses(game), wanted, strict=True):
            np.testing.assert_allclose(loss(LOGITS), values, rtol=1e-5, atol=1e-12)


def test_at_equilibrium_the_optimal_discriminator_is_a_half_and_the_value_minus_log_4():
    np.testing.assert_allclose(gan.optimal_discriminator(P_DATA, P_DATA), 0.5, rtol=1e-12)
    # Goodfellow et al. 2014, theorem 1; the logit of a half is 0.
    np.testing.assert_allclose(gan.value(jnp.zeros(7), jnp.zeros(5)), -math.log(4), rtol=1e-6)


@pytest.mark.parametrize("game", ["minimax", "non_saturating", "hinge"])
def test_the_discriminator_found_by_training_is_the_optimal_one(game):
    """A logit for each point of the grid, by gradient descent on the expected loss."""
    losses = gan.adversarial_losses(game)
    p, q = jnp.asarray(P_DATA, jnp.float32), jnp.asarray(P_G, jnp.float32)
    # Each point's loss over its own mass, so that all of them converge at one rate.
    weights = p / (p + q), q / (p + q)
    expected = lambda logit: jnp.sum(weights[0] * losses.real(logit) + weights[1] * losses.fake(logit))

    @jax.jit
    def train(logits):
        return jax.lax.fori_loop(0, 3000, lambda _, x: x - 0.3 * jax.grad(expected)(x), logits)

    found = np.asarray(train(jnp.zeros(len(GRID))), np.float64)
    if game == "hinge":
        # The best answer to the hinge is the sign of p - q (Lim and Ye 2017), of size 1; where p is nearly q,
        # the steps are too small to be through.
        clear = np.abs(P_DATA - P_G) / (P_DATA + P_G) > 0.05
        assert clear.sum() > 60
        np.testing.assert_allclose(found[clear], np.sign(P_DATA - P_G)[clear], atol=0.3)
        return
    # Where D* is within 1e-3 of 0 or 1 the logit is still on its way; as a probability it is there.
    best = gan.optimal_discriminator(P_DATA, P_G)
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), best, atol=3e-3)
    # At the optimum V = -log 4 + 2 JSD(p, q) (Goodfellow et al. 2014, eq. 6).
    middle = (P_DATA + P_G) / 2
    jsd = 0.5 * np.sum(P_DATA * np.log(P_DATA / middle) + P_G * np.log(P_G / middle))
    logit = np.log(best / (1 - best))
    value = -np.sum(P_DATA * losses.real(logit) + P_G * losses.fake(logit))
    np.testing.assert_allclose(value, -math.log(4) + 2 * jsd, rtol=1e-5)
    reached = -np.sum(P_DATA * losses.real(found) + P_G * losses.fake(found))
    assert value - 1e-3 < reached <= value + 1e-6


def test_the_minimax_gradient_vanishes_where_the_discriminator_is_sure():
    """The two generator's losses pull the same way; only one still pulls at D(G(z)) = 1e-9."""
    sure = jnp.asarray(-20.0)
    minimax, non_saturating = (
        float(jax.grad(gan.adversarial_losses(game).generator)(sure))
        for game in ("minimax", "non_saturating")
    )
    np.testing.assert_allclose(minimax, -math.exp(-20), rtol=1e-3)
    np.testing.assert_allclose(non_saturating, -1.0, rtol=1e-6)


# ---- penalties

A = np.random.default_rng(0).normal(size=(6, 6))
A = (A + A.T) / 2


def _quadratic(x):
    """x^T A x / 2, whose gradient is A x."""
    flat = x.reshape(x.shape[0], -1)
    return 0.5 * jnp.sum((flat @ jnp.asarray(A, x.dtype)) * flat, axis=1)


def test_penalties_of_a_quadratic_against_its_gradient_in_closed_form():
    rng = np.random.default_rng(1)
    real, fake = (rng.normal(size=(4, 3, 2, 1)).astype(np.float32) for _ in range(2))
    weight = rng.uniform(size=4).astype(np.float32)
    flat = real.reshape(4, 6)
    np.testing.assert_allclose(gan.r1_penalty(_quadratic, real), 0.5 * np.sum((flat @ A) ** 2, 1), rtol=1e-4)
    between = weight[:, None] * flat + (1 - weight[:, None]) * fake.reshape(4, 6)
    expected = (np.linalg.norm(between @ A, axis=1) - 1) ** 2
    found = gan.gradient_penalty(_quadratic, jnp.asarray(real), jnp.asarray(fake), jnp.asarray(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_penalties_against_finite_differences_in_the_image():
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    logits_of = lambda x: jnp.sum(jnp.tanh(x.reshape(x.shape[0], -1) @ weights), axis=1)
    x = rng.normal(size=(2, 6)).astype(np.float64)
    step = 1e-3

    def by_hand(row):
        f = lambda v: np.sum(np.tanh(v @ np.asarray(weights, np.float64)))
        return sum((f(row + step * e) - f(row - step * e)) ** 2 for e in np.eye(6)) / (2 * step) ** 2

    expected = [by_hand(row) for row in x]
    # Central differences in float64 err by step^2; the gradient by float32's 1e-6.
    found = gan.squared_gradient_norm(logits_of, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_flat_discriminator_has_a_finite_gradient_penalty():
    flat = lambda w: jnp.sum(
        gan.gradient_penalty(
            lambda x: jnp.sum(w * x, axis=1), jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones(3)
        )
    )
    penalty, gradient = jax.value_and_grad(flat)(jnp.zeros((1, 2)))
    np.testing.assert_allclose(penalty, 3.0, rtol=1e-4)
    assert np.isfinite(gradient).all()


# ---- the players' losses, on players of a few numbers


def _generate(params, key, label, num):
    shift = 0.0 if label is None else 0.1 * label[:, None, None, None].astype(jnp.float32)
    return params["shift"] + shift + 0.1 * jax.random.normal(key, (num, 2, 2, 1))


def _discriminate(params, state, x, label, train):
    logits = params["scale"] * jnp.mean(jnp.square(x), axis=(1, 2, 3)) + params["bias"]
    if label is not None:
        logits = logits + label.astype(jnp.float32)
    return logits, {"seen": state["seen"] + x.shape[0]} if train else state


PARAMS = {
    "generator": {"shift": jnp.asarray(0.4)},
    "discriminator": {"scale": jnp.asarray(-0.7), "bias": jnp.asarray(0.2)},
}
STATE = {"generator": {}, "discriminator": {"seen": 0}}
BATCH = {
    "image": jax.random.uniform(jax.random.key(3), (6, 2, 2, 1)),
    "label": jnp.asarray([0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("penalty", ["none", "r1", "gradient_penalty"])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_players_losses_by_hand(conditional, penalty):
    key = jax.random.key(4)
    of_discriminator, of_generator = gan.make_losses(
        _generate, _discriminate, "hinge", penalty=penalty, penalty_weight=3.0, conditional=conditional
    )
    scalar, (metrics, state) = of_discriminator(PARAMS, STATE, BATCH, key)
    label = BATCH["label"] if conditional else None
    fake_key, weight_key = jax.random.split(jax.random.key(4))
    fake = _generate(PARAMS["generator"], fake_key, label, 6)
    judge = lambda x: _discriminate(PARAMS["discriminator"], STATE["discriminator"], x, label, False)[0]
    real_logits, fake_logits = judge(BATCH["image"]), judge(fake)
    expected = jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits))
    np.testing.assert_allclose(metrics["real_output"].value, jnp.mean(real_logits), rtol=1e-5)
    np.testing.assert_allclose(metrics["fake_output"].value, jnp.mean(fake_logits), rtol=1e-5)
    if penalty == "r1":
        terms = gan.r1_penalty(judge, BATCH["image"])
    else:
        weight = jax.random.uniform(weight_key, (6,))
        terms = gan.gradient_penalty(judge, BATCH["image"], fake, weight)
    if penalty != "none":
        np.testing.assert_allclose(metrics["penalty"].value, jnp.mean(terms), rtol=1e-5)
        expected += 3.0 * jnp.mean(terms)
    np.testing.assert_allclose(scalar, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, expected, rtol=1e-5)
    assert state["discriminator"]["seen"] == 12  # one pass over both, and none for the penalty
    other = jax.random.key(5)
    scalar, (metrics, state) = of_generator(PARAMS, STATE, BATCH, other)
    fake = _generate(PARAMS["generator"], jax.random.key(5), label, 6)
    np.testing.assert_allclose(scalar, -jnp.mean(judge(fake)), rtol=1e-5)
    assert state["discriminator"]["seen"] == 0


def test_masked_rows_weigh_nothing_and_the_generator_is_constant_to_the_discriminator():
    of_discriminator, _ = gan.make_losses(_generate, _discriminate, "non_saturating")
    mask = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    loss_of = lambda image: of_discriminator(
        PARAMS, STATE, {"image": image, "mask": mask}, jax.random.key(4)
    )[0]
    spoilt = BATCH["image"].at[2].set(100.0)
    np.testing.assert_allclose(loss_of(spoilt), loss_of(BATCH["image"]), rtol=1e-6)
    gradient = jax.grad(lambda params: of_discriminator(params, STATE, BATCH, jax.random.key(4))[0])(PARAMS)
    assert float(gradient["generator"]["shift"]) == 0.0
    assert float(jnp.abs(gradient["discriminator"]["scale"])) > 1e-3


def test_a_conditional_game_without_labels_is_refused():
    losses = gan.make_losses(_generate, _discriminate, "hinge", conditional=True)
    for loss in losses:
        with pytest.raises(UserError, match="labels"):
            loss(PARAMS, STATE, {"image": BATCH["image"]}, jax.random.key(0))
