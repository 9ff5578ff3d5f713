import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from jaxgen.types import UserError
from jaxgen.words import factorize
from jaxgen.words.counts import cooccurrence, document_counts, ppmi
from jaxgen.words.sentences import pack


def planted(singular_values, num_rows, num_columns, seed=0):
    """A matrix with these singular values and random singular vectors, float64."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((num_rows, len(singular_values))))
    right, _ = np.linalg.qr(rng.standard_normal((num_columns, len(singular_values))))
    return left @ np.diag(singular_values) @ right.T


def agrees_with_scipy(found, matrix, rank):
    """Values and vectors against SciPy's svds in float64; float32 has 6e-8 a rounding, here of s_1."""
    u, s, vt = scipy.sparse.linalg.svds(matrix.astype(np.float64), k=rank, rng=np.random.default_rng(0))
    order = np.argsort(-s)
    u, s, vt = u[:, order], s[order], vt[order]
    np.testing.assert_allclose(found.s, s, atol=3e-6 * s[0])
    sign = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(rank)])
    np.testing.assert_allclose(found.u, u * sign, atol=2e-4)
    np.testing.assert_allclose(found.vt, vt * sign[:, None], atol=2e-4)


@pytest.fixture(scope="module")
def sparse():
    rng = np.random.default_rng(1)
    matrix = scipy.sparse.random(40, 25, density=0.2, rng=rng, format="csr")
    matrix.data = rng.standard_normal(matrix.nnz)
    return matrix


def test_agrees_with_scipy_on_a_dense_matrix():
    matrix = planted([9.0, 7, 4, 2, 1, 0.5], 20, 12)
    found = factorize.truncated_svd(factorize.dense_operator(matrix), 4, jax.random.key(0))
    agrees_with_scipy(found, matrix, 4)
    np.testing.assert_allclose(found.s, [9, 7, 4, 2], atol=3e-5)


def test_agrees_with_scipy_on_a_sparse_matrix(sparse):
    # rank + oversamples is the whole of the smaller side, so the subspace holds all there is.
    operator = factorize.sparse_operator(sparse, block=64)
    found = factorize.truncated_svd(operator, 5, jax.random.key(0), num_oversamples=20)
    agrees_with_scipy(found, sparse, 5)


def test_subspace_iteration_converges_where_the_subspace_is_small():
    # From s_5 = 16 to s_8 = 2: an error of (2/16)^(2q + 1), below float32 from q = 4 on.
    matrix = planted(2.0 ** np.arange(8, -4, -1), 60, 50)
    operator = factorize.dense_operator(matrix)
    errors = []
    for iterations in (0, 1, 5):
        found = factorize.truncated_svd(
            operator, 5, jax.random.key(0), num_oversamples=2, num_iterations=iterations
        )
        errors.append(np.max(np.abs(np.asarray(found.s) - 2.0 ** np.arange(8, 3, -1))))
    assert errors[0] > 1e-2 > errors[1]
    assert errors[2] < 3e-6 * 256


def test_products_of_the_sparse_operator(sparse):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((25, 3)).astype(np.float32), rng.standard_normal((40, 2)).astype(np.float32)
    for block in (7, 1 << 16):  # blocks of which the last is filled up
        operator = factorize.sparse_operator(sparse, block=block)
        np.testing.assert_allclose(operator.apply(jnp.asarray(x)), sparse @ x, atol=1e-5)
        np.testing.assert_allclose(operator.apply_transposed(jnp.asarray(y)), sparse.T @ y, atol=1e-5)
    empty = factorize.sparse_operator(scipy.sparse.csr_matrix((4, 3)), block=8)
    np.testing.assert_array_equal(empty.apply(jnp.ones((3, 2))), np.zeros((4, 2)))


def test_the_truncated_svd_is_the_best_approximation_of_its_rank(sparse):
    found = factorize.truncated_svd(
        factorize.sparse_operator(sparse, block=256), 6, jax.random.key(3), num_oversamples=19
    )
    dense = sparse.toarray()
    approximation = np.asarray(found.u) * np.asarray(found.s) @ np.asarray(found.vt)
    error = np.sum((dense - approximation) ** 2)
    # Eckart & Young: the error is the sum of the squares of the singular values left out.
    np.testing.assert_allclose(error, np.sum(np.linalg.svd(dense)[1][6:] ** 2), rtol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        basis, _ = np.linalg.qr(rng.standard_normal((40, 6)) + 10 * np.asarray(found.u))
        assert np.sum((dense - basis @ basis.T @ dense) ** 2) > error


def test_vectors_are_orthonormal_and_signs_are_fixed(sparse):
    operator = factorize.sparse_operator(sparse, block=256)
    one, other = (
        factorize.truncated_svd(operator, 4, jax.random.key(seed), num_oversamples=21) for seed in (0, 1)
    )
    np.testing.assert_allclose(one.u.T @ one.u, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(one.vt @ one.vt.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(one.u, other.u, atol=2e-4)  # whatever the random start


def test_ppmi_vectors_find_the_topics_of_a_planted_text():
    # Words 0-4 are of one topic, 5-9 of another; sentences keep to a topic.
    rng = np.random.default_rng(0)
    sentences = [rng.integers(0, 5, 8) + 5 * (i % 2) for i in range(60)]
    matrix = ppmi(cooccurrence(*pack(sentences), 10, window=3))
    svd = factorize.truncated_svd(factorize.sparse_operator(matrix, block=128), 2, jax.random.key(0))
    vectors = np.asarray(factorize.word_vectors(svd))
    cosine = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert cosine[:5, :5].min() > 0.9
    assert cosine[5:, 5:].min() > 0.9
    assert np.abs(cosine[:5, 5:]).max() < 0.1


def test_powers_of_the_singular_values():
    matrix = planted([4.0, 1.0], 6, 5)
    svd = factorize.truncated_svd(factorize.dense_operator(matrix), 2, jax.random.key(0))
    np.testing.assert_allclose(factorize.word_vectors(svd, power=0.0), svd.u, rtol=1e-6)
    np.testing.assert_allclose(factorize.word_vectors(svd), svd.u * np.asarray([[2.0, 1.0]]), atol=1e-5)
    whole = factorize.word_vectors(svd, power=1.0)
    # Distances of the rows of U S are those of the rows of A.
    np.testing.assert_allclose(whole @ whole.T, matrix @ matrix.T, atol=1e-4)


def test_log_entropy_of_known_distributions():
    counts = scipy.sparse.csr_matrix(np.asarray([[2, 2, 2, 2], [0, 5, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]))
    found = factorize.log_entropy(counts).toarray()
    np.testing.assert_allclose(found[0], 0, atol=1e-15)  # spread evenly: the entropy is log 4
    np.testing.assert_allclose(found[1], [0, np.log(6), 0, 0], rtol=1e-12)  # all in one place
    np.testing.assert_allclose(found[2], [np.log(2) / 2, np.log(2) / 2, 0, 0], rtol=1e-12)  # half of log 4
    np.testing.assert_array_equal(found[3], 0)


def test_folding_a_document_in_gives_its_own_vector():
    rng = np.random.default_rng(2)
    documents = pack([rng.integers(0, 12, 20) for _ in range(9)])
    matrix = factorize.log_entropy(document_counts(*documents, 12))
    svd = factorize.truncated_svd(factorize.sparse_operator(matrix, block=64), 3, jax.random.key(0))
    folded = factorize.fold_in(svd, jnp.asarray(matrix.toarray().T, jnp.float32))
    np.testing.assert_allclose(folded, svd.vt.T, atol=1e-4)


def test_what_cannot_be_done_is_said():
    operator = factorize.dense_operator(jnp.ones((3, 2)))
    for rank in (0, 3):
        with pytest.raises(UserError, match=r"1\.\.2"):
            factorize.truncated_svd(operator, rank, jax.random.key(0))
    with pytest.raises(UserError, match="negative"):
        factorize.truncated_svd(operator, 1, jax.random.key(0), num_iterations=-1)
    with pytest.raises(UserError, match="two documents"):
        factorize.log_entropy(scipy.sparse.csr_matrix(np.ones((3, 1))))
