"""Joint densities p(z, x) = p(z) p(x given z) with a discrete z: the class of naive Bayes, a mixture's
component.

`log_prob` sums z out; `predict_log_proba` divides by that sum, p(z given x) = p(z, x) / p(x). Observed,
partly observed and hidden z are one EM, with more or less evidence on z.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float, index_keys, log_normalize
from jaxgen.estimators.em import EMFit, run_em
from jaxgen.estimators.families import Family
from jaxgen.types import Array, Key, PyTree


class Mixture(NamedTuple):
    """log_weight: log p(z) `[K]`, normalised; components: the K densities of a family."""

    log_weight: Array
    components: PyTree


@partial(jax.jit, static_argnames="family")
def log_joint(family: Family, mixture: Mixture, x: ArrayLike) -> Array:
    """log p(z = k, x_n) `[N, K]`, nats, of `x` `[N, D]` (Bishop 2006, eq. 9.7 before the sum)."""
    return mixture.log_weight[None, :] + family.log_likelihood(mixture.components, as_float(x))


@partial(jax.jit, static_argnames="family")
def log_prob(family: Family, mixture: Mixture, x: ArrayLike) -> Array:
    """log p(x_n) = log sum_k p(k) p(x_n given k) `[N]`, nats (Bishop 2006, eq. 9.7)."""
    return logsumexp(log_joint(family, mixture, x), axis=1)


@partial(jax.jit, static_argnames="family")
def predict_log_proba(family: Family, mixture: Mixture, x: ArrayLike) -> Array:
    """log p(k given x_n) `[N, K]`, nats: the joint, normalised (Bayes' rule; Bishop 2006, eq. 9.13)."""
    return jax.nn.log_softmax(log_joint(family, mixture, x), axis=1)


@partial(jax.jit, static_argnames="family")
def predict(family: Family, mixture: Mixture, x: ArrayLike) -> Array:
    """The likeliest k `[N]`, int32, of each row of `x` `[N, D]` (Bayes' decision; Bishop 2006, section
    1.5.1).
    """
    return jnp.argmax(log_joint(family, mixture, x), axis=1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("family", "num"))
def sample(family: Family, mixture: Mixture, key: Key, num: int) -> tuple[Array, Array]:
    """Ancestral draws (z `[num]`, x `[num, D]`): z from its weights, then x (Bishop 2006, section 8.1.2)."""

    def draw(key: Key) -> tuple[Array, Array]:
        for_component, for_x = jax.random.split(key)
        k = jax.random.categorical(for_component, mixture.log_weight)
        return k, family.sample(mixture.components, k, for_x)

    return jax.vmap(draw)(index_keys(key, num))


def estimate(
    family: Family, x: Array, weight: Array, smoothing: ArrayLike, weight_smoothing: ArrayLike
) -> Mixture:
    """The M-step: the likeliest mixture of `x` `[N, D]`, given how far `weight` `[N, K]` each row is of each
    k.

    Bishop 2006, eq. 9.24-9.26. weight_smoothing: pseudo-count of each k in p(k).
    """
    components = family.estimate(x, weight, smoothing)
    return Mixture(log_normalize(jnp.sum(weight, axis=0) + weight_smoothing), components)


def em(
    family: Family,
    initial: Mixture,
    x: Array,
    evidence: Array,
    row_weight: Array,
    *,
    smoothing: ArrayLike,
    weight_smoothing: ArrayLike,
    max_steps: int,
    tolerance: ArrayLike,
) -> EMFit:
    """EM from `initial`; the objective is the mean over rows of log sum_k p(k, x) e^evidence, plus log
    priors.

    x: [N, D], without NaN
    evidence: log p(label given k) `[N, K]`: 0 where k is possible, -inf where a label rules it out; all zeros
    for
        a hidden z, one zero a row for an observed one
    row_weight: [N], 0 for rows that do not count
    """
    total = jnp.maximum(jnp.sum(row_weight), 1.0)

    def step(mixture: Mixture) -> tuple[Mixture, Array]:
        joint = log_joint(family, mixture, x) + evidence
        responsibility = jax.nn.softmax(joint, axis=1) * row_weight[:, None]
        log_prior = family.log_prior(mixture.components, smoothing)
        log_prior += weight_smoothing * jnp.sum(mixture.log_weight)
        objective = jnp.sum(row_weight * logsumexp(joint, axis=1)) + log_prior
        return estimate(family, x, responsibility, smoothing, weight_smoothing), objective / total

    return run_em(step, initial, max_steps, tolerance)
