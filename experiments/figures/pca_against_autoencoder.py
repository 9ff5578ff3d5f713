"""Reconstruction error against the size of the code: PCA, the best linear code, and a deep auto-encoder.

Both see the 1,437 training digits (8x8, on the scale [0, 1]) and are judged on the 360 others by the squared
error summed over the 64 pixels (Hinton & Salakhutdinov 2006 compare so). The auto-encoder is that of
experiments/autoencoder.py:digits with fewer updates, one for each size of the code.

    python -m experiments.figures.pca_against_autoencoder --out=DIR      # 1 minute
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments import autoencoder, common
from experiments.common import rows_of
from experiments.figures import command, digits
from jaxgen import pictures, systems
from jaxgen.estimators import linear
from jaxgen.models.autoencoder import image_of
from jaxgen.objectives import autoencoder as objective
from jaxgen.objectives.score_matching import sum_dims
from jaxgen.types import Array

SIZES = (1, 2, 4, 8, 16, 32)
SHOWN = 2  # the size of the code of the digits that are drawn
NUM_STEPS = 3000


def pca_error(train: Array, test: Array, size: int) -> tuple[float, Array]:
    """The mean squared error of test images from `size` components, and their reconstructions."""
    pca = linear.fit_pca(rows_of(train), size)
    again = linear.decode(pca, linear.encode(pca, rows_of(test)))
    error = jnp.mean(linear.reconstruction_error(pca, rows_of(test)))
    return float(error), 2.0 * again.reshape(test.shape) - 1.0


def autoencoder_error(train: Array, test: Array, size: int, num_steps: int) -> tuple[float, Array]:
    """The same of an auto-encoder with a code of `size`, trained for `num_steps`."""
    config = autoencoder.get_config("digits")
    config.model.code_size, config.train.num_steps = size, num_steps
    model = autoencoder.make_model(config.model, train.shape[1:])
    loss = objective.make_loss(
        lambda params, x: cast(Array, model.apply({"params": params}, x, method="encode")),
        lambda params, code: cast(Array, model.apply({"params": params}, code, method="decode")),
        lambda outputs: image_of(outputs, config.model.output),
    )

    @jax.jit
    def compute(train: Array, test: Array) -> tuple[Array, Array]:
        system = systems.gradient_system(
            lambda key, batch: (model.init(key, batch["image"])["params"], {}),
            loss,
            common.make_optimizer(config.optim, num_steps=num_steps),
        )
        state = digits.fit(system, train, num_steps=num_steps, batch_size=config.data.batch_size)
        again = cast(Array, model.apply({"params": state.params}, test))
        return jnp.mean(sum_dims(objective.squared_error(again, test))), again

    error, again = compute(train, test)
    return float(error), again


def compute(sizes: Sequence[int], num_steps: int) -> dict[str, dict[int, tuple[float, Array]]]:
    """{method: {size of the code: (error, reconstructions of the test images)}}."""
    (train, _), (test, _) = (digits.load(split) for split in ("train", "test"))
    return {
        "PCA": {size: pca_error(train, test, size) for size in sizes},
        "auto-encoder": {size: autoencoder_error(train, test, size, num_steps) for size in sizes},
    }


def draw(curves: Mapping[str, Mapping[int, float]], rows: Mapping[str, Array]) -> Figure:
    """The errors against the size of the code, beside rows of images."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes, shown = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for colour, (name, curve) in zip(pictures.PALETTE, curves.items(), strict=False):
        axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=name, markersize=3.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(curve), [str(size) for size in curve])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("numbers in the code")
    axes.set_ylabel("squared error per image")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    images = jnp.concatenate(list(rows.values()))
    columns = len(images) // len(rows)
    grid = pictures.image_grid(images, columns=columns, scale=6)
    shown.imshow(grid, cmap="gray", vmin=0, vmax=255)
    height = grid.shape[0] / len(rows)
    shown.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(rows))
    shown.set_xticks([])
    shown.spines[:].set_visible(False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the errors and draws them; returns the exit status."""
    parser = command.parser("pca_against_autoencoder")
    parser.add_argument("--sizes", type=command.whole_numbers, default=SIZES, help="sizes of the code")
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, help="updates of each auto-encoder")
    arguments = parser.parse_args(argv)
    found = compute(arguments.sizes, arguments.num_steps)
    curves = {name: {size: error for size, (error, _) in of.items()} for name, of in found.items()}
    command.print_table(
        ["code", *curves], [[size, *(curve[size] for curve in curves.values())] for size in arguments.sizes]
    )
    size = SHOWN if SHOWN in arguments.sizes else arguments.sizes[0]
    test, _ = digits.load("test")
    rows = {"digits": test[:10], **{f"{name}, {size}": of[size][1][:10] for name, of in found.items()}}
    return command.write(draw(curves, rows), arguments.out, "pca_against_autoencoder")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
