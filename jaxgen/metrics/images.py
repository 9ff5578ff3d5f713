"""How near a restored image comes to the true one: PSNR and SSIM, as scikit-image computes them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from jaxgen.types import UserError


def _pair(image: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images are [B, H, W, C], both alike, not {a.shape} and {b.shape}")
    return a, b


def psnr(image: ArrayLike, truth: ArrayLike, data_range: float) -> np.ndarray:
    """10 log10(data_range^2 / mean squared error) in dB, float64 [B]; infinite where the two agree.

    image, truth: [B, H, W, C]
    data_range: the largest difference that two pixels can have: 255 for bytes, 2 for [-1, 1]
    """
    a, b = _pair(image, truth)
    error = np.mean(np.square(a - b), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def ssim(
    image: ArrayLike,
    truth: ArrayLike,
    data_range: float,
    *,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> np.ndarray:
    """Structural similarity, float64 [B]: the mean over windows inside the image, and over channels.

    ((2 m_a m_b + c1) (2 s_ab + c2)) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2)) with c_i = (k_i
    data_range)^2, means and (co)variances taken with Gaussian weights of `sigma` in a window of 2 round(3.5
    sigma) + 1 = 11 pixels (Wang, Bovik, Sheikh & Simoncelli 2004, eq. 13, with its constants). It is
    scikit-image's structural_similarity with gaussian_weights=True and use_sample_covariance=False.

    image, truth, data_range: as `psnr`

    Raises UserError for images smaller than the window.
    """
    a, b = _pair(image, truth)
    radius = math.floor(3.5 * sigma + 0.5)
    if min(a.shape[1:3]) < 2 * radius + 1:
        raise UserError(f"SSIM needs images of at least {2 * radius + 1} pixels a side, not {a.shape[1:3]}.")
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    weights /= weights.sum()

    def local_mean(x: np.ndarray) -> np.ndarray:
        height, width = x.shape[1] - 2 * radius, x.shape[2] - 2 * radius
        rows = sum(w * x[:, i : i + height] for i, w in enumerate(weights))
        return np.asarray(sum(w * rows[:, :, i : i + width] for i, w in enumerate(weights)))

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a = local_mean(a * a) - mean_a**2
    var_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return similarity.mean(axis=(1, 2, 3))
