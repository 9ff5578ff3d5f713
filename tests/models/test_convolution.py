"""The convolution and the gradient that replaces XLA's on CPU."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import convolution

CASES = [
    (kernel, stride, padding, size)
    for kernel in (1, 3, 5)
    for stride in (1, 2)
    for padding in (((1, 1), (1, 1)), ((0, 1), (2, 0)), ((2, 2), (1, 2)))
    for size in ((8, 8), (7, 9))
]


def _inputs(kernel, size, dtype=jnp.float32, channels=3):
    x_key, k_key, g_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (2, *size, channels), dtype)
    return x, jax.random.normal(k_key, (kernel, kernel, channels, 4), dtype), g_key


def test_it_is_cross_correlation():
    x, kernel, _ = _inputs(3, (5, 6))
    found = convolution.conv2d(x, kernel, 2, ((0, 1), (1, 1)))
    padded = np.pad(np.asarray(x), ((0, 0), (0, 1), (1, 1), (0, 0)))
    for i in range(found.shape[1]):
        for j in range(found.shape[2]):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, :]
            expected = np.einsum("bhwc,hwcd->bd", window, np.asarray(kernel))
            np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_gradients_are_those_of_the_plain_convolution(kernel, stride, padding, size):
    x, k, g_key = _inputs(kernel, size)
    _, plain = jax.vjp(lambda x, k: convolution._conv(x, k, stride, padding), x, k)
    y, own = jax.vjp(lambda x, k: convolution._conv_with_own_gradient(x, k, stride, padding), x, k)
    g = jax.random.normal(g_key, y.shape)
    for found, expected in zip(own(g), plain(g), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [1, 10_000], ids=["image by image", "whole"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3), 1, ((1, 1), (1, 1))),
        ((3, 3), 2, ((0, 1), (0, 1))),
        ((4, 4), 2, ((1, 1), (1, 1))),
        ((2, 5), 1, ((1, 0), (2, 2))),
        ((2, 2), 3, ((0, 0), (0, 0))),  # no kernel row for one row of x in three
        ((7, 7), 1, ((0, 0), (0, 0))),
        ((3, 3), 1, ((4, 3), (3, 5))),
    ],
)
def test_gradient_of_the_kernel_by_products_of_matrices(kernel, stride, padding, cached, monkeypatch):
    monkeypatch.setattr(convolution, "_CACHED", cached)
    monkeypatch.setattr(convolution, "_products_are_faster", lambda kernel: True)
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, 9, 8, 4)))
    k = jnp.float32(rng.normal(size=(*kernel, 4, 5)))
    y, own = jax.vjp(lambda k: convolution._conv_with_own_gradient(x, k, stride, padding), k)
    _, plain = jax.vjp(lambda k: convolution._conv(x, k, stride, padding), k)
    g = jnp.float32(rng.normal(size=y.shape))
    (found,), (expected,) = own(g), plain(g)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [3, 16], ids=["convolution", "products"])
def test_second_derivatives_agree(channels):
    x, k, _ = _inputs(3, (6, 6), channels=channels)
    assert convolution._products_are_faster(k) == (channels == 16)

    def penalty(conv):
        energy = lambda x, k: jnp.sum(jnp.tanh(conv(x, k, 1, ((1, 1), (1, 1)))))
        return jax.grad(lambda k: jnp.sum(jnp.square(jax.grad(energy)(x, k))))(k)

    own = penalty(convolution._conv_with_own_gradient)
    np.testing.assert_allclose(own, penalty(convolution._conv), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 16], ids=["convolution", "products"])
def test_bfloat16_and_vmap(channels):
    x, k, _ = _inputs(3, (6, 6), jnp.bfloat16, channels)
    loss = lambda conv: lambda k: jnp.sum(conv(x, k, 1, ((1, 1), (1, 1))).astype(jnp.float32) ** 2)
    own = jax.grad(loss(convolution._conv_with_own_gradient))(k)
    plain = jax.grad(loss(convolution._conv))(k)
    assert own.dtype == jnp.bfloat16
    np.testing.assert_allclose(own.astype(jnp.float32), plain.astype(jnp.float32), rtol=0.05, atol=0.5)
    kernels = jnp.stack([k, 2 * k]).astype(jnp.float32)
    conv = lambda k: convolution.conv2d(x.astype(jnp.float32), k, 1, ((1, 1), (1, 1)))
    gradients = jax.vmap(jax.grad(lambda k: jnp.sum(conv(k) ** 2)))(kernels)
    np.testing.assert_allclose(gradients[1], 2 * gradients[0], rtol=1e-4)


def test_inside_a_scan_it_is_as_fast_as_outside():
    """The trap that the own gradient is for: with XLA's, the loop takes 30 to 100 times its steps' time."""
    x = jax.random.normal(jax.random.key(0), (32, 8, 8, 16))
    k = jax.random.normal(jax.random.key(1), (3, 3, 16, 16)) * 0.1
    conv = lambda x, k: convolution.conv2d(x, k, 1, ((1, 1), (1, 1)))
    update = lambda k, _=None: (k - 1e-6 * jax.grad(lambda k: jnp.sum(conv(conv(x, k), k) ** 2))(k), None)
    one = jax.jit(update)
    twenty = jax.jit(lambda k: jax.lax.scan(update, k, length=20))

    def seconds(run):
        jax.block_until_ready(run(k))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(run(k))
            times.append(time.perf_counter() - start)
        return min(times)

    # Ten times leaves room for a busy machine, and still catches a factor of thirty.
    assert seconds(twenty) / 20 < 10 * seconds(one)
