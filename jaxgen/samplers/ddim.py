"""Denoising diffusion implicit models (Song, Meng & Ermon 2021)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxgen.processes import (
    DiffusionSchedule,
    Prediction,
    Spacing,
    at,
    predict_eps_from_x0,
    respace,
    to_x0_and_eps,
)
from jaxgen.samplers.chain import normal
from jaxgen.samplers.ddpm import Predict
from jaxgen.types import Array, Chain, Key, UserError


def ddim_step(
    schedule: DiffusionSchedule,
    x_t: Array,
    t: Array,
    output: Array,
    noise: Array,
    *,
    eta: float,
    prediction: Prediction,
    clip: bool,
) -> Array:
    """x_{t-1} = sqrt(ab_prev) x0 + sqrt(1 - ab_prev - sigma^2) eps + sigma noise, [B, ...], ab = alpha_bar.

    Song et al. 2021, eq. 12, with sigma = eta sqrt(posterior_variance) (eq. 16): eta = 0 is deterministic,
    eta = 1 is DDPM with the small variance. With `clip` x0 is held in [-1, 1] and eps made to agree with it,
    so that x_t stays sqrt(ab) x0 + sqrt(1 - ab) eps (the paper does not clip). `schedule` holds the steps
    taken: respace it first.
    """
    x0, eps = to_x0_and_eps(schedule, prediction, output, x_t, t)
    if clip:
        x0 = jnp.clip(x0, -1.0, 1.0)
        eps = predict_eps_from_x0(schedule, x_t, t, x0)
    # 1 - ab_prev - sigma^2 = (1 - ab_prev) ((1 - eta^2) beta + alpha (1 - ab_prev)) / (1 - ab): no
    # cancellation.
    one_minus_prev = schedule.sqrt_one_minus_alpha_bar_prev**2
    kept = (1.0 - eta**2) * schedule.beta + (1.0 - schedule.beta) * one_minus_prev
    direction = schedule.sqrt_one_minus_alpha_bar_prev * jnp.sqrt(kept) / schedule.sqrt_one_minus_alpha_bar
    sigma = eta * jnp.sqrt(schedule.posterior_variance)
    mean = at(schedule.sqrt_alpha_bar_prev, t, x_t) * x0 + at(direction, t, x_t) * eps
    return mean + at(sigma, t, x_t) * noise


def ddim_chain(
    predict: Predict,
    schedule: DiffusionSchedule,
    *,
    num_steps: int,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    clip: bool = True,
    spacing: Spacing = "leading",
) -> Chain:
    """The chain from x_T ~ N(0, I) to x_0 in `num_steps` of the schedule's steps, one call of `predict` each.

    Raises UserError unless eta is in [0, 1], and as `processes.spaced_timesteps`.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"DDIM's eta must be in [0, 1], from deterministic to DDPM's noise, but it is {eta}.")
    spaced = respace(schedule, num_steps, spacing)

    def step(keys: Key, x: Array, t: Array) -> Array:
        times = jnp.full(x.shape[:1], t)
        output = predict(x, spaced.timestep[times]).astype(x.dtype)
        noise = normal(keys, x.shape[1:]) if eta > 0.0 else jnp.zeros_like(x)
        return ddim_step(spaced, x, times, output, noise, eta=eta, prediction=prediction, clip=clip)

    return Chain(
        init=normal,
        step=step,
        xs=jnp.arange(num_steps - 1, -1, -1, dtype=jnp.int32),
        finish=lambda x: x,
    )


def ddim_inversion_step(
    schedule: DiffusionSchedule, x: Array, t: Array, output: Array, *, prediction: Prediction
) -> Array:
    """x_t from the x of one step before, [B, ...]: `ddim_step` with eta = 0 the other way round.

    x_t = sqrt(ab) x0 + sqrt(1 - ab) eps (Song et al. 2021, eq. 14 read towards noise; Dhariwal & Nichol 2021,
    appendix F). `output` is the network's at x and the step before t; at t = 0, where x is the data itself,
    it is the network's at x and t = 0, and x0 is x.
    """
    x0, eps = to_x0_and_eps(schedule, prediction, output, x, jnp.maximum(t - 1, 0))
    x0 = jnp.where((t == 0).reshape(t.shape + (1,) * (x.ndim - 1)), x, x0)
    return at(schedule.sqrt_alpha_bar, t, x) * x0 + at(schedule.sqrt_one_minus_alpha_bar, t, x) * eps


def ddim_inversion_chain(
    predict: Predict,
    schedule: DiffusionSchedule,
    x0: Array,
    *,
    num_steps: int,
    prediction: Prediction = "eps",
    spacing: Spacing = "leading",
) -> Chain:
    """The chain from the data x0 [B, ...] to the noise x_T from which `ddim_chain` with eta = 0 makes them.

    One call of `predict` a step. It is exact in the limit of many steps: a step takes the eps of its
    beginning, where DDIM going back takes that of its end. The way back is `ddim_chain` with clip=False, its
    `init` replaced by `lambda keys, shape: x_T`.

    Errors as `processes.spaced_timesteps`.
    """
    spaced = respace(schedule, num_steps, spacing)

    def step(keys: Key, x: Array, t: Array) -> Array:
        times = jnp.full(x.shape[:1], t)
        output = predict(x, spaced.timestep[jnp.maximum(times - 1, 0)]).astype(x.dtype)
        return ddim_inversion_step(spaced, x, times, output, prediction=prediction)

    return Chain(
        init=lambda keys, shape: x0,
        step=step,
        xs=jnp.arange(num_steps, dtype=jnp.int32),
        finish=lambda x: x,
    )
