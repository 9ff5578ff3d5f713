"""The losses that teach a network the score of the data, or to denoise, which is the same thing.

Score matching (Hyvärinen 2005), its sliced forms (Song et al. 2019), denoising score matching (Vincent 2011;
Song & Ermon 2019) and the denoising autoencoder (Vincent et al. 2008). `jaxgen.denoising` turns whatever is
trained here into a `Denoiser`.

Samples have any shape: `x` is float32 [B, ...]. All losses sum over dimensions, as the papers' norms do, so
that what `jaxgen.denoising` says of scores and denoisers holds between them without factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoising import over, value_and_sliced_trace, value_and_trace
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree, UserError

# How score matching finds the trace of the score's Jacobian: "exact" in one backward pass a dimension,
# "sliced" in one a slice, "sliced_vr" (variance-reduced) the same with the norm of the score kept whole.
Trace: TypeAlias = Literal["exact", "sliced", "sliced_vr"]

# (params, x [B, ...], dropout key) -> what is trained: a score, or a reconstruction, [B, ...].
Apply: TypeAlias = Callable[[PyTree, Array, Key], Array]
# (params, x [B, ...], sigma [B], dropout key) -> the score of the data smoothed with sigma, [B, ...].
ConditionalApply: TypeAlias = Callable[[PyTree, Array, Array, Key], Array]
# (key, x [B, ...]) -> a corrupted x.
Corrupt: TypeAlias = Callable[[Key, Array], Array]


def sum_dims(values: Array) -> Array:
    """[B, ...] -> [B]."""
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def explicit_score_matching(score: Callable[[Array], Array], x: Array) -> Array:
    """tr(grad s(x)) + 1/2 ||s(x)||^2, [B] (Hyvärinen 2005, theorem 1).

    Its expectation over the data is 1/2 E ||s - grad log p||^2 less 1/2 E ||grad log p||^2, which does not
    depend on s. The trace is exact: one backward pass a dimension. `score` maps [B, ...] to [B, ...], each
    example apart from the others.
    """
    value, trace = value_and_trace(score, x)
    return trace + 0.5 * sum_dims(jnp.square(value))


def sliced_score_matching(score: Callable[[Array], Array], x: Array, v: Array) -> Array:
    """v^T (grad s(x)) v + 1/2 (v^T s(x))^2, [B], averaged over S random directions v [S, B, ...].

    Song, Garg, Shi & Ermon 2019, "Sliced Score Matching", section 3.1. Where E[v v^T] = I, its expectation
    over v is `explicit_score_matching`. One backward pass a direction.
    """
    value, trace = value_and_sliced_trace(score, x, v)
    projected = jnp.sum((v * value[None]).reshape(*v.shape[:2], -1), axis=2)
    return trace + 0.5 * jnp.mean(jnp.square(projected), axis=0)


def sliced_score_matching_vr(score: Callable[[Array], Array], x: Array, v: Array) -> Array:
    """v^T (grad s(x)) v + 1/2 ||s(x)||^2, [B]: `sliced_score_matching` with less variance (SSM-VR).

    Song et al. 2019, section 3.1: the second term's expectation over v is taken exactly.
    """
    value, trace = value_and_sliced_trace(score, x, v)
    return trace + 0.5 * sum_dims(jnp.square(value))


def denoising_score_matching(score: Array, x: Array, x_noisy: Array, sigma: Array) -> Array:
    """1/2 ||s(x~) - (x - x~) / sigma^2||^2, [B], where x~ = x + sigma eps; sigma [B] (Vincent 2011, sec. 4).

    The target is the score of N(x, sigma^2 I) at x~; the best s is the score of the smoothed data.
    """
    return 0.5 * sum_dims(jnp.square(score - (x - x_noisy) / over(jnp.square(sigma), x)))


def noise_conditional_loss(score: Array, eps: Array, sigma: Array) -> Array:
    """sigma^2 `denoising_score_matching` = 1/2 ||sigma s(x + sigma eps, sigma) + eps||^2, [B].

    Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution", eqs. 5-6 with
    lambda(sigma) = sigma^2, which makes the loss of all levels alike in size. Written without a division.
    """
    return 0.5 * sum_dims(jnp.square(over(sigma, score) * score + eps))


def dae_loss(x: Array, reconstruction: Array) -> Array:
    """||A(x~) - x||^2, [B], the loss of the denoising autoencoder (Vincent et al. 2008).

    With Gaussian noise and s = (A - x~) / sigma^2 it is 2 sigma^4 `denoising_score_matching`.
    """
    return sum_dims(jnp.square(reconstruction - x))


def gaussian_corruption(sigma: float) -> Corrupt:
    """x + sigma eps. Raises UserError unless sigma > 0."""
    if not sigma > 0.0:
        raise UserError(f"the noise that a network is to remove must have sigma > 0, but it is {sigma}.")
    return lambda key, x: x + sigma * jax.random.normal(key, x.shape, x.dtype)


def make_mean_loss(per_example: Callable[[PyTree, Array, Key], Array]) -> LossFn:
    """The mean of (params, batch["image"], key) -> [B] over the examples that batch["mask"] keeps."""

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        mean = Mean.of(per_example(params, batch["image"], key), batch.get("mask"))
        return mean.value_or_zero, ({"loss": mean}, model_state)

    return loss_fn


def make_score_matching_loss(
    apply: Apply, *, trace: Trace = "exact", num_slices: int = 1, noise_std: float = 0.0
) -> LossFn:
    """Score matching on the data themselves, without noise levels.

    trace: see `Trace`
    num_slices: directions v for each example and step, each Rademacher (+-1 with equal chance) and with a
        backward pass of its own; the exact trace has no use for it
    noise_std: noise added to the data. Data on a lower-dimensional set have no density, and the loss does not
        settle without a little of it (Song & Ermon 2019, section 3.1, take 0.01)

    Uses batch["image"] [B, ...] and batch["mask"] [B] where there. The loss may be negative.

    Raises UserError for an unknown trace, num_slices < 1, or a negative noise_std.
    """
    if trace not in get_args(Trace):
        raise UserError(f"unknown trace {trace!r}; choose one of {', '.join(get_args(Trace))}.")
    if num_slices < 1:
        raise UserError(f"sliced score matching needs at least 1 slice, but num_slices is {num_slices}.")
    if noise_std < 0.0:
        raise UserError(f"noise_std is a standard deviation and cannot be negative, but it is {noise_std}.")
    sliced = sliced_score_matching if trace == "sliced" else sliced_score_matching_vr

    def per_example(params: PyTree, x: Array, key: Key) -> Array:
        noise_key, slice_key, dropout_key = jax.random.split(key, 3)
        if noise_std > 0.0:
            x = x + noise_std * jax.random.normal(noise_key, x.shape, x.dtype)

        def score(x: Array) -> Array:
            return apply(params, x, dropout_key).astype(x.dtype)

        if trace == "exact":
            return explicit_score_matching(score, x)
        return sliced(score, x, jax.random.rademacher(slice_key, (num_slices, *x.shape), x.dtype))

    return make_mean_loss(per_example)


def make_noise_conditional_loss(apply: ConditionalApply, sigmas: Sequence[float] | np.ndarray) -> LossFn:
    """Denoising score matching at a level drawn uniformly from `sigmas` [L] for each example.

    Song & Ermon 2019, eq. 6 with lambda(sigma) = sigma^2. One level makes it denoising score matching as
    Vincent 2011 has it, times sigma^2. For `sigmas` see `denoising.geometric_sigmas`.

    Uses batch["image"] [B, ...] and batch["mask"] [B] where there. Raises UserError unless there is a level
    and all are positive.
    """
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) == 0 or not (levels > 0.0).all():
        raise UserError(f"noise levels must be a list of positive numbers, but they are {levels.tolist()}.")

    def per_example(params: PyTree, x: Array, key: Key) -> Array:
        level_key, noise_key, dropout_key = jax.random.split(key, 3)
        index = jax.random.randint(level_key, x.shape[:1], 0, len(levels), jnp.int32)
        sigma = jnp.asarray(levels, jnp.float32)[index]
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        score = apply(params, x + over(sigma, x) * eps, sigma, dropout_key).astype(x.dtype)
        return noise_conditional_loss(score, eps, sigma)

    return make_mean_loss(per_example)


def make_dae_loss(apply: Apply, corrupt: Corrupt) -> LossFn:
    """The squared error of reconstructing x from `corrupt(key, x)`, summed over dimensions.

    Uses batch["image"] [B, ...] and batch["mask"] [B] where there.
    """

    def per_example(params: PyTree, x: Array, key: Key) -> Array:
        corrupt_key, dropout_key = jax.random.split(key)
        reconstruction = apply(params, corrupt(corrupt_key, x), dropout_key).astype(x.dtype)
        return dae_loss(x, reconstruction)

    return make_mean_loss(per_example)
