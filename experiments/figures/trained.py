"""What the figures of trained runs share: a run of one experiment, and a run's newest state."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import jax

from experiments.common.trained_runs import TrainedRun, read_run
from jaxgen import loop
from jaxgen.types import Experiment, TrainState, UserError


def run_of(module: ModuleType, workdir: Path) -> TrainedRun:
    """The run of this experiment in a folder; UserError where there is none, or one of another experiment."""
    run = read_run(str(workdir))
    if run.module is not module:
        name = module.__name__.rpartition(".")[2]
        raise UserError(f"{workdir} holds a run of {run.experiment}, not of experiments/{name}.py.")
    return run


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
