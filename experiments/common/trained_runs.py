"""Another run, known by its folder: what its config.json says it is, and the denoiser that it trained."""

from __future__ import annotations

import importlib
import json
import os
import types
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import common
from jaxgen.types import UserError


class TrainedRun(NamedTuple):
    """experiment: its file, as in config.json; module: of that experiment; config: as it was trained."""

    workdir: Path
    experiment: str
    preset: str
    module: types.ModuleType
    config: ConfigDict


def read_run(workdir: str) -> TrainedRun:
    """The run in a folder. Raises UserError where it holds none, or one of another version."""
    folder = Path(os.path.expanduser(workdir))
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        name, preset, values = Path(saved["experiment"]).stem, saved["preset"], saved["config"]
    except OSError as error:
        raise UserError(f"{folder} holds no run: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it says no experiment, preset and config.") from error
    # The name is data: only a file of this folder is imported.
    if name not in {file.stem for file in Path(common.__file__).parents[1].glob("*.py")}:
        raise UserError(f"{folder} holds a run of {saved['experiment']}, which is none of these experiments.")
    module = importlib.import_module(f"experiments.{name}")
    try:
        config = common.with_settings(module.get_config(preset), _flat(values))
    except Exception as error:  # fields that are gone or of another type: ml_collections raises several kinds
        raise UserError(f"{path} does not fit {name}:{preset} as it is now: {error}") from error
    return TrainedRun(folder, saved["experiment"], preset, module, config)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.channels': 64, ...} of nested groups; JSON's lists are tuples."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            fields.update(_flat(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = tuple(value) if isinstance(value, list) else value
    return fields


def read_denoiser_run(workdir: str) -> TrainedRun:
    """`read_run` of an experiment that has `denoiser(config, params) -> Denoiser`, for images in [-1, 1]."""
    run = read_run(workdir)
    if not hasattr(run.module, "denoiser"):
        raise UserError(
            f"{workdir} holds a run of {run.experiment}, which gives no denoiser: take one of ddpm, dae, "
            "ncsn, score_sde or restoration."
        )
    return run
