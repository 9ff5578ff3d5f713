"""Products of matrices whose sums are float32, and whose gradients are such products too.

Where the factors are bfloat16, those of the gradient are as well. JAX's own rule for a product of bfloat16
numbers that asks for a float32 result multiplies float32 numbers backwards, on every device at the speed of
these. XLA on CPU has fast kernels for this kind alone: on cores with bfloat16 units 1,200 GFLOP/s, four times
as many as of float32, while a product that asks for a bfloat16 result runs at 200, and one whose factors lie
in another order than `[N, D] [D, M]` too (see `transposed`). Products of bfloat16 factors have reverse-mode
derivatives of any order, but no forward mode (`jax.jvp`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.types import Array

# Rows that a product must have for it to pay that its other factor is written out anew.
_ENOUGH_ROWS = 64


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
        y = _sums(flat, kernel, -1, -2)
        y = y if bias is None else y + bias[None]
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def matmul(x: Array, y: Array) -> Array:
    """x y of x `[..., N, D]` and y `[..., D, M]`: float32 `[..., N, M]`, such as sums under weights x.

    Factors have x's dtype, here and below; gradients have those of the arguments.
    """
    return _bfloat16_matmul(x, y) if x.dtype == jnp.bfloat16 else _matmul(x, y)


def inner_products(x: Array, y: Array) -> Array:
    """x yᵀ, those of all rows of x `[..., N, D]` with all of y `[..., M, D]`: float32 `[..., N, M]`."""
    return _bfloat16_inner_products(x, y) if x.dtype == jnp.bfloat16 else _inner_products(x, y)


def transposed_matmul(x: Array, y: Array) -> Array:
    """xᵀ y, float32 `[..., D, F]`, of x `[..., N, D]` and y `[..., N, F]`: the gradient of a kernel."""
    if not _wants_plain_order(x):
        return _sums(x, y, -2, -2)
    if x.shape[-1] > y.shape[-1]:
        return transposed(_matmul(transposed(y.astype(x.dtype)), x))
    return _matmul(transposed(x), y)


def transposed(x: Array) -> Array:
    """xᵀ `[..., D, N]` of x `[..., N, D]`, written out in memory on CPU.

    XLA leaves the factor of a product as it lies and multiplies by strides, for bfloat16 at a sixth of the
    speed. It does not see through two halves put together.
    """
    half = x.shape[-1] // 2
    flip = lambda x: jnp.swapaxes(x, -1, -2)
    if jax.default_backend() != "cpu" or half == 0:
        return flip(x)
    return jnp.concatenate([flip(x[..., :half]), flip(x[..., half:])], axis=-2)


def _wants_plain_order(x: Array) -> bool:
    return x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def _sums(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The products of matrices over these axes of theirs, float32 (of float64: float64)."""
    batch = tuple(range(x.ndim - 2))
    axes = (((x.ndim + x_axis,), (y.ndim + y_axis,)), (batch, batch))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y.astype(x.dtype), axes, preferred_element_type=dtype)


def _matmul(x: Array, y: Array) -> Array:
    return _sums(x, y, -1, -2)


def _inner_products(x: Array, y: Array) -> Array:
    if _wants_plain_order(x) and x.shape[-2] >= _ENOUGH_ROWS:
        return _matmul(x, transposed(y.astype(x.dtype)))
    return _sums(x, y, -1, -1)


def _with_bfloat16_gradients(
    product: Callable[[Array, Array], Array],
    gradients: Callable[[Array, Array, Array], tuple[Array, Array]],
) -> Callable[[Array, Array], Array]:
    """`product` of x and y; `gradients` has x, y and the result's gradient in bfloat16."""

    def backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        x, y = saved
        of_x, of_y = gradients(x, y, g.astype(jnp.bfloat16))
        return of_x.astype(x.dtype), of_y.astype(y.dtype)

    differentiable = jax.custom_vjp(product)
    differentiable.defvjp(lambda x, y: (product(x, y), (x, y)), backward)
    return differentiable


def _matmul_gradients(x: Array, y: Array, g: Array) -> tuple[Array, Array]:
    return _inner_products(g, y), transposed_matmul(x, g)


_bfloat16_matmul = _with_bfloat16_gradients(_matmul, _matmul_gradients)
_bfloat16_inner_products = _with_bfloat16_gradients(
    _inner_products, lambda x, y, g: (_matmul(g, y), transposed_matmul(g, x))
)


@jax.custom_vjp
def _bfloat16_affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = _matmul(x, kernel)
    return y if bias is None else y + bias.astype(jnp.float32)[None]


def _bfloat16_affine_backward(
    saved: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    g = g.astype(jnp.bfloat16)
    of_x, of_kernel = _matmul_gradients(x, kernel, g)
    of_bias = None if bias is None else jnp.sum(g, axis=0, dtype=jnp.float32).astype(bias.dtype)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype), of_bias


_bfloat16_affine.defvjp(lambda *args: (_bfloat16_affine(*args), args), _bfloat16_affine_backward)
