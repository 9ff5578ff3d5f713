import math

import numpy as np
import pytest
import sklearn.metrics

from jaxgen.metrics.classification import (
    accuracy,
    class_entropy,
    class_histogram,
    confusion_matrix,
    f1,
    precision,
    recall,
    share_recognised,
)

# The lectures' table of cats (class 1) and the rest: TP 10, FP 3, FN 8, TN 45; rows are the truth.
CATS = np.array([[45, 3], [8, 10]])


def test_the_lectures_table_of_cats():
    assert accuracy(CATS) == 55 / 66
    assert precision(CATS)[1] == 10 / 13
    assert recall(CATS)[1] == 10 / 18
    assert f1(CATS)[1] == 20 / 31


def test_the_cats_from_labels():
    label = np.repeat([1, 0, 1, 0], [10, 3, 8, 45])
    predicted = np.repeat([1, 1, 0, 0], [10, 3, 8, 45])
    np.testing.assert_array_equal(confusion_matrix(label, predicted, 2), CATS)


def test_f1_is_the_harmonic_mean():
    p, r = precision(CATS), recall(CATS)
    np.testing.assert_allclose(f1(CATS), 2 * p * r / (p + r), rtol=1e-14)


def test_agrees_with_scikit_learn_undefined_classes_included():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, 200)
    label[label == 4] = 0  # class 4 never occurs, class 5 is never predicted
    predicted = np.where(rng.random(200) < 0.6, label, rng.integers(0, 5, 200))
    predicted[predicted == 5] = 1
    confusion = confusion_matrix(label, predicted, 7)  # class 6: neither
    np.testing.assert_array_equal(
        confusion, sklearn.metrics.confusion_matrix(label, predicted, labels=range(7))
    )
    expected = sklearn.metrics.precision_recall_fscore_support(
        label, predicted, labels=range(7), zero_division=np.nan
    )
    np.testing.assert_allclose(precision(confusion), expected[0], rtol=1e-14)
    np.testing.assert_allclose(recall(confusion), expected[1], rtol=1e-14)
    np.testing.assert_allclose(f1(confusion), expected[2], rtol=1e-14)
    assert accuracy(confusion) == pytest.approx(sklearn.metrics.accuracy_score(label, predicted), rel=1e-14)
    assert np.isnan(precision(confusion)[[5, 6]]).all()
    assert np.isnan(recall(confusion)[[4, 6]]).all()
    assert f1(confusion)[5] == 0.0
    assert np.isnan(f1(confusion)[6])


def test_batches_add_up():
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 3, (2, 40))
    parts = sum(confusion_matrix(label[i : i + 16], predicted[i : i + 16], 3) for i in range(0, 40, 16))
    np.testing.assert_array_equal(parts, confusion_matrix(label, predicted, 3))


def test_no_items():
    empty = confusion_matrix([], [], 3)
    np.testing.assert_array_equal(empty, np.zeros((3, 3)))
    assert math.isnan(accuracy(empty))


@pytest.mark.parametrize(
    ("label", "predicted", "message"),
    [
        ([0, 3], [0, 1], "span"),
        ([0, -1], [0, 1], "span"),
        ([0], [0, 1], "1 labels"),
        ([0.0], [0], "integers"),
    ],
)
def test_bad_labels_are_refused(label, predicted, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(label, predicted, 3)


def test_share_recognised_counts_strictly_above():
    rows = [[0.95, 0.05], [0.9, 0.1], [0.05, 0.95], [0.5, 0.5]]
    assert share_recognised(rows) == 0.5
    assert share_recognised(rows, threshold=0.4) == 1.0
    assert share_recognised(np.asarray(rows, np.float32), threshold=0.96) == 0.0


@pytest.mark.parametrize("rows", [[[3.0, -2.0]], [[0.5, 0.2]], [[np.nan, 1.0]], np.zeros((0, 2)), [0.5, 0.5]])
def test_share_recognised_refuses_what_is_no_distribution(rows):
    with pytest.raises(ValueError, match="probabilities"):
        share_recognised(rows)


def test_histogram_and_entropy():
    np.testing.assert_array_equal(class_histogram([0, 2, 2, 2], 4), [1, 0, 3, 0])
    np.testing.assert_array_equal(class_histogram([], 3), [0, 0, 0])
    assert class_entropy([5, 5, 5, 5]) == pytest.approx(math.log(4), rel=1e-15)
    assert class_entropy([0, 9, 0]) == 0.0
    assert class_entropy([1, 0, 3, 0]) == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-14)


@pytest.mark.parametrize("counts", [[0, 0], [2, -1], [[1, 2]]])
def test_entropy_refuses_what_is_no_histogram(counts):
    with pytest.raises(ValueError, match="histogram"):
        class_entropy(counts)
