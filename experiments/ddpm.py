"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) on images.

  python -m jaxgen.run --config=experiments/ddpm.py:digits --workdir=runs/ddpm_digits
  ... --mode=sample --num_samples=100 --seed=1

Read processes, models/unet, objectives/ddpm, samplers/ddpm and this file, in that order. Samples and scores
use the averaged (EMA) weights. `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from experiments.common.unets import make_unet
from jaxgen import data, denoising, pictures, processes, sharding
from jaxgen.objectives import ddpm as objective
from jaxgen.samplers.chain import run_chain, run_chain_with_history, sample_in_batches
from jaxgen.samplers.ddim import ddim_chain
from jaxgen.samplers.ddpm import Predict, ancestral_chain
from jaxgen.samplers.guidance import classifier_free_guidance
from jaxgen.types import Array, Batch, Chain, Experiment, Key, PyTree, Score, Scores, TrainState, UserError

_MNIST = {
    "data.batch_size": 32,
    "model.channel_multipliers": (1, 2, 2),
    "model.attention_resolutions": (7,),
    "diffusion.num_steps": 1000,
    "diffusion.schedule": "linear",
    "optim.learning_rate": 5e-4,
    "optim.warmup_steps": 200,
    "train.num_steps": 4000,
    "train.validate_every": 1000,
    "train.checkpoint_every": 250,
    "sampling.num_steps": 100,
    "evaluation.num_samples": 1000,
    "evaluation.num_likelihood": 128,
    "evaluation.batch_size": 64,
}
_CIFAR10 = {
    "data.source": "cifar10",
    "data.augment": "flip",
    "data.batch_size": 128,
    "model.channels": 128,
    "model.channel_multipliers": (1, 2, 2, 2),
    "model.num_res_blocks": 2,
    "model.num_groups": 32,
    "model.attention_resolutions": (16,),
    "model.head_dim": 0,
    "model.dropout": 0.1,
    "diffusion.num_steps": 1000,
    "diffusion.schedule": "linear",
    "diffusion.variance": "fixed_large",
    "optim.learning_rate": 2e-4,
    "optim.warmup_steps": 5000,
    "optim.ema_decay": 0.9999,
    "optim.schedule": "constant",
    "train.num_steps": 800_000,
    "train.log_every": 500,
    "train.validate_every": 10_000,
    "train.sample_every": 50_000,
    "train.checkpoint_every": 10_000,
    "sampling.method": "ancestral",
    "sampling.num_steps": 1000,
    "evaluation.num_samples": 50_000,
    "evaluation.num_likelihood": 10_000,
    "evaluation.batch_size": 256,
    "evaluation.classifier": "cifar10",
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.channels": 8,
            "model.head_dim": 8,
            "model.num_res_blocks": 1,
            "model.channel_multipliers": (1,),
            "model.attention_resolutions": (8,),
            "diffusion.num_steps": 8,
            "data.batch_size": 16,
            "train.num_steps": 6,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num_steps": 4,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.num_likelihood": 16,
            "evaluation.batch_size": 16,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 4, "0.92 recognised (held-out images: 0.98), Fréchet ratio 1.3", {}),
    "mnist": Preset(
        "2 CPU cores",
        60,
        "0.79 recognised (held-out images: 0.98), 1.86 bits/dim",
        {
            "data.source": "mnist",
            "evaluation.classifier": "mnist",
            **_MNIST,
        },
    ),
    "fashion_mnist": Preset(
        "2 CPU cores",
        60,
        "0.53 recognised (held-out images: 0.78), 3.83 bits/dim",
        {
            "data.source": "fashion_mnist",
            "evaluation.classifier": "fashion_mnist",
            **_MNIST,
        },
    ),
    "cifar10": Preset(
        "1 GPU of 80 GB",
        5000,
        "FID 5.24 against the test images (3.17 against the training images), 3.75 bits/dim (Ho et al. "
        "2020); needs evaluation.inception",
        _CIFAR10,
    ),
    "cifar10_cond": Preset(
        "1 GPU of 80 GB",
        5000,
        "no published figure of this setting",
        {**_CIFAR10, "diffusion.conditional": True, "diffusion.label_dropout": 0.1, "sampling.guidance": 1.5},
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "model.channel_multipliers": ((1, 3), {}),
    "model.attention_resolutions": ((), {}),
    "model.head_dim": (4, {}),
    "model.num_groups": (4, {}),
    "model.dropout": (0.1, {}),
    "diffusion.schedule": ("linear", {}),
    "diffusion.beta_start": (2e-4, {"diffusion.schedule": "linear"}),
    "diffusion.beta_end": (0.03, {"diffusion.schedule": "linear"}),
    "diffusion.prediction": ("v", {}),
    "diffusion.loss": ("vlb", {}),
    "diffusion.variance": ("fixed_large", {}),
    "diffusion.label_dropout": (0.5, {"diffusion.conditional": True}),
    "sampling.method": ("ddim", {}),
    "sampling.eta": (0.5, {"sampling.method": "ddim"}),
    "sampling.spacing": ("trailing", {}),
    "sampling.guidance": (3.0, {"diffusion.conditional": True, "diffusion.label_dropout": 0.1}),
}
# The bound that Ho et al. report for a data set, in bits/dim.
_BITS_PER_DIM = {"cifar10": (3.75, "Ho et al. 2020, table 1, L_simple")}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=3000)
    config.data.batch_size = 32
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
    config.train.log_every = 100
    config.train.validate_every = 500
    config.train.checkpoint_every = 500
    config.model = ConfigDict(
        {
            "channels": 32,
            "channel_multipliers": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            "head_dim": 32,  # 0: one head as wide as the level
            "num_groups": 8,
            "dropout": 0.0,
            "dtype": "float32",
            "remat": False,
        }
    )
    config.diffusion = ConfigDict(
        {
            "num_steps": 200,
            "schedule": "cosine",  # linear, cosine
            "beta_start": 1e-4,  # linear
            "beta_end": 0.02,  # linear
            "cosine_offset": 0.008,  # cosine
            "prediction": "eps",  # eps, x0, v
            "loss": "simple",  # simple, vlb
            "variance": "fixed_small",  # fixed_small, fixed_large
            "conditional": False,  # told the class
            "label_dropout": 0.0,  # share of classes hidden in training, for guidance
        }
    )
    config.sampling = ConfigDict(
        {
            "method": "ancestral",  # ancestral, ddim
            "num_steps": 50,
            "eta": 0.0,  # ddim: 0 deterministic, 1 as noisy as ancestral
            "spacing": "even",  # even, leading, trailing, quadratic
            "clip": True,
            "guidance": 1.0,  # conditional: 1 plain, more is more typical
            "num": 64,
        }
    )
    config.evaluation = generating.evaluation_config(num_likelihood=360)
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.check_unet(config)
    checks.at_least(config, 1, "diffusion.num_steps", "sampling.num")
    checks.one_of(config, ("linear", "cosine"), "diffusion.schedule")
    checks.one_of(config, get_args(processes.Prediction), "diffusion.prediction")
    checks.one_of(config, get_args(objective.Loss), "diffusion.loss")
    checks.one_of(config, get_args(processes.Variance), "diffusion.variance")
    checks.in_range(config, 0, 1, "diffusion.label_dropout", "sampling.eta", closed=True)
    checks.at_least(config, 0, "diffusion.cosine_offset", "sampling.guidance")
    diffusion, sampling = config.diffusion, config.sampling
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise UserError(
            "0 < diffusion.beta_start <= diffusion.beta_end < 1 must hold, but they are "
            f"{diffusion.beta_start} and {diffusion.beta_end}."
        )
    if diffusion.label_dropout and not diffusion.conditional:
        raise UserError("diffusion.label_dropout needs diffusion.conditional: leave it at 0.")
    if sampling.guidance != 1.0 and not diffusion.label_dropout:
        raise UserError(
            "sampling.guidance needs a model trained with diffusion.conditional and diffusion.label_dropout: "
            "leave it at 1."
        )
    checks.one_of(config, ("ancestral", "ddim"), "sampling.method")
    checks.one_of(config, get_args(processes.Spacing), "sampling.spacing")
    checks.in_range(config, 1, diffusion.num_steps, "sampling.num_steps", closed=True)
    try:
        processes.spaced_timesteps(diffusion.num_steps, sampling.num_steps, sampling.spacing)
    except UserError as error:
        raise UserError(f"sampling.num_steps and sampling.spacing do not fit: {error}") from error
    checks.at_least(config, 1, "evaluation.num_likelihood")
    generating.check_evaluation(config)


def make_schedule(config: ConfigDict) -> processes.DiffusionSchedule:
    """The forward process that config.diffusion describes."""
    if config.schedule == "linear":
        return processes.linear_schedule(config.num_steps, config.beta_start, config.beta_end)
    return processes.cosine_schedule(config.num_steps, config.cosine_offset)


def make_chain(
    config: ConfigDict, predict: Predict, schedule: processes.DiffusionSchedule, diffusion: ConfigDict
) -> Chain:
    """The sampling chain that config.sampling describes."""
    if config.method == "ddim":
        return ddim_chain(
            predict,
            schedule,
            num_steps=config.num_steps,
            eta=config.eta,
            prediction=diffusion.prediction,
            clip=config.clip,
            spacing=config.spacing,
        )
    if config.num_steps < schedule.num_steps:
        schedule = processes.respace(schedule, config.num_steps, config.spacing)
    return ancestral_chain(
        predict, schedule, prediction=diffusion.prediction, variance=diffusion.variance, clip=config.clip
    )


def denoiser(config: ConfigDict, params: PyTree) -> denoising.Denoiser:
    """What a run of this config has trained, as a denoiser; UserError where it must be told a class."""
    if config.diffusion.conditional and not config.diffusion.label_dropout:
        raise UserError("A DDPM trained with diffusion.conditional is a denoiser only with label_dropout.")
    model = make_unet(
        config.model,
        out_channels=params["conv_out"]["bias"].shape[0],
        num_classes=params["label"]["embedding"].shape[0] - 1 if "label" in params else None,
    )
    predict = lambda x, t: cast(Array, model.apply({"params": params}, x, t, train=False))
    return denoising.denoiser_from_ddpm(predict, make_schedule(config.diffusion), config.diffusion.prediction)


def noise_range(config: ConfigDict) -> tuple[float, float]:
    """The least and the greatest noise that a run of this config is trained for, of images in [-1, 1]."""
    sigmas = denoising.schedule_sigmas(make_schedule(config.diffusion))
    return float(sigmas[0]), float(sigmas[-1])


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    checks.check_unet_fits(config.model, shape)
    schedule = make_schedule(config.diffusion)
    num_classes = train.num_classes if config.diffusion.conditional else None
    if config.diffusion.conditional and num_classes is None:
        raise UserError(f"diffusion.conditional needs labels, and {train.name} has none.")
    model = make_unet(config.model, out_channels=shape[-1], num_classes=num_classes)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        t = jnp.zeros(image.shape[0], jnp.int32)
        label = batch["label"] if num_classes is not None else None
        return model.init(key, image, t, label, train=False)["params"], {}

    def apply(params: PyTree, x: Array, t: Array, label: Array | None, key: Key | None) -> Array:
        rngs = None if key is None else {"dropout": key}
        return cast(Array, model.apply({"params": params}, x, t, label, train=key is not None, rngs=rngs))

    kinds: dict[str, Any] = {"prediction": config.diffusion.prediction, "variance": config.diffusion.variance}
    loss = objective.make_loss(
        apply,
        schedule,
        loss=config.diffusion.loss,
        num_levels=train.num_levels,
        label_dropout=config.diffusion.label_dropout,
        num_classes=num_classes,
        **kinds,
    )
    system = common.make_system(config, init, loss)

    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling: sample number i is of class i mod num_classes where the model is conditional

    def chain_for(params: PyTree, indices: Array) -> Chain:
        predict = lambda x, t, label: apply(params, x, t, label, None)
        if num_classes is None:
            bound = lambda x, t: predict(x, t, None)
        else:
            bound = classifier_free_guidance(
                predict, indices % num_classes, num_classes, config.sampling.guidance
            )
        return make_chain(config.sampling, bound, schedule, config.diffusion)

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        return run_chain(chain_for(params, indices), key, indices, shape)

    @jax.jit
    def sample_with_history(params: PyTree, key: Key, indices: Array) -> tuple[Array, Array]:
        chain = chain_for(params, indices)
        return run_chain_with_history(chain, key, indices, shape, min(11, config.sampling.num_steps + 1))

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        num = num or config.sampling.num
        params = state.sampling_params
        images = sample_in_batches(
            lambda indices: sharding.to_host(sample(params, key, sharding.spread(mesh, indices))),
            num,
            min(num, config.evaluation.batch_size),
        )
        directory.mkdir(parents=True, exist_ok=True)
        grid, reverse, forward = (
            directory / f"{name}.png" for name in ("samples", "reverse_strip", "forward_strip")
        )
        scale = max(1, 64 // shape[0])
        columns = num_classes or None
        pictures.save_image_grid(grid, images, columns=columns, scale=scale)
        _, frames = sample_with_history(params, key, jnp.arange(8, dtype=jnp.int32))
        pictures.save_strip(reverse, np.asarray(frames), scale=scale)
        real = data.to_unit_range(test.fields["image"][:8], test.num_levels)
        pictures.save_strip(forward, forward_frames(schedule, real, key, 11), scale=scale)
        return [grid, reverse, forward]

    # ---- evaluation: without dropout, and every label is told

    held_out_loss = objective.make_loss(
        lambda params, x, t, label, _: apply(params, x, t, label, None),
        schedule,
        loss=config.diffusion.loss,
        num_levels=train.num_levels,
        num_classes=num_classes,
        **kinds,
    )
    held_out: dict[str, Any] = {"source": test, "mesh": mesh, "batch_size": config.evaluation.batch_size}
    validation = common.make_evaluation(
        lambda params, batch, key: held_out_loss(params, {}, batch, key)[1][0],
        limit=config.evaluation.num_likelihood,
        seed=config.seed,
        **held_out,
    )
    bits_per_dim = objective.make_bits_per_dim(
        apply, schedule, num_levels=test.num_levels, num_classes=num_classes, **kinds
    )
    bound = common.make_evaluation(
        lambda params, batch, key: bits_per_dim(params, batch, key),
        limit=config.evaluation.num_likelihood,
        seed=config.seed,
        **held_out,
    )

    def bound_scores(params: PyTree) -> Scores:
        """The variational bound on held-out images, and the terms it is the sum of."""
        num = min(config.evaluation.num_likelihood, len(test))
        reference, source = _BITS_PER_DIM.get(config.data.source, (None, ""))
        values = {name: mean.value for name, mean in bound(params).items() if name != "terms"}
        total = "bits/dim, upper bound" + (" given the class" if num_classes else "")
        return {
            "bits_per_dim": Score(float(values["bits_per_dim"]), total, num, False, reference, source),
            **{
                name: Score(float(values[name]), "bits/dim", num, False)
                for name in ("prior_bits_per_dim", "rate_bits_per_dim", "distortion_bits_per_dim")
            },
        }

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores: dict[str, Score] = {}
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            scores.update(generating.sample_scores(sample, params, judge, config, mesh))
        return {**scores, **bound_scores(params)}

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


def forward_frames(
    schedule: processes.DiffusionSchedule, images: np.ndarray, key: Key, num_frames: int
) -> np.ndarray:
    """Images [N, H, W, C] and what the forward process makes of them, [num_frames, N, H, W, C]."""
    eps = jax.random.normal(key, images.shape)
    times = np.linspace(0, schedule.num_steps - 1, num_frames - 1).astype(np.int32)
    noisy = [processes.q_sample(schedule, jnp.asarray(images), jnp.full(len(images), t), eps) for t in times]
    return np.stack([images, *(np.asarray(frame) for frame in noisy)])
