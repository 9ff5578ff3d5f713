"""Naive Bayes: p(class) prod_d p(x_d given class), fitted by counting, or by EM where labels are missing.

The features' family is `GAUSSIAN_DIAGONAL`, `MULTINOMIAL` or `BERNOULLI` of `estimators.families`; the fitted
`Mixture` is used with this module's `log_joint`, `log_prob`, `predict_log_proba`, `predict` and `sample`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.estimators import mixture
from jaxgen.estimators.common import as_float, as_mask, masked, require_matrix
from jaxgen.estimators.em import EMFit
from jaxgen.estimators.families import Family
from jaxgen.estimators.mixture import Mixture, log_joint, log_prob, predict, predict_log_proba, sample
from jaxgen.types import Array, UserError

__all__ = ["fit", "fit_em", "log_joint", "log_prob", "predict", "predict_log_proba", "sample"]


def _rows(
    x: ArrayLike, label: ArrayLike, num_classes: int, mask: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """(x `[N, D]` without what is masked, one-hot labels `[N, K]`, zero where missing, mask `[N]`)."""
    x, label = as_float(x), jnp.asarray(label)
    require_matrix(x)
    if label.shape != x.shape[:1]:
        raise UserError(f"label has shape {label.shape}; give one label for each of the {x.shape[0]} rows.")
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, not {num_classes}.")
    mask = as_mask(x, mask)
    # jax.nn.one_hot is all zeros for a label outside 0..K-1, such as the -1 of a missing one.
    return masked(x, mask), jax.nn.one_hot(label, num_classes, dtype=x.dtype) * mask[:, None], mask


@partial(jax.jit, static_argnames=("family", "num_classes"))
def fit(
    family: Family,
    x: ArrayLike,
    label: ArrayLike,
    num_classes: int,
    mask: ArrayLike | None = None,
    *,
    smoothing: ArrayLike,
    prior_smoothing: ArrayLike = 0.0,
) -> Mixture:
    """The likeliest naive Bayes model of `x` `[N, D]` with `label` `[N]` in 0..K-1; rows labelled -1 are left
    out.

    Manning et al. 2008, eq. 13.5 and 13.7.
    smoothing: pseudo-count (Laplace: 1), or for Gaussians the least variance
    prior_smoothing: pseudo-count of each class in p(class); a class without rows gets probability 1e-30
    without it
    mask: [N], 1 for the rows that count

    Raises:
        UserError: the shapes of `x`, `label` and `mask` do not fit together.
    """
    x, one_hot, _ = _rows(x, label, num_classes, mask)
    return mixture.estimate(family, x, one_hot, smoothing, prior_smoothing)


@partial(jax.jit, static_argnames=("family", "num_classes", "max_steps"))
def fit_em(
    family: Family,
    x: ArrayLike,
    label: ArrayLike,
    num_classes: int,
    mask: ArrayLike | None = None,
    *,
    smoothing: ArrayLike,
    prior_smoothing: ArrayLike = 0.0,
    unlabelled_weight: ArrayLike = 1.0,
    max_steps: int = 100,
    tolerance: ArrayLike = 1e-6,
) -> EMFit:
    """Naive Bayes of labelled and unlabelled rows (label -1) by EM, started from the labelled ones alone.

    Nigam et al. 2000, table 1, with `unlabelled_weight` their lambda (eq. 10). The objective of the returned
    `EMFit` is the mean over rows of log p(x, label), or log p(x) without a label, plus the log prior that the
    smoothing stands for; it never falls. Arguments as for `fit`.

    Raises:
        UserError: the shapes of `x`, `label` and `mask` do not fit together, or `max_steps` is negative.
    """
    x, one_hot, mask = _rows(x, label, num_classes, mask)
    labelled = jnp.sum(one_hot, axis=1)
    evidence = jnp.where((one_hot > 0) | (labelled[:, None] == 0), 0.0, -jnp.inf).astype(x.dtype)
    return mixture.em(
        family,
        mixture.estimate(family, x, one_hot, smoothing, prior_smoothing),
        x,
        evidence,
        mask * jnp.where(labelled > 0, 1.0, unlabelled_weight),
        smoothing=smoothing,
        weight_smoothing=prior_smoothing,
        max_steps=max_steps,
        tolerance=tolerance,
    )
