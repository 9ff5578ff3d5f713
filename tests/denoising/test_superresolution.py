"""What super-resolution starts from and is told: the blur and thinning out, and bicubic interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from experiments.common import restoring
from jaxgen import operators
from jaxgen.data.natural import gaussian_kernel

CONFIG = ConfigDict(
    {
        "restoration": {
            "noise": 1.0,
            "num_steps": 300,
            "dmsp_sigma": 20.0,
            "hqs_sigma_max": 200.0,
            "hqs_steps": 20,
        },
        "evaluation": {"factor": 2, "factor_blur": 0.8},
    }
)


@pytest.mark.parametrize(("factor", "std"), [(1, 0.5), (2, 1.0), (3, 1.6)])
def test_low_resolution_is_scipys_blur_and_every_factor_th_pixel(factor, std):
    x = np.random.default_rng(0).uniform(-1, 1, (12, 18))
    found = restoring.low_resolution(factor, std).apply(jnp.asarray(x[None, :, :, None], jnp.float32))
    blurred = ndimage.gaussian_filter(x, std, mode="nearest", radius=3)
    np.testing.assert_allclose(found[0, :, :, 0], blurred[::factor, ::factor], atol=1e-5)


def test_the_gaussian_kernel_sums_to_one_and_falls_as_it_should():
    kernel = gaussian_kernel(7, 1.6)
    assert kernel.sum() == pytest.approx(1.0)
    assert kernel[3, 5] / kernel[3, 3] == pytest.approx(np.exp(-(2**2) / (2 * 1.6**2)))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_bicubic_interpolation_moves_nothing(factor):
    """It goes through the given pixels, and a plane is a plane away from the borders."""
    y = np.random.default_rng(1).uniform(-1, 1, (2, 8, 9, 1)).astype(np.float32)
    found = restoring.enlarged(jnp.asarray(y), factor)
    assert found.shape == (2, 8 * factor, 9 * factor, 1)
    np.testing.assert_allclose(found[:, ::factor, ::factor], y, atol=1e-5)
    rows, columns = np.mgrid[: 8 * factor, : 9 * factor] / factor
    plane = (0.1 * rows - 0.05 * columns)[None, :, :, None].astype(np.float32)
    found = restoring.enlarged(jnp.asarray(plane[:, ::factor, ::factor]), factor)
    edge = 2 * factor
    np.testing.assert_allclose(found[:, edge:-edge, edge:-edge], plane[:, edge:-edge, edge:-edge], atol=1e-5)


def test_a_prior_that_knows_the_images_betters_bicubic_interpolation():
    """Stripes of two pixels, thinned out to one each; the prior, a Gaussian around them, has their edges."""
    truth = jnp.asarray(np.where(np.arange(16) // 2 % 2, 0.8, -0.8), jnp.float32)
    truth = jnp.broadcast_to(truth[None, None, :, None], (3, 16, 16, 1))
    width = 0.1

    def denoiser(x, sigma):
        weight = (width**2 / (width**2 + sigma**2))[:, None, None, None]
        return truth + weight * (x - truth)

    y = operators.observe(restoring.low_resolution(2, 0.8), truth, restoring.unit(1.0), jax.random.key(0))
    errors = {
        name: float(jnp.mean(jnp.square(method(jax.random.key(1)) - truth)))
        for name, method in restoring.superresolutions(CONFIG, denoiser, y).items()
    }
    assert errors.keys() == {"bicubic", "dmsp", "hqs"}
    assert errors["hqs"] < 0.1 * errors["bicubic"]
    assert errors["dmsp"] < 0.5 * errors["bicubic"]
    assert restoring.superresolutions(CONFIG, None, y).keys() == {"bicubic"}
