"""Countries and their capitals in the plane of their vectors' first two principal components.

After figure 2 of Mikolov et al. 2013 ("Distributed representations of words and phrases and their
compositionality"): the lines from country to capital run about the same way, though nothing in training said
what a capital is. Printed beside the points is the cosine of each such offset with the mean of the others, in
all dimensions; of unrelated words it is about 0.

    python -m experiments.figures.countries_capitals --out=DIR --vectors=FILE      # seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import command, word_table
from jaxgen import pictures
from jaxgen.estimators import linear
from jaxgen.types import UserError

PAIRS = (
    ("China", "Beijing"),
    ("Russia", "Moscow"),
    ("Japan", "Tokyo"),
    ("Turkey", "Ankara"),
    ("Poland", "Warsaw"),
    ("Germany", "Berlin"),
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Greece", "Athens"),
    ("Spain", "Madrid"),
    ("Portugal", "Lisbon"),
)


class Plane(NamedTuple):
    """Points [N, 2] of countries and capitals, the share of variance shown, and the offsets' cosines [N]."""

    countries: np.ndarray
    capitals: np.ndarray
    share: float
    cosines: np.ndarray


def compute(countries: np.ndarray, capitals: np.ndarray) -> Plane:
    """The plane of vectors [N, D] and [N, D]."""
    rows = np.concatenate([countries, capitals])
    pca = linear.fit_pca(rows, 2)
    points = np.asarray(linear.encode(pca, rows))
    share = float(np.sum(np.var(points, axis=0)) / np.sum(np.var(rows, axis=0)))
    offset = capitals - countries
    others = offset.sum(axis=0, keepdims=True) - offset
    norms = np.linalg.norm(offset, axis=1) * np.linalg.norm(others, axis=1)
    cosines = np.sum(offset * others, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
    return Plane(points[: len(countries)], points[len(countries) :], share, cosines)


def crowded(point: tuple[float, float], plane: Plane) -> int:
    """Where the name of a point goes: 1 up and -1 down where a point left or right of it is close, else 0."""
    points = np.concatenate([plane.countries, plane.capitals])
    apart = (points - np.asarray(point)) / np.ptp(points, axis=0)
    close = (np.abs(apart[:, 0]) < 0.12) & (np.abs(apart[:, 1]) < 0.02) & np.any(apart != 0, axis=1)
    return 0 if not close.any() else (1 if apart[close, 0].mean() < 0 else -1)


def draw(plane: Plane) -> Figure:
    """A line from each country to its capital."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for (country, capital), start, end in zip(PAIRS, plane.countries, plane.capitals, strict=True):
        axes.plot(*np.stack([start, end]).T, "--", color="0.75", linewidth=1, zorder=1)
        # Each name stands on the side away from the line.
        side = 1 if start[0] > end[0] else -1
        for word, (x, y), colour, out in (
            (country, start, pictures.PALETTE[0], side),
            (capital, end, pictures.PALETTE[1], -side),
        ):
            axes.scatter(x, y, color=colour, s=18, zorder=2)
            align = "left" if out > 0 else "right"
            away = (6 * out, 8 * crowded((x, y), plane))
            axes.annotate(word, (x, y), away, textcoords="offset points", fontsize=9, ha=align, va="center")
    axes.set_title(
        f"the two leading principal components ({plane.share:.0%} of the variance);\n"
        f"offsets have a cosine of {plane.cosines.mean():.2f} with the mean of the others",
        fontsize=10,
    )
    axes.margins(0.16, 0.06)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the points and cosines and draws them; returns the exit status."""
    arguments = word_table.parser("countries_capitals").parse_args(argv)
    try:
        table = word_table.load(arguments.vectors)
        sides = [word_table.unit_rows(table, side) for side in zip(*PAIRS, strict=True)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plane = compute(*sides)
    rows = [
        [country, *map(float, start), capital, *map(float, end), float(cosine)]
        for (country, capital), start, end, cosine in zip(
            PAIRS, plane.countries, plane.capitals, plane.cosines, strict=True
        )
    ]
    command.print_table(["country", "x", "y", "capital", "x", "y", "cosine"], rows)
    return command.write(draw(plane), arguments.out, "countries_capitals")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
