"""Optimisers and learning-rate schedules from plain arguments, and the exponential moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxgen.types import Array, PyTree, UserError

Schedule = Callable[[Array], Array]
ScheduleName = Literal["constant", "cosine", "rsqrt", "step", "exponential"]
OptimizerName = Literal["adam", "sgd"]


def make_schedule(
    name: ScheduleName,
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    decay_rate: float = 0.1,
    decay_steps: tuple[int, ...] = (),
) -> Schedule:
    """A learning rate as a function of the number of updates already done.

    The first `warmup_steps` updates rise linearly, (n + 1) / warmup_steps, so that none of them is wasted at
    rate 0; the named decay multiplies that:
      constant     1
      cosine       ½ (1 + cos(π p)), p the share of the updates after warm-up that are done
      rsqrt        sqrt(warmup_steps / max(n + 1, warmup_steps)) (Vaswani et al. 2017)
      step         decay_rate at each update of `decay_steps`
      exponential  decay_rate^p, so the last update has decay_rate times the first one's rate
    """
    if name not in get_args(ScheduleName):
        raise UserError(f"optim.schedule is {name!r}; choose one of {', '.join(get_args(ScheduleName))}.")
    if learning_rate <= 0:
        raise UserError(f"optim.learning_rate must be above 0, not {learning_rate}.")
    if warmup_steps < 0:
        raise UserError(f"optim.warmup_steps must be at least 0, not {warmup_steps}.")
    if not 0 < decay_rate <= 1:
        raise UserError(f"optim.decay_rate must be in (0, 1], not {decay_rate}.")
    if name == "rsqrt" and warmup_steps == 0:
        raise UserError("optim.schedule=rsqrt needs optim.warmup_steps of at least 1.")
    if name == "step" and not decay_steps:
        raise UserError("optim.schedule=step needs optim.decay_steps, the updates at which the rate drops.")

    def schedule(count: Array) -> Array:
        done = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((done - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
        if name == "constant":
            decay = jnp.ones_like(done)
        elif name == "cosine":
            decay = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif name == "rsqrt":
            decay = jnp.sqrt(warmup_steps / jnp.maximum(done + 1, warmup_steps))
        elif name == "step":
            drops = sum((done >= at).astype(jnp.float32) for at in decay_steps)
            decay = jnp.power(decay_rate, drops)
        else:
            decay = decay_rate**progress
        warmup = jnp.minimum(1.0, (done + 1) / warmup_steps) if warmup_steps else 1.0
        return learning_rate * warmup * decay

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay acts on: matrices and kernels, not biases, scales or shifts."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def make_optimizer(
    name: OptimizerName,
    schedule: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Clip by global norm (0: off), then the named optimiser at the schedule's rate.

    adam: with weight_decay above 0 it is AdamW, decoupled decay (Loshchilov & Hutter 2019).
    sgd: momentum b1; weight decay is added to the gradient before the momentum, as He et al. 2016 train
    ResNets; b2 and eps are not used.
    """
    if name not in get_args(OptimizerName):
        raise UserError(f"optim.optimizer is {name!r}; choose one of {', '.join(get_args(OptimizerName))}.")
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise UserError(f"optim.b1 and optim.b2 must be in [0, 1), not {b1} and {b2}.")
    for field, value in (("eps", eps), ("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if value < 0:
            raise UserError(f"optim.{field} must be at least 0, not {value}.")
    decay = [optax.add_decayed_weights(weight_decay, mask=decay_mask)] if weight_decay else []
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "adam":
        direction = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps), *decay]
    else:
        direction = [*decay, optax.trace(decay=b1)]
    return optax.chain(*clip, *direction, optax.scale_by_learning_rate(schedule))


def ema_decay_at(step: Array, decay: float, *, warmup: bool) -> Array:
    """The decay of update number `step` (from 0); with warm-up min(decay, (1 + n) / (10 + n)).

    The warm-up keeps the random start from lingering in the average of a short run.
    """
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.asarray(decay, jnp.float32)


def ema_update(ema: PyTree, params: PyTree, decay: Array) -> PyTree:
    """ema <- decay * ema + (1 - decay) * params, leaf by leaf in the leaf's own dtype."""
    return jax.tree.map(lambda e, p: e + ((1 - decay) * (p - e)).astype(e.dtype), ema, params)
