"""The forward noising process of diffusion models, shared by their losses and their samplers.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)  (Ho et al. 2020, "Denoising Diffusion
Probabilistic Models", eq. 4). Time is an index t in 0..T-1, so the paper's step t is index t-1 here, and "the
step before t = 0" is the data itself, with alpha_bar = 1.

Samples have any shape: `x` is float32 [B, ...], and `t` is int32 [B].
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from jaxgen.types import Array, UserError

# What the network puts out: the noise, the clean sample, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
Prediction: TypeAlias = Literal["eps", "x0", "v"]
# The variance of the reverse step: that of q(x_{t-1} | x_t, x_0), or beta_t.
Variance: TypeAlias = Literal["fixed_small", "fixed_large"]
Spacing: TypeAlias = Literal["even", "leading", "trailing", "quadratic"]


class DiffusionSchedule(NamedTuple):
    """The coefficients of a forward process of T steps; every field is [T], float32 except `timestep`.

    They are computed in float64, with 1 - alpha_bar as -expm1(log alpha_bar), and only then rounded: in
    float32 1 - alpha_bar_0 = 1e-4 would keep four digits. `_prev` means one step earlier: alpha_bar is 1
    before t = 0.

    timestep: int32, the time at which the network is asked; 0..T-1 unless the schedule was respaced
    posterior_mean_x0, posterior_mean_xt: the weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0)
    posterior_variance: the variance of q(x_{t-1} | x_t, x_0), which is 0 at t = 0
    posterior_log_variance_clipped: its logarithm, with entry 0 replaced by entry 1 (by log beta if T = 1)
    """

    timestep: Array
    beta: Array
    alpha_bar: Array
    sqrt_alpha_bar: Array
    sqrt_one_minus_alpha_bar: Array
    sqrt_alpha_bar_prev: Array
    sqrt_one_minus_alpha_bar_prev: Array
    posterior_mean_x0: Array
    posterior_mean_xt: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return self.beta.shape[0]


def _from_betas(beta: np.ndarray, timestep: np.ndarray) -> DiffusionSchedule:
    """The schedule of the float64 steps `beta` [T], each in (0, 1)."""
    log_alpha = np.log1p(-beta)
    log_alpha_bar = np.cumsum(log_alpha)
    log_alpha_bar_prev = np.concatenate([[0.0], log_alpha_bar[:-1]])
    one_minus_alpha_bar = -np.expm1(log_alpha_bar)
    one_minus_alpha_bar_prev = -np.expm1(log_alpha_bar_prev)
    posterior_variance = beta * one_minus_alpha_bar_prev / one_minus_alpha_bar
    clipped = np.concatenate([posterior_variance[1:2] if len(beta) > 1 else beta, posterior_variance[1:]])
    coefficients = {
        "beta": beta,
        "alpha_bar": np.exp(log_alpha_bar),
        "sqrt_alpha_bar": np.exp(0.5 * log_alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(one_minus_alpha_bar),
        "sqrt_alpha_bar_prev": np.exp(0.5 * log_alpha_bar_prev),
        "sqrt_one_minus_alpha_bar_prev": np.sqrt(one_minus_alpha_bar_prev),
        "posterior_mean_x0": np.exp(0.5 * log_alpha_bar_prev) * beta / one_minus_alpha_bar,
        "posterior_mean_xt": np.exp(0.5 * log_alpha) * one_minus_alpha_bar_prev / one_minus_alpha_bar,
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(clipped),
    }
    return DiffusionSchedule(
        timestep=jnp.asarray(timestep, jnp.int32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in coefficients.items()},
    )


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise UserError(f"a diffusion schedule needs at least 1 step, but num_steps is {num_steps}.")


def linear_schedule(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiffusionSchedule:
    """Betas evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4).

    The defaults are the paper's for 1000 steps, where alpha_bar_T is 4e-5; with fewer steps the betas must
    grow in proportion (or `respace` be used), or x_T is far from N(0, I).

    Raises UserError unless num_steps >= 1 and 0 < beta_start <= beta_end < 1.
    """
    _check_num_steps(num_steps)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise UserError(
            f"a linear schedule needs 0 < beta_start <= beta_end < 1, but got {beta_start} and {beta_end}."
        )
    return _from_betas(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64), np.arange(num_steps))


def cosine_schedule(num_steps: int, s: float = 0.008, max_beta: float = 0.999) -> DiffusionSchedule:
    """Betas at most `max_beta`, for alpha_bar(u) = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2).

    u = t / T in [0, 1] (Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 17).

    Raises UserError unless num_steps >= 1, s >= 0 and 0 < max_beta < 1.
    """
    _check_num_steps(num_steps)
    if s < 0.0 or not 0.0 < max_beta < 1.0:
        raise UserError(
            f"a cosine schedule needs s >= 0 and 0 < max_beta < 1, but they are {s} and {max_beta}."
        )
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    f = np.cos((u + s) / (1.0 + s) * (np.pi / 2.0)) ** 2
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta), np.arange(num_steps))


def spaced_timesteps(total: int, num_steps: int, spacing: Spacing = "even") -> np.ndarray:
    """`num_steps` of the times 0..total-1, ascending, int [num_steps].

    even: both ends and evenly between them (Nichol & Dhariwal 2021, section 4); one step takes the last time
    leading: 0, k, 2k, ... with k = total // num_steps ("linear" in Song et al. 2021, appendix D.2)
    trailing: the same counted downwards from the last time
    quadratic: squares evenly spaced, up to 0.8 total (Song et al. 2021, appendix D.2, and the paper's code)

    Raises UserError if num_steps is not in 1..total, if the spacing is unknown, or if it gives the same time
    twice.
    """
    if not 1 <= num_steps <= total:
        raise UserError(f"the number of sampling steps must be in 1..{total}, but it is {num_steps}.")
    times: np.ndarray
    if spacing == "even":
        times = np.round(np.linspace(total - 1, 0, num_steps))[::-1]
    elif spacing == "leading":
        times = np.arange(num_steps) * (total // num_steps)
    elif spacing == "trailing":
        times = total - 1 - np.arange(num_steps)[::-1] * (total // num_steps)
    elif spacing == "quadratic":
        times = np.linspace(0.0, np.sqrt(0.8 * total), num_steps) ** 2
    else:
        raise UserError(f"unknown spacing {spacing!r}; choose one of {', '.join(get_args(Spacing))}.")
    times = times.astype(np.int64)
    if len(np.unique(times)) < num_steps:
        raise UserError(
            f"{spacing} spacing cannot give {num_steps} different times of {total}; ask for fewer."
        )
    return times


def respace(schedule: DiffusionSchedule, num_steps: int, spacing: Spacing = "even") -> DiffusionSchedule:
    """The process seen at `num_steps` of its times: beta'_i = 1 - alpha_bar_{s_i} / alpha_bar_{s_{i-1}}.

    Nichol & Dhariwal 2021, section 4. The network trained on `schedule` serves the new one, since
    `timestep` keeps the times that it knows. To be called outside jit; errors as `spaced_timesteps`.
    """
    times = spaced_timesteps(schedule.num_steps, num_steps, spacing)
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(schedule.beta, np.float64)))[times]
    beta = -np.expm1(np.diff(log_alpha_bar, prepend=0.0))
    return _from_betas(beta, np.asarray(schedule.timestep)[times])


def at(coefficient: Array, t: Array, x: Array) -> Array:
    """coefficient [T] at t [B], shaped [B, 1, ...] to multiply x [B, ...]."""
    return coefficient[t].reshape(t.shape + (1,) * (x.ndim - 1))


def q_sample(schedule: DiffusionSchedule, x0: Array, t: Array, eps: Array) -> Array:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, [B, ...] (Ho et al. 2020, eq. 4)."""
    return at(schedule.sqrt_alpha_bar, t, x0) * x0 + at(schedule.sqrt_one_minus_alpha_bar, t, x0) * eps


def q_posterior(schedule: DiffusionSchedule, x0: Array, x_t: Array, t: Array) -> tuple[Array, Array, Array]:
    """Mean [B, ...], variance and clipped log-variance [B, 1, ...] of q(x_{t-1} | x_t, x_0).

    Ho et al. 2020, eqs. 6-7. At t = 0 the mean is x0 and the variance 0; the log-variance is that of t = 1.
    """
    mean = at(schedule.posterior_mean_x0, t, x0) * x0 + at(schedule.posterior_mean_xt, t, x0) * x_t
    log_variance = at(schedule.posterior_log_variance_clipped, t, x0)
    return mean, at(schedule.posterior_variance, t, x0), log_variance


def p_mean_log_variance(
    schedule: DiffusionSchedule, x0_hat: Array, x_t: Array, t: Array, variance: Variance
) -> tuple[Array, Array]:
    """Mean [B, ...] and log-variance [B, 1, ...] of the reverse step p(x_{t-1} | x_t).

    Ho et al. 2020, section 3.2. The mean is that of q(x_{t-1} | x_t, x_0 = x0_hat). The variance is q's
    (fixed_small) or beta_t (fixed_large); at t = 0, where it is the width of the decoder, both take that of q
    at t = 1, as the paper's code does.
    """
    mean, _, log_variance = q_posterior(schedule, x0_hat, x_t, t)
    if variance == "fixed_large":
        log_beta = jnp.log(schedule.beta).at[0].set(schedule.posterior_log_variance_clipped[0])
        log_variance = at(log_beta, t, x_t)
    elif variance != "fixed_small":
        raise UserError(f"unknown variance {variance!r}; choose one of {', '.join(get_args(Variance))}.")
    return mean, log_variance


def predict_x0_from_eps(schedule: DiffusionSchedule, x_t: Array, t: Array, eps: Array) -> Array:
    """x0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) (Ho et al. 2020, eq. 15)."""
    noise = at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * eps
    return (x_t - noise) / at(schedule.sqrt_alpha_bar, t, x_t)


def predict_eps_from_x0(schedule: DiffusionSchedule, x_t: Array, t: Array, x0: Array) -> Array:
    """eps = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t), the inverse of `predict_x0_from_eps`."""
    signal = at(schedule.sqrt_alpha_bar, t, x_t) * x0
    return (x_t - signal) / at(schedule.sqrt_one_minus_alpha_bar, t, x_t)


def predict_x0_from_v(schedule: DiffusionSchedule, x_t: Array, t: Array, v: Array) -> Array:
    """x0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v (Salimans & Ho 2022, appendix D)."""
    return at(schedule.sqrt_alpha_bar, t, x_t) * x_t - at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * v


def predict_eps_from_v(schedule: DiffusionSchedule, x_t: Array, t: Array, v: Array) -> Array:
    """eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v (Salimans & Ho 2022, appendix D)."""
    return at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * x_t + at(schedule.sqrt_alpha_bar, t, x_t) * v


def v_target(schedule: DiffusionSchedule, x0: Array, t: Array, eps: Array) -> Array:
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0.

    Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", section 4.
    """
    return at(schedule.sqrt_alpha_bar, t, x0) * eps - at(schedule.sqrt_one_minus_alpha_bar, t, x0) * x0


def prediction_target(
    schedule: DiffusionSchedule, prediction: Prediction, x0: Array, t: Array, eps: Array
) -> Array:
    """What a network of this prediction type should put out for x_t = q_sample(x0, t, eps), [B, ...]."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return v_target(schedule, x0, t, eps)
    raise _unknown_prediction(prediction)


def to_x0_and_eps(
    schedule: DiffusionSchedule, prediction: Prediction, output: Array, x_t: Array, t: Array
) -> tuple[Array, Array]:
    """The network's output [B, ...] as the x0 and the eps that it implies at x_t."""
    if prediction == "eps":
        return predict_x0_from_eps(schedule, x_t, t, output), output
    if prediction == "x0":
        return output, predict_eps_from_x0(schedule, x_t, t, output)
    if prediction == "v":
        return predict_x0_from_v(schedule, x_t, t, output), predict_eps_from_v(schedule, x_t, t, output)
    raise _unknown_prediction(prediction)


def _unknown_prediction(prediction: str) -> UserError:
    return UserError(f"unknown prediction {prediction!r}; choose one of {', '.join(get_args(Prediction))}.")
