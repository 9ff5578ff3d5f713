"""Scores of a classifier from its confusion counts, and what a classifier says of generated samples.

NumPy on the host. Confusion matrices add, so a set is scored in batches by summing theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _labels(labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """`labels` as int64 `[N]`, each checked to lie in [0, num_classes)."""
    array = np.asarray(labels)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ValueError(f"labels must be integers [N], but are {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}) but span [{array.min()}, {array.max()}]")
    return array.astype(np.int64)


def confusion_matrix(label: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """How often each class was taken for each: `[K, K]` int64, entry (i, j) counts class i predicted as j.

    Rows are the true class, as in scikit-learn (some textbooks put the prediction in the rows).

    Args:
        label, predicted: `[N]` integers in [0, K).
        num_classes: K.

    Raises:
        ValueError: lengths differ, or a label is out of range.
    """
    label, predicted = _labels(label, num_classes), _labels(predicted, num_classes)
    if len(label) != len(predicted):
        raise ValueError(f"there are {len(label)} labels but {len(predicted)} predictions")
    cells = np.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, and NaN where the whole is empty: the quantity is undefined there, not zero."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def accuracy(confusion: ArrayLike) -> float:
    """The share of items predicted right, sum_i C_ii / sum_ij C_ij, in [0, 1]; NaN of no items."""
    confusion = np.asarray(confusion, np.float64)
    return float(_ratio(np.trace(confusion), confusion.sum()))


def precision(confusion: ArrayLike) -> NDArray[np.float64]:
    """Of the items predicted as class k, the share that are, TP / (TP + FP): `[K]`, NaN if there is none."""
    confusion = np.asarray(confusion, np.float64)
    return _ratio(np.diagonal(confusion), confusion.sum(axis=0))


def recall(confusion: ArrayLike) -> NDArray[np.float64]:
    """Of the items of class k, the share predicted as such, TP / (TP + FN): `[K]`, NaN if there is none."""
    confusion = np.asarray(confusion, np.float64)
    return _ratio(np.diagonal(confusion), confusion.sum(axis=1))


def f1(confusion: ArrayLike) -> NDArray[np.float64]:
    """The harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN): `[K]`.

    NaN for a class that neither occurs nor is predicted.
    """
    confusion = np.asarray(confusion, np.float64)
    return _ratio(2 * np.diagonal(confusion), confusion.sum(axis=0) + confusion.sum(axis=1))


def share_recognised(probabilities: ArrayLike, threshold: float = 0.9) -> float:
    """The share of samples whose largest class probability exceeds `threshold`, in [0, 1].

    Args:
        probabilities: `[N, K]`, each row a distribution (a row of logits is refused).
        threshold: in [0, 1); a sample at exactly the threshold does not count.

    Raises:
        ValueError: no samples, or a row is not a distribution.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or len(probabilities) == 0:
        raise ValueError(f"probabilities must be [N, K] with N >= 1 but have shape {probabilities.shape}")
    # The sum of K float32 or bfloat16 terms; logits miss 1 by far more. A NaN fails both comparisons.
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-2).all() or not (probabilities >= 0).all():
        raise ValueError("each row of probabilities must be >= 0 and sum to 1")
    return float((probabilities.max(axis=1) > threshold).mean())


def class_histogram(labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """How often each class occurs among `labels` `[N]`: `[K]` int64."""
    return np.bincount(_labels(labels, num_classes), minlength=num_classes)


def class_entropy(histogram: ArrayLike) -> float:
    """The entropy of the class frequencies, -sum_k f_k log f_k, in nats, from counts `[K]`.

    log K where every class occurs equally often, 0 where all samples fell to one class (mode collapse).

    Raises:
        ValueError: the counts are all zero, or one is negative.
    """
    counts = np.asarray(histogram, np.float64)
    if counts.ndim != 1 or counts.sum() <= 0 or (counts < 0).any():
        raise ValueError("a histogram must be [K] counts >= 0 with at least one item")
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.abs(-np.sum(frequencies * np.log(frequencies))))  # abs: -0.0 of one class reads badly
