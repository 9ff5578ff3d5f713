"""The loop of expectation-maximisation, as one `lax.while_loop` (Dempster, Laird & Rubin 1977)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.types import Array, PyTree, UserError


class EMFit(NamedTuple):
    """Where EM came to, and how.

    params: the fitted parameters
    objective: [max_steps + 1], before the first step and after each; its last value is that of `params`, and
        fills the steps that were not needed
    num_steps: int32 scalar, the steps taken
    """

    params: PyTree
    objective: Array
    num_steps: Array


def run_em(
    step: Callable[[PyTree], tuple[PyTree, Array]], params: PyTree, max_steps: int, tolerance: ArrayLike
) -> EMFit:
    """Repeat `step` until the objective gains at most `tolerance`, `max_steps` times at most.

    step: params -> (the next params, the objective of the params it was given)

    Raises:
        UserError: `max_steps` is negative.
    """
    if max_steps < 0:
        raise UserError(f"max_steps must be at least 0, not {max_steps}.")
    dtype = jax.eval_shape(step, params)[1].dtype

    def go_on(carry: tuple[PyTree, Array, Array, Array]) -> Array:
        return ~carry[3]

    def body(carry: tuple[PyTree, Array, Array, Array]) -> tuple[PyTree, Array, Array, Array]:
        params, objective, i, _ = carry
        stepped, value = step(params)
        gain = value - objective[jnp.maximum(i - 1, 0)]
        done = (i >= max_steps) | ((i > 0) & (gain <= tolerance))
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), params, stepped)
        return kept, objective.at[i].set(value), jnp.where(done, i, i + 1), done

    start = (params, jnp.zeros(max_steps + 1, dtype), jnp.int32(0), jnp.asarray(False))
    params, objective, num_steps, _ = jax.lax.while_loop(go_on, body, start)
    beyond = jnp.arange(max_steps + 1) > num_steps
    return EMFit(params, jnp.where(beyond, objective[num_steps], objective), num_steps)
