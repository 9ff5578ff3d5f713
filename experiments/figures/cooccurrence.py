"""The lecture's window co-occurrence matrix and the plane of its singular value decomposition.

Corpus: "I like deep learning. / I like NLP. / I enjoy flying.", window 1, symmetric. Row i of U_2 S_2 places
word i.

    python -m experiments.figures.cooccurrence --out=DIR      # a second; writes DIR/cooccurrence.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxgen.words.counts import cooccurrence
from jaxgen.words.factorize import SVD, dense_operator, truncated_svd, word_vectors
from jaxgen.words.sentences import pack

CORPUS = ("I like deep learning .", "I like NLP .", "I enjoy flying .")
# In the order of the lecture's table.
WORDS = ("I", "like", "enjoy", "deep", "learning", "NLP", "flying", ".")


def lecture_table() -> np.ndarray:
    """The printed table, float64 [8, 8]."""
    tokens, starts = pack([[WORDS.index(word) for word in sentence.split()] for sentence in CORPUS])
    return cooccurrence(tokens, starts, len(WORDS), window=1).toarray()


def decompose(table: np.ndarray) -> SVD:
    """All singular values and vectors of the table."""
    return truncated_svd(dense_operator(jnp.asarray(table)), len(table), jax.random.key(0), num_oversamples=0)


def draw(table: np.ndarray, svd: SVD) -> Figure:
    """The table as a heat map, and the words in the plane of its two leading singular vectors."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    heat, plane = figure.subplots(1, 2, width_ratios=(1.35, 1))
    heat.imshow(table, cmap="Blues", vmin=0, vmax=table.max() * 1.25)
    heat.set_xticks(range(len(WORDS)), WORDS, rotation=45, ha="left", rotation_mode="anchor")
    heat.set_yticks(range(len(WORDS)), WORDS)
    heat.xaxis.tick_top()
    heat.tick_params(length=0)
    for (row, column), count in np.ndenumerate(table):
        color = "white" if count > 1 else "black" if count else "0.7"
        heat.text(column, row, f"{count:.0f}", ha="center", va="center", color=color)
    heat.set_xlabel("how often the word of the column stands\nbeside that of the row")

    points, s = plane_of(svd), np.asarray(svd.s)
    plane.axhline(0, color="0.88", linewidth=1, zorder=0)
    plane.axvline(0, color="0.88", linewidth=1, zorder=0)
    plane.scatter(points[:, 0], points[:, 1], color="#2f6fb5", zorder=2)
    for index, (word, point) in enumerate(zip(WORDS, points, strict=True)):
        # Each label keeps away from the nearest other point.
        distances = np.linalg.norm(points - point, axis=1)
        distances[index] = np.inf
        above = point[1] >= points[np.argmin(distances), 1]
        shown = f"“{word}”" if word == "." else word
        plane.annotate(
            shown, point, (6, 3 if above else -3), textcoords="offset points", va="bottom" if above else "top"
        )
    kept = np.sum(s[:2] ** 2) / np.sum(s**2)
    share = f"{kept:.0%} of the squared entries"
    plane.set_title(f"The words at the rows of $U_2\\Sigma_2$\n({share})", fontsize=10)
    plane.set_xlabel(f"first singular direction, $\\sigma_1$ = {s[0]:.3f}")
    plane.set_ylabel(f"second singular direction, $\\sigma_2$ = {s[1]:.3f}")
    # Room for the labels, and one scale for both axes.
    plane.set_xlim(-0.3, points[:, 0].max() + 0.7)
    plane.set_ylim(points[:, 1].min() - 0.35, points[:, 1].max() + 0.35)
    plane.set_aspect("equal")
    plane.spines[["top", "right"]].set_visible(False)
    return figure


def plane_of(svd: SVD) -> np.ndarray:
    """The rows of U_2 S_2, float32 [8, 2]."""
    return np.asarray(word_vectors(svd, power=1.0))[:, :2]


def main(argv: Sequence[str]) -> int:
    """Prints the table and its decomposition and writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures.cooccurrence")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write cooccurrence.png to")
    out = parser.parse_args(argv).out.expanduser()
    table = lecture_table()
    svd = decompose(table)
    width = max(map(len, WORDS)) + 1
    print("".join(f"{word:>{width}}" for word in ("counts", *WORDS)))
    for word, row in zip(WORDS, table, strict=True):
        print(f"{word:>{width}}" + "".join(f"{count:>{width}.0f}" for count in row))
    print("singular values:", " ".join(f"{value:.4f}" for value in np.asarray(svd.s)))
    print("in the plane of the first two:")
    for word, (x, y) in zip(WORDS, plane_of(svd), strict=True):
        print(f"{word:>{width}} {x:8.4f} {y:8.4f}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(table, svd).savefig(out / "cooccurrence.png", dpi=150)
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {out / 'cooccurrence.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
