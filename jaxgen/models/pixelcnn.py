"""PixelCNN: a network whose output at a pixel sees the pixels before it, in reading order, and no others.

Two stacks (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders"): the vertical one
sees all rows above, the horizontal one the pixels to the left and, at each layer, what the vertical one found
at the same place. So nothing above is in a blind spot.

The same layers run in three ways: on a whole image, as in training; on one row of the vertical stack; and on
one pixel of the horizontal stack. The latter two keep what they will need again in the collection `cache`, so
that a sampler computes every feature once (`cached_functions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.convolution import conv2d
from jaxgen.models.dense import Dense
from jaxgen.models.dropout import Dropout
from jaxgen.types import Array, PyTree

Variant: TypeAlias = Literal["gated", "plusplus"]


class CausalConv(nn.Module):
    """A convolution whose output at (r, c) sees rows r - KH + 1 ... r of its input, and of their columns
    the KW around c where `centred`, else the KW up to c.

    kernel_size: (KH, KW), KW odd where centred. Outside the image the input counts as 0.
    `row` and `pixel` give a part of what the call on a whole image gives, from that part of the input and
    the cache that `start` makes; rows, and pixels within a row, come in order.
    """

    in_features: int
    features: int
    kernel_size: tuple[int, int]
    centred: bool
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shape = (*self.kernel_size, self.in_features, self.features)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        width = self.kernel_size[1]
        self.columns = (width // 2, width // 2) if self.centred else (width - 1, 0)

    def _convolve(self, x: Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
        y = conv2d(x.astype(self.dtype), self.kernel.astype(self.dtype), 1, padding)
        return y + self.bias.astype(self.dtype)[None, None, None]

    def __call__(self, x: Array) -> Array:
        """`[B, H, W, C]` -> `[B, H, W, features]`."""
        return self._convolve(x, ((self.kernel_size[0] - 1, 0), self.columns))

    def start(self, x: Array, width: int) -> Array:
        """An empty cache for images `width` wide; x `[B, 1, w, C]` is shaped as for `row` or `pixel`."""
        rows = (x.shape[0], self.kernel_size[0], width + sum(self.columns), self.in_features)
        self.put_variable("cache", "rows", jnp.zeros(rows, self.dtype))
        return jnp.zeros((*x.shape[:3], self.features), self.dtype)

    def row(self, x: Array) -> Array:
        """The next row: `[B, 1, W, C]` -> `[B, 1, W, features]`."""
        new = jnp.pad(x.astype(self.dtype), ((0, 0), (0, 0), self.columns, (0, 0)))
        rows = jnp.concatenate([self.get_variable("cache", "rows")[:, 1:], new], axis=1)
        self.put_variable("cache", "rows", rows)
        return self._convolve(rows, ((0, 0), (0, 0)))

    def pixel(self, x: Array, row: Array, column: Array) -> Array:
        """The pixel (row, column) where not `centred`: `[B, 1, 1, C]` -> `[B, 1, 1, features]`."""
        height, width = self.kernel_size
        # Row r is kept in slot r mod KH, so no row is ever moved; what is left in a slot of an older row is
        # to the right of the window, which reads only what has been written anew.
        slot = row % height
        rows: Array = self.get_variable("cache", "rows")
        rows = jax.lax.dynamic_update_slice(rows, x.astype(self.dtype), (0, slot, column + width - 1, 0))
        self.put_variable("cache", "rows", rows)
        window = jax.lax.dynamic_slice(rows, (0, 0, column, 0), (x.shape[0], height, width, self.in_features))
        window = jnp.roll(window, -(slot + 1), axis=1).reshape(x.shape[0], -1)
        y = window @ self.kernel.astype(self.dtype).reshape(-1, self.features)
        return (y + self.bias.astype(self.dtype)[None])[:, None, None]


# How a layer's convolutions are done: on a whole image, a row or a pixel.
Convolve: TypeAlias = Callable[[CausalConv, Array], Array]


def _whole(conv: CausalConv, x: Array) -> Array:
    return conv(x)


def gate(x: Array) -> Array:
    """tanh(a) sigmoid(b) of the halves a, b of the channels (van den Oord et al. 2016, eq. 2)."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)


def concat_elu(x: Array) -> Array:
    """ELU of x and of -x, side by side: `[..., C]` -> `[..., 2 C]`."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


class _LabelBias(nn.Module):
    """A learned bias `[B, 1, 1, features]` for each class, V^T h of van den Oord et al. 2016, eq. 4."""

    num_classes: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, label: Array) -> Array:
        return nn.Embed(self.num_classes, self.features, dtype=self.dtype)(label)[:, None, None]


class GatedLayer(nn.Module):
    """A layer of the gated PixelCNN (van den Oord et al. 2016, figure 2), for features of both stacks."""

    features: int
    num_classes: int | None
    dropout: float
    dtype: DTypeLike
    takes_skip: bool = False  # it has no use for it; `ResNetLayer` does

    def setup(self) -> None:
        wide, dtype = 2 * self.features, self.dtype
        self.vertical_conv = CausalConv(self.features, wide, (2, 3), centred=True, dtype=dtype)
        self.horizontal_conv = CausalConv(self.features, wide, (1, 2), centred=False, dtype=dtype)
        self.to_horizontal = Dense(wide, dtype=dtype)
        self.mix = Dense(self.features, dtype=dtype)
        self.drop = Dropout(self.dropout)
        if self.num_classes is not None:
            self.vertical_label = _LabelBias(self.num_classes, wide, dtype)
            self.horizontal_label = _LabelBias(self.num_classes, wide, dtype)

    def vertical(
        self, v: Array, skip: Array | None, label: Array | None, convolve: Convolve, train: bool
    ) -> tuple[Array, Array]:
        """The vertical features after this layer, and what the horizontal stack gets of them."""
        x = convolve(self.vertical_conv, v)
        context = self.to_horizontal(x)
        if label is not None:
            x = x + self.vertical_label(label)
        return self.drop(gate(x), deterministic=not train), context

    def horizontal(
        self,
        h: Array,
        context: Array,
        skip: Array | None,
        label: Array | None,
        convolve: Convolve,
        train: bool,
    ) -> Array:
        """The horizontal features after this layer."""
        x = convolve(self.horizontal_conv, h) + context
        if label is not None:
            x = x + self.horizontal_label(label)
        return h + self.mix(self.drop(gate(x), deterministic=not train))


class _GatedResNet(nn.Module):
    """The block of PixelCNN++: x + a sigmoid(b), with a, b from two convolutions and what else is known."""

    features: int
    kernel_size: tuple[int, int]
    centred: bool
    num_classes: int | None
    dropout: float
    dtype: DTypeLike

    def setup(self) -> None:
        wide = 2 * self.features
        self.conv1 = CausalConv(wide, self.features, self.kernel_size, self.centred, self.dtype)
        self.conv2 = CausalConv(wide, wide, self.kernel_size, self.centred, self.dtype)
        self.drop = Dropout(self.dropout)
        if self.num_classes is not None:
            self.label_bias = _LabelBias(self.num_classes, wide, self.dtype)

    def __call__(
        self, x: Array, context: Array | None, label: Array | None, convolve: Convolve, train: bool
    ) -> Array:
        y = convolve(self.conv1, concat_elu(x))
        if context is not None:
            y = y + context
        y = convolve(self.conv2, self.drop(concat_elu(y), deterministic=not train))
        if label is not None:
            y = y + self.label_bias(label)
        a, b = jnp.split(y, 2, axis=-1)
        return x + a * jax.nn.sigmoid(b)


class ResNetLayer(nn.Module):
    """A layer of PixelCNN++ (Salimans et al. 2017, section 2.4), for features of both stacks.

    takes_skip: whether it gets the features of an earlier layer besides those of the layer before.
    """

    features: int
    num_classes: int | None
    dropout: float
    dtype: DTypeLike
    takes_skip: bool = False

    def setup(self) -> None:
        block: dict[str, Any] = {
            "num_classes": self.num_classes,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        self.vertical_block = _GatedResNet(self.features, (2, 3), True, **block)
        self.horizontal_block = _GatedResNet(self.features, (2, 2), False, **block)
        self.to_horizontal = Dense(self.features, dtype=self.dtype)
        if self.takes_skip:
            self.vertical_skip = Dense(self.features, dtype=self.dtype)
            self.horizontal_skip = Dense(self.features, dtype=self.dtype)

    def vertical(
        self, v: Array, skip: Array | None, label: Array | None, convolve: Convolve, train: bool
    ) -> tuple[Array, Array]:
        """The vertical features after this layer, and what the horizontal stack gets of them."""
        context = None if skip is None else self.vertical_skip(concat_elu(skip))
        v = self.vertical_block(v, context, label, convolve, train)
        return v, self.to_horizontal(concat_elu(v))

    def horizontal(
        self,
        h: Array,
        context: Array,
        skip: Array | None,
        label: Array | None,
        convolve: Convolve,
        train: bool,
    ) -> Array:
        """The horizontal features after this layer."""
        if skip is not None:
            context = context + self.horizontal_skip(concat_elu(skip))
        return self.horizontal_block(h, context, label, convolve, train)


class PixelCNN(nn.Module):
    """Parameters of a distribution of every pixel given those before it, in reading order.

    variant: "gated" (van den Oord et al. 2016) or "plusplus" (Salimans et al. 2017), whose later half of
        layers also gets the features of the earlier half, mirrored.
    num_outputs: how many parameters a pixel has; all its channels are given together.
    channels: of the images.

    Deviations: PixelCNN++ stays at one resolution and has no weight normalisation; the first horizontal
    layer of both sees the vertical stack. A constant channel of ones tells the network where the image ends.
    """

    variant: Variant
    features: int
    num_layers: int
    num_outputs: int
    channels: int
    num_classes: int | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        inputs, dtype = self.channels + 1, self.dtype
        rows, columns = (4, 7) if self.variant == "gated" else (2, 3)
        self.first_vertical = CausalConv(inputs, self.features, (rows, columns), centred=True, dtype=dtype)
        self.first_horizontal = CausalConv(inputs, self.features, (1, rows), centred=False, dtype=dtype)
        self.first_context = Dense(self.features, dtype=dtype)
        layer: Any = GatedLayer if self.variant == "gated" else ResNetLayer
        self.layers = [
            layer(
                self.features, self.num_classes, self.dropout, dtype, takes_skip=self._mirrored(i) is not None
            )
            for i in range(self.num_layers)
        ]
        if self.variant == "gated":
            self.hidden = Dense(self.features, dtype=dtype)
        self.output = Dense(self.num_outputs, dtype=jnp.float32)

    def _mirrored(self, layer: int) -> int | None:
        """The earlier layer whose features this one gets, in PixelCNN++."""
        mirrored = self.num_layers - 1 - layer
        return mirrored if self.variant == "plusplus" and mirrored < layer else None

    def _skip(self, outputs: list[Array], layer: int) -> Array | None:
        mirrored = self._mirrored(layer)
        return None if mirrored is None else outputs[mirrored]

    def _vertical(self, x: Array, label: Array | None, convolve: Convolve, train: bool) -> tuple[Array, ...]:
        """What each horizontal layer gets from the vertical stack; x is the image moved down by a row."""
        v = convolve(self.first_vertical, x)
        contexts: list[Array] = [self.first_context(v)]
        outputs: list[Array] = []
        for i, layer in enumerate(self.layers):
            v, context = layer.vertical(v, self._skip(outputs, i), label, convolve, train)
            contexts.append(context)
            outputs.append(v)
        return tuple(contexts)

    def _horizontal(
        self, x: Array, contexts: tuple[Array, ...], label: Array | None, convolve: Convolve, train: bool
    ) -> Array:
        """The output; x is the image moved to the right by a pixel."""
        h = convolve(self.first_horizontal, x) + contexts[0]
        outputs: list[Array] = []
        for i, layer in enumerate(self.layers):
            h = layer.horizontal(h, contexts[i + 1], self._skip(outputs, i), label, convolve, train)
            outputs.append(h)
        h = jax.nn.relu(self.hidden(jax.nn.relu(h))) if self.variant == "gated" else jax.nn.elu(h)
        return self.output(h.astype(jnp.float32))

    def __call__(self, x: Array, label: Array | None = None, *, train: bool = False) -> Array:
        """Images `[B, H, W, C]` in [-1, 1], labels int32 `[B]` where conditional -> `[B, H, W, num_outputs]`.

        `train` needs the random stream "dropout".
        """
        x = _with_ones(x)
        down = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        right = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        contexts = self._vertical(down, label, _whole, train)
        return self._horizontal(right, contexts, label, _whole, train)

    def start(self, num: int, width: int, label: Array | None) -> None:
        """Empty caches for `num` images of this width."""
        begin = lambda conv, x: conv.start(x, width)
        row = jnp.zeros((num, 1, width, self.channels + 1))
        contexts = self._vertical(row, label, begin, False)
        self.put_variable("cache", "contexts", contexts)
        self._horizontal(row[:, :, :1], tuple(c[:, :, :1] for c in contexts), label, begin, False)

    def row(self, image: Array, row: Array, label: Array | None) -> None:
        """Runs the vertical stack on a row, from the one above it in `image` `[B, H, W, C]`."""
        above = jax.lax.dynamic_index_in_dim(image, jnp.maximum(row - 1, 0), axis=1)
        above = jnp.where(row > 0, _with_ones(above), 0.0)
        contexts = self._vertical(above, label, lambda conv, x: conv.row(x), False)
        self.put_variable("cache", "contexts", contexts)

    def pixel(self, image: Array, row: Array, column: Array, label: Array | None) -> Array:
        """The output `[B, num_outputs]` at a pixel, from the one to its left in `image` `[B, H, W, C]`."""
        num, _, _, channels = image.shape
        left = jax.lax.dynamic_slice(image, (0, row, jnp.maximum(column - 1, 0), 0), (num, 1, 1, channels))
        left = jnp.where(column > 0, _with_ones(left), 0.0)
        of_row: tuple[Array, ...] = self.get_variable("cache", "contexts")
        contexts = tuple(jax.lax.dynamic_slice_in_dim(context, column, 1, axis=2) for context in of_row)
        at_pixel = lambda conv, x: conv.pixel(x, row, column)
        return self._horizontal(left, contexts, label, at_pixel, False)[:, 0, 0]


def _with_ones(x: Array) -> Array:
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def cached_functions(
    model: PixelCNN, params: PyTree, label: Array | None
) -> tuple[
    Callable[[int, tuple[int, ...]], PyTree],
    Callable[[PyTree, Array, Array], PyTree],
    Callable[[PyTree, Array, Array, Array], tuple[PyTree, Array]],
]:
    """(start, row, pixel), the network in the steps of `samplers.pixels.PixelNetwork`; label int32 [B]."""

    def start(num: int, shape: tuple[int, ...]) -> PyTree:
        _, variables = model.apply(
            {"params": params}, num, shape[1], label, method="start", mutable=["cache"]
        )
        return variables["cache"]

    def row(cache: PyTree, image: Array, r: Array) -> PyTree:
        variables = {"params": params, "cache": cache}
        _, changed = model.apply(variables, image, r, label, method="row", mutable=["cache"])
        return changed["cache"]

    def pixel(cache: PyTree, image: Array, r: Array, c: Array) -> tuple[PyTree, Array]:
        variables = {"params": params, "cache": cache}
        output, changed = model.apply(variables, image, r, c, label, method="pixel", mutable=["cache"])
        return changed["cache"], cast(Array, output)

    return start, row, pixel
