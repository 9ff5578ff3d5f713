"""What word2vec is trained on: pairs of a centre word and a word in the window around it.

Mikolov et al. 2013, "Distributed representations of words and phrases and their compositionality" (NIPS), is
the source of the subsampling; the windows of random size are the C program's.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxgen.types import Array, Key, UserError


def skip_gram_pairs(tokens: np.ndarray, starts: np.ndarray, window: int | np.ndarray) -> np.ndarray:
    """(centre, context) pairs w_t, w_{t+j} with -m <= j <= m, j != 0, in the order of the text, int [P, 2].

    window: m, or an int [N] of one m a centre, as `dynamic_windows` draws them. Pairs are of one sentence
    (`jaxgen.words.sentences`).
    """
    tokens, starts = np.asarray(tokens), np.asarray(starts)
    radius = np.broadcast_to(np.asarray(window), tokens.shape)
    if len(tokens) and radius.min() < 0:
        raise UserError(f"the window of a training pair must not be negative, as {radius.min()} is.")
    sentence = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    left = np.maximum(np.arange(len(tokens)) - radius, starts[:-1][sentence])
    right = np.minimum(np.arange(len(tokens)) + radius + 1, starts[1:][sentence])
    # All places from left to right of each centre, then without the centre itself.
    sizes = right - left
    centre = np.repeat(np.arange(len(tokens)), sizes)
    place = np.arange(len(centre)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + left[centre]
    others = place != centre
    return np.stack([tokens[centre[others]], tokens[place[others]]], axis=1)


def dynamic_windows(key: Key, num: int, window: int) -> Array:
    """Window sizes drawn evenly from 1 ... m = window, int32 [num].

    So a neighbour d places away is in the window with probability (m - d + 1) / m.
    """
    if window < 1:
        raise UserError(f"the window of word2vec must be at least 1, not {window}.")
    return jax.random.randint(key, (num,), 1, window + 1)


def subsampling_keep_probability(counts: np.ndarray, threshold: float) -> np.ndarray:
    """min(1, sqrt(t / f(w))): 1 - P(w_i) of Mikolov et al. 2013, eq. 5, float64 [V].

    counts: how often each word occurs [V]; f(w) is its share of them; threshold: t, about 1e-5.
    """
    ratio = _threshold_over_share(counts, threshold)
    return np.minimum(1.0, np.sqrt(ratio))


def word2vec_keep_probability(counts: np.ndarray, threshold: float) -> np.ndarray:
    """min(1, sqrt(t / f(w)) + t / f(w)), which the C program and gensim use instead of eq. 5, float64 [V]."""
    ratio = _threshold_over_share(counts, threshold)
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


def _threshold_over_share(counts: np.ndarray, threshold: float) -> np.ndarray:
    """t / f(w) [V], infinite for a word that does not occur."""
    counts = np.asarray(counts, np.float64)
    if not (np.isfinite(threshold) and threshold > 0):
        raise UserError(f"the subsampling threshold must be above 0, not {threshold}.")
    with np.errstate(divide="ignore"):
        return threshold * counts.sum() / counts


def subsample(key: Key, tokens: Array, keep_probability: Array) -> Array:
    """Which of the tokens int [N] to train on, bool [N]: each with its word's probability [V]."""
    return jax.random.uniform(key, tokens.shape) < keep_probability[tokens]
