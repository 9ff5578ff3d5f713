"""Which words stand near which: co-occurrence counts, and what they say beyond chance (PMI)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import scipy.sparse

from jaxgen.types import UserError
from jaxgen.words.sentences import check, sentence_numbers

Direction: TypeAlias = Literal["both", "left", "right"]
Weighting: TypeAlias = Literal["uniform", "harmonic"]


def cooccurrence(
    tokens: np.ndarray,
    starts: np.ndarray,
    vocab_size: int,
    *,
    window: int,
    direction: Direction = "both",
    weighting: Weighting = "uniform",
    chunk: int = 1 << 20,
) -> scipy.sparse.csr_matrix:
    """How often word j stands within `window` places of word i, float64 [V, V] at (i, j).

    direction: "both" sides of i (the matrix is symmetric), or only to its "left" or "right".
    weighting: every neighbour counts 1, or 1/d at a distance of d places ("harmonic", as in GloVe).
    Neighbours are of the same sentence (`jaxgen.words.sentences`); unknown words (-1) take up a place but are
    not counted. The text is read `chunk` tokens at a time, so memory is that of the matrix.
    """
    check(tokens, starts, vocab_size)
    if window < 1:
        raise UserError(f"the window of a co-occurrence matrix must be at least 1, not {window}.")
    if direction not in ("both", "left", "right") or weighting not in ("uniform", "harmonic"):
        raise UserError(
            "co-occurrence takes a direction 'both', 'left' or 'right' and a weighting 'uniform' or "
            f"'harmonic', not {direction!r} and {weighting!r}."
        )
    following = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float64)
    for begin in range(0, len(tokens), chunk):
        # Pairs whose first word is in this chunk; the second may be up to a window further on.
        end = min(begin + chunk + window, len(tokens))
        words = np.asarray(tokens[begin:end], np.int64)
        sentence = sentence_numbers(starts, begin, end)
        pairs, weights = [], []
        for distance in range(1, window + 1):
            last = min(chunk, len(words) - distance)
            if last <= 0:
                break
            first, second = words[:last], words[distance : distance + last]
            counted = (sentence[:last] == sentence[distance : distance + last]) & (first >= 0) & (second >= 0)
            pairs.append(first[counted] * vocab_size + second[counted])
            weights.append(np.full(len(pairs[-1]), 1.0 / distance if weighting == "harmonic" else 1.0))
        if pairs:
            cells, inverse = np.unique(np.concatenate(pairs), return_inverse=True)
            values = np.bincount(inverse, np.concatenate(weights), len(cells))
            following += scipy.sparse.csr_matrix(
                (values, (cells // vocab_size, cells % vocab_size)), shape=following.shape
            )
    if direction == "right":
        return following
    return following.T.tocsr() if direction == "left" else (following + following.T).tocsr()


def document_counts(
    tokens: np.ndarray, starts: np.ndarray, vocab_size: int, *, chunk: int = 1 << 20
) -> scipy.sparse.csr_matrix:
    """How often word i occurs in sentence (or document) d, float64 [V, S] at (i, d).

    chunk: tokens counted at a time; memory is that of the matrix.
    """
    check(tokens, starts, vocab_size)
    shape = (vocab_size, len(starts) - 1)
    found, times = [np.zeros(0, np.int64)], [np.zeros(0)]
    for begin in range(0, len(tokens), chunk):
        end = min(begin + chunk, len(tokens))
        words = np.asarray(tokens[begin:end], np.int64)
        document = sentence_numbers(starts, begin, end)
        cells, counts = np.unique((words * shape[1] + document)[words >= 0], return_counts=True)
        found.append(cells)
        times.append(counts.astype(np.float64))
    cells = np.concatenate(found)
    matrix = scipy.sparse.coo_matrix(
        (np.concatenate(times), (cells // shape[1], cells % shape[1])), shape=shape
    )
    return matrix.tocsr()


def pmi(counts: scipy.sparse.csr_matrix, *, smoothing: float = 1.0) -> scipy.sparse.csr_matrix:
    """Pointwise mutual information, log P(i, j) / (P(i) P_a(j)), in nats, float64 [V, V].

    From Church & Hanks 1990. P(i, j), P(i) and P(j) are shares of the counts; P_a(j) is P(j)^a / sum_j P(j)^a
    with a = `smoothing`, where a = 0.75 makes rare contexts less surprising (Levy, Goldberg & Dagan 2015).
    Only pairs that were counted are stored: an entry that is absent is minus infinity, and a stored 0 is a
    pair as frequent as chance has it.
    """
    if not (np.isfinite(smoothing) and smoothing > 0):
        raise UserError(f"context-distribution smoothing must be above 0, not {smoothing}.")
    cells = counts.tocoo()
    counted = cells.data > 0
    row, column, joint = cells.row[counted], cells.col[counted], cells.data[counted]
    if not len(joint):
        raise UserError("PMI needs at least one pair of words that were counted together.")
    total = joint.sum()
    words = np.bincount(row, joint, counts.shape[0]) / total
    contexts = np.bincount(column, joint, counts.shape[1]) ** smoothing
    contexts /= contexts.sum()
    values = np.log(joint / total / words[row] / contexts[column])
    return scipy.sparse.csr_matrix((values, (row, column)), shape=counts.shape)


def ppmi(
    counts: scipy.sparse.csr_matrix, *, shift: float = 1.0, smoothing: float = 1.0
) -> scipy.sparse.csr_matrix:
    """Shifted positive PMI, max(PMI(i, j) - log k, 0), float64 [V, V] (Levy & Goldberg 2014).

    shift: k, the number of negative samples of the skip-gram model that this matrix is implicit in; 1 for
    none.
    """
    if not (np.isfinite(shift) and shift > 0):
        raise UserError(f"the shift k of PMI - log k must be above 0, not {shift}.")
    matrix = pmi(counts, smoothing=smoothing)
    matrix.data = np.maximum(matrix.data - np.log(shift), 0.0)
    matrix.eliminate_zeros()
    return matrix
