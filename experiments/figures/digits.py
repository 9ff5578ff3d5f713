"""What figures that train on the spot share: the bundled digits in memory, and a fit in one `lax.scan`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen import data
from jaxgen.types import Array, System, TrainState


def load(split: str) -> tuple[Array, Array]:
    """Images float32 [N, 8, 8, 1] in [-1, 1] and labels int32 [N]."""
    source = data.load_source("digits", split)
    images = data.to_unit_range(source.fields["image"][:], source.num_levels)
    return jnp.asarray(images), jnp.asarray(source.fields["label"])


def fit(system: System, images: Array, *, num_steps: int, batch_size: int, seed: int = 0) -> TrainState:
    """The state after `num_steps` updates on batches drawn with replacement; traceable."""
    batch_key, init_key = jax.random.split(jax.random.key(seed))

    def step(state: TrainState, number: Array) -> tuple[TrainState, None]:
        key = jax.random.fold_in(batch_key, number)
        rows = jax.random.randint(key, (batch_size,), 0, images.shape[0])
        return system.step(state, {"image": images[rows]})[0], None

    start = system.init(init_key, {"image": images[:batch_size]})
    return jax.lax.scan(step, start, jnp.arange(num_steps))[0]
