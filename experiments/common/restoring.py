"""Restoration methods as experiments set them up: from a config and a denoiser to restored images.

Noise levels of configs are in 1/255 of the range of pixels, images in [-1, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxgen import operators, processes
from jaxgen.data.natural import gaussian_kernel
from jaxgen.denoising import Denoiser, ddpm_from_denoiser, geometric_sigmas
from jaxgen.samplers import restoration
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.conditional import dps_chain, langevin_inpainting_chain, repaint_chain
from jaxgen.samplers.restoration_baselines import total_variation_chain, wiener
from jaxgen.types import Array, Chain, Key


def unit(sigma: float) -> float:
    """A noise level in 1/255 of the range as one of pixels in [-1, 1]."""
    return 2.0 * sigma / 255.0


def _run(chain: Chain, shape: tuple[int, ...], key: Key) -> Array:
    """The chain's images of `shape` [B, H, W, C], clipped to [-1, 1]."""
    indices = jnp.arange(shape[0], dtype=jnp.int32)
    return jnp.clip(run_chain(chain, key, indices, shape[1:]), -1.0, 1.0)


def hqs_sigmas(config: ConfigDict) -> np.ndarray:
    """The levels of `restoration.hqs_chain`, down to the noise of the images: of config.restoration."""
    return np.geomspace(unit(config.hqs_sigma_max), unit(config.noise), config.hqs_steps)


def restorations(
    config: ConfigDict, denoiser: Denoiser | None, y: Array, kernel: np.ndarray
) -> dict[str, Callable[[Array], Array]]:
    """{method: key -> restored images} for y = kernel * x + noise, of windows inside x alone ("valid").

    kernel: [B, KH, KW], one for each image. Without a denoiser, the methods that need none.
    """
    operator = operators.blur(kernel, "valid")
    rows, columns = kernel.shape[1] // 2, kernel.shape[2] // 2
    start = jnp.pad(y, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="edge")
    noise = unit(config.noise)
    steps = {"num_steps": config.num_steps}
    told: dict[str, Any] = {"noise_std": noise, **steps}
    energy = np.square(kernel).sum((1, 2), dtype=np.float32)[:, None, None, None]
    chains: dict[str, Chain] = {}
    if denoiser is not None:
        dmsp = functools.partial(restoration.dmsp_chain, denoiser, operator, y, start)
        sigma = {name: unit(config[f"{name}_sigma"]) for name in ("dmsp", "daep", "red")}
        chains = {
            "dmsp": dmsp(sigma=sigma["dmsp"], **told),
            "dmsp_noise_blind": dmsp(sigma=sigma["dmsp"], row_energy=energy, **steps),
            "daep": restoration.daep_chain(denoiser, operator, y, start, sigma=sigma["daep"], **told),
            "red": restoration.red_chain(denoiser, operator, y, start, sigma=sigma["red"], **told),
            "hqs": restoration.hqs_chain(
                denoiser, operator, y, start, sigmas=hqs_sigmas(config), noise_std=noise
            ),
        }
    chains["total_variation"] = total_variation_chain(
        operator, y, start, strength=config.total_variation * noise, **steps
    )

    def wiener_filter(key: Key) -> Array:
        mean = jnp.mean(start, axis=(1, 2, 3), keepdims=True)
        # White noise over the power of all of the image: one number an image, the simplest of its kind.
        ratio = noise**2 / jnp.maximum(jnp.var(start, axis=(1, 2, 3)), noise**2)[:, None, None]
        return jnp.clip(mean + wiener(start - mean, kernel, cast(Any, ratio)), -1.0, 1.0)

    return {
        "degraded": lambda key: start,
        "wiener": wiener_filter,
        **{name: functools.partial(_run, chain, start.shape) for name, chain in chains.items()},
    }


def low_resolution(factor: int, std: float) -> operators.LinearOperator:
    """A Gaussian blur of 7 x 7 pixels and standard deviation `std`, and then every `factor`-th pixel."""
    kernel = gaussian_kernel(7, std)
    return operators.compose(operators.downsampling(factor), operators.blur(kernel, "replicate"))


def enlarged(y: Array, factor: int) -> Array:
    """Bicubic interpolation of [B, H, W, C] to [B, factor H, factor W, C], every factor-th pixel from the
    first being one of y's, as `operators.downsampling` takes them."""
    batch, height, width, channels = y.shape
    shape = (batch, factor * height, factor * width, channels)
    # Pixels are squares here, whose middles lie at halves: an enlargement alone would move the picture.
    shift = jnp.full(2, 0.5 * (1 - factor), y.dtype)
    scale = jnp.full(2, factor, y.dtype)
    return jax.image.scale_and_translate(y, shape, (1, 2), scale, shift, "cubic")


def superresolutions(
    config: ConfigDict, denoiser: Denoiser | None, y: Array
) -> dict[str, Callable[[Array], Array]]:
    """{method: key -> enlarged images} for y = `low_resolution` of x, and noise of restoration.noise.

    config: the whole one. Without a denoiser, the method that needs none.
    """
    factor = config.evaluation.factor
    start = enlarged(y, factor)
    methods: dict[str, Callable[[Array], Array]] = {"bicubic": lambda key: jnp.clip(start, -1.0, 1.0)}
    if denoiser is None:
        return methods
    restoring, noise = config.restoration, unit(config.restoration.noise)
    operator = low_resolution(factor, config.evaluation.factor_blur)
    sigmas = hqs_sigmas(restoring)
    chains = {
        "dmsp": restoration.dmsp_chain(
            denoiser,
            operator,
            y,
            start,
            sigma=unit(restoring.dmsp_sigma),
            noise_std=noise,
            num_steps=restoring.num_steps,
        ),
        "hqs": restoration.hqs_chain(denoiser, operator, y, start, sigmas=sigmas, noise_std=noise),
    }
    for name, chain in chains.items():
        methods[name] = functools.partial(_run, chain, start.shape)
    return methods


def hole_mask(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """float32 [1, H, W, 1]: 1 where a pixel is known; `pixels` hides each with probability 1/2."""
    mask = np.ones((1, height, width, 1), np.float32)
    if kind == "pixels":
        mask[...] = np.random.default_rng(seed).random(mask.shape) < 0.5
    else:
        mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0.0
    return mask


# DDPM's own schedule of 1000 steps, and those of them that RePaint and DPS take.
ReverseSchedules: TypeAlias = tuple[processes.DiffusionSchedule, processes.DiffusionSchedule]


def reverse_schedules(num_steps: int) -> ReverseSchedules | None:
    """None for 0 steps; to be called outside jit."""
    if not num_steps:
        return None
    whole = processes.linear_schedule(1000)
    return whole, processes.respace(whole, num_steps)


def inpaintings(
    config: ConfigDict,
    denoiser: Denoiser | None,
    known: Array,
    mask: Array,
    schedules: ReverseSchedules | None,
) -> dict[str, Callable[[Array], Array]]:
    """{method: key -> filled images} for images [B, H, W, 1] of which `mask` says what is known.

    config: the whole one; schedules: None leaves RePaint and DPS out. Without a denoiser, the method that
    needs none.
    """
    y, hidden = mask * known, 1.0 - mask
    mean = jnp.sum(y, axis=(1, 2, 3), keepdims=True) / jnp.sum(mask)
    start = y + hidden * mean
    methods: dict[str, Callable[[Array], Array]] = {"mean": lambda key: start}
    if denoiser is None:
        return methods
    inpainting = config.inpainting
    sigma_min, sigma_max = unit(inpainting.sigma_min), unit(inpainting.sigma_max)
    chains = {
        "dmsp": restoration.dmsp_chain(
            denoiser,
            operators.masking(mask),
            y,
            start,
            sigma=unit(config.restoration.dmsp_sigma),
            noise_std=sigma_min,
            num_steps=config.restoration.num_steps,
        ),
        "langevin": langevin_inpainting_chain(
            denoiser,
            geometric_sigmas(sigma_max, sigma_min, inpainting.num_levels),
            known,
            mask,
            steps_per_level=inpainting.steps_per_level,
            step_size=inpainting.step_ratio * sigma_min**2,
        ),
    }
    if schedules is not None:
        whole, taken = schedules
        predict = ddpm_from_denoiser(denoiser, whole, "eps")
        chains["repaint"] = repaint_chain(predict, taken, known, mask, jump_length=min(10, taken.num_steps))
        chains["dps"] = dps_chain(predict, taken, operators.masking(mask), y, scale=inpainting.dps_scale)

    def fill(chain: Chain, key: Key) -> Array:
        return y + hidden * _run(chain, known.shape, key)

    return {**methods, **{name: functools.partial(fill, chain) for name, chain in chains.items()}}


def hole_psnr(filled: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """PSNR in dB of the hidden pixels alone, float64 [B], for a range of 2."""
    hidden = np.broadcast_to(1.0 - mask, truth.shape).astype(np.float64)
    error = np.sum(hidden * np.square(filled.astype(np.float64) - truth), axis=(1, 2, 3))
    return np.asarray(10.0 * np.log10(4.0 * np.sum(hidden, axis=(1, 2, 3)) / np.maximum(error, 1e-12)))
