"""Linear layers on two axes give what flax's give, and their programs multiply two matrices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.dense import Dense, embedding_logits, flat_matmul


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
    for function, arguments in ((flat_matmul, (x, jnp.ones((5, 7)))), (layer.apply, (params, x))):
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
