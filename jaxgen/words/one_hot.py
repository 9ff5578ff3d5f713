"""One-hot vectors: words as discrete symbols, and why a network's first matrix is a table of word vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.types import Array


def one_hot(tokens: Array, vocab_size: int) -> Array:
    """int [...] -> float32 [..., V], 1 at each token: any two words are orthogonal, however alike."""
    return jax.nn.one_hot(tokens, vocab_size, dtype=jnp.float32)


def look_up(vectors: Array, tokens: Array) -> Array:
    """one_hot(tokens) @ vectors, as the row look-up that it is: [V, D], int [...] -> [..., D].

    A token outside 0 ... V - 1, whose one-hot vector is 0, has the vector 0.
    """
    # Negative numbers would count from the end.
    rows = jnp.where(tokens < 0, vectors.shape[0], tokens)
    return jnp.take(vectors, rows, axis=0, mode="fill", fill_value=0)
