"""What auto-encoders are trained for: reconstruction, sparse and contracted codes, and the undoing of noise.

Images are in the project's range [-1, 1]; errors are told on the scale [0, 1], as in the literature, so that
they compare with those of PCA. Outputs of a decoder are `[B, H, W, C]`; losses are `[B]` unless they say
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.objectives.score_matching import gaussian_corruption, sum_dims
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree, UserError

Encode: TypeAlias = Callable[[PyTree, Array], Array]  # (params, x [B, H, W, C]) -> code [B, K]
Decode: TypeAlias = Callable[[PyTree, Array], Array]  # (params, code [B, K]) -> outputs [B, H, W, C]
Reconstruction: TypeAlias = Literal["squared_error", "cross_entropy"]


def to_pixels(x: Array) -> Array:
    """x in [-1, 1] on the scale [0, 1]."""
    return 0.5 * (x + 1.0)


def squared_error(image: Array, x: Array) -> Array:
    """(r - x)^2 with both on the scale [0, 1], elementwise, of images in [-1, 1].

    Summed over an image it is the error of Hinton & Salakhutdinov 2006 and of experiments/pca.py.
    """
    return jnp.square(0.5 * (image - x))


def cross_entropy(logits: Array, x: Array) -> Array:
    """-p log r - (1 - p) log(1 - r), elementwise, nats, with r = sigmoid(logits) and p = x on [0, 1].

    Hinton & Salakhutdinov 2006; least at r = p, where it is p's entropy and not 0. logits in (-inf, inf).
    """
    p = to_pixels(x)
    return -(p * jax.nn.log_sigmoid(logits) + (1.0 - p) * jax.nn.log_sigmoid(-logits))


# ---- codes


def sparsity_penalty(code: Array, target: float, mask: Array | None = None) -> Array:
    """sum_j KL(rho || rho_j), a scalar, with rho_j the mean of unit j over the batch (Ng 2011, section 3).

    KL(rho || r) = rho log(rho / r) + (1 - rho) log((1 - rho) / (1 - r)), nats. code `[B, K]` in (0, 1), as a
    sigmoid gives; target rho in (0, 1); mask `[B]`, 1 for the examples that count.
    """
    weight = jnp.ones(code.shape[0]) if mask is None else mask
    mean = jnp.sum(weight[:, None] * code, axis=0) / jnp.maximum(jnp.sum(weight), 1.0)
    mean = jnp.clip(mean, 1e-6, 1.0 - 1e-6)
    divergence = target * jnp.log(target / mean) + (1.0 - target) * jnp.log((1.0 - target) / (1.0 - mean))
    return jnp.sum(divergence)


def jacobian_norm(encode: Callable[[Array], Array], x: Array) -> Array:
    """||J||_F^2 = sum_ij (dh_j / dx_i)^2, `[B]`, exact (Rifai et al. 2011).

    One backward pass for each of the K units of the code `[B, K]`; encode must treat the examples of a batch
    apart from one another. Reverse mode, as convolutions have here.
    """
    code, pull_back = jax.vjp(encode, x)

    def of_unit(unit: Array) -> Array:
        (row,) = pull_back(jnp.broadcast_to(unit[None], code.shape))
        return sum_dims(jnp.square(row))

    return jnp.sum(jax.vmap(of_unit)(jnp.eye(code.shape[1], dtype=code.dtype)), axis=0)


def sigmoid_jacobian_norm(code: Array, weight: Array) -> Array:
    """sum_j (h_j (1 - h_j))^2 sum_i W_ij^2, `[B]`: `jacobian_norm` of h = sigmoid(x W + b).

    Rifai et al. 2011; code h `[B, K]`, weight `[D, K]`. It costs no backward pass.
    """
    return jnp.square(code * (1.0 - code)) @ jnp.sum(jnp.square(weight), axis=0)


# ---- noise


class Corrupted(NamedTuple):
    """x: what the encoder sees `[B, H, W, C]`; chosen: 1.0 for the entries that were corrupted, else 0.0."""

    x: Array
    chosen: Array


Corrupt: TypeAlias = Callable[[Key, Array], Corrupted]


def masking_noise(rate: float) -> Corrupt:
    """Each entry black, -1, with probability `rate` (Vincent et al. 2010: "forced to 0").

    Raises UserError unless 0 < rate < 1.
    """
    _check_rate(rate)

    def corrupt(key: Key, x: Array) -> Corrupted:
        chosen = jax.random.bernoulli(key, rate, x.shape)
        return Corrupted(jnp.where(chosen, jnp.asarray(-1.0, x.dtype), x), chosen.astype(x.dtype))

    return corrupt


def salt_and_pepper_noise(rate: float) -> Corrupt:
    """Each entry black or white, by a fair coin, with probability `rate` (Vincent et al. 2010).

    Raises UserError unless 0 < rate < 1.
    """
    _check_rate(rate)

    def corrupt(key: Key, x: Array) -> Corrupted:
        uniform = jax.random.uniform(key, x.shape)
        chosen = uniform < rate
        extreme = jnp.where(uniform < 0.5 * rate, -1.0, 1.0).astype(x.dtype)
        return Corrupted(jnp.where(chosen, extreme, x), chosen.astype(x.dtype))

    return corrupt


def gaussian_noise(sigma: float) -> Corrupt:
    """x + sigma eps, in the units of x, that is of a range of 2 (Vincent et al. 2010).

    Every entry is corrupted. Raises UserError unless sigma > 0.
    """
    add = gaussian_corruption(sigma)
    return lambda key, x: Corrupted(add(key, x), jnp.ones_like(x))


def _check_rate(rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise UserError(f"the share of pixels to corrupt must be between 0 and 1, but it is {rate}.")


def emphasised(errors: Array, chosen: Array, alpha: float, beta: float) -> Array:
    """alpha sum_{j corrupted} e_j + beta sum_{j not} e_j, `[B]` (Vincent et al. 2010).

    alpha = beta = 1 is the plain sum; alpha = 1, beta = 0 is the paper's "full emphasis". errors and chosen
    are `[B, H, W, C]`.
    """
    return sum_dims(errors * (alpha * chosen + beta * (1.0 - chosen)))


# ---- the loss


def make_loss(
    encode: Encode,
    decode: Decode,
    image_of: Callable[[Array], Array],
    reconstruction: Reconstruction = "squared_error",
    *,
    corrupt: Corrupt | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    sparsity_weight: float = 0.0,
    sparsity_target: float = 0.05,
    contraction: Callable[[PyTree, Array], Array] | None = None,
    contraction_weight: float = 0.0,
) -> LossFn:
    """Reconstruction of x from the code of a corrupted x, and penalties on that code.

    image_of: decoder's outputs -> image in [-1, 1]; with cross_entropy the outputs must be logits
    contraction: (params, x `[B, H, W, C]`) -> ||J||^2 `[B]`, weighted by `contraction_weight`
    sparsity_weight: of `sparsity_penalty`, which is over the batch, so that each part of an accumulated batch
        has its own

    Metrics: "loss", "squared_error" (per image on the scale [0, 1], whatever the loss), and "sparsity" and
    "contraction" where they weigh. Uses batch["image"] `[B, H, W, C]` in [-1, 1] and batch["mask"] `[B]`.
    """

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        x, mask = batch["image"], batch.get("mask")
        seen = Corrupted(x, jnp.zeros_like(x)) if corrupt is None else corrupt(key, x)
        code = encode(params, seen.x)
        outputs = decode(params, code)
        squared = squared_error(image_of(outputs), x)
        errors = squared if reconstruction == "squared_error" else cross_entropy(outputs, x)
        if corrupt is None:
            per_example = sum_dims(errors)
        else:
            per_example = emphasised(errors, seen.chosen, alpha, beta)
        metrics = {"squared_error": Mean.of(sum_dims(squared), mask)}
        if contraction is not None and contraction_weight:
            contracted = contraction(params, seen.x)
            per_example = per_example + contraction_weight * contracted
            metrics["contraction"] = Mean.of(contracted, mask)
        if sparsity_weight:
            sparsity = sparsity_penalty(code, sparsity_target, mask)
            per_example = per_example + sparsity_weight * sparsity
            metrics["sparsity"] = Mean.of(jnp.broadcast_to(sparsity, x.shape[:1]), mask)
        mean = Mean.of(per_example, mask)
        return mean.value_or_zero, ({"loss": mean, **metrics}, model_state)

    return loss_fn
