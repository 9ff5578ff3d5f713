"""A small convolutional classifier of images: judges the samples of the generators trained on the same data.

  python -m jaxgen.run --config=experiments/classifier.py:digits --workdir=runs/classifier_digits

digits: 15 s on 2 CPU cores, test accuracy 0.98; mnist: 4 minutes, 0.99.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks
from jaxgen import data, pictures, systems
from jaxgen.models.convnet import ConvNet
from jaxgen.objectives import classification
from jaxgen.types import Batch, Experiment, Key, PyTree, Score, Scores, TrainState, UserError

_MNIST = {
    "model.widths": (32, 64),
    "train.num_steps": 3000,
    "optim.decay_steps": (1500,),
    "train.validate_every": 1000,
    "train.checkpoint_every": 1000,
}
GENERATES = False
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            "model.widths": (4,),
            "model.hidden": 8,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "evaluation.batch_size": 40,
        },
    ),
    "digits": Preset("2 CPU cores", 0.3, "accuracy 0.98", {}),
    "mnist": Preset("2 CPU cores", 4, "accuracy 0.99", {"data.source": "mnist", **_MNIST}),
    "fashion_mnist": Preset("2 CPU cores", 4, "accuracy 0.91", {"data.source": "fashion_mnist", **_MNIST}),
    "cifar10": Preset(
        "1 GPU",
        3,
        "accuracy 0.8",
        {
            "data.source": "cifar10",
            "data.augment": "flip,crop4",
            **_MNIST,
            "model.widths": (64, 128, 256),
            "train.num_steps": 10000,
        },
    ),
    "cifar10_30k": Preset(
        "1 GPU",
        3,
        "accuracy 0.75",
        {
            "data.source": "cifar10_30k",
            "data.augment": "flip,crop4",
            **_MNIST,
            "model.widths": (64, 128, 256),
            "train.num_steps": 10000,
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    "model.widths": ((6,), {}),
    "model.dropout": (0.5, {}),
    "objective.label_smoothing": (0.1, {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset."""
    config = common.base_config(num_steps=1500)
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 2e-3
    config.model = ConfigDict({"widths": (32, 64), "hidden": 128, "dropout": 0.3, "dtype": "float32"})
    config.objective = ConfigDict({"label_smoothing": 0.0})
    config.evaluation = ConfigDict({"batch_size": 360})
    return common.with_settings(config, PRESETS[preset].settings)


def make_model(config: ConfigDict, source: data.Source) -> ConvNet:
    """The network that config.model describes, for the classes of the data."""
    if source.num_classes is None:
        raise UserError(f"{source.name} has no labels, so no classifier can be trained on it.")
    height, width, _ = source.fields["image"].shape[1:]
    if min(height, width) < 2 ** len(config.widths):
        raise UserError(
            f"Images of {height}x{width} cannot be halved {len(config.widths)} times, as the classifier's "
            "model.widths ask: give fewer, or larger images."
        )
    return ConvNet(
        widths=tuple(config.widths),
        hidden=config.hidden,
        num_classes=source.num_classes,
        dropout=config.dropout,
        dtype=common.DTYPES[config.dtype],
    )


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.widths", "model.hidden", "evaluation.batch_size")
    checks.in_range(config, 0, 1, "model.dropout", "objective.label_smoothing")
    checks.one_of(config, common.DTYPES, "model.dtype")


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    model = make_model(config.model, train)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        return model.init(key, batch["image"], train=False)["params"], {}

    def apply(params: PyTree, image: jax.Array, key: Key | None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return cast(jax.Array, model.apply({"params": params}, image, train=key is not None, rngs=rngs))

    optimizer = common.make_optimizer(config.optim, num_steps=config.train.num_steps)
    system = systems.gradient_system(
        init,
        classification.make_loss(apply, label_smoothing=config.objective.label_smoothing),
        optimizer,
        ema_decay=config.optim.ema_decay,
        ema_warmup=config.optim.ema_warmup,
        accumulate=config.optim.accumulate,
    )
    plain_loss = classification.make_loss(apply)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, plain_loss, system, stream(0))
    validation = common.make_evaluation(
        lambda params, batch, key: plain_loss(params, {}, batch, None)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def evaluate(state: TrainState, needs: object) -> Scores:
        values = common.mean_values(validation(state.sampling_params))
        return {
            "test_accuracy": Score(values["accuracy"], "share", len(test), True),
            "test_cross_entropy": Score(values["loss"], "nats", len(test), False),
        }

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """The held-out images that the classifier gets wrong, as far as they go."""
        rows = next(data.evaluation_batches(test, batch_size=min(len(test), 1000)))
        predicted = apply(state.sampling_params, jnp.asarray(rows["image"]), None).argmax(axis=-1)
        wrong = rows["image"][(predicted != rows["label"]) & (rows["mask"] > 0)][: num or 64]
        if not len(wrong):
            return []
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "misclassified.png"
        pictures.save_image_grid(path, wrong, scale=4)
        return [path]

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
