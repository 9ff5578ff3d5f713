"""Dropout: frequencies, means and independence of what is kept, and when nothing is dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.dropout import Dropout, drop


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.75])
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_a_share_is_zero_and_the_rest_is_scaled(rate, columns, dtype):
    x = jnp.full((200_000 // columns, columns), 3.0, dtype)
    y = np.asarray(jax.jit(drop, static_argnums=2)(jax.random.key(0), x, rate), np.float64)
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    scaled = np.asarray(jnp.asarray(3.0 / (1 - rate), dtype), np.float64)
    np.testing.assert_allclose(y[kept], scaled, rtol=2**-15 if dtype == jnp.float32 else 2**-8)


def test_places_are_independent_those_of_one_random_word_too():
    kept = np.asarray(drop(jax.random.key(1), jnp.ones((100_000, 4)), 0.5)) != 0
    correlation = np.corrcoef(kept, rowvar=False) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(kept))
    assert np.abs(np.mean(kept, axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(kept))


def test_rates_of_nothing_and_of_all():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(drop(jax.random.key(0), x, 0.0), x)
    np.testing.assert_array_equal(drop(jax.random.key(0), x, 1.0), jnp.zeros_like(x))
    gradient = jax.grad(lambda x: jnp.sum(drop(jax.random.key(0), x, 1.0)))(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


def test_the_gradient_passes_where_the_value_did():
    x = jax.random.normal(jax.random.key(0), (5, 9))
    y, pull = jax.vjp(lambda x: drop(jax.random.key(3), x, 0.5), x)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], np.where(np.asarray(y) != 0, 2.0, 0.0))


def test_the_layer_draws_from_its_stream_and_shares_masks_along_axes():
    x = jnp.ones((4, 50, 6))
    run = lambda layer, seed, **how: layer.apply({}, x, **how, rngs={"dropout": jax.random.key(seed)})
    layer = Dropout(0.5)
    first = run(layer, 0, deterministic=False)
    np.testing.assert_array_equal(run(layer, 0, deterministic=False), first)
    assert np.any(run(layer, 1, deterministic=False) != first)
    shared = np.asarray(run(Dropout(0.5, broadcast_dims=(1,), deterministic=False), 0))
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:, :1], shared.shape))
    assert 0 < (shared[:, 0] != 0).sum() < 24
    for quiet in (layer.apply({}, x, deterministic=True), Dropout(0.0).apply({}, x, deterministic=False)):
        np.testing.assert_array_equal(quiet, x)


def test_linens_layer_in_its_place_drops_as_many():
    """The same interface: a model may hold either."""
    x, stream = jnp.ones((300, 300)), {"dropout": jax.random.key(0)}
    shares = [
        float(jnp.mean(kind(0.3).apply({}, x, deterministic=False, rngs=stream) == 0))
        for kind in (Dropout, nn.Dropout)
    ]
    assert abs(shares[0] - shares[1]) < 5 * np.sqrt(2 * 0.3 * 0.7 / x.size)
