"""Linear operators of imaging with their adjoints: what turned a clean image into the one that was observed.

The model of all inverse problems here is y = A x + sigma_d eps with eps ~ N(0, I). Images are float32
[B, H, W, C]; the inner products of the adjoint, <A x, y> = <x, A^T y>, are sums over [H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxgen.types import Array, Key, UserError

# What a blur takes for the pixels outside the image: those of the opposite edge, the nearest pixel of the
# edge, or nothing: "valid" keeps only the pixels whose window lies inside, so that the result is smaller.
Boundary: TypeAlias = Literal["periodic", "replicate", "valid"]

# The weights of red, green and blue in luminance (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


class LinearOperator(NamedTuple):
    """apply: x [B, H, W, C] -> A x [B, H', W', C']; adjoint: y [B, H', W', C'] -> A^T y [B, H, W, C]."""

    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]


def identity() -> LinearOperator:
    """A = I: denoising."""
    return LinearOperator(lambda x: x, lambda y: y)


def compose(outer: LinearOperator, inner: LinearOperator) -> LinearOperator:
    """outer inner, whose adjoint is inner^T outer^T: a blur and then a downsampling, for instance."""
    return LinearOperator(lambda x: outer.apply(inner.apply(x)), lambda y: inner.adjoint(outer.adjoint(y)))


def masking(mask: Array) -> LinearOperator:
    """mask * x, its own adjoint; mask is [H, W, 1 or C] or [B, H, W, 1 or C].

    It is 1 where a pixel is known and 0 elsewhere, and so is the result, whose shape is that of x.
    """
    mask = mask if mask.ndim == 4 else mask[None]
    masked = lambda x: jnp.broadcast_to(mask, x.shape) * x
    return LinearOperator(masked, masked)


def transfer_function(kernel: Array, height: int, width: int) -> Array:
    """What a periodic convolution multiplies `rfft2` of images with, complex [1 or B, H, W // 2 + 1].

    kernel: [KH, KW] of odd sizes, or [B, KH, KW], one for each image
    """
    kernel = kernel if kernel.ndim == 3 else kernel[None]
    num, rows, columns = kernel.shape
    padded = jnp.zeros((num, height, width), kernel.dtype).at[:, :rows, :columns].set(kernel)
    return jnp.fft.rfft2(jnp.roll(padded, (-(rows // 2), -(columns // 2)), (1, 2)), axes=(1, 2))


def _circular_convolution(x: Array, kernel: Array) -> Array:
    """sum_i kernel[i] x[n - i + centre], indices modulo the size, by FFT."""
    height, width = x.shape[1:3]
    spectrum = transfer_function(kernel, height, width)[:, :, :, None]
    return jnp.fft.irfft2(jnp.fft.rfft2(x, axes=(1, 2)) * spectrum, s=(height, width), axes=(1, 2))


def check_kernel(kernel: ArrayLike) -> np.ndarray:
    """The kernel as float32 [KH, KW] or [B, KH, KW]; UserError unless sizes are odd and entries finite."""
    array = np.asarray(kernel, np.float32)
    if (
        array.ndim not in (2, 3)
        or array.shape[-1] % 2 == 0
        or array.shape[-2] % 2 == 0
        or not np.isfinite(array).all()
    ):
        raise UserError(
            f"a blur kernel is a finite matrix of odd sizes, not one of shape {list(array.shape)}."
        )
    return array


def convolve(x: Array, kernel: Array, boundary: Boundary) -> Array:
    """The convolution of each channel of x [B, H, W, C] with kernel [KH, KW] of odd sizes, or [B, KH, KW].

    [B, H, W, C], or [B, H - KH + 1, W - KW + 1, C] for "valid". By FFT, so the time hardly depends on the
    kernel, and errors are about 1e-6 of the largest pixel. Linear in the kernel too.
    """
    rows, columns = kernel.shape[-2] // 2, kernel.shape[-1] // 2
    if boundary == "periodic":
        return _circular_convolution(x, kernel)
    if boundary == "replicate":
        x = jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="edge")
    height, width = x.shape[1:3]
    return _circular_convolution(x, kernel)[:, rows : height - rows, columns : width - columns]


def blur(kernel: ArrayLike, boundary: Boundary = "periodic") -> LinearOperator:
    """Convolution of each channel with kernel [KH, KW], or of each image with its own of [B, KH, KW].

    Images must be at least as large as the kernel.

    Raises UserError for an unknown boundary, and as `check_kernel`.
    """
    if boundary not in get_args(Boundary):
        raise UserError(f"unknown boundary {boundary!r}; choose one of {', '.join(get_args(Boundary))}.")
    weights = jnp.asarray(check_kernel(kernel))
    grown = (weights.shape[-2] - 1, weights.shape[-1] - 1) if boundary == "valid" else (0, 0)

    def apply(x: Array) -> Array:
        return convolve(x, weights, boundary)

    def adjoint(y: Array) -> Array:
        shape = (y.shape[0], y.shape[1] + grown[0], y.shape[2] + grown[1], y.shape[3])
        (x,) = jax.linear_transpose(apply, jax.ShapeDtypeStruct(shape, y.dtype))(y)
        return x

    return LinearOperator(apply, adjoint)


def downsampling(factor: int) -> LinearOperator:
    """Every `factor`-th pixel of both axes, from the first; H and W must be multiples of `factor`.

    The adjoint puts the pixels back among zeros. Blur before it (`compose`), or what is left is aliased.

    Raises UserError unless factor >= 1.
    """
    if factor < 1:
        raise UserError(f"a downsampling factor must be at least 1, but it is {factor}.")

    def apply(x: Array) -> Array:
        if x.shape[1] % factor or x.shape[2] % factor:
            raise UserError(f"images of {x.shape[1]}x{x.shape[2]} cannot be downsampled by {factor}.")
        return x[:, ::factor, ::factor]

    def adjoint(y: Array) -> Array:
        shape = (y.shape[0], y.shape[1] * factor, y.shape[2] * factor, y.shape[3])
        return jnp.zeros(shape, y.dtype).at[:, ::factor, ::factor].set(y)

    return LinearOperator(apply, adjoint)


def grey_from_color() -> LinearOperator:
    """Luminance, [B, H, W, 3] -> [B, H, W, 1], with the weights of ITU-R BT.601."""

    def apply(x: Array) -> Array:
        return jnp.sum(x * jnp.asarray(LUMINANCE, x.dtype)[None, None, None], axis=-1, keepdims=True)

    def adjoint(y: Array) -> Array:
        return y * jnp.asarray(LUMINANCE, y.dtype)[None, None, None]

    return LinearOperator(apply, adjoint)


def observe(operator: LinearOperator, x: Array, sigma: float | Array, key: Key) -> Array:
    """y = A x + sigma eps, [B, ...]; image i's noise is drawn with fold_in(key, i)."""
    y = operator.apply(x)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(y.shape[0]))
    return y + sigma * jax.vmap(lambda k: jax.random.normal(k, y.shape[1:], y.dtype))(keys)


def per_example_dot(a: Array, b: Array) -> Array:
    """<a_i, b_i> over all but the first axis, shaped [B, 1, ...] to multiply them."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def regularised_least_squares(
    operator: LinearOperator, y: Array, anchor: Array, weight: Array | float, num_iterations: int
) -> Array:
    """argmin_x 1/2 ||A x - y||^2 + weight / 2 ||x - anchor||^2, [B, ...], by conjugate gradients from anchor.

    (A^T A + weight I) x = A^T y + weight anchor (Hestenes & Stiefel 1952), in a fixed number of iterations,
    each with one call of A and of A^T, every image of the batch apart from the others.
    """

    def normal(x: Array) -> Array:
        return operator.adjoint(operator.apply(x)) + weight * x

    residual = operator.adjoint(y) + weight * anchor - normal(anchor)

    def step(
        carry: tuple[Array, Array, Array, Array], _: None
    ) -> tuple[tuple[Array, Array, Array, Array], None]:
        x, residual, direction, power = carry
        image = normal(direction)
        # Where the residual is 0 the image is solved, and stays as it is.
        length = power / jnp.maximum(per_example_dot(direction, image), 1e-30)
        x, residual = x + length * direction, residual - length * image
        new_power = per_example_dot(residual, residual)
        direction = residual + new_power / jnp.maximum(power, 1e-30) * direction
        return (x, residual, direction, new_power), None

    start = (anchor, residual, residual, per_example_dot(residual, residual))
    (x, *_), _ = jax.lax.scan(step, start, None, length=num_iterations)
    return x
