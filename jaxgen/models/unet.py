"""The U-Net of Ho et al. 2020 (appendix B): predicts noise (or x0, or v) from a noisy image and its time.

A level is `num_res_blocks` residual blocks at one spatial size, with attention where that size is in
`attention_resolutions`; between levels the size halves. The way up mirrors the way down with one block more a
level and takes the way down's feature maps by concatenation. The arithmetic is that of the paper's TensorFlow
code, and of diffusers' `UNet2DModel` with the config of `google/ddpm-cifar10-32`, whose weights
`jaxgen.interop.diffusers` reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.attention import AttentionBlock
from jaxgen.models.convolution import Conv
from jaxgen.models.dropout import Dropout
from jaxgen.models.embeddings import sinusoidal_embedding
from jaxgen.models.multihead import MultiHeadAttention, attention_mask
from jaxgen.models.normalization import GroupNorm
from jaxgen.types import Array, UserError

_fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_zeros = nn.initializers.zeros_init()


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + shortcut (1x1 where the width changes).

    The second convolution starts at zero, so that a fresh block is its shortcut.
    """

    features: int
    dropout: float = 0.0
    num_groups: int = 32
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, train: bool) -> Array:
        """Map x `[B, H, W, C]` and temb `[B, E]` (after its swish) to `[B, H, W, features]`."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.swish(GroupNorm(self.num_groups, param_dtype=self.param_dtype, name="norm_1")(x))
        h = Conv(self.features, name="conv_1", **types)(h)
        h = h + nn.Dense(self.features, kernel_init=_fan_avg, name="time", **types)(temb)[:, None, None, :]
        h = nn.swish(GroupNorm(self.num_groups, param_dtype=self.param_dtype, name="norm_2")(h))
        h = Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, kernel_init=_zeros, name="conv_2", **types)(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=_fan_avg, name="shortcut", **types)(x)
        return x + h


class Context(NamedTuple):
    """What else the network is told: N vectors an image, such as those of a caption's words.

    tokens: `[B, N, D]`; mask: bool `[B, N]`, which are real. The first is real and stands for the whole.
    """

    tokens: Array
    mask: Array


class CrossAttentionBlock(nn.Module):
    """x + W_O attention(group_norm(x), context) over the H*W positions (Rombach et al. 2022, section 3.3).

    head_dim: width of a head, dividing C; None is a single head. W_O starts at zero.
    """

    head_dim: int | None = None
    num_groups: int = 32
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        b, h, w, c = x.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = c // (self.head_dim or c)
        attention = MultiHeadAttention(c, heads, cross=True, out_init=_zeros, name="attention", **types)
        normed = GroupNorm(self.num_groups, param_dtype=self.param_dtype, name="norm")(x)
        q = attention.project_query(normed.reshape(b, h * w, c))
        k, v = attention.project_memory(context.tokens)
        mask = attention_mask(h * w, k.shape[2], causal=False, key_mask=context.mask)
        return x + attention.mix(q, k, v, mask, train=False).reshape(x.shape)


class UNet(nn.Module):
    """The network eps_theta(x_t, t) of Ho et al. 2020; the defaults are the paper's CIFAR-10 model (35.7M).

    Image sizes: height and width must be divisible by 2^(levels - 1), where levels is the number of
    `channel_multipliers`. So 32 takes up to six levels, 8 takes up to four, and 28 takes three (28 -> 14 ->
    7: seven is odd and cannot be halved again): for MNIST use three multipliers, with attention at 14 or 7.
    The middle always has attention.

    Attributes:
        channels: width of the first level.
        channel_multipliers: width of each level over `channels`.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: heights (in pixels) of the levels with attention.
        head_dim: width of an attention head, dividing the width of each level with attention; None is one
            head as wide as the level.
        dropout: rate inside residual blocks, at training time.
        out_channels: channels of the result.
        num_classes: with an int, labels 0 … num_classes-1 are embedded and added to the time embedding, and
            `num_classes` itself is the null label of classifier-free guidance; None: unconditional.
        num_groups: groups of each norm, fewer where a layer is narrow (`normalization.num_groups_for`).
        remat: recompute each block's activations in the backward pass: less memory, more time.
        dtype: type of the arithmetic; norms' moments and softmaxes stay float32.
        param_dtype: type of the parameters.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    head_dim: int | None = None
    dropout: float = 0.1
    out_channels: int = 3
    num_classes: int | None = None
    num_groups: int = 32
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, t: Array, label: Array | None = None, context: Context | None = None, *, train: bool
    ) -> Array:
        """Predict from a noisy image.

        Args:
            x: images `[B, H, W, C]`, nominally in [-1, 1] plus noise.
            t: times `[B]`, int or float, in steps.
            label: int `[B]` in [0, num_classes], or None for the null label.
            context: with one, every attention is followed by one over its tokens, and its first token is
                added to the time embedding (Nichol et al. 2021, section 3); None makes none of that.
            train: whether dropout is on (it then takes the random stream "dropout").

        Returns:
            float32 `[B, H, W, out_channels]`.

        Raises:
            UserError: when the fields contradict one another or the image's size.
        """
        self._check(x, label)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # nn.remat renames unnamed modules: with explicit names, checkpoints are the same with and without it.
        block_class = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention_class = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        cross_class = nn.remat(CrossAttentionBlock) if self.remat else CrossAttentionBlock
        levels = len(self.channel_multipliers)
        widths = [self.channels * m for m in self.channel_multipliers]
        temb = self._embed(t, label, context)

        def block(h: Array, level: int, name: str) -> Array:
            module = block_class(widths[level], self.dropout, self.num_groups, name=name, **types)
            return module(h, temb, train)

        def attend(h: Array, name: str) -> Array:
            h = attention_class(self.head_dim, self.num_groups, name=name, **types)(h)
            if context is None:
                return h
            return cross_class(self.head_dim, self.num_groups, name=f"{name}_context", **types)(h, context)

        h = Conv(self.channels, name="conv_in", **types)(x)
        skips = [h]
        for level in range(levels):
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = attend(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < levels - 1:
                # TensorFlow's SAME for stride 2 on an even size: zeros at the far end only.
                far_end = ((0, 1), (0, 1))
                name = f"down_{level}_downsample"
                h = Conv(widths[level], stride=2, padding=far_end, name=name, **types)(h)
                skips.append(h)

        h = block(h, levels - 1, "middle_block_0")
        h = attend(h, "middle_attention")
        h = block(h, levels - 1, "middle_block_1")

        for level in reversed(range(levels)):
            for i in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = attend(h, f"up_{level}_attention_{i}")
            if level > 0:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = Conv(widths[level], name=f"up_{level}_upsample", **types)(h)

        h = nn.swish(GroupNorm(self.num_groups, param_dtype=self.param_dtype, name="norm_out")(h))
        h = Conv(self.out_channels, kernel_init=_zeros, name="conv_out", **types)(h)
        return h.astype(jnp.float32)

    def _embed(self, t: Array, label: Array | None, context: Context | None) -> Array:
        """The embedding `[B, 4 * channels]` of time, class and context, after the swish before each use."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = 4 * self.channels
        temb = sinusoidal_embedding(t, self.channels)
        temb = nn.Dense(width, kernel_init=_fan_avg, name="time_1", **types)(temb)
        temb = nn.Dense(width, kernel_init=_fan_avg, name="time_2", **types)(nn.swish(temb))
        if self.num_classes is not None:
            if label is None:
                label = jnp.full(t.shape, self.num_classes, jnp.int32)
            temb = temb + nn.Embed(self.num_classes + 1, width, name="label", **types)(label)
        if context is not None:
            temb = temb + nn.Dense(width, name="context", **types)(context.tokens[:, 0])
        return nn.swish(temb)

    def _check(self, x: Array, label: Array | None) -> None:
        """Raise `UserError` where the fields cannot make a network for images shaped as x."""
        multipliers = self.channel_multipliers
        if not multipliers or any(not isinstance(m, int) or m < 1 for m in multipliers):
            raise UserError(f"channel_multipliers is {multipliers}: give one positive integer per level.")
        least = {"channels": 4, "num_res_blocks": 1, "out_channels": 1, "num_groups": 1, "num_classes": 1}
        for field, minimum in least.items():
            value = getattr(self, field)
            if value is not None and value < minimum:
                raise UserError(f"{field} is {value}: give at least {minimum}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: give a rate in [0, 1).")
        if x.ndim != 4:
            raise UserError(f"the images have shape {x.shape}: give [batch, height, width, channels].")
        factor = 2 ** (len(multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise UserError(
                f"images of {x.shape[1]}x{x.shape[2]} cannot be halved {len(multipliers) - 1} times: "
                f"use sizes divisible by {factor}, or fewer channel_multipliers."
            )
        sizes = [x.shape[1] >> level for level in range(len(multipliers))]
        for resolution in self.attention_resolutions:
            if resolution not in sizes:
                raise UserError(
                    f"attention_resolutions has {resolution}, but the heights of the levels are {sizes}: "
                    "choose among them."
                )
        attending = [
            m for m, size in zip(multipliers, sizes, strict=True) if size in self.attention_resolutions
        ]
        for width in (m * self.channels for m in (*attending, multipliers[-1])):
            if self.head_dim is not None and (self.head_dim < 1 or width % self.head_dim):
                raise UserError(
                    f"head_dim {self.head_dim} does not divide the width {width} of a level with attention: "
                    "choose a divisor, or None for one head."
                )
        if label is not None and self.num_classes is None:
            raise UserError("labels were given to an unconditional U-Net: set num_classes.")
