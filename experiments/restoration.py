"""A residual denoiser of photographs, and restoration with it as the prior: DMSP, DAEP, RED, plug-and-play.

  python -m jaxgen.run --config=experiments/restoration.py:photos --workdir=runs/restoration_photos
  python -m jaxgen.run --config=experiments/restoration.py:natural_cpu --workdir=runs/restoration_natural_cpu
  python -m jaxgen.run --config=experiments/restoration.py:photos --workdir=runs/restoration_mnist \\
      --config.denoiser=runs/ddpm_mnist --config.data.source=mnist --config.evaluation.crop=0

Trained with noise of all levels up to data.max_sigma, it is judged as a denoiser at 15, 25 and 50 of 255, as
the prior that takes a blur and 1 % noise off again, beside the Wiener filter and total variation on the same
images, as the prior that fills holes and, where evaluation.tasks has superresolution, as the one that
enlarges blurred and thinned-out images, beside bicubic interpolation. Test images share no pixel with the
training patches (see jaxgen/data/natural.py). Noise levels are in units of 1/255 of the range. On two cores
that do nothing else `natural_cpu` trains for 25 minutes and is judged for 15.

With config.denoiser nothing is trained: the folder of another run (ddpm, dae, ncsn, score_sde, restoration)
gives the denoiser, through the one interface of jaxgen/denoising.py. Its state comes with the evaluation, so
the pictures of such a run show the methods without a prior. That of dae knows one level, its noise.sigma, and
ignores the one it is asked for: it serves only DAEP, DMSP and RED, with restoration.daep_sigma, dmsp_sigma
and red_sigma at 127.5 times noise.sigma; the scores of the other methods then mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, restoring
from experiments.common.trained_runs import TrainedRun, read_denoiser_run
from jaxgen import operators, pictures, systems
from jaxgen.data.natural import Photographs, blur_kernels, load_photographs
from jaxgen.data.source import to_unit_range
from jaxgen.denoising import Denoiser, geometric_sigmas, over
from jaxgen.metrics.images import psnr, ssim
from jaxgen.models.dncnn import DnCNN
from jaxgen.objectives.score_matching import dae_loss
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Mean,
    Metrics,
    Need,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

TASKS = ("denoising", "deblurring", "inpainting", "superresolution")
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
            "inpainting.num_levels": 2,
            "inpainting.steps_per_level": 1,
            "evaluation.num_denoised": 1,
            "evaluation.num_images": 1,
            "evaluation.crop": 24,
            "evaluation.tasks": TASKS,
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
            "restoration.kernel": "levin09",
            "evaluation.num_denoised": 68,
            "evaluation.num_images": 68,
            "evaluation.crop": 0,
            "evaluation.tasks": TASKS,
        },
    ),
    "natural_cpu": Preset(
        "2 CPU cores",
        50,
        "BSD68 at 15/25/50: 31.0/28.5/25.4 dB; deblurring: HQS 26.6 dB; 3 times enlarged: HQS 24.6 dB",
        {
            "data.source": "natural",
            "data.patch": 40,
            "data.stride": 10,
            "data.batch_size": 8,
            "model.depth": 20,
            "model.features": 32,
            "optim.learning_rate": 1e-3,
            "optim.warmup_steps": 200,
            "optim.ema_decay": 0.995,
            "train.num_steps": 8000,
            "train.log_every": 100,
            "train.validate_every": 1000,
            "train.checkpoint_every": 1000,
            "restoration.kernel": "levin09",
            "evaluation.num_denoised": 68,
            "evaluation.num_images": 8,
            "evaluation.crop": 96,
            "evaluation.tasks": TASKS,
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
    "evaluation.num_denoised": (2, {}),
    "evaluation.num_images": (2, {}),
    "evaluation.tasks": (("denoising",), {}),
    "inpainting.hole": ("middle", {}),
    "inpainting.reverse_steps": (2, {}),
    "inpainting.dps_scale": (0.1, {"inpainting.reverse_steps": 2}),
    # A network for 8x8 pixels, which superresolution's usual factor of 3 does not divide.
    "denoiser": (
        "{folder}/denoiser_run",
        {"data.source": "digits", "evaluation.crop": 0, "evaluation.factor": 2},
    ),
}
# BSD68, Zhang et al. 2017, table II: the network for one known level each.
_DNCNN = {15: 31.73, 25: 29.23, 50: 26.23}
_LEVELS = (15, 25, 50)
_PHOTOGRAPHS = ("photos", "photos_reversed", "natural", "natural_set12")
_SSIM_WINDOW = 11


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `photos`."""
    config = common.base_config(num_steps=1500)
    config.data = ConfigDict(
        {
            # photos, photos_reversed, natural (tested on BSD68), natural_set12, or grey images: mnist ...
            "source": "photos",
            "patch": 32,  # of photographs; other images are taken whole
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
            # gaussian, flat, levin09_1 ... 8, kernels_12_1 ... 12; levin09: its eight, by turns
            "kernel": "gaussian",
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
    config.inpainting = ConfigDict(
        {
            "hole": "pixels",  # every other pixel or so, or the middle: half of both sides
            "sigma_max": 50.0,  # Langevin goes from here
            "sigma_min": 2.55,  # to here
            "num_levels": 10,
            "steps_per_level": 10,
            "step_ratio": 0.2,  # of the step size to sigma^2
            # RePaint's and DPS's of the 1000 of DDPM; 0 leaves them out, as denoisers of weak noise must.
            "reverse_steps": 0,
            "dps_scale": 0.3,
        }
    )
    config.denoiser = ""  # the folder of a trained run to take the denoiser of; "" trains one
    # Whole images are denoised; the middles of some are restored and filled (crop 0: those too are whole).
    config.evaluation = ConfigDict(
        {
            "tasks": TASKS[:3],
            "num_denoised": 2,
            "num_images": 2,
            "crop": 128,
            "factor": 3,  # superresolution: of all so many pixels of a row and of a column one is left,
            "factor_blur": 1.6,  # after a Gaussian blur
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "data.patch", "data.stride", "model.features")
    checks.at_least(config, 2, "model.depth")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.one_of(config, ("", "psnr_25"), "train.best_metric")
    checks.at_least(config, 1, "restoration.num_steps", "restoration.hqs_steps")
    checks.at_least(config, 1, "evaluation.num_images", "evaluation.num_denoised")
    checks.one_of(config, ("pixels", "middle"), "inpainting.hole")
    checks.at_least(config, 1, "inpainting.steps_per_level")
    checks.in_range(config, 0, 1000, "inpainting.reverse_steps", closed=True)
    checks.above(config, 0.0, "inpainting.step_ratio", "inpainting.dps_scale")
    inpainting = config.inpainting
    geometric_sigmas(inpainting.sigma_max, inpainting.sigma_min, inpainting.num_levels)
    checks.at_least(config, 1, "evaluation.factor")
    checks.above(config, 0.0, "evaluation.factor_blur")
    if not config.evaluation.tasks:
        raise UserError(f"evaluation.tasks is empty: give some of {', '.join(TASKS)}.")
    for task in config.evaluation.tasks:
        if task not in TASKS:
            raise checks.unknown("evaluation.tasks", task, TASKS)
    if config.evaluation.crop and config.evaluation.crop < 16:
        raise UserError(f"evaluation.crop must be at least 16, or 0 for none, not {config.evaluation.crop}.")
    fields = ("noise", "dmsp_sigma", "daep_sigma", "red_sigma", "hqs_sigma_max", "total_variation")
    for name, value in [
        ("data.max_sigma", config.data.max_sigma),
        *((f"restoration.{field}", config.restoration[field]) for field in fields),
    ]:
        if not value > 0.0:
            raise UserError(f"{name} must be positive, but it is {value}.")


def denoiser(config: ConfigDict, params: PyTree) -> Denoiser:
    """What a run of this config has trained, as a denoiser of images in [-1, 1]."""
    model = make_model(config.model)
    return lambda x, sigma: cast(Array, model.apply({"params": params}, x, sigma))


def make_model(config: ConfigDict) -> DnCNN:
    """The network that config.model describes."""
    return DnCNN(config.depth, config.features, config.conditional, dtype=common.DTYPES[config.dtype])


def load_pictures(config: ConfigDict) -> Photographs:
    """Photographs, or the images of a grey data set as they are."""
    if config.source in _PHOTOGRAPHS:
        return load_photographs(config.source, patch=config.patch, stride=config.stride)
    train, test = common.load_images(config.source)
    if train.fields["image"].shape[-1] != 1:
        raise UserError(f"restoration takes grey images, and those of data.source={config.source} are not.")
    images = test.fields["image"][..., 0]
    scaled = np.rint(images * (255.0 / (test.num_levels - 1))).astype(np.uint8)
    return Photographs(train, tuple(scaled))


def denoiser_need(run: TrainedRun, groups: list[np.ndarray], mesh: jax.sharding.Mesh, factor: int) -> Need:
    """The run as one that the evaluation needs; UserError where it was trained on images of another size.

    factor: of superresolution, 1 without it.
    """
    experiment = run.module.build(run.config, mesh)
    batch = experiment.train_batch(0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # It may refuse, as it does where the network must be told a class.
    run.module.denoiser(run.config, jax.eval_shape(experiment.system.init, key, batch).params)
    if run.module.__name__ != __name__:  # a residual network of convolutions takes any size
        _check_sizes(run, batch["image"].shape[1:], groups, factor)
    source, config = f"{run.experiment}:{run.preset}", run.config.to_dict()
    return Need(experiment=experiment, source=source, config=config, workdir=str(run.workdir))


def _check_sizes(run: TrainedRun, trained: tuple[int, ...], groups: list[np.ndarray], factor: int) -> None:
    height, width, channels = trained
    for shape in sorted({group.shape[1:] for group in groups}):
        if shape != trained:
            raise UserError(
                f"the denoiser of {run.workdir} takes images of {height}x{width}x{channels}, and the test "
                f"images are {'x'.join(map(str, shape))}: set data.source={run.config.data.source} and "
                "evaluation.crop=0."
            )
    if height % factor or width % factor:
        raise UserError(
            f"the denoiser of {run.workdir} takes images of {height}x{width} alone: set evaluation.factor to "
            "a divisor of both, or leave superresolution out of evaluation.tasks."
        )


def cropped_groups(images: tuple[np.ndarray, ...], crop: int, num: int) -> list[np.ndarray]:
    """The first images, their middles where `crop` is set, float32 [n, H, W, 1]; n at most 8, of one size."""
    chosen = []
    for image in images[:num]:
        if crop:
            top, left = ((size - crop) // 2 for size in image.shape)
            if min(top, left) < 0:
                raise UserError(f"evaluation.crop={crop} is larger than a test image of {image.shape}.")
            image = image[top : top + crop, left : left + crop]
        chosen.append(to_unit_range(image[..., None], 256))
    shapes = sorted({image.shape for image in chosen})
    alike = [np.stack([image for image in chosen if image.shape == shape]) for shape in shapes]
    return [images[start : start + 8] for images in alike for start in range(0, len(images), 8)]


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, photographs, restoration and metrics."""
    check(config)
    run = read_denoiser_run(config.denoiser) if config.denoiser else None
    photographs = load_pictures(config.data)
    kernels = blur_kernels(config.restoration.kernel)
    groups = cropped_groups(photographs.test, config.evaluation.crop, config.evaluation.num_images)
    whole = cropped_groups(photographs.test, 0, config.evaluation.num_denoised)
    _, rows, columns = (size // 2 for size in kernels.shape)
    if min(size for group in groups for size in group.shape[1:3]) < max(kernels.shape[1:]):
        raise UserError(
            f"the test images are smaller than the blur kernel of {kernels.shape[1:]}: take another."
        )
    schedules = restoring.reverse_schedules(config.inpainting.reverse_steps)
    factor = config.evaluation.factor if "superresolution" in config.evaluation.tasks else 1
    needs = {"denoiser": denoiser_need(run, [*groups, *whole], mesh, factor)} if run else {}
    # A denoiser that was trained elsewhere comes with the evaluation, its parameters with it.
    of_params = functools.partial(run.module.denoiser, run.config) if run else None

    def prior(params: PyTree) -> Denoiser | None:
        """The denoiser of these parameters; {} are the parameters of none."""
        if not params:
            return None
        return of_params(params) if of_params else denoiser(config, params)

    model = make_model(config.model)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        return model.init(key, image, jnp.zeros(image.shape[0]))["params"], {}

    def loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        """||A(x + sigma eps) - x||^2 per pixel, sigma uniform up to data.max_sigma."""
        level_key, noise_key = jax.random.split(key)
        x = batch["image"]
        sigma = restoring.unit(config.data.max_sigma) * jax.random.uniform(level_key, x.shape[:1])
        noisy = x + over(sigma, x) * jax.random.normal(noise_key, x.shape)
        denoised = cast(Array, model.apply({"params": params}, noisy, sigma))
        error = dae_loss(x, denoised) / x[0].size
        mean = Mean.of(error, batch.get("mask"))
        return mean.value_or_zero, ({"loss": mean}, model_state)

    def keep(params: PyTree, batch: Batch, key: Key) -> tuple[PyTree, Metrics]:
        return params, {"loss": Mean.of(jnp.zeros(()))}

    loop = common.loop_settings(config.train)
    if run:
        system = systems.update_system(lambda key, batch: {}, keep)
        loop = dataclasses.replace(
            loop,
            num_steps=1,
            steps_per_dispatch=1,
            log_every=1,
            validate_every=1,
            checkpoint_every=1,
            best_metric="",
        )
    else:
        system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, photographs.patches, seed=config.seed, mesh=mesh)

    # ---- evaluation

    @jax.jit
    def denoised(params: PyTree, truth: Array, sigma: Array, key: Key) -> Array:
        noisy = operators.observe(operators.identity(), truth, sigma, key)
        denoise = prior(params)
        return noisy if denoise is None else denoise(noisy, jnp.full(truth.shape[0], sigma))

    @jax.jit
    def restored(params: PyTree, truth: Array, key: Key) -> dict[str, Array]:
        observed_key, restore_key = jax.random.split(key)
        noise = restoring.unit(config.restoration.noise)
        kernel = np.resize(kernels, (len(truth), *kernels.shape[1:]))  # by turns
        y = operators.observe(operators.blur(kernel, "valid"), truth, noise, observed_key)
        return run_all(restoring.restorations(config.restoration, prior(params), y, kernel), restore_key)

    @jax.jit
    def filled(params: PyTree, truth: Array, key: Key) -> dict[str, Array]:
        mask = jnp.asarray(mask_of(truth))
        return run_all(restoring.inpaintings(config, prior(params), truth, mask, schedules), key)

    @jax.jit
    def enlarged(params: PyTree, truth: Array, key: Key) -> dict[str, Array]:
        observed_key, enlarge_key = jax.random.split(key)
        operator = restoring.low_resolution(config.evaluation.factor, config.evaluation.factor_blur)
        y = operators.observe(operator, truth, restoring.unit(config.restoration.noise), observed_key)
        return run_all(restoring.superresolutions(config, prior(params), y), enlarge_key)

    def run_all(methods: Mapping[str, Callable[[Array], Array]], key: Key) -> dict[str, Array]:
        keys = jax.random.split(key, len(methods))
        return {name: method(k) for (name, method), k in zip(methods.items(), keys, strict=True)}

    def mask_of(truth: np.ndarray | Array) -> np.ndarray:
        height, width = truth.shape[1:3]
        return restoring.hole_mask(config.inpainting.hole, height, width, config.seed)

    def denoising_psnr(params: PyTree, images: list[np.ndarray], sigma: float) -> np.ndarray:
        values = []
        for number, x in enumerate(images):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            found = denoised(params, jnp.asarray(x), jnp.float32(restoring.unit(sigma)), key)
            values.append(psnr(np.asarray(found), x, 2.0))
        return np.concatenate(values)

    def validate(state: TrainState) -> Metrics:
        if run:
            return {}
        values = denoising_psnr(state.sampling_params, groups, 25.0)
        return {"psnr_25": Mean.of(jnp.asarray(values, jnp.float32))}

    def inside(x: np.ndarray) -> np.ndarray:
        """What the windows of the blur are centred on: the part that is judged."""
        return x[:, rows : x.shape[1] - rows, columns : x.shape[2] - columns]

    def divisible(x: np.ndarray) -> np.ndarray:
        """The part of the images that evaluation.factor divides."""
        height, width = (size - size % config.evaluation.factor for size in x.shape[1:3])
        return x[:, :height, :width]

    def denoising_scores(params: PyTree) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        for sigma in _LEVELS:
            values = denoising_psnr(params, whole, sigma)
            all_68 = config.data.source == "natural" and len(values) == 68
            reference = (_DNCNN[sigma], "Zhang et al. 2017, table II, BSD68") if all_68 else (None, "")
            scores[f"psnr_denoised_{sigma}"] = Score(
                float(values.mean()), "dB", len(values), True, *reference
            )
        return scores

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = (needed["denoiser"] if run else state).sampling_params
        tasks = config.evaluation.tasks
        found: dict[tuple[str, str], list[np.ndarray]] = {}

        def note(name: str, unit_name: str, values: np.ndarray) -> None:
            found.setdefault((name, unit_name), []).append(values)

        hole = f"dB, in the hole ({config.inpainting.hole})"
        times = f"dB, {config.evaluation.factor} times enlarged"
        for number, x in enumerate(groups):
            root = jax.random.fold_in(jax.random.key(config.seed + 1), number)
            restored_key, filled_key = jax.random.split(root)
            if "deblurring" in tasks:
                for name, image in restored(params, jnp.asarray(x), restored_key).items():
                    judged, truth = inside(np.asarray(image)), inside(x)
                    note(f"psnr_{name}", "dB", psnr(judged, truth, 2.0))
                    if min(truth.shape[1:3]) >= _SSIM_WINDOW:
                        note(f"ssim_{name}", "SSIM", ssim(judged, truth, 2.0))
            if "inpainting" in tasks:
                for name, image in filled(params, jnp.asarray(x), filled_key).items():
                    note(
                        f"inpainting_psnr_{name}", hole, restoring.hole_psnr(np.asarray(image), x, mask_of(x))
                    )
            if "superresolution" in tasks:
                key, truth = jax.random.fold_in(root, 2), divisible(x)
                for name, image in enlarged(params, jnp.asarray(truth), key).items():
                    note(f"superresolution_psnr_{name}", times, psnr(np.asarray(image), truth, 2.0))
        scores = denoising_scores(params) if "denoising" in tasks else {}
        for (name, unit_name), parts in found.items():
            values = np.concatenate(parts)
            scores[name] = Score(float(values.mean()), unit_name, len(values), True)
        return scores

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """What each method made of the test images: from left to right, the truth at the end.

        A picture for each of evaluation.tasks but denoising, which alone has that of deblurring.
        """
        tasks = set(config.evaluation.tasks) - {"denoising"} or {"deblurring"}
        truth = groups[0][: num or 2]
        params = state.sampling_params
        restored_key, filled_key = jax.random.split(key)
        frames: dict[str, list[np.ndarray]] = {}
        directory.mkdir(parents=True, exist_ok=True)

        def show(task: str, methods: Mapping[str, Array], truth: np.ndarray) -> None:
            frames[task] = [*(np.asarray(image) for image in methods.values()), truth]

        if "deblurring" in tasks:
            show("restored", restored(params, jnp.asarray(truth), restored_key), truth)
        if "inpainting" in tasks:
            show("inpainting", filled(params, jnp.asarray(truth), filled_key), truth)
            frames["inpainting"].insert(0, truth * mask_of(truth))
        if "superresolution" in tasks:
            part, enlarge_key = divisible(truth), jax.random.fold_in(key, 2)
            show("superresolution", enlarged(params, jnp.asarray(part), enlarge_key), part)
        paths = []
        for task, images in frames.items():
            paths.append(directory / f"{task}.png")
            pictures.save_strip(paths[-1], np.stack(images), scale=max(1, 64 // truth.shape[1]))
        return paths

    return Experiment(
        system=system,
        loop=loop,
        train_batch=stream,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": photographs.patches.fingerprint},
        seed=config.seed,
        needs=needs,
    )
