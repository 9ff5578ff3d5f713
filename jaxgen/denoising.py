"""One interface for every network that removes Gaussian noise, and what a denoiser is worth.

A `Denoiser` maps x = x0 + sigma eps, eps ~ N(0, I), to E[x0 | x]. By Tweedie's formula (Robbins 1956;
Miyasawa 1961) that is x + sigma^2 times the score of the data smoothed with N(0, sigma^2 I), so a denoiser, a
score, a noise predictor and a v predictor are one function in four guises, and the formulas below are exact.

Samples have any shape: `x` is float32 [B, ...], and `sigma` is float32 [B], the standard deviation of the
noise in the units of x. Variance-preserving coordinates, where x_t = scale x0 + std eps, are these after a
division by the scale: sigma = std / scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.processes import (
    DiffusionSchedule,
    Prediction,
    at,
    predict_eps_from_x0,
    prediction_target,
)
from jaxgen.types import Array, UserError

Denoiser: TypeAlias = Callable[[Array, Array], Array]  # (x [B, ...], sigma [B]) -> E[x0 | x] [B, ...]
ScoreFn: TypeAlias = Callable[[Array, Array], Array]  # the same -> grad log p_sigma(x) [B, ...]
# How a noise level between two steps of a DDPM schedule becomes a time that its network is asked at.
Times: TypeAlias = Literal["nearest", "continuous"]


def over(coefficient: Array, x: Array) -> Array:
    """coefficient [B] shaped [B, 1, ...] to multiply x [B, ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1))


def denoised_at(denoiser: Denoiser, x: Array, sigma: float | Array) -> Array:
    """A(x) [B, ...], in x's dtype, where all samples have the same noise sigma, a scalar."""
    return denoiser(x, jnp.full(x.shape[:1], sigma, jnp.float32)).astype(x.dtype)


# --- What a denoised x says ---


def score_from_denoised(x: Array, denoised: Array, sigma: Array) -> Array:
    """S(x) = (A(x) - x) / sigma^2, [B, ...] (Tweedie's formula; Vincent 2011, section 4)."""
    return (denoised - x) / over(jnp.square(sigma), x)


def denoised_from_score(x: Array, score: Array, sigma: Array) -> Array:
    """A(x) = x + sigma^2 S(x), the inverse of `score_from_denoised`."""
    return x + over(jnp.square(sigma), x) * score


def eps_from_denoised(x: Array, denoised: Array, sigma: Array) -> Array:
    """eps = (x - A(x)) / sigma = -sigma S(x), the expected noise, [B, ...]."""
    return (x - denoised) / over(sigma, x)


def denoised_from_eps(x: Array, eps: Array, sigma: Array) -> Array:
    """A(x) = x - sigma eps, the inverse of `eps_from_denoised`."""
    return x - over(sigma, x) * eps


def v_from_denoised(x: Array, denoised: Array, sigma: Array) -> Array:
    """v = (eps - sigma A(x)) / sqrt(1 + sigma^2), [B, ...].

    It is v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, section 4) at
    alpha_bar = 1 / (1 + sigma^2), for which x is x_t / sqrt(alpha_bar).
    """
    eps = eps_from_denoised(x, denoised, sigma)
    return (eps - over(sigma, x) * denoised) / over(jnp.sqrt(1.0 + jnp.square(sigma)), x)


def denoised_from_v(x: Array, v: Array, sigma: Array) -> Array:
    """A(x) = (x - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2), the inverse of `v_from_denoised`."""
    total = 1.0 + jnp.square(sigma)
    return x / over(total, x) - over(sigma / jnp.sqrt(total), x) * v


def score_of(denoiser: Denoiser) -> ScoreFn:
    """The score of the smoothed data, as a function."""
    return lambda x, sigma: score_from_denoised(x, denoiser(x, sigma), sigma)


def denoiser_from_score(score: ScoreFn) -> Denoiser:
    """The denoiser that a score network is, the inverse of `score_of`."""
    return lambda x, sigma: denoised_from_score(x, score(x, sigma), sigma)


# --- The time index of DDPM ---


def schedule_sigmas(schedule: DiffusionSchedule) -> Array:
    """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), float32 [T], increasing.

    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps is sqrt(alpha_bar) times x0 + sigma_t eps.
    """
    return schedule.sqrt_one_minus_alpha_bar / schedule.sqrt_alpha_bar


def ddpm_times(schedule: DiffusionSchedule, sigma: Array, times: Times = "nearest") -> Array:
    """The time to ask a DDPM network at for noise of `sigma` [B].

    nearest: int32 [B], the `schedule.timestep` of the step nearest in log sigma
    continuous: float32 [B], interpolated linearly in log sigma between the two steps around it, for networks
        whose time may be a real number; at the steps themselves it is their timestep

    Noise weaker or stronger than any step of the schedule gets the first or the last time.

    Raises UserError for an unknown rule.
    """
    if times not in get_args(Times):
        raise UserError(f"unknown rule for times {times!r}; choose one of {', '.join(get_args(Times))}.")
    log_sigmas = jnp.log(schedule_sigmas(schedule))
    if times == "continuous":
        return jnp.interp(jnp.log(sigma), log_sigmas, schedule.timestep.astype(jnp.float32))
    steps = jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(schedule.num_steps, dtype=jnp.float32))
    return schedule.timestep[jnp.round(steps).astype(jnp.int32)]


def denoiser_from_ddpm(
    predict: Callable[[Array, Array], Array],
    schedule: DiffusionSchedule,
    prediction: Prediction,
    *,
    times: Times = "nearest",
) -> Denoiser:
    """The denoiser that a DDPM network is, at any sigma.

    The network sees x / sqrt(1 + sigma^2), which has the variance of x_t at that sigma exactly, at the time
    of `ddpm_times`, and its output is turned into E[x0 | x] with sigma itself. So the only approximation
    is the time, and there is none at the sigmas of the schedule. One call of `predict` each.

    predict: (x_t [B, ...], t [B]) -> output [B, ...]; t is int32, or float32 with `times` "continuous"

    Raises UserError for an unknown prediction or rule.
    """
    if prediction not in get_args(Prediction):
        raise UserError(
            f"unknown prediction {prediction!r}; choose one of {', '.join(get_args(Prediction))}."
        )

    def denoiser(x: Array, sigma: Array) -> Array:
        x_t = x / over(jnp.sqrt(1.0 + jnp.square(sigma)), x)
        output = predict(x_t, ddpm_times(schedule, sigma, times)).astype(x.dtype)
        if prediction == "x0":
            return output
        if prediction == "eps":
            return denoised_from_eps(x, output, sigma)
        return denoised_from_v(x, output, sigma)

    return denoiser


def ddpm_from_denoiser(
    denoiser: Denoiser, schedule: DiffusionSchedule, prediction: Prediction
) -> Callable[[Array, Array], Array]:
    """(x_t [B, ...], t int32 [B]) -> what a DDPM network puts out at t, for DDPM's and DDIM's chains.

    t is an index of `schedule`, which is to be the one of all times; chains over `processes.respace(schedule,
    ...)` then ask at its timesteps.
    """

    def predict(x_t: Array, t: Array) -> Array:
        x0 = denoiser(x_t / at(schedule.sqrt_alpha_bar, t, x_t), schedule_sigmas(schedule)[t])
        return prediction_target(schedule, prediction, x0, t, predict_eps_from_x0(schedule, x_t, t, x0))

    return predict


# --- Noise levels and continuous time ---


def geometric_sigmas(sigma_max: float, sigma_min: float, num_levels: int) -> np.ndarray:
    """sigma_1 > ... > sigma_L in a geometric sequence, float64 [L] (Song & Ermon 2019, section 4).

    Raises UserError unless 0 < sigma_min <= sigma_max and num_levels >= 1 (2 where they differ).
    """
    if not 0.0 < sigma_min <= sigma_max:
        raise UserError(
            f"noise levels need 0 < sigma_min <= sigma_max, but they are {sigma_min} and {sigma_max}."
        )
    if num_levels < (1 if sigma_min == sigma_max else 2):
        raise UserError(f"{num_levels} noise levels cannot go from {sigma_max} to {sigma_min}; ask for more.")
    return np.geomspace(sigma_max, sigma_min, num_levels)


class Sde(NamedTuple):
    """The diffusion dx = drift(t) x dt + diffusion(t) dw on t in [0, 1] (Song et al. 2021, section 3).

    Its marginals are x_t ~ N(scale(t) x_0, std(t)^2 I), and x_1 is close to N(0, prior_std^2 I). The first
    four functions map float32 times of any shape to the same shape; `time` is the way back from a noise level
    of `Denoiser`s: sigma -> the t with std(t) / scale(t) = sigma.
    """

    drift: Callable[[Array], Array]
    diffusion: Callable[[Array], Array]
    scale: Callable[[Array], Array]
    std: Callable[[Array], Array]
    time: Callable[[Array], Array]
    prior_std: float


def ve_sde(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Sde:
    """Variance exploding: std(t) = sigma_min (sigma_max / sigma_min)^t, scale 1.

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix C.
    At t = 0 the noise of sigma_min is already there, as in the levels of NCSN.

    Raises UserError unless 0 < sigma_min < sigma_max.
    """
    if not 0.0 < sigma_min < sigma_max:
        raise UserError(
            f"a VE SDE needs 0 < sigma_min < sigma_max, but they are {sigma_min} and {sigma_max}."
        )
    log_ratio = math.log(sigma_max / sigma_min)

    def std(t: Array) -> Array:
        return sigma_min * jnp.exp(log_ratio * t)

    return Sde(
        drift=jnp.zeros_like,
        diffusion=lambda t: std(t) * math.sqrt(2.0 * log_ratio),
        scale=jnp.ones_like,
        std=std,
        time=lambda sigma: jnp.log(sigma / sigma_min) / log_ratio,
        prior_std=sigma_max,
    )


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> Sde:
    """Variance preserving: drift -beta / 2, diffusion sqrt(beta), std = sqrt(1 - scale^2).

    Song et al. 2021, eq. 11 and appendix C, with beta(t) = beta_min + t (beta_max - beta_min) and
    scale = exp(-int beta / 2): DDPM with its linear schedule as the number of steps grows.

    Raises UserError unless 0 < beta_min <= beta_max.
    """
    beta, log_scale, time_of = _linear_beta(beta_min, beta_max)
    return Sde(
        drift=lambda t: -0.5 * beta(t),
        diffusion=lambda t: jnp.sqrt(beta(t)),
        scale=lambda t: jnp.exp(log_scale(t)),
        std=lambda t: jnp.sqrt(-jnp.expm1(2.0 * log_scale(t))),
        # sigma^2 = 1 / scale^2 - 1
        time=lambda sigma: time_of(-0.5 * jnp.log1p(jnp.square(sigma))),
        prior_std=1.0,
    )


def sub_vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> Sde:
    """Sub-VP: the drift of `vp_sde`, diffusion sqrt(beta (1 - scale^4)), std = 1 - scale^2.

    Song et al. 2021, eq. 12 and appendix C. Raises UserError as `vp_sde`.
    """
    beta, log_scale, time_of = _linear_beta(beta_min, beta_max)
    return Sde(
        drift=lambda t: -0.5 * beta(t),
        diffusion=lambda t: jnp.sqrt(-beta(t) * jnp.expm1(4.0 * log_scale(t))),
        scale=lambda t: jnp.exp(log_scale(t)),
        std=lambda t: -jnp.expm1(2.0 * log_scale(t)),
        # sigma = 1 / scale - scale = 2 sinh(-log scale)
        time=lambda sigma: time_of(-jnp.arcsinh(0.5 * sigma)),
        prior_std=1.0,
    )


def _linear_beta(
    beta_min: float, beta_max: float
) -> tuple[Callable[[Array], Array], Callable[[Array], Array], Callable[[Array], Array]]:
    """beta(t), log_scale(t) = -int_0^t beta / 2, and the inverse of log_scale."""
    if not 0.0 < beta_min <= beta_max:
        raise UserError(f"a VP SDE needs 0 < beta_min <= beta_max, but they are {beta_min} and {beta_max}.")
    slope = beta_max - beta_min

    def time_of(log_scale: Array) -> Array:
        # The root of slope t^2 / 2 + beta_min t = -2 log_scale, in the form that cancels nothing.
        integral = -2.0 * log_scale
        return 2.0 * integral / (beta_min + jnp.sqrt(beta_min**2 + 2.0 * slope * integral))

    return (
        lambda t: beta_min + slope * t,
        lambda t: -0.5 * (beta_min * t + 0.5 * slope * jnp.square(t)),
        time_of,
    )


def sde_score(denoiser: Denoiser, sde: Sde) -> Callable[[Array, Array], Array]:
    """(x_t [B, ...], t [B]) -> grad log p_t(x_t) = (scale A(x_t / scale, std / scale) - x_t) / std^2."""

    def score(x: Array, t: Array) -> Array:
        scale, std = sde.scale(t), sde.std(t)
        denoised = denoiser(x / over(scale, x), std / scale)
        return score_from_denoised(x, over(scale, x) * denoised, std)

    return score


def denoiser_from_sde_eps(predict: Callable[[Array, Array], Array], sde: Sde) -> Denoiser:
    """The denoiser that a noise predictor of an SDE is: A(x) = x - sigma eps(scale x, t), t = time(sigma).

    predict: (x_t [B, ...], t float32 [B] in [0, 1]) -> eps [B, ...], the noise in x_t = scale x_0 + std eps;
        for a sigma beyond those of the SDE it is asked at t = 0 or 1
    """

    def denoiser(x: Array, sigma: Array) -> Array:
        t = jnp.clip(sde.time(sigma), 0.0, 1.0)
        return denoised_from_eps(x, predict(over(sde.scale(t), x) * x, t).astype(x.dtype), sigma)

    return denoiser


# --- Preconditioning ---


class Preconditioning(NamedTuple):
    """A(x) = skip x + out F(scale x, noise) for a network F; every field is [B]."""

    skip: Array
    out: Array
    scale: Array
    noise: Array


def edm_preconditioning(sigma: Array, sigma_data: float) -> Preconditioning:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, column "Ours" (see appendix B.6).

    For data of standard deviation sigma_data, F then has inputs and targets of unit variance at all sigma
    [B], and its errors are amplified as little as can be. noise = log(sigma) / 4.
    """
    total = jnp.square(sigma) + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * jax.lax.rsqrt(total),
        scale=jax.lax.rsqrt(total),
        noise=0.25 * jnp.log(sigma),
    )


def preconditioned_denoiser(network: Callable[[Array, Array], Array], sigma_data: float) -> Denoiser:
    """The denoiser c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7).

    network: F, (x [B, ...], noise float32 [B]) -> [B, ...]

    Raises UserError unless sigma_data > 0.
    """
    if not sigma_data > 0.0:
        raise UserError(
            f"sigma_data is the data's standard deviation and must be positive, not {sigma_data}."
        )

    def denoiser(x: Array, sigma: Array) -> Array:
        c = edm_preconditioning(sigma, sigma_data)
        output = network(over(c.scale, x) * x, c.noise).astype(x.dtype)
        return over(c.skip, x) * x + over(c.out, x) * output

    return denoiser


# --- Traces of Jacobians ---


def value_and_trace(f: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """f(x) [B, ...] and the exact trace of its Jacobian, [B].

    One call of f and one backward pass for each dimension, one after the other: for small samples. f must
    treat the examples of a batch apart from one another. Reverse mode, as all networks here have.
    """
    value, vjp = jax.vjp(f, x)
    size = math.prod(x.shape[1:])

    def diagonal(i: Array) -> Array:
        basis = jnp.broadcast_to((jnp.arange(size) == i).astype(x.dtype)[None], (x.shape[0], size))
        (row,) = vjp(basis.reshape(x.shape))
        return row.reshape(x.shape[0], size)[:, i]

    return value, jnp.sum(jax.lax.map(diagonal, jnp.arange(size)), axis=0)


def value_and_sliced_trace(f: Callable[[Array], Array], x: Array, v: Array) -> tuple[Array, Array]:
    """f(x) [B, ...] and the mean over S slices of v^T (df/dx) v, [B].

    Its expectation is the trace where E[v v^T] = I (Skilling 1989; Hutchinson 1990). v [S, B, ...]: one call
    of f and S backward passes, one after the other; f as `value_and_trace`.
    """
    value, vjp = jax.vjp(f, x)

    def quadratic(v: Array) -> Array:
        (row,) = vjp(v)
        return jnp.sum((row * v).reshape(x.shape[0], -1), axis=1)

    return value, jnp.mean(jax.lax.map(quadratic, v), axis=0)
