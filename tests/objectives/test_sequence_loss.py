"""Token losses against sums written out in NumPy, and what masks and resets do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import sequences
from jaxgen.types import UserError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 5)).astype(np.float32) * 2
TARGETS = np.asarray([[0, 4, 2], [1, 1, 3]], np.int32)
MASK = np.asarray([[1, 1, 0], [1, 0, 0]], np.float32)


def _by_hand(logits, target, epsilon, z_weight):
    """One token, float64."""
    logits = logits.astype(np.float64)
    log_z = np.log(np.exp(logits).sum())
    q = np.full(len(logits), epsilon / len(logits))
    q[target] += 1 - epsilon
    return -(q * (logits - log_z)).sum() + z_weight * log_z**2


@pytest.mark.parametrize(("epsilon", "z_weight"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_token_loss_is_the_printed_sum(epsilon, z_weight):
    found = sequences.token_loss(
        jnp.asarray(LOGITS), jnp.asarray(TARGETS), label_smoothing=epsilon, z_weight=z_weight
    )
    expected = [
        [_by_hand(LOGITS[b, t], TARGETS[b, t], epsilon, z_weight) for t in range(3)] for b in range(2)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-6)  # float32 against float64


def _loss(**options):
    return sequences.make_loss(lambda params, state, batch, key: (params + batch["shift"], state), **options)


def _batch(mask=MASK, targets=TARGETS):
    return {"shift": jnp.zeros(()), "targets": jnp.asarray(targets), "mask": jnp.asarray(mask)}


def test_the_loss_is_the_mean_over_counted_tokens():
    scalar, (metrics, state) = _loss(label_smoothing=0.1)(jnp.asarray(LOGITS), {"a": 1}, _batch(), None)
    counted = [(b, t) for b in range(2) for t in range(3) if MASK[b, t]]
    smooth = np.mean([_by_hand(LOGITS[i], TARGETS[i], 0.1, 0.0) for i in counted])
    plain = np.mean([_by_hand(LOGITS[i], TARGETS[i], 0.0, 0.0) for i in counted])
    right = np.mean([LOGITS[i].argmax() == TARGETS[i] for i in counted])
    np.testing.assert_allclose(scalar, smooth, rtol=2e-6)
    np.testing.assert_allclose(metrics["loss"].value, smooth, rtol=2e-6)
    np.testing.assert_allclose(metrics["nats"].value, plain, rtol=2e-6)
    assert float(metrics["accuracy"].value) == pytest.approx(right)
    assert float(metrics["loss"].count) == 3
    assert state == {"a": 1}


def test_padding_changes_no_number_and_no_gradient():
    loss = _loss(z_weight=1e-3)
    value = lambda logits, batch: loss(logits, {}, batch, None)[0]
    other_logits = np.where(MASK[..., None] > 0, LOGITS, 50.0).astype(np.float32)
    other_targets = np.where(MASK > 0, TARGETS, 3)
    results = [
        jax.value_and_grad(value)(jnp.asarray(logits), _batch(targets=targets))
        for logits, targets in ((LOGITS, TARGETS), (other_logits, other_targets))
    ]
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert not results[0][1][MASK == 0].any()


def test_all_padding_is_zero_not_nan():
    scalar, (metrics, _) = _loss()(jnp.asarray(LOGITS), {}, _batch(mask=np.zeros_like(MASK)), None)
    assert scalar == 0
    assert metrics["loss"].count == 0


def test_classes_of_whole_sequences_go_through_the_same_loss():
    batch = {"shift": jnp.zeros(()), "targets": jnp.asarray([0, 4])}
    scalar, (metrics, _) = _loss()(jnp.asarray(LOGITS[:, 0]), {}, batch, None)
    expected = np.mean([_by_hand(LOGITS[0, 0], 0, 0, 0), _by_hand(LOGITS[1, 0], 4, 0, 0)])
    np.testing.assert_allclose(scalar, expected, rtol=2e-6)
    assert metrics["loss"].count == 2


def test_reset_zeroes_the_rows_that_begin_anew():
    carry = {"h": jnp.arange(1.0, 7.0).reshape(3, 2), "c": jnp.ones((3, 2, 2))}
    kept = sequences.reset_carry(carry, jnp.asarray([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(kept["h"], [[1, 2], [0, 0], [5, 6]])
    np.testing.assert_array_equal(kept["c"][:, 0, 0], [1, 0, 1])


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_weight": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        _loss(**options)
