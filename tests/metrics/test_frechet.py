import math

import numpy as np
import pytest
import scipy.linalg

from jaxgen.metrics.frechet import FeatureStatistics, frechet_between, frechet_distance


def random_covariance(rng, dim, rank):
    a = rng.standard_normal((dim, rank))
    return a @ a.T / rank


def heusel_reference(mu1, sigma1, mu2, sigma2):
    """Heusel et al. 2017, eq. 6 as written, through SciPy's general matrix square root."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root.real)


def test_one_dimension_closed_form():
    # W2^2 of N(1, 2^2) and N(4, 5^2) is (1 - 4)^2 + (2 - 5)^2.
    assert frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(18.0, rel=1e-12)


def test_diagonal_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 7))
    s1, s2 = rng.uniform(0.1, 3.0, (2, 7))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 20, 60])
def test_identical_is_zero_and_never_negative(rank):
    # Singular for rank < 20. Rounding is some 1e-16 a dimension of a trace of about 20.
    rng = np.random.default_rng(rank)
    mu, sigma = rng.standard_normal(20), random_covariance(rng, 20, rank)
    distance = frechet_distance(mu, sigma, mu, sigma)
    assert 0.0 <= distance < 1e-11


def test_shift_adds_its_square_even_when_singular():
    rng = np.random.default_rng(1)
    mu, sigma, shift = np.zeros(12), random_covariance(rng, 12, 4), rng.standard_normal(12)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(np.sum(shift**2), rel=1e-11)


def test_scaled_covariance_closed_form():
    # Commuting matrices: Tr(S + c^2 S - 2 c S) = (1 - c)^2 Tr S, also where S is singular.
    rng = np.random.default_rng(2)
    for rank in (5, 40):
        sigma = random_covariance(rng, 16, rank)
        got = frechet_distance(np.zeros(16), sigma, np.zeros(16), 9.0 * sigma)
        assert got == pytest.approx(4.0 * np.trace(sigma), rel=1e-11)


def test_orthogonal_point_masses():
    # Ranges at right angles share nothing: the distance is the sum of both traces.
    sigma1, sigma2 = np.diag([3.0, 0, 0, 0]), np.diag([0, 0, 2.0, 1.0])
    assert frechet_distance(np.zeros(4), sigma1, np.zeros(4), sigma2) == pytest.approx(6.0, rel=1e-12)
    zero = np.zeros((4, 4))
    assert frechet_distance(np.zeros(4), zero, np.full(4, 2.0), zero) == 16.0


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_agrees_with_scipy_sqrtm(dim):
    rng = np.random.default_rng(dim)
    mu1, mu2 = rng.standard_normal((2, dim))
    sigma1, sigma2 = random_covariance(rng, dim, 3 * dim), random_covariance(rng, dim, 2 * dim)
    got = frechet_distance(mu1, sigma1, mu2, sigma2)
    # Full rank, so sqrtm is well conditioned; both are float64 throughout.
    assert got == pytest.approx(heusel_reference(mu1, sigma1, mu2, sigma2), rel=1e-9)
    assert got == pytest.approx(frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-12)


def test_singular_agrees_with_scipy_on_an_offset():
    # sqrtm has no answer on singular input; with 1e-12 on the diagonals it has one, off by sqrt(1e-12) D.
    rng = np.random.default_rng(3)
    sigma1, sigma2, mu = random_covariance(rng, 10, 4), random_covariance(rng, 10, 6), np.zeros(10)
    offset = 1e-12 * np.eye(10)
    expected = heusel_reference(mu, sigma1 + offset, mu, sigma2 + offset)
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-5)


def test_rotation_leaves_the_distance():
    rng = np.random.default_rng(4)
    q, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    mu1, mu2 = rng.standard_normal((2, 9))
    sigma1, sigma2 = random_covariance(rng, 9, 20), random_covariance(rng, 9, 5)
    rotated = frechet_distance(q @ mu1, q @ sigma1 @ q.T, q @ mu2, q @ sigma2 @ q.T)
    assert rotated == pytest.approx(frechet_distance(mu1, sigma1, mu2, sigma2), rel=1e-9)


def test_small_negative_eigenvalues_of_rounding_are_taken_as_zero():
    sigma = np.diag([1.0, -1e-15])
    assert frechet_distance(np.zeros(2), sigma, np.zeros(2), np.eye(2)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.diag([1.0, -0.1]), "negative eigenvalue"),
        (np.eye(3), "shapes"),
    ],
)
def test_what_is_no_covariance_is_refused(sigma, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), sigma, np.zeros(2), np.eye(2))


def test_statistics_are_numpys():
    x = np.random.default_rng(5).standard_normal((50, 6)).astype(np.float32) * 3 + 100
    statistics = FeatureStatistics.of(x)
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    # Centred before squaring: no cancellation although the mean is 30 deviations from zero.
    np.testing.assert_allclose(statistics.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_merging_parts_equals_the_whole():
    x = (
        np.random.default_rng(6).standard_normal((101, 5)) + 1e4
    )  # the sum of squares alone would lose 8 digits
    whole = FeatureStatistics.of(x)
    for cuts in ([1], [50], [1, 2, 3, 100], [0, 40, 40]):
        merged = FeatureStatistics.empty(5)
        for part in np.split(x, cuts):
            merged = merged.merge(FeatureStatistics.of(part))
        assert merged.count == 101
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-9)


def test_merge_is_symmetric_and_has_a_neutral_element():
    rng = np.random.default_rng(7)
    a, b = (
        FeatureStatistics.of(rng.standard_normal((3, 4))),
        FeatureStatistics.of(rng.standard_normal((9, 4))),
    )
    np.testing.assert_allclose(a.merge(b).scatter, b.merge(a).scatter, rtol=1e-12)
    empty = FeatureStatistics.empty(4)
    for same in (a.merge(empty), empty.merge(a)):
        np.testing.assert_array_equal(same.mean, a.mean)
        np.testing.assert_array_equal(same.scatter, a.scatter)
    assert empty.merge(empty).count == 0


def test_fewer_samples_than_dimensions():
    rng = np.random.default_rng(8)
    a, b = (
        FeatureStatistics.of(rng.standard_normal((5, 32))),
        FeatureStatistics.of(rng.standard_normal((7, 32))),
    )
    distance = frechet_between(a, b, num_samples=5, num_reference=7)
    assert math.isfinite(distance)
    assert distance > 0
    assert frechet_between(a, a, num_samples=5, num_reference=5) < 1e-11


def test_more_samples_come_nearer():
    # Two samples of one Gaussian: the distance is all bias, and it falls like 1 / N.
    rng = np.random.default_rng(9)
    distances = []
    for n in (50, 500, 5000):
        a, b = (FeatureStatistics.of(rng.standard_normal((n, 8))) for _ in range(2))
        distances.append(frechet_between(a, b, num_samples=n, num_reference=n))
    assert distances[0] > 4 * distances[1] > 16 * distances[2] > 0


def test_wrong_counts_are_refused():
    rng = np.random.default_rng(10)
    a, b = (
        FeatureStatistics.of(rng.standard_normal((8, 2))),
        FeatureStatistics.of(rng.standard_normal((9, 2))),
    )
    with pytest.raises(ValueError, match="samples should hold 10 items but hold 8"):
        frechet_between(a, b, num_samples=10, num_reference=9)
    with pytest.raises(ValueError, match="reference should hold 8 items but hold 9"):
        frechet_between(a, b, num_samples=8, num_reference=8)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        FeatureStatistics.of(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.of([[0.0, np.nan]])
    with pytest.raises(ValueError, match="dimension 2 with 3"):
        FeatureStatistics.of(np.zeros((1, 2))).merge(FeatureStatistics.of(np.zeros((1, 3))))
    with pytest.raises(ValueError, match="at least 2 samples"):
        _ = FeatureStatistics.of(np.zeros((1, 2))).covariance
