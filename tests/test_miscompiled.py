"""What XLA on CPU computes wrongly is refused in tests, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import miscompiled
import numpy as np
import pytest

X = np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)


def _largest(x, weight):
    return jnp.max(x @ weight, axis=1)


def test_a_product_with_a_repeated_number_inside_a_reduction_is_refused():
    if "__ynn_fusion" not in jax.jit(_largest).lower(X, WEIGHT).compile().as_text():
        pytest.skip("this jaxlib does not fuse reductions by YNNPACK here")
    zeros = jnp.zeros((64, 10))
    for program in (
        lambda x, number: _largest(x, jnp.full((64, 10), number)),
        lambda x, _: _largest(x, jnp.zeros((64, 10))),
        lambda x, _: _largest(x, zeros),
    ):
        with pytest.raises(miscompiled.Miscompiled, match="one repeated number"):
            jax.jit(program)(X, 2.0)


def test_other_products_are_right_and_are_not_refused():
    for weight in (WEIGHT, np.zeros_like(WEIGHT)):
        found = jax.jit(_largest)(X, weight)
        np.testing.assert_allclose(found, np.max(X @ weight, axis=1), rtol=1e-5, atol=1e-5)
    row = jax.jit(lambda x, row: _largest(x, jnp.broadcast_to(row[None], (64, 10))))(X, WEIGHT[0])
    np.testing.assert_allclose(row, np.max(X @ np.tile(WEIGHT[0], (64, 1)), axis=1), rtol=1e-4, atol=1e-4)
    alone = jax.jit(lambda x: x @ jnp.ones((64, 10)))(X)
    np.testing.assert_allclose(alone, np.tile(X.sum(axis=1, keepdims=True), 10), rtol=1e-4, atol=1e-4)
