"""Truncated singular value decompositions, and principal component analysis as the one of centred data.

The best rank-K approximation of a matrix in squared error keeps its K largest singular values (Eckart & Young
1936). PCA does that to the centred data, so it minimises the squared reconstruction error (Pearson 1901);
with the discarded variance as isotropic noise it is a density (Tipping & Bishop 1999). Three ways to the
same PCA: `fit_pca` by an exact SVD, `fit_pca_randomized` for a low rank of a wide matrix, and
`pca_of_scatter` for a stream of batches, in memory `[D, D]`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float, as_mask, index_keys, masked, require_matrix
from jaxgen.types import Array, Key, UserError

_matmul = partial(jnp.matmul, precision="highest")
_ROWS_IN_CACHE = (
    2000  # of a batch, whose scatter is summed by as many on CPU: a fifth faster than all at once
)


class SVD(NamedTuple):
    """A = U diag(s) Vt, truncated to its K largest singular values.

    u: [N, K], orthonormal columns
    s: [K], falling, >= 0
    vt: [K, D], orthonormal rows, each signed so that its entry of largest size is positive
    """

    u: Array
    s: Array
    vt: Array


class PCA(NamedTuple):
    """Principal components, and the Gaussian N(mean, V diag(variance) Vt + noise (I - V Vt)).

    mean: [D]
    components: [K, D], orthonormal rows, each signed so that its entry of largest size is positive
    variance: [K], falling, along each component, with the divisor N - 1
    noise: scalar, the mean variance along each of the D - K discarded directions
    """

    mean: Array
    components: Array
    variance: Array
    noise: Array


class Scatter(NamedTuple):
    """Count, mean and centred scatter of a set of rows, on the device and in the rows' dtype.

    num: scalar, the count
    mean: [D]
    scatter: [D, D], sum_i (x_i - mean)(x_i - mean)^T
    """

    num: Array
    mean: Array
    scatter: Array


def _require_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise UserError(f"rank must be between 1 and {largest} for data of this shape, not {rank}.")


def _signs(vt: Array) -> Array:
    """+1 or -1 for each row `[K]`: the sign of its entry of largest size."""
    largest = jnp.argmax(jnp.abs(vt), axis=1, keepdims=True)
    return jnp.where(jnp.take_along_axis(vt, largest, axis=1)[:, 0] < 0, -1.0, 1.0).astype(vt.dtype)


def _signed(u: Array, s: Array, vt: Array, rank: int) -> SVD:
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = _signs(vt)
    return SVD(u * signs[None, :], s, vt * signs[:, None])


@partial(jax.jit, static_argnames="rank")
def truncated_svd(x: ArrayLike, rank: int) -> SVD:
    """The exact K = `rank` largest singular triplets of `x` `[N, D]`: its best rank-K fit (Eckart & Young
    1936).

    Raises:
        UserError: `x` is not a matrix, or `rank` is not in 1..min(N, D).
    """
    x = as_float(x)
    require_matrix(x)
    _require_rank(rank, min(x.shape))
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return _signed(u, s, vt, rank)


@partial(jax.jit, static_argnames=("rank", "oversample", "power_iterations"))
def randomized_svd(
    key: Key, x: ArrayLike, rank: int, *, oversample: int = 10, power_iterations: int = 4
) -> SVD:
    """The K = `rank` largest singular triplets of `x` `[N, D]`, from a random range of K + `oversample`.

    Halko, Martinsson & Tropp 2011: algorithm 4.4 (subspace iteration, made orthonormal at each half step),
    then 5.1. Exact where K + oversample reaches the rank of `x`; else the error shrinks with the power of
    the ratio of singular values, 2 * `power_iterations` + 1 times.

    Raises:
        UserError: `x` is not a matrix, or `rank` is not in 1..min(N, D).
    """
    x = as_float(x)
    require_matrix(x)
    _require_rank(rank, min(x.shape))
    width = min(rank + oversample, *x.shape)
    basis = jnp.linalg.qr(_matmul(x, jax.random.normal(key, (x.shape[1], width), x.dtype)))[0]

    def iterate(basis: Array, _: None) -> tuple[Array, None]:
        across = jnp.linalg.qr(_matmul(x.T, basis))[0]
        return jnp.linalg.qr(_matmul(x, across))[0], None

    basis, _ = jax.lax.scan(iterate, basis, None, length=power_iterations)
    u, s, vt = jnp.linalg.svd(_matmul(basis.T, x), full_matrices=False)
    return _signed(_matmul(basis, u), s, vt, rank)


@jax.jit
def low_rank(svd: SVD) -> Array:
    """U diag(s) Vt: the rank-K approximation `[N, D]` (Eckart & Young 1936)."""
    return _matmul(svd.u * svd.s[None, :], svd.vt)


def _rows_and_mean(x: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array, Array, Array]:
    """(rows [N, D] that are zero where masked, mask [N], count, mean [D]) of `x` `[N, D]`."""
    x = as_float(x)
    require_matrix(x)
    mask = as_mask(x, mask)
    x = masked(x, mask)
    count = jnp.sum(mask)
    return x, mask, count, jnp.sum(x, axis=0) / jnp.maximum(count, 1.0)


def _centre(x: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array, Array]:
    """(count, mean [D], centred rows [N, D] that are zero where masked) of `x` `[N, D]`."""
    x, mask, count, mean = _rows_and_mean(x, mask)
    return count, mean, masked(x - mean[None, :], mask)


def _pca(mean: Array, vt: Array, squares: Array, total: Array, count: Array) -> PCA:
    """The PCA whose components `vt` `[K, D]` hold `squares` `[K]` of the `total` centred sum of squares."""
    divisor = jnp.maximum(count - 1.0, 1.0)
    discarded = vt.shape[1] - vt.shape[0]
    noise = jnp.maximum(total - jnp.sum(squares), 0.0) / divisor / max(discarded, 1)
    return PCA(mean, vt, squares / divisor, noise)


@partial(jax.jit, static_argnames="rank")
def fit_pca(x: ArrayLike, rank: int, mask: ArrayLike | None = None) -> PCA:
    """PCA of `x` `[N, D]` by the exact SVD of the centred rows (Tipping & Bishop 1999, eq. 7-8).

    mask: `[N]`, 1 for the rows that count; None for all.
    Tipping & Bishop divide the variance by N; here it is N - 1, without bias.

    Raises:
        UserError: `x` is not a matrix, or `rank` is not in 1..min(N, D).
    """
    count, mean, centred = _centre(x, mask)
    svd = truncated_svd(centred, rank)
    return _pca(mean, svd.vt, svd.s**2, jnp.sum(centred**2), count)


@partial(jax.jit, static_argnames=("rank", "oversample", "power_iterations"))
def fit_pca_randomized(
    key: Key,
    x: ArrayLike,
    rank: int,
    mask: ArrayLike | None = None,
    *,
    oversample: int = 10,
    power_iterations: int = 4,
) -> PCA:
    """`fit_pca` by `randomized_svd`: work of order N D (K + oversample), for K far below N and D.

    Raises:
        UserError: `x` is not a matrix, or `rank` is not in 1..min(N, D).
    """
    count, mean, centred = _centre(x, mask)
    svd = randomized_svd(key, centred, rank, oversample=oversample, power_iterations=power_iterations)
    return _pca(mean, svd.vt, svd.s**2, jnp.sum(centred**2), count)


@jax.jit
def scatter_of(x: ArrayLike, mask: ArrayLike | None = None) -> Scatter:
    """Count, mean and centred scatter of one batch of rows `x` `[N, D]`, those with `mask` `[N]` 1."""
    x, mask, count, mean = _rows_and_mean(x, mask)

    def scatter(x: Array, mask: Array) -> Array:
        centred = masked(x - mean[None, :], mask)
        return _matmul(centred.T, centred)

    if jax.default_backend() != "cpu" or jax.device_count() > 1 or len(x) <= _ROWS_IN_CACHE:
        return Scatter(count, mean, scatter(x, mask))

    def add(number: Array, total: Array) -> Array:
        start = number * _ROWS_IN_CACHE
        return total + scatter(*(lax.dynamic_slice_in_dim(y, start, _ROWS_IN_CACHE) for y in (x, mask)))

    pieces = len(x) // _ROWS_IN_CACHE
    rest = scatter(x[pieces * _ROWS_IN_CACHE :], mask[pieces * _ROWS_IN_CACHE :])
    return Scatter(count, mean, lax.fori_loop(0, pieces, add, rest))


@jax.jit
def merge_scatter(a: Scatter, b: Scatter) -> Scatter:
    """The scatter of both sets together (Chan, Golub & LeVeque 1979): associative, exact up to rounding."""
    num = a.num + b.num
    share = b.num / jnp.maximum(num, 1.0)
    gap = b.mean - a.mean
    between = (a.num * share) * gap[:, None] * gap[None, :]
    return Scatter(num, a.mean + share * gap, a.scatter + b.scatter + between)


@partial(jax.jit, static_argnames="rank")
def pca_of_scatter(scatter: Scatter, rank: int) -> PCA:
    """PCA from the eigenvectors of the scatter: the same as `fit_pca` of all rows that were merged into it.

    The quickest way too where N is far above D. Squaring the data costs digits: in float32 directions whose
    variance is below about 1e-7 of the largest are lost in rounding (their variance is reported as >= 0).

    Raises:
        UserError: `rank` is not in 1..D.
    """
    _require_rank(rank, scatter.mean.shape[0])
    squares, vectors = jnp.linalg.eigh(scatter.scatter)
    squares, vt = jnp.maximum(squares[::-1][:rank], 0.0), vectors.T[::-1][:rank]
    return _pca(scatter.mean, vt * _signs(vt)[:, None], squares, jnp.trace(scatter.scatter), scatter.num)


@jax.jit
def encode(pca: PCA, x: ArrayLike) -> Array:
    """Coordinates `[B, K]` of `x` `[B, D]` along the components: (x - mean) Vt^T."""
    return _matmul(as_float(x) - pca.mean[None, :], pca.components.T)


@jax.jit
def decode(pca: PCA, code: ArrayLike) -> Array:
    """The point `[B, D]` of the component plane with coordinates `code` `[B, K]`."""
    return _matmul(as_float(code), pca.components) + pca.mean[None, :]


@jax.jit
def reconstruction_error(pca: PCA, x: ArrayLike) -> Array:
    """Squared distance `[B]` of `x` `[B, D]` to the component plane: what PCA minimises (Pearson 1901)."""
    x = as_float(x)
    return jnp.sum((x - decode(pca, encode(pca, x))) ** 2, axis=1)


@jax.jit
def log_prob(pca: PCA, x: ArrayLike, *, variance_floor: ArrayLike = 1e-6) -> Array:
    """Log density `[B]`, nats, of `x` `[B, D]` under the Gaussian of probabilistic PCA.

    Tipping & Bishop 1999, eq. 4, in the basis of the components. `variance_floor` is the least variance along
    any direction, so that constant features keep the density finite.
    """
    x = as_float(x)
    dim = x.shape[1]
    code = encode(pca, x)
    variance = jnp.maximum(pca.variance, variance_floor)
    noise = jnp.maximum(pca.noise, variance_floor)
    log_det = jnp.sum(jnp.log(variance)) + (dim - variance.shape[0]) * jnp.log(noise)
    distance = jnp.sum(code**2 / variance[None, :], axis=1)
    if variance.shape[0] < dim:  # else all that is left is rounding, and the floor would magnify it
        distance += reconstruction_error(pca, x) / noise
    return -0.5 * (distance + log_det + dim * jnp.log(2 * jnp.pi))


@partial(jax.jit, static_argnames="num")
def sample(pca: PCA, key: Key, num: int) -> Array:
    """Draws `[num, D]` from the Gaussian of probabilistic PCA (Tipping & Bishop 1999, eq. 2)."""

    dim, dtype = pca.mean.shape[0], pca.mean.dtype

    def draw(key: Key) -> Array:
        along, across = jax.random.split(key)
        code = jnp.sqrt(pca.variance) * jax.random.normal(along, pca.variance.shape, dtype)
        noise = jnp.sqrt(pca.noise) * jax.random.normal(across, (dim,), dtype)
        noise -= _matmul(_matmul(pca.components, noise), pca.components)
        return pca.mean + _matmul(code, pca.components) + noise

    return jax.vmap(draw)(index_keys(key, num))
