"""Expectation-maximisation of a Gaussian mixture in the plane: its ellipses and its log-likelihood by step.

600 points of three clusters; the start is three round Gaussians side by side in one place. EM never lowers
the log-likelihood.

    python -m experiments.figures.em --out=DIR      # 5 seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from experiments.figures import command
from jaxgen import pictures
from jaxgen.estimators import families, gmm
from jaxgen.estimators.mixture import Mixture, predict_log_proba, sample
from jaxgen.types import Array

FAMILY = families.GAUSSIAN_FULL
NUM_POINTS = 600
SHOWN = (0, 1, 3, 6, 12, 40)
# The data's own mixture: weights, means, axes' angles and variances along them.
_WEIGHT = (0.5, 0.3, 0.2)
_MEAN = ((-2.0, 0.0), (2.0, 1.5), (1.0, -2.0))
_ANGLE = (0.9, -0.4, 0.2)
_VARIANCE = ((1.2, 0.15), (0.8, 0.2), (0.3, 0.3))


def _turned(angle: np.ndarray) -> Array:
    """Rotations by angles [K], as [K, 2, 2]."""
    cos, sin = np.cos(angle), np.sin(angle)
    return jnp.asarray(np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2), jnp.float32)


def truth() -> Mixture:
    """What the points are drawn from."""
    components = families.RotatedGaussians(
        jnp.asarray(_MEAN), _turned(np.asarray(_ANGLE)), jnp.asarray(_VARIANCE)
    )
    return Mixture(jnp.log(jnp.asarray(_WEIGHT)), components)


def start() -> Mixture:
    """Three round Gaussians, all near (0, -3)."""
    mean = jnp.asarray([[-0.5, -3.0], [0.0, -3.0], [0.5, -3.0]])
    components = families.RotatedGaussians(mean, _turned(np.zeros(3)), jnp.ones((3, 2)))
    return Mixture(jnp.log(jnp.ones(3) / 3), components)


def compute(shown: Sequence[int]) -> tuple[np.ndarray, list[Mixture], np.ndarray]:
    """(the points [N, 2], the mixture after each of `shown` steps, log p(x) a point after each step)."""
    _, x = sample(FAMILY, truth(), jax.random.key(0), NUM_POINTS)
    settings = {"variance_floor": 1e-4, "tolerance": -jnp.inf}
    mixtures, done, current = [], 0, start()
    curve: list[float] = []
    for step in shown:
        fit = gmm.fit_from(FAMILY, current, x, max_steps=step - done, **settings)
        current, done = fit.params, step
        curve = [*curve[: len(curve) - 1], *np.asarray(fit.objective).tolist()]
        mixtures.append(current)
    return np.asarray(x), mixtures, np.asarray(curve)


def _ellipses(axes: Axes, mixture: Mixture) -> None:
    """The curves of two standard deviations, as broad as their weight."""
    parts = jax.tree.map(np.asarray, mixture.components)
    weights = np.exp(np.asarray(mixture.log_weight))
    for k, colour in zip(range(len(weights)), pictures.PALETTE, strict=False):
        direction = parts.axes[k][:, 1]
        angle = np.degrees(np.arctan2(direction[1], direction[0]))
        width, height = 4 * np.sqrt(parts.variance[k][::-1])
        line = 1 + 4 * float(weights[k])
        axes.add_patch(Ellipse(parts.mean[k], width, height, angle=angle, fill=False, color=colour, lw=line))
        axes.plot(*parts.mean[k], "+", color=colour, markersize=9)


def draw(x: np.ndarray, mixtures: Sequence[Mixture], shown: Sequence[int], curve: np.ndarray) -> Figure:
    """A panel for each of the `shown` steps, points coloured by p(component given x); the curve below."""
    figure = Figure(figsize=(9.5, 8.2), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 0.7))
    colours = np.asarray([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in pictures.PALETTE[:3]])
    for index, (step, mixture) in enumerate(zip(shown, mixtures, strict=True)):
        axes = figure.add_subplot(grid[index // 3, index % 3])
        share = np.exp(np.asarray(predict_log_proba(FAMILY, mixture, x)))
        axes.scatter(x[:, 0], x[:, 1], s=5, c=np.clip(share @ colours, 0, 1), alpha=0.6, linewidths=0)
        _ellipses(axes, mixture)
        axes.set(aspect="equal", xlim=(-6, 5), ylim=(-5, 4.5), title=f"step {step}: {curve[step]:.3f} nats")
    axes = figure.add_subplot(grid[2, :])
    axes.plot(curve, color=pictures.PALETTE[0])
    axes.plot(shown, curve[list(shown)], "o", color=pictures.PALETTE[0], markersize=4)
    axes.set(xlabel="EM step", ylabel="log p(x) a point, nats")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the log-likelihoods and the means and draws them; returns the exit status."""
    arguments = command.parser("em").parse_args(argv)
    x, mixtures, curve = compute(SHOWN)
    rows = []
    for step, mixture in zip(SHOWN, mixtures, strict=True):
        means = np.asarray(mixture.components.mean)
        places = " ".join(f"({a:.2f}, {b:.2f})" for a, b in means)
        rows.append([step, float(curve[step]), places])
    command.print_table(["step", "log p(x), nats", "means"], rows)
    print(f"smallest gain of a step: {np.diff(curve).min():.2e} nats")
    return command.write(draw(x, mixtures, SHOWN, curve), arguments.out, "em")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
