"""What a matrix does to the unit circle, step by step: V^T turns it, Sigma stretches it, U turns it again.

python -m experiments.figures.unit_circle --out=DIR      # a second
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen import pictures

MATRIX = np.asarray([[1.0, 1.0], [0.0, 1.0]])


def steps(matrix: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The products so far, float64 [2, 2] each: I, V^T, Sigma V^T, and U Sigma V^T, which is the matrix."""
    u, s, vt = np.linalg.svd(matrix)
    return [
        ("the unit circle", np.eye(2)),
        ("$V^T$", vt),
        ("$\\Sigma V^T$", np.diag(s) @ vt),
        ("$U \\Sigma V^T = A$", u @ np.diag(s) @ vt),
    ]


def draw(matrix: np.ndarray) -> Figure:
    """The circle and the right singular vectors v_1, v_2 after each step."""
    angle = np.linspace(0, 2 * np.pi, 201)
    _, s, vt = np.linalg.svd(matrix)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    limit = 1.15 * max(1.0, float(s[0]))
    for axes, (title, product) in zip(figure.subplots(1, 4), steps(matrix), strict=True):
        axes.plot(*(product @ circle), color="0.4")
        for column, colour in zip((product @ vt.T).T, pictures.PALETTE, strict=False):
            axes.annotate("", column, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
        axes.axhline(0, color="0.9", zorder=0)
        axes.axvline(0, color="0.9", zorder=0)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the decomposition and draws it; returns the exit status."""
    arguments = command.parser("unit_circle").parse_args(argv)
    for name, value in zip(("U", "singular values", "V^T"), np.linalg.svd(MATRIX), strict=True):
        print(f"{name}: {np.array2string(value, precision=4).replace(chr(10), '')}")
    return command.write(draw(MATRIX), arguments.out, "unit_circle")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
