"""A network that reads scenes of digits: which digit of which size is in each place. It judges text_to_image.

  python -m jaxgen.run --config=experiments/scene_reader.py:digits --workdir=runs/scene_reader_digits

Trained on scenes of all combinations of the training digits, tested on scenes of the test digits. A scene
counts as read where all five places are right. `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks
from jaxgen import data, pictures
from jaxgen.data.captioned_scenes import (
    NO_DIGIT,
    NO_SIZE,
    PLACES,
    DigitBank,
    Scenes,
    Which,
    load_digit_banks,
    make_scenes,
)
from jaxgen.models.convnet import ConvNet
from jaxgen.objectives.classification import cross_entropy
from jaxgen.types import Array, Batch, Experiment, Key, Mean, Metrics, PyTree, Score, Scores, TrainState

GENERATES = False
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            "model.enlarge": 1,
            "model.widths": (4,),
            "model.hidden": 8,
            "data.num_scenes": 60,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "evaluation.num_scenes": 40,
            "evaluation.batch_size": 40,
        },
    ),
    "digits": Preset("2 CPU cores", 4, "not recorded yet", {}),
    "mnist": Preset(
        "2 CPU cores",
        20,
        "not run to the end yet",
        {
            "data.source": "mnist",
            "data.canvas": 32,
            "data.margin": 3,
            "data.num_scenes": 100_000,
            "model.enlarge": 1,
        },
    ),
}
FIELD_CHECKS = {
    **{name: check for name, check in common.FIELD_CHECKS.items() if name != "data.augment"},
    "data.canvas": (32, {}),
    "model.widths": ((6,), {}),
    "model.dropout": (0.5, {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=6000)
    config.data = ConfigDict(
        {
            "source": "digits",
            "canvas": 16,  # side of a scene
            "margin": 0,  # cut off each side of a digit's image
            "num_scenes": 100_000,
            "batch_size": 128,
        }
    )
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 1e-4
    config.optim.ema_decay = 0.99
    config.model = ConfigDict(
        {
            "enlarge": 2,  # each pixel is seen as so many each way: the first pooling then loses none
            "widths": (16, 48, 96, 128),
            "hidden": 256,
            "dropout": 0.3,
            "dtype": "float32",
        }
    )
    config.evaluation = ConfigDict({"num_scenes": 2000, "batch_size": 500})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.enlarge", "model.widths", "model.hidden")
    checks.at_least(config, 1, "data.num_scenes", "evaluation.num_scenes", "evaluation.batch_size")
    checks.at_least(config, 0, "data.margin")
    checks.in_range(config, 0, 1, "model.dropout")
    checks.one_of(config, common.DTYPES, "model.dtype")


def make_model(config: ConfigDict) -> ConvNet:
    """The network that config.model describes."""
    return ConvNet(
        widths=tuple(config.widths),
        hidden=config.hidden,
        num_classes=len(PLACES) * (NO_DIGIT + 1 + NO_SIZE + 1),
        dropout=config.dropout,
        dtype=common.DTYPES[config.dtype],
    )


def enlarged(images: Array, factor: int) -> Array:
    """Images [B, H, W, C] with each pixel repeated `factor` times both ways."""
    return jnp.repeat(jnp.repeat(images, factor, axis=1), factor, axis=2)


def split_logits(logits: Array) -> tuple[Array, Array]:
    """The network's output [B, K] as logits of digits [B, 5, 11] and of sizes [B, 5, 3]."""
    by_place = logits.reshape(logits.shape[0], len(PLACES), -1)
    return by_place[..., : NO_DIGIT + 1], by_place[..., NO_DIGIT + 1 :]


def read(config: ConfigDict, params: PyTree, images: Array) -> tuple[Array, Array, Array]:
    """Digits and sizes int32 [B, 5], and features float32 [B, D], of scenes [B, C, C, 1] in [-1, 1].

    config: config.model of the run that the parameters are of
    """
    model, variables = make_model(config), {"params": params}
    images = enlarged(images, config.enlarge)
    digits, sizes = split_logits(cast(Array, model.apply(variables, images, train=False)))
    features = cast(Array, model.apply(variables, images, method=model.features))
    places = (logits.argmax(axis=-1).astype(jnp.int32) for logits in (digits, sizes))
    return *places, features.astype(jnp.float32)  # type: ignore[return-value]


def scenes_of(bank: DigitBank, *, seed: int, num: int, which: Which) -> tuple[data.Source, Scenes]:
    """Scenes as a data set with the fields image, digits and sizes, and as they are."""
    scenes = make_scenes(bank, seed=seed, num=num, which=which)
    fields = {"image": scenes.images, "digits": scenes.digits, "sizes": scenes.sizes}
    return data.Source(f"scenes of {bank.name}", bank.split, fields, None, num_levels=256), scenes


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, scenes and metrics."""
    check(config)
    banks = load_digit_banks(config.data.source, canvas=config.data.canvas, margin=config.data.margin)
    nums = (config.data.num_scenes, config.evaluation.num_scenes)
    (train, _), (test, _) = (
        scenes_of(bank, seed=config.seed, num=num, which="all") for bank, num in zip(banks, nums, strict=True)
    )
    model = make_model(config.model)

    def seen(batch: Batch) -> Array:
        return enlarged(batch["image"], config.model.enlarge)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        return model.init(key, seen(batch), train=False)["params"], {}

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key | None
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        """The mean over places of the digit's and the size's cross-entropy."""
        rngs = None if key is None else {"dropout": key}
        logits = cast(Array, model.apply({"params": params}, seen(batch), train=key is not None, rngs=rngs))
        heads = list(zip(split_logits(logits), (batch["digits"], batch["sizes"]), strict=True))
        losses = sum(jnp.mean(cross_entropy(of, truth), axis=1) for of, truth in heads)
        right = [jnp.all(of.argmax(axis=-1) == truth, axis=1) for of, truth in heads]
        mask = batch.get("mask")
        mean = Mean.of(jnp.asarray(losses), mask)
        return mean.value_or_zero, (
            {"loss": mean, "accuracy": Mean.of(right[0] & right[1], mask)},
            model_state,
        )

    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))
    validation = common.make_evaluation(
        lambda params, batch, key: loss(params, {}, batch, None)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def evaluate(state: TrainState, needed: Mapping[str, Any]) -> Scores:
        values = common.mean_values(validation(state.sampling_params))
        return {
            "test_accuracy": Score(values["accuracy"], "share of scenes", len(test), True),
            "test_cross_entropy": Score(values["loss"], "nats a place", len(test), False),
        }

    reading = jax.jit(lambda params, images: read(config.model, params, images)[:2])

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """The first test scenes that are not read right, as far as they go."""
        rows = next(data.evaluation_batches(test, batch_size=min(len(test), 1000)))
        digits, sizes = (np.asarray(x) for x in reading(state.sampling_params, rows["image"]))
        wrong = (digits != rows["digits"]).any(axis=1) | (sizes != rows["sizes"]).any(axis=1)
        shown = rows["image"][wrong & (rows["mask"] > 0)][: num or 64]
        if not len(shown):
            return []
        directory.mkdir(parents=True, exist_ok=True)
        pictures.save_image_grid(directory / "misread.png", shown, scale=4)
        return [directory / "misread.png"]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.sampling_params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
    )
