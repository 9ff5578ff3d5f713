"""Principal components of images, from one pass over them in bounded memory.

  python -m jaxgen.run --config=experiments/pca.py:digits --workdir=runs/pca_digits

An update merges the mean and the scatter of a batch into the sums so far (Chan, Golub & LeVeque 1979), so an
epoch of updates sees every image once; the components come from the scatter in the end. The error is the
squared distance of a held-out image to its reconstruction, summed over its pixels, on the scale [0, 1].
mnist gives the 13.87 that is quoted from Hinton & Salakhutdinov 2006, which settles what it is a figure of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating, rows_of
from experiments.common.judging import judge_of
from jaxgen import data, pictures, systems
from jaxgen.estimators import linear
from jaxgen.types import Array, Batch, Experiment, Key, Mean, Metrics, PyTree, Score, Scores, TrainState

_MNIST = {
    "data.batch_size": 1000,
    "train.num_steps": 60,
    "model.rank": 30,
    "evaluation.num_samples": 1000,
    "evaluation.batch_size": 1000,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            "data.batch_size": 40,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "model.rank": 8,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 40,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 0.5, "squared error 0.73 per image at 16 dimensions of 64", {}),
    "mnist": Preset(
        "2 CPU cores",
        5,
        "squared error 13.87 per image at 30 dimensions, as Hinton & Salakhutdinov 2006",
        {"data.source": "mnist", "evaluation.classifier": "mnist", **_MNIST},
    ),
    "fashion_mnist": Preset(
        "2 CPU cores",
        5,
        "no published figure",
        {"data.source": "fashion_mnist", "evaluation.classifier": "fashion_mnist", **_MNIST},
    ),
    "cifar10": Preset(
        "2 CPU cores",
        10,
        "no published figure",
        {
            "data.source": "cifar10",
            "evaluation.classifier": "cifar10",
            **_MNIST,
            "train.num_steps": 50,
            "model.rank": 100,
        },
    ),
}
FIELD_CHECKS = {
    **generating.FIELD_CHECKS,
    **{field: check for field, check in common.FIELD_CHECKS.items() if field[:5] in ("data.", "train")},
}
# Squared error per image on the test set, scale [0, 1].
_PUBLISHED = {("mnist", 30): (13.87, "Hinton & Salakhutdinov 2006, 30 components")}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=3)
    del config.optim  # nothing is optimised step by step
    config.data.batch_size = 479
    config.train.steps_per_dispatch = 1
    config.train.log_every = 1
    config.train.validate_every = 3
    config.train.checkpoint_every = 20
    config.model = ConfigDict({"rank": 16})
    config.sampling = ConfigDict({"num": 64})
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.at_least(config, 1, "model.rank", "sampling.num")
    generating.check_evaluation(config)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds sums, components, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    dim, rank = int(np.prod(shape)), config.model.rank
    checks.at_most(config, dim, "model.rank")

    def init(key: Key, batch: Batch) -> linear.Scatter:
        return linear.Scatter(jnp.zeros(()), jnp.zeros(dim), jnp.zeros((dim, dim)))

    def update(scatter: linear.Scatter, batch: Batch, key: Key) -> tuple[linear.Scatter, Metrics]:
        x = rows_of(batch["image"])
        merged = linear.merge_scatter(scatter, linear.scatter_of(x))
        variance = jnp.trace(merged.scatter) / merged.num
        return merged, {"loss": Mean(variance, jnp.ones(()))}  # what no component explains yet

    system = systems.update_system(init, update)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)

    fit = jax.jit(lambda scatter: linear.pca_of_scatter(scatter, rank))

    def errors(pca: PyTree, batch: Mapping[str, Any], key: Key) -> Metrics:
        x = rows_of(batch["image"])
        centred = jnp.square(x - pca.mean[None]).sum(axis=1)
        return {
            "loss": Mean.of(linear.reconstruction_error(pca, x), batch["mask"]),
            "variance": Mean.of(centred, batch["mask"]),
        }

    validation = common.make_evaluation(
        errors, test, mesh, batch_size=config.evaluation.batch_size, seed=config.seed
    )

    def draw(pca: PyTree, key: Key, num: int) -> Array:
        return 2 * linear.sample(pca, key, num).reshape(num, *shape) - 1

    rebuild = jax.jit(lambda pca, image: linear.decode(pca, linear.encode(pca, rows_of(image))))

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        samples, components, rebuilt = (
            directory / f"{name}.png" for name in ("samples", "components", "reconstructions")
        )
        pca, scale = fit(state.params), max(1, 64 // shape[0])
        images = np.asarray(draw(pca, key, num or config.sampling.num))
        pictures.save_image_grid(samples, images, scale=scale)
        axes = np.asarray(pca.components[:64]).reshape(-1, *shape)
        pictures.save_image_grid(components, axes / np.abs(axes).max(), scale=scale)
        real = data.to_unit_range(test.fields["image"][:8], test.num_levels)
        again = 2 * np.asarray(rebuild(pca, real)).reshape(real.shape) - 1
        pictures.save_image_grid(rebuilt, np.concatenate([real, again]), columns=8, scale=scale)
        return [samples, components, rebuilt]

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        pca = fit(state.params)
        values = common.mean_values(validation(pca))
        reference = _PUBLISHED.get((config.data.source, rank), (None, ""))
        scores = {
            "reconstruction_error": Score(
                values["loss"], f"squared, per image of {dim} pixels in [0, 1]", len(test), False, *reference
            ),
        }
        if values["variance"] > 1e-12 * dim:  # below: rounding, of images that are all the mean
            scores["variance_explained"] = Score(
                1 - values["loss"] / values["variance"], "share of held-out variance", len(test), True
            )
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            images = draw(pca, jax.random.key(config.seed + 1), config.evaluation.num_samples)
            scores.update(judge.scores(np.asarray(images)))
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(fit(state.params)),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
        needs=generating.judge_needs(config, train, test, mesh),
    )
