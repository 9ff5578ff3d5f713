"""Sinusoidal positions (Vaswani et al. 2017, section 3.5), and how alike two of them are.

python -m experiments.figures.positional_encoding --out=DIR      # a second
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen.models.positions import sinusoidal_positions

LENGTH, DIM = 100, 128


def compute() -> tuple[np.ndarray, np.ndarray]:
    """The code [LENGTH, DIM], and PE(p) . PE(q) / (DIM / 2), which depends on p - q alone."""
    code = np.asarray(sinusoidal_positions(jnp.arange(LENGTH), DIM))
    return code, code @ code.T / (DIM / 2)


def draw(code: np.ndarray, alike: np.ndarray) -> Figure:
    """The code as a picture, and one row of the inner products for three positions."""
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    picture, curves = figure.subplots(1, 2, width_ratios=(1.2, 1))
    shown = picture.imshow(code, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=picture, shrink=0.8)
    picture.set_xlabel("dimension: sines (even), cosines (odd)")
    picture.set_ylabel("position")
    for position in (0, 30, 70):
        curves.plot(alike[position], linewidth=1.3, label=f"with position {position}")
    curves.set_xlabel("position")
    curves.set_ylabel("inner product, 1 with itself")
    curves.spines[["top", "right"]].set_visible(False)
    curves.set_ylim(top=1.08)
    curves.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints some numbers of the picture and draws it; returns the exit status."""
    arguments = command.parser("positional_encoding").parse_args(argv)
    code, alike = compute()
    dimensions = (0, 1, 2, 3, DIM - 2, DIM - 1)
    command.print_table(
        ["position", *(f"dim {d}" for d in dimensions), "with 0"],
        [[p, *(float(code[p, d]) for d in dimensions), float(alike[0, p])] for p in (0, 1, 2, 10, 50, 99)],
    )
    return command.write(draw(code, alike), arguments.out, "positional_encoding")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
