"""The Fréchet distance between two sets of features, each summed up as a Gaussian, in float64 on the host.

With the features of an Inception network this is the FID; with those of a classifier of the data at hand it
is the same measure in another space, not to be set beside a published FID. It depends on the number of
samples: show both counts with it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Relative to the largest entry. Rounding in a float64 covariance stays far below this; a matrix further from
# symmetric, or with a more negative eigenvalue, is no covariance.
_COVARIANCE_TOLERANCE = 1e-8


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter of a set of features: what their Gaussian needs, mergeable and order-free.

    count: number of samples N
    mean: [D] float64
    scatter: [D, D] float64, the centred sum of squares sum_i (x_i - mean)(x_i - mean)^T
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """The statistics of no samples of `dim` features: the neutral element of `merge`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: ArrayLike) -> FeatureStatistics:
        """The statistics of one batch of features `[N, D]` of any float dtype (converted to float64 first).

        Raises:
            ValueError: `features` is not `[N, D]`, or holds a value that is not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2:
            raise ValueError(f"features must be [N, D] but have shape {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError("features hold a NaN or an infinity, so they have no Gaussian")
        if len(x) == 0:
            return cls.empty(x.shape[1])
        mean = x.mean(axis=0)
        centred = x - mean[None, :]
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together (Chan, Golub & LeVeque 1979, the parallel update).

        Raises:
            ValueError: the two sets have features of different dimensions.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge features of dimension {self.mean.size} with {other.mean.size}")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return FeatureStatistics(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance `[D, D]`, scatter / (N - 1), as the published FID takes it.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, but there is {self.count}")
        return self.scatter / (self.count - 1)


def _psd_sqrt(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root of a positive semi-definite matrix, by its eigendecomposition."""
    scale = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > _COVARIANCE_TOLERANCE * scale:
        raise ValueError("a covariance must be symmetric")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values.min(initial=0.0) < -_COVARIANCE_TOLERANCE * scale * len(sigma):
        raise ValueError(f"a covariance must have no negative eigenvalue, but has {values.min()}")
    # The zeros of a singular covariance (N <= D) come out as rounding errors of either sign, and the root of
    # 1e-16 is 1e-8: what lies below the resolution of float64 is zero.
    values = np.where(values > len(sigma) * np.finfo(np.float64).eps * values.max(initial=0.0), values, 0.0)
    return (vectors * np.sqrt(values)[None, :]) @ vectors.T


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """The squared Fréchet (2-Wasserstein) distance between the Gaussians N(mu1, sigma1) and N(mu2, sigma2).

    |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))   (Heusel et al. 2017, eq. 6)

    The last trace is Tr (sigma1^(1/2) sigma2 sigma1^(1/2))^(1/2), which is the sum of the singular values of
    sigma1^(1/2) sigma2^(1/2). In that form all is real, and singular covariances (N <= D) need no offset on
    the diagonal.

    Args:
        mu1, mu2: `[D]` means, read as float64.
        sigma1, sigma2: `[D, D]` covariances, read as float64.

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        ValueError: shapes do not agree, or a matrix is no covariance.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(x, np.float64) for x in (mu1, mu2, sigma1, sigma2))
    dim = mu1.size
    if not (mu1.shape == mu2.shape == (dim,) and sigma1.shape == sigma2.shape == (dim, dim)):
        raise ValueError(
            "means must be [D] and covariances [D, D], but the shapes are "
            f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}"
        )
    cross = np.linalg.svd(_psd_sqrt(sigma1) @ _psd_sqrt(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2.0 * cross
    return max(float(distance), 0.0)  # of equal Gaussians, rounding may leave about -1e-15


def frechet_between(
    samples: FeatureStatistics, reference: FeatureStatistics, *, num_samples: int, num_reference: int
) -> float:
    """`frechet_distance` of two sets of features, after making sure of the counts the caller will report.

    The distance falls with the number of samples, so a set that came out short (a dropped last batch, a shard
    counted twice) gives a number that looks right and is not.

    Raises:
        ValueError: a set does not hold the stated number of samples.
    """
    for name, statistics, num in (("samples", samples, num_samples), ("reference", reference, num_reference)):
        if statistics.count != num:
            raise ValueError(f"the {name} should hold {num} items but hold {statistics.count}")
    return frechet_distance(samples.mean, samples.covariance, reference.mean, reference.covariance)
