import io
import threading
import time

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgen.data import ImageFiles, Stream, evaluation_batches, load_source
from jaxgen.data.folder import decode_image
from jaxgen.types import UserError

examples = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes the file anew
)


def picture(seed, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """40 images in two classes, numbered through."""
    for i in range(40):
        save(tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i:02d}.png", picture(i))
    (tmp_path / "pictures" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_classes_are_sorted_folder_names_and_a_tenth_is_held_out(folder):
    parts = {split: load_source(f"folder:{folder}", split) for split in ("train", "test")}
    assert sum(len(part) for part in parts.values()) == 40
    assert 0 < len(parts["test"]) < 20
    seen = {}
    for part in parts.values():
        assert (part.num_classes, part.num_levels) == (2, 256)
        for image, label in zip(part.fields["image"], part.fields["label"], strict=True):
            seen[image.tobytes()] = int(label)
    assert seen == {picture(i).tobytes(): i % 2 for i in range(40)}


def test_a_file_stays_in_its_split_when_others_come(folder):
    before = load_source(f"folder:{folder}", "test").fields["image"]
    for i in range(40, 80):
        save(folder / "cat" / f"{i}.png", picture(i))
    after = {image.tobytes() for image in load_source(f"folder:{folder}", "test").fields["image"]}
    assert {image.tobytes() for image in before} < after


def test_train_and_test_folders_are_the_splits(tmp_path):
    for i, name in enumerate(["train/a/0.png", "train/b/1.png", "train/b/2.png", "test/b/3.png"]):
        save(tmp_path / name, picture(i))
    train, test = (load_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert train.fields["label"].tolist() == [0, 1, 1]
    assert (test.fields["label"].tolist(), test.num_classes) == ([1], 2)
    np.testing.assert_array_equal(test.fields["image"][0], picture(3))
    save(tmp_path / "test/c/4.png", picture(4))
    with pytest.raises(UserError, match=r"4.png is in no class folder of .*train"):
        load_source(f"folder:{tmp_path}", "test")


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i:02d}.png", picture(i, (4, 4, 1)))
    source = load_source(f"folder:{tmp_path}", "train")
    assert list(source.fields) == ["image"]
    assert source.num_classes is None
    assert source.fields["image"].shape[1:] == (4, 4, 1)  # grey files stay grey


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]
)
def test_grey_stays_grey_and_all_else_becomes_rgb(tmp_path, mode, channels):
    colour = PIL.Image.fromarray(picture(0))
    colour.convert(mode).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png")
    assert pixels.shape == (6, 5, channels)
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(pixels, picture(0))
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(colour.convert("L")))


def test_16_bit_images_are_refused_and_not_clipped(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png has more than 8 bits"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize("max_bytes", [0, 10**9], ids=["on disk", "in memory"])
@pytest.mark.parametrize("odd_one", [picture(0, (6, 6, 3)), picture(0, (6, 5, 1))], ids=["size", "grey"])
def test_the_file_of_another_shape_is_named(folder, odd_one, max_bytes):
    save(folder / "dog" / "zz.png", odd_one)
    with pytest.raises(UserError, match=r"zz.png is \(6, \d, \d\) but .*png is \(6, 5, 3\)"):  # noqa: PT012
        train, test = (
            load_source(f"folder:{folder}", split, max_bytes=max_bytes) for split in ("train", "test")
        )
        for source in (train, test):
            list(evaluation_batches(source, batch_size=16))


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        load_source(f"folder:{tmp_path}", "train")
    for i in range(20):
        save(tmp_path / "a" / f"{i}.png", picture(i))
    with pytest.raises(UserError, match="unknown split"):
        load_source(f"folder:{tmp_path}", "validation")
    save(tmp_path / "loose.png", picture(0))
    with pytest.raises(UserError, match=r"beside class folders .loose.png and a/"):
        load_source(f"folder:{tmp_path}", "train")


def encoded(kind):
    file = io.BytesIO()
    PIL.Image.fromarray(picture(0)).save(file, kind)
    return file.getvalue()


@examples
@given(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]), st.floats(0, 1, exclude_max=True))
def test_a_truncated_image_is_refused_or_lacks_no_pixel(tmp_path, kind, fraction):
    whole = encoded(kind)
    (tmp_path / "a.png").write_bytes(whole[: int(fraction * len(whole))])
    try:
        pixels = decode_image(tmp_path / "a.png")
    except UserError:
        return
    assert fraction > 0.8  # what was lost came after the pixels
    (tmp_path / "b.png").write_bytes(whole)
    np.testing.assert_array_equal(pixels, decode_image(tmp_path / "b.png"))


@examples
@given(
    st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255)
)
def test_a_damaged_image_is_refused_or_an_image_and_nothing_else(tmp_path, kind, fraction, mask):
    damaged = bytearray(encoded(kind))
    damaged[int(fraction * len(damaged))] ^= mask
    (tmp_path / "a.png").write_bytes(damaged)
    try:
        pixels = decode_image(tmp_path / "a.png")
    except UserError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


@examples
@given(
    st.binary(max_size=100),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"%!PS-Adobe-3.0 EPSF"]),
)
def test_foreign_bytes_are_no_image(tmp_path, data, prefix):
    (tmp_path / "a.png").write_bytes(prefix + data)
    with pytest.raises(UserError, match=r"a\.png"):
        decode_image(tmp_path / "a.png")


def test_batches_read_through_grain_equal_those_from_memory(folder):
    memory = load_source(f"folder:{folder}", "train")
    disk = load_source(f"folder:{folder}", "train", max_bytes=100)
    assert isinstance(memory.fields["image"], np.ndarray)
    assert isinstance(disk.fields["image"], ImageFiles)
    assert disk.fields["image"].shape == memory.fields["image"].shape
    arguments = {"batch_size": 16, "seed": 4, "augment": ("flip", "crop4")}
    for process_index in range(2):
        streams = [
            Stream(source, **arguments, process_index=process_index, process_count=2)
            for source in (memory, disk)
        ]
        for step in (0, 1, 2, 50):
            expected, read = (stream(step) for stream in streams)
            for field in ("image", "label"):
                np.testing.assert_array_equal(read[field], expected[field])
    for expected, read in zip(*(evaluation_batches(s, batch_size=16) for s in (memory, disk)), strict=True):
        for field, value in expected.items():
            np.testing.assert_array_equal(read[field], value)


def test_image_files_are_indexed_like_the_array(folder):
    memory = load_source(f"folder:{folder}", "train").fields["image"]
    files = load_source(f"folder:{folder}", "train", max_bytes=100).fields["image"]
    for key in (3, -1, slice(2, 9, 3), slice(None), slice(0, 0), np.array([5, 0, 5]), np.array([], int)):
        np.testing.assert_array_equal(files[key], memory[key])
    with pytest.raises(IndexError):
        files[len(memory)]


def test_reading_leaves_no_threads(folder):
    files = load_source(f"folder:{folder}", "train", max_bytes=100).fields["image"]
    for _ in range(5):
        files[np.arange(20)]
    end = time.monotonic() + 5
    while any("grain" in t.name for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if "grain" in t.name]


def test_fingerprint_of_files_follows_names_and_sizes(folder):
    def fingerprint():
        return load_source(f"folder:{folder}", "train", max_bytes=100).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    for path in sorted(folder.glob("*/*.png"))[1:4]:
        path.rename(path.with_stem(path.stem + "x"))
    assert fingerprint() != before
