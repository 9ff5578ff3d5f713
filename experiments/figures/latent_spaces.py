"""Three latent spaces of the digits: reconstruction only, KL only, both; and what lies between two digits.

One network with a code of two numbers and a Gaussian likelihood, trained for E[-log p(x|z)] alone with no
noise on the code (an auto-encoder), for KL(q(z|x) || N(0, I)) alone, and for their sum (a VAE, Kingma &
Welling 2014). Printed: the squared error of held-out digits on the scale [0, 1], the KL in nats, the
deviation of the codes, and how far images decoded halfway between two held-out digits of different classes
are from the nearest training digit, as a squared error too.

    python -m experiments.figures.latent_spaces --out=DIR      # 1 minute
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import common, vae
from experiments.figures import command, digits
from jaxgen import pictures, systems
from jaxgen.objectives import vae as objective
from jaxgen.objectives.autoencoder import squared_error
from jaxgen.objectives.score_matching import sum_dims
from jaxgen.samplers.flow import interpolate
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree

NUM_STEPS, BATCH_SIZE, STD = 6000, 128, 0.35
NUM_PATHS, NUM_POINTS = 3, 9


class Setting(NamedTuple):
    """The weights of distortion and rate, and of the noise on the code, scalars or [3]."""

    distortion: Array
    rate: Array
    noise: Array


NAMES = ("reconstruction only", "KL only", "both")
SETTINGS = Setting(jnp.asarray([1.0, 0.0, 1.0]), jnp.asarray([0.0, 1.0, 1.0]), jnp.asarray([0.0, 1.0, 1.0]))


class Found(NamedTuple):
    """Of each setting: codes [3, N, 2] of held-out digits; error, rate, spread, off [3]; the paths' images.

    paths: [3, NUM_POINTS, NUM_PATHS, H, W, C]
    """

    codes: Array
    error: Array
    rate: Array
    spread: Array
    off: Array
    paths: Array


@functools.partial(jax.jit, static_argnames="num_steps")
def compute(train: Array, test: Array, label: Array, *, num_steps: int) -> Found:
    """Trains the three at once and looks at them."""
    config = vae.get_config("digits")
    config.model.latent_size = 2
    likelihood = objective.gaussian_likelihood(train.shape[3], STD)
    model = vae.make_model(config.model, (8, 8), likelihood.num_parameters, None)
    networks = vae.networks_of(model, (2,))

    def loss_of(setting: Setting) -> LossFn:
        def loss(
            params: PyTree, model_state: PyTree, batch: Batch, key: Key
        ) -> tuple[Array, tuple[Metrics, PyTree]]:
            x = batch["image"]
            q = networks.encode(params, x, None)
            z = objective.reparameterise(q, setting.noise * jax.random.normal(key, q.mean.shape))
            distortion = -likelihood.log_prob(networks.decode(params, z, None), x)
            rate = jnp.sum(objective.gaussian_kl(q), axis=1)
            value = Mean.of(setting.distortion * distortion + setting.rate * rate)
            return value.value, ({"loss": value}, model_state)

        return loss

    def one(setting: Setting) -> Found:
        system = systems.gradient_system(
            lambda key, batch: (model.init(key, batch["image"])["params"], {}),
            loss_of(setting),
            common.make_optimizer(config.optim, num_steps=num_steps),
        )
        params = digits.fit(system, train, num_steps=num_steps, batch_size=BATCH_SIZE).params
        decode = lambda z: likelihood.mean(networks.decode(params, z, None))
        q = networks.encode(params, test, None)
        # Held-out digit i and the next one of another class: both ends are real, the middle need not be.
        other = (jnp.arange(len(test)) + 1) % len(test)
        between = 0.5 * (q.mean + q.mean[other])
        nearest = jax.lax.map(
            lambda image: jnp.min(sum_dims(squared_error(image[None], train))), decode(between)
        )
        differ = (label != label[other]).astype(jnp.float32)
        [points] = interpolate([q.mean[:NUM_PATHS]], [q.mean[other][:NUM_PATHS]], NUM_POINTS)
        return Found(
            q.mean,
            jnp.mean(sum_dims(squared_error(decode(q.mean), test))),
            jnp.mean(jnp.sum(objective.gaussian_kl(q), axis=1)),
            jnp.sqrt(jnp.mean(jnp.var(q.mean, axis=0))),
            jnp.sum(differ * nearest) / jnp.sum(differ),
            jax.vmap(decode)(points),
        )

    return jax.vmap(one)(SETTINGS)


def draw(found: Found, label: Array) -> Figure:
    """The three planes, above the paths between digits of the auto-encoder and of the VAE."""
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.5, 1))
    upper, lower = (figure.add_subfigure(grid[row]) for row in range(2))
    for axes, name, codes in zip(upper.subplots(1, 3), NAMES, np.asarray(found.codes), strict=True):
        dots = axes.scatter(codes[:, 0], codes[:, 1], c=np.asarray(label), cmap="tab10", s=5)
        axes.set_title(name, fontsize=10)
        axes.set_aspect("equal", "datalim")
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(*dots.legend_elements(), frameon=False, fontsize=8, loc="outside right upper")
    for axes, name, number in zip(lower.subplots(1, 2), ("auto-encoder", "VAE"), (0, 2), strict=True):
        frames = np.asarray(found.paths[number]).swapaxes(0, 1)
        images = frames.reshape(-1, *frames.shape[2:])
        axes.imshow(pictures.image_grid(images, columns=NUM_POINTS, scale=6), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"from digit to digit, {name}", fontsize=10)
        axes.set_axis_off()
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the numbers and draws the spaces; returns the exit status."""
    parser = command.parser("latent_spaces")
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, help="updates of each network")
    arguments = parser.parse_args(argv)
    (train, _), (test, label) = (digits.load(split) for split in ("train", "test"))
    found = compute(train, test, label, num_steps=arguments.num_steps)
    numbers = zip(
        NAMES, *(map(float, x) for x in (found.error, found.rate, found.spread, found.off)), strict=True
    )
    command.print_table(
        ["trained for", "squared error", "KL", "spread of codes", "halfway to nearest"],
        [list(row) for row in numbers],
    )
    return command.write(draw(found, label), arguments.out, "latent_spaces")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
