"""The InceptionV3 whose features the Fréchet Inception distance is measured in (FID, Heusel et al. 2017).

Szegedy et al. 2016, with the weights that TensorFlow published in 2015 and the pooling that goes with them:
the averages of the blocks leave the border's zeros out, and the last block takes the maximum instead. Modules
have the names that pytorch-fid gives them. It is made for looking only: each batch normalisation is folded
into the convolution before it, by `interop.inception`, which reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import conv2d
from jaxgen.types import Array

NUM_FEATURES, NUM_CLASSES = 2048, 1008
_SIZE = 299  # of the images that the weights were trained on


class Layer(NamedTuple):
    """A convolution and ReLU; without `same` there is no border of zeros, so the image shrinks."""

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


# Layers one after the other; of a tuple of layers each sees the same, and their channels are put together.
Branch = tuple[Layer | tuple[Layer, ...], ...]


class ConvReLU(nn.Module):
    """The convolution of a `Layer` with a bias, then ReLU: `[B, H, W, C]` -> `[B, H', W', features]`."""

    layer: Layer
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, features, size, stride, same = self.layer
        kernel = self.param("kernel", nn.initializers.he_normal(), (*size, x.shape[-1], features))
        bias = self.param("bias", nn.initializers.zeros_init(), (features,))
        height, width = ((k // 2, k // 2) if same else (0, 0) for k in size)
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), stride, (height, width))
        return nn.relu(y + bias.astype(self.dtype)[None, None, None])


class Mixed(nn.Module):
    """Branches side by side, and the pooled input, through a 1x1 layer where it has `pool_features`, last."""

    branches: tuple[Branch, ...]
    pool: Callable[[Array], Array]
    pool_features: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ends = [self._through(branch, x) for branch in self.branches]
        pooled = self.pool(x)
        if self.pool_features:
            pooled = self._layer(Layer("branch_pool", self.pool_features), pooled)
        return jnp.concatenate([*ends, pooled], axis=-1)

    def _layer(self, layer: Layer, x: Array) -> Array:
        return ConvReLU(layer, self.dtype, name=layer.name)(x)

    def _through(self, branch: Branch, x: Array) -> Array:
        for layer in branch:
            if isinstance(layer, Layer):
                x = self._layer(layer, x)
            else:
                x = jnp.concatenate([self._layer(each, x) for each in layer], axis=-1)
        return x


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _block_a() -> tuple[Branch, ...]:
    return (
        (Layer("branch1x1", 64),),
        (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
        (
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3)),
        ),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        (Layer("branch3x3", 384, (3, 3), 2, False),),
        (
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3), 2, False),
        ),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    return (
        (Layer("branch1x1", 192),),
        (
            Layer("branch7x7_1", width),
            Layer("branch7x7_2", width, (1, 7)),
            Layer("branch7x7_3", 192, (7, 1)),
        ),
        (
            Layer("branch7x7dbl_1", width),
            Layer("branch7x7dbl_2", width, (7, 1)),
            Layer("branch7x7dbl_3", width, (1, 7)),
            Layer("branch7x7dbl_4", width, (7, 1)),
            Layer("branch7x7dbl_5", 192, (1, 7)),
        ),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2, False)),
        (
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, (3, 3), 2, False),
        ),
    )


def _block_e() -> tuple[Branch, ...]:
    return (
        (Layer("branch1x1", 320),),
        (
            Layer("branch3x3_1", 384),
            (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
        ),
        (
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, (3, 3)),
            (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )


# Layers of the stem, and functions that shrink between them.
_STEM: tuple[Layer | Callable[[Array], Array], ...] = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), 2, False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    _halve,
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    _halve,
)
# (name, branches, pooling, features of the pooled branch)
_BLOCKS: tuple[tuple[str, tuple[Branch, ...], Callable[[Array], Array], int], ...] = (
    ("Mixed_5b", _block_a(), _average, 32),
    ("Mixed_5c", _block_a(), _average, 64),
    ("Mixed_5d", _block_a(), _average, 64),
    ("Mixed_6a", _block_b(), _halve, 0),
    ("Mixed_6b", _block_c(128), _average, 192),
    ("Mixed_6c", _block_c(160), _average, 192),
    ("Mixed_6d", _block_c(160), _average, 192),
    ("Mixed_6e", _block_c(192), _average, 192),
    ("Mixed_7a", _block_d(), _halve, 0),
    ("Mixed_7b", _block_e(), _average, 192),
    ("Mixed_7c", _block_e(), _maximum, 192),
)


class InceptionV3(nn.Module):
    """Images -> the 2,048 features of FID and the logits of its 1,008 classes.

    resize: bring the images to 299x299 first, as pytorch-fid does: bilinear, corners not aligned, and no
        filter where they shrink; else they must be at least 75 high and wide
    dtype: of the computation; the parameters are float32
    """

    resize: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Features `[B, 2048]` and logits `[B, 1008]`, float32, of images `[B, H, W, C]` in [-1, 1].

        C is 3, or 1 for grey, which is shown as its three equal colours.
        """
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        if self.resize:
            x = jax.image.resize(x, (len(x), _SIZE, _SIZE, 3), "bilinear", antialias=False)
        for part in _STEM:
            x = ConvReLU(part, self.dtype, name=part.name)(x) if isinstance(part, Layer) else part(x)
        for name, branches, pool, pool_features in _BLOCKS:
            x = Mixed(branches, pool, pool_features, self.dtype, name=name)(x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return features, nn.Dense(NUM_CLASSES, name="fc")(features)
