"""Denoising score matching in continuous time (Song et al. 2021) and EDM's loss (Karras et al. 2022).

Samples have any shape: `x` is float32 [B, ...]. As in `score_matching`, losses sum over dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxgen.denoising import Sde, over
from jaxgen.objectives.score_matching import make_mean_loss, sum_dims
from jaxgen.types import Array, Key, LossFn, PyTree, UserError

# lambda(t): "simple" is std^2, which makes all times alike in size; "likelihood" is diffusion^2, with which
# the loss bounds the divergence between data and model (Song, Durkan, Murray & Ermon 2021, theorem 1).
Weighting: TypeAlias = Literal["simple", "likelihood"]

# (params, x_t [B, ...], t float32 [B], dropout key) -> the noise in x_t, [B, ...]; the score is -noise / std.
EpsApply: TypeAlias = Callable[[PyTree, Array, Array, Key], Array]
# (params, x [B, ...], sigma [B], dropout key) -> E[x0 | x], [B, ...].
DenoiserApply: TypeAlias = Callable[[PyTree, Array, Array, Key], Array]


def continuous_loss(eps: Array, eps_hat: Array, weight: Array, std: Array) -> Array:
    """lambda / 2 ||s(x_t, t) - grad log p(x_t | x_0)||^2, [B], for s = -eps_hat / std; weight and std [B].

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", eq. 7: the
    target is -eps / std, so the norm is that of (eps_hat - eps) / std.
    """
    return 0.5 * weight / jnp.square(std) * sum_dims(jnp.square(eps_hat - eps))


def edm_loss(denoised: Array, x0: Array, sigma: Array, sigma_data: float) -> Array:
    """lambda(sigma) ||A(x) - x0||^2, [B], lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Karras et al. 2022, table 1: lambda is 1 / c_out^2, so that the network F itself has the weight 1 at all
    sigma [B].
    """
    weight = (jnp.square(sigma) + sigma_data**2) / jnp.square(sigma * sigma_data)
    return weight * sum_dims(jnp.square(denoised - x0))


def make_sde_loss(
    apply: EpsApply, sde: Sde, *, weighting: Weighting = "simple", t_min: float = 1e-5
) -> LossFn:
    """`continuous_loss` at times spread evenly over [t_min, 1]: one to each example, from a common offset.

    The offset is uniform, so each time is uniform too; spread out they make the loss vary less (Kingma et al.
    2021, appendix I.1).

    t_min: below it std is too small to divide by (Song et al. 2021, appendix C, take 1e-5)

    Uses batch["image"] [B, ...] and batch["mask"] [B] where there. Raises UserError for an unknown weighting
    or t_min outside (0, 1).
    """
    if weighting not in get_args(Weighting):
        raise UserError(f"unknown weighting {weighting!r}; choose one of {', '.join(get_args(Weighting))}.")
    if not 0.0 < t_min < 1.0:
        raise UserError(f"t_min, the first time that is trained, must be between 0 and 1, but it is {t_min}.")

    def per_example(params: PyTree, x: Array, key: Key) -> Array:
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        size = x.shape[0]
        spread = (jax.random.uniform(time_key) + jnp.arange(size) / size) % 1.0
        t = t_min + (1.0 - t_min) * spread
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        std = sde.std(t)
        x_t = over(sde.scale(t), x) * x + over(std, x) * eps
        eps_hat = apply(params, x_t, t, dropout_key).astype(x.dtype)
        weight = jnp.square(std if weighting == "simple" else sde.diffusion(t))
        return continuous_loss(eps, eps_hat, weight, std)

    return make_mean_loss(per_example)


def make_edm_loss(
    apply: DenoiserApply, *, sigma_data: float, p_mean: float = -1.2, p_std: float = 1.2
) -> LossFn:
    """`edm_loss` at log sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, table 1).

    apply: for instance `denoising.preconditioned_denoiser` of a network

    Uses batch["image"] [B, ...] and batch["mask"] [B] where there. Raises UserError unless sigma_data and
    p_std are positive.
    """
    if not sigma_data > 0.0 or not p_std > 0.0:
        raise UserError(f"sigma_data and p_std must be positive, but they are {sigma_data} and {p_std}.")

    def per_example(params: PyTree, x: Array, key: Key) -> Array:
        level_key, noise_key, dropout_key = jax.random.split(key, 3)
        sigma = jnp.exp(p_mean + p_std * jax.random.normal(level_key, x.shape[:1]))
        noisy = x + over(sigma, x) * jax.random.normal(noise_key, x.shape, x.dtype)
        return edm_loss(apply(params, noisy, sigma, dropout_key).astype(x.dtype), x, sigma, sigma_data)

    return make_mean_loss(per_example)
