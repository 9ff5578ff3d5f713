"""Guidance towards one description and away from another."""

from __future__ import annotations

from collections.abc import Callable

from jaxgen.samplers.ddpm import Predict
from jaxgen.samplers.guidance import predict_both
from jaxgen.types import Array


def negative_prompt_guidance(
    predict: Callable[[Array, Array, Array], Array], told: Array, away: Array, scale: Array
) -> Predict:
    """away + scale (told - away), as a `Predict` for any chain; always one call of twice the batch.

    Ho & Salimans 2022, eq. 6, with the prediction for another description in place of the unconditional one;
    where `away` is the empty description it is classifier-free guidance. Each sample has its scale, so that
    one program serves all scales: 1 is the plain conditional model.

    predict: (x [B, ...], t int32 [B], description int32 [B]) -> output [B, ...]
    told, away: int32 [B], the numbers of the descriptions to go to and to leave; scale: float32 [B]
    """

    def guided(x: Array, t: Array) -> Array:
        towards, instead = predict_both(predict, x, t, told, away)
        return instead + scale.reshape(-1, *(1,) * (x.ndim - 1)) * (towards - instead)

    return guided
