"""Latent variables of a normalising flow: draws at a temperature, and the way from one to another."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxgen.types import Array, Key


def draw_latents(
    key: Key, sample_indices: Array, shapes: Sequence[tuple[int, ...]], temperature: float = 1.0
) -> list[Array]:
    """z ~ N(0, temperature^2 I) for the sample numbers int32 [B]: a list of `[B, *shape]`, float32.

    Sample i draws with fold_in(key, i), part n of it with that folded with n. Kingma & Dhariwal 2018, section
    6: below 1, samples are more typical and less diverse.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_indices)

    def draw(n: int, shape: tuple[int, ...]) -> Array:
        part = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32))
        return temperature * part(keys)

    return [draw(n, shape) for n, shape in enumerate(shapes)]


def interpolate(first: Sequence[Array], last: Sequence[Array], num: int) -> list[Array]:
    """`num` points evenly spaced on the line from `first` to `last`, lists of `[B, ...]`: `[num, B, ...]`."""
    share = jnp.linspace(0.0, 1.0, num)

    def between(a: Array, b: Array) -> Array:
        s = share.reshape(num, *[1] * a.ndim)
        return (1.0 - s) * a[None] + s * b[None]

    return [between(a, b) for a, b in zip(first, last, strict=True)]
