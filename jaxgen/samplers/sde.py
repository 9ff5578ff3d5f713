"""Sampling by the reverse-time SDE, alone or with Langevin corrections (Song et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import Denoiser, Sde, over, sde_score
from jaxgen.samplers.chain import fold_each, normal
from jaxgen.samplers.langevin import langevin_step
from jaxgen.types import Array, Chain, Key, UserError


def reverse_sde_step(sde: Sde, x: Array, score: Array, t: Array, dt: float, noise: Array) -> Array:
    """x - (drift x - diffusion^2 s) dt + diffusion sqrt(dt) z, [B, ...], from t [B] back to t - dt.

    Euler-Maruyama on the reverse-time SDE (Song et al. 2021, "Score-Based Generative Modeling through
    Stochastic Differential Equations", eq. 6; Anderson 1982).
    """
    diffusion = over(sde.diffusion(t), x)
    mean = x - (over(sde.drift(t), x) * x - jnp.square(diffusion) * score) * dt
    return mean + diffusion * jnp.sqrt(dt) * noise


class _Instant(NamedTuple):
    t: Array
    noise: Array  # 1, but 0 at the last step


def reverse_sde_chain(
    denoiser: Denoiser,
    sde: Sde,
    *,
    num_steps: int,
    t_end: float = 1e-3,
    corrector_steps: int = 0,
    snr: float = 0.16,
) -> Chain:
    """From N(0, prior_std^2 I) at t = 1 to t_end in equal steps of time, the last of them without noise.

    Without correctors this is Euler-Maruyama; with them, each step is preceded by `corrector_steps` steps of
    Langevin dynamics at its time (Song et al. 2021, Algorithm 1, in the order of the paper's code). One call
    of `denoiser` for each step and each correction.

    t_end: the time at which sampling stops, and the data are taken to have the noise std(t_end) still
    snr: the size of the corrections, whose step is 4 (snr std(t))^2 in `langevin_step`. The paper divides
        the batch's mean norms of noise and score where this has their value for scores made of noise alone:
        so a sample does not depend on its batch, and the correction leaves p_t as it is.

    Raises UserError unless num_steps >= 1, corrector_steps >= 0, 0 < t_end < 1 and snr > 0.
    """
    if num_steps < 1 or corrector_steps < 0:
        raise UserError(
            f"the reverse SDE needs at least 1 step and 0 corrector steps, but got {num_steps} and "
            f"{corrector_steps}."
        )
    if not 0.0 < t_end < 1.0 or not snr > 0.0:
        raise UserError(f"the reverse SDE needs 0 < t_end < 1 and snr > 0, but they are {t_end} and {snr}.")
    dt = (1.0 - t_end) / num_steps
    score = sde_score(denoiser, sde)

    def score_at(x: Array, t: Array) -> Array:
        return score(x, t).astype(x.dtype)

    def start(keys: Key, shape: tuple[int, ...]) -> Array:
        return sde.prior_std * normal(keys, shape)

    def step(keys: Key, x: Array, instant: _Instant) -> Array:
        t = jnp.full(x.shape[:1], instant.t)

        def correct(x: Array, number: Array) -> tuple[Array, None]:
            alpha = over(4.0 * jnp.square(snr * sde.std(t)), x)
            return langevin_step(x, score_at(x, t), alpha, normal(fold_each(keys, number), x.shape[1:])), None

        if corrector_steps > 0:
            x, _ = jax.lax.scan(correct, x, jnp.arange(1, corrector_steps + 1, dtype=jnp.uint32))
        noise = instant.noise * normal(fold_each(keys, 0), x.shape[1:])
        return reverse_sde_step(sde, x, score_at(x, t), t, dt, noise)

    times = 1.0 - dt * np.arange(num_steps)
    noise = np.append(np.ones(num_steps - 1), 0.0)
    return Chain(
        init=start,
        step=step,
        xs=_Instant(jnp.asarray(times, jnp.float32), jnp.asarray(noise, jnp.float32)),
        finish=lambda x: x,
    )
