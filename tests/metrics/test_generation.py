"""Inception score, KID, precision and recall: closed forms, loops, and known expectations."""

import numpy as np
import pytest

from jaxgen.metrics.generation import inception_score, kernel_distance, precision_and_recall


def test_inception_score_of_uniform_predictions_is_one():
    np.testing.assert_allclose(inception_score(np.full((50, 10), 0.1), 5), np.ones(5))


def test_inception_score_of_sure_and_balanced_predictions_is_the_number_of_classes():
    assert inception_score(np.eye(7)[np.arange(70) % 7])[0] == pytest.approx(7.0)


def test_inception_score_is_the_exponential_of_the_mutual_information():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 30)
    entropy = lambda q: -np.sum(q * np.log(q), axis=-1)
    mutual = entropy(p.mean(axis=0)) - entropy(p).mean()  # H(y) - H(y | x)
    assert inception_score(p)[0] == pytest.approx(np.exp(mutual))


@pytest.mark.parametrize("p", [np.full((4, 3), 0.5), [[1.5, -0.5]], np.ones((0, 3)), [[np.nan, 1.0]]])
def test_inception_score_refuses_what_is_no_distribution(p):
    with pytest.raises(ValueError):
        inception_score(p)


def test_kernel_distance_is_the_double_loop():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    expected = (
        np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
        + np.mean([k(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(2)
    values = [kernel_distance(*rng.standard_normal((2, 20, 4))) for _ in range(300)]
    # Unbiased: the mean of 300 lies within four standard errors of zero; the biased form is far off.
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_precision_and_recall_by_the_definition():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((1500, 2)), 1.5 * rng.standard_normal((40, 2))  # more than one block

    def share(points, centres, k):
        radius = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        return np.mean(
            [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        )

    few = x[:60]
    assert precision_and_recall(few, y, k=3) == (share(few, y, 3), share(y, few, 3))
    assert precision_and_recall(x, y, k=2)[0] == share(x, y, 2)


def test_precision_falls_with_strangers_and_recall_with_collapse():
    rng = np.random.default_rng(4)
    real = rng.standard_normal((300, 5))
    same = rng.standard_normal((300, 5))
    far, collapsed = same.copy(), same.copy()
    far[:150] += 100
    collapsed[:] = same[:4].repeat(75, axis=0)
    precision, recall = precision_and_recall(same, real)
    assert precision_and_recall(real, real) == (1.0, 1.0)
    assert precision_and_recall(far, real)[0] < 0.6 * precision
    assert precision_and_recall(collapsed, real)[1] < 0.2 * recall


@pytest.mark.parametrize("k", [0, 5])
def test_too_few_points_are_refused(k):
    with pytest.raises(ValueError):
        precision_and_recall(np.zeros((5, 2)), np.zeros((9, 2)), k=k)


def test_features_of_different_networks_are_refused():
    for score in (kernel_distance, precision_and_recall):
        with pytest.raises(ValueError, match="cannot be compared"):
            score(np.zeros((9, 2)), np.zeros((9, 3)))
