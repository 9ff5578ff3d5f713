"""Denoisers that generate, in one table: Fréchet distance, and bits/dim by the bound and by the ODE.

    python -m experiments.figures.denoiser_table --workdir=runs/ddpm_digits --workdir=runs/ncsn_digits \\
        --out=DIR

Takes runs of experiments/ddpm.py, ncsn.py and score_sde.py. What their result.json holds is read from it; the
likelihood by the probability-flow ODE is computed here, in the same way for every run: the same held-out
images with the same noise between their levels, and the same kind of prior at the run's greatest noise, a
Gaussian with the mean and covariance of the training images (an NCSN begins where they can still be told
apart). Images of 8x8 take a minute a run on 2 CPU cores; writes DIR/denoiser_table.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from experiments.common.trained_runs import TrainedRun, read_run
from experiments.figures import command
from experiments.figures.trained import restore
from jaxgen import data, mixtures, sharding
from jaxgen.denoising import Denoiser
from jaxgen.samplers.ode import bits_per_dim, flow_latent, rademacher_probes
from jaxgen.types import Array, UserError

HEAD = (
    "run",
    "Fréchet distance",
    "over its floor",
    "recognised",
    "bits/dim, bound",
    "bits/dim, ODE",
    "images",
)
# Beyond this noise, for images in [-1, 1], the prior is the Gaussian's whatever the images are.
GREATEST_SIGMA = 50.0


class Settings(NamedTuple):
    """num_images: held-out images; num_steps: of the ODE; num_probes: of the estimate of its divergence."""

    num_images: int
    num_steps: int
    num_probes: int
    batch_size: int


def gaussian_of(images: np.ndarray) -> mixtures.GaussianMixture:
    """The Gaussian with the mean and covariance of images float [N, ...]."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return mixtures.gaussian_mixture([1.0], flat.mean(axis=0)[None], np.cov(flat.T, bias=True)[None])


def ode_bits_per_dim(
    denoiser: Denoiser,
    prior: mixtures.GaussianMixture,
    images: np.ndarray,
    num_levels: int,
    noise: tuple[float, float],
    settings: Settings,
    seed: int = 0,
) -> np.ndarray:
    """Bits/dim of each of the images [N, H, W, C] in [-1, 1], float64 [N]."""
    sigma_min, sigma_max = noise[0], min(noise[1], GREATEST_SIGMA)
    width = 2.0 / (num_levels - 1)

    @jax.jit
    def bits(x: Array, numbers: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        draw = lambda key: jax.random.uniform(jax.random.fold_in(key, 0), x.shape[1:]) - 0.5
        x = x + width * jax.vmap(draw)(keys)
        probe_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        latent, log_volume = flow_latent(
            denoiser,
            x,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            num_steps=settings.num_steps,
            probes=rademacher_probes(probe_keys, settings.num_probes, x.shape[1:]),
        )
        at_prior = mixtures.log_density(prior, latent, jnp.full(x.shape[0], sigma_max))
        return bits_per_dim(at_prior + log_volume, x[0].size, num_levels)

    found = []
    for start in range(0, len(images), settings.batch_size):
        # The last batch is filled up, so that one program serves all.
        numbers = np.arange(start, start + settings.batch_size)
        rows = images[np.minimum(numbers, len(images) - 1)]
        found.append(np.asarray(bits(jnp.asarray(rows), jnp.asarray(numbers)), np.float64))
    return np.concatenate(found)[: len(images)]


def saved_scores(workdir: Path) -> dict[str, Any]:
    """What result.json says, {} where the run was not evaluated."""
    path = workdir / "result.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate the run again.") from error


def row(run: TrainedRun, settings: Settings) -> tuple[object, ...]:
    """A run's line of the table, as HEAD has it. UserError for other experiments."""
    if not hasattr(run.module, "noise_range"):
        raise UserError(
            f"{run.workdir} holds a run of {run.experiment}: take one of experiments/ddpm.py, ncsn.py or "
            "score_sde.py."
        )
    with run.config.unlocked():
        run.config.evaluation.classifier = ""
    mesh = sharding.make_mesh()
    experiment = run.module.build(run.config, mesh)
    params = restore(experiment, run.workdir, mesh).sampling_params
    train, test = common.load_images(run.config.data.source)
    images = data.to_unit_range(test.fields["image"][: settings.num_images], test.num_levels)
    bits = ode_bits_per_dim(
        run.module.denoiser(run.config, params),
        gaussian_of(data.to_unit_range(train.fields["image"], train.num_levels)),
        images,
        test.num_levels,
        run.module.noise_range(run.config),
        settings,
    )
    scores = saved_scores(run.workdir)
    value = lambda name: scores[name]["value"] if name in scores else "-"
    # An SDE's bits/dim are by the ODE too, but from another prior; only a DDPM's are the variational bound.
    bound = value("bits_per_dim") if "distortion_bits_per_dim" in scores else "-"
    return (
        f"{Path(run.experiment).stem}:{run.preset}",
        value("frechet_distance"),
        value("frechet_ratio_to_floor"),
        value("recognised_above_0.9"),
        bound,
        float(bits.mean()),
        len(images),
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; floats with 4 significant digits."""
    text = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *text]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Computes and writes the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures.denoiser_table")
    parser.add_argument("--workdir", type=Path, action="append", required=True, help="a run; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write denoiser_table.md to")
    parser.add_argument("--num", type=int, default=360, help="held-out images")
    parser.add_argument("--steps", type=int, default=50, help="of the ODE, four calls of the network each")
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=180)
    given = parser.parse_args(argv)
    if min(given.num, given.steps, given.probes, given.batch_size) < 1:
        parser.error("--num, --steps, --probes and --batch_size must be at least 1")
    settings = Settings(given.num, given.steps, given.probes, given.batch_size)
    path = given.out.expanduser() / "denoiser_table.md"
    try:
        rows = [row(read_run(str(workdir)), settings) for workdir in given.workdir]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(HEAD, rows), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    command.print_table(HEAD, rows)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
