"""Linear layers whose product is one of two matrices, however many axes come before the features.

Products of bfloat16 numbers are summed in float32, forwards and backwards, as accelerators sum them. It is
also what XLA on CPU has fast kernels for: on cores with bfloat16 units 1,200 GFLOP/s, four times as many as
of float32, where a product that asks for a bfloat16 result runs at 200.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.types import Array


def affine(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """x W + b of x `[..., D]`, W `[D, F]` and b `[F]` (None: 0): float32 `[..., F]`.

    One product of two matrices, however many axes x has: XLA on CPU is slow with several, above all in the
    gradient (an MLP on 4 x 256 tokens of width 384 takes 30 ms forwards and backwards, so written 23 ms).
    Where x is bfloat16 the factors of all products, the gradient's too, are, and their sums are float32.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.bfloat16:
        y = _bfloat16_affine(flat, kernel, bias)
    else:
        y = _sums(flat, kernel.astype(x.dtype), 1, 0)
        y = y if bias is None else y + bias[None]
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _sums(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices over these axes of theirs, float32 (of float64: float64)."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, axes, preferred_element_type=dtype)


@jax.custom_vjp
def _bfloat16_affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = _sums(x, kernel.astype(jnp.bfloat16), 1, 0)
    return y if bias is None else y + bias.astype(jnp.float32)[None]


def _bfloat16_affine_backward(
    saved: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    """JAX's own rule would multiply the float32 g, at the speed of float32 on every device."""
    x, kernel, bias = saved
    g = g.astype(jnp.bfloat16)
    return (
        _sums(g, kernel.astype(jnp.bfloat16), 1, 1).astype(x.dtype),
        transposed_matmul(x, g).astype(kernel.dtype),
        None if bias is None else jnp.sum(g, axis=0, dtype=jnp.float32).astype(bias.dtype),
    )


_bfloat16_affine.defvjp(lambda *args: (_bfloat16_affine(*args), args), _bfloat16_affine_backward)


def transposed_matmul(x: Array, y: Array) -> Array:
    """xᵀ y, float32 `[D, F]`, of x `[N, D]` and y `[N, F]`: the gradient of a kernel."""
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # A padded xᵀ is written out; else XLA leaves x as it lies, and takes five times as long.
        x, y = jnp.pad(x.T, ((0, 0), (0, 4))), jnp.pad(y, ((0, 4), (0, 0)))
        return _sums(x, y, 1, 0)
    return _sums(x, y, 0, 0)


class Dense(nn.Module):
    """x W + b with the parameters of `flax.linen.Dense`, by `affine`.

    Linen's layer sums the gradient of b in `dtype`: in bfloat16 wrong in its third digit, and a tenth of what
    a step of the medium LSTM of Zaremba et al. takes on CPU.

    dtype: of the factors. out_dtype: of the result; None is `dtype`.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` -> `[..., features]`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = (
            self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        )
        y = affine(x.astype(self.dtype), kernel, bias)
        return y.astype(self.dtype if self.out_dtype is None else self.out_dtype)


def embedding_logits(embedding: nn.Embed, x: Array) -> Array:
    """The products of x `[..., D]` with every row of the embedding, float32 `[..., V]`: a head tied to it."""
    return affine(x.astype(embedding.dtype), embedding.embedding.T)
