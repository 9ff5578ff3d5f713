"""Sampling of images pixel by pixel, in reading order, each given those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.samplers.chain import fold_each
from jaxgen.types import Array, Chain, Key, PyTree

# (key, parameters [P]) -> pixel [C]
Draw: TypeAlias = Callable[[Key, Array], Array]


class PixelNetwork(NamedTuple):
    """A network asked for one pixel after another; `cache` is what it keeps from one call to the next.

    start: (number of images B, shape [H, W, C]) -> cache
    row: (cache, image [B, H, W, C], r) -> cache, called before the first pixel of row r; rows before r are
        final
    pixel: (cache, image, r, c) -> (cache, parameters [B, P]) of pixel (r, c); pixels before it are final
    """

    start: Callable[[int, tuple[int, ...]], PyTree]
    row: Callable[[PyTree, Array, Array], PyTree]
    pixel: Callable[[PyTree, Array, Array, Array], tuple[PyTree, Array]]


def whole_image_network(logits: Callable[[Array], Array]) -> PixelNetwork:
    """The network that computes the parameters of all pixels, `[B, H, W, C]` -> `[B, H, W, P]`, for each one.

    It keeps nothing, and so costs H W times what a pass costs.
    """

    def pixel(cache: PyTree, image: Array, r: Array, c: Array) -> tuple[PyTree, Array]:
        row = jax.lax.dynamic_index_in_dim(logits(image), r, axis=1, keepdims=False)
        return cache, jax.lax.dynamic_index_in_dim(row, c, axis=1, keepdims=False)

    return PixelNetwork(lambda num, shape: (), lambda cache, image, r: cache, pixel)


def pixel_chain(network: PixelNetwork, draw: Draw, height: int) -> Chain:
    """The chain of images `height` rows high; a step makes a row, by a `lax.scan` over its pixels.

    Run it with `samplers.chain.run_chain(chain, key, sample_indices, (height, W, C))`: the pixel (r, c) of
    sample i is drawn with fold_in(fold_in(fold_in(key, i), r + 1), c), so a sample does not depend on the
    rest of its batch, nor on what the network keeps. Pixels not drawn yet are 0.
    """

    def init(keys: Key, shape: tuple[int, ...]) -> tuple[PyTree, Array]:
        num = keys.shape[0]
        return network.start(num, shape), jnp.zeros((num, *shape), jnp.float32)

    def step(keys: Key, carry: tuple[PyTree, Array], r: Array) -> tuple[PyTree, Array]:
        cache, image = carry
        cache = network.row(cache, image, r)

        def one(carry: tuple[PyTree, Array], c: Array) -> tuple[tuple[PyTree, Array], None]:
            cache, image = carry
            cache, parameters = network.pixel(cache, image, r, c)
            pixel_keys = fold_each(keys, c)
            pixel = jax.vmap(draw)(pixel_keys, parameters)
            image = jax.lax.dynamic_update_slice(image, pixel[:, None, None], (0, r, c, 0))
            return (cache, image), None

        columns = jnp.arange(image.shape[2], dtype=jnp.int32)
        return jax.lax.scan(one, (cache, image), columns)[0]

    return Chain(init=init, step=step, xs=jnp.arange(height, dtype=jnp.int32), finish=lambda carry: carry[1])
