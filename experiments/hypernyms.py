"""Semantic hierarchies from word vectors (Fu et al. 2014): which pairs of words are is-a pairs?

  python -m jaxgen.run --config=experiments/hypernyms.py:zh --workdir=runs/hypernyms_zh
  python -m jaxgen.run --config=experiments/hypernyms.py:wiki --workdir=runs/hypernyms_wiki \\
      --config.data.source=wordnet:VECTORS

An update adds a batch of known pairs to the sums of the least-squares problem of each cluster of offsets. The
words are split, so that no word of a test pair was seen in training; data.split=hyponyms lets hypernyms be
seen, as in hanging new words into a known hierarchy, and pairs splits the pairs alone. The thresholds are
chosen on development pairs, split off likewise. Beside the piecewise and the uniform projection stand the
nearest and the mean offset, the cosine, chance, and the piecewise projection made transitive and free of
cycles.

data.source: zh, pairs and vectors of Wang et al. 2017, wordnet:VECTORS, first noun senses up to three levels
apart, and bless:VECTORS and evalution:VECTORS, nouns in is-a and other relations, are in
JAXGEN_DATA_DIR/hypernyms. VECTORS is a word2vec file, such as samples/vectors.txt of a run of
experiments/cooccurrence.py:wiki. pairs:FILE,VECTORS takes your own, a line each: hyponym, tab, hypernym, and
where false ones are given too, tab, 1 or 0. Where they are not, each pair is set against its reverse and its
hyponym with another pair's hypernym. planted, the smoke preset's, is made up: Python brings no is-a pairs.
Seconds on a CPU. Where hypernyms were seen (bless) the piecewise projection is far ahead; of words never seen
the projections find hardly more on wordnet than the mean offset.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, counting, word_vectors
from jaxgen import pictures, systems
from jaxgen.estimators import hypernyms
from jaxgen.estimators.gmm import kmeans, nearest
from jaxgen.interop.word2vec import read_word2vec
from jaxgen.types import Array, Batch, Experiment, Key, Mean, Metrics, Score, Scores, TrainState, UserError

GENERATES = False
JUDGED = {"bless": "BLESS", "evalution": "EVALution"}  # pairs of which all relations are known
SPLITS = ("words", "hyponyms", "pairs")
SHARES = (0.6, 0.15, 0.25)  # of what is split: to train, to choose thresholds, to test
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.1,
        "runs",
        {
            **counting.SMOKE_TRAIN,
            "data.source": "planted",
            "data.batch_size": 64,
            "model.num_clusters": 2,
        },
    ),
    "zh": Preset("1 CPU core", 0.3, "F1 0.751 piecewise, 0.751 uniform, 0.684 all", {}),
    "wiki": Preset(
        "1 CPU core",
        0.5,
        "F1 0.563 piecewise, 0.568 uniform, 0.508 all (vectors of cooccurrence.py:wiki)",
        {"data.source": "wordnet:VECTORS", "data.batch_size": 3072},
    ),
    "bless": Preset(
        "1 CPU core",
        0.3,
        "F1 0.604 piecewise, 0.506 uniform, 0.305 offset, 0.171 all (cooccurrence.py:wiki)",
        {"data.source": "bless:VECTORS", "data.split": "hyponyms"},
    ),
}
FIELD_CHECKS = {
    **{field: value for field, value in common.FIELD_CHECKS.items() if field.startswith("train.")},
    "data.source": ("planted:3", {}),
    "data.split": ("pairs", {"train.num_steps": 6}),
}


class Pairs(NamedTuple):
    """`pairs` [N] of words (x, y); `label` bool [N], y is a hypernym of x; `x`, `y` float32 [N, D]."""

    pairs: Sequence[tuple[str, str]]
    label: np.ndarray
    x: np.ndarray
    y: np.ndarray


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `zh`."""
    config = counting.base_config(source="zh", batch_size=1024, num_steps=2)
    config.data.unit_length = True  # whether the vectors are scaled to length 1
    config.data.split = "words"  # what is in one part only: words, hyponyms, pairs
    config.model = ConfigDict({"num_clusters": 10, "ridge": 0.01})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.one_of(config, SPLITS, "data.split")
    checks.at_least(config, 1, "model.num_clusters")
    checks.at_least(config, 0, "model.ridge")


def load_pairs(source: str, *, unit_length: bool) -> Pairs:
    """The pairs that data.source names; those with a word without a vector are left out."""
    name, _, detail = source.partition(":")
    if name == "planted" and (not detail or detail.isdigit()):
        pairs, label, vectors = _planted(int(detail or 0))
    elif source == "zh":
        pairs, label, vectors = _chinese()
    elif name == "wordnet" and detail:
        file = _file("wordnet-noun-hypernyms.tsv.gz")
        rows = [line.rstrip("\n").split("\t") for line in word_vectors.packed_lines(file)]
        known = {(row[0], row[1]) for row in rows[1:]}
        true = [(row[0], row[1]) for row in rows[1:] if row[3:] == ["1", "1"]]
        vectors = _vectors(detail)
        pairs, label = _with_false(_known_words(true, vectors), known)
    elif name in JUDGED and detail:
        vectors = _vectors(detail)
        parts = (_file(f"siege-{JUDGED[name]}.{part}.tsv.gz") for part in ("val", "test"))
        pairs, label = word_vectors.judged_pairs(parts)
    elif name == "pairs" and detail.count(",") == 1:
        file_name, vectors_name = detail.split(",")
        vectors = _vectors(vectors_name)
        pairs, label = _own_pairs(Path(os.path.expanduser(file_name)), vectors)
    else:
        raise UserError(
            f"data.source={source} is none of planted, zh, wordnet:VECTORS, bless:VECTORS, evalution:VECTORS "
            "and pairs:FILE,VECTORS."
        )
    there = np.asarray([x in vectors and y in vectors and x != y for x, y in pairs], bool)
    pairs = [pair for pair, keep in zip(pairs, there, strict=True) if keep]
    if not pairs:
        raise UserError(f"no pair of data.source={source} has vectors for both words: give other vectors.")
    x, y = (np.asarray([vectors[pair[side]] for pair in pairs], np.float32) for side in (0, 1))
    if unit_length:
        x, y = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (x, y))
    return Pairs(pairs, np.asarray(label, bool)[there], x, y)


def _file(name: str) -> Path:
    path = Path(os.path.expanduser(os.environ.get("JAXGEN_DATA_DIR", ""))) / "hypernyms" / name
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the folder that holds hypernyms/ as --data_dir.")
    return path


def _vectors(name: str) -> dict[str, np.ndarray]:
    if name == "VECTORS":
        raise UserError(
            "These pairs need word vectors: train them by experiments/word2vec.py:wiki or cooccurrence.py "
            "and name their file, --config.data.source=wordnet:runs/words/samples/vectors.txt."
        )
    table = read_word2vec(name)
    return dict(zip(table.words, table.vectors, strict=True))


def _chinese() -> tuple[list[tuple[str, str]], list[bool], dict[str, np.ndarray]]:
    fields = [line.split() for line in word_vectors.packed_lines(_file("zh-wang2017.vectors50.txt.xz"))]
    vectors = {row[0]: np.asarray(row[1:], np.float32) for row in fields if len(row) == 51}
    lines = [
        line.split("\t")
        for part in ("train", "test")
        for line in _file(f"zh-wang2017.{part}.tsv").read_text(encoding="utf-8").splitlines()
    ]
    return [(line[0], line[1]) for line in lines], [line[2].strip() == "1" for line in lines], vectors


def _own_pairs(path: Path, vectors: Mapping[str, np.ndarray]) -> tuple[list[tuple[str, str]], list[bool]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [line.split("\t") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: give a file of pairs.") from error
    widths, labels = {len(row) for row in rows}, {row[2] for row in rows if row[2:]}
    if widths not in ({2}, {3}) or labels - {"0", "1"}:
        raise UserError(
            f"{path} is no file of pairs: a line is hyponym, tab, hypernym, and may add tab, 1 or 0."
        )
    pairs = [(row[0], row[1]) for row in rows]
    if len(rows[0]) == 3:
        return pairs, [row[2] == "1" for row in rows]
    return _with_false(_known_words(pairs, vectors), set(pairs))


def _known_words(
    pairs: Sequence[tuple[str, str]], vectors: Mapping[str, np.ndarray]
) -> list[tuple[str, str]]:
    return [(x, y) for x, y in pairs if x in vectors and y in vectors]


def _with_false(
    true: Sequence[tuple[str, str]], known: set[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[bool]]:
    """The pairs, their reverses, and each word with another pair's hypernym, but for those that are known or
    follow from the pairs."""
    known = known | hypernyms.transitive_closure(true)
    others = np.random.default_rng(0).integers(0, max(len(true), 1), len(true))
    made = [*((y, x) for x, y in true), *((x, true[i][1]) for (x, _), i in zip(true, others, strict=True))]
    false = [pair for pair in made if pair not in known]
    return [*true, *false], [True] * len(true) + [False] * len(false)


def _planted(seed: int) -> tuple[list[tuple[str, str]], list[bool], dict[str, np.ndarray]]:
    """Two kinds of is-a, each with its own Phi and a little noise; false pairs are other words' hypernyms."""
    rng = np.random.default_rng(seed)
    num, dim = 600, 6
    phi = np.eye(dim) + 0.3 * rng.normal(size=(2, dim, dim))
    phi[:, :, 0] += 5 * np.eye(dim)[1:3]
    x = rng.normal(size=(num, dim))
    x[:, 0] = 1
    y = np.einsum("nij,nj->ni", phi[np.arange(num) % 2], x) + 0.1 * rng.normal(size=(num, dim))
    vectors = {f"{name}{i}": row for name, rows in (("x", x), ("y", y)) for i, row in enumerate(rows)}
    true = [(f"x{i}", f"y{i}") for i in range(num)]
    pairs, label = _with_false(true, set(true))
    return pairs, label, vectors


def split_rows(pairs: Sequence[tuple[str, str]], split: str, *, seed: int) -> list[np.ndarray]:
    """Rows of the pairs to train, to develop and to test, by the words, the hyponyms or the pairs."""
    if split == "words":
        return hypernyms.lexical_split(pairs, shares=SHARES, seed=seed)
    # A pair of a word with itself goes where the word goes.
    alike = (
        [(x, x) for x, _ in pairs]
        if split == "hyponyms"
        else [(pair, pair) for pair in map("\t".join, pairs)]
    )
    return hypernyms.lexical_split(alike, shares=SHARES, seed=seed)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds pairs, sums and judgement."""
    check(config)
    pairs, label, x, y = load_pairs(config.data.source, unit_length=config.data.unit_length)
    train, development, test = split_rows(pairs, config.data.split, seed=config.seed)
    known = train[label[train]]
    num_clusters, dim, ridge = config.model.num_clusters, x.shape[1], config.model.ridge
    if len(known) < num_clusters or not label[development].any() or not label[test].any():
        raise UserError(
            f"Of {len(pairs)} pairs {len(known)} is-a pairs are left to train "
            f"model.num_clusters={num_clusters} projections, and some must be left to test: give more pairs, "
            "or lower it."
        )
    batches = counting.one_pass(config, len(known), lambda at: {"x": x[known[at]], "y": y[known[at]]}, mesh)

    def init(key: Key, batch: Batch) -> dict[str, Array]:
        return {
            "centres": kmeans(key, y[known] - x[known], num_clusters, num_steps=30),
            "gram": jnp.zeros((num_clusters, dim, dim)),
            "cross": jnp.zeros((num_clusters, dim, dim)),
            "offset": jnp.zeros(dim),
            "count": jnp.zeros(num_clusters),
        }

    def solve(sums: Mapping[str, Array], clusters: int) -> hypernyms.Projection:
        """The piecewise projection, or with one cluster the uniform one, of the sums (`hypernyms.fit`)."""
        gram, cross, centres = sums["gram"], sums["cross"], sums["centres"]
        if clusters == 1:
            gram, cross = (jnp.sum(part, axis=0, keepdims=True) for part in (gram, cross))
            centres = (sums["offset"] / jnp.maximum(jnp.sum(sums["count"]), 1.0))[None, :]
        # The mean square of x's entries, times all pairs; never 0, for the sums start there.
        penalty = ridge * jnp.trace(jnp.sum(sums["gram"], axis=0)) / dim + 1e-6
        identity = penalty * jnp.eye(dim)[None, :, :]
        phi = jnp.linalg.solve(gram + identity, cross + identity)
        return hypernyms.Projection(jnp.swapaxes(phi, 1, 2), centres)

    def update(sums: dict[str, Array], batch: Batch, key: Key) -> tuple[dict[str, Array], Metrics]:
        offset = batch["y"] - batch["x"]
        one_hot = jax.nn.one_hot(nearest(offset, sums["centres"]), num_clusters) * batch["mask"][:, None]
        outer = lambda right: jnp.einsum(
            "nk,ni,nj->kij", one_hot, batch["x"], right, precision=jax.lax.Precision.HIGHEST
        )
        new = {
            "centres": sums["centres"],
            "gram": sums["gram"] + outer(batch["x"]),
            "cross": sums["cross"] + outer(batch["y"]),
            "offset": sums["offset"] + jnp.sum(offset * batch["mask"][:, None], axis=0),
            "count": sums["count"] + jnp.sum(one_hot, axis=0),
        }
        distances = hypernyms.distance(solve(new, num_clusters), batch["x"], batch["y"])
        loss = Mean.of(distances, batch["mask"])
        # The last batches may have no pair left.
        return new, {"loss": Mean(loss.total, jnp.maximum(loss.count, 1.0))}

    piecewise_of = jax.jit(lambda sums: solve(sums, num_clusters))
    uniform_of = jax.jit(lambda sums: solve(sums, 1))

    def distances(state: TrainState, part: np.ndarray) -> dict[str, np.ndarray]:
        """How far each method finds the part's pairs from being is-a pairs."""
        a, b = x[part], y[part]
        piecewise, uniform = piecewise_of(state.params), uniform_of(state.params)
        return {
            "piecewise": np.asarray(hypernyms.distance(piecewise, a, b)),
            "uniform": np.asarray(hypernyms.distance(uniform, a, b)),
            "offsets": hypernyms.offset_distance(piecewise.centres, a, b),
            "offset": hypernyms.offset_distance(uniform.centres, a, b),
            "similarity": hypernyms.cosine_distance(a, b),
            "random": np.random.default_rng(config.seed).uniform(size=len(part)),
        }

    def validate(state: TrainState) -> Metrics:
        true = development[label[development]]
        return {"loss": Mean.of(jnp.asarray(distances(state, true)["piecewise"]))}

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        scores: dict[str, Score] = {}

        def add(name: str, predicted: np.ndarray) -> None:
            found = hypernyms.detection(predicted, label[test])
            for what in ("f1", "precision", "recall"):
                unit = f"{what}, {int(label[test].sum())} of the pairs are is-a"
                scores[f"{what}_{name}"] = Score(getattr(found, what), unit, len(test), True)

        chosen, judged = distances(state, development), distances(state, test)
        delta = {name: hypernyms.choose_threshold(chosen[name], label[development]) for name in chosen}
        for name, score in judged.items():
            add(name, score < delta[name])
        near = {
            pairs[row]: float(distance)
            for row, distance in zip(test, judged["piecewise"], strict=True)
            if distance < delta["piecewise"]
        }
        closed = hypernyms.transitive_closure(hypernyms.remove_cycles(near))
        add("transitive", np.asarray([pairs[row] in closed for row in test]))
        add("all", np.ones(len(test), bool))
        found = hypernyms.detection(chosen["piecewise"] < delta["piecewise"], label[development])
        scores["development_f1_piecewise"] = Score(
            found.f1, "F1 at the threshold chosen here", len(development), True
        )
        return scores

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """The clusters of the known offsets in the plane of their leading directions, and some of each."""
        directory.mkdir(parents=True, exist_ok=True)
        offset = y[known] - x[known]
        cluster = np.asarray(nearest(offset, state.params["centres"]))
        lines = []
        for k in range(num_clusters):
            words = ", ".join(" < ".join(pairs[row]) for row in known[cluster == k][: num or 8])
            lines.append(f"cluster {k}, {int(np.sum(cluster == k))} pairs: {words}")
        text, picture = directory / "clusters.txt", directory / "clusters.png"
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        centred = offset - offset.mean(axis=0)
        plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        colours = [pictures.PALETTE[k % len(pictures.PALETTE)] for k in cluster]
        axes.scatter(plane[:, 0], plane[:, 1], c=colours, s=8)
        axes.set_title(f"offsets hypernym - hyponym of {len(known)} pairs, {num_clusters} clusters")
        figure.savefig(picture, dpi=100, metadata={"Software": None})
        return [text, picture]

    digest = hashlib.sha256(repr(pairs).encode() + label.tobytes() + x.tobytes() + y.tobytes()).hexdigest()
    return Experiment(
        system=systems.update_system(init, update),
        loop=common.loop_settings(config.train),
        train_batch=batches,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"pairs": digest},
        seed=config.seed,
    )
