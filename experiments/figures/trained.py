"""What the figures of trained runs share: a run's newest state."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxgen import loop
from jaxgen.types import Experiment, TrainState, UserError


def restore(experiment: Experiment, workdir: Path, mesh: jax.sharding.Mesh) -> TrainState:
    """The newest state of a run; UserError where there is none."""
    checkpoints = loop.open_checkpoints(experiment, workdir)
    try:
        state = checkpoints.restore(loop.abstract_state(experiment, mesh))
    finally:
        checkpoints.close()
    if state is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train it first.")
    return state
