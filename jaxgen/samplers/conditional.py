"""Sampling given an observation: inpainting by annealed Langevin dynamics and by RePaint, and DPS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import Denoiser
from jaxgen.operators import LinearOperator, per_example_dot
from jaxgen.processes import DiffusionSchedule, Prediction, Variance, q_sample, to_x0_and_eps
from jaxgen.samplers.chain import fold_each, normal
from jaxgen.samplers.ddpm import Predict, ancestral_step
from jaxgen.samplers.langevin import Init, annealed_langevin_chain
from jaxgen.types import Array, Chain, Key, UserError


def _merge(mask: Array, known: Array, x: Array) -> Array:
    return jnp.where(jnp.broadcast_to(mask, x.shape) > 0, known, x)


def langevin_inpainting_chain(
    denoiser: Denoiser,
    sigmas: Sequence[float] | np.ndarray,
    known: Array,
    mask: Array,
    *,
    steps_per_level: int,
    step_size: float,
    init: Init | None = None,
) -> Chain:
    """`annealed_langevin_chain` whose known pixels are set, before each step, to known + sigma_i z.

    Song & Ermon 2019, appendix B.3, Algorithm 2, with a new z at every step (theirs is kept for a level). One
    call of `denoiser` a step. The known pixels of the samples are `known` exactly.

    known: [B, H, W, C]; mask: [B or 1, H, W, C or 1], 1 where known

    Raises UserError as `annealed_langevin_chain`.
    """
    chain = annealed_langevin_chain(
        denoiser, sigmas, steps_per_level=steps_per_level, step_size=step_size, init=init
    )

    def step(keys: Key, x: Array, level: NamedTuple) -> Array:
        noisy = known + level.sigma * normal(fold_each(keys, 1), x.shape[1:])  # type: ignore[attr-defined]
        moved: Array = chain.step(fold_each(keys, 0), _merge(mask, noisy, x), level)
        return moved

    return chain._replace(step=step, finish=lambda x: _merge(mask, known, x))


def repaint_levels(num_steps: int, jump_length: int, num_resamples: int) -> np.ndarray:
    """The noise levels that RePaint goes through, int [N + 1], from num_steps to 0 in steps of one.

    Lugmayr et al. 2022, section 4.2 and code: each time that the way down comes to a level 1 + k jump_length
    with as much above it, it goes up by `jump_length` again, num_resamples - 1 times.

    Raises UserError unless 1 <= jump_length <= num_steps and num_resamples >= 1.
    """
    if not 1 <= jump_length <= num_steps or num_resamples < 1:
        raise UserError(
            f"RePaint needs 1 <= jump_length <= {num_steps} steps and num_resamples >= 1, but got "
            f"{jump_length} and {num_resamples}."
        )
    left = dict.fromkeys(range(1, num_steps - jump_length + 1, jump_length), num_resamples - 1)
    levels = [num_steps]
    while levels[-1] > 0:
        levels.append(levels[-1] - 1)
        if left.get(levels[-1], 0) > 0:
            left[levels[-1]] -= 1
            levels += [levels[-1] + i for i in range(1, jump_length + 1)]
    return np.asarray(levels)


class _Move(NamedTuple):
    t: Array  # the schedule's index of the higher of the two levels
    down: Array


def repaint_chain(
    predict: Predict,
    schedule: DiffusionSchedule,
    known: Array,
    mask: Array,
    *,
    jump_length: int = 10,
    num_resamples: int = 10,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
    clip: bool = True,
) -> Chain:
    """Inpainting with an unconditional DDPM: the known part from q(x_t | x_0), the rest from the reverse
    step.

    Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", Algorithm 1,
    with the jumps back of `repaint_levels`, that let the two parts agree. One call of `predict` for each step
    down. For fewer steps pass `processes.respace(schedule, num_steps)`: the paper uses 250.

    known: [B, H, W, C]; mask: [B or 1, H, W, C or 1], 1 where known

    Errors as `repaint_levels`.
    """
    levels = repaint_levels(schedule.num_steps, jump_length, num_resamples)

    def step(keys: Key, x: Array, move: _Move) -> Array:
        t = jnp.full(x.shape[:1], move.t)

        def down() -> Array:
            output = predict(x, schedule.timestep[t]).astype(x.dtype)
            unknown = ancestral_step(
                schedule,
                x,
                t,
                output,
                normal(fold_each(keys, 0), x.shape[1:]),
                prediction=prediction,
                variance=variance,
                clip=clip,
            )
            noisy = q_sample(schedule, known, jnp.maximum(t - 1, 0), normal(fold_each(keys, 1), x.shape[1:]))
            return _merge(mask, jnp.where(move.t > 0, noisy, known), unknown)

        def up() -> Array:
            beta = schedule.beta[move.t]
            return jnp.sqrt(1.0 - beta) * x + jnp.sqrt(beta) * normal(fold_each(keys, 2), x.shape[1:])

        return jax.lax.cond(move.down, down, up)

    return Chain(
        init=normal,
        step=step,
        xs=_Move(
            jnp.asarray(np.maximum(levels[1:], levels[:-1]) - 1, jnp.int32),
            jnp.asarray(levels[1:] < levels[:-1]),
        ),
        finish=lambda x: x,
    )


def dps_chain(
    predict: Predict,
    schedule: DiffusionSchedule,
    operator: LinearOperator,
    y: Array,
    *,
    scale: float = 1.0,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_small",
    clip: bool = True,
) -> Chain:
    """Diffusion posterior sampling: the reverse step, then a step down the gradient of ||y - A x0_hat(x_t)||.

    Chung et al. 2023, "Diffusion Posterior Sampling for General Noisy Inverse Problems", Algorithm 1: x_{t-1}
    = x'_{t-1} - scale / ||r|| grad_{x_t} ||r||^2, r = y - A x0_hat (their step size, section 4.1; here
    written 2 scale grad ||r||). The gradient goes through the network: one call and one backward pass a step.
    An approximation, whatever the number of steps, as p(y | x_t) is taken to be p(y | x0_hat).

    scale: 0.3 to 1 for images in [-1, 1] and sigma_d about 0.05 (their appendix D)

    Raises UserError unless scale > 0.
    """
    if not scale > 0.0:
        raise UserError(f"DPS needs a positive scale, but it is {scale}.")

    def step(keys: Key, x: Array, index: Array) -> Array:
        t = jnp.full(x.shape[:1], index)

        def residual_norm(x: Array) -> tuple[Array, Array]:
            output = predict(x, schedule.timestep[t]).astype(x.dtype)
            x0, _ = to_x0_and_eps(schedule, prediction, output, x, t)
            residual = y - operator.apply(x0)
            return jnp.sqrt(per_example_dot(residual, residual) + 1e-12), output

        norm, vjp, output = jax.vjp(residual_norm, x, has_aux=True)
        (gradient,) = vjp(jnp.ones_like(norm))
        noise = normal(keys, x.shape[1:])
        reverse = ancestral_step(
            schedule, x, t, output, noise, prediction=prediction, variance=variance, clip=clip
        )
        return reverse - 2.0 * scale * gradient

    return Chain(
        init=normal,
        step=step,
        xs=jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32),
        finish=lambda x: x,
    )
