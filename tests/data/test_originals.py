import gzip
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.data.originals import parse_idx, split_text
from jaxgen.types import UserError

examples = settings(max_examples=200, deadline=None, derandomize=True, database=None)
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@examples
@given(shapes, st.booleans(), st.randoms(use_true_random=False))
def test_idx_is_read_back(shape, zipped, random):
    array = np.frombuffer(random.randbytes(math.prod(shape)), np.uint8).reshape(shape)
    data = idx(array)
    np.testing.assert_array_equal(parse_idx(gzip.compress(data) if zipped else data, "f"), array)


@examples
@given(shapes, st.booleans(), st.data())
def test_a_truncated_or_longer_idx_is_refused(shape, zipped, data):
    whole = idx(np.ones(shape, np.uint8))
    if zipped:
        whole = gzip.compress(whole)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(UserError, match="the file"):
        parse_idx(whole[:cut], "the file")
    with pytest.raises(UserError, match="the file"):
        parse_idx(whole + b"x", "the file")


@examples
@given(st.binary(max_size=40), st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"\x00\x00\x08"]))
def test_foreign_bytes_are_refused_or_an_array_and_nothing_else(data, prefix):
    try:
        array = parse_idx(prefix + data, "the file")
    except UserError:
        return
    assert idx(array) == prefix + data


def test_an_idx_of_more_dimensions_than_numpy_has_is_refused():
    with pytest.raises(UserError, match="makes no array"):
        parse_idx(bytes([0, 0, 8, 200]) + (1).to_bytes(4, "big") * 200 + b"x", "f")


@pytest.mark.parametrize("length", [0, 1, 9, 20, 1115394])
def test_text_is_split_into_parts_that_make_the_whole(length):
    text = bytes(i % 251 for i in range(length))
    parts = split_text(text)
    assert list(parts) == ["train", "validation", "test"]
    assert b"".join(parts.values()) == text
    if length == 1115394:  # the sizes of TFDS's tiny_shakespeare: 90 %, then half of the rest, rounded down
        assert [len(part) for part in parts.values()] == [1003854, 55770, 55770]
