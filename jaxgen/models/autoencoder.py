"""Encoders and decoders of images, by dense layers or by convolutions, and the auto-encoder made of them.

An encoder maps images `[B, H, W, C]` to `num_outputs` numbers each: the code of an auto-encoder, or the mean
and log variance of a VAE's code. A decoder maps codes `[B, K]` to `channels` numbers for each pixel. Both
take a `context` `[B, E]`, such as a class, beside what they map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import Conv
from jaxgen.types import Array, UserError

Activation: TypeAlias = Literal["tanh", "relu", "gelu", "sigmoid", "linear"]
Output: TypeAlias = Literal["sigmoid", "linear"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: Activation) -> Callable[[Array], Array]:
    """The function of this name, elementwise; UserError for an unknown one."""
    if name not in _ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; choose one of {', '.join(get_args(Activation))}.")
    return _ACTIVATIONS[name]


def image_of(outputs: Array, output: Output) -> Array:
    """A decoder's outputs as images in the project's range [-1, 1], elementwise.

    sigmoid: the outputs are logits of pixels in [0, 1], so the image is 2 sigmoid(o) - 1 = tanh(o / 2)
    linear: they are the image
    """
    return jnp.tanh(0.5 * outputs) if output == "sigmoid" else outputs


def with_context(h: Array, context: Array | None) -> Array:
    """h `[B, D]` and context `[B, E]` side by side; h where there is none."""
    return h if context is None else jnp.concatenate([h, context.astype(h.dtype)], axis=-1)


class Mlp(nn.Module):
    """Dense layers of `widths` with an activation after each, then a linear one to `num_outputs`."""

    widths: Sequence[int]
    num_outputs: int
    activation: Activation = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, width in enumerate(self.widths):
            h = activation(self.activation)(nn.Dense(width, name=f"dense_{i}", **types)(h))
        return nn.Dense(self.num_outputs, name="out", **types)(h).astype(jnp.float32)


class MlpEncoder(nn.Module):
    """The pixels as one vector through an `Mlp`: `[B, H, W, C]` -> `[B, num_outputs]`, float32.

    784-1000-500-250-30 (Hinton & Salakhutdinov 2006) is widths (1000, 500, 250) and num_outputs 30.
    """

    widths: Sequence[int]
    num_outputs: int
    activation: Activation = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        h = with_context(x.reshape(x.shape[0], -1), context)
        mlp = Mlp(self.widths, self.num_outputs, self.activation, self.dtype, self.param_dtype, name="mlp")
        return mlp(h)


class MlpDecoder(nn.Module):
    """A code through an `Mlp` to all pixels: `[B, K]` -> `[B, H, W, channels]`, float32.

    size: (H, W)
    """

    widths: Sequence[int]
    size: tuple[int, int]
    channels: int
    activation: Activation = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, code: Array, context: Array | None = None) -> Array:
        height, width = self.size
        num_outputs = height * width * self.channels
        mlp = Mlp(self.widths, num_outputs, self.activation, self.dtype, self.param_dtype, name="mlp")
        return mlp(with_context(code, context)).reshape(code.shape[0], height, width, self.channels)


class ConvEncoder(nn.Module):
    """3x3 convolutions of stride 2, one for each of `widths`, then a linear layer: -> `[B, num_outputs]`.

    Each halves the image, rounding up (Springenberg et al. 2015 have strides in place of pooling).
    """

    widths: Sequence[int]
    num_outputs: int
    activation: Activation = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, width in enumerate(self.widths):
            x = activation(self.activation)(Conv(width, stride=2, name=f"conv_{i}", **types)(x))
        h = with_context(x.reshape(x.shape[0], -1), context)
        return nn.Dense(self.num_outputs, name="out", **types)(h).astype(jnp.float32)


class ConvDecoder(nn.Module):
    """The way back of a `ConvEncoder` of the same `widths`: -> `[B, H, W, channels]`, float32.

    A dense layer gives the smallest image; each stage then doubles it by repeating pixels, crops what is
    beyond the encoder's size there, and convolves, which leaves no checkerboard (Odena et al. 2016).
    """

    widths: Sequence[int]
    size: tuple[int, int]
    channels: int
    activation: Activation = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, code: Array, context: Array | None = None) -> Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        act = activation(self.activation)
        sizes = [self.size]  # from the whole image down
        for _ in self.widths:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        height, width = sizes.pop()
        deepest = self.widths[-1] if self.widths else self.channels
        h = nn.Dense(height * width * deepest, name="dense", **types)(with_context(code, context))
        h = h.reshape(code.shape[0], height, width, deepest)
        for i, features in enumerate((*self.widths[-2::-1], self.channels) if self.widths else ()):
            height, width = sizes.pop()
            h = act(h).repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
            h = Conv(features, name=f"conv_{i}", **types)(h)
        return h.astype(jnp.float32)


class AutoEncoder(nn.Module):
    """h = f(x), r = g(h): an encoder and a decoder of images, with what is done to the code between them.

    encoder: images -> code before its activation `[B, K]`; decoder: code -> outputs `[B, H, W, C]`
    code_activation: of the code; sigmoid for the sparse and the contractive auto-encoder
    output: what the decoder's outputs are (`image_of`)
    """

    encoder: nn.Module
    decoder: nn.Module
    code_activation: Activation = "linear"
    output: Output = "sigmoid"

    def encode(self, x: Array) -> Array:
        """The code `[B, K]`, float32, of images `[B, H, W, C]` in [-1, 1]."""
        return activation(self.code_activation)(self.encoder(x))

    def decode(self, code: Array) -> Array:
        """The decoder's outputs `[B, H, W, C]`, float32, of which `image_of` makes an image."""
        return self.decoder(code)

    def __call__(self, x: Array) -> Array:
        """The reconstruction `[B, H, W, C]` in [-1, 1] of images in [-1, 1]: after training, a denoiser."""
        return image_of(self.decode(self.encode(x)), self.output)


def one_hot(label: Array | None, num_classes: int | None) -> Array | None:
    """Labels int32 `[B]` as a context `[B, num_classes]`; None where the model is told no class."""
    if num_classes is None or label is None:
        return None
    return jax.nn.one_hot(label, num_classes)
