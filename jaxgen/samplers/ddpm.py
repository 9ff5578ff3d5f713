"""Ancestral sampling of diffusion models (Ho et al. 2020, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from jaxgen.processes import DiffusionSchedule, Prediction, Variance, at, p_mean_log_variance, to_x0_and_eps
from jaxgen.samplers.chain import normal
from jaxgen.types import Array, Chain, Key

# (x_t [B, ...], t int32 [B]) -> the network's output [B, ...]; parameters and labels are bound in it.
Predict: TypeAlias = Callable[[Array, Array], Array]


def ancestral_step(
    schedule: DiffusionSchedule,
    x_t: Array,
    t: Array,
    output: Array,
    noise: Array,
    *,
    prediction: Prediction,
    variance: Variance,
    clip: bool,
) -> Array:
    """x_{t-1} ~ p(x_{t-1} | x_t), [B, ...], given the network's output and standard normal noise.

    Ho et al. 2020, Algorithm 2, lines 3-4. With `clip` the implied x0 is held in [-1, 1] before the mean is
    formed, as in the paper's code. At t = 0 the mean is returned, without noise.
    """
    x0_hat, _ = to_x0_and_eps(schedule, prediction, output, x_t, t)
    if clip:
        x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
    mean, log_variance = p_mean_log_variance(schedule, x0_hat, x_t, t, variance)
    last = at(schedule.posterior_variance == 0.0, t, x_t)
    return mean + jnp.where(last, 0.0, jnp.exp(0.5 * log_variance)) * noise


def ancestral_chain(
    predict: Predict,
    schedule: DiffusionSchedule,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
    clip: bool = True,
) -> Chain:
    """The chain from x_T ~ N(0, I) to x_0 in `schedule.num_steps` steps, one call of `predict` each.

    For fewer steps than the network was trained with, pass `processes.respace(schedule, num_steps)`.
    """

    def step(keys: Key, x: Array, t: Array) -> Array:
        times = jnp.full(x.shape[:1], t)
        output = predict(x, schedule.timestep[times]).astype(x.dtype)
        noise = normal(keys, x.shape[1:])
        return ancestral_step(
            schedule, x, times, output, noise, prediction=prediction, variance=variance, clip=clip
        )

    return Chain(
        init=normal,
        step=step,
        xs=jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32),
        finish=lambda x: x,
    )
