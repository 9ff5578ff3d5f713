import collections
import itertools
import math

import numpy as np
import pytest

from jaxgen.types import UserError
from jaxgen.words import counts
from jaxgen.words.sentences import pack

# The table printed in the lecture for "I like deep learning. / I like NLP. / I enjoy flying." with window 1.
WORDS = ["I", "like", "enjoy", "deep", "learning", "NLP", "flying", "."]
TABLE = [
    [0, 2, 1, 0, 0, 0, 0, 0],
    [2, 0, 0, 1, 0, 1, 0, 0],
    [1, 0, 0, 0, 0, 0, 1, 0],
    [0, 1, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0, 0, 1],
    [0, 1, 0, 0, 0, 0, 0, 1],
    [0, 0, 1, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 1, 1, 1, 0],
]
CORPUS = ["I like deep learning .", "I like NLP .", "I enjoy flying ."]
RNG = np.random.default_rng(0)
SENTENCES = [RNG.integers(-1, 6, RNG.integers(0, 9)) for _ in range(40)]


def brute_force(sentences, size, window, direction, weighting):
    found = np.zeros((size, size))
    for s in sentences:
        for t, centre in enumerate(s):
            for d in range(-window, window + 1):
                wanted = {"both": d != 0, "left": d < 0, "right": d > 0}[direction]
                if wanted and 0 <= t + d < len(s) and min(centre, s[t + d]) >= 0:
                    found[centre, s[t + d]] += 1 / abs(d) if weighting == "harmonic" else 1
    return found


def test_the_lecture_s_table():
    sentences = [[WORDS.index(w) for w in s.split()] for s in CORPUS]
    matrix = counts.cooccurrence(*pack(sentences), len(WORDS), window=1)
    np.testing.assert_array_equal(matrix.toarray(), TABLE)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("weighting", ["uniform", "harmonic"])
@pytest.mark.parametrize("direction", ["both", "left", "right"])
def test_against_a_loop(direction, weighting, chunk):
    matrix = counts.cooccurrence(
        *pack(SENTENCES), 6, window=3, direction=direction, weighting=weighting, chunk=chunk
    )
    expected = brute_force(SENTENCES, 6, 3, direction, weighting)
    # Sums of at most some hundred fractions in another order.
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-13)


def test_a_window_longer_than_the_text():
    matrix = counts.cooccurrence(*pack([[0, 1, 2]]), 3, window=50)
    np.testing.assert_array_equal(matrix.toarray(), 1 - np.eye(3))


def test_document_counts():
    for chunk in (1, 2, 100):
        found = counts.document_counts(*pack([[0, 2, 0], [], [-1, 1]]), 3, chunk=chunk).toarray()
        np.testing.assert_array_equal(found, [[2, 0, 0], [0, 0, 1], [1, 0, 0]])


def test_pmi_of_the_lecture_s_table_by_hand():
    sentences = [[WORDS.index(w) for w in s.split()] for s in CORPUS]
    matrix = counts.pmi(counts.cooccurrence(*pack(sentences), len(WORDS), window=1)).toarray()
    # 20 pairs in all; I occurs in 3 of them, like in 4, both together in 2.
    np.testing.assert_allclose(matrix[0, 1], math.log((2 / 20) / ((3 / 20) * (4 / 20))), rtol=1e-12)


@pytest.mark.parametrize(("shift", "smoothing"), [(1.0, 1.0), (5.0, 1.0), (1.0, 0.75), (2.0, 0.5)])
def test_pmi_against_probabilities(shift, smoothing):
    table = counts.cooccurrence(*pack(SENTENCES), 6, window=2, direction="right")
    dense = table.toarray()
    row, column, total = dense.sum(1), dense.sum(0), dense.sum()
    with np.errstate(divide="ignore"):
        expected = np.log(
            (dense / total) / np.outer(row / total, column**smoothing / np.sum(column**smoothing))
        )
    found = counts.pmi(table, smoothing=smoothing)
    stored = dense > 0
    np.testing.assert_allclose(found.toarray()[stored], expected[stored], rtol=1e-10, atol=1e-14)
    assert found.nnz == stored.sum()
    positive = counts.ppmi(table, shift=shift, smoothing=smoothing)
    np.testing.assert_allclose(
        positive.toarray(), np.maximum(expected - np.log(shift), 0), rtol=1e-10, atol=1e-14
    )
    assert np.all(positive.data > 0)


def test_independent_words_have_no_mutual_information():
    # Every pair as often as chance has it: PMI is 0 and stored, PPMI is empty.
    table = counts.cooccurrence(*pack([[0, 1], [0, 0], [1, 1], [1, 0]]), 2, window=1, direction="right")
    matrix = counts.pmi(table)
    assert matrix.nnz == 4
    np.testing.assert_allclose(matrix.data, 0, atol=1e-15)
    assert counts.ppmi(table, shift=1.001).nnz == 0


def test_mutual_information_is_the_mean_of_pmi():
    table = counts.cooccurrence(*pack(SENTENCES), 6, window=1, direction="right")
    joint = table.toarray() / table.sum()

    def entropy(p):
        return -sum(x * math.log(x) for x in p.ravel() if x > 0)

    expected = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
    np.testing.assert_allclose(np.sum(joint * counts.pmi(table).toarray()), expected, rtol=1e-10)


def test_what_cannot_be_done_is_said():
    with pytest.raises(UserError, match="at least 1"):
        counts.cooccurrence(*pack(SENTENCES), 6, window=0)
    with pytest.raises(UserError, match="direction"):
        counts.cooccurrence(*pack(SENTENCES), 6, window=1, direction="up")
    with pytest.raises(UserError, match="smoothing"):
        counts.pmi(counts.cooccurrence(*pack(SENTENCES), 6, window=1), smoothing=0.0)
    with pytest.raises(UserError, match="shift"):
        counts.ppmi(counts.cooccurrence(*pack(SENTENCES), 6, window=1), shift=0.0)
    with pytest.raises(UserError, match="at least one pair"):
        counts.pmi(counts.cooccurrence(*pack([[0], [1]]), 6, window=1))


def test_a_mapped_corpus_is_read_in_place(tmp_path):
    tokens, starts = pack(SENTENCES)
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.int32, mode="r")
    found = counts.cooccurrence(mapped, starts, 6, window=2, chunk=11)
    bigrams = collections.Counter((int(a), int(b)) for s in SENTENCES for a, b in itertools.pairwise(s))
    assert found[0, 1] >= bigrams[(0, 1)] > 0
    np.testing.assert_array_equal(found.toarray(), brute_force(SENTENCES, 6, 2, "both", "uniform"))
