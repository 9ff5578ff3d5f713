"""Noise-conditional score networks and annealed Langevin dynamics (Song & Ermon 2019) on images.

  python -m jaxgen.run --config=experiments/ncsn.py:digits --workdir=runs/ncsn_digits

Read denoising, models/ncsn, objectives/score_matching, samplers/langevin and this file, in that order. Pixels
and noise levels are in [0, 1], as in the paper; deviation: `dequantised`. `PRESETS` says what each preset
needs and reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from jaxgen import data, denoising, pictures
from jaxgen.models.ncsn import NCSN
from jaxgen.objectives.score_matching import make_noise_conditional_loss
from jaxgen.samplers.chain import normal, run_chain, run_chain_with_history
from jaxgen.samplers.conditional import langevin_inpainting_chain
from jaxgen.samplers.langevin import annealed_langevin_chain
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Metrics,
    PyTree,
    Scores,
    TrainState,
    UserError,
)

_PUBLISHED = {
    "data.batch_size": 128,
    "noise.sigma_min": 0.01,
    "optim.learning_rate": 1e-3,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "train.num_steps": 200_000,
    "train.log_every": 500,
    "train.validate_every": 5000,
    "train.checkpoint_every": 5000,
    "sampling.steps_per_level": 100,
    "sampling.step_size": 2e-5,
    "sampling.denoise": False,
}
STARTS = ("uniform", "normal")
SLOW = True  # to compile on a CPU, even the smoke preset
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.features": 4,
            "noise.num_levels": 3,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.steps_per_level": 2,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 6, "0.87 recognised (held-out images: 0.98), Fréchet ratio 2.2", {}),
    "mnist": Preset(
        "1 GPU",
        300,
        "not run to the end yet",
        {
            **_PUBLISHED,
            "data.source": "mnist",
            "model.features": 64,
            "evaluation.num_samples": 10_000,
            "evaluation.batch_size": 500,
            "evaluation.classifier": "mnist",
        },
    ),
    "mnist_cpu": Preset(
        "2 CPU cores",
        50,
        "0.64 recognised (held-out images: 0.98), Fréchet ratio 8.3",
        {
            "data.source": "mnist",
            "data.batch_size": 32,
            "train.num_steps": 3000,
            "train.checkpoint_every": 250,
            "noise.sigma_min": 0.01,
            "sampling.start": "normal",
            "sampling.steps_per_level": 15,
            "sampling.step_size": 4e-5,
            "evaluation.num_samples": 500,
            "evaluation.batch_size": 100,
            "evaluation.classifier": "mnist",
        },
    ),
    "cifar10": Preset(
        "1 GPU of 80 GB",
        2000,
        "published: FID 25.3 against the training images, inception score 8.87 (Song & Ermon 2019); needs "
        "evaluation.inception",
        {
            **_PUBLISHED,
            "data.source": "cifar10",
            "data.augment": "flip",
            "model.features": 128,
            "evaluation.num_samples": 50_000,
            "evaluation.batch_size": 500,
            "evaluation.classifier": "cifar10",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "sampling.start": ("normal", {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=3000)
    config.data.batch_size = 64
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
    config.model = ConfigDict({"features": 16, "dtype": "float32"})
    config.noise = ConfigDict(
        {
            "sigma_max": 1.0,
            "sigma_min": 0.02,
            "num_levels": 10,
            "dequantise": True,  # uniform noise as wide as a level of the pixels
        }
    )
    config.sampling = ConfigDict(
        {
            "steps_per_level": 30,
            "step_size": 8e-5,  # of the last level
            "start": "uniform",  # in [0, 1], as in the paper; "normal": the first level's noise alone
            "denoise": True,  # take the last level's noise off at the end
            "num": 64,
        }
    )
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.features", "sampling.steps_per_level", "sampling.num")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.one_of(config, STARTS, "sampling.start")
    noise, sampling = config.noise, config.sampling
    denoising.geometric_sigmas(noise.sigma_max, noise.sigma_min, noise.num_levels)
    if not 0.0 < sampling.step_size < 4.0 * noise.sigma_min**2:
        raise UserError(
            f"sampling.step_size must be above 0 and below 4 noise.sigma_min^2 = {4 * noise.sigma_min**2:g}, "
            f"where Langevin dynamics diverges, but it is {sampling.step_size}."
        )
    generating.check_evaluation(config)


def make_model(config: ConfigDict) -> tuple[NCSN, np.ndarray]:
    """The network that config.model describes, and its noise levels [L]."""
    noise = config.noise
    sigmas = denoising.geometric_sigmas(noise.sigma_max, noise.sigma_min, noise.num_levels)
    return NCSN(config.model.features, noise.num_levels, dtype=common.DTYPES[config.model.dtype]), sigmas


def dequantised(key: Key, image: Array, num_levels: int) -> Array:
    """Images [B, H, W, C] of whole levels in [0, 1], each pixel spread evenly over its level.

    Level k becomes uniform around k / (num_levels - 1), the value at which samples are rounded to k.
    Deviation: the paper's code takes (k + u) / num_levels, which brings all that is learned nearer to 0, to
    255/256 of itself for images of 8 bits.
    """
    return image + (jax.random.uniform(key, image.shape) - 0.5) / (num_levels - 1)


def nearest_level(sigmas: np.ndarray, sigma: Array) -> Array:
    """The number of the level nearest to sigma [B] in the logarithm, int32 [B]."""
    distance = jnp.abs(jnp.log(sigma)[:, None] - jnp.log(jnp.asarray(sigmas, jnp.float32))[None])
    return jnp.argmin(distance, axis=1)


def make_score(model: NCSN, sigmas: np.ndarray) -> Callable[[PyTree, Array, Array], Array]:
    """(params, x in [0, 1], sigma) -> the score, asked at the level nearest to sigma."""

    def score(params: PyTree, x: Array, sigma: Array) -> Array:
        return cast(Array, model.apply({"params": params}, 2.0 * x - 1.0, nearest_level(sigmas, sigma)))

    return score


def denoiser(config: ConfigDict, params: PyTree) -> denoising.Denoiser:
    """What a run of this config has trained, as a denoiser of images in [-1, 1].

    Between its levels it is that of the level nearest to sigma: the noise which that finds in x is near to
    the noise that is there, whereas its score would be multiplied with another level's sigma^2.
    """
    model, sigmas = make_model(config)
    score = make_score(model, sigmas)
    of_unit = denoising.denoiser_from_score(lambda x, sigma: score(params, x, sigma))

    def nearest(x: Array, sigma: Array) -> Array:
        level = nearest_level(sigmas, 0.5 * sigma)
        return 2.0 * of_unit(0.5 * (x + 1.0), jnp.asarray(sigmas, jnp.float32)[level]) - 1.0

    return nearest


def noise_range(config: ConfigDict) -> tuple[float, float]:
    """The least and the greatest noise that a run of this config is trained for, of images in [-1, 1]."""
    return 2.0 * config.noise.sigma_min, 2.0 * config.noise.sigma_max


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    if shape[0] % 2 or shape[1] % 2:
        raise UserError(f"images of {shape[0]}x{shape[1]} cannot be halved, as this network does once.")
    noise = config.noise
    model, sigmas = make_model(config)
    score = make_score(model, sigmas)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        level = jnp.zeros(batch["image"].shape[0], jnp.int32)
        return model.init(key, batch["image"], level)["params"], {}

    levels_loss = make_noise_conditional_loss(lambda params, x, sigma, _: score(params, x, sigma), sigmas)

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        dequantise_key, loss_key = jax.random.split(key)
        image = 0.5 * (batch["image"] + 1.0)
        if noise.dequantise:
            image = dequantised(dequantise_key, image, train.num_levels)
        return levels_loss(params, model_state, {**batch, "image": image}, loss_key)

    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling

    def denoiser_of(params: PyTree) -> denoising.Denoiser:
        return denoising.denoiser_from_score(lambda x, sigma: score(params, x, sigma))

    steps = {
        "steps_per_level": config.sampling.steps_per_level,
        "step_size": config.sampling.step_size,
    }

    def start(keys: Key, shape: tuple[int, ...]) -> Array:
        """Where the chains begin.

        The mean 1/2 of uniform noise lies far from MNIST's 0.13, and instance norm makes means hard to see:
        a network that was trained for little may lead such a start to white.
        """
        if config.sampling.start == "normal":
            return noise.sigma_max * normal(keys, shape)
        return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)

    def chain_of(params: PyTree):
        return annealed_langevin_chain(
            denoiser_of(params), sigmas, denoise=config.sampling.denoise, init=start, **steps
        )

    # One program serves scores and pictures: this network takes long to compile.
    @jax.jit
    def sample_with_history(params: PyTree, key: Key, indices: Array) -> Array:
        num_frames = min(11, len(sigmas) * config.sampling.steps_per_level + 1)
        _, frames = run_chain_with_history(chain_of(params), key, indices, shape, num_frames)
        return 2.0 * frames - 1.0

    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        return sample_with_history(params, key, indices)[-1]

    @jax.jit
    def fill(params: PyTree, key: Key, known: Array, mask: Array) -> Array:
        chain = langevin_inpainting_chain(
            denoiser_of(params), sigmas, 0.5 * (known + 1.0), mask, init=start, **steps
        )
        indices = jnp.arange(known.shape[0], dtype=jnp.int32)
        return 2.0 * run_chain(chain, key, indices, shape) - 1.0

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params = state.sampling_params
        num = num or config.sampling.num
        grid = generating.write_grid(sample, params, key, num, config.evaluation.batch_size, directory)
        strip, inpainting = directory / "anneal_strip.png", directory / "inpainting.png"
        scale = max(1, 64 // shape[0])
        first = jnp.arange(config.evaluation.batch_size, dtype=jnp.int32)
        frames = np.asarray(sample_with_history(params, key, first))
        pictures.save_strip(strip, frames[:, :8], scale=scale)
        truth = data.to_unit_range(test.fields["image"][:6], test.num_levels)
        mask = generating.left_half_mask(shape)
        fillings = np.asarray(fill(params, key, jnp.tile(truth, (4, 1, 1, 1)), jnp.asarray(mask)))
        shown = generating.filling_frames(truth, mask, fillings.reshape(4, *truth.shape))
        pictures.save_strip(inpainting, shown, scale=scale)
        return [grid, strip, inpainting]

    # ---- evaluation

    validation = common.make_evaluation(
        lambda params, batch, key: loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores = generating.loss_scores(validation(params), len(test), "summed over pixels, all levels")
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            scores.update(generating.sample_scores(sample, params, judge, config, mesh))
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.sampling_params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
        needs=generating.judge_needs(config, train, test, mesh),
    )
