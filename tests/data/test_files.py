import io
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgen.data import load_source
from jaxgen.types import UserError

examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes the file anew
)
IMAGES = np.arange(40 * 3 * 2, dtype=np.uint8).reshape(40, 3, 2)
LABELS = np.arange(40) % 7


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_npz_is_split_in_two_that_make_the_whole(tmp_path):
    name = save(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    train, test = load_source(name, "train"), load_source(name, "test")
    assert train.fields["image"].shape[1:] == (3, 2, 1)
    assert (train.num_classes, test.num_classes, train.num_levels) == (7, 7, 256)
    assert 0 < len(test) < 20
    both = {k: np.concatenate([train.fields[k], test.fields[k]]) for k in train.fields}
    order = np.argsort(both["image"][:, 0, 0, 0])
    np.testing.assert_array_equal(both["image"][order][..., 0], IMAGES)
    np.testing.assert_array_equal(both["label"][order], LABELS)
    assert load_source(name, "test").fingerprint == test.fingerprint


def test_about_a_tenth_is_held_out_of_every_class(tmp_path):
    n = 20_000
    labels = np.arange(n) % 10
    name = save(tmp_path / "a.npz", image=np.zeros((n, 1, 1), np.uint8), label=labels)
    counts = np.bincount(load_source(name, "test").fields["label"], minlength=10)
    assert np.abs(counts - n / 100).max() < 4 * np.sqrt(n / 100 * 0.9)  # 4 standard errors


def test_npz_with_a_test_split_of_its_own(tmp_path):
    name = save(
        tmp_path / "a.npz",
        image=IMAGES[:30],
        label=LABELS[:30],
        test_image=IMAGES[30:],
        test_label=LABELS[30:] + 2,
    )
    train, test = load_source(name, "train"), load_source(name, "test")
    np.testing.assert_array_equal(train.fields["image"][..., 0], IMAGES[:30])
    np.testing.assert_array_equal(test.fields["image"][..., 0], IMAGES[30:])
    assert (train.num_classes, test.num_classes) == (9, 9)


def test_floats_in_the_unit_interval_become_256_levels(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    exact = load_source(save(tmp_path / "a.npz", image=colour), "train")
    for dtype in (np.float32, np.float64):
        name = save(tmp_path / "b.npz", image=(colour / 255.0).astype(dtype))
        assert load_source(name, "train").fingerprint == exact.fingerprint
    assert exact.num_classes is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array 'image' .it has: nothing"),
        ({"x_train": IMAGES}, "no array 'image' .it has: x_train"),
        ({"image": IMAGES.astype(np.int64)}, "must be uint8, or floats"),
        ({"image": IMAGES.astype(np.uint16)}, "must be uint8, or floats"),
        ({"image": IMAGES.astype(bool)}, "must be uint8, or floats"),
        ({"image": np.array(["a", "b"])}, "must be uint8, or floats"),
        ({"image": IMAGES[0]}, "shape"),
        ({"image": np.zeros((4, 3, 32, 32), np.uint8)}, "1 or 3 channels"),
        ({"image": np.zeros((0, 3, 2), np.uint8)}, "N > 0"),
        ({"image": np.zeros((5, 0, 2), np.uint8)}, "N > 0"),
        ({"image": np.full((20, 2, 2), np.nan)}, "NaN"),
        ({"image": np.full((20, 2, 2), np.inf)}, "NaN or infinity"),
        ({"image": np.full((20, 2, 2), -0.5)}, r"must lie in \[0, 1\], not in \[-0.5, -0.5\]"),
        ({"image": np.full((20, 2, 2), 255.0)}, r"must lie in \[0, 1\]"),
        ({"image": IMAGES, "label": LABELS[:-1]}, "40 images but 39 labels"),
        ({"image": IMAGES, "label": LABELS - 1}, "from 0"),
        ({"image": IMAGES, "label": LABELS + 2**40}, "from 0"),
        ({"image": IMAGES, "label": LABELS / 2}, "whole numbers"),
        ({"image": IMAGES, "label": LABELS, "test_image": IMAGES}, "labels for only one of train and test"),
        ({"image": IMAGES, "test_images": IMAGES, "test_labels": LABELS}, "labels for only one of train and"),
        ({"image": IMAGES, "label": np.eye(40, dtype=int)}, "whole numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load_source(save(tmp_path / "a.npz", **arrays), "train")


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path):
    objects = np.empty(3, object)
    objects[:] = [Exploit()] * 3
    np.savez(tmp_path / "a.npz", image=objects)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Exploit()))
    for file in ("a.npz", "b.npz"):
        with pytest.raises(UserError, match=r"cannot be read as a NumPy .npz file"):
            load_source(f"npz:{tmp_path / file}", "train")


def npz_bytes(compressed):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, image=IMAGES, label=LABELS)
    return file.getvalue()


@examples
@given(st.booleans(), st.floats(0, 1, exclude_max=True))
def test_a_truncated_npz_is_refused(tmp_path, compressed, fraction):
    whole = npz_bytes(compressed)
    (tmp_path / "a.npz").write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(UserError):
        load_source(f"npz:{tmp_path / 'a.npz'}", "train")


@examples
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_a_damaged_npz_is_refused_or_reads_as_it_was(tmp_path, compressed, flips):
    damaged = bytearray(npz_bytes(compressed))
    for fraction, mask in flips:
        damaged[int(fraction * len(damaged))] ^= mask
    (tmp_path / "a.npz").write_bytes(damaged)
    try:
        source = load_source(f"npz:{tmp_path / 'a.npz'}", "train")
    except UserError:
        return
    (tmp_path / "b.npz").write_bytes(npz_bytes(compressed))
    intact = load_source(f"npz:{tmp_path / 'b.npz'}", "train")
    # Names of members carry no checksum: the label array may have become another array's name.
    for field, column in source.fields.items():
        np.testing.assert_array_equal(column, intact.fields[field])


@examples
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)]),
)
def test_foreign_bytes_are_no_npz(tmp_path, data, prefix):
    (tmp_path / "a.npz").write_bytes(prefix + data)
    with pytest.raises(UserError):
        load_source(f"npz:{tmp_path / 'a.npz'}", "train")


def test_an_npy_file_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(UserError, match="npz"):
        load_source(f"npz:{tmp_path / 'a.npy'}", "train")


def test_text_is_its_bytes(tmp_path):
    text = "Grüße, Welt. " * 30
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = [load_source(f"text:{tmp_path / 'a.txt'}", split) for split in ("train", "validation", "test")]
    assert b"".join(bytes(part.fields["tokens"]) for part in parts).decode() == text
    assert abs(len(parts[0]) / len(text.encode()) - 0.9) < 0.01
    assert all(part.fields["tokens"].dtype == np.uint8 for part in parts)


@pytest.mark.parametrize("kind", ["npz", "text", "folder"])
def test_what_is_not_there_is_refused(tmp_path, kind):
    with pytest.raises(UserError, match="there is no"):
        load_source(f"{kind}:{tmp_path}/none", "train")
    wrong_kind = tmp_path
    if kind == "folder":
        wrong_kind = tmp_path / "file"
        wrong_kind.write_bytes(b"")
    with pytest.raises(UserError, match="there is no"):
        load_source(f"{kind}:{wrong_kind}", "train")


@pytest.mark.parametrize("kind", ["npz", "text"])
def test_a_mistyped_split_gets_a_suggestion(tmp_path, kind):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match="unknown split 'trian': did you mean 'train'"):
        load_source(f"{kind}:{tmp_path / 'a'}", "trian")


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match="tokens is empty"):
        load_source(f"text:{tmp_path / 'a.txt'}", "train")
