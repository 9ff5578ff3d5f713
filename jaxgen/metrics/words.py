"""How good word vectors are: analogies, similarity, neighbours, the odd one out, categories.

Everything works on a table of vectors float [V, D] and its words, the most frequent first. `restrict` keeps
the first so many of them. With `fold_case`, words that differ in case alone are one word, whose vector is
that of the most frequent form, as in gensim. No score hides what it left out: the number of questions or
pairs with a word outside the vocabulary comes with each.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from jaxgen.types import Array, UserError

Question: TypeAlias = tuple[str, str, str, str]
AnalogyMethod: TypeAlias = Literal["add", "mul"]


class AnalogyScore(NamedTuple):
    """`correct` of `asked` questions; `out_of_vocabulary` others have a word without a vector."""

    correct: int
    asked: int
    out_of_vocabulary: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]; NaN where nothing was asked."""
        return self.correct / self.asked if self.asked else float("nan")


class WordPair(NamedTuple):
    """Two words and how similar people find them, on a scale of the data set's own."""

    first: str
    second: str
    score: float


class SimilarityScore(NamedTuple):
    """Spearman's `rho` over `num_pairs` pairs; `out_of_vocabulary` others have a word without a vector.

    rho is in [-1, 1], NaN of fewer than two pairs or where all ranks are equal.
    """

    rho: float
    num_pairs: int
    out_of_vocabulary: int


class OddOneOut(NamedTuple):
    """The word that fits least, and those of the given ones that have no vector."""

    word: str
    out_of_vocabulary: tuple[str, ...]


class Vectors:
    """A table of vectors made ready to be asked: unit rows, and the words' places.

    vectors: float [V, D], finite; words: V different strings, the most frequent first.
    restrict: only the first so many words; None: all.
    fold_case: words that differ in case alone are one.
    """

    def __init__(
        self,
        vectors: ArrayLike,
        words: Sequence[str],
        *,
        restrict: int | None = None,
        fold_case: bool = False,
    ) -> None:
        table = np.asarray(vectors, np.float32)
        if table.ndim != 2 or len(table) != len(words) or not table.size:
            raise ValueError(f"{len(words)} words need vectors [V, D], not {table.shape}")
        if restrict is not None and restrict < 1:
            raise UserError(f"the vocabulary must keep at least 1 word, not {restrict}.")
        table = table[:restrict]
        if not np.all(np.isfinite(table)):
            raise UserError("the word vectors are not all finite numbers: train them again.")
        self.words = tuple(words[:restrict])
        # A zero vector stays zero: its cosine with everything is 0.
        norms = np.linalg.norm(table, axis=1, keepdims=True)
        self.unit = table / np.where(norms > 0, norms, 1.0)
        self._fold = str.upper if fold_case else str
        self.index: dict[str, int] = {}
        for number, word in enumerate(self.words):
            self.index.setdefault(self._fold(word), number)
        # The place of the most frequent form of each word.
        self.form = np.asarray([self.index[self._fold(word)] for word in self.words], np.int32)

    def find(self, word: str) -> int:
        """The word's row, -1 where it has none."""
        return self.index.get(self._fold(word), -1)

    def rows(self, words: Iterable[str]) -> NDArray[np.int32]:
        """The rows of several words, int32 [N], -1 where there is none."""
        return np.asarray([self.find(word) for word in words], np.int32)


def read_analogies(path: str | os.PathLike[str]) -> dict[str, list[Question]]:
    """{section: questions (a, b, c, d), "a is to b as c is to d"} of a file like questions-words.txt.

    A line ": name" opens a section; each other line has four words (Mikolov et al. 2013).

    Raises:
        UserError: no such file, or a line that is neither.
    """
    sections: dict[str, list[Question]] = {}
    current: list[Question] | None = None
    for number, line in _lines(path):
        fields = line.split()
        if fields[0] == ":" and len(fields) > 1:
            current = sections.setdefault(" ".join(fields[1:]), [])
        elif len(fields) == 4 and current is not None:
            current.append((fields[0], fields[1], fields[2], fields[3]))
        else:
            raise UserError(
                f"line {number} of {path} is neither ': section' nor four words of a section: give a file of "
                "analogies like questions-words.txt."
            )
    if not any(sections.values()):
        raise UserError(f"{path} has no analogies: give a file like questions-words.txt.")
    return sections


def read_similarities(path: str | os.PathLike[str]) -> list[WordPair]:
    """The pairs of a file of lines "word word score", such as those of WordSim-353.

    Raises:
        UserError: no such file, or a line that is something else.
    """
    pairs = []
    for number, line in _lines(path):
        fields = line.split()
        try:
            first, second, score = fields
            pair = WordPair(first, second, float(score))
        except ValueError:
            pair = None
        if pair is None or not np.isfinite(pair.score):
            raise UserError(
                f"line {number} of {path} is not 'word word score': give a file of pairs like WordSim-353."
            )
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} has no pairs of words: give a file like WordSim-353.")
    return pairs


def _lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """(number, line) of those with something on them."""
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


@functools.partial(jax.jit, static_argnames=("method", "eps"))
def _best_answers(unit: Array, form: Array, questions: Array, *, method: AnalogyMethod, eps: float) -> Array:
    """The best d of each question (a, b, c) int [B, 3], int [B]; unit [V, D], form [V]."""
    exact = jax.lax.Precision.HIGHEST
    a, b, c = (unit[questions[:, i]] for i in range(3))
    if method == "add":
        score = jnp.matmul(b - a + c, unit.T, precision=exact)
    else:
        near_a, near_b, near_c = ((jnp.matmul(x, unit.T, precision=exact) + 1.0) / 2.0 for x in (a, b, c))
        score = near_b * near_c / (near_a + eps)
    given = jnp.any(form[None, :, None] == form[questions][:, None, :], axis=2)
    return jnp.argmax(jnp.where(given, -jnp.inf, score), axis=1)


def analogies(
    vectors: Vectors,
    sections: Mapping[str, Sequence[Question]],
    *,
    method: AnalogyMethod = "add",
    eps: float = 1e-3,
    batch_size: int = 128,
) -> dict[str, AnalogyScore]:
    """Scores of "a is to b as c is to ?" by section, and of all of them under "total".

    method: "add" answers argmax_d cos(d, b - a + c) of unit vectors, which is 3CosAdd (Mikolov, Yih & Zweig
        2013); "mul" answers argmax_d cos'(d, b) cos'(d, c) / (cos'(d, a) + eps) with cos' = (cos + 1) / 2,
        which is 3CosMul (Levy & Goldberg 2014, eq. 4).
    a, b and c are never answers. A question with a word outside the vocabulary is not asked but counted.
    """
    if method not in ("add", "mul"):
        raise UserError(f"analogies are answered by 'add' or 'mul', not {method!r}.")
    if "total" in sections:
        raise UserError("a section of analogies cannot be called 'total': rename it.")
    unit, form = jnp.asarray(vectors.unit), jnp.asarray(vectors.form)
    scores = {}
    for name, questions in sections.items():
        rows = np.asarray([vectors.rows(question) for question in questions], np.int32).reshape(-1, 4)
        known = rows[(rows >= 0).all(axis=1)]
        correct = 0
        for start in range(0, len(known), batch_size):
            part = known[start : start + batch_size]
            # The last batch is filled up, so that one program serves all.
            filled = np.pad(part[:, :3], ((0, batch_size - len(part)), (0, 0)))
            best = np.asarray(_best_answers(unit, form, filled, method=method, eps=eps))[: len(part)]
            correct += int(np.sum(vectors.form[best] == part[:, 3]))
        scores[name] = AnalogyScore(correct, len(known), len(rows) - len(known))
    total = [sum(column) for column in zip(*scores.values(), strict=True)] or [0, 0, 0]
    scores["total"] = AnalogyScore(*total)
    return scores


def similarity(vectors: Vectors, pairs: Sequence[WordPair]) -> SimilarityScore:
    """Spearman's rank correlation of cosines with people's scores, ties given their mean rank."""
    first = vectors.rows(pair.first for pair in pairs)
    second = vectors.rows(pair.second for pair in pairs)
    known = (first >= 0) & (second >= 0)
    cosine = np.sum(vectors.unit[first[known]] * vectors.unit[second[known]], axis=1)
    score = np.asarray([pair.score for pair in pairs], np.float64)[known]
    rho = float("nan")
    if len(score) > 1 and np.ptp(cosine) > 0 and np.ptp(score) > 0:
        ranks = scipy.stats.rankdata(cosine), scipy.stats.rankdata(score)
        rho = float(np.corrcoef(*ranks)[0, 1])
    return SimilarityScore(rho, len(score), len(pairs) - len(score))


def nearest_neighbours(
    vectors: Vectors, query: str | ArrayLike, *, num: int = 10, without: Sequence[str] = ()
) -> list[tuple[str, float]]:
    """The `num` words of greatest cosine with a word, or with a vector [D], and that cosine, falling.

    The word itself and those in `without` are left out.

    Raises:
        UserError: the word has no vector.
    """
    if isinstance(query, str):
        without = (*without, query)
        target = vectors.unit[_known(vectors, query)]
    else:
        target = np.asarray(query, np.float32)
        target = target / max(float(np.linalg.norm(target)), np.finfo(np.float32).tiny)
    cosine = vectors.unit @ target
    left_out = [row for row in vectors.rows(without) if row >= 0]
    cosine[np.isin(vectors.form, left_out)] = -np.inf
    order = np.argsort(-cosine, kind="stable")[:num]
    return [(vectors.words[row], float(cosine[row])) for row in order if np.isfinite(cosine[row])]


def odd_one_out(vectors: Vectors, words: Sequence[str]) -> OddOneOut:
    """The word of least cosine with the mean of the unit vectors of all of them.

    Raises:
        UserError: fewer than two of them have a vector.
    """
    unknown = tuple(word for word in words if vectors.find(word) < 0)
    known = [word for word in words if vectors.find(word) >= 0]
    if len(known) < 2:
        raise UserError("the odd one out needs at least two words that have vectors.")
    unit = vectors.unit[vectors.rows(known)]
    return OddOneOut(known[int(np.argmin(unit @ unit.mean(axis=0)))], unknown)


def purity(cluster: ArrayLike, label: ArrayLike) -> float:
    """1/N sum_k max_j |cluster k with label j|: the share of items that are of their cluster's main category.

    Manning, Raghavan & Schuetze 2008, eq. 16.1. cluster, label: [N] whole numbers. In (0, 1].
    """
    cluster, label = np.asarray(cluster), np.asarray(label)
    if cluster.shape != label.shape or cluster.ndim != 1 or not cluster.size:
        raise ValueError(f"purity needs clusters and labels [N], not {cluster.shape} and {label.shape}")
    _, rows = np.unique(cluster, return_inverse=True)
    _, columns = np.unique(label, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(table, (rows, columns), 1)
    return float(table.max(axis=1).sum() / len(label))


def categorisation(
    vectors: Vectors, categories: Mapping[str, Sequence[str]], *, num_starts: int = 10, seed: int = 0
) -> tuple[float, int, int]:
    """(purity, words clustered, words without a vector) of spherical k-means, one cluster a category.

    Each start takes random words as centres; the one whose words lie nearest to their centres counts.
    """
    rows = [(vectors.find(word), label) for label, words in enumerate(categories.values()) for word in words]
    known = np.asarray([row for row in rows if row[0] >= 0], np.int64).reshape(-1, 2)
    if len(known) < len(categories) or not len(known):
        raise UserError("categorisation needs at least as many words with vectors as categories.")
    unit, rng = vectors.unit[known[:, 0]], np.random.default_rng(seed)
    best, best_cluster = -np.inf, np.zeros(len(unit), np.int64)
    for _ in range(num_starts):
        centres = unit[rng.choice(len(unit), len(categories), replace=False)]
        cluster = np.full(len(unit), -1)
        while True:
            nearest = np.argmax(unit @ centres.T, axis=1)
            if np.array_equal(nearest, cluster):
                break
            cluster = nearest
            for k in np.unique(cluster):
                centre = unit[cluster == k].sum(axis=0)
                centres[k] = centre / max(float(np.linalg.norm(centre)), np.finfo(np.float32).tiny)
        fit = float(np.sum(unit * centres[cluster]))
        if fit > best:
            best, best_cluster = fit, cluster
    return purity(best_cluster, known[:, 1]), len(known), len(rows) - len(known)


def _known(vectors: Vectors, word: str) -> int:
    row = vectors.find(word)
    if row < 0:
        raise UserError(f"'{word}' is not among the {len(vectors.words)} words that have vectors.")
    return row
