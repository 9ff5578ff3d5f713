"""M2's bounds against quadrature over a latent of one dimension, and its objective against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import semisupervised as objective
from jaxgen.objectives.vae import Gaussian
from jaxgen.types import UserError

CLASSES, PIXELS = 3, 4
# p(x|y, z) has the logits a_y + b_y z; q(z|x, y) = N(sum(x) w_y, exp(s)^2); q(y|x) = softmax(x C).
_RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(_RNG.normal(size=shape), jnp.float32)
    for name, shape in {
        "a": (CLASSES, PIXELS),
        "b": (CLASSES, PIXELS),
        "w": (CLASSES, 1),
        "C": (PIXELS, CLASSES),
    }.items()
}
NETWORKS = objective.Networks(
    classify=lambda p, x: x @ p["C"],
    encode=lambda p, x, y: Gaussian(
        0.3 * jnp.sum(x, axis=-1, keepdims=True) * (y @ p["w"]), -0.5 + 0.0 * (y @ p["w"] + x[..., :1])
    ),
    decode=lambda p, z, y: y @ p["a"] + (y @ p["b"]) * z,
    num_classes=CLASSES,
    latent_dim=1,
)
# All binary images of 4 pixels.
X = jnp.asarray([[2.0 * (i >> bit & 1) - 1 for bit in range(PIXELS)] for i in range(2**PIXELS)])


def _log_joint():
    """log p(x, y) [16, 3] by the trapezoidal rule on [-10, 10], exact to about 1e-10 here."""
    z = np.linspace(-10, 10, 2001)
    prior = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    a, b, x = (np.asarray(v, np.float64) for v in (PARAMS["a"], PARAMS["b"], X))
    logits = a[:, None, :] + b[:, None, :] * z[None, :, None]
    # [16, 3, 2001]
    log_likelihood = -np.logaddexp(0, -x[:, None, None, :] * logits[None]).sum(-1)
    return np.log((np.exp(log_likelihood) * prior).sum(-1) / CLASSES)


def _mean_losses(num_draws=4000):
    """(the mean of L over draws [16, 3], its standard error)."""
    keys = jax.random.split(jax.random.key(0), num_draws)
    draws = jax.jit(jax.vmap(lambda key: objective.all_class_losses(NETWORKS, PARAMS, X, key)))(keys)
    return np.asarray(draws.mean(0)), np.asarray(draws.std(0)) / np.sqrt(num_draws)


def test_the_quadrature_is_a_distribution_over_all_images_and_classes():
    assert np.exp(_log_joint()).sum() == pytest.approx(1, abs=1e-6)


def test_the_labelled_loss_in_expectation_is_the_gap_above_the_exact_evidence():
    """-log p(x, y) + KL(q(z|x, y) || p(z|x, y)), the divergence by quadrature; within 5 standard errors of
    48 means."""
    z = np.linspace(-10, 10, 2001)
    x, a, b = (np.asarray(v, np.float64) for v in (X, PARAMS["a"], PARAMS["b"]))
    mean = 0.3 * x.sum(1)[:, None] * np.asarray(PARAMS["w"])[:, 0]
    log_q = -0.5 * ((z - mean[..., None]) ** 2 / np.exp(-0.5) + np.log(2 * np.pi) - 0.5)
    logits = a[:, None, :] + b[:, None, :] * z[None, :, None]
    log_p = -np.logaddexp(0, -x[:, None, None, :] * logits[None]).sum(-1)
    log_p = log_p - 0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(CLASSES)
    exact = (np.exp(log_q) * (log_q - log_p)).sum(-1) * (z[1] - z[0])
    found, error = _mean_losses()
    assert np.all(exact >= -_log_joint() - 1e-9)  # -L <= log p(x, y)
    np.testing.assert_array_less(np.abs(found - exact), 5 * error + 1e-5)


def test_the_unlabelled_loss_sums_over_classes_and_bounds_the_evidence():
    labelled = jnp.asarray(-_log_joint(), jnp.float32)  # the best that q(z|x, y) could do
    log_q = jax.nn.log_softmax(NETWORKS.classify(PARAMS, X))
    found = np.asarray(objective.unlabelled_loss(labelled, log_q))
    q = np.exp(np.asarray(log_q, np.float64))
    by_hand = [
        sum(q[i, k] * (float(labelled[i, k]) + np.log(q[i, k])) for k in range(CLASSES)) for i in range(16)
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    evidence = np.logaddexp.reduce(_log_joint(), axis=1)
    assert np.all(-found <= evidence + 1e-5)
    best = objective.unlabelled_loss(labelled, jax.nn.log_softmax(-labelled))
    np.testing.assert_allclose(-np.asarray(best), evidence, rtol=1e-5)


def test_a_class_that_is_certain_makes_the_unlabelled_loss_the_labelled_one():
    log_q = jnp.asarray([[0.0, -200.0, -200.0]])
    assert float(objective.unlabelled_loss(jnp.asarray([[7.0, 1.0, 2.0]]), log_q)[0]) == pytest.approx(7)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    loss = objective.make_loss(NETWORKS, labelled_weight=0.5, alpha=2.0)
    batch = {
        "image": X[:6],
        "mask": jnp.asarray([1.0, 1, 1, 1, 0, 0]),
        "labelled_image": X[8:12],
        "label": jnp.asarray([0, 1, 2, 1], jnp.int32),
    }
    value, (metrics, _) = jax.jit(loss)(PARAMS, {}, batch, jax.random.key(3))
    labelled_key, unlabelled_key = jax.random.split(jax.random.key(3))

    @jax.jit
    def parts(eps):
        labelled = objective.class_losses(NETWORKS, PARAMS, X[8:12], jnp.eye(3)[batch["label"]], eps)
        log_q = jax.nn.log_softmax(NETWORKS.classify(PARAMS, X))
        return labelled, log_q, objective.all_class_losses(NETWORKS, PARAMS, X[:6], unlabelled_key)

    labelled, log_q, every = parts(jax.random.normal(labelled_key, (4, 1)))
    unlabelled = objective.unlabelled_loss(every[:4], log_q[:4])
    error = -np.mean([float(log_q[8 + i, k]) for i, k in enumerate((0, 1, 2, 1))])
    expected = 0.5 * float(labelled.mean()) + float(unlabelled.mean()) + 2 * error
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["cross_entropy"].value) == pytest.approx(error, rel=1e-5)
    assert float(metrics["unlabelled"].count) == 4


def test_a_negative_weight_is_told():
    with pytest.raises(UserError, match="alpha=-1"):
        objective.make_loss(NETWORKS, labelled_weight=1.0, alpha=-1.0)
