import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import ncsn
from jaxgen.models.ncsn import NCSN, ConditionalInstanceNorm, DilatedConv
from jaxgen.types import UserError

RNG = np.random.default_rng(0)


def image(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def count(model, *shape):
    init = functools.partial(model.init, jax.random.key(0))
    variables = jax.eval_shape(init, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_the_published_networks_have_their_number_of_parameters():
    # Counted in the authors' PyTorch code (ermongroup/ncsn, CondRefineNetDilated, 10 levels).
    assert count(NCSN(), 32, 32, 3) == 30_117_635


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10)])
@pytest.mark.parametrize("dilation", [2, 4])
def test_dilated_convolution_is_xla_s(height, width, dilation):
    x, kernel, bias = image(2, height, width, 3), image(3, 3, 3, 4), image(4)
    params = {"conv": {"kernel": kernel, "bias": bias}}
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(dilation, dilation)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    ours = DilatedConv(4, dilation).apply({"params": params}, x)
    np.testing.assert_allclose(ours, expected + bias[None, None, None], atol=1e-5)


def test_conditional_instance_norm_by_hand():
    x, table = image(2, 4, 6, 3), image(5, 9)
    level = jnp.array([3, 1])
    ours = ConditionalInstanceNorm(5).apply({"params": {"embedding": table}}, x, level)
    for i in range(2):
        a = np.asarray(x[i], np.float64)
        gamma, alpha, beta = np.asarray(table, np.float64)[int(level[i])].reshape(3, 3)
        means = a.mean(axis=(0, 1))
        z = (means - means.mean()) / np.sqrt(means.var(ddof=1) + 1e-5)
        h = (a - means) / np.sqrt(a.var(axis=(0, 1)) + 1e-5)
        np.testing.assert_allclose(ours[i], gamma * (h + alpha * z) + beta, atol=1e-4)


def test_resizing_puts_corners_on_corners():
    x = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])[None, ..., None]
    expected = np.linspace(0, 2, 5)[:, None] + np.linspace(0, 1, 3)[None]
    np.testing.assert_allclose(ncsn.resize_corners(x, (5, 3))[0, :, :, 0], expected, atol=1e-6)


def test_windows_and_pools():
    x = image(1, 6, 6, 1)
    padded = np.pad(np.asarray(x, np.float64)[0, :, :, 0], 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    np.testing.assert_allclose(ncsn.mean_of_window(x)[0, :, :, 0], windows.mean(axis=(2, 3)), atol=1e-6)
    np.testing.assert_allclose(ncsn.mean_pool(x)[0, 1, 2, 0], x[0, 2:4, 4:6, 0].mean(), atol=1e-6)


def test_shapes_and_bad_sizes():
    model = NCSN(2, 3)
    out = jax.eval_shape(
        lambda x, k: model.init_with_output(jax.random.key(0), x, k)[0],
        jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    assert (out.shape, out.dtype) == ((2, 28, 28, 1), jnp.float32)
    with pytest.raises(UserError, match="even"):
        count(model, 7, 8, 1)
    with pytest.raises(UserError, match="features"):
        count(NCSN(0), 8, 8, 1)
