"""What every experiment's config has in common, and how its values become optimisers and loop settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxgen import data, optim, sharding, systems
from jaxgen.types import Array, Batch, Key, LoopSettings, LossFn, Mean, Metrics, PyTree, System, UserError


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named set of values: what it needs, how long it takes there, what it should reach.

    settings: {'model.channels': 64, ...}, what differs from the experiment's base config.
    """

    hardware: str
    minutes: float
    expected: str
    settings: Mapping[str, Any]


# The compute dtype of a config's name for it; parameters stay float32.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# For tests/test_config_fields.py, which changes every field of every experiment and looks for the effect: the
# value to try where doubling or negating the preset's will not do (or the values of this field and of those
# that must go with it), and what must be set for a field to act.
FIELD_CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "data.source": ("npz:{folder}/images.npz", {}),
    "data.augment": ("flip", {}),
    "optim.optimizer": ("sgd", {}),
    "optim.schedule": ("exponential", {}),
    "optim.decay_rate": (0.5, {"optim.schedule": "exponential"}),
    "optim.decay_steps": ((1,), {"optim.schedule": "step"}),
    "optim.warmup_steps": (3, {}),
    "optim.b1": (0.5, {}),
    "optim.b2": (0.5, {}),
    "optim.weight_decay": (0.1, {}),
    "optim.ema_decay": (0.5, {}),
    "optim.ema_warmup": (False, {"optim.ema_decay": 0.9}),
    "train.best_metric": ("loss", {}),
    "model.dtype": ("bfloat16", {}),
    "sweep": ("seed:0,1", {}),
}


def base_config(*, num_steps: int) -> ConfigDict:
    """The groups `data`, `optim` and `train` and the seed; experiments add theirs."""
    config = ConfigDict()
    config.seed = 0
    config.num_seeds = 1  # trained side by side, with the seeds seed, seed + 1, ...
    config.sweep = ""  # GROUP.FIELD:VALUE,VALUE,... trained side by side
    config.data = ConfigDict(
        {
            "source": "digits",
            "batch_size": 128,
            "augment": "",  # comma-separated: flip, crop4
        }
    )
    config.optim = ConfigDict(
        {
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_steps": 0,
            "decay_rate": 0.1,
            "decay_steps": (1000,),
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "ema_decay": 0.0,
            "ema_warmup": True,
            "accumulate": 1,
        }
    )
    config.train = ConfigDict(
        {
            "num_steps": num_steps,
            "steps_per_dispatch": 10,
            "log_every": 50,
            "validate_every": 500,
            "sample_every": 0,
            "checkpoint_every": 500,
            "keep_checkpoints": 2,
            "best_metric": "",
            "best_is_higher": False,
        }
    )
    return config


def with_settings(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """The config with a preset's values; a name that the config lacks or another type is an error."""
    for name in settings:
        value: Any = config
        for part in name.split("."):  # ml_collections would add or pass over what is not there
            if not isinstance(value, ConfigDict) or part not in value:
                raise UserError(f"the config has no field {name}.")
            value = value[part]
    config.update_from_flattened_dict(dict(settings))
    return config


def make_optimizer(config: ConfigDict, *, num_steps: int) -> optax.GradientTransformation:
    """The optimiser that config.optim describes."""
    schedule = optim.make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        num_steps=num_steps,
        warmup_steps=config.warmup_steps,
        decay_rate=config.decay_rate,
        decay_steps=tuple(config.decay_steps),
    )
    return optim.make_optimizer(
        config.optimizer,
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def make_system(
    config: ConfigDict, init_variables: Callable[[Key, Batch], tuple[PyTree, PyTree]], loss_fn: LossFn
) -> System:
    """Gradient descent on the loss as config.optim describes, for config.train.num_steps updates."""
    return systems.gradient_system(
        init_variables,
        loss_fn,
        make_optimizer(config.optim, num_steps=config.train.num_steps),
        ema_decay=config.optim.ema_decay,
        ema_warmup=config.optim.ema_warmup,
        accumulate=config.optim.accumulate,
    )


def loop_settings(config: ConfigDict) -> LoopSettings:
    """The loop settings that config.train describes."""
    return LoopSettings(**config.to_dict())


def training_stream(
    config: ConfigDict, source: data.Source, *, seed: int, mesh: jax.sharding.Mesh
) -> data.Stream:
    """The stream of training batches that config.data describes."""
    sharding.check_divides(mesh, config.batch_size, "data.batch_size")
    return data.Stream(
        source,
        batch_size=config.batch_size,
        seed=seed,
        augment=augmentations(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def augmentations(config: ConfigDict) -> tuple[str, ...]:
    """The names in config.data.augment, in order; none where the data are no images."""
    return tuple(name.strip() for name in config.get("augment", "").split(",") if name.strip())


def load_images(name: str) -> tuple[data.Source, data.Source]:
    """The train and test splits of a data set of images; UserError where it is something else."""
    train, test = (data.load_source(name, split) for split in ("train", "test"))
    if "image" not in train.fields:
        raise UserError(f"data.source={name} holds no images: choose a data set of images.")
    shapes = [source.fields["image"].shape[1:] for source in (train, test)]
    if shapes[0] != shapes[1]:
        raise UserError(f"The images of {name} are {shapes[0]} for training and {shapes[1]} for test.")
    return train, test


def rows_of(image: Array) -> Array:
    """Images [B, H, W, C] in [-1, 1] as rows [B, D] in [0, 1]."""
    return (image.reshape(image.shape[0], -1) + 1) / 2


def for_devices(config: ConfigDict, mesh: jax.sharding.Mesh) -> ConfigDict:
    """The config of a run that another needs, with evaluation.batch_size a multiple of this mesh's devices.

    The user of the other run has no say in it; no score depends on it.
    """
    fitting: ConfigDict = config.copy_and_resolve_references()
    fitting.evaluation.batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    return fitting


def make_evaluation(
    compute: Callable[[PyTree, Mapping[str, Any], Key], Metrics],
    source: data.Source,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
) -> Callable[[PyTree], Metrics]:
    """params -> the Means of `compute(params, batch, key)` merged over the held-out data, in order.

    The key of batch number i is fold_in(key(seed), i): every evaluation sees the same noise.
    """
    sharding.check_divides(mesh, batch_size, "evaluation.batch_size")
    compiled = jax.jit(compute, out_shardings=sharding.replicated(mesh))

    def evaluate(params: PyTree) -> Metrics:
        key = sharding.replicated_key(mesh, seed)
        batches = data.evaluation_batches(
            source,
            batch_size=batch_size,
            limit=limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        merged: Metrics | None = None
        for number, rows in enumerate(progress(batches)):
            batch_key = jax.random.fold_in(key, number)
            metrics = jax.device_get(compiled(params, sharding.place(mesh, rows), batch_key))
            merged = metrics if merged is None else {n: m.merge(metrics[n]) for n, m in merged.items()}
        if merged is None:
            raise UserError(
                f"The {source.split} split of {source.name} is empty, so nothing can be evaluated."
            )
        return merged

    return evaluate


def mean_values(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """{name: the mean as a float}."""
    return {name: float(mean.value) for name, mean in metrics.items()}
