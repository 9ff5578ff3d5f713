"""Values of a config that make no sense: told by the name that the user types, before any work is done."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import jax
from ml_collections import ConfigDict

from experiments import common
from jaxgen import data, optim
from jaxgen.types import LossFn, System, UserError, unknown


def _value(config: ConfigDict, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), config)


def at_least(config: ConfigDict, least: float, *fields: str) -> None:
    """UserError where a field, or an entry of one that is a tuple, is below `least`."""
    for field in fields:
        value = _value(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            if not number >= least:
                raise UserError(f"{field} must be at least {least}, not {number}.")


def above(config: ConfigDict, bound: float, *fields: str) -> None:
    """UserError where a field is not above `bound`."""
    for field in fields:
        if not _value(config, field) > bound:
            raise UserError(f"{field} must be above {bound}, not {_value(config, field)}.")


def at_most(config: ConfigDict, most: float, *fields: str) -> None:
    """UserError where a field is above `most`, which the data set."""
    for field in fields:
        if _value(config, field) > most:
            raise UserError(f"{field} must be at most {most} with these data, not {_value(config, field)}.")


def in_range(config: ConfigDict, low: float, high: float, *fields: str, closed: bool = False) -> None:
    """UserError where a field is not in [low, high), or with `closed` in [low, high]."""
    for field in fields:
        value = _value(config, field)
        if not (low <= value < high or (closed and value == high)):
            raise UserError(f"{field} must be in [{low}, {high}{']' if closed else ')'}, not {value}.")


def one_of(config: ConfigDict, choices: Iterable[str], *fields: str) -> None:
    """UserError with a suggestion where a field is none of the choices."""
    choices = tuple(choices)
    for field in fields:
        if _value(config, field) not in choices:
            raise unknown(field, _value(config, field), choices)


def check_data(config: ConfigDict) -> None:
    """The seed and the groups `data` and `train` of `common.base_config`."""
    at_least(config, 0, "seed")
    at_least(config, 1, "data.batch_size")
    names = common.augmentations(config.data)
    for name in names:
        if name not in data.AUGMENTATIONS:
            raise unknown("data.augment", name, tuple(data.AUGMENTATIONS))
    if len(set(names)) < len(names):
        raise UserError(f"data.augment names one twice: {config.data.augment}.")
    common.loop_settings(config.train)  # looks at its fields itself


def check_base(config: ConfigDict) -> None:
    """The groups of `common.base_config`."""
    check_data(config)
    at_least(config, 1, "optim.accumulate", "optim.decay_steps")
    in_range(config, 0, 1, "optim.ema_decay")
    one_of(config, get_args(optim.ScheduleName), "optim.schedule")
    one_of(config, get_args(optim.OptimizerName), "optim.optimizer")
    if config.data.batch_size % config.optim.accumulate:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate} does not divide data.batch_size="
            f"{config.data.batch_size}."
        )
    common.make_optimizer(config.optim, num_steps=config.train.num_steps)  # looks at its fields itself


def check_best_metric(name: str, metrics: LossFn, system: System, batch: Mapping[str, Any]) -> None:
    """UserError unless train.best_metric is "" or one of the `metrics` that validation computes."""
    if not name:
        return
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(system.init, key, batch)
    _, (names, _) = jax.eval_shape(metrics, state.params, state.model_state, batch, key)
    if name not in names:
        raise unknown("train.best_metric", name, tuple(names))


def check_unet(config: ConfigDict) -> None:
    """The fields of config.model that describe a U-Net."""
    at_least(config, 4, "model.channels")
    at_least(config, 1, "model.num_res_blocks", "model.num_groups", "model.channel_multipliers")
    at_least(config, 0, "model.head_dim")
    in_range(config, 0, 1, "model.dropout")
    one_of(config, common.DTYPES, "model.dtype")
    model = config.model
    if not model.channel_multipliers:
        raise UserError("model.channel_multipliers must have a value for each level, such as 1,2.")
    # A level narrower than its groups gets fewer of them.
    for width in (model.channels * multiplier for multiplier in model.channel_multipliers):
        if width > model.num_groups and width % model.num_groups:
            raise UserError(
                f"model.num_groups={model.num_groups} does not divide the {width} channels of a level: "
                "choose a divisor of model.channels."
            )


def check_unet_fits(model: ConfigDict, shape: tuple[int, ...]) -> None:
    """UserError unless the U-Net that `model` describes takes images of shape [H, W, C]."""
    height, width, _ = shape
    levels = len(model.channel_multipliers)
    if (height | width) % 2 ** (levels - 1):
        raise UserError(
            f"Images of {height}x{width} cannot be halved {levels - 1} times, as the {levels} values of "
            "model.channel_multipliers ask: give fewer, or other images."
        )
    heights = [height >> level for level in range(levels)]
    for resolution in model.attention_resolutions:
        if resolution not in heights:
            raise UserError(
                f"model.attention_resolutions has {resolution}, but the levels are "
                f"{', '.join(map(str, heights))} high: choose among them."
            )
    for multiplier, level_height in zip(model.channel_multipliers, heights, strict=True):
        attends = level_height in (*model.attention_resolutions, heights[-1])  # the middle always does
        width = multiplier * model.channels
        if attends and model.head_dim and width % model.head_dim:
            raise UserError(
                f"model.head_dim={model.head_dim} does not divide the {width} channels of a level with "
                "attention: choose a divisor, or 0 for one head."
            )
