"""Text-to-image: the U-Net of DDPM, told a caption through a Transformer's encoding of its words."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.transformer import TransformerEncoder, TransformerSpec, key_mask_of
from jaxgen.models.unet import Context, UNet
from jaxgen.types import Array


def space_to_depth(x: Array, patch: int) -> Array:
    """Images `[B, H, W, C]` as `[B, H / p, W / p, p p C]`: a patch of p x p pixels becomes one pixel."""
    b, h, w, c = x.shape
    patches = jnp.swapaxes(x.reshape(b, h // patch, patch, w // patch, patch, c), 2, 3)
    return patches.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Array, patch: int) -> Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    pixels = jnp.swapaxes(x.reshape(b, h, w, patch, patch, c // patch**2), 2, 3)
    return pixels.reshape(b, h * patch, w * patch, c // patch**2)


class TextToImage(nn.Module):
    """eps_theta(x_t, t, tau(y)): the text y, encoded by tau, is one more input (Rombach et al. 2022, eq. 3).

    Both are trained at once. The caption is encoded once for a whole sampling: `encode`, then `denoise` at
    every step. Tokens beyond a caption's length change nothing.

    vocab_size: of the tokeniser; spec: of the text's Transformer
    unet: the image's network, whose out_channels are patch^2 times the image's
    patch: side p of the patches that it sees as pixels; the work falls with p^2 (Luhman & Luhman 2022)
    """

    vocab_size: int
    spec: TransformerSpec
    unet: UNet
    patch: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.text = TransformerEncoder(
            self.vocab_size, self.spec, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def __call__(self, x: Array, t: Array, tokens: Array, lengths: Array, *, train: bool) -> Array:
        """The prediction, float32 `[B, H, W, C]`, from noisy images and captions.

        Args:
            x: `[B, H, W, C]`; t: `[B]`, in steps.
            tokens: int32 `[B, N]`; lengths: int32 `[B]`, at least 1, how many of them are real.
            train: whether dropout is on (it then takes the random stream "dropout").
        """
        return self.denoise(x, t, self.encode(tokens, lengths, train=train), train=train)

    def encode(self, tokens: Array, lengths: Array, *, train: bool = False) -> Context:
        """What the U-Net is told of a caption."""
        mask = key_mask_of(tokens, lengths)
        assert mask is not None
        return Context(self.text(tokens, lengths, train=train), mask)

    def denoise(self, x: Array, t: Array, context: Context, *, train: bool = False) -> Array:
        """The prediction from noisy images and what `encode` made of the captions."""
        return depth_to_space(
            self.unet(space_to_depth(x, self.patch), t, context=context, train=train), self.patch
        )
