"""Products with float32 sums against NumPy's in float64, and what their gradients multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.products import affine, inner_products, transposed_matmul


def test_float64_stays_float64():
    with jax.enable_x64(True):
        assert affine(jnp.ones((3, 2), jnp.float64), jnp.ones((2, 5), jnp.float64)).dtype == jnp.float64


def _matrices(*shapes, dtype=jnp.bfloat16):
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(_keys(shapes), shapes, strict=True)]


def _keys(shapes):
    return jax.random.split(jax.random.key(0), len(shapes))


def exact(*arrays):
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_numpys(dtype):
    x, y, z = _matrices((37, 20), (37, 30), (20, 30), dtype=dtype)
    a, b, c = exact(x, y, z)
    close = lambda given, wanted: np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-5)
    close(jax.jit(transposed_matmul)(x, y), a.T @ b)
    close(jax.jit(affine)(x, z), a @ c)
    close(jax.jit(affine)(x, z, y[0]), a @ c + b[0])
    u, v = _matrices((3, 7, 20), (3, 9, 20), dtype=dtype)
    close(jax.jit(inner_products)(u, v), np.einsum("bnd,bmd->bnm", *exact(u, v)))


def test_the_gradient_of_inner_products_is_numpys_from_bfloat16_factors():
    x, y, g = _matrices((3, 7, 20), (3, 9, 20), (3, 7, 9))
    pull = jax.jit(lambda x, y, g: jax.vjp(inner_products, x, y)[1](g.astype(jnp.float32)))
    a, b, c = exact(x, y, g)
    for given, wanted in zip(pull(x, y, g), (c @ b, np.swapaxes(c, 1, 2) @ a), strict=True):
        assert given.dtype == jnp.bfloat16
        np.testing.assert_allclose(given.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)
    program = pull.lower(x, y, g).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2
    for product in products:
        assert product.rsplit(" : ", 1)[1].split(" -> ")[0].count("bf16>") == 2


def test_second_derivatives():
    x, y = _matrices((5, 4), (4, 3))
    energy = lambda x: jnp.sum(jnp.tanh(affine(x, y)))
    slope = lambda x: jnp.sum(jnp.square(jax.grad(energy)(x).astype(jnp.float32)))
    wide = lambda x: jnp.sum(jnp.tanh(affine(x, y.astype(jnp.float32))))
    wide_slope = lambda x: jnp.sum(jnp.square(jax.grad(wide)(x)))
    given, wanted = jax.grad(slope)(x), jax.grad(wide_slope)(x.astype(jnp.float32))
    # Three products deep with factors of 8 bits.
    difference = jnp.linalg.norm(given.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
    assert difference < 0.02
