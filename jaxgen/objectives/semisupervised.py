"""M2's bounds on log p(x, y) and log p(x), and its objective of few labels and many images.

Kingma, Rezende, Mohamed & Welling 2014, "Semi-supervised learning with deep generative models". The model is
p(y) p(z) p(x|y, z) with y uniform, z ~ N(0, I), binary pixels; q(y|x) classifies and q(z|x, y) is Gaussian.
Images are rows `[..., D]` of -1 and 1, classes one-hot `[..., K]`; all losses are in nats per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.objectives.classification import cross_entropy, is_most_probable
from jaxgen.objectives.pixelcnn import bernoulli_log_likelihood
from jaxgen.objectives.vae import Gaussian, gaussian_kl, reparameterise
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree, UserError


class Networks(NamedTuple):
    """M2's functions; leading axes are broadcast.

    classify: (params, x [..., D]) -> logits [..., K] of q(y|x)
    encode: (params, x [..., D], y [..., K]) -> q(z|x, y), [..., Z]
    decode: (params, z [..., Z], y [..., K]) -> logits [..., D] of p(x|y, z)
    num_classes, latent_dim: K and Z
    """

    classify: Callable[[PyTree, Array], Array]
    encode: Callable[[PyTree, Array, Array], Gaussian]
    decode: Callable[[PyTree, Array, Array], Array]
    num_classes: int
    latent_dim: int


def labelled_loss(log_likelihood: Array, log_prior: Array | float, kl: Array) -> Array:
    """L(x, y) = -E_q(z|x,y)[log p(x|y, z) + log p(y)] + KL(q(z|x, y) || p(z)) (eq. 6), elementwise.

    -L is at most log p(x, y).
    """
    return kl - log_likelihood - log_prior


def unlabelled_loss(labelled: Array, log_q: Array) -> Array:
    """U(x) = sum_y q(y|x) L(x, y) - H(q(y|x)) (eq. 7): [..., K], [..., K] -> [...].

    -U is at most log p(x), and -logsumexp(-L) where q is the best, proportional to exp(-L).
    """
    return jnp.sum(jnp.exp(log_q) * (labelled + log_q), axis=-1)


def extended_loss(
    labelled: Array, unlabelled: Array, classification: Array, *, labelled_weight: float, alpha: float
) -> Array:
    """J^alpha (eq. 8 and 9) for each unlabelled image, of means over the images of each kind; scalars.

    labelled_weight: labelled images for each unlabelled one in the paper's sum
    alpha: the paper's alpha over the number of unlabelled images (its setting is 0.1)
    """
    return labelled_weight * labelled + unlabelled + alpha * classification


def class_losses(networks: Networks, params: PyTree, x: Array, y: Array, eps: Array) -> Array:
    """L(x, y) with one draw of z: x [..., D], y [..., K], eps [..., Z] ~ N(0, I) -> [...]."""
    q = networks.encode(params, x, y)
    logits = networks.decode(params, reparameterise(q, eps), y)
    log_likelihood = jnp.sum(bernoulli_log_likelihood(logits, x), axis=-1)
    return labelled_loss(log_likelihood, -math.log(networks.num_classes), jnp.sum(gaussian_kl(q), axis=-1))


def all_class_losses(networks: Networks, params: PyTree, x: Array, key: Key) -> Array:
    """L(x, y) of every class y, each with a draw of z of its own: [B, D] -> [B, K]."""
    num, classes = x.shape[0], networks.num_classes
    eps = jax.random.normal(key, (num, classes, networks.latent_dim))
    return class_losses(networks, params, x[:, None, :], jnp.eye(classes)[None], eps)


def make_loss(networks: Networks, *, labelled_weight: float, alpha: float) -> LossFn:
    """`extended_loss` of `image` [U, D] without labels and `labelled_image` [L, D] with `label` int32 [L].

    Metrics: loss; labelled L, unlabelled U, cross_entropy and accuracy of q(y|x) on the labelled images.
    Reads `mask` [U] too, where there is one.

    Raises:
        UserError: a weight is negative.
    """
    if labelled_weight < 0 or alpha < 0:
        raise UserError(f"labelled_weight={labelled_weight} and alpha={alpha} must be at least 0.")

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        labelled_key, unlabelled_key = jax.random.split(key)
        x, label, mask = batch["labelled_image"], batch["label"], batch.get("mask")
        eps = jax.random.normal(labelled_key, (x.shape[0], networks.latent_dim))
        y = jax.nn.one_hot(label, networks.num_classes)
        labelled = Mean.of(class_losses(networks, params, x, y, eps))
        logits = networks.classify(params, x)
        classification = Mean.of(cross_entropy(logits, label))
        accuracy = Mean.of(is_most_probable(logits, label))

        log_q = jax.nn.log_softmax(networks.classify(params, batch["image"]))
        losses = all_class_losses(networks, params, batch["image"], unlabelled_key)
        unlabelled = Mean.of(unlabelled_loss(losses, log_q), mask)
        weights = {"labelled_weight": labelled_weight, "alpha": alpha}
        loss = extended_loss(labelled.value, unlabelled.value_or_zero, classification.value, **weights)
        metrics = {
            "loss": Mean(loss * unlabelled.count, unlabelled.count),
            "labelled": labelled,
            "unlabelled": unlabelled,
            "cross_entropy": classification,
            "accuracy": accuracy,
        }
        return loss, (metrics, model_state)

    return loss_fn
