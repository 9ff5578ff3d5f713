"""What every classifier of images has in common: its loss, its validation and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import checks
from jaxgen import data, pictures
from jaxgen.objectives import classification
from jaxgen.types import Array, Batch, Experiment, Key, PyTree, Score, Scores, TrainState, UserError


def num_classes(source: data.Source) -> int:
    """How many classes the labels tell apart; UserError where there are no labels."""
    if source.num_classes is None:
        raise UserError(f"{source.name} has no labels, so no classifier can be trained on it.")
    return source.num_classes


def bind(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    model: Any,
    train: data.Source,
    test: data.Source,
    reference: tuple[float | None, str] = (None, ""),
    evaluated_model: Any = None,
) -> Experiment:
    """The experiment of a Linen `model(image, train=...) -> logits`, with or without running statistics.

    Reads config.objective.label_smoothing, config.evaluation.batch_size and the groups of `base_config`.
    reference: a published test error in percent, and where it is from.
    evaluated_model: what is evaluated with the trained parameters, where that is not `model` itself.
    """
    evaluated_model = evaluated_model or model

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        variables = flax.core.unfreeze(model.init(key, batch["image"], train=False))
        return variables.pop("params"), variables

    def apply(params: PyTree, model_state: PyTree, image: Array, key: Key | None) -> tuple[Array, PyTree]:
        variables = {"params": params, **model_state}
        if key is None:
            return cast(Array, evaluated_model.apply(variables, image, train=False)), model_state
        logits, model_state = model.apply(
            variables, image, train=True, rngs={"dropout": key}, mutable=list(model_state)
        )
        return logits, model_state

    loss = classification.make_loss(apply, label_smoothing=config.objective.label_smoothing)
    system = common.make_system(config, init, loss)
    plain_loss = classification.make_loss(apply)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, plain_loss, system, stream(0))
    validation = common.make_evaluation(
        lambda variables, batch, key: plain_loss(variables[0], variables[1], batch, None)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def validate(state: TrainState):
        return validation((state.sampling_params, state.model_state))

    def evaluate(state: TrainState, needs: object) -> Scores:
        values = common.mean_values(validate(state))
        return {
            "test_error": Score(100 * (1 - values["accuracy"]), "%", len(test), False, *reference),
            "test_accuracy": Score(values["accuracy"], "share", len(test), True),
            "test_cross_entropy": Score(values["loss"], "nats", len(test), False),
        }

    @jax.jit
    def predict(params: PyTree, model_state: PyTree, image: Array) -> Array:
        return apply(params, model_state, image, None)[0].argmax(axis=-1)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """The held-out images that the classifier gets wrong, as far as they go."""
        rows = next(data.evaluation_batches(test, batch_size=min(len(test), 1000)))
        predicted = np.asarray(predict(state.sampling_params, state.model_state, rows["image"]))
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
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
    )
