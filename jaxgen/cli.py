"""The command line: an experiment, its preset and the overrides, and what is wrong with them."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxgen.recorded import flatten
from jaxgen.types import UserError


class ExperimentModule(NamedTuple):
    """A loaded `experiments/x.py` with the name it is recorded under."""

    name: str  # ddpm
    file: Path
    module: types.ModuleType


def fail(error: Exception) -> NoReturn:
    """Says the one sentence on stderr and ends with status 2."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    print(f"jaxgen: {text}", file=sys.stderr)
    raise SystemExit(2)


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' Did you mean X?', or the choices where nothing is near."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(sorted(choices))}."


def experiments_folder() -> Path:
    """The folder of the experiments that come with jaxgen."""
    import experiments

    return Path(next(iter(experiments.__path__)))


def load_experiment(file: str) -> ExperimentModule:
    """Loads an experiment from a path relative to the current folder, or to where jaxgen lies."""
    path = Path(file)
    if not path.exists() and not path.is_absolute():
        path = experiments_folder().parent / file
    if not path.is_file():
        known = [f"experiments/{name}.py" for name in experiment_names()]
        raise UserError(f"There is no experiment file {file!r}.{did_you_mean(file, known)}")
    # The module is imported under its package name where it has one, so that experiments that use one
    # another share their modules.
    if path.resolve().parent == experiments_folder().resolve():
        module = importlib.import_module(f"experiments.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(f"jaxgen_user_experiment_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{file} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up by name
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise UserError(f"{file} is not valid Python: {error}.") from error
    for needed in ("PRESETS", "get_config", "build"):
        if not hasattr(module, needed):
            raise UserError(f"{file} is not an experiment: it defines no {needed}.")
    return ExperimentModule(path.stem, path, module)


def preset_config(experiment: ExperimentModule, preset: str) -> ConfigDict:
    """The config of a preset; UserError with a suggestion where there is none of that name."""
    presets = experiment.module.PRESETS
    if preset not in presets:
        raise UserError(
            f"{experiment.name} has no preset {preset!r}.{did_you_mean(preset, list(presets))}"
            if preset
            else f"Say which preset of {experiment.name}: --config={experiment.file}:PRESET, "
            f"one of {', '.join(presets)}."
        )
    return experiment.module.get_config(preset)


def split_config_argument(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes --config=FILE:PRESET (or --config FILE:PRESET) out of the arguments."""
    found, rest, position = None, [], 0
    while position < len(argv):
        argument = argv[position]
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if not equals:
                position += 1
                if position == len(argv):
                    raise UserError("Missing value for --config: write --config=experiments/NAME.py:PRESET.")
                value = argv[position]
            found = value
        else:
            rest.append(argument)
        position += 1
    return found, rest


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> tuple[str | None, ConfigDict | None]:
    """Parses the whole command line into `flag_values`; returns (FILE:PRESET, its config with the overrides).

    Every mistake raises UserError.
    """
    source, rest = split_config_argument(argv)
    config = None
    try:
        if source is not None:
            file, _, preset = source.partition(":")
            default = preset_config(load_experiment(file), preset)
            config = default.copy_and_resolve_references()
            config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=list(rest))
        elif any(argument.lstrip("-").startswith(("config.", "noconfig.")) for argument in rest):
            raise UserError("Overrides such as --config.x=y need --config=experiments/NAME.py:PRESET.")
        positional = flag_values(list(rest))
    except (flags.Error, config_flags.FlagOrderError) as error:
        raise UserError(_with_suggestion(str(error), flag_values)) from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"The config has no field {error.args[0] if error.args else error}") from error
    if positional[1:]:
        raise UserError(f"Unexpected argument {positional[1]!r}: flags are written --name=value.")
    if config is not None:
        check_same_fields(default, config)
    return source, config


def _with_suggestion(text: str, flag_values: flags.FlagValues) -> str:
    unknown = text.removeprefix("Unknown command line flag ").strip("'") if "Unknown" in text else ""
    if not unknown:
        return text
    names = [name for name, flag in flag_values.flags_by_module_dict().items() for name in ()] or list(
        flag_values
    )
    near = difflib.get_close_matches(unknown.removeprefix("no"), names, n=1)
    return f"Unknown flag --{unknown}." + (f" Did you mean --{near[0]}?" if near else " See --help.")


def check_same_fields(default: ConfigDict, config: ConfigDict) -> None:
    """UserError where an override replaced a group, changed a type within a tuple, or is not a number."""
    expected, found = flatten(default), flatten(config)
    for name in [*found, *expected]:
        if name not in found or name not in expected:
            raise UserError(f"config.{name} cannot be added or removed: override the fields of its group.")
        value = found[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name} must be a finite number, not {value}.")
        if isinstance(value, tuple) and expected[name]:
            wanted = type(expected[name][0])
            for item in value:
                if not isinstance(item, (int, float) if wanted is float else wanted):
                    raise UserError(
                        f"config.{name} takes values of type {wanted.__name__}, such as "
                        f"{','.join(map(str, expected[name]))}; {item!r} is not one."
                    )


def experiment_names() -> list[str]:
    """The names of the experiments that come with jaxgen: the files of their folder."""
    return sorted(path.stem for path in experiments_folder().glob("*.py") if path.stem != "__init__")


def list_experiments() -> str:
    """A line for every preset of every experiment: command, hardware, minutes, expected score."""
    rows = [("--config=", "hardware", "minutes", "expected")]
    for name in experiment_names():
        module = load_experiment(f"experiments/{name}.py").module
        for preset, about in module.PRESETS.items():
            rows.append(
                (f"experiments/{name}.py:{preset}", about.hardware, f"{about.minutes:g}", about.expected)
            )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
