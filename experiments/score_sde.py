"""Score-based generation through SDEs (Song et al. 2021) with the U-Net of DDPM, and bits/dim by the ODE.

  python -m jaxgen.run --config=experiments/score_sde.py:digits --workdir=runs/score_sde_digits

With sde.name=edm the same U-Net is trained as Karras et al. 2022 do, preconditioned and told sigma. Read
denoising, objectives/continuous_time, samplers/sde, samplers/ode and this file, in that order. `PRESETS` says
what each preset needs and reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from experiments.common.unets import make_unet
from jaxgen import denoising, pictures
from jaxgen.models.unet import UNet
from jaxgen.objectives import continuous_time
from jaxgen.samplers.chain import run_chain_with_history
from jaxgen.samplers.ode import (
    bits_per_dim,
    dpm_solver_2m_chain,
    flow_log_density,
    heun_chain,
    karras_sigmas,
    rademacher_probes,
)
from jaxgen.samplers.sde import reverse_sde_chain
from jaxgen.types import (
    Array,
    Batch,
    Chain,
    Experiment,
    Key,
    LossFn,
    Mean,
    Metrics,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

SLOW = True  # to compile on a CPU, even the smoke preset
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.channels": 8,
            "model.channel_multipliers": (1,),
            "model.attention_resolutions": (),
            "model.num_groups": 4,
            "model.head_dim": 8,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num_steps": 3,
            "sampling.num": 4,
            "likelihood.num_steps": 2,
            "likelihood.num": 8,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 10, "2.20 bits/dim (ODE), 0.87 recognised, Fréchet ratio 1.7", {}),
    "digits_ve": Preset("2 CPU cores", 10, "not recorded yet", {"sde.name": "ve"}),
    "digits_edm": Preset(
        "2 CPU cores",
        10,
        "not recorded yet",
        {"sde.name": "edm", "sampling.method": "ode", "sampling.num_steps": 18},
    ),
    "cifar10": Preset(
        "1 GPU of 80 GB",
        5000,
        "published: FID 3.24 against the training images, 3.28 bits/dim (Song et al. 2021, DDPM as VP SDE); "
        "needs evaluation.inception",
        {
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
            "optim.learning_rate": 2e-4,
            "optim.warmup_steps": 5000,
            "optim.ema_decay": 0.9999,
            "optim.schedule": "constant",
            "sde.t_min": 1e-5,
            "train.num_steps": 1_300_000,
            "train.log_every": 500,
            "train.validate_every": 10_000,
            "train.checkpoint_every": 10_000,
            "sampling.num_steps": 1000,
            "likelihood.num_steps": 100,
            "likelihood.num": 10_000,
            "evaluation.num_samples": 50_000,
            "evaluation.batch_size": 250,
            "evaluation.classifier": "cifar10",
        },
    ),
}
SDES = ("vp", "sub_vp", "ve", "edm")
SIGMA_DATA = 0.5  # what the network takes for the data's standard deviation (Karras et al. 2022, table 1)
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "model.channel_multipliers": ((1, 2), {}),
    "model.attention_resolutions": ((8,), {}),
    "model.head_dim": (4, {}),
    "model.num_groups": (2, {}),
    "model.dropout": (0.1, {}),
    "sde.name": ("sub_vp", {}),
    "sde.sigma_min": (0.02, {"sde.name": "ve"}),
    "sde.sigma_max": (10.0, {"sde.name": "ve"}),
    "sde.p_mean": (-0.5, {"sde.name": "edm"}),
    "sde.p_std": (0.5, {"sde.name": "edm"}),
    "sde.weighting": ("likelihood", {}),
    "sampling.method": ("ode", {}),
    "sampling.corrector_steps": (1, {}),
    "sampling.snr": (0.1, {"sampling.corrector_steps": 1}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=3000)
    config.data.batch_size = 32
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
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
        }
    )
    config.sde = ConfigDict(
        {
            "name": "vp",  # vp, sub_vp, ve, edm
            "beta_min": 0.1,  # vp, sub_vp
            "beta_max": 20.0,
            "sigma_min": 0.01,  # ve, edm
            "sigma_max": 20.0,
            "p_mean": -1.2,  # edm: of the logarithm of sigma in training
            "p_std": 1.2,
            "weighting": "simple",  # simple, likelihood; edm has its own
            "t_min": 1e-3,  # training and sampling end there
        }
    )
    config.sampling = ConfigDict(
        {
            # sde: reverse-time with predictor and correctors; ode: Heun's method; dpm: DPM-Solver++(2M)
            "method": "sde",
            "num_steps": 100,
            "corrector_steps": 0,  # sde
            "snr": 0.16,  # sde, correctors
            "num": 64,
        }
    )
    config.likelihood = ConfigDict({"num_steps": 30, "num_probes": 1, "num": 180})
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.check_unet(config)
    checks.one_of(config, SDES, "sde.name")
    checks.one_of(config, get_args(continuous_time.Weighting), "sde.weighting")
    checks.one_of(config, ("sde", "ode", "dpm"), "sampling.method")
    checks.above(config, 0.0, "sde.p_std")
    checks.at_least(
        config, 1, "sampling.num", "likelihood.num_steps", "likelihood.num_probes", "likelihood.num"
    )
    checks.at_least(config, 2, "sampling.num_steps")
    checks.at_least(config, 0, "sampling.corrector_steps")
    if not config.sampling.snr > 0.0 or not 0.0 < config.sde.t_min < 1.0:
        raise UserError("sampling.snr must be positive and sde.t_min between 0 and 1.")
    make_sde(config.sde)
    generating.check_evaluation(config)


def make_sde(config: ConfigDict) -> denoising.Sde:
    """The SDE that config.sde describes; EDM's time is sigma, of which any parametrisation will do."""
    if config.name in ("ve", "edm"):
        return denoising.ve_sde(config.sigma_min, config.sigma_max)
    make = denoising.vp_sde if config.name == "vp" else denoising.sub_vp_sde
    return make(config.beta_min, config.beta_max)


def make_eps(model: UNet, sde: denoising.Sde) -> Callable[[PyTree, Array, Array, Key | None], Array]:
    """(params, x_t, t, dropout key or None) -> the noise in x_t."""

    def eps(params: PyTree, x_t: Array, t: Array, key: Key | None) -> Array:
        # The network sees x_t scaled to unit variance, were the data's deviation this.
        variance = jnp.square(SIGMA_DATA * sde.scale(t)) + jnp.square(sde.std(t))
        x = denoising.over(jax.lax.rsqrt(variance), x_t) * x_t
        rngs = None if key is None else {"dropout": key}
        out = model.apply({"params": params}, x, 999.0 * t, train=key is not None, rngs=rngs)
        return cast(Array, out)

    return eps


# (params, x, sigma, dropout key or None) -> E[x0 | x].
Denoise = Callable[[PyTree, Array, Array, Key | None], Array]


def make_denoise(config: ConfigDict, model: UNet) -> Denoise:
    """The network as a denoiser, of the kind that config.sde describes."""
    sde = make_sde(config)
    eps = make_eps(model, sde)

    def denoise(params: PyTree, x: Array, sigma: Array, key: Key | None) -> Array:
        if config.name != "edm":
            return denoising.denoiser_from_sde_eps(lambda x, t: eps(params, x, t, key), sde)(x, sigma)
        rngs = None if key is None else {"dropout": key}

        def network(x: Array, noise: Array) -> Array:
            # The embedding of times is made for steps: between two levels there should be several.
            out = model.apply({"params": params}, x, 250.0 * noise, train=key is not None, rngs=rngs)
            return cast(Array, out)

        return denoising.preconditioned_denoiser(network, SIGMA_DATA)(x, sigma)

    return denoise


def denoiser(config: ConfigDict, params: PyTree) -> denoising.Denoiser:
    """What a run of this config has trained, as a denoiser."""
    model = make_unet(config.model, out_channels=params["conv_out"]["bias"].shape[0])
    denoise = make_denoise(config.sde, model)
    return lambda x, sigma: denoise(params, x, sigma, None)


def make_loss(config: ConfigDict, model: UNet, *, train: bool) -> LossFn:
    """The loss that config.sde describes; dropout is on in training alone."""
    sde = make_sde(config)
    network = make_denoise(config, model) if config.name == "edm" else make_eps(model, sde)

    def apply(params: PyTree, x: Array, noise: Array, key: Key) -> Array:
        return network(params, x, noise, key if train else None)

    if config.name == "edm":
        return continuous_time.make_edm_loss(
            apply, sigma_data=SIGMA_DATA, p_mean=config.p_mean, p_std=config.p_std
        )
    return continuous_time.make_sde_loss(apply, sde, weighting=config.weighting, t_min=config.t_min)


def noise_range(config: ConfigDict) -> tuple[float, float]:
    """The least and the greatest noise that a run of this config is trained for."""
    sde = make_sde(config.sde)
    times = jnp.asarray([config.sde.t_min, 1.0])
    least, greatest = (float(sigma) for sigma in np.asarray(sde.std(times) / sde.scale(times)))
    return least, greatest


def prior_std(config: ConfigDict) -> float:
    """The standard deviation that sampling starts with, of x_1 / scale(1) as a denoiser sees it."""
    sde = make_sde(config.sde)
    return sde.prior_std / float(sde.scale(jnp.float32(1.0)))


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler, likelihood and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    checks.check_unet_fits(config.model, shape)
    sde, t_min = make_sde(config.sde), config.sde.t_min
    model = make_unet(config.model, out_channels=shape[-1])

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        return model.init(key, image, jnp.zeros(image.shape[0]), train=False)["params"], {}

    loss = make_loss(config.sde, model, train=True)
    held_out_loss = make_loss(config.sde, model, train=False)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling

    sigma_min, sigma_max = noise_range(config)
    latent_std = prior_std(config)

    def chain_of(params: PyTree) -> Chain:
        sampling = config.sampling
        if sampling.method != "sde":
            solver = heun_chain if sampling.method == "ode" else dpm_solver_2m_chain
            sigmas = karras_sigmas(sampling.num_steps, sigma_min, sigma_max)
            return solver(denoiser(config, params), sigmas)
        return reverse_sde_chain(
            denoiser(config, params),
            sde,
            num_steps=sampling.num_steps,
            t_end=t_min,
            corrector_steps=sampling.corrector_steps,
            snr=sampling.snr,
        )

    @jax.jit
    def sample_with_history(params: PyTree, key: Key, indices: Array) -> Array:
        num_frames = min(11, config.sampling.num_steps + 1)
        return run_chain_with_history(chain_of(params), key, indices, shape, num_frames)[1]

    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        return sample_with_history(params, key, indices)[-1]

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params, batch_size = state.sampling_params, config.evaluation.batch_size
        grid = generating.write_grid(sample, params, key, num or config.sampling.num, batch_size, directory)
        strip = directory / "reverse_strip.png"
        frames = np.asarray(sample_with_history(params, key, jnp.arange(batch_size, dtype=jnp.int32)))
        pictures.save_strip(strip, frames[:, :8], scale=max(1, 64 // shape[0]))
        return [grid, strip]

    # ---- evaluation

    def likelihood(params: PyTree, batch: Batch, key: Key) -> Metrics:
        """Bits/dim of uniformly dequantised images, by the probability-flow ODE and random probes."""
        image = batch["image"]
        noise_key, probe_key = jax.random.split(key)
        width = 2.0 / (test.num_levels - 1)
        x = image + width * (jax.random.uniform(noise_key, image.shape) - 0.5)
        probes = rademacher_probes(
            jax.random.split(probe_key, image.shape[0]), config.likelihood.num_probes, image.shape[1:]
        )
        log_density, _ = flow_log_density(
            denoiser(config, params),
            x,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            num_steps=config.likelihood.num_steps,
            probes=probes,
            prior_std=latent_std,
        )
        bits = bits_per_dim(log_density, x[0].size, test.num_levels)
        return {"bits_per_dim": Mean.of(bits, batch.get("mask"))}

    batch_size = config.evaluation.batch_size
    validation = common.make_evaluation(
        lambda params, batch, key: held_out_loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=batch_size,
        seed=config.seed,
    )
    bits = common.make_evaluation(
        likelihood, test, mesh, batch_size=batch_size, limit=config.likelihood.num, seed=config.seed
    )

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        num = min(config.likelihood.num, len(test))
        scores = {
            **generating.loss_scores(validation(params), len(test), "summed over pixels, all times"),
            "bits_per_dim": Score(
                float(bits(params)["bits_per_dim"].value), "bits/dim, probability-flow ODE", num, False
            ),
        }
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
