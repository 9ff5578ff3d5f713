"""Captioned scenes: pure in (digits, seed, index), with the stated truth and the stated hold-out."""

import itertools
import re

import numpy as np
import PIL.Image
import pytest

from jaxgen.data import captioned_scenes as cs
from jaxgen.data.tokenizers import BOS, PAD, UNK, train_tokenizer
from jaxgen.types import UserError

DIGITS = range(10)


@pytest.fixture(scope="module")
def plain():
    """Digits that are squares of one value each, so that a picture can be read exactly."""
    images = tuple(
        np.repeat(np.arange(10, dtype=np.uint8) * 10 + 50, s * s).reshape(10, s, s) for s in (6, 8)
    )
    return cs.DigitBank("plain", "train", 16, images, {d: np.array([d]) for d in DIGITS})


def _centre(place):
    """Of the half, or the middle, that an item must lie in: (rows, columns) as (low, high) of 16."""
    return {
        "middle": ((0, 16), (0, 16)),
        "top": ((0, 8), (0, 16)),
        "bottom": ((8, 16), (0, 16)),
        "left": ((0, 16), (0, 8)),
        "right": ((0, 16), (8, 16)),
    }[place]


def test_the_truth_is_what_is_in_the_picture(plain):
    scenes = cs.make_scenes(plain, seed=3, num=300, which="all")
    assert scenes.images.shape == (300, 16, 16, 1)
    for image, digits, sizes in zip(scenes.images[..., 0], scenes.digits, scenes.sizes, strict=True):
        expected = 0
        for place, digit, size in zip(cs.PLACES, digits, sizes, strict=True):
            assert (digit == cs.NO_DIGIT) == (size == cs.NO_SIZE)
            if digit == cs.NO_DIGIT:
                continue
            (top, bottom), (left, right) = _centre(place)
            assert (image[top:bottom, left:right] == 50 + 10 * digit).sum() >= (6, 8)[size] ** 2
            expected += (6, 8)[size] ** 2
        assert (image > 0).sum() == expected


def test_the_caption_says_the_truth(plain):
    scenes = cs.make_scenes(plain, seed=1, num=400, which="all")
    where = dict(zip(cs._WHERE, cs.PLACES, strict=True))
    for caption, digits, sizes in zip(scenes.captions, scenes.digits, scenes.sizes, strict=True):
        found = {
            place: (digit, cs.SIZES[size])
            for place, digit, size in zip(cs.PLACES, digits, sizes, strict=True)
            if digit != cs.NO_DIGIT
        }
        if both := re.fullmatch(r"two (\w+) (\d)s (.+)", caption):
            item = (int(both[2]), both[1])
            places = {"side by side": ("left", "right"), "one above the other": ("top", "bottom")}[both[3]]
            assert found == dict.fromkeys(places, item)
        elif pair := re.fullmatch(r"a (\w+) (\d) (above|left of) a (\w+) (\d)", caption):
            places = {"above": ("top", "bottom"), "left of": ("left", "right")}[pair[3]]
            items = (int(pair[2]), pair[1]), (int(pair[5]), pair[4])
            assert found == dict(zip(places, items, strict=True))
        else:
            one = re.fullmatch(r"a (\w+) (\d) (.+)", caption)
            assert found == {where[one[3]]: (int(one[2]), one[1])}
    assert {len(set(d) - {cs.NO_DIGIT}) for d in scenes.digits} == {1, 2}


def test_a_scene_depends_on_seed_and_index_alone(plain):
    few, many = (cs.make_scenes(plain, seed=0, num=num, which="seen") for num in (7, 20))
    np.testing.assert_array_equal(few.images, many.images[:7])
    assert few.captions == many.captions[:7]
    other = cs.make_scenes(plain, seed=1, num=20, which="seen")
    assert other.captions != many.captions


def _pairs(scenes):
    for digits in scenes.digits:
        for relation, (first, second) in enumerate(cs._PLACES_OF):
            if digits[first] != cs.NO_DIGIT and digits[second] != cs.NO_DIGIT:
                yield int(digits[first]), int(digits[second]), relation


def test_held_out_combinations_are_never_trained_on_though_their_parts_are(plain):
    seen, held_out, every = (cs.combinations(DIGITS, which) for which in ("seen", "held_out", "all"))
    assert sorted(seen + held_out) == sorted(every)
    assert len(every) == 200
    assert len(held_out) == 40
    for relation, digit, position in itertools.product((0, 1), DIGITS, (0, 1)):
        assert any(c[position] == digit and c[2] == relation for c in seen)
    assert set(_pairs(cs.make_scenes(plain, seed=0, num=2000, which="seen"))) == set(seen)
    found = list(_pairs(cs.make_scenes(plain, seed=0, num=400, which="held_out")))
    assert len(found) == 400
    assert set(found) == set(held_out)

    def words(combinations):
        for (first, second, relation), sizes in itertools.product(
            combinations, itertools.product((0, 1), (0, 1))
        ):
            items = zip((first, second), sizes, cs._PLACES_OF[relation], strict=True)
            yield from cs.caption_of([cs.Item(*item) for item in items]).split()

    assert set(words(held_out)) <= set(words(seen))


def test_training_and_test_scenes_are_made_of_other_digits():
    train, test = cs.load_digit_banks("digits", canvas=16, margin=0)
    assert [sum(map(len, bank.members.values())) for bank in (train, test)] == [1437, 360]
    pictures = [{image.tobytes() for image in bank.images[1]} for bank in (train, test)]
    assert not pictures[0] & pictures[1]
    assert [image.shape[1:] for image in train.images] == [(6, 6), (8, 8)]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("digits", {"canvas": 20, "margin": 0}, "multiple of 16"),
        ("digits", {"canvas": 16, "margin": 4}, "leaves nothing"),
    ],
)
def test_what_no_scenes_can_be_made_of(name, settings, words):
    with pytest.raises(UserError, match=words):
        cs.load_digit_banks(name, **settings)


def test_area_weights_closed_form():
    np.testing.assert_allclose(cs.area_weights(3, 3), np.eye(3))
    np.testing.assert_allclose(cs.area_weights(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(cs.area_weights(3, 2), np.array([[2, 1, 0], [0, 1, 2]]) / 3)
    np.testing.assert_allclose(cs.area_weights(8, 6).sum(axis=1), 1)
    np.testing.assert_allclose(cs.area_weights(8, 6).sum(axis=0), 6 / 8)  # every pixel counts alike


def test_captions_as_tokens():
    tokenizer = train_tokenizer("word", ["a b c"], specials=(PAD, BOS, UNK))
    tokens, lengths = cs.encode_captions(tokenizer, ["", "a", "c zebra", "a b c a b"], 4)
    bos, pad, unk = tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id
    a, b, c = tokenizer.encode("a b c")
    np.testing.assert_array_equal(
        tokens, [[bos, pad, pad, pad], [bos, a, pad, pad], [bos, c, unk, pad], [bos, a, b, c]]
    )
    np.testing.assert_array_equal(lengths, [1, 2, 3, 4])


# ---- a folder of images with captions.tsv


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        PIL.Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png\tpicture  number {i}" for i in range(30)]
    (tmp_path / "captions.tsv").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    return tmp_path


def test_a_folder_gives_each_image_its_caption_in_one_split(folder):
    splits = _both_splits(folder)
    numbers = []
    for source, captions in splits:
        assert source.fields["image"].shape[1:] == (4, 4, 1)
        values = source.fields["image"][:, 0, 0, 0].tolist()
        assert captions == tuple(f"picture number {value}" for value in values)
        numbers += values
    assert sorted(numbers) == list(range(30))
    # A caption ends at a line feed alone.
    table = "\r\n".join(f"{i}.png\tpicture\u2028number {i}" for i in range(30))
    (folder / "captions.tsv").write_text(table, encoding="utf-8", newline="")
    assert [captions for _, captions in _both_splits(folder)] == [captions for _, captions in splits]
    on_disk, _ = cs.load_captioned_folder(str(folder), "train", max_bytes=1)
    np.testing.assert_array_equal(on_disk.fields["image"][:], splits[0][0].fields["image"])


def _both_splits(folder):
    return [cs.load_captioned_folder(str(folder), split) for split in ("train", "test")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b" \n\n", "is empty"),
        (b"0.png\tfine\n1.png no tab\n", "line 2 .* no tab"),
        (b"0.png\tfine\nother.png\tnot there\n", "other.png is missing, and line 2"),
        (b"0.png\tonly one\n", "none is for"),
    ],
)
def test_a_folder_that_is_no_data_set(folder, content, words):
    if content is None:
        (folder / "captions.tsv").unlink()
    else:
        (folder / "captions.tsv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        _both_splits(folder)
