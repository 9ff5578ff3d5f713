"""king - man + woman: the parallelogram of an analogy, and the words near its fourth corner.

The plane is that of the three given words, so the parallelogram is drawn as it is; other words are drawn
where they fall on it. They are the nearest to the fourth corner by cosine, the given ones left out (3CosAdd,
Mikolov, Yih & Zweig 2013); printed is also their distance to the plane, which a drawing does not show.

    python -m experiments.figures.analogy --out=DIR --vectors=FILE [--words=man,king,woman]      # seconds

Vectors of a small text know rare words badly: by experiments/word2vec.py:wiki, queen is the first of the
10,000 commonest words (--restrict=10000), and the fifth of 30,000.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.common.word_vectors import ANALOGY_WORDS
from experiments.figures import command, word_table
from jaxgen import pictures
from jaxgen.metrics.words import Vectors, nearest_neighbours
from jaxgen.types import UserError

NUM_ANSWERS = 5


class Answer(NamedTuple):
    """A word near the fourth corner: its cosine with it, its `point` [2] and its `height` above the plane."""

    word: str
    cosine: float
    point: np.ndarray
    height: float


class Analogy(NamedTuple):
    """`corners` [4, 2] of a, b, c and b - a + c in the plane of a, b and c; the answers, the best first."""

    words: tuple[str, str, str]
    corners: np.ndarray
    answers: list[Answer]


def compute(table: Vectors, words: tuple[str, str, str]) -> Analogy:
    """The analogy "words[0] is to words[1] as words[2] is to ..." of the unit vectors.

    Raises:
        UserError: a word has no vector, or the three lie on a line.
    """
    a, b, c = word_table.unit_rows(table, words)
    across, up = b - a, c - a
    across = across / max(float(np.linalg.norm(across)), 1e-12)
    up = up - (up @ across) * across
    if np.linalg.norm(up) < 1e-6 or np.linalg.norm(across) < 0.5:
        raise UserError(f"{', '.join(words)} lie on a line: three different words make an analogy.")
    basis = np.stack([across, up / np.linalg.norm(up)], axis=1)
    target = b - a + c
    answers = []
    for word, cosine in nearest_neighbours(table, target, num=NUM_ANSWERS, without=words):
        away = table.unit[table.find(word)] - a
        point = away @ basis
        answers.append(Answer(word, cosine, point, float(np.linalg.norm(away - basis @ point))))
    corners = np.stack([corner - a for corner in (a, b, c, target)]) @ basis
    return Analogy(words, corners, answers)


def draw(analogy: Analogy) -> Figure:
    """The parallelogram and the answers."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(2.6, 1))
    a, b, c, target = analogy.corners
    for start, end, style in ((a, b, "-"), (c, target, "-"), (a, c, ":"), (b, target, ":")):
        axes.plot(*np.stack([start, end]).T, color="0.8", linestyle=style, linewidth=1)
    for start, end in ((a, b), (c, target)):
        arrow = {"arrowstyle": "-|>", "color": pictures.PALETTE[0], "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", end, start, arrowprops=arrow)
    for word, (x, y) in zip(analogy.words, analogy.corners[:3], strict=True):
        axes.scatter(x, y, color=pictures.PALETTE[0], s=24)
        axes.annotate(word, (x, y), (-6, 5), textcoords="offset points", ha="right")
    first, second, third = analogy.words
    axes.scatter(target[0], target[1], marker="x", color=pictures.PALETTE[0], s=40)
    corner = f"{second} − {first} + {third}"
    axes.annotate(
        corner, (target[0], target[1]), (0, 8), textcoords="offset points", ha="center", style="italic"
    )
    for place, answer in enumerate(analogy.answers):
        colour = pictures.PALETTE[1] if place == 0 else "0.5"
        x, y = answer.point
        axes.scatter(x, y, color=colour, s=24)
        shown = answer.word if place == 0 else str(place + 1)
        place_of = (6, 5) if place == 0 else (4, -9)
        axes.annotate(shown, (x, y), place_of, textcoords="offset points", color=colour, fontsize=9)
        line = f"{place + 1}  {answer.word}  {answer.cosine:.2f}"
        beside.text(0, 0.75 - 0.11 * place, line, color=colour, fontsize=9, transform=beside.transAxes)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.set_title("the plane of the three words, other words as they fall on it", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    beside.text(0, 0.9, "nearest words, cosine", fontsize=9, transform=beside.transAxes)
    beside.set_axis_off()
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the answers and draws them; returns the exit status."""
    parser = word_table.parser("analogy")
    parser.add_argument("--words", default="man,king,woman", help="a,b,c: a is to b as c is to the answer")
    parser.add_argument("--restrict", type=int, default=ANALOGY_WORDS, help="take the commonest words only")
    arguments = parser.parse_args(argv)
    words = tuple(arguments.words.split(","))
    if len(words) != 3:
        parser.error(f"--words takes three words, such as man,king,woman, not {arguments.words}")
    try:
        analogy = compute(word_table.load(arguments.vectors, restrict=arguments.restrict), words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        [answer.word, answer.cosine, *map(float, answer.point), answer.height] for answer in analogy.answers
    ]
    command.print_table(["answer", "cosine", "x", "y", "above the plane"], rows)
    return command.write(draw(analogy), arguments.out, "analogy")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
