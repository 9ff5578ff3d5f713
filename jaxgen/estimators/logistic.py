"""Multinomial logistic regression: p(class given x) straight, the discriminative twin of naive Bayes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float, as_mask, masked, require_matrix
from jaxgen.types import Array, UserError


class Logistic(NamedTuple):
    """weight: `[D, K]`; bias: `[K]`."""

    weight: Array
    bias: Array


class LogisticFit(NamedTuple):
    """params; loss, their scalar objective in nats a row; gradient_norm, scalar; num_steps, int32 scalar."""

    params: Logistic
    loss: Array
    gradient_norm: Array
    num_steps: Array


@jax.jit
def predict_log_proba(params: Logistic, x: ArrayLike) -> Array:
    """log p(k given x_n) `[N, K]`, nats: the log softmax of x W + b (Bishop 2006, eq. 4.104) for `x` `[N,
    D]`.
    """
    logits = jnp.matmul(as_float(x), params.weight, precision="highest") + params.bias[None, :]
    return jax.nn.log_softmax(logits, axis=1)


@jax.jit
def predict(params: Logistic, x: ArrayLike) -> Array:
    """The likeliest class `[N]`, int32, of each row of `x` `[N, D]`: the argmax of Bishop 2006, eq. 4.104."""
    return jnp.argmax(predict_log_proba(params, x), axis=1).astype(jnp.int32)


@jax.jit
def log_prob(params: Logistic, x: ArrayLike, label: ArrayLike) -> Array:
    """log p(label_n given x_n) `[N]`, nats, of `x` `[N, D]` and `label` `[N]` in 0..K-1 (Bishop 2006, eq.
    4.107).
    """
    return jnp.take_along_axis(predict_log_proba(params, x), jnp.asarray(label)[:, None], axis=1)[:, 0]


@partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def fit(
    x: ArrayLike,
    label: ArrayLike,
    num_classes: int,
    mask: ArrayLike | None = None,
    *,
    l2: ArrayLike = 1.0,
    max_steps: int = 200,
    tolerance: ArrayLike = 1e-5,
) -> LogisticFit:
    """The minimum of [sum_n -log p(label_n given x_n) + l2/2 |W|^2] / N by L-BFGS (Liu & Nocedal 1989), from
    zero.

    `x` is `[N, D]`, `label` `[N]` in 0..K-1, `mask` `[N]` 1 for the rows that count. The bias is free, as in
    scikit-learn, whose C is 1 / l2. Convex, and strictly so in W for l2 > 0; with l2 = 0 and separable
    classes W grows until `max_steps`, at least 1. Ends where the gradient's norm is at most `tolerance`.

    Raises:
        UserError: the shapes of `x`, `label` and `mask` do not fit together, or there is no class.
    """
    x, label = as_float(x), jnp.asarray(label)
    require_matrix(x)
    if label.shape != x.shape[:1]:
        raise UserError(f"label has shape {label.shape}; give one label for each of the {x.shape[0]} rows.")
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, not {num_classes}.")
    mask = as_mask(x, mask)
    x, label = masked(x, mask), jnp.where(mask > 0, label, 0)
    total = jnp.maximum(jnp.sum(mask), 1.0)

    def objective(params: Logistic) -> Array:
        loss = -jnp.sum(mask * log_prob(params, x, label))
        return (loss + 0.5 * l2 * jnp.sum(params.weight**2)) / total

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def go_on(carry: tuple) -> Array:
        _, _, _, norm, i = carry
        return (i < max_steps) & (norm > tolerance)

    def body(carry: tuple) -> tuple:
        params, state, _, _, i = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        params = optax.apply_updates(params, updates)
        # The line search has already evaluated the point that it moved to.
        value, grad = value_and_grad(params, state=state)
        return params, state, value, optax.tree.norm(grad), i + 1

    start = Logistic(jnp.zeros((x.shape[1], num_classes), x.dtype), jnp.zeros(num_classes, x.dtype))
    # The first gradient is the loop's: outside it, weights that are all zero are one number repeated to the
    # compiler, and a product with that is not safe on CPU (docs/DESIGN.md).
    unknown = jnp.full((), jnp.inf, x.dtype)
    carry = (start, optimizer.init(start), unknown, unknown, jnp.int32(0))
    params, _, value, norm, num_steps = jax.lax.while_loop(go_on, body, carry)
    return LogisticFit(params, value, norm, num_steps)
