"""The lecture's masked self-attention: A' = softmax(A + M) for "Your journey starts with one step".

The lecture prints softmax(A), to two digits; its logarithm is A up to a number a row, which softmax forgets.
M is 0 on and below the diagonal and minus infinity above it.

    python -m experiments.figures.masked_attention --out=DIR      # a second
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen.models.multihead import attention_mask

WORDS = ("Your", "journey", "starts", "with", "one", "step")
UNMASKED = np.asarray(
    [
        [0.19, 0.16, 0.16, 0.15, 0.17, 0.15],
        [0.20, 0.16, 0.16, 0.14, 0.16, 0.14],
        [0.20, 0.16, 0.16, 0.14, 0.16, 0.14],
        [0.18, 0.16, 0.16, 0.15, 0.16, 0.15],
        [0.18, 0.16, 0.16, 0.15, 0.16, 0.15],
        [0.19, 0.16, 0.16, 0.15, 0.16, 0.15],
    ]
)
PRINTED = np.asarray(
    [
        [1.00, 0.00, 0.00, 0.00, 0.00, 0.00],
        [0.55, 0.44, 0.00, 0.00, 0.00, 0.00],
        [0.38, 0.30, 0.31, 0.00, 0.00, 0.00],
        [0.27, 0.24, 0.24, 0.23, 0.00, 0.00],
        [0.21, 0.19, 0.19, 0.18, 0.19, 0.00],
        [0.19, 0.16, 0.16, 0.15, 0.16, 0.15],
    ]
)


def masked() -> np.ndarray:
    """softmax(A + M), float32 [6, 6]."""
    mask = attention_mask(len(WORDS), len(WORDS), causal=True, key_mask=None)
    return np.asarray(jax.nn.softmax(jnp.log(jnp.asarray(UNMASKED)) + mask[0], axis=-1))  # type: ignore[index]


def draw(table: np.ndarray) -> Figure:
    """Without and with the mask, side by side."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), (UNMASKED, table), ("softmax(A)", "softmax(A + M)"), strict=True
    ):
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(6), WORDS, rotation=40, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(6), WORDS)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xlabel(title)
        for (row, column), value in np.ndenumerate(values):
            if value:
                colour = "white" if value > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the table beside the lecture's and draws it; returns the exit status."""
    arguments = command.parser("masked_attention").parse_args(argv)
    table = masked()
    rows = [[word, *map(float, row)] for word, row in zip(WORDS, table, strict=True)]
    command.print_table(["", *WORDS], rows)
    print(f"largest difference from the printed table: {np.abs(table - PRINTED).max():.3f}")
    return command.write(draw(table), arguments.out, "masked_attention")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
