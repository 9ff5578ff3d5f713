"""Deblurring before and after: photographs blurred by motion with 1 % noise, as each method restores them.

    python -m experiments.figures.deblurring --workdir=runs/restoration_natural_cpu --out=DIR [--num=2]
        [--blind_steps=1000]

Takes a run of experiments/restoration.py, which says the kernels, the noise and the methods' settings. A row
for each image: the truth with its kernel, what was observed, and the restored images with their PSNR, inside
the part that the windows of the blur are centred on. The last column is DMSP that is told neither the noise
nor the kernel, which it finds with the image, from a flat one. An image of 128x128 takes 5 minutes on 2 CPU
cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import restoration
from experiments.common import restoring
from experiments.common.trained_runs import read_run
from experiments.figures import command
from experiments.figures.trained import restore
from jaxgen import operators, sharding
from jaxgen.data.natural import blur_kernels
from jaxgen.denoising import Denoiser
from jaxgen.metrics.images import psnr
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.restoration import dmsp_kernel_blind_chain
from jaxgen.types import Array, UserError

SHOWN = {
    "degraded": "observed",
    "wiener": "Wiener",
    "total_variation": "total variation",
    "daep": "DAEP",
    "dmsp": "DMSP",
}
BLIND = "DMSP, kernel-blind"


def restored_images(
    config: ConfigDict,
    denoiser: Denoiser | None,
    truth: np.ndarray,
    kernels: np.ndarray,
    blind_steps: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{title: images [B, H, W, 1]} as config.restoration says, and the kernels [B, K, K] that were found.

    truth: [B, H, W, 1] in [-1, 1]; kernels: [B, K, K]; blind_steps: 0 for none
    """

    @jax.jit
    def run(truth: Array) -> tuple[dict[str, Array], Array]:
        key, observed_key, blind_key = jax.random.split(jax.random.key(config.seed), 3)
        y = operators.observe(
            operators.blur(kernels, "valid"), truth, restoring.unit(config.restoration.noise), observed_key
        )
        methods = restoring.restorations(config.restoration, denoiser, y, kernels)
        shown = [name for name in SHOWN if name in methods]
        found = {
            SHOWN[name]: methods[name](k)
            for name, k in zip(shown, jax.random.split(key, len(shown)), strict=True)
        }
        flat = jnp.full(kernels.shape, 1.0 / kernels[0].size, jnp.float32)
        if denoiser is None or not blind_steps:
            return found, flat
        chain = dmsp_kernel_blind_chain(
            denoiser,
            y,
            methods["degraded"](key),
            flat,
            sigma=restoring.unit(config.restoration.dmsp_sigma),
            num_steps=blind_steps,
        )
        both = chain._replace(finish=cast(Any, lambda state: (state.image.x, state.kernel.x)))
        blind: Any = run_chain(both, blind_key, jnp.arange(truth.shape[0]), truth.shape[1:])
        return {**found, BLIND: blind[0]}, blind[1]

    images, kernel = run(jnp.asarray(truth))
    in_order = [name for name in (*SHOWN.values(), BLIND) if name in images]  # jit sorts them
    return {name: np.asarray(images[name]) for name in in_order}, np.asarray(kernel)


def draw(
    truth: np.ndarray, images: Mapping[str, np.ndarray], kernels: np.ndarray, found: np.ndarray
) -> Figure:
    """Truth, observation and restorations inside the part that is judged; kernels in the corners."""
    rows, columns = (size // 2 for size in kernels.shape[1:])
    inside = lambda x: x[:, rows : x.shape[1] - rows, columns : x.shape[2] - columns]
    shown = {"truth": inside(truth), **{name: inside(x) for name, x in images.items()}}
    figure = Figure(figsize=(1.9 * len(shown), 2.15 * len(truth)), layout="constrained")
    panels = figure.subplots(len(truth), len(shown), squeeze=False)
    for column, (name, x) in enumerate(shown.items()):
        decibels = psnr(x, shown["truth"], 2.0)
        for row, axes in enumerate(panels[:, column]):
            axes.imshow(x[row, :, :, 0], cmap="gray", vmin=-1.0, vmax=1.0)
            axes.set_axis_off()
            axes.set_title(name if name == "truth" else f"{name}\n{decibels[row]:.1f} dB", fontsize=8)
            kernel = {"truth": kernels, BLIND: found}.get(name)
            if kernel is not None:
                corner = axes.inset_axes((0.0, 0.0, 0.33, 0.33))
                corner.imshow(kernel[row], cmap="inferno")
                corner.set_axis_off()
    return figure


def main(argv: Sequence[str]) -> int:
    """Restores and writes the picture; returns the exit status."""
    parser = command.parser("deblurring")
    parser.add_argument("--workdir", type=Path, required=True, help="a run of experiments/restoration.py")
    parser.add_argument("--num", type=int, default=2, help="images, at most 8")
    parser.add_argument("--crop", type=int, default=128, help="their middles; 0 for all of them")
    parser.add_argument("--blind_steps", type=int, default=1000, help="kernel-blind; 0 leaves it out")
    given: argparse.Namespace = parser.parse_args(argv)
    if not 1 <= given.num <= 8 or given.blind_steps < 0:
        parser.error("--num must be 1 to 8 and --blind_steps at least 0")
    try:
        run = read_run(str(given.workdir))
        if run.module is not restoration or run.config.denoiser:
            raise UserError(
                f"{run.workdir} holds a run of {run.experiment}: take one of experiments/restoration.py that "
                "trained its own denoiser."
            )
        mesh = sharding.make_mesh()
        params = restore(restoration.build(run.config, mesh), run.workdir, mesh).sampling_params
        photographs = restoration.load_pictures(run.config.data)
        truth = restoration.cropped_groups(photographs.test, given.crop, given.num)[0]
        kernels = blur_kernels(run.config.restoration.kernel)
        kernels = np.resize(kernels, (len(truth), *kernels.shape[1:]))
        images, found = restored_images(
            run.config, restoration.denoiser(run.config, params), truth, kernels, given.blind_steps
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return command.write(draw(truth, images, kernels, found), given.out, "deblurring")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
