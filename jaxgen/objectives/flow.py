"""The exact likelihood of images under a normalising flow, by uniform dequantisation, in bits/dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.objectives import label_of
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree

# (params, y [B, H, W, C], label int32 [B] or None) -> (z, a list of [B, ...], log|det dz/dy| [B])
Forward: TypeAlias = Callable[[PyTree, Array, Array | None], tuple[Sequence[Array], Array]]


def dequantise(x: Array, u: Array, num_levels: int) -> Array:
    """(k + u) / num_levels - 1/2 in [-1/2, 1/2), k the level of x in [-1, 1] and u uniform in [0, 1).

    Theis et al. 2016, section 3.1: the density of this y, averaged over u, is num_levels^D times the
    probability of x.
    """
    level = jnp.round((x + 1.0) * ((num_levels - 1) / 2.0))
    return (level + u) / num_levels - 0.5


def quantise(y: Array, num_levels: int) -> Array:
    """The x in [-1, 1] whose dequantised values y is among; what lies outside goes to the nearest level."""
    level = jnp.clip(jnp.floor((y + 0.5) * num_levels), 0, num_levels - 1)
    return 2.0 * level / (num_levels - 1) - 1.0


def standard_normal_log_prob(zs: Sequence[Array]) -> Array:
    """log N(z; 0, I) summed over all dimensions of all of zs, `[B, ...]` each -> `[B]`, nats."""
    per_array = [
        jnp.sum(-0.5 * (jnp.square(z) + math.log(2.0 * math.pi)).reshape(z.shape[0], -1), 1) for z in zs
    ]
    return sum(per_array[1:], start=per_array[0])


def flow_log_likelihood(zs: Sequence[Array], log_det: Array) -> Array:
    """log p(y) = log p(z) + log|det dz/dy|, `[B]`, nats (Kingma & Dhariwal 2018, eq. 6)."""
    return standard_normal_log_prob(zs) + log_det


def discrete_bits_per_dim(log_density: Array, num_dims: int, num_levels: int) -> Array:
    """-log2 P(x) / D, at most, from log p(y) of the dequantised y in nats (Kingma & Dhariwal 2018, eq. 2).

    In expectation over u an upper bound of the bits/dim of the discrete model (Jensen).
    """
    return (num_dims * math.log(num_levels) - log_density) / (num_dims * math.log(2.0))


def make_loss(forward: Forward, *, num_levels: int, conditional: bool = False) -> LossFn:
    """The negative log-likelihood; metrics "loss" in bits/dim and its parts.

    "prior" and "volume" are -log2 p(z) / D and -log2|det| / D with the levels' share taken off the latter.
    Uses batch["image"] [B, H, W, C] in [-1, 1], batch["label"] int32 [B] where conditional, and
    batch["mask"] [B] where there. The noise of example i is drawn with fold_in(key, i).
    Raises UserError, when traced, where labels are missing.
    """

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        x, mask, label = batch["image"], batch.get("mask"), label_of(batch, conditional)
        y = dequantise(x, dequantisation_noise(key, x.shape), num_levels)
        zs, log_det = forward(params, y, label)
        num_dims = math.prod(x.shape[1:])
        bits = discrete_bits_per_dim(flow_log_likelihood(zs, log_det), num_dims, num_levels)
        prior = -standard_normal_log_prob(zs) / (num_dims * math.log(2.0))
        mean = Mean.of(bits, mask)
        metrics = {"loss": mean, "prior": Mean.of(prior, mask), "volume": Mean.of(bits - prior, mask)}
        return mean.value_or_zero, (metrics, model_state)

    return loss_fn


def dequantisation_noise(key: Key, shape: tuple[int, ...]) -> Array:
    """u of `dequantise`, `[B, ...]`, example i with fold_in(key, i)."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)
