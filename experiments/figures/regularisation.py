"""Overfitting and two remedies: a network on 200 digits, with dropout, with augmentation, and with both.

One convolutional network (models/convnet.py) is trained four times on the same 200 images of the bundled 8x8
digits. Augmentation shifts each image by a pixel or not at all, down and right. Shown are the cross-entropies
of the training images (as they are, without dropout) and of the held-out ones, against updates.

    python -m experiments.figures.regularisation --out=DIR      # a minute on 2 CPU cores
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import common
from experiments.figures import command
from jaxgen import data, pictures, systems
from jaxgen.models.convnet import ConvNet
from jaxgen.objectives import classification
from jaxgen.types import Array, Batch, Key, PyTree, TrainState

# Name: (dropout rate, augmented).
SETTINGS: dict[str, tuple[float, bool]] = {
    "neither": (0.0, False),
    "dropout": (0.5, False),
    "augmentation": (0.0, True),
    "both": (0.5, True),
}
NUM_IMAGES, BATCH_SIZE = 200, 50


class Curve(NamedTuple):
    """After how many updates [P], and the cross-entropies in nats and the errors as shares then, [P] each."""

    step: np.ndarray
    train_loss: np.ndarray
    test_loss: np.ndarray
    train_error: np.ndarray
    test_error: np.ndarray


def shift(image: Array, key: Key) -> Array:
    """Images [B, H, W, C] in [-1, 1], each moved by -1, 0 or 1 pixels down and right, black coming in."""
    height, width = image.shape[1:3]
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    start = jax.random.randint(key, (image.shape[0], 2), 0, 3)

    def one(image: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, image.shape[2]))

    return jax.vmap(one)(padded, start)


def load() -> tuple[Batch, Batch]:
    """The training and the held-out images with their labels."""
    train, test = common.load_images("digits")
    rows = [slice(NUM_IMAGES), slice(None)]
    first, second = (
        {
            "image": jnp.asarray(data.to_unit_range(source.fields["image"][part], source.num_levels)),
            "label": jnp.asarray(source.fields["label"][part]),
        }
        for source, part in zip((train, test), rows, strict=True)
    )
    return first, second


def train(
    few: Batch,
    held_out: Batch,
    *,
    dropout: float,
    augmented: bool,
    num_steps: int,
    num_points: int,
    width: int,
) -> Curve:
    """One network's curves, measured at `num_points` evenly spaced updates."""
    model = ConvNet(widths=(width, 2 * width), hidden=4 * width, dropout=dropout)

    def apply(params: PyTree, model_state: PyTree, image: Array, key: Key | None) -> tuple[Array, PyTree]:
        if key is None:
            return cast(Array, model.apply({"params": params}, image, train=False)), model_state
        shift_key, drop_key = jax.random.split(key)
        image = shift(image, shift_key) if augmented else image
        logits = model.apply({"params": params}, image, train=True, rngs={"dropout": drop_key})
        return cast(Array, logits), model_state

    loss = classification.make_loss(apply)
    system = systems.gradient_system(
        lambda key, batch: (model.init(key, batch["image"], train=False)["params"], {}),
        loss,
        optax.adam(1e-3),
    )

    def step(state: TrainState, number: Array) -> tuple[TrainState, None]:
        key = jax.random.fold_in(jax.random.key(1), number)
        rows = jax.random.permutation(key, NUM_IMAGES)[:BATCH_SIZE]
        return system.step(state, {name: field[rows] for name, field in few.items()})[0], None

    def stretch(state: TrainState, numbers: Array) -> tuple[TrainState, Array]:
        state, _ = jax.lax.scan(step, state, numbers)
        measured = []
        for batch in (few, held_out):
            _, (metrics, _) = loss(state.params, {}, batch, None)
            measured += [metrics["loss"].value, 1.0 - metrics["accuracy"].value]
        return state, jnp.stack(measured)

    @jax.jit
    def run(key: Key) -> Array:
        numbers = jnp.arange(num_steps // num_points * num_points).reshape(num_points, -1)
        return jax.lax.scan(stretch, system.init(key, few), numbers)[1]

    train_loss, train_error, test_loss, test_error = np.asarray(run(jax.random.key(0))).T
    steps = num_steps // num_points * np.arange(1, num_points + 1)
    return Curve(steps, train_loss, test_loss, train_error, test_error)


def compute(*, num_steps: int, num_points: int, width: int) -> dict[str, Curve]:
    """{setting: its curves}."""
    few, held_out = load()
    size = {"num_steps": num_steps, "num_points": num_points, "width": width}
    return {
        name: train(few, held_out, dropout=dropout, augmented=augmented, **size)
        for name, (dropout, augmented) in SETTINGS.items()
    }


def draw(found: Mapping[str, Curve]) -> Figure:
    """Held-out curves solid, training curves dashed."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "error"), strict=True):
        for (name, curve), colour in zip(found.items(), pictures.PALETTE, strict=False):
            scale = 100 if quantity == "error" else 1
            for part, style in (("test", "-"), ("train", "--")):
                values = scale * getattr(curve, f"{part}_{quantity}")
                label = name if part == "test" else None
                axes.plot(curve.step, values, style, color=colour, label=label, linewidth=1.4)
        axes.set(xlabel="updates", ylabel="cross-entropy, nats" if quantity == "loss" else "error, %")
        axes.set_yscale("log" if quantity == "loss" else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title("held out (solid), training (dashed)", fontsize=9)
        axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Trains, prints the numbers and draws the curves; returns the exit status."""
    parser = command.parser("regularisation")
    parser.add_argument("--num_steps", type=int, default=1000, help="updates of each network; at least 20")
    arguments = parser.parse_args(argv)
    if arguments.num_steps < 20:
        parser.error("--num_steps must be at least 20")
    found = compute(num_steps=arguments.num_steps, num_points=20, width=16)
    print(f"After {found['neither'].step[-1]} updates on {NUM_IMAGES} digits:")
    command.print_table(
        ["", "training nats", "held-out nats", "training error %", "held-out error %", "least held-out nats"],
        [
            [
                name,
                float(curve.train_loss[-1]),
                float(curve.test_loss[-1]),
                float(100 * curve.train_error[-1]),
                float(100 * curve.test_error[-1]),
                float(curve.test_loss.min()),
            ]
            for name, curve in found.items()
        ],
    )
    return command.write(draw(found), arguments.out, "regularisation")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
