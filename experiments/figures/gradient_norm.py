"""Vanishing and exploding gradients: their norm against depth, with and without residuals and clipping.

Layers x_l = tanh(g W_l x_{l-1}), W_l with entries N(0, 1/width), against the residual ones
x_l = x_{l-1} + tanh(g W_l x_{l-1}) / depth; "linear" leaves tanh out. Shown is the norm of the gradient of
|x_depth|^2 / 2 at the input, its geometric mean over draws of the weights: the longer the path, the more
layers' Jacobians are multiplied.

    python -m experiments.figures.gradient_norm --out=DIR      # 20 seconds
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen import pictures
from jaxgen.types import Array, Key

WIDTH, NUM_DRAWS, CLIP = 64, 8, 1.0
DEPTHS = (1, 2, 5, 10, 20, 50, 100)
# Name: (gain, residual, activation is tanh, clipped).
SETTINGS: dict[str, tuple[float, bool, bool, bool]] = {
    "plain, gain 0.7": (0.7, False, True, False),
    "plain linear, gain 1.3": (1.3, False, False, False),
    "the same, clipped at 1": (1.3, False, False, True),
    "residual, gain 0.7": (0.7, True, True, False),
    "residual linear, gain 1.3": (1.3, True, False, False),
}


def forward(x: Array, weights: Array, *, gain: float, residual: bool, tanh: bool) -> Array:
    """x_L `[D]` of x_0 `[D]` through weights `[L, D, D]`."""

    def layer(x: Array, w: Array) -> tuple[Array, None]:
        branch = gain * (w @ x)
        branch = jnp.tanh(branch) if tanh else branch
        return (x + branch / weights.shape[0] if residual else branch), None

    return jax.lax.scan(layer, x, weights)[0]


def length(x: Array) -> Array:
    """|x|, also where the squares are beyond float32's range."""
    largest = jnp.maximum(jnp.max(jnp.abs(x)), 1e-37)
    return largest * jnp.linalg.norm(x / largest)


def clip_by_norm(gradient: Array, limit: float) -> Array:
    """The gradient, shortened to the length `limit` where it is longer (Pascanu et al. 2013)."""
    return gradient * jnp.minimum(1.0, limit / length(gradient))


@functools.partial(jax.jit, static_argnames=("depth", "gain", "residual", "tanh", "clipped"))
def gradient_norm(key: Key, *, depth: int, gain: float, residual: bool, tanh: bool, clipped: bool) -> Array:
    """The geometric mean over draws of |d(|x_L|^2 / 2) / d x_0| for x_0 of length 1."""

    def one(key: Key) -> Array:
        weight_key, x_key = jax.random.split(key)
        weights = jax.random.normal(weight_key, (depth, WIDTH, WIDTH)) * WIDTH**-0.5
        x = jax.random.normal(x_key, (WIDTH,))
        x = x / jnp.linalg.norm(x)
        loss = lambda x: 0.5 * jnp.sum(forward(x, weights, gain=gain, residual=residual, tanh=tanh) ** 2)
        gradient = jax.grad(loss)(x)
        gradient = clip_by_norm(gradient, CLIP) if clipped else gradient
        return jnp.log(length(gradient))

    return jnp.exp(jnp.mean(jax.vmap(one)(jax.random.split(key, NUM_DRAWS))))


def compute(depths: Sequence[int]) -> dict[str, dict[int, float]]:
    """{setting: {depth: norm}}."""
    found = {}
    for name, (gain, residual, tanh, clipped) in SETTINGS.items():
        settings = {"gain": gain, "residual": residual, "tanh": tanh, "clipped": clipped}
        found[name] = {
            depth: float(gradient_norm(jax.random.key(0), depth=depth, **settings)) for depth in depths
        }
    return found


def draw(found: Mapping[str, Mapping[int, float]]) -> Figure:
    """The norms against depth, both on log scales."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, curve) in zip(pictures.PALETTE, found.items(), strict=False):
        style = "o--" if "clipped" in name else "o-"
        axes.plot(list(curve), list(curve.values()), style, color=colour, label=name, markersize=3.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.minorticks_off()
    axes.set_xlabel("layers between the loss and the input")
    axes.set_ylabel("norm of the gradient at the input")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the norms and draws them; returns the exit status."""
    arguments = command.parser("gradient_norm").parse_args(argv)
    found = compute(DEPTHS)
    command.print_table(["depth", *found], [[d, *(curve[d] for curve in found.values())] for d in DEPTHS])
    return command.write(draw(found), arguments.out, "gradient_norm")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
