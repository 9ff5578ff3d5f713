"""Losses: named mathematics per example, then make_loss, which calls a network."""

from __future__ import annotations

from jaxgen.types import Array, Batch, UserError


def label_of(batch: Batch, conditional: bool) -> Array | None:
    """batch["label"], or None where the model is told none; UserError where it is missing."""
    if conditional and "label" not in batch:
        raise UserError("a conditional model needs labels, and the data have none.")
    return batch["label"] if conditional else None
