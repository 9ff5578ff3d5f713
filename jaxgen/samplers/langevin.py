"""Langevin dynamics, its Metropolis-adjusted form, and annealed Langevin dynamics (Song & Ermon 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import Denoiser, over, score_from_denoised
from jaxgen.samplers.chain import fold_each, normal
from jaxgen.types import Array, Chain, Key, UserError

# (keys [B], shape) -> where the chains begin, [B, *shape]; entry i drawn with keys[i] alone.
Init = Callable[[Key, tuple[int, ...]], Array]


def langevin_step(x: Array, score: Array, step_size: Array | float, noise: Array) -> Array:
    """x + alpha / 2 s(x) + sqrt(alpha) z, [B, ...], with alpha = step_size (Song & Ermon 2019, eq. 4)."""
    return x + 0.5 * step_size * score + jnp.sqrt(step_size) * noise


def _check_steps(num_steps: int, step_size: float) -> None:
    if num_steps < 1 or not step_size > 0.0:
        raise UserError(
            f"Langevin dynamics needs at least 1 step and a positive step size, but got {num_steps} steps of "
            f"{step_size}."
        )


def langevin_chain(
    score: Callable[[Array], Array], *, num_steps: int, step_size: float, init: Init = normal
) -> Chain:
    """Unadjusted Langevin dynamics, one call of `score` a step.

    Song & Ermon 2019, eq. 4. For N(0, V) its samples have the variance V / (1 - step_size / (4 V)), and it
    diverges from step_size = 4 V. It crosses from mode to mode only where the density between them is not
    small.

    score: x [B, ...] -> grad log p(x) [B, ...]

    Raises UserError unless num_steps >= 1 and step_size > 0.
    """
    _check_steps(num_steps, step_size)

    def step(keys: Key, x: Array, alpha: Array) -> Array:
        return langevin_step(x, score(x).astype(x.dtype), alpha, normal(keys, x.shape[1:]))

    return Chain(init=init, step=step, xs=jnp.full(num_steps, step_size, jnp.float32), finish=lambda x: x)


class MalaState(NamedTuple):
    """B chains: where they are, log p and its gradient there, and how many proposals each has accepted."""

    x: Array  # [B, ...]
    log_density: Array  # [B]
    score: Array  # [B, ...]
    num_accepted: Array  # int32 [B]


def mala_log_ratio(
    x: Array, score: Array, proposal: Array, proposal_score: Array, step_size: Array | float
) -> Array:
    """log q(x | x') - log q(x' | x), [B], for q(x' | x) = N(x + alpha / 2 s(x), alpha I)."""
    back = x - proposal - 0.5 * step_size * proposal_score
    forth = proposal - x - 0.5 * step_size * score
    difference = (jnp.square(forth) - jnp.square(back)).reshape(x.shape[0], -1)
    return 0.5 * jnp.sum(difference, axis=1) / step_size


def mala_chain(
    log_density: Callable[[Array], Array], *, num_steps: int, step_size: float, init: Init = normal
) -> Chain:
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996), which leaves p itself unchanged.

    A step of `langevin_chain` is a proposal, accepted with probability min(1, p(x') q(x | x') / (p(x) q(x' |
    x))). One call of `log_density` a step, with its gradient, and one at the start. The carry is a
    `MalaState`: `chain._replace(finish=lambda state: state.num_accepted)` tells the acceptances.

    log_density: x [B, ...] -> log p(x) [B], up to a constant, each example apart from the others

    Raises UserError unless num_steps >= 1 and step_size > 0.
    """
    _check_steps(num_steps, step_size)

    def evaluate(x: Array) -> tuple[Array, Array]:
        value, vjp = jax.vjp(log_density, x)
        (gradient,) = vjp(jnp.ones_like(value))
        return value, gradient

    def start(keys: Key, shape: tuple[int, ...]) -> MalaState:
        x = init(keys, shape)
        return MalaState(x, *evaluate(x), jnp.zeros(x.shape[0], jnp.int32))

    def step(keys: Key, state: MalaState, alpha: Array) -> MalaState:
        noise_keys, uniform_keys = fold_each(keys, 0), fold_each(keys, 1)
        proposal = langevin_step(state.x, state.score, alpha, normal(noise_keys, state.x.shape[1:]))
        value, gradient = evaluate(proposal)
        log_ratio = value - state.log_density
        log_ratio += mala_log_ratio(state.x, state.score, proposal, gradient, alpha)
        # The logarithm of a uniform draw, never that of 0; a proposal that is not a number is not accepted.
        threshold = -jax.vmap(jax.random.exponential)(uniform_keys)
        accept = threshold < log_ratio
        return MalaState(
            x=jnp.where(over(accept, proposal), proposal, state.x),
            log_density=jnp.where(accept, value, state.log_density),
            score=jnp.where(over(accept, proposal), gradient, state.score),
            num_accepted=state.num_accepted + accept.astype(jnp.int32),
        )

    return Chain(
        init=start,
        step=step,
        xs=jnp.full(num_steps, step_size, jnp.float32),
        finish=lambda state: state.x,
    )


class _Level(NamedTuple):
    """One step of the anneal: x + drift s(x, sigma) + noise z."""

    sigma: Array
    drift: Array
    noise: Array


def annealed_langevin_chain(
    denoiser: Denoiser,
    sigmas: Sequence[float] | np.ndarray,
    *,
    steps_per_level: int,
    step_size: float,
    denoise: bool = True,
    init: Init | None = None,
) -> Chain:
    """Langevin dynamics at each of the noise levels in turn, with alpha_i = step_size sigma_i^2 / sigma_L^2.

    Song & Ermon 2019, Algorithm 1. One call of `denoiser` a step, and one more with `denoise`.

    sigmas: [L], decreasing; see `denoising.geometric_sigmas`
    step_size: the paper's epsilon, that of the last level. A level is stable while it is below 4 sigma_L^2,
        and mixes in about 2 sigma_L^2 / step_size steps if its noise is wider than the data.
    denoise: end with x = A(x, sigma_L), which takes the last level's noise away (Jolicoeur-Martineau et al.
        2021; the paper ends without)
    init: N(0, sigma_1^2 I) if None. The paper draws uniformly from the range of the pixels; give a starting
        point here to go on from it, as to anneal an image from a middle level.

    Raises UserError unless the levels decrease and are positive, steps_per_level >= 1 and step_size > 0.
    """
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) == 0 or not (levels > 0.0).all() or (np.diff(levels) >= 0.0).any():
        raise UserError(
            f"annealing needs positive noise levels, the largest first, but they are {levels.tolist()}."
        )
    _check_steps(steps_per_level, step_size)
    alpha = np.repeat(step_size * np.square(levels / levels[-1]), steps_per_level)
    sigma, drift, noise = np.repeat(levels, steps_per_level), 0.5 * alpha, np.sqrt(alpha)
    if denoise:
        # A(x) = x + sigma^2 s(x) is one more step, of that drift and without noise.
        sigma, drift = np.append(sigma, levels[-1]), np.append(drift, np.square(levels[-1]))
        noise = np.append(noise, 0.0)

    def start(keys: Key, shape: tuple[int, ...]) -> Array:
        return init(keys, shape) if init is not None else levels[0].astype(np.float32) * normal(keys, shape)

    def step(keys: Key, x: Array, level: _Level) -> Array:
        sigmas = jnp.full(x.shape[:1], level.sigma)
        score = score_from_denoised(x, denoiser(x, sigmas).astype(x.dtype), sigmas)
        return x + level.drift * score + level.noise * normal(keys, x.shape[1:])

    return Chain(
        init=start,
        step=step,
        xs=_Level(*(jnp.asarray(values, jnp.float32) for values in (sigma, drift, noise))),
        finish=lambda x: x,
    )
