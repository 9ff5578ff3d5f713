"""Token losses of sequence models: cross-entropy under a mask, label smoothing, the z-loss; teacher forcing.

One loss serves language models, sequence-to-sequence models, taggers and classifiers of sequences: they
differ in what `apply` reads from the batch and in whether `targets` are `[B, T]` or `[B]`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.objectives.classification import (
    KeylessLossFn,
    cross_entropy,
    is_most_probable,
    label_smoothed_cross_entropy,
)
from jaxgen.types import Array, Batch, Key, Mean, PyTree, UserError

# (params, model_state, batch, key) -> (logits [..., V], new model_state); key None means evaluation.
ApplyFn = Callable[[PyTree, PyTree, Batch, Key | None], tuple[Array, PyTree]]


def z_loss(logits: Array) -> Array:
    """log² Z with Z = Σ_v exp(logit_v), which keeps log Z near 0 (Chowdhery et al. 2022, section 5).

    Args:
        logits: `[..., V]` of any float dtype; computed in float32.

    Returns:
        `[...]` float32, >= 0.
    """
    return jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))


def token_loss(
    logits: Array, targets: Array, *, label_smoothing: float = 0.0, z_weight: float = 0.0
) -> Array:
    """The loss of each token: smoothed cross-entropy + z_weight log² Z, in nats.

    Args:
        logits: `[..., V]`.
        targets: `[...]` integers in [0, V).
        label_smoothing: the share of the target's mass that all V tokens get alike, in [0, 1).
        z_weight: >= 0; 1e-4 is usual.

    Returns:
        `[...]` float32.
    """
    loss = label_smoothed_cross_entropy(logits, targets, label_smoothing)
    return loss + z_weight * z_loss(logits) if z_weight else loss


def make_loss(apply: ApplyFn, *, label_smoothing: float = 0.0, z_weight: float = 0.0) -> KeylessLossFn:
    """The mean token loss over the tokens that `mask` counts.

    Reads `targets` and, where there is one, `mask`, both `[B, T]` or `[B]`; `apply` reads the rest of the
    batch and may hand on a model state, such as the carry of a recurrent network. Teacher forcing is a batch
    whose `tokens` are the targets shifted by one. What stands at masked places changes no number, as long as
    the network itself keeps padding out.

    Metrics: `loss`, what is minimised; `nats`, the plain cross-entropy, whatever the smoothing; `accuracy` in
    [0, 1], the share of tokens that are the most probable one.

    Raises:
        UserError: `label_smoothing` is not in [0, 1) or `z_weight` is negative.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"objective.label_smoothing must be in [0, 1), not {label_smoothing}.")
    if z_weight < 0.0:
        raise UserError(f"objective.z_weight must be at least 0, not {z_weight}.")

    def loss_fn(params: PyTree, model_state: PyTree, batch: Batch, key: Key | None):
        logits, model_state = apply(params, model_state, batch, key)
        targets, mask = batch["targets"], batch.get("mask")
        per_token = token_loss(logits, targets, label_smoothing=label_smoothing, z_weight=z_weight)
        loss = Mean.of(per_token, mask)
        metrics = {
            "loss": loss,
            "nats": Mean.of(cross_entropy(logits, targets), mask),
            "accuracy": Mean.of(is_most_probable(logits, targets), mask),
        }
        return loss.value_or_zero, (metrics, model_state)

    return loss_fn


def reset_carry(carry: PyTree, reset: Array) -> PyTree:
    """The carry with the rows where `reset` `[B]` is 1 set to zero; leaves are `[B, ...]`."""

    def keep(leaf: Array) -> Array:
        flags = jnp.reshape(reset, (-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(jnp.broadcast_to(flags, leaf.shape) > 0, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(keep, carry)
