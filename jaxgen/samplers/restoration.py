"""Restoration with a denoiser as the prior: DAEP, DMSP, RED, and plug-and-play HQS and ADMM.

The observation is y = A x + sigma_d eps; A is a `LinearOperator` and the prior comes from a `Denoiser` used
at a noise level `sigma`. All are chains without a random start: `init` gives `start` [B, H, W, C], and a
chain's samples are the restored images. Pixels and noise levels have the same unit, for instance [-1, 1], in
which noise of 1 % of the range is 0.02. `clip` keeps pixels in a range, None lets them be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import Denoiser, denoised_at
from jaxgen.operators import (
    Boundary,
    LinearOperator,
    convolve,
    per_example_dot,
    regularised_least_squares,
)
from jaxgen.samplers.chain import normal
from jaxgen.types import Array, Chain, Key, UserError

Range: TypeAlias = tuple[float, float] | None
# (keys [B], x [B, ...]) -> the gradient to descend, [B, ...].
Gradient: TypeAlias = Callable[[Key, Array], Array]


def _clipped(x: Array, clip: Range) -> Array:
    return x if clip is None else jnp.clip(x, *clip)


def _check_positive(**values: float | np.ndarray) -> None:
    for name, value in values.items():
        if not np.all(value > 0.0):
            raise UserError(f"{name} must be positive, but it is {value}.")


def data_gradient(operator: LinearOperator, y: Array, x: Array) -> Array:
    """A^T (A x - y), [B, ...]: the gradient of 1/2 ||A x - y||^2."""
    return operator.adjoint(operator.apply(x) - y)


def daep_prior_gradient(denoiser: Denoiser, x: Array, sigma: float) -> Array:
    """1/2 grad ||A(x) - x||^2 = (J_A - I)^T (A(x) - x), [B, ...], with one backward pass through A.

    Bigdeli & Zwicker 2017, "Image Restoration using Autoencoding Priors", eq. 4, whose prior says how far the
    image is from where the autoencoder leaves images alone.
    """

    def residual(x: Array) -> Array:
        return denoised_at(denoiser, x, sigma) - x

    value, vjp = jax.vjp(residual, x)
    (gradient,) = vjp(value)
    return gradient


def dmsp_prior_gradient(denoiser: Denoiser, x: Array, sigma: float, noise: Array) -> Array:
    """x - A(x + sigma eta), [B, ...]: -sigma^2 times the gradient of log int g_sigma(eta) p(x + eta) d eta.

    Bigdeli, Jin, Favaro & Zwicker 2017, "Deep Mean-Shift Priors for Image Restoration", eqs. 7 and 9, with
    one draw eta = `noise` ~ N(0, I) in place of the expectation, as in its algorithm.
    """
    return x - denoised_at(denoiser, x + sigma * noise, sigma)


def red_prior_gradient(denoiser: Denoiser, x: Array, sigma: float) -> Array:
    """x - A(x), [B, ...]: the gradient of 1/2 x^T (x - A(x)) for denoisers that are locally homogeneous.

    Romano, Elad & Milanfar 2017, "The Little Engine That Could", eq. 12.
    """
    return x - denoised_at(denoiser, x, sigma)


def noise_blind_precision(error: Array, sigma: float, row_energy: float | Array | np.ndarray) -> Array:
    """lambda = N / (||A x - y||^2 + 2 N sigma^2 ||k||^2), [B, 1, 1, 1]: the estimate of 1 / sigma_d^2.

    Bigdeli et al. 2017, eq. 15 and code, for N pixels y; error = A x - y and row_energy = ||k||^2, the sum of
    the squared weights with which a pixel of A x is made (of a blur, those of its kernel).
    """
    num = error[0].size
    return num / (per_example_dot(error, error) + num * 2.0 * sigma**2 * row_energy)


class Descent(NamedTuple):
    """B images on their way down, and their velocity; both [B, ...]."""

    x: Array
    velocity: Array


def descend(state: Descent, gradient: Array, *, step_size: float, momentum: float, clip: Range) -> Descent:
    """v <- momentum v - step_size gradient; x <- clip(x + v)."""
    velocity = momentum * state.velocity - step_size * gradient
    return Descent(_clipped(state.x + velocity, clip), velocity)


def _descent_chain(
    gradient: Gradient, start: Array, num_steps: int, step_size: float, momentum: float, clip: Range
) -> Chain:
    if num_steps < 1 or not 0.0 <= momentum < 1.0:
        raise UserError(
            f"restoration needs at least 1 step and 0 <= momentum < 1, but got {num_steps} and {momentum}."
        )
    _check_positive(step_size=step_size)

    def step(keys: Key, state: Descent, _: Array) -> Descent:
        return descend(state, gradient(keys, state.x), step_size=step_size, momentum=momentum, clip=clip)

    return Chain(
        init=lambda keys, shape: Descent(start, jnp.zeros_like(start)),
        step=step,
        xs=jnp.zeros(num_steps, jnp.float32),
        finish=lambda state: state.x,
    )


def dmsp_chain(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Array,
    start: Array,
    *,
    sigma: float,
    noise_std: float | None = None,
    row_energy: float | np.ndarray = 1.0,
    num_steps: int = 300,
    step_size: float = 0.1,
    momentum: float = 0.9,
    clip: Range = (-1.0, 1.0),
) -> Chain:
    """Deep mean-shift priors: w A^T (A x - y) + (1 - w) (x - A(x + sigma eta)) descended with momentum.

    Bigdeli et al. 2017 and their code, whose defaults these are: w = lambda / (lambda + 1 / sigma^2), where
    lambda = 1 / sigma_d^2, or noise-blind the estimate of `noise_blind_precision` at every step. One call of
    `denoiser` a step.

    sigma: of the denoiser; the paper's is 11 of 255
    noise_std: sigma_d, or None for noise-blind, which needs `row_energy`, for all or [B, 1, 1, 1]

    Raises UserError unless num_steps >= 1, 0 <= momentum < 1 and the rest is positive.
    """
    _check_positive(sigma=sigma, row_energy=row_energy, noise_std=1.0 if noise_std is None else noise_std)

    def gradient(keys: Key, x: Array) -> Array:
        prior = dmsp_prior_gradient(denoiser, x, sigma, normal(keys, x.shape[1:]))
        error = operator.apply(x) - y
        if noise_std is None:
            precision = noise_blind_precision(error, sigma, row_energy)
        else:
            precision = jnp.full((x.shape[0], 1, 1, 1), 1.0 / noise_std**2, x.dtype)
        weight = precision / (precision + 1.0 / sigma**2)
        return weight * operator.adjoint(error) + (1.0 - weight) * prior

    return _descent_chain(gradient, start, num_steps, step_size, momentum, clip)


class BlindDescent(NamedTuple):
    """B images and the kernels [B, KH, KW] that are found with them, each with its velocity."""

    image: Descent
    kernel: Descent


def normalised_kernel(kernel: Array) -> Array:
    """Kernels [B, KH, KW] with what is negative set to 0, scaled to sum to 1."""
    positive = jnp.maximum(kernel, 0.0)
    return positive / jnp.maximum(jnp.sum(positive, axis=(1, 2), keepdims=True), 1e-12)


def dmsp_kernel_blind_chain(
    denoiser: Denoiser,
    y: Array,
    start: Array,
    kernel: Array,
    *,
    sigma: float,
    boundary: Boundary = "valid",
    num_steps: int = 1000,
    step_size: float = 0.1,
    kernel_step_size: float = 0.1,
    momentum: float = 0.9,
    clip: Range = (-1.0, 1.0),
) -> Chain:
    """`dmsp_chain` noise-blind, with the kernel of the blur descended together with the image.

    Bigdeli et al. 2017, section 4.2: both follow the gradient of the data term, the kernel kept positive and
    of sum 1. Here the kernel's gradient is divided by the energy of the image, ||x - mean||^2, so that its
    step does not depend on the image's size and contrast (the paper gives no scale).
    `chain._replace(finish=lambda state: state.kernel.x)` gives the kernels.

    kernel: [B, KH, KW] of odd sizes, where they begin: for instance flat

    Raises UserError unless num_steps >= 1, 0 <= momentum < 1 and the rest is positive.
    """
    _check_positive(sigma=sigma, step_size=step_size, kernel_step_size=kernel_step_size)
    if num_steps < 1 or not 0.0 <= momentum < 1.0:
        raise UserError(
            f"restoration needs at least 1 step and 0 <= momentum < 1, but got {num_steps} and {momentum}."
        )

    def step(keys: Key, state: BlindDescent, _: Array) -> BlindDescent:
        x, kernel = state.image.x, state.kernel.x
        made, vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, boundary), x, kernel)
        error = made - y
        to_image, to_kernel = vjp(error)
        row_energy = jnp.sum(jnp.square(kernel), axis=(1, 2))[:, None, None, None]
        precision = noise_blind_precision(error, sigma, row_energy)
        weight = precision / (precision + 1.0 / sigma**2)
        prior = dmsp_prior_gradient(denoiser, x, sigma, normal(keys, x.shape[1:]))
        image = descend(
            state.image,
            weight * to_image + (1.0 - weight) * prior,
            step_size=step_size,
            momentum=momentum,
            clip=clip,
        )
        centred = x - jnp.mean(x, axis=(1, 2), keepdims=True)
        energy = jnp.maximum(per_example_dot(centred, centred)[:, :, 0, 0], 1e-12)[:, :, None]
        moved = descend(
            state.kernel, to_kernel / energy, step_size=kernel_step_size, momentum=momentum, clip=None
        )
        return BlindDescent(image, Descent(normalised_kernel(moved.x), moved.velocity))

    return Chain(
        init=lambda keys, shape: BlindDescent(
            Descent(start, jnp.zeros_like(start)), Descent(kernel, jnp.zeros_like(kernel))
        ),
        step=step,
        xs=jnp.zeros(num_steps, jnp.float32),
        finish=lambda state: state.image.x,
    )


def daep_chain(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Array,
    start: Array,
    *,
    sigma: float,
    noise_std: float,
    gamma: float = 27.5,
    num_steps: int = 300,
    step_size: float = 0.1,
    momentum: float = 0.9,
    clip: Range = (-1.0, 1.0),
) -> Chain:
    """Denoising autoencoder priors: ||A x - y||^2 / sigma_d^2 + gamma ||A(x) - x||^2 / (2 sigma^2) descended.

    Bigdeli & Zwicker 2017, eq. 5, with the step, momentum and gamma of their code (4 times 6.875), where the
    two weights are scaled to sum to 1. One call of `denoiser` and one backward pass a step. Deviation: the
    code adds noise before the autoencoder; here the gradient is exact.

    sigma: of the denoiser; the paper's is 25 of 255

    Raises UserError unless num_steps >= 1, 0 <= momentum < 1 and the rest is positive.
    """
    _check_positive(sigma=sigma, noise_std=noise_std, gamma=gamma)
    prior_precision, precision = gamma / (2.0 * sigma**2), 1.0 / noise_std**2
    weight = precision / (precision + prior_precision)

    def gradient(keys: Key, x: Array) -> Array:
        prior = daep_prior_gradient(denoiser, x, sigma)
        return weight * data_gradient(operator, y, x) + (1.0 - weight) * prior

    return _descent_chain(gradient, start, num_steps, step_size, momentum, clip)


def red_chain(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Array,
    start: Array,
    *,
    sigma: float,
    noise_std: float,
    strength: float = 1.0,
    num_steps: int = 300,
    step_size: float = 0.1,
    momentum: float = 0.9,
    clip: Range = (-1.0, 1.0),
) -> Chain:
    """Regularisation by denoising: A^T (A x - y) / sigma_d^2 + strength (x - A(x)) / sigma^2 descended.

    Romano et al. 2017, eq. 16 (steepest descent), with momentum, and the two weights scaled to sum to 1, as
    `dmsp_chain` has them. One call of `denoiser` a step.

    Raises UserError unless num_steps >= 1, 0 <= momentum < 1 and the rest is positive.
    """
    _check_positive(sigma=sigma, noise_std=noise_std, strength=strength)
    prior_precision, precision = strength / sigma**2, 1.0 / noise_std**2
    weight = precision / (precision + prior_precision)

    def gradient(keys: Key, x: Array) -> Array:
        prior = red_prior_gradient(denoiser, x, sigma)
        return weight * data_gradient(operator, y, x) + (1.0 - weight) * prior

    return _descent_chain(gradient, start, num_steps, step_size, momentum, clip)


def hqs_chain(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Array,
    start: Array,
    *,
    sigmas: Sequence[float] | np.ndarray,
    noise_std: float,
    strength: float = 0.23,
    num_cg: int = 20,
) -> Chain:
    """Plug-and-play by half-quadratic splitting: z solves the data term near x, then x = A(z, sigma_k).

    Zhang et al. 2021, "Plug-and-Play Image Restoration with Deep Denoiser Prior", eq. 6: z = argmin 1/2 ||A z
    - y||^2 + strength sigma_d^2 / sigma_k^2 / 2 ||z - x||^2, by `num_cg` conjugate gradients. One call of
    `denoiser` for each of the noise levels `sigmas`, which decrease (theirs: 49 of 255 to sigma_d, evenly in
    the logarithm, in 8 to 40 steps; strength 0.23).

    Raises UserError unless there is a level and all values are positive.
    """
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) == 0 or not (levels > 0.0).all():
        raise UserError(f"noise levels must be a list of positive numbers, but they are {levels.tolist()}.")
    _check_positive(noise_std=noise_std, strength=strength, num_cg=num_cg)

    def step(keys: Key, x: Array, sigma: Array) -> Array:
        weight = strength * jnp.square(noise_std / sigma)
        z = regularised_least_squares(operator, y, x, weight, num_cg)
        return denoised_at(denoiser, z, sigma)

    return Chain(
        init=lambda keys, shape: start,
        step=step,
        xs=jnp.asarray(levels, jnp.float32),
        finish=lambda x: x,
    )


class AdmmState(NamedTuple):
    """B images as the denoiser left them and their scaled dual variables; both [B, ...]."""

    z: Array
    dual: Array


def admm_chain(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Array,
    start: Array,
    *,
    sigma: float,
    noise_std: float,
    num_steps: int = 50,
    num_cg: int = 20,
) -> Chain:
    """Plug-and-play ADMM: the proximal step of the prior is the denoiser at `sigma`.

    Venkatakrishnan, Bouman & Wohlberg 2013, "Plug-and-Play Priors for Model Based Reconstruction", section 3:
    x = argmin ||A x - y||^2 / (2 sigma_d^2) + ||x - z + u||^2 / (2 sigma^2), by `num_cg` conjugate gradients;
    z = A(x + u); u = u + x - z. One call of `denoiser` a step. For a Gaussian prior, whose denoiser is its
    proximal step, it goes to the posterior mean of that prior.

    Raises UserError unless all values are positive.
    """
    _check_positive(sigma=sigma, noise_std=noise_std, num_steps=num_steps, num_cg=num_cg)
    weight = (noise_std / sigma) ** 2

    def step(keys: Key, state: AdmmState, _: Array) -> AdmmState:
        x = regularised_least_squares(operator, y, state.z - state.dual, weight, num_cg)
        z = denoised_at(denoiser, x + state.dual, sigma)
        return AdmmState(z, state.dual + x - z)

    return Chain(
        init=lambda keys, shape: AdmmState(start, jnp.zeros_like(start)),
        step=step,
        xs=jnp.zeros(num_steps, jnp.float32),
        finish=lambda state: state.z,
    )
