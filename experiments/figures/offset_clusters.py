"""Clusters of the offsets hypernym - hyponym, named by their words.

After figure 2 of Fu et al. 2014: "is a" is no single offset; the offsets of animals lie together, and those
of occupations elsewhere, which is why each cluster has its own projection (experiments/hypernyms.py). The
clusters are k-means' on offsets of vectors of length 1; the plane is that in which their centres spread most.

    python -m experiments.figures.offset_clusters --out=DIR --vectors=FILE      # 10 seconds
    python -m experiments.figures.offset_clusters --out=DIR --vectors=FILE --pairs=PAIRS --clusters=3

Without --pairs (a line each: hyponym, tab, hypernym) they are those of BLESS (Baroni & Lenci 2011), 200
concrete nouns of 17 kinds and their hypernyms, in JAXGEN_DATA_DIR/hypernyms.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import hypernyms
from experiments.figures import command, word_table
from jaxgen.estimators import linear
from jaxgen.estimators.gmm import kmeans, nearest
from jaxgen.types import UserError

NUM_EXAMPLES = 4


class Cluster(NamedTuple):
    """Points [N, 2] of the offsets, hypernyms that tell it from others, hyponyms nearest to the centre."""

    points: np.ndarray
    hypernyms: list[str]
    hyponyms: list[str]


def compute(
    pairs: Sequence[tuple[str, str]], x: np.ndarray, y: np.ndarray, num_clusters: int
) -> list[Cluster]:
    """The clusters of pairs [N] of (hyponym, hypernym) with vectors x, y [N, D], the largest first."""
    offset = y - x
    centres = np.asarray(kmeans(jax.random.key(0), offset, num_clusters, num_steps=30))
    index = np.asarray(nearest(offset, centres))
    points = np.asarray(linear.encode(linear.fit_pca(centres, 2), offset))
    distance = np.sum((offset - centres[index]) ** 2, axis=1)
    everywhere = collections.Counter(hypernym for _, hypernym in pairs)
    found = []
    for k in np.argsort(-np.bincount(index, minlength=num_clusters), kind="stable"):
        rows = np.flatnonzero(index == k)
        if len(rows):
            here = collections.Counter(pairs[int(row)][1] for row in rows)
            # Words of this cluster more than of the others.
            named = sorted(here, key=lambda word: -(here[word] ** 2) / everywhere[word])[:2]
            typical = [pairs[int(row)][0] for row in rows[np.argsort(distance[rows], kind="stable")]]
            hyponyms = list(dict.fromkeys(typical))[:NUM_EXAMPLES]
            found.append(Cluster(points[rows], named, hyponyms))
    return found


def draw(clusters: Sequence[Cluster]) -> Figure:
    """The offsets, a colour a cluster, with its hypernyms at its middle and its hyponyms beside."""
    figure = Figure(figsize=(10.4, 5.6), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(1.6, 1))
    colours = matplotlib.colormaps["tab10"]
    for place, cluster in enumerate(clusters):
        colour, plane = colours(place % 10), cluster.points
        marker = "osD^"[place // 10 % 4]
        axes.scatter(plane[:, 0], plane[:, 1], color=colour, marker=marker, s=12, alpha=0.6, linewidths=0)
        x, y = np.median(plane, axis=0)
        axes.annotate(
            cluster.hypernyms[0],
            (x, y),
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour, "alpha": 0.85},
        )
        text = f"{', '.join(cluster.hypernyms)} ({len(plane)}): {', '.join(cluster.hyponyms)}"
        beside.text(0, 1 - (place + 0.5) / len(clusters), text, color=colour, fontsize=8, va="center")
    for each in (axes, beside):
        each.set_xticks([])
        each.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    beside.set_axis_off()
    axes.set_title(
        "offsets hypernym − hyponym in the plane in which the clusters' centres spread most", fontsize=9
    )
    beside.set_title("hypernyms (pairs): hyponyms nearest to the centre", fontsize=9, loc="left")
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the clusters and draws them; returns the exit status."""
    parser = word_table.parser("offset_clusters")
    parser.add_argument("--pairs", type=Path, help="a file of pairs: hyponym, tab, hypernym")
    parser.add_argument("--clusters", type=int, default=20, help="how many, 3 or more")
    arguments = parser.parse_args(argv)
    if arguments.clusters < 3:
        parser.error(f"--clusters takes 3 or more, not {arguments.clusters}")
    try:
        vectors = word_table.file_of(arguments.vectors)
        source = f"pairs:{arguments.pairs},{vectors}" if arguments.pairs else f"bless:{vectors}"
        pairs, label, x, y = hypernyms.load_pairs(source, unit_length=True)
        true = [pair for pair, is_a in zip(pairs, label, strict=True) if is_a]
        clusters = compute(true, x[label], y[label], arguments.clusters)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [[len(c.points), " ".join(c.hypernyms), " ".join(c.hyponyms)] for c in clusters]
    command.print_table(["pairs", "hypernyms", "hyponyms"], rows)
    return command.write(draw(clusters), arguments.out, "offset_clusters")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
