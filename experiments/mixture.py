"""Gaussian mixtures of images by expectation-maximisation.

  python -m jaxgen.run --config=experiments/mixture.py:digits --workdir=runs/mixture_digits

An update is one EM iteration on a batch; presets take all images as the batch. The start is k-means++ and
k-means. Pixels are whole numbers, on which a density has no upper bound, so each gets a uniform fraction of a
level (dequantisation), anew at each update and in the scores: the bits/dim are an upper bound on those of the
distribution over whole pixels, as for the other generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from jaxgen import pictures, systems
from jaxgen.estimators import families, gmm
from jaxgen.estimators import mixture as mixtures
from jaxgen.estimators.mixture import Mixture
from jaxgen.types import Array, Batch, Experiment, Key, Mean, Metrics, PyTree, Score, Scores, TrainState

COVARIANCES = {
    "full": families.GAUSSIAN_FULL,
    "tied": families.GAUSSIAN_TIED,
    "diagonal": families.GAUSSIAN_DIAGONAL,
    "spherical": families.GAUSSIAN_SPHERICAL,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "data.batch_size": 80,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "model.num_components": 3,
            "model.covariance": "diagonal",
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 40,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 1, "3.4 bits/dim, 0.95 recognised, Fréchet ratio 2.2", {}),
    "mnist": Preset(
        "2 CPU cores",
        15,
        "not run to the end yet",
        {
            "data.source": "mnist",
            "data.batch_size": 60_000,
            "model.num_components": 50,
            "model.covariance": "diagonal",
            "train.num_steps": 40,
            "evaluation.num_samples": 1000,
            "evaluation.batch_size": 1000,
            "evaluation.classifier": "mnist",
        },
    ),
}
FIELD_CHECKS = {
    **generating.FIELD_CHECKS,
    **{field: check for field, check in common.FIELD_CHECKS.items() if field[:5] in ("data.", "train")},
    "model.covariance": ("spherical", {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=30)
    del config.optim  # EM has no rate
    config.data.batch_size = 1437
    config.train.steps_per_dispatch = 1
    config.train.log_every = 1
    config.train.validate_every = 5
    config.train.checkpoint_every = 10
    config.model = ConfigDict(
        {
            "num_components": 20,
            "covariance": "full",  # full, tied, diagonal, spherical
            "variance_floor": 1e-3,  # of pixels in [-1, 1]
        }
    )
    config.sampling = ConfigDict({"num": 64})
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.at_least(config, 1, "model.num_components", "sampling.num")
    checks.above(config, 0, "model.variance_floor")  # at 0 the likelihood has no upper bound
    checks.at_most(config, config.data.batch_size, "model.num_components")
    checks.one_of(config, COVARIANCES, "model.covariance")
    generating.check_evaluation(config)


def dequantised_rows(key: Key, image: Array, num_levels: int) -> Array:
    """Images [B, H, W, C] of whole levels in [-1, 1] as rows [B, D], each pixel spread over its level."""
    x = image.reshape(image.shape[0], -1)
    return x + (jax.random.uniform(key, x.shape) - 0.5) * (2 / (num_levels - 1))


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds EM, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    dim, levels = int(np.prod(shape)), train.num_levels
    family = COVARIANCES[config.model.covariance]

    def init(key: Key, batch: Batch) -> Mixture:
        noise_key, start_key = jax.random.split(key)
        x = dequantised_rows(noise_key, batch["image"], levels)
        return gmm.fit(
            family,
            start_key,
            x,
            config.model.num_components,
            variance_floor=config.model.variance_floor,
            max_steps=0,
        ).params

    def update(mixture: Mixture, batch: Batch, key: Key) -> tuple[Mixture, Metrics]:
        x = dequantised_rows(key, batch["image"], levels)
        fit = gmm.fit_from(
            family, mixture, x, variance_floor=config.model.variance_floor, max_steps=1, tolerance=-jnp.inf
        )
        return fit.params, {"loss": Mean(-fit.objective[0] * len(x), jnp.asarray(len(x), jnp.float32))}

    system = systems.update_system(init, update)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)

    def likelihood(mixture: PyTree, batch: Batch, key: Key) -> Metrics:
        x = dequantised_rows(key, batch["image"], levels)
        nats = -mixtures.log_prob(family, mixture, x)
        # The density of whole levels is that of [-1, 1] times the width of a level, for each pixel.
        bits = (nats / dim - jnp.log(2 / (levels - 1))) / jnp.log(2.0)
        return {"loss": Mean.of(nats, batch["mask"]), "bits_per_dim": Mean.of(bits, batch["mask"])}

    validation = common.make_evaluation(
        likelihood, test, mesh, batch_size=config.evaluation.batch_size, seed=config.seed
    )

    def draw(mixture: PyTree, key: Key, num: int) -> Array:
        _, rows = mixtures.sample(family, mixture, key, num)
        return rows.reshape(num, *shape)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        samples, means = (directory / f"{name}.png" for name in ("samples", "means"))
        scale = max(1, 64 // shape[0])
        pictures.save_image_grid(
            samples, np.asarray(draw(state.params, key, num or config.sampling.num)), scale=scale
        )
        centres = np.asarray(state.params.components.mean).reshape(-1, *shape)
        pictures.save_image_grid(means, centres, scale=scale)
        return [samples, means]

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        values = common.mean_values(validation(state.params))
        scores = {
            "bits_per_dim": Score(
                values["bits_per_dim"], "bits/dim, upper bound (dequantised)", len(test), False
            )
        }
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            images = draw(state.params, jax.random.key(config.seed + 1), config.evaluation.num_samples)
            scores.update(judge.scores(np.asarray(images)))
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
        needs=generating.judge_needs(config, train, test, mesh),
    )
