import dataclasses
import hashlib

import numpy as np
import pytest

from jaxgen.data import Source, from_unit_range, load_source, to_unit_range
from jaxgen.types import UserError


def small(**changes):
    fields = {
        "image": np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1),
        "label": np.array([0, 1, 1], np.int32),
    }
    return Source(
        **{"name": "s", "split": "train", "fields": fields, "num_classes": 2, "num_levels": 256} | changes
    )


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_unit_range_is_the_formula_and_has_an_exact_inverse(num_levels):
    pixels = np.arange(num_levels, dtype=np.uint8)
    x = to_unit_range(pixels, num_levels)
    assert x.dtype == np.float32
    assert x[0] == -1
    assert x[-1] == 1
    # Half a unit in the last place of numbers below 1: the table is rounded once, from float64.
    np.testing.assert_allclose(x, 2.0 * pixels / (num_levels - 1) - 1, rtol=0, atol=2**-25)
    np.testing.assert_array_equal(from_unit_range(x, num_levels), pixels)


def test_from_unit_range_rounds_to_the_nearest_and_clips():
    x = np.array([-7.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 1.0, 3.0, np.inf])
    np.testing.assert_array_equal(from_unit_range(x, 256), [0, 0, 0, 1, 255, 255, 255])


def test_values_that_are_no_pixels_are_refused():
    with pytest.raises(ValueError, match="17 is not below num_levels = 17"):
        to_unit_range(np.array([3, 17], np.uint8), 17)
    with pytest.raises(ValueError, match="uint8"):
        to_unit_range(np.array([3]), 17)
    with pytest.raises(ValueError, match="NaN"):
        from_unit_range(np.array([0.0, np.nan]), 256)


def test_fingerprint_follows_the_content_and_nothing_else():
    source = small()
    by_hand = hashlib.sha256()
    by_hand.update(b"image:|u1:(3, 4, 4, 1);" + bytes(range(48)))
    by_hand.update(b"label:<i4:(3,);" + source.fields["label"].tobytes())
    assert source.fingerprint == by_hand.hexdigest()
    assert small(name="other", split="test").fingerprint == source.fingerprint
    changed = source.fields["image"].copy()
    changed[2, 3, 3, 0] ^= 1
    reshaped = source.fields["image"].reshape(3, 2, 8, 1)
    for image in (changed, reshaped):
        assert small(fields={**source.fields, "image": image}).fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {}}, "no fields"),
        ({"fields": {"image": np.zeros((0, 4, 4, 1), np.uint8)}}, "image is empty"),
        ({"fields": {"image": np.zeros((3, 4, 4), np.uint8)}}, "height, width, channels"),
        ({"fields": {"image": np.zeros((3, 4, 4, 0), np.uint8)}}, "height, width, channels"),
        ({"fields": {"image": np.zeros((3, 4, 4, 1), np.float32)}}, "must be uint8, not float32"),
        (
            {"fields": {"image": np.zeros((3, 4, 4, 1), np.uint8), "label": np.zeros(2, np.int32)}},
            "differ in length",
        ),
        ({"num_levels": 40}, "pixel value 47 is not below 40"),
        ({"num_classes": 1}, "labels 0 to 1 leave"),
        ({"num_classes": None}, "no number of classes"),
        ({"fields": {"label": np.array([-1, 0], np.int32)}}, "labels -1 to 0 leave"),
        ({"fields": {"label": np.array([0, 1])}}, "labels are int64"),
    ],
)
def test_a_source_of_the_wrong_shape_or_type_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_a_source_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().name = "other"


def test_digits_are_scikit_learns_in_two_disjoint_parts():
    train, test = load_source("digits", "train"), load_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    for part in (train, test):
        assert part.fields["image"].shape[1:] == (8, 8, 1)
        assert part.fields["image"].max() == 16
        assert (part.num_levels, part.num_classes) == (17, 10)
        assert set(part.fields["label"]) == set(range(10))
    # The sum over all 1,797 images, from scikit-learn's file; 1,797 * 64 * mean 4.884.
    from sklearn.datasets import load_digits

    digits = load_digits()
    total = sum(part.fields["image"].sum(dtype=int) for part in (train, test))
    assert total == digits.data.sum()
    rows = lambda part: {image.tobytes() for image in part.fields["image"]}
    assert not rows(train) & rows(test)
    assert np.bincount(test.fields["label"]).min() >= 25
    # The split is part of every recorded figure: it must not move.
    assert test.fields["label"][:8].tolist() == [2, 2, 3, 0, 8, 8, 7, 8]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnsit", "train", "unknown data set 'mnsit': did you mean 'mnist'"),
        ("fashion-mnist", "train", "did you mean 'fashion_mnist'"),
        ("qqqq", "train", "choose one of digits, "),
        ("folder:", "train", "did you mean 'folder:PATH'"),
        ("digits", "tset", "unknown split of 'digits' 'tset': did you mean 'test'"),
        ("tiny_shakespeare", "valid", "did you mean 'validation'"),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(name, split, message):
    with pytest.raises(UserError, match=message):
        load_source(name, split)
