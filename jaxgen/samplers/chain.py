"""The one driver of every sampler that takes steps: a single `lax.scan` over a `Chain`.

Randomness belongs to the sample, not to the batch: sample i draws from fold_in(key, i), and its step n from
that key folded with n. So a sample depends on (key, i) alone, whatever batch or device it is made on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.types import Array, Chain, Key, PyTree, UserError


def normal(keys: Key, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, float32 [B, *shape], entry i drawn with keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def fold_each(keys: Key, number: Array | int) -> Key:
    """Each of the keys [B] folded with the same number."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _num_steps(chain: Chain) -> int:
    return jax.tree.leaves(chain.xs)[0].shape[0]


def _walk(
    chain: Chain,
    key: Key,
    sample_indices: Array,
    shape: tuple[int, ...],
    begin: Callable[[PyTree], PyTree],
    record: Callable[[PyTree, Array, PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
    """The last state and the record: begun with the initial state, then given each state and its number."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_indices)

    def body(
        carry: tuple[PyTree, PyTree], numbered: tuple[Array, PyTree]
    ) -> tuple[tuple[PyTree, PyTree], None]:
        state, recorded = carry
        number, x = numbered
        state = chain.step(fold_each(keys, number), state, x)
        return (state, record(recorded, number, state)), None

    start = chain.init(fold_each(keys, 0), shape)
    numbers = jnp.arange(1, _num_steps(chain) + 1, dtype=jnp.uint32)
    (state, recorded), _ = jax.lax.scan(body, (start, begin(start)), (numbers, chain.xs))
    return state, recorded


def run_chain(chain: Chain, key: Key, sample_indices: Array, shape: tuple[int, ...]) -> Array:
    """Samples [B, *shape] of the numbers `sample_indices`, int32 [B]; to be called under jit.

    Nothing but the current state is kept, and the step is traced once whatever the number of steps.
    """
    state, _ = _walk(chain, key, sample_indices, shape, lambda start: None, lambda none, number, state: None)
    return chain.finish(state)


def run_chain_with_history(
    chain: Chain, key: Key, sample_indices: Array, shape: tuple[int, ...], num_frames: int
) -> tuple[Array, Array]:
    """The samples of `run_chain` and `num_frames` states on the way, [num_frames, B, *shape].

    The frames are `chain.finish` of equally spaced states, the first being the initial one and the last the
    samples. Only the frames are kept: each state is written to the slot of the next frame due, so the last to
    be written there is the frame's own.

    Raises UserError unless 2 <= num_frames <= number of steps + 1.
    """
    steps = _num_steps(chain)
    if not 2 <= num_frames <= steps + 1:
        raise UserError(
            f"a chain of {steps} steps can show 2 to {steps + 1} frames, but {num_frames} were asked."
        )
    frame_numbers = np.round(np.linspace(0, steps, num_frames)).astype(np.int64)
    slots = jnp.asarray(np.searchsorted(frame_numbers, np.arange(steps + 1)), jnp.int32)

    def begin(start: PyTree) -> Array:
        first = chain.finish(start)
        return jnp.zeros((num_frames, *first.shape), first.dtype).at[0].set(first)

    def record(frames: Array, number: Array, state: PyTree) -> Array:
        return jax.lax.dynamic_update_index_in_dim(frames, chain.finish(state), slots[number], axis=0)

    state, frames = _walk(chain, key, sample_indices, shape, begin, record)
    return chain.finish(state), frames


def sample_in_batches(
    sample: Callable[[Array], Any],
    num: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Samples 0..num-1, [num, ...] in host memory, made `batch_size` at a time.

    sample: the compiled function, int32 [batch_size] sample numbers -> [batch_size, ...]. It always
        gets a whole batch, so that it is compiled once; what the last batch makes beyond `num` is dropped.
    progress: called after each batch with (samples done, num)

    Raises UserError unless num and batch_size are at least 1.
    """
    if num < 1 or batch_size < 1:
        raise UserError(
            f"the number of samples and the batch size must be at least 1, but got {num} and {batch_size}."
        )
    batches = []
    for start in range(0, num, batch_size):
        indices = jnp.arange(start, start + batch_size, dtype=jnp.int32)
        batches.append(np.asarray(sample(indices))[: num - start])
        if progress is not None:
            progress(min(start + batch_size, num), num)
    return np.concatenate(batches)
