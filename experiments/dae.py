"""The denoising autoencoder as a generator: one noise level, one network, and Langevin dynamics on its score.

  python -m jaxgen.run --config=experiments/dae.py:digits --workdir=runs/dae_digits

A network A trained to take noise of one sigma off an image is the score of the smoothed data,
S(x) = (A(x) - x) / sigma^2 (Vincent 2011; Alain & Bengio 2014, theorem 1). Read denoising,
objectives/score_matching, samplers/langevin and this file, in that order; experiments/ncsn.py then says what
several levels are for. Pixels and noise are in units of the range [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
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
from jaxgen.metrics.images import psnr
from jaxgen.models.dncnn import DnCNN
from jaxgen.objectives.score_matching import gaussian_corruption, make_dae_loss
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.langevin import langevin_chain
from jaxgen.types import Array, Batch, Experiment, Key, PyTree, Score, Scores, TrainState, UserError

PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.depth": 2,
            "model.features": 4,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num_steps": 3,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 4, "0.73 recognised (held-out images: 0.98), Fréchet ratio 5.9", {}),
    "mnist": Preset(
        "1 GPU",
        20,
        "not run to the end yet",
        {
            "data.source": "mnist",
            "data.batch_size": 128,
            "model.depth": 17,
            "model.features": 64,
            "train.num_steps": 20_000,
            "train.log_every": 500,
            "train.validate_every": 2000,
            "train.checkpoint_every": 2000,
            "evaluation.num_samples": 10_000,
            "evaluation.batch_size": 500,
            "evaluation.classifier": "mnist",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=3000)
    config.data.batch_size = 64
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
    config.model = ConfigDict({"depth": 8, "features": 32, "dtype": "float32"})
    config.noise = ConfigDict({"sigma": 0.5})
    config.sampling = ConfigDict(
        {
            "num_steps": 500,
            "relative_step_size": 0.2,  # times sigma^2
            "num": 64,
        }
    )
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 2, "model.depth")
    checks.at_least(config, 1, "model.features", "sampling.num_steps", "sampling.num")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.above(config, 0.0, "noise.sigma")
    if not 0.0 < config.sampling.relative_step_size < 4.0:
        raise UserError(
            "sampling.relative_step_size must be above 0 and below 4, where Langevin dynamics diverges, but "
            f"it is {config.sampling.relative_step_size}."
        )
    generating.check_evaluation(config)


def make_model(config: ConfigDict) -> DnCNN:
    """The network that config.model describes; it knows one level, so it is not told it."""
    model = config.model
    return DnCNN(model.depth, model.features, conditional=False, dtype=common.DTYPES[model.dtype])


def denoiser(config: ConfigDict, params: PyTree) -> denoising.Denoiser:
    """What a run of this config has trained: a denoiser for config.noise.sigma, whatever it is told."""
    model = make_model(config)
    return lambda x, sigma: cast(Array, model.apply({"params": params}, x, sigma))


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    sigma, batch_size = config.noise.sigma, config.evaluation.batch_size

    def denoise(params: PyTree, x: Array) -> Array:
        return denoiser(config, params)(x, jnp.full(x.shape[0], sigma))

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        return make_model(config).init(key, image, jnp.full(image.shape[0], sigma))["params"], {}

    corrupt = gaussian_corruption(sigma)
    loss = make_dae_loss(lambda params, x, _: denoise(params, x), corrupt)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        """Langevin dynamics on the data smoothed with sigma, whose noise the network takes off at the end."""
        chain = langevin_chain(
            lambda x: denoising.score_from_denoised(x, denoise(params, x), jnp.full(x.shape[0], sigma)),
            num_steps=config.sampling.num_steps,
            step_size=config.sampling.relative_step_size * sigma**2,
        )
        return denoise(params, run_chain(chain, key, indices, shape))

    @jax.jit
    def corrupted_and_denoised(params: PyTree, truth: Array, key: Key) -> tuple[Array, Array]:
        noisy = corrupt(key, truth)
        return noisy, denoise(params, noisy)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params = state.sampling_params
        num = num or config.sampling.num
        grid = generating.write_grid(sample, params, key, num, batch_size, directory)
        strip = directory / "denoising.png"
        truth = data.to_unit_range(test.fields["image"][:8], test.num_levels)
        pair = corrupted_and_denoised(params, jnp.asarray(truth), key)
        frames = np.stack([np.asarray(pair[0]), np.asarray(pair[1]), truth])
        pictures.save_strip(strip, frames, scale=max(1, 64 // shape[0]))
        return [grid, strip]

    # ---- evaluation

    validation = common.make_evaluation(
        lambda params, batch, key: loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=batch_size,
        seed=config.seed,
    )

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores = generating.loss_scores(validation(params), len(test), "squared error, summed over pixels")
        truth = data.to_unit_range(test.fields["image"][:batch_size], test.num_levels)
        pair = corrupted_and_denoised(params, jnp.asarray(truth), jax.random.key(config.seed + 1))
        for name, images in zip(("noisy", "denoised"), pair, strict=True):
            values = psnr(np.asarray(images), truth, 2.0)
            scores[f"psnr_{name}"] = Score(float(values.mean()), f"dB at sigma {sigma:g}", len(values), True)
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
