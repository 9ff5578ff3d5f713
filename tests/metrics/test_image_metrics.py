import numpy as np
import pytest

from jaxgen.metrics.images import psnr, ssim
from jaxgen.types import UserError

RNG = np.random.default_rng(0)
TRUTH = RNG.uniform(0, 255, (3, 24, 31, 3))
NOISY = TRUTH + RNG.normal(size=TRUTH.shape) * np.array([5.0, 20.0, 60.0])[:, None, None, None]


def test_psnr_by_hand():
    # An error of 25.5 in every pixel is a tenth of the range: 20 dB.
    np.testing.assert_allclose(psnr(TRUTH + 25.5, TRUTH, 255.0), 20.0, rtol=1e-12)
    assert np.isinf(psnr(TRUTH, TRUTH, 255.0)).all()


def test_ssim_of_constants_is_its_luminance_term():
    a, b = np.full((1, 12, 12, 1), 0.3), np.full((1, 12, 12, 1), 0.5)
    c1 = 0.01**2
    np.testing.assert_allclose(ssim(a, b, 1.0), (2 * 0.15 + c1) / (0.09 + 0.25 + c1), rtol=1e-9)
    np.testing.assert_allclose(ssim(TRUTH, TRUTH, 255.0), 1.0, rtol=1e-12)


def test_agreement_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    for i in range(3):
        a, b = NOISY[i], TRUTH[i]
        expected = metrics.peak_signal_noise_ratio(b, a, data_range=255.0)
        np.testing.assert_allclose(psnr(a[None], b[None], 255.0), expected, rtol=1e-10)
        expected = metrics.structural_similarity(
            a, b, data_range=255.0, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
        )
        np.testing.assert_allclose(ssim(a[None], b[None], 255.0), expected, rtol=1e-8)


def test_bad_arguments():
    with pytest.raises(UserError, match="at least 11"):
        ssim(TRUTH[:, :10], TRUTH[:, :10], 255.0)
    with pytest.raises(ValueError, match="alike"):
        psnr(TRUTH, TRUTH[:1], 255.0)
