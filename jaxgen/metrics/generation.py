"""Scores of samples besides the Fréchet distance: Inception score, kernel distance, precision and recall.

All take what a feature network made of the images, so they are as good as that network; show its name, and
the counts, with every number. Blocks of rows keep memory to a few megabytes whatever the number of samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 1024


def _features(x: ArrayLike, name: str, least: int) -> NDArray[np.float64]:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name} must be [N, D] with N of at least {least}, but the shape is {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} hold a NaN or an infinity")
    return x


def inception_score(probabilities: ArrayLike, num_splits: int = 1) -> NDArray[np.float64]:
    """exp E_x KL(p(y | x) || p(y)) of each of `num_splits` equal parts (Salimans et al. 2016, section 4).

    Args:
        probabilities: `[N, K]`, rows that sum to one: p(y | x) of the samples.
        num_splits: published scores are the mean and deviation over 10 parts; the rest of N is left out.

    Returns:
        `[num_splits]`, each in [1, K]: 1 where all rows of a part are alike.

    Raises:
        ValueError: rows are no distributions, or there are fewer of them than parts.
    """
    p = _features(probabilities, "probabilities", max(num_splits, 1))
    if (p < 0).any() or np.abs(p.sum(axis=1) - 1).max() > 1e-4:
        raise ValueError("the rows of probabilities must be distributions: non-negative, with the sum 1")
    if num_splits < 1:
        raise ValueError(f"the number of parts must be at least 1, not {num_splits}")
    size = len(p) // num_splits
    scores = []
    for part in p[: size * num_splits].reshape(num_splits, size, -1):
        marginal = part.mean(axis=0)[None]
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 = 0
            terms = np.where(part > 0, part * np.log(part / marginal), 0.0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return np.asarray(scores)


def polynomial_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018, section 3): `[N, D]`, `[M, D]` -> `[N, M]`."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kernel_distance(samples: ArrayLike, reference: ArrayLike) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3): the KID.

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j) with `polynomial_kernel`. Of
    two sets from one distribution its expectation is 0, whatever their sizes, so it may be negative;
    published numbers are means over random subsets of 1,000, which have the same expectation.

    Args:
        samples, reference: features `[N, D]`, `[M, D]` with N, M >= 2, read as float64.

    Raises:
        ValueError: shapes do not agree, or a value is not finite.
    """
    x, y = _features(samples, "samples", 2), _features(reference, "reference", 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")

    def total(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return sum(polynomial_kernel(a[i : i + _BLOCK], b).sum() for i in range(0, len(a), _BLOCK))

    def among(a: NDArray[np.float64]) -> float:
        diagonal = ((np.square(a).sum(axis=1) / a.shape[1] + 1.0) ** 3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(among(x) + among(y) - 2.0 * total(x, y) / (len(x) * len(y)))


def precision_and_recall(samples: ArrayLike, reference: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A point is in a set's manifold where it lies within the distance of some point of the set to that point's
    k-th nearest neighbour in the set. Precision is the share of samples in the manifold of the reference,
    recall the share of the reference in the manifold of the samples; both fall with fewer points.

    Args:
        samples, reference: features `[N, D]`, `[M, D]` with N, M > k, read as float64.

    Raises:
        ValueError: shapes do not agree, a value is not finite, or k is not in 1 ... min(N, M) - 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    x, y = _features(samples, "samples", k + 1), _features(reference, "reference", k + 1)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    return _share_within(x, y, _radii(y, k)), _share_within(y, x, _radii(x, k))


def _squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None] - 2.0 * x @ y.T
    return np.maximum(squares, 0.0)


def _radii(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """The squared distance of each point to its k-th nearest neighbour, itself not counted, `[N]`."""
    radii = []
    for start in range(0, len(x), _BLOCK):
        distances = _squared_distances(x[start : start + _BLOCK], x)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = -1.0  # the point itself comes first, duplicates after it
        radii.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(radii)


def _share_within(
    points: NDArray[np.float64], centres: NDArray[np.float64], radii: NDArray[np.float64]
) -> float:
    within = [
        (_squared_distances(points[i : i + _BLOCK], centres) <= radii[None]).any(axis=1)
        for i in range(0, len(points), _BLOCK)
    ]
    return float(np.concatenate(within).mean())
