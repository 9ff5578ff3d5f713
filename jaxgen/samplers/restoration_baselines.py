"""Restoration without learning: the Wiener filter and total variation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from numpy.typing import ArrayLike

from jaxgen.operators import LinearOperator, check_kernel, transfer_function
from jaxgen.samplers.restoration import data_gradient
from jaxgen.types import Array, Chain, Key, UserError


def wiener(y: Array, kernel: ArrayLike, noise_to_signal: ArrayLike) -> Array:
    """The best linear estimate of x from y = k * x + noise with periodic boundaries, [B, H, W, C].

    conj(K) / (|K|^2 + S_noise / S_x) times Y at every frequency (Wiener 1949). It is the posterior mean of a
    stationary Gaussian prior of mean 0, so take the mean of the image off before.

    kernel: [KH, KW] of odd sizes, or [B, KH, KW], one for each image
    noise_to_signal: S_noise / S_x, a number, or one that spreads to [B, H, W // 2 + 1] over the frequencies
        of `rfft2`: for white noise, its variance over the image's power at each frequency

    Raises UserError as `operators.check_kernel`.
    """
    height, width = y.shape[1:3]
    spectrum = transfer_function(jnp.asarray(check_kernel(kernel)), height, width)
    ratio = jnp.broadcast_to(jnp.asarray(noise_to_signal, y.dtype), (y.shape[0], *spectrum.shape[1:]))
    gain = jnp.conj(spectrum) / (jnp.square(jnp.abs(spectrum)) + ratio)
    restored = jnp.fft.rfft2(y, axes=(1, 2)) * gain[:, :, :, None]
    return jnp.fft.irfft2(restored, s=(height, width), axes=(1, 2))


def image_gradient(x: Array) -> Array:
    """Differences down and to the right, [B, H, W, C] -> [2, B, H, W, C]; 0 at the far edges."""
    down = jnp.pad(x[:, 1:] - x[:, :-1], ((0, 0), (0, 1), (0, 0), (0, 0)))
    right = jnp.pad(x[:, :, 1:] - x[:, :, :-1], ((0, 0), (0, 0), (0, 1), (0, 0)))
    return jnp.stack([down, right])


def image_gradient_adjoint(p: Array) -> Array:
    """The adjoint of `image_gradient`, [2, B, H, W, C] -> [B, H, W, C]: minus the divergence."""
    down, right = p[0, :, :-1], p[1, :, :, :-1]
    rows = jnp.pad(down, ((0, 0), (1, 0), (0, 0), (0, 0))) - jnp.pad(down, ((0, 0), (0, 1), (0, 0), (0, 0)))
    columns = jnp.pad(right, ((0, 0), (0, 0), (1, 0), (0, 0))) - jnp.pad(
        right, ((0, 0), (0, 0), (0, 1), (0, 0))
    )
    return rows + columns


def total_variation(x: Array) -> Array:
    """sum over pixels and channels of the norm of `image_gradient`, [B] (Rudin, Osher & Fatemi 1992)."""
    norm = jnp.sqrt(jnp.sum(jnp.square(image_gradient(x)), axis=0))
    return jnp.sum(norm, axis=(1, 2, 3))


class _PrimalDual(NamedTuple):
    x: Array
    dual: Array


def total_variation_chain(
    operator: LinearOperator, y: Array, start: Array, *, strength: float, num_steps: int = 300
) -> Chain:
    """argmin_x 1/2 ||A x - y||^2 + strength TV(x), for operators of norm at most 1.

    The primal-dual algorithm of Condat 2013 and Vu 2013: x' = x - tau (A^T (A x - y) + D^T p), and p' is p +
    rho D (2 x' - x) with its vectors shortened to at most `strength`; tau = 0.5 and rho = 0.15 satisfy 1 /
    tau - 8 rho >= 1 / 2. Of the strength of the noise, strength = sigma_d times 0.1 to 2 is usual.

    Raises UserError unless strength > 0 and num_steps >= 1.
    """
    if not strength > 0.0 or num_steps < 1:
        raise UserError(
            f"total variation needs a positive strength and at least 1 step, but got {strength} and "
            f"{num_steps}."
        )
    tau, rho = 0.5, 0.15

    def step(keys: Key, state: _PrimalDual, _: Array) -> _PrimalDual:
        x = state.x - tau * (data_gradient(operator, y, state.x) + image_gradient_adjoint(state.dual))
        dual = state.dual + rho * image_gradient(2.0 * x - state.x)
        norm = jnp.sqrt(jnp.sum(jnp.square(dual), axis=0, keepdims=True))
        return _PrimalDual(x, dual / jnp.maximum(norm / strength, 1.0))

    return Chain(
        init=lambda keys, shape: _PrimalDual(start, jnp.zeros((2, *start.shape), start.dtype)),
        step=step,
        xs=jnp.zeros(num_steps, jnp.float32),
        finish=lambda state: state.x,
    )
