"""Group normalisation with statistics in float32 whatever the compute type."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.types import Array


def num_groups_for(channels: int, num_groups: int) -> int:
    """`num_groups` where it divides `channels` with at least two channels a group, else a smaller number.

    With one channel a group the norm would subtract what the time embedding adds (a constant over space), so
    a narrow layer takes the largest divisor of `channels` that leaves at least four channels a group.
    """
    if channels % num_groups == 0 and channels > num_groups:
        return num_groups
    most = max(1, min(num_groups, channels // 4))
    return max(d for d in range(1, most + 1) if channels % d == 0)


def group_norm(x: Array, scale: Array, bias: Array, num_groups: int, epsilon: float) -> Array:
    """y = scale (x - mean) / sqrt(var + epsilon) + bias (Wu and He 2018, eq. 1, 2 and 6).

    Mean and variance are those of an example's group of neighbouring channels, over all positions.

    Args:
        x: `[B, H, W, C]`; scale, bias: `[C]`; num_groups: divides C.

    Returns:
        `[B, H, W, C]` of x's dtype; the arithmetic is float32.
    """
    groups = (x.shape[0], num_groups, x.shape[-1] // num_groups)

    def moment(values: Array) -> Array:
        # Over space first and over the channels of a group after: reductions that leave the channels in place
        # run on CPU at the speed of memory, one that takes a few neighbouring channels along does not.
        means = jnp.mean(values, axis=(1, 2)).reshape(groups)
        means = jnp.broadcast_to(jnp.mean(means, axis=-1, keepdims=True), groups)
        return means.reshape(x.shape[0], 1, 1, x.shape[-1])

    centred = x.astype(jnp.float32) - moment(x.astype(jnp.float32))
    inverse = jax.lax.rsqrt(moment(jnp.square(centred)) + epsilon)
    return (centred * (inverse * scale[None, None, None]) + bias[None, None, None]).astype(x.dtype)


class GroupNorm(nn.Module):
    """`group_norm` with learned `scale` and `bias` `[C]`; at most `num_groups` groups (`num_groups_for`)."""

    num_groups: int = 32
    epsilon: float = 1e-6
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        return group_norm(x, scale, bias, num_groups_for(channels, self.num_groups), self.epsilon)
