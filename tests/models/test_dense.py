"""Linear layers on two axes give what flax's give, and their programs multiply two matrices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.dense import Dense, embedding_logits
from jaxgen.models.products import affine


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_layer_is_that_of_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    params = nn.Dense(7).init(jax.random.key(1), x)
    square = lambda layer: lambda params, x: jnp.sum(jnp.square(layer.apply(params, x)))
    np.testing.assert_allclose(Dense(7).apply(params, x), nn.Dense(7).apply(params, x), rtol=1e-6, atol=1e-6)
    given, wanted = (jax.grad(square(layer), (0, 1))(params, x) for layer in (Dense(7), nn.Dense(7)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), given, wanted)


def test_the_product_has_two_axes_whatever_the_input_has():
    x, layer = jnp.ones((2, 3, 4, 5)), Dense(7)
    params = layer.init(jax.random.key(0), x)
    for function, arguments in ((affine, (x, jnp.ones((5, 7)))), (layer.apply, (params, x))):
        program = jax.jit(function).lower(*arguments).as_text()
        assert "tensor<24x5xf32>, tensor<5x7xf32>" in program
        assert program.count("dot_general") == 1


def test_a_head_tied_to_the_embedding():
    embedding = nn.Embed(11, 5)
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    variables = embedding.init(jax.random.key(1), jnp.zeros((1,), jnp.int32))
    bound = embedding.bind(variables)
    logits = embedding_logits(bound, x)
    table = variables["params"]["embedding"]
    np.testing.assert_allclose(logits, jnp.einsum("btd,vd->btv", x, table), rtol=1e-5, atol=1e-6)


def test_bfloat16_factors_and_float32_sums_forwards_and_backwards():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 50, 64), jnp.bfloat16)
    params = nn.Dense(48).init(keys[1], x)
    g = jax.random.normal(keys[2], (6, 50, 48), jnp.bfloat16).astype(jnp.float32)
    half = Dense(48, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    result, pull = jax.vjp(half.apply, params, x)
    # What the same factors, rounded the same way, give in float32: only the order of sums differs.
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    wanted, wanted_pull = jax.vjp(nn.Dense(48).apply, rounded, x.astype(jnp.float32))
    wanted = wanted + (params["params"]["bias"] - rounded["params"]["bias"])[None, None]  # b is not rounded
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
    (given, given_x), (expected, expected_x) = pull(g), wanted_pull(g)
    chex.assert_trees_all_equal_dtypes(given, params)
    chex.assert_trees_all_close(given, expected, rtol=1e-5, atol=1e-4)
    assert given_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(given_x.astype(jnp.float32), expected_x, rtol=2**-8)
    assert half.clone(out_dtype=None).apply(params, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("use_bias", [True, False])
def test_no_product_of_a_bfloat16_layer_has_a_float32_factor(use_bias):
    x = jnp.ones((6, 50, 64), jnp.bfloat16)
    layer = Dense(48, use_bias=use_bias, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    loss = lambda params, x: jnp.sum(jnp.square(layer.apply(params, x).astype(jnp.float32)))
    program = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for product in products:
        factors, result = product.rsplit(" : ", 1)[1].split(" -> ")
        assert factors.count("bf16>") == 2
        assert result.endswith("f32>")


def test_bfloat16_parameters_of_a_float32_layer():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    layer = Dense(7, param_dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(1), x)
    wanted = nn.Dense(7, dtype=jnp.float32).apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x), wanted, rtol=1e-6, atol=1e-6)
