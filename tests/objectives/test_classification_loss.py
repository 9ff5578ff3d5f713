import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.objectives.classification import (
    cross_entropy,
    is_most_probable,
    label_smoothed_cross_entropy,
    make_loss,
)
from jaxgen.types import UserError


def linear(params, model_state, image, key):
    """A network of one matrix; with a key it adds noise, as dropout would."""
    logits = image.reshape(image.shape[0], -1) @ params
    return logits if key is None else logits + jax.random.normal(key, logits.shape), model_state


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.standard_normal((6, 2, 2, 1)), jnp.float32),
        "label": jnp.asarray([0, 1, 2, 2, 1, 0]),
    }


@pytest.fixture
def params():
    return jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)


def test_uniform_logits_cost_log_k():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 9])), math.log(10), rtol=1e-6)


def test_two_classes_closed_form():
    # -log sigmoid(z) with z the margin of the label.
    logits = jnp.array([[1.0, 3.0], [0.0, -2.0]])
    expected = [math.log1p(math.exp(2.0)), math.log1p(math.exp(-2.0))]
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 0])), expected, rtol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    logits = jnp.array([[1e4, 0.0], [-1e4, 0.0]])
    np.testing.assert_array_equal(cross_entropy(logits, jnp.array([0, 0])), [0.0, 1e4])


def test_agrees_with_optax():
    rng = np.random.default_rng(2)
    logits, label = (
        jnp.asarray(rng.standard_normal((5, 3, 7)), jnp.float32),
        jnp.asarray(rng.integers(0, 7, (5, 3))),
    )
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    np.testing.assert_allclose(cross_entropy(logits, label), expected, rtol=1e-5)  # float32, 7 terms
    smoothed = optax.losses.smooth_labels(jax.nn.one_hot(label, 7), 0.2)
    expected = optax.losses.softmax_cross_entropy(logits, smoothed)
    np.testing.assert_allclose(label_smoothed_cross_entropy(logits, label, 0.2), expected, rtol=1e-5)


def test_smoothing_of_zero_is_the_plain_loss():
    logits, label = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([1])
    np.testing.assert_array_equal(
        label_smoothed_cross_entropy(logits, label, 0.0), cross_entropy(logits, label)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_most_probable_class_is_the_argmax_with_ties(dtype):
    # Few values, so that most rows have ties.
    logits = jax.random.randint(jax.random.key(0), (4, 50, 6), 0, 4).astype(dtype)
    for label in range(6):
        wanted = jnp.argmax(logits, axis=-1) == label
        given = jax.jit(is_most_probable)(logits, jnp.full((4, 50), label))
        np.testing.assert_array_equal(given, wanted)
    assert not is_most_probable(jnp.array([[jnp.nan, 1.0]]), jnp.array([1])).any()


def test_smoothed_minimum_is_the_targets_entropy():
    # At p = q the loss is H(q) and its gradient vanishes; q = (0.9 + 0.1/4, 0.1/4, 0.1/4, 0.1/4).
    q = np.array([0.925, 0.025, 0.025, 0.025])
    logits, label = jnp.asarray(np.log(q), jnp.float32)[None], jnp.array([0])
    loss = label_smoothed_cross_entropy(logits, label, 0.1)[0]
    assert float(loss) == pytest.approx(-np.sum(q * np.log(q)), rel=1e-5)
    gradient = jax.grad(lambda z: label_smoothed_cross_entropy(z, label, 0.1)[0])(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.array([[1.0, 2.0, 4.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([0]))
    assert loss.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(math.log(math.e + math.e**2 + math.e**4) - 1, rel=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy(jnp.zeros((4, 3)), jnp.zeros((5,), jnp.int32))


def test_loss_and_metrics(batch, params):
    loss, (metrics, state) = make_loss(linear)(params, {"kept": 1}, batch, None)
    logits, _ = linear(params, {}, batch["image"], None)
    expected = jnp.mean(cross_entropy(logits, batch["label"]))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["loss"].value) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["accuracy"].value) == np.mean(np.argmax(logits, 1) == np.asarray(batch["label"]))
    assert float(metrics["loss"].count) == 6
    assert state == {"kept": 1}


def test_masked_items_count_for_nothing(batch, params):
    loss_fn = make_loss(linear, label_smoothing=0.1)
    kept = {name: value[:4] for name, value in batch.items()}
    # The padding is poison: an infinity must reach neither the loss nor its gradient.
    padded = dict(batch, image=batch["image"].at[4:].set(1e30), mask=jnp.array([1, 1, 1, 1, 0, 0]))
    (loss, (metrics, _)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, {}, padded, None)
    (expected, (expected_metrics, _)), expected_gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        params, {}, kept, None
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_a_batch_of_padding_alone_weighs_nothing(batch, params):
    loss, (metrics, _) = make_loss(linear)(params, {}, dict(batch, mask=jnp.zeros(6)), None)
    assert float(loss) == 0.0
    assert float(metrics["loss"].count) == 0.0


def test_smoothing_reaches_the_loss(batch, params):
    plain, _ = make_loss(linear)(params, {}, batch, None)
    smooth, _ = make_loss(linear, label_smoothing=0.3)(params, {}, batch, None)
    assert abs(float(plain) - float(smooth)) > 1e-3


def test_the_key_reaches_the_network(batch, params):
    loss_fn = make_loss(linear)
    first, again, other = (loss_fn(params, {}, batch, jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert float(first) == float(again) != float(other)


def test_traces_once_under_jit(batch, params):
    step = jax.jit(chex.assert_max_traces(make_loss(linear), n=1))
    for seed in range(3):
        step(params, {}, batch, jax.random.key(seed))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0, 2.0, math.nan])
def test_smoothing_out_of_range_is_refused(label_smoothing):
    with pytest.raises(UserError, match="label_smoothing"):
        make_loss(linear, label_smoothing=label_smoothing)
