"""Score matching in the plane: a spiral, two modes and rings, whose smoothed density is known exactly.

  python -m jaxgen.run --config=experiments/score_toy.py:two_modes --workdir=runs/score_two_modes

The data are mixtures of Gaussians, so the trained score is set beside the exact one, and the samples of
annealed Langevin dynamics beside draws of the data. `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks
from jaxgen import denoising, mixtures, sharding
from jaxgen.mixtures import GaussianMixture
from jaxgen.models.score_mlp import ScoreMLP
from jaxgen.objectives import score_matching
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.langevin import annealed_langevin_chain
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    LossFn,
    Mean,
    Metrics,
    PyTree,
    Score,
    Scores,
    TrainState,
)

PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "data.batch_size": 16,
            "model.widths": (8,),
            "noise.num_levels": 2,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.steps_per_level": 2,
            "sampling.num": 20,
            "evaluation.num_samples": 30,
        },
    ),
    "two_modes": Preset("2 CPU cores", 1, "score error 0.009, weight error 0.03", {}),
    "spiral": Preset("2 CPU cores", 1, "score error 0.011, energy distance 0.005", {"data.source": "spiral"}),
    "rings": Preset("2 CPU cores", 1, "score error 0.026, energy distance 0.001", {"data.source": "rings"}),
    "ssm": Preset(
        "2 CPU cores",
        1,
        "score error 0.001; one level alone samples the wrong weights",
        {
            "objective.loss": "sliced_vr",
            "noise.sigma_max": 0.5,
            "noise.sigma_min": 0.5,
            "noise.num_levels": 1,
        },
    ),
}
SHAPES = ("two_modes", "spiral", "rings")
LOSSES = ("denoising", *get_args(score_matching.Trace))
FIELD_CHECKS = {
    **{name: value for name, value in common.FIELD_CHECKS.items() if name.split(".")[0] != "data"},
    "data.source": ("rings", {}),
    "model.widths": ((9,), {}),
    "noise.num_levels": (3, {}),
    "objective.loss": ("sliced", {}),
    "objective.num_slices": (2, {"objective.loss": "sliced"}),
    "train.best_metric": ("loss", {}),
}
FIELD_CHECKS.pop("model.dtype")


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `two_modes`."""
    config = common.base_config(num_steps=4000)
    config.data = ConfigDict({"source": "two_modes", "batch_size": 256})
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 2e-3
    config.optim.ema_decay = 0.999
    config.train.steps_per_dispatch = 50
    config.train.checkpoint_every = 1000
    config.train.validate_every = 1000
    config.model = ConfigDict({"widths": (128, 128, 128)})
    config.noise = ConfigDict({"sigma_max": 8.0, "sigma_min": 0.05, "num_levels": 10})
    config.objective = ConfigDict(
        {
            "loss": "denoising",  # denoising; exact, sliced, sliced_vr: on data with noise of sigma_min
            "num_slices": 1,
        }
    )
    config.sampling = ConfigDict({"steps_per_level": 100, "step_size": 5e-4, "num": 2000})
    config.evaluation = ConfigDict({"num_samples": 2000})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.one_of(config, SHAPES, "data.source")
    checks.one_of(config, LOSSES, "objective.loss")
    checks.at_least(config, 1, "data.batch_size", "model.widths", "objective.num_slices")
    checks.at_least(config, 1, "sampling.steps_per_level", "sampling.num")
    checks.at_least(config, 2, "evaluation.num_samples")
    checks.at_least(config, 0, "seed")
    checks.in_range(config, 0, 1, "optim.ema_decay")
    denoising.geometric_sigmas(config.noise.sigma_max, config.noise.sigma_min, config.noise.num_levels)


def toy_mixture(name: str) -> GaussianMixture:
    """`two_modes` of weights 0.2 and 0.8, far apart; `spiral` and `rings`, thin, of many Gaussians."""
    if name == "two_modes":
        return mixtures.gaussian_mixture([0.2, 0.8], [[-5.0, -5.0], [5.0, 5.0]], np.stack([np.eye(2)] * 2))
    if name == "spiral":
        angle = np.sqrt(np.linspace(0.02, 1.0, 160)) * 3.0 * np.pi
        means = 0.4 * angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    else:
        turns = np.linspace(0.0, 2.0 * np.pi, 60, endpoint=False)
        circle = np.stack([np.cos(turns), np.sin(turns)], -1)
        means = np.concatenate([1.5 * circle, 3.5 * circle])
    return mixtures.gaussian_mixture(np.ones(len(means)), means, 0.1**2 * np.stack([np.eye(2)] * len(means)))


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, 0 only for equal distributions (Szekely & Rizzo 2013); [N, D]."""

    def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(((x[:, None] - y[None]) ** 2).sum(axis=-1)).mean())

    # E|a - a'| over different draws: the zeros of the diagonal are left out.
    within = [mean_distance(x, x) * len(x) / (len(x) - 1) for x in (a, b)]
    return 2.0 * mean_distance(a, b) - sum(within)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    sharding.check_divides(mesh, config.data.batch_size, "data.batch_size")
    mixture = toy_mixture(config.data.source)
    sigmas = denoising.geometric_sigmas(
        config.noise.sigma_max, config.noise.sigma_min, config.noise.num_levels
    )
    model = ScoreMLP(tuple(config.model.widths))

    def score(params: PyTree, x: Array, sigma: Array) -> Array:
        return cast(Array, model.apply({"params": params}, x, sigma))

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        return model.init(key, batch["image"], jnp.ones(batch["image"].shape[0]))["params"], {}

    def at_sigma_min(params: PyTree, x: Array, key: Key) -> Array:
        return score(params, x, jnp.full(x.shape[0], config.noise.sigma_min))

    loss: LossFn
    if config.objective.loss == "denoising":
        loss = score_matching.make_noise_conditional_loss(
            lambda params, x, sigma, _: score(params, x, sigma), sigmas
        )
    else:
        loss = score_matching.make_score_matching_loss(
            at_sigma_min,
            trace=config.objective.loss,
            num_slices=config.objective.num_slices,
            noise_std=config.noise.sigma_min,
        )
    system = common.make_system(config, init, loss)
    pool = np.asarray(mixtures.sample(mixture, jax.random.key(config.seed), 50_000))

    def train_batch(step: int) -> Mapping[str, np.ndarray]:
        """This process's rows of the points of the batch of `step`."""
        rows = np.random.default_rng([config.seed, step]).integers(0, len(pool), config.data.batch_size)
        return {"image": pool[np.array_split(rows, jax.process_count())[jax.process_index()]]}

    checks.check_best_metric(config.train.best_metric, loss, system, train_batch(0))

    # ---- sampling and evaluation

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        denoiser = denoising.denoiser_from_score(lambda x, sigma: score(params, x, sigma))
        chain = annealed_langevin_chain(
            denoiser,
            sigmas,
            steps_per_level=config.sampling.steps_per_level,
            step_size=config.sampling.step_size,
        )
        return run_chain(chain, key, indices, (2,))

    held_out = mixtures.sample(mixture, jax.random.key(config.seed + 1), config.evaluation.num_samples)

    @jax.jit
    def score_error(params: PyTree, key: Key) -> Array:
        """||s - s*||^2 over ||s*||^2 at each level, [L], at held-out data with that level's noise."""

        def at(sigma: Array, key: Key) -> Array:
            x = held_out + sigma * jax.random.normal(key, held_out.shape)
            level = jnp.full(x.shape[0], sigma)
            exact = mixtures.score(mixture, x, level)
            return jnp.sum(jnp.square(score(params, x, level) - exact)) / jnp.sum(jnp.square(exact))

        return jnp.stack([at(s, k) for s, k in zip(sigmas, jax.random.split(key, len(sigmas)), strict=True)])

    def errors(state: TrainState) -> np.ndarray:
        return np.asarray(score_error(state.sampling_params, jax.random.key(config.seed + 2)))

    @jax.jit
    def held_out_loss(params: PyTree, key: Key) -> Metrics:
        return loss(params, {}, {"image": held_out}, key)[1][0]

    def validate(state: TrainState) -> Metrics:
        values = jax.device_get(held_out_loss(state.sampling_params, jax.random.key(config.seed + 3)))
        return {**values, "score_error": Mean.of(jnp.asarray(errors(state)))}

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        num = config.evaluation.num_samples
        indices = jnp.arange(num, dtype=jnp.int32)
        samples = np.asarray(sample(state.sampling_params, jax.random.key(config.seed + 4), indices))
        draws = np.asarray(mixtures.sample(mixture, jax.random.key(config.seed + 5), num))
        true = np.asarray(held_out)
        scores = {
            "score_error": Score(
                float(errors(state).mean()),
                "squared, relative, mean over levels",
                num * len(sigmas),
                False,
                0.0,
            ),
            "energy_distance": Score(
                energy_distance(samples, true),
                "mean distance",
                num,
                False,
                energy_distance(draws, true),
                "as many draws of the data",
            ),
        }
        if config.data.source == "two_modes":
            weight = float((samples.sum(axis=1) > 0).mean())
            scores["weight_error"] = Score(abs(weight - 0.8), "share of the second mode", num, False, 0.0)
        return scores

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        num = num or config.sampling.num
        points = np.asarray(sample(state.sampling_params, key, jnp.arange(num, dtype=jnp.int32)))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "samples.png"
        draw_points(np.asarray(held_out), points).savefig(path, metadata={"Software": None}, dpi=110)
        return [path]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=train_batch,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": hashlib.sha256(pool.tobytes()).hexdigest()},
        seed=config.seed,
    )


def draw_points(data: np.ndarray, samples: np.ndarray) -> Figure:
    """The data and the samples side by side on one scale."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    for axes, points, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), (data, samples), ("data", "samples"), strict=True
    ):
        axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.4, color="#2f6fb5", linewidths=0)
        axes.set_title(f"{title}, n = {len(points)}", fontsize=10)
        axes.set_aspect("equal")
    return figure
