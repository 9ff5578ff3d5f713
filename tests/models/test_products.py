"""Products with float32 sums against NumPy's in float64, and what their gradients multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.products import affine, inner_products, matmul, transposed, transposed_matmul


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 63, 64, 130])  # from 64 on another order of the factors is taken
@pytest.mark.parametrize("columns", [1, 9, 20])
def test_products_of_stacks_are_numpys(rows, columns, dtype):
    x, y, z = _matrices((3, rows, 20), (3, columns, 20), (3, rows, columns), dtype=dtype)
    a, b, c = exact(x, y, z)
    close = lambda given, wanted: np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=2e-5)
    close(jax.jit(inner_products)(x, y), a @ np.swapaxes(b, 1, 2))
    close(jax.jit(matmul)(z, y), c @ b)
    close(jax.jit(transposed_matmul)(x, z), np.swapaxes(a, 1, 2) @ c)
    np.testing.assert_array_equal(jax.jit(transposed)(x), jnp.swapaxes(x, 1, 2))


@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize("product", [inner_products, matmul])
def test_gradients_are_numpys_from_bfloat16_factors(product, rows):
    x, y, g = _matrices((3, rows, 20), (3, 9, 20) if product is inner_products else (3, 20, 9), (3, rows, 9))
    pull = jax.jit(lambda x, y, g: jax.vjp(product, x, y)[1](g.astype(jnp.float32)))
    a, b, c = exact(x, y, g)
    turned = lambda a: np.swapaxes(a, 1, 2)
    wanted = (c @ b, turned(c) @ a) if product is inner_products else (c @ turned(b), turned(a) @ c)
    for given, exactly in zip(pull(x, y, g), wanted, strict=True):
        assert given.dtype == jnp.bfloat16
        np.testing.assert_allclose(given.astype(jnp.float32), exactly, rtol=2**-8, atol=1e-5)
    program = pull.lower(x, y, g).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2
    for line in products:
        assert line.rsplit(" : ", 1)[1].split(" -> ")[0].count("bf16>") == 2


@pytest.mark.parametrize("product", [inner_products, matmul])
def test_factors_have_the_first_ones_dtype_and_gradients_their_own(product):
    x, y = _matrices((1, 70, 20), (1, 9, 20) if product is inner_products else (1, 20, 9))
    parameters = y.astype(jnp.float32) * 1.001  # no bfloat16 numbers
    value, pull = jax.vjp(product, x, parameters)
    np.testing.assert_array_equal(value, product(x, parameters.astype(jnp.bfloat16)))
    gradients = pull(jnp.ones_like(value))
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    sums = np.sum(exact(x)[0], axis=(0, 1))  # with float32 sums, not rounded to bfloat16
    wanted = np.broadcast_to(sums if product is inner_products else sums[:, None], y.shape)
    np.testing.assert_allclose(gradients[1], wanted, rtol=1e-5, atol=1e-5)
    assert product(x.astype(jnp.float32), y).dtype == jnp.float32


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_an_affine_map_is_numpys(bias):
    x, w, b, g = _matrices((70, 20), (20, 9), (9,), (70, 9))
    run = jax.jit(lambda x, w, b, g: jax.vjp(affine, x, w, b)[1](g.astype(jnp.float32)))
    given = run(x, w.astype(jnp.float32), b.astype(jnp.float32) if bias else None, g)
    a, c, _, d = exact(x, w, b, g)
    np.testing.assert_allclose(given[0].astype(jnp.float32), d @ c.T, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(given[1], a.T @ d, rtol=1e-5, atol=2e-5)
    if bias:
        np.testing.assert_allclose(given[2], d.sum(axis=0), rtol=1e-5, atol=2e-5)


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
