"""Low-rank factorisation of matrices too large to write out: truncated SVD from products alone, and LSA.

The best rank-k approximation of A, in squared error, is U_k S_k V_k^T of its singular value decomposition
(Eckart & Young 1936). It is found here by subspace iteration with a random start (Halko, Martinsson & Tropp
2011), which needs A X and A^T Y for thin X and Y and nothing else of A.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from jaxgen.types import Array, Key, UserError


class LinearOperator(NamedTuple):
    """A matrix [N, M] as its products: `apply` [M, L] -> [N, L] and `apply_transposed` [N, L] -> [M, L]."""

    shape: tuple[int, int]
    apply: Callable[[Array], Array]
    apply_transposed: Callable[[Array], Array]


class SVD(NamedTuple):
    """A ~ u diag(s) vt: u [N, K] and vt [K, M] with orthonormal columns and rows, s [K] falling; float32."""

    u: Array
    s: Array
    vt: Array


def sparse_operator(matrix: scipy.sparse.spmatrix, *, block: int = 1 << 16) -> LinearOperator:
    """The operator of a SciPy sparse matrix [N, M] with E entries, in float32.

    A product with L columns goes through the entries `block` at a time, so it takes 12 E bytes for the matrix
    and 4 L * block for the products, not 4 L E.
    """
    cells = matrix.tocoo()
    # The last block is filled up with zeros.
    padded = -(-max(cells.nnz, 1) // block) * block - cells.nnz
    row, column = (
        jnp.asarray(np.pad(index.astype(np.int32), (0, padded)).reshape(-1, block))
        for index in (cells.row, cells.col)
    )
    value = jnp.asarray(np.pad(cells.data.astype(np.float32), (0, padded)).reshape(-1, block))
    return LinearOperator(
        cells.shape,
        functools.partial(sparse_product, row, column, value, cells.shape[0]),
        functools.partial(sparse_product, column, row, value, cells.shape[1]),
    )


@functools.partial(jax.jit, static_argnums=3)
def sparse_product(row: Array, column: Array, value: Array, num_rows: int, x: Array) -> Array:
    """A x [N, L] of the matrix with value[i] at (row[i], column[i]), all three [blocks, block]."""

    def add(product: Array, entries: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, columns, values = entries
        return product.at[rows].add(values[:, None] * x[columns]), None

    product, _ = jax.lax.scan(add, jnp.zeros((num_rows, x.shape[1]), jnp.float32), (row, column, value))
    return product


def dense_operator(matrix: Array) -> LinearOperator:
    """The operator of an array [N, M]."""
    matrix = jnp.asarray(matrix, jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return LinearOperator(
        (matrix.shape[0], matrix.shape[1]),
        lambda x: jnp.matmul(matrix, x, precision=exact),
        lambda y: jnp.matmul(matrix.T, y, precision=exact),
    )


def truncated_svd(
    operator: LinearOperator, rank: int, key: Key, *, num_oversamples: int = 10, num_iterations: int = 8
) -> SVD:
    """The `rank` largest singular values and their vectors (Halko, Martinsson & Tropp 2011).

    The range of (A A^T)^q A Omega, Omega normal [M, rank + num_oversamples] and q = `num_iterations`, is made
    orthonormal after every product, and the small matrix Q^T A is decomposed exactly. A singular value s_i is
    found as well as (s_{rank + num_oversamples + 1} / s_i)^(2 q + 1) is small: exactly, up to rounding, where
    rank + num_oversamples reaches the rank of A. The sign of each pair of vectors is that which makes the
    entry of u of greatest magnitude positive.
    Spectra that fall slowly need more: on the PPMI matrix of the Penn Treebank (10,000 words), 20 values are
    right to 5e-3 as things stand, to 1e-4 with 40 oversamples, to 6e-7 with 20 of them and 20 iterations.
    """
    num_rows, num_columns = operator.shape
    if not 1 <= rank <= min(operator.shape):
        raise UserError(
            f"the rank of a truncated SVD of a {num_rows} x {num_columns} matrix must lie in "
            f"1..{min(operator.shape)}, not be {rank}."
        )
    if num_oversamples < 0 or num_iterations < 0:
        raise UserError("the oversamples and iterations of a truncated SVD must not be negative.")
    size = min(rank + num_oversamples, *operator.shape)
    omega = jax.random.normal(key, (num_columns, size), jnp.float32)
    q, _ = jnp.linalg.qr(operator.apply(omega))
    for _ in range(num_iterations):
        z, _ = jnp.linalg.qr(operator.apply_transposed(q))
        q, _ = jnp.linalg.qr(operator.apply(z))
    # Q^T A = (A^T Q)^T, whose left vectors turn the basis Q into that of A.
    rotation, s, vt = jnp.linalg.svd(operator.apply_transposed(q).T, full_matrices=False)
    u = jnp.matmul(q, rotation, precision=jax.lax.Precision.HIGHEST)
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None, :], axis=0)[0]
    sign = jnp.where(largest < 0, -1.0, 1.0)
    return SVD((u * sign[None, :])[:, :rank], s[:rank], (vt * sign[:, None])[:rank])


def word_vectors(svd: SVD, *, power: float = 0.5) -> Array:
    """U S^p, a vector a row of the matrix, float32 [N, K]   (Levy, Goldberg & Dagan 2015, section 3.3).

    power: 1 keeps the distances of the rows of A_k; 0.5 and 0 weigh the leading directions less.
    """
    return svd.u * (svd.s**power)[None, :]


def log_entropy(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """The weights of latent semantic analysis, float64 [V, D], of the counts of V words in D documents.

    log(1 + c(i, d)) * (1 + sum_d p(d | i) log p(d | i) / log D), with p(d | i) = c(i, d) / sum_d c(i, d): a
    word that is as frequent in every document counts nothing, one of a single document fully (Dumais 1991).
    """
    num_words, num_documents = counts.shape
    if num_documents < 2:
        raise UserError("latent semantic analysis needs at least two documents.")
    cells = counts.tocoo()
    row, column, count = cells.row[cells.data > 0], cells.col[cells.data > 0], cells.data[cells.data > 0]
    share = count / np.bincount(row, count, num_words)[row]
    weight = 1.0 + np.bincount(row, share * np.log(share), num_words) / np.log(num_documents)
    return scipy.sparse.csr_matrix((np.log1p(count) * weight[row], (row, column)), shape=counts.shape)


def fold_in(svd: SVD, documents: Array) -> Array:
    """d^T U S^{-1}: documents [B, N], weighted as those of the matrix, among its right vectors   [B, K].

    Deerwester et al. 1990, "Indexing by latent semantic analysis". Column j of A gives column j of `vt`.
    """
    return jnp.matmul(documents, svd.u, precision=jax.lax.Precision.HIGHEST) / svd.s[None, :]
