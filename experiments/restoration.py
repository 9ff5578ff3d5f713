"""A residual denoiser of photographs, and restoration with it as the prior: DMSP, DAEP, RED, plug-and-play.

  python -m jaxgen.run --config=experiments/restoration.py:photos --workdir=runs/restoration_photos

Trained with noise of all levels up to data.max_sigma, it is judged as a denoiser at 15, 25 and 50 of 255, and
as the prior that takes a blur and 1 % noise off again, beside the Wiener filter and total variation on the
same images. Test images share no pixel with the training patches (see jaxgen/data/natural.py). Noise levels
are in units of 1/255 of the range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks
from jaxgen import operators, pictures, systems
from jaxgen.data.natural import blur_kernel, load_photographs
from jaxgen.data.source import to_unit_range
from jaxgen.denoising import Denoiser, over
from jaxgen.metrics.images import psnr, ssim
from jaxgen.models.dncnn import DnCNN
from jaxgen.objectives.score_matching import dae_loss
from jaxgen.samplers import restoration
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.restoration_baselines import total_variation_chain, wiener
from jaxgen.types import (
    Array,
    Batch,
    Chain,
    Experiment,
    Key,
    Mean,
    Metrics,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "data.patch": 16,
            "data.batch_size": 8,
            "model.depth": 2,
            "model.features": 4,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "restoration.num_steps": 2,
            "evaluation.num_images": 1,
            "evaluation.crop": 24,
        },
    ),
    "photos": Preset("2 CPU cores", 10, "not recorded yet", {}),
    "natural": Preset(
        "1 GPU",
        120,
        "BSD68 at 15/25/50: 31.73/29.23/26.23 dB (Zhang et al. 2017, trained on 400 images of BSD)",
        {
            "data.source": "natural",
            "data.patch": 50,
            "data.stride": 10,
            "data.batch_size": 128,
            "model.depth": 20,
            "model.features": 64,
            "optim.learning_rate": 1e-3,
            "train.num_steps": 100_000,
            "train.log_every": 500,
            "train.validate_every": 5000,
            "train.checkpoint_every": 5000,
            "restoration.kernel": "levin09_1",
            "evaluation.num_images": 68,
            "evaluation.crop": 0,
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    # The files of the others are not on every machine; the patches are another set for another stride.
    "data.source": ("photos_reversed", {}),
    "data.augment": ("", {}),
    "model.conditional": (False, {}),
    "restoration.kernel": ("flat", {}),
    "restoration.noise": (5.0, {}),
    "train.best_metric": ("psnr_25", {}),
    "evaluation.crop": (20, {}),
    "evaluation.num_images": (2, {}),
}
# BSD68, Zhang et al. 2017, table II: the network for one known level each.
_DNCNN = {15: 31.73, 25: 29.23, 50: 26.23}
_LEVELS = (15, 25, 50)


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `photos`."""
    config = common.base_config(num_steps=1500)
    config.data = ConfigDict(
        {
            "source": "photos",  # photos, photos_reversed, natural (tested on BSD68), natural_set12
            "patch": 32,
            "stride": 20,
            "batch_size": 16,
            "augment": "flip",
            "max_sigma": 55.0,
        }
    )
    config.optim.schedule = "cosine"
    config.model = ConfigDict({"depth": 8, "features": 32, "conditional": True, "dtype": "float32"})
    config.restoration = ConfigDict(
        {
            "kernel": "gaussian",  # gaussian, flat, levin09_1 ... 8, kernels_12_1 ... 12
            "noise": 2.55,
            "num_steps": 300,
            "dmsp_sigma": 11.0,
            "daep_sigma": 25.0,
            "red_sigma": 11.0,
            "hqs_sigma_max": 49.0,
            "hqs_steps": 8,
            "total_variation": 0.6,  # times the noise
        }
    )
    config.evaluation = ConfigDict({"num_images": 2, "crop": 128})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "data.patch", "data.stride", "model.features")
    checks.at_least(config, 2, "model.depth")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.one_of(config, ("", "psnr_25"), "train.best_metric")
    checks.at_least(config, 1, "restoration.num_steps", "restoration.hqs_steps")
    checks.at_least(config, 1, "evaluation.num_images")
    if config.evaluation.crop and config.evaluation.crop < 16:
        raise UserError(f"evaluation.crop must be at least 16, or 0 for none, not {config.evaluation.crop}.")
    fields = ("noise", "dmsp_sigma", "daep_sigma", "red_sigma", "hqs_sigma_max", "total_variation")
    for name, value in [
        ("data.max_sigma", config.data.max_sigma),
        *((f"restoration.{field}", config.restoration[field]) for field in fields),
    ]:
        if not value > 0.0:
            raise UserError(f"{name} must be positive, but it is {value}.")


def unit(sigma: float) -> float:
    """A noise level in 1/255 of the range as one of pixels in [-1, 1]."""
    return 2.0 * sigma / 255.0


def restorations(
    config: ConfigDict, denoiser: Denoiser, y: Array, kernel: np.ndarray
) -> dict[str, Callable[[Array], Array]]:
    """{method: key -> restored images} for y = kernel * x + noise, of windows inside x alone ("valid")."""
    operator = operators.blur(kernel, "valid")
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    start = jnp.pad(y, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="edge")
    noise = unit(config.noise)
    steps = {"num_steps": config.num_steps}
    told: dict[str, Any] = {"noise_std": noise, **steps}
    energy = float(np.square(kernel).sum())
    hqs_sigmas = np.geomspace(unit(config.hqs_sigma_max), noise, config.hqs_steps)
    chains: dict[str, Chain] = {
        "dmsp": restoration.dmsp_chain(denoiser, operator, y, start, sigma=unit(config.dmsp_sigma), **told),
        "dmsp_noise_blind": restoration.dmsp_chain(
            denoiser, operator, y, start, sigma=unit(config.dmsp_sigma), row_energy=energy, **steps
        ),
        "daep": restoration.daep_chain(denoiser, operator, y, start, sigma=unit(config.daep_sigma), **told),
        "red": restoration.red_chain(denoiser, operator, y, start, sigma=unit(config.red_sigma), **told),
        "hqs": restoration.hqs_chain(denoiser, operator, y, start, sigmas=hqs_sigmas, noise_std=noise),
        "total_variation": total_variation_chain(
            operator, y, start, strength=config.total_variation * noise, **steps
        ),
    }

    def run(chain: Chain, key: Key) -> Array:
        indices = jnp.arange(y.shape[0], dtype=jnp.int32)
        return jnp.clip(run_chain(chain, key, indices, start.shape[1:]), -1.0, 1.0)

    def wiener_filter(key: Key) -> Array:
        mean = jnp.mean(start, axis=(1, 2, 3), keepdims=True)
        # White noise over the power of all of the image: one number, the simplest of its kind.
        ratio = noise**2 / jnp.maximum(jnp.var(start), noise**2)
        return jnp.clip(mean + wiener(start - mean, kernel, cast(Any, ratio)), -1.0, 1.0)

    return {
        "degraded": lambda key: start,
        "wiener": wiener_filter,
        **{name: functools.partial(run, chain) for name, chain in chains.items()},
    }


def cropped_groups(images: tuple[np.ndarray, ...], crop: int, num: int) -> list[np.ndarray]:
    """The first images, their middles where `crop` is set, in groups of one size: float32 [n, H, W, 1]."""
    chosen = []
    for image in images[:num]:
        if crop:
            top, left = ((size - crop) // 2 for size in image.shape)
            if min(top, left) < 0:
                raise UserError(f"evaluation.crop={crop} is larger than a test image of {image.shape}.")
            image = image[top : top + crop, left : left + crop]
        chosen.append(to_unit_range(image[..., None], 256))
    shapes = sorted({image.shape for image in chosen})
    return [np.stack([image for image in chosen if image.shape == shape]) for shape in shapes]


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, photographs, restoration and metrics."""
    check(config)
    photographs = load_photographs(config.data.source, patch=config.data.patch, stride=config.data.stride)
    kernel = blur_kernel(config.restoration.kernel)
    groups = cropped_groups(photographs.test, config.evaluation.crop, config.evaluation.num_images)
    model = DnCNN(
        config.model.depth,
        config.model.features,
        config.model.conditional,
        dtype=common.DTYPES[config.model.dtype],
    )

    def denoise(params: PyTree, x: Array, sigma: Array) -> Array:
        return cast(Array, model.apply({"params": params}, x, sigma))

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        return model.init(key, image, jnp.zeros(image.shape[0]))["params"], {}

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        """||A(x + sigma eps) - x||^2 per pixel, sigma uniform up to data.max_sigma."""
        level_key, noise_key = jax.random.split(key)
        x = batch["image"]
        sigma = unit(config.data.max_sigma) * jax.random.uniform(level_key, x.shape[:1])
        noisy = x + over(sigma, x) * jax.random.normal(noise_key, x.shape)
        error = dae_loss(x, denoise(params, noisy, sigma)) / x[0].size
        mean = Mean.of(error, batch.get("mask"))
        return mean.total / jnp.maximum(mean.count, 1.0), ({"loss": mean}, model_state)

    system = systems.gradient_system(
        init,
        loss,
        common.make_optimizer(config.optim, num_steps=config.train.num_steps),
        ema_decay=config.optim.ema_decay,
        ema_warmup=config.optim.ema_warmup,
        accumulate=config.optim.accumulate,
    )
    stream = common.training_stream(config.data, photographs.patches, seed=config.seed, mesh=mesh)

    # ---- evaluation

    @jax.jit
    def denoised(params: PyTree, truth: Array, sigma: Array, key: Key) -> Array:
        noisy = operators.observe(operators.identity(), truth, sigma, key)
        return denoise(params, noisy, jnp.full(truth.shape[0], sigma))

    @jax.jit
    def restored(params: PyTree, truth: Array, key: Key) -> dict[str, Array]:
        observed_key, restore_key = jax.random.split(key)
        noise = unit(config.restoration.noise)
        y = operators.observe(operators.blur(kernel, "valid"), truth, noise, observed_key)
        methods = restorations(config.restoration, lambda x, sigma: denoise(params, x, sigma), y, kernel)
        keys = jax.random.split(restore_key, len(methods))
        return {name: method(k) for (name, method), k in zip(methods.items(), keys, strict=True)}

    def denoising_psnr(params: PyTree, sigma: float) -> np.ndarray:
        key = jax.random.key(config.seed)
        values = [
            psnr(np.asarray(denoised(params, jnp.asarray(x), jnp.float32(unit(sigma)), key)), x, 2.0)
            for x in groups
        ]
        return np.concatenate(values)

    def validate(state: TrainState) -> Metrics:
        return {"psnr_25": Mean.of(jnp.asarray(denoising_psnr(state.sampling_params, 25.0), jnp.float32))}

    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2

    def inside(x: np.ndarray) -> np.ndarray:
        """What the windows of the blur are centred on: the part that is judged."""
        return x[:, rows : x.shape[1] - rows, columns : x.shape[2] - columns]

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores: dict[str, Score] = {}
        for sigma in _LEVELS:
            values = denoising_psnr(params, sigma)
            whole = config.data.source == "natural" and not config.evaluation.crop and len(values) == 68
            reference = (_DNCNN[sigma], "Zhang et al. 2017, table II, BSD68") if whole else (None, "")
            scores[f"psnr_denoised_{sigma}"] = Score(
                float(values.mean()), "dB", len(values), True, *reference
            )
        found: dict[str, list[np.ndarray]] = {}
        similar: dict[str, list[np.ndarray]] = {}
        for x in groups:
            for name, image in restored(params, jnp.asarray(x), jax.random.key(config.seed + 1)).items():
                found.setdefault(name, []).append(psnr(inside(np.asarray(image)), inside(x), 2.0))
                similar.setdefault(name, []).append(ssim(inside(np.asarray(image)), inside(x), 2.0))
        for name in found:
            values, ssims = np.concatenate(found[name]), np.concatenate(similar[name])
            scores[f"psnr_{name}"] = Score(float(values.mean()), "dB", len(values), True)
            scores[f"ssim_{name}"] = Score(float(ssims.mean()), "SSIM", len(ssims), True)
        return scores

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """The test images, their degraded forms and what each method made of them, from left to right."""
        truth = groups[0][: num or 4]
        images = restored(state.sampling_params, jnp.asarray(truth), key)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "restored.png"
        frames = np.stack([*(np.asarray(image) for image in images.values()), truth])
        pictures.save_strip(path, frames, scale=1)
        return [path]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": photographs.patches.fingerprint},
        seed=config.seed,
    )
