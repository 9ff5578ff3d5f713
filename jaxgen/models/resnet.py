"""Residual networks (He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition")."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv
from jaxgen.models.dropout import Dropout
from jaxgen.types import Array

_HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _batch_norm(train: bool, dtype: DTypeLike, **options: Any) -> nn.BatchNorm:
    """Ioffe and Szegedy 2015, with the constants of the published networks: running averages keep 0.9."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **options)


def pad_shortcut(x: Array, features: int, stride: int) -> Array:
    """The parameter-free shortcut of section 3.3, option A: every `stride`-th pixel, new channels zero.

    `[B, H, W, C]` -> `[B, ceil(H / stride), ceil(W / stride), features]`
    """
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + F(x)), F = norm, conv3x3, relu, norm, conv3x3 read from the right (figure 5 left).

    residual: False leaves the shortcut out: a block of the plain network, which shrinks to the
        parameter-free shortcut where it is deleted
    project: the shortcut is a 1x1 convolution where the shape changes (option B), else `pad_shortcut`
    zero_init: F starts at zero, so that the block starts as its shortcut
    deleted: the block is its shortcut alone (Veit et al. 2016's lesion study); the parameters stay. May be a
        traced bool, so that one program serves for all blocks
    """

    features: int
    stride: int = 1
    residual: bool = True
    project: bool = False
    zero_init: bool = False
    deleted: bool | Array = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = _conv(self.features, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(_batch_norm(train, self.dtype, name="norm1")(y))
        y = Dropout(self.dropout)(y, deterministic=not train)
        y = _conv(self.features, 3, 1, self.dtype, "conv2")(y)
        y = _batch_norm(train, self.dtype, name="norm2", scale_init=_last_scale(self.zero_init))(y)
        return _joined(self, x, y, self.features, train)


class BottleneckBlock(nn.Module):
    """relu(shortcut(x) + F(x)) with F of 1x1, 3x3 and 1x1 convolutions to 4 `features` (figure 5 right).

    The 3x3 convolution has the stride, as in torchvision's networks; the other fields are `BasicBlock`'s.
    """

    features: int
    stride: int = 1
    residual: bool = True
    project: bool = True
    zero_init: bool = False
    deleted: bool | Array = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = _conv(self.features, 1, 1, self.dtype, "conv1")(x)
        y = nn.relu(_batch_norm(train, self.dtype, name="norm1")(y))
        y = _conv(self.features, 3, self.stride, self.dtype, "conv2")(y)
        y = nn.relu(_batch_norm(train, self.dtype, name="norm2")(y))
        y = Dropout(self.dropout)(y, deterministic=not train)
        y = _conv(4 * self.features, 1, 1, self.dtype, "conv3")(y)
        y = _batch_norm(train, self.dtype, name="norm3", scale_init=_last_scale(self.zero_init))(y)
        return _joined(self, x, y, 4 * self.features, train)


def _conv(features: int, size: int, stride: int, dtype: DTypeLike, name: str) -> Conv:
    return Conv(
        features, size, stride, use_bias=False, kernel_init=_HE_NORMAL, dtype=dtype, name=name
    )  # the norm that follows has the bias


def _last_scale(zero_init: bool) -> nn.initializers.Initializer:
    return nn.initializers.zeros_init() if zero_init else nn.initializers.ones_init()


def _joined(block: BasicBlock | BottleneckBlock, x: Array, y: Array, features: int, train: bool) -> Array:
    """relu of the branch y and, where the block is residual, the shortcut of its input x."""
    if not block.residual and block.deleted is False:
        return nn.relu(y)
    if x.shape[-1] == features and block.stride == 1:
        shortcut = x
    elif block.project and block.residual:
        shortcut = _conv(features, 1, block.stride, block.dtype, "project")(x)
        shortcut = _batch_norm(train, block.dtype, name="project_norm")(shortcut)
    else:
        shortcut = pad_shortcut(x, features, block.stride)
    joined = shortcut + y if block.residual else y
    return nn.relu(joined if block.deleted is False else jnp.where(block.deleted, shortcut, joined))


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average, class logits.

    stage_sizes: blocks of each stage; every stage but the first halves the image and doubles the channels
    channels: of the first stage
    bottleneck: blocks of three convolutions instead of two
    stem: `small`, one 3x3 convolution, for images of 32x32; `large`, a 7x7 one of stride 2 and 3x3 max
        pooling, for 224x224
    deleted: numbers, from 0 along the network, of the blocks that are left out; they may be traced
    The other fields are those of the blocks. The input is any `[B, H, W, C]`.
    """

    stage_sizes: Sequence[int]
    channels: int
    num_classes: int
    bottleneck: bool = False
    stem: str = "small"
    residual: bool = True
    project: bool = False
    zero_init: bool = False
    dropout: float = 0.0
    deleted: Sequence[int | Array] = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """The logits `[B, K]`, float32, of images in [-1, 1].

        With `train` the collection `batch_stats` must be mutable, and a dropout rate above 0 needs the random
        stream `dropout`.
        """
        x = x.astype(self.dtype)
        if self.stem == "large":
            x = Conv(
                self.channels,
                7,
                2,
                use_bias=False,
                kernel_init=_HE_NORMAL,
                dtype=self.dtype,
                name="stem",
            )(x)
            x = nn.relu(_batch_norm(train, self.dtype, name="stem_norm")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = _conv(self.channels, 3, 1, self.dtype, "stem")(x)
            x = nn.relu(_batch_norm(train, self.dtype, name="stem_norm")(x))
        block = BottleneckBlock if self.bottleneck else BasicBlock
        number = 0
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                x = block(
                    self.channels * 2**stage,
                    stride=2 if stage and index == 0 else 1,
                    residual=self.residual,
                    project=self.project,
                    zero_init=self.zero_init,
                    deleted=_among(number, self.deleted),
                    dropout=self.dropout,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{index}",
                )(x, train)
                number += 1
        features = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(features).astype(jnp.float32)


def _among(number: int, deleted: Sequence[int | Array]) -> bool | Array:
    """Whether the block is one of those deleted; False itself where no number can be."""
    return functools.reduce(operator.or_, (block == number for block in deleted), False)


def cifar_stages(depth: int) -> tuple[int, int, int]:
    """Blocks of the three stages of a CIFAR network of `depth` = 6 n + 2 weighted layers (section 4.2).

    20, 32, 44, 56, 110 are published, with 16 channels in the first stage and shortcuts of option A.
    Raises ValueError for another depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a CIFAR ResNet has 6 n + 2 layers, such as 20, 32, 44, 56 or 110, not {depth}")
    return ((depth - 2) // 6,) * 3
