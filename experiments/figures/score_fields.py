"""Three lecture figures in the plane, all from exact scores of Gaussian mixtures.

spiral: the data; the gradient of their density smoothed by sigma; the mean-shift vectors of a denoiser
    trained for that sigma on the spot, (A(x) - x) / sigma^2, with the share of the squared field that they
    miss.
anneal: two modes of weights 0.2 and 0.8, far apart: draws, Langevin dynamics at the last noise level alone,
    and annealed, with the share of each mode.
manifold: score matching (SSM-VR) on points of a circle, without noise, where the loss falls without end, and
    with noise N(0, 0.0001).

    python -m experiments.figures.score_fields --out=DIR      # a minute; writes
    DIR/score_{spiral,anneal,manifold}.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.score_toy import toy_mixture
from jaxgen import denoising, mixtures, pictures, systems
from jaxgen.models.score_mlp import ScoreMLP
from jaxgen.objectives import score_matching
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.langevin import annealed_langevin_chain, langevin_chain
from jaxgen.types import Array, Batch, Key, LossFn, PyTree, TrainState

_INK = "#2f6fb5"


def apply(model: ScoreMLP, params: PyTree, x: Array, sigma: Array) -> Array:
    """The score of the network."""
    return cast(Array, model.apply({"params": params}, x, sigma))


def fit(
    loss: LossFn, model: ScoreMLP, data: Array, num_steps: int, *, decay: bool, batch_size: int = 256
) -> tuple[PyTree, np.ndarray]:
    """Trained parameters, and each step's loss [num_steps]; `decay` lets the learning rate fall to 0."""

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        return model.init(key, batch["image"], jnp.ones(batch_size))["params"], {}

    schedule = optax.cosine_decay_schedule(2e-3, num_steps) if decay else optax.constant_schedule(2e-3)
    system = systems.gradient_system(init, loss, optax.adam(schedule))

    @jax.jit
    def run(key: Key) -> tuple[PyTree, Array]:
        init_key, batch_key = jax.random.split(key)
        state = system.init(init_key, {"image": data[:batch_size]})

        def step(state: TrainState, number: Array) -> tuple[TrainState, Array]:
            rows = jax.random.randint(jax.random.fold_in(batch_key, number), (batch_size,), 0, len(data))
            state, metrics = system.step(state, {"image": data[rows]})
            return state, metrics["loss"].value

        state, losses = jax.lax.scan(step, state, jnp.arange(num_steps))
        return state.params, losses

    params, losses = run(jax.random.key(0))
    return params, np.asarray(losses)


def spiral_fields(sigma: float = 0.3, num_steps: int = 3000) -> dict[str, np.ndarray]:
    """The points, a grid [G, 2], and both fields on it [G, 2]."""
    mixture = toy_mixture("spiral")
    data = mixtures.sample(mixture, jax.random.key(1), 4000)
    model = ScoreMLP((128, 128, 128))
    loss = score_matching.make_noise_conditional_loss(
        lambda params, x, level, _: apply(model, params, x, level), [sigma]
    )
    params, _ = fit(loss, model, data, num_steps, decay=True)
    axis = np.linspace(-4.2, 4.2, 25)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), jnp.float32)
    level = jnp.full(len(grid), sigma)
    trained = denoising.denoiser_from_score(lambda x, s: apply(model, params, x, s))
    shift = denoising.score_from_denoised(grid, trained(grid, level), level)
    exact = mixtures.score(mixture, grid, level)
    density = mixtures.log_density(mixture, grid, level)
    fields = {"data": data, "grid": grid, "exact": exact, "mean_shift": shift, "log_density": density}
    return {name: np.asarray(value) for name, value in fields.items()}


def missed_share(fields: dict[str, np.ndarray]) -> float:
    """The density's mean of ||mean shift - exact||^2 over that of ||exact||^2, on the grid."""
    weight = np.exp(fields["log_density"] - fields["log_density"].max())[:, None]
    error = weight * (fields["mean_shift"] - fields["exact"]) ** 2
    return float(error.sum() / (weight * fields["exact"] ** 2).sum())


def draw_spiral(fields: dict[str, np.ndarray]) -> Figure:
    """Data, exact gradient, mean-shift vectors."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    _scatter(panels[0], fields["data"][:1500], "data")
    for axes, name, title in (
        (panels[1], "exact", "gradient of the smoothed log density"),
        (panels[2], "mean_shift", "mean shift of a denoiser, (A(x) - x) / sigma^2"),
    ):
        axes.quiver(*fields["grid"].T, *fields[name].T, color=_INK, angles="xy", scale=250, width=0.003)
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")
    return figure


def two_modes(num: int = 2000) -> dict[str, np.ndarray]:
    """Draws of the mixture, and of Langevin dynamics alone and annealed, begun anywhere; [num, 2] each."""
    mixture = toy_mixture("two_modes")
    sigmas = denoising.geometric_sigmas(20.0, 0.1, 20)

    def start(keys: Key, shape: tuple[int, ...]) -> Array:
        return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-8.0, maxval=8.0))(keys)

    denoiser = lambda x, sigma: mixtures.denoise(mixture, x, sigma)
    last = lambda x: mixtures.score(mixture, x, jnp.full(x.shape[0], sigmas[-1]))
    chains = {
        "Langevin": langevin_chain(last, num_steps=2000, step_size=0.1, init=start),
        "annealed Langevin": annealed_langevin_chain(
            denoiser, sigmas, steps_per_level=100, step_size=2e-3, init=start
        ),
    }
    indices = jnp.arange(num)
    found = {"data": np.asarray(mixtures.sample(mixture, jax.random.key(2), num))}
    for name, chain in chains.items():
        run = jax.jit(lambda chain=chain: run_chain(chain, jax.random.key(3), indices, (2,)))
        found[name] = np.asarray(run())
    return found


def share_of_the_larger(points: np.ndarray) -> float:
    """Of the mode at (5, 5), whose weight is 0.8."""
    return float((points.sum(axis=1) > 0).mean())


def draw_two_modes(found: dict[str, np.ndarray]) -> Figure:
    """One panel each, with the share of the mode of weight 0.8."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    for axes, (name, points) in zip(
        figure.subplots(1, len(found), sharex=True, sharey=True), found.items(), strict=True
    ):
        _scatter(axes, points, f"{name}: {share_of_the_larger(points):.0%} in the upper mode")
    return figure


def manifold_losses(num_steps: int = 2000) -> dict[str, list[tuple[int, float]]]:
    """The loss of score matching on a circle, without noise and with noise of standard deviation 0.01."""
    angle = np.random.default_rng(4).uniform(0, 2 * np.pi, 4000)
    data = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)
    model = ScoreMLP((64, 64))
    curves = {}
    for name, noise_std in (("no noise", 0.0), ("noise N(0, 0.0001)", 0.01)):
        loss = score_matching.make_score_matching_loss(
            lambda params, x, _: apply(model, params, x, jnp.ones(x.shape[0])),
            trace="sliced_vr",
            noise_std=noise_std,
        )
        # A rate that falls to 0 would make any loss settle.
        _, losses = fit(loss, model, data, num_steps, decay=False)
        curves[name] = [(step, float(value)) for step, value in enumerate(losses)]
    return curves


def _scatter(axes: Axes, points: np.ndarray, title: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.4, color=_INK, linewidths=0)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")


def main(argv: Sequence[str]) -> int:
    """Computes, prints the numbers, and writes the three pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for the pictures")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    fields = spiral_fields()
    print(f"spiral: the mean shift misses {missed_share(fields):.3f} of the squared gradient")
    draw_spiral(fields).savefig(out / "score_spiral.png", dpi=110)
    found = two_modes()
    for name, points in found.items():
        print(f"two modes, {name}: {share_of_the_larger(points):.3f} in the mode of weight 0.8")
    draw_two_modes(found).savefig(out / "score_anneal.png", dpi=110)
    curves = manifold_losses()
    for name, curve in curves.items():
        last = [value for _, value in curve[-200:]]
        print(
            f"circle, {name}: loss {np.mean(last):.4g}, deviation {np.std(last):.4g} over the last 200 steps"
        )
    pictures.save_curves(out / "score_manifold.png", curves, ylabel="SSM-VR loss", log_y=False)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
