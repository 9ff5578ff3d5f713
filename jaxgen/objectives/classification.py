"""The cross-entropy of a classifier, plain and with smoothed labels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.types import Array, Batch, Key, Mean, Metrics, PyTree, UserError

# (params, model_state, image [B, H, W, C], key) -> (logits [B, K], model_state); key None means evaluation:
# no dropout, and running statistics are used and left as they are.
ApplyFn = Callable[[PyTree, PyTree, Array, Key | None], tuple[Array, PyTree]]
# A LossFn that takes no key too.
KeylessLossFn = Callable[[PyTree, PyTree, Batch, Key | None], tuple[Array, tuple[Metrics, PyTree]]]


def cross_entropy(logits: Array, label: Array) -> Array:
    """The negative log-likelihood of the label, -log softmax(logits)_label, in nats.

    Args:
        logits: `[..., K]` of any float dtype; computed in float32.
        label: `[...]` integers in [0, K).

    Returns:
        `[...]` float32, >= 0.

    Raises:
        ValueError: the shapes do not agree.
    """
    if logits.shape[:-1] != label.shape:
        raise ValueError(f"logits of shape {logits.shape} do not fit labels of shape {label.shape}")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]


def is_most_probable(logits: Array, label: Array) -> Array:
    """Whether the label is the first of the classes with the largest logit: argmax_k logits_k = label.

    Written as comparisons with the label's logit, which XLA on CPU works out in a twentieth of the time that
    its argmax over 10,000 classes takes. A row with NaN is never right.

    Args:
        logits: `[..., K]`.
        label: `[...]` integers in [0, K).

    Returns:
        bool `[...]`.
    """
    chosen = jnp.take_along_axis(logits, label[..., None], axis=-1)
    number = jnp.arange(logits.shape[-1]).reshape((1,) * label.ndim + (-1,))
    first = (logits == chosen) & (number >= label[..., None])
    return jnp.all((logits < chosen) | first, axis=-1)


def label_smoothed_cross_entropy(logits: Array, label: Array, label_smoothing: float) -> Array:
    """Cross-entropy against a target that gives a share of its mass to all classes alike, in nats.

    The target is q(k) = (1 - epsilon) [k = label] + epsilon / K (Szegedy et al. 2016, section 7), so the loss
    is (1 - epsilon) H(label, p) + epsilon H(uniform, p).

    Args:
        logits: `[..., K]` of any float dtype; computed in float32.
        label: `[...]` integers in [0, K).
        label_smoothing: epsilon, in [0, 1); 0 is the plain cross-entropy.

    Returns:
        `[...]` float32, >= the entropy of q.
    """
    if not label_smoothing:
        return cross_entropy(logits, label)
    uniform = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
    return (1.0 - label_smoothing) * cross_entropy(logits, label) + label_smoothing * uniform


def make_loss(apply: ApplyFn, *, label_smoothing: float = 0.0) -> KeylessLossFn:
    """The loss of a classifier: the mean (label-smoothed) cross-entropy over the batch.

    Reads `image` `[B, H, W, C]`, `label` `[B]` and, where there is one, `mask` `[B]` (1: counts, 0: padding).
    Metrics: `loss` (nats) and `accuracy` in [0, 1]. The key, which may be None for evaluation, goes to
    `apply` as it is.

    Raises:
        UserError: `label_smoothing` is not in [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}; give a value >= 0 and < 1.")

    def loss_fn(params: PyTree, model_state: PyTree, batch: Batch, key: Key | None):
        logits, model_state = apply(params, model_state, batch["image"], key)
        mask = batch.get("mask")
        loss = Mean.of(label_smoothed_cross_entropy(logits, batch["label"], label_smoothing), mask)
        accuracy = Mean.of(is_most_probable(logits, batch["label"]), mask)
        return loss.value_or_zero, ({"loss": loss, "accuracy": accuracy}, model_state)

    return loss_fn
