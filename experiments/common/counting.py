"""What the experiments that only count have in common: one pass over the data, a batch a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from jaxgen import sharding
from jaxgen.types import UserError

# Settings of a smoke preset's loop.
SMOKE_TRAIN = {
    "train.num_steps": 4,
    "train.steps_per_dispatch": 2,
    "train.log_every": 2,
    "train.validate_every": 2,
    "train.checkpoint_every": 2,
}


def base_config(*, source: str, batch_size: int, num_steps: int) -> ConfigDict:
    """The groups `data` and `train` and the seed; counting has no rate."""
    config = common.base_config(num_steps=num_steps)
    del config.optim
    config.data = ConfigDict({"source": source, "batch_size": batch_size})
    config.train.steps_per_dispatch = 1
    config.train.log_every = 1
    config.train.validate_every = num_steps
    config.train.checkpoint_every = num_steps
    return config


def one_pass(
    config: ConfigDict, num: int, rows: Callable[[np.ndarray], dict[str, Any]], mesh: jax.sharding.Mesh
) -> Callable[[int], dict[str, Any]]:
    """step -> `rows(positions)` of this process's share of batch number `step`, and their `mask`.

    Positions are 0 ... num - 1 in order; those past the end are given as the last one with mask 0.

    Raises:
        UserError: the steps do not reach the end.
    """
    size, steps = config.data.batch_size, config.train.num_steps
    sharding.check_divides(mesh, size, "data.batch_size")
    if size * steps < num:
        raise UserError(
            f"train.num_steps={steps} batches of data.batch_size={size} do not reach the end of {num} "
            f"positions: {-(-num // size)} steps do."
        )
    share = size // jax.process_count()

    def batch(step: int) -> dict[str, Any]:
        positions = step * size + jax.process_index() * share + np.arange(share)
        inside = positions < num
        return {**rows(np.minimum(positions, num - 1)), "mask": inside.astype(np.float32)}

    return batch
