"""The command line: an experiment, its preset and the overrides, and what is wrong with them."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
import traceback
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from jaxgen.recorded import flatten, table
from jaxgen.replicas import Label
from jaxgen.types import UserError, advice, unknown

# ---- what is said of a mistake


def complain(error: Exception) -> None:
    """Says what is wrong on stderr, on one line."""
    print(f"jaxgen: {' '.join(str(error).split())}", file=sys.stderr)


class Choice(flags.EnumParser):
    """A flag with a few possible values, which suggests the nearest one."""

    def parse(self, argument: str) -> str:
        if argument not in self.enum_values:
            raise ValueError(advice(argument, self.enum_values))
        return argument


# ---- experiments


class ExperimentModule(NamedTuple):
    """A loaded `experiments/x.py` with the name it is recorded under."""

    name: str  # ddpm
    file: Path
    module: types.ModuleType


def experiments_folder() -> Path:
    """The folder of the experiments that come with jaxgen."""
    import experiments

    return Path(next(iter(experiments.__path__)))


def experiment_names() -> list[str]:
    """The names of the experiments that come with jaxgen: the files of their folder."""
    return sorted(path.stem for path in experiments_folder().glob("*.py") if path.stem != "__init__")


def load_experiment(file: str) -> ExperimentModule:
    """Loads an experiment from a path relative to the current folder, or to where jaxgen lies."""
    path = Path(file)
    if not path.exists() and not path.is_absolute():
        path = experiments_folder().parent / file
    if not path.is_file():
        raise unknown("experiment file", file, [f"experiments/{name}.py" for name in experiment_names()])
    try:
        module = _import(path)
    except Exception as error:  # whatever the file's code raises
        where = next((f", line {f.lineno}" for f in _frames(error) if Path(f.filename).samefile(path)), "")
        raise UserError(f"{file} cannot be loaded: {type(error).__name__}: {error}{where}.") from error
    for needed in ("PRESETS", "get_config", "build"):
        if not hasattr(module, needed):
            raise UserError(f"{file} is not an experiment: it defines no {needed}.")
    return ExperimentModule(path.stem, path, module)


def _import(path: Path) -> types.ModuleType:
    # The module is imported under its package name where it has one, so that experiments that use one
    # another share their modules.
    if path.resolve().parent == experiments_folder().resolve():
        return importlib.import_module(f"experiments.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"jaxgen_user_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def _frames(error: Exception) -> Iterable[traceback.FrameSummary]:
    """Where the error came from, innermost first, that can be found on disk."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return (frame for frame in frames if Path(frame.filename).exists())


def preset_config(experiment: ExperimentModule, preset: str) -> ConfigDict:
    """The config of a preset; UserError with a suggestion where there is none of that name."""
    presets = list(experiment.module.PRESETS)
    if not preset:
        raise UserError(
            f"Say which preset of {experiment.name}: --config={experiment.file}:PRESET, "
            f"one of {', '.join(presets)}."
        )
    if preset not in presets:
        raise unknown(f"preset of {experiment.name}", preset, presets)
    return experiment.module.get_config(preset)


def list_experiments() -> str:
    """A line for every preset of every experiment: command, hardware, minutes, expected score."""
    rows = [("--config=", "hardware", "minutes", "expected")]
    for name in experiment_names():
        module = load_experiment(f"experiments/{name}.py").module
        for preset, about in module.PRESETS.items():
            rows.append(
                (f"experiments/{name}.py:{preset}", about.hardware, f"{about.minutes:g}", about.expected)
            )
    return table(rows)


# ---- the command line


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> tuple[str | None, ConfigDict | None]:
    """Parses the whole command line into `flag_values`; returns (FILE:PRESET, its config with the overrides).

    Overrides are written --config.GROUP.FIELD=VALUE, before or after --config=FILE:PRESET; where one is
    given twice the last counts. Every mistake raises UserError.
    """
    source, overrides, rest = _split(argv)
    try:
        positional = flag_values(rest)
    except flags.UnrecognizedFlagError as error:
        names = [f"--{name}" for name in ("config", *flag_values)]
        raise unknown("flag", f"--{error.flagname}", names) from error
    except (flags.Error, UnicodeDecodeError) as error:  # the latter from a --flagfile that is no text
        raise UserError(str(error)) from error
    if positional[1:]:
        raise UserError(f"Unexpected argument {positional[1]!r}: flags are written --name=value.")
    if source is None:
        if overrides:
            raise UserError(f"{overrides[0]} needs --config=experiments/NAME.py:PRESET beside it.")
        return None, None
    file, _, preset = source.partition(":")
    config = preset_config(load_experiment(file), preset)
    fields = flatten(config.to_dict())
    changes = dict(_override(argument, fields) for argument in overrides)
    config.update_from_flattened_dict(changes)
    return source, config


def _split(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """The value of --config=VALUE or --config VALUE, the overrides --config.x…, and all other arguments."""
    source, overrides, rest = None, [], list(argv[:1])
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":  # what follows are no flags
            rest += [argument, *arguments]
            break
        name, equals, value = argument.partition("=")
        name = name.lstrip("-") if argument.startswith("-") else ""
        if name == "config":
            source = value if equals else next(arguments, None)
            if source is None:
                raise UserError("--config needs a value: write --config=experiments/NAME.py:PRESET.")
        elif name.startswith(("config.", "noconfig.")):
            overrides.append(argument)
        else:
            rest.append(argument)
    return source, overrides, rest


def _override(argument: str, fields: dict[str, Any]) -> tuple[str, Any]:
    """--config.model.channels=64 -> ("model.channels", 64), of the type that the field has in `fields`."""
    name, equals, text = argument.lstrip("-").partition("=")
    negated, name = name.startswith("noconfig."), name.partition(".")[2]
    if name not in fields:
        raise _unknown_field(name, fields)
    if isinstance(fields[name], bool) and not equals:
        return name, not negated
    if negated or not equals:
        raise UserError(f"config.{name} needs a value: write --config.{name}={_as_text(fields[name])}.")
    return name, parse_value(name, text, fields[name])


def _unknown_field(name: str, fields: Iterable[str]) -> UserError:
    inside = [field for field in fields if field.startswith(f"{name}.")]
    if inside:
        return UserError(f"config.{name} is a group of fields: override one of {', '.join(inside)}.")
    group, _, last = name.rpartition(".")
    beside = {field.rpartition(".")[2]: field for field in fields if field.rpartition(".")[0] == group}
    near = [beside[match] for match in difflib.get_close_matches(last, beside, n=1)]
    # Whole names look alike for their groups, so elsewhere more is asked of a match.
    near = near or difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
    if near:
        return UserError(f"unknown config field {name!r}: did you mean {near[0]!r}?")
    groups = sorted({f"{field.partition('.')[0]}.…" for field in fields if "." in field})
    choices = beside.values() if group and beside else groups
    return UserError(f"unknown config field {name!r}: choose one of {', '.join(choices)}")


def parse_value(name: str, text: str, preset: Any) -> Any:
    """What `text` stands for, as a value of the same type as `preset`, the field's value in the preset.

    A tuple is written 1,2,3 or (1,2,3); all its values have one type.
    """
    if isinstance(preset, tuple):
        items = text.strip().removeprefix("(").removesuffix(")").split(",")
        items = items if items[-1].strip() else items[:-1]  # the comma of (1,), or nothing at all
        example = preset[0] if preset else 0  # so far every tuple is of whole numbers
        return tuple(parse_value(name, item, example) for item in items)
    if isinstance(preset, bool):
        if text.lower() in ("true", "1"):
            return True
        if text.lower() in ("false", "0"):
            return False
        raise UserError(f"config.{name} must be true or false, not {text!r}.")
    if isinstance(preset, int):
        try:
            number = int(text)
        except ValueError:
            raise UserError(f"config.{name} must be a whole number, not {text!r}.") from None
        if abs(number) >= 2**31:  # what is computed with it is int32
            raise UserError(f"config.{name} must be below 2147483648, not {text}.")
        return number
    if isinstance(preset, float):
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"config.{name} must be a number, not {text!r}.") from None
        if not math.isfinite(value):
            raise UserError(f"config.{name} must be a finite number, not {text!r}.")
        return value
    return text


# ---- several runs of one config

_MAX_REPLICAS = 1024


def replica_configs(config: ConfigDict) -> dict[Label, ConfigDict]:
    """The configs of the runs that config.num_seeds and config.sweep ask for; most often itself alone.

    Seeds are config.seed, config.seed + 1, ...; a sweep, written optim.learning_rate:1e-4,1e-3, gives each of
    its values to every seed. Raises UserError for a sweep of something that is no number.
    """
    num_seeds, sweep = config.get("num_seeds", 1), config.get("sweep", "")
    if num_seeds < 1:
        raise UserError(f"num_seeds must be at least 1, not {num_seeds}.")
    field, values = _parse_sweep(sweep, flatten(config.to_dict())) if sweep else ("", [None])
    if num_seeds * len(values) > _MAX_REPLICAS:
        raise UserError(
            f"num_seeds and sweep ask for {num_seeds * len(values)} runs at once: ask for {_MAX_REPLICAS} or "
            "fewer."
        )
    if field == "seed" and num_seeds > 1:
        raise UserError("sweep=seed:… and num_seeds both choose the seeds: use one of them.")
    configs = {}
    for value in values:
        for number in range(num_seeds):
            one = config.copy_and_resolve_references()
            if "num_seeds" in one:
                one.num_seeds, one.sweep = 1, ""
            if field:
                one.update_from_flattened_dict({field: value})
            one.seed += number
            words = f"{field}={_as_text(value)}" if field else ""
            configs[Label(words, one.seed if num_seeds > 1 else None)] = one
    return configs


def _parse_sweep(sweep: str, fields: dict[str, Any]) -> tuple[str, list[Any]]:
    """'optim.learning_rate:1e-4,1e-3' -> ('optim.learning_rate', [0.0001, 0.001])."""
    name, colon, text = sweep.partition(":")
    name = name.strip()
    if not colon:
        raise UserError(f"sweep={sweep} needs values: write --config.sweep=optim.learning_rate:1e-4,1e-3.")
    if name not in fields:
        # optim.lr for optim.learning_rate
        short = [field for field in fields if _initials(field) == name]
        if len(short) != 1:
            raise _unknown_field(name, fields)
        name = short[0]
    preset = fields[name]
    if name == "num_seeds" or isinstance(preset, bool) or not isinstance(preset, int | float):
        raise UserError(f"sweep={name}:… cannot be: only a field that is a number can be swept.")
    values = [parse_value(name, item.strip(), preset) for item in text.split(",") if item.strip()]
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"sweep={sweep} needs two values or more, all different.")
    return name, values


def _initials(field: str) -> str:
    group, dot, last = field.rpartition(".")
    return group + dot + "".join(word[:1] for word in last.split("_"))


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
