"""Sampling by the probability-flow ODE, and the likelihood that it gives.

In the coordinates of `jaxgen.denoising` the ODE is dx / d sigma = (x - A(x, sigma)) / sigma for every
diffusion (Karras et al. 2022, eq. 1 with sigma(t) = t), so these samplers serve networks trained in any way:
DDPM's too, through `denoising.denoiser_from_ddpm`.

The noise levels `sigmas` [N + 1] decrease from where the chain begins to where it ends, which is 0 or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import Denoiser, denoised_at, value_and_sliced_trace, value_and_trace
from jaxgen.samplers.chain import normal
from jaxgen.types import Array, Chain, Key, UserError


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Levels from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho), then 0; float64 [num_steps + 1].

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 5.

    Raises UserError unless num_steps >= 2, 0 < sigma_min < sigma_max and rho > 0.
    """
    if num_steps < 2 or not 0.0 < sigma_min < sigma_max or not rho > 0.0:
        raise UserError(
            f"these noise levels need num_steps >= 2, 0 < sigma_min < sigma_max and rho > 0, but got "
            f"{num_steps}, {sigma_min}, {sigma_max} and {rho}."
        )
    root = np.linspace(sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho), num_steps)
    return np.append(root**rho, 0.0)


def _checked(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) < 2 or (np.diff(levels) >= 0.0).any() or levels[-1] < 0.0:
        raise UserError(
            f"the noise levels must be at least two, decrease and end at 0 or above, but they are "
            f"{levels.tolist()}."
        )
    return levels


def _start(levels: np.ndarray, keys: Key, shape: tuple[int, ...]) -> Array:
    return float(levels[0]) * normal(keys, shape)


def _as_float32(values: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def euler_step(x: Array, denoised: Array, ratio: Array) -> Array:
    """x + (sigma' - sigma) (x - A(x)) / sigma = ratio x + (1 - ratio) A(x), ratio = sigma' / sigma.

    It is the step of DDIM with eta = 0 (Song, Meng & Ermon 2021, eq. 13).
    """
    return ratio * x + (1.0 - ratio) * denoised


class _EulerStep(NamedTuple):
    sigma: Array
    ratio: Array


def euler_chain(denoiser: Denoiser, sigmas: Sequence[float] | np.ndarray) -> Chain:
    """Euler's method, of first order: N steps, one call of `denoiser` each.

    Raises UserError unless the levels decrease and end at 0 or above.
    """
    levels = _checked(sigmas)

    def step(keys: Key, x: Array, level: _EulerStep) -> Array:
        return euler_step(x, denoised_at(denoiser, x, level.sigma), level.ratio)

    return Chain(
        init=lambda keys, shape: _start(levels, keys, shape),
        step=step,
        xs=_EulerStep(*_as_float32((levels[:-1], levels[1:] / levels[:-1]))),
        finish=lambda x: x,
    )


class _HeunStep(NamedTuple):
    sigma: Array  # after the noise of the churn was added
    next_sigma: Array
    churn: Array  # the standard deviation of that noise


def heun_chain(
    denoiser: Denoiser,
    sigmas: Sequence[float] | np.ndarray,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Chain:
    """Heun's method, of second order, with fresh noise before a step where s_churn > 0: EDM's sampler.

    Karras et al. 2022, Algorithm 2. Each of the N steps calls `denoiser` twice, but one that ends at 0 once:
    2 N - 1 calls with `karras_sigmas`.

    s_churn: before a step at sigma in [s_tmin, s_tmax], the noise grows to (1 + gamma) sigma with gamma =
        min(s_churn / N, sqrt(2) - 1); 0 makes the chain deterministic
    s_noise: the standard deviation of the noise added, in units of what that growth needs

    Raises UserError unless s_churn and s_noise are at least 0, and as `euler_chain`.
    """
    levels = _checked(sigmas)
    if s_churn < 0.0 or s_noise < 0.0:
        raise UserError(f"s_churn and s_noise cannot be negative, but they are {s_churn} and {s_noise}.")
    churned = (levels[:-1] >= s_tmin) & (levels[:-1] <= s_tmax)
    gamma = np.where(churned, min(s_churn / (len(levels) - 1), math.sqrt(2.0) - 1.0), 0.0)
    grown = levels[:-1] * (1.0 + gamma)
    churn = s_noise * levels[:-1] * np.sqrt(gamma * (2.0 + gamma))

    def step(keys: Key, x: Array, level: _HeunStep) -> Array:
        if s_churn > 0.0:
            x = x + level.churn * normal(keys, x.shape[1:])
        slope = (x - denoised_at(denoiser, x, level.sigma)) / level.sigma
        width = level.next_sigma - level.sigma
        euler = x + width * slope

        def corrected() -> Array:
            end_slope = (euler - denoised_at(denoiser, euler, level.next_sigma)) / level.next_sigma
            return x + 0.5 * width * (slope + end_slope)

        return jax.lax.cond(level.next_sigma > 0.0, corrected, lambda: euler)

    return Chain(
        init=lambda keys, shape: _start(levels, keys, shape),
        step=step,
        xs=_HeunStep(*_as_float32((grown, levels[1:], churn))),
        finish=lambda x: x,
    )


class _MultistepState(NamedTuple):
    x: Array
    denoised: Array  # of the step before


class _MultistepStep(NamedTuple):
    sigma: Array
    ratio: Array
    extrapolation: Array


def dpm_solver_2m_chain(denoiser: Denoiser, sigmas: Sequence[float] | np.ndarray) -> Chain:
    """DPM-Solver++(2M), of second order: N steps, one call of `denoiser` each.

    Lu et al. 2022, "DPM-Solver++", Algorithm 2: `euler_step` with A + (h_i / 2 h_{i-1}) (A - A_previous) in
    place of A, where h_i = log(sigma_i / sigma_{i+1}). The first step, and a last one that ends at 0, are of
    first order.

    Raises UserError as `euler_chain`.
    """
    levels = _checked(sigmas)
    with np.errstate(divide="ignore"):
        h = np.log(levels[:-1]) - np.log(levels[1:])
    extrapolation = np.append(0.0, 0.5 * h[1:] / h[:-1])
    extrapolation[~np.isfinite(h)] = 0.0

    def start(keys: Key, shape: tuple[int, ...]) -> _MultistepState:
        x = _start(levels, keys, shape)
        return _MultistepState(x, jnp.zeros_like(x))

    def step(keys: Key, state: _MultistepState, level: _MultistepStep) -> _MultistepState:
        denoised = denoised_at(denoiser, state.x, level.sigma)
        extrapolated = denoised + level.extrapolation * (denoised - state.denoised)
        return _MultistepState(euler_step(state.x, extrapolated, level.ratio), denoised)

    return Chain(
        init=start,
        step=step,
        xs=_MultistepStep(*_as_float32((levels[:-1], levels[1:] / levels[:-1], extrapolation))),
        finish=lambda state: state.x,
    )


# --- Likelihood ---


def rademacher_probes(keys: Key, num_probes: int, shape: tuple[int, ...]) -> Array:
    """Random signs for `flow_log_density`, float32 [num_probes, B, *shape]; example i's from keys[i]."""
    draw = lambda key: jax.random.rademacher(key, (num_probes, *shape), jnp.float32)
    return jnp.moveaxis(jax.vmap(draw)(keys), 0, 1)


def flow_latent(
    denoiser: Denoiser,
    x: Array,
    *,
    sigma_min: float,
    sigma_max: float,
    num_steps: int,
    probes: Array | None = None,
) -> tuple[Array, Array]:
    """The latent [B, ...] that the probability-flow ODE carries x to, and log |d latent / d x| [B].

    dx / d(log sigma) = F = x - A(x, sigma), and the log of the volume grows by the integral of div F
    (Chen et al. 2018; Song et al. 2021, eq. 39 and appendix D.2), from sigma_min to sigma_max in `num_steps`
    equal steps of the classical Runge-Kutta method: 4 num_steps calls of `denoiser`. The paper's code uses an
    adaptive method of order 5; here the cost is known and the compiled loop fixed.

    x: float32 [B, ...]; of discrete data, dequantised, and see `bits_per_dim`
    probes: [S, B, ...], for instance `rademacher_probes`, with E[v v^T] = I: the divergence is then estimated
        without bias from S backward passes a call (Skilling 1989; Hutchinson 1990), with the same directions
        all along the path (Grathwohl et al. 2019). None finds it exactly in one a dimension.

    Raises UserError unless 0 < sigma_min < sigma_max and num_steps >= 1.
    """
    if not 0.0 < sigma_min < sigma_max or num_steps < 1:
        raise UserError(
            f"a likelihood needs 0 < sigma_min < sigma_max and num_steps >= 1, but got {sigma_min}, "
            f"{sigma_max} and {num_steps}."
        )
    h = math.log(sigma_max / sigma_min) / num_steps

    def flow(log_sigma: Array, x: Array) -> tuple[Array, Array]:
        """F and div F."""
        f = lambda x: x - denoised_at(denoiser, x, jnp.exp(log_sigma))
        return value_and_trace(f, x) if probes is None else value_and_sliced_trace(f, x, probes)

    # The classical tableau: where each of four stages looks, and its share of the step.
    reach = jnp.array([0.0, 0.5, 0.5, 1.0], jnp.float32)
    share = jnp.array([1 / 6, 1 / 3, 1 / 3, 1 / 6], jnp.float32)

    def step(carry: tuple[Array, Array], log_sigma: Array) -> tuple[tuple[Array, Array], None]:
        x, total = carry

        def stage(last_f: Array, ahead: Array) -> tuple[Array, tuple[Array, Array]]:
            f, div = flow(log_sigma + ahead * h, x + ahead * h * last_f)
            return f, (f, div)

        _, (f, div) = jax.lax.scan(stage, jnp.zeros_like(x), reach)
        mean_f, mean_div = (jnp.tensordot(share, each, 1, precision="highest") for each in (f, div))
        return (x + h * mean_f, total + h * mean_div), None

    log_sigmas = jnp.asarray(math.log(sigma_min) + h * np.arange(num_steps), jnp.float32)
    (latent, integral), _ = jax.lax.scan(step, (x, jnp.zeros(x.shape[0], x.dtype)), log_sigmas)
    return latent, integral


def flow_log_density(
    denoiser: Denoiser,
    x: Array,
    *,
    sigma_min: float,
    sigma_max: float,
    num_steps: int,
    probes: Array | None = None,
    prior_std: float | None = None,
) -> tuple[Array, Array]:
    """log p(x) in nats [B], and the latent [B, ...] that the probability-flow ODE carries x to.

    log p(x) = log N(latent; 0, prior_std^2 I) + log |d latent / d x|, see `flow_latent`: the density of the
    model's data smoothed with sigma_min.

    prior_std: of the model at sigma_max; None is sigma_max itself, as a variance-exploding model samples. For
        any `Sde` up to t = 1 it is prior_std / scale(1), which is sqrt(1 + sigma_max^2) for a VP SDE.

    Raises UserError unless prior_std > 0, and as `flow_latent`.
    """
    prior_std = sigma_max if prior_std is None else prior_std
    if not prior_std > 0.0:
        raise UserError(f"the prior's standard deviation must be positive, but it is {prior_std}.")
    latent, integral = flow_latent(
        denoiser, x, sigma_min=sigma_min, sigma_max=sigma_max, num_steps=num_steps, probes=probes
    )
    squares = jnp.sum(jnp.square(latent / prior_std).reshape(x.shape[0], -1), axis=1)
    num_dims = math.prod(x.shape[1:])
    prior = -0.5 * squares - num_dims * (math.log(prior_std) + 0.5 * math.log(2.0 * math.pi))
    return prior + integral, latent


def bits_per_dim(log_density: Array, num_dims: int, num_levels: int) -> Array:
    """-log2 of the mass of a bin, per dimension, from log p(x) in nats of dequantised x, [B].

    For data on `num_levels` levels evenly spaced in [-1, 1] (256 for images of 8 bits), to which uniform
    noise as wide as a bin, 2 / (num_levels - 1), was added: in expectation a bound from above (Theis et al.
    2016).
    """
    log_width = math.log(2.0 / (num_levels - 1))
    return -(log_density / num_dims + log_width) / math.log(2.0)
