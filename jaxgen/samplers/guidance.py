"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxgen.samplers.ddpm import Predict
from jaxgen.types import Array


def predict_both(
    predict: Callable[[Array, Array, Array], Array], x: Array, t: Array, first: Array, second: Array
) -> tuple[Array, Array]:
    """`predict` told `first` and told `second`, int32 [B], in one call of twice the batch."""
    # The two halves are interleaved, so that a batch sharded over devices stays where it is.
    both = jnp.stack([first, second], axis=1).reshape(-1)
    output = predict(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), both)
    return output[0::2], output[1::2]


def classifier_free_guidance(
    predict: Callable[[Array, Array, Array], Array], label: Array, null_label: int, scale: float
) -> Predict:
    """unconditional + scale (conditional - unconditional), as a `Predict` for any chain.

    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, whose w is scale - 1: scale 0 is the
    unconditional model and 1 the conditional one, both at the cost of one plain call. Any other scale costs
    one call of twice the batch.

    The combination is linear and x_t is common to both, so it means the same for eps, x0 and v predictions.

    predict: (x [B, ...], t int32 [B], label int32 [B]) -> output [B, ...]
    label: int32 [B]
    null_label: the label that means "no label", seen by the network when labels were dropped in training
    """
    null = jnp.full_like(label, null_label)
    if scale == 1.0:
        return lambda x, t: predict(x, t, label)
    if scale == 0.0:
        return lambda x, t: predict(x, t, null)

    def guided(x: Array, t: Array) -> Array:
        conditional, unconditional = predict_both(predict, x, t, label, null)
        return unconditional + scale * (conditional - unconditional)

    return guided
