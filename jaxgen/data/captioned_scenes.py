"""Captioned scenes made of real digits, and the user's folder of images with their captions.

A scene has one digit ("a small 3 at the top") or two ("a small 3 above a large 7", "a large 2 left of a small
9", "two small 5s side by side"), each in its place of a black canvas. Its caption says all of it, so that
whoever reads the picture can tell whether it is the one that was asked for. Scene number `index` is a pure
function of (digits, seed, index).

Held out from training is every fifth of (first digit, second digit, relation), by `is_held_out`. Each digit
is still seen in each place of each relation, and each word of a held-out caption in other captions.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from jaxgen.data.fingerprint import held_out
from jaxgen.data.folder import ImageFiles
from jaxgen.data.load import load_source
from jaxgen.data.source import Source
from jaxgen.data.texts import lines_of
from jaxgen.data.tokenizers import Tokenizer
from jaxgen.types import UserError

SIZES = ("small", "large")
RELATIONS = ("above", "beside")
PLACES = ("middle", "top", "bottom", "left", "right")
NO_DIGIT, NO_SIZE = 10, len(SIZES)  # the truth of a place where nothing is
Which: TypeAlias = Literal["seen", "held_out", "all"]
Combination: TypeAlias = tuple[int, int, int]  # first digit, second digit, index of the relation
CAPTIONS = "captions.tsv"

_SINGLES = 0.25  # the share of scenes of one digit; held-out ones have two
_WHERE = ("in the middle", "at the top", "at the bottom", "on the left", "on the right")
_PLACES_OF = ((1, 2), (3, 4))  # of the first and the second digit, for each relation
_BETWEEN = ("above", "left of")
_TOGETHER = ("one above the other", "side by side")


class Item(NamedTuple):
    """A digit 0 to 9 of a size (index of SIZES) in a place (index of PLACES)."""

    digit: int
    size: int
    place: int


class Scenes(NamedTuple):
    """N scenes.

    images: uint8 [N, C, C, 1]
    captions: N sentences
    digits, sizes: int32 [N, 5], what is in each of PLACES: a digit or NO_DIGIT, an index of SIZES or NO_SIZE
    """

    images: np.ndarray
    captions: tuple[str, ...]
    digits: np.ndarray
    sizes: np.ndarray


def is_held_out(first: int, second: int, relation: int) -> bool:
    """Whether no training scene has these two digits in this relation (an index of RELATIONS)."""
    return (3 * first + second + 5 * relation) % 10 < 2


def combinations(digits: Sequence[int], which: Which) -> tuple[Combination, ...]:
    """All pairs of `digits` in all relations: those for training, those held out, or both."""
    both = ((a, b, relation) for a in digits for b in digits for relation in range(len(RELATIONS)))
    return tuple(c for c in both if which == "all" or is_held_out(*c) == (which == "held_out"))


def caption_of(items: Sequence[Item]) -> str:
    """The sentence that says what one or two items are, and where."""
    named = [f"a {SIZES[item.size]} {item.digit}" for item in items]
    first, *others = items
    if not others:
        return f"{named[0]} {_WHERE[first.place]}"
    relation = _PLACES_OF.index((first.place, others[0].place))
    if (first.digit, first.size) == (others[0].digit, others[0].size):
        return f"two {SIZES[first.size]} {first.digit}s {_TOGETHER[relation]}"
    return f"{named[0]} {_BETWEEN[relation]} {named[1]}"


# ---- digits of two sizes


@dataclasses.dataclass(frozen=True, eq=False)
class DigitBank:
    """The digits that scenes are made of.

    canvas: side C of the scenes
    images: for each of SIZES, all digits uint8 [N, s, s]; large ones have s = C / 2, small ones 3 C / 8
    members: digit -> the numbers of its images
    """

    name: str
    split: str
    canvas: int
    images: tuple[np.ndarray, ...]
    members: Mapping[int, np.ndarray]

    @functools.cached_property
    def combinations(self) -> dict[str, tuple[Combination, ...]]:
        """`combinations` of its digits by their name."""
        digits = sorted(self.members)
        return {which: combinations(digits, which) for which in get_args(Which)}


def area_weights(num: int, num_out: int) -> np.ndarray:
    """[num_out, num] weights that average `num` pixels in a row over `num_out` equal parts; rows sum to 1."""
    edges = np.linspace(0.0, num, num_out + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(num)[None, :]
    overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0.0, None)
    weights: np.ndarray = overlap * (num_out / num)
    return weights


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Images [N, H, W] in [0, 255] averaged by area to uint8 [N, side, side]."""
    rows, columns = (area_weights(size, side) for size in images.shape[1:])
    return np.rint(rows @ images @ columns.T).astype(np.uint8)


def load_digit_banks(name: str, *, canvas: int, margin: int) -> tuple[DigitBank, DigitBank]:
    """The training and the test digits of a data set of grey images with the labels 0 to 9.

    name: as for `load_source`: digits, mnist, npz:PATH ...
    canvas: side of the scenes, a multiple of 16
    margin: how many pixels are cut off each side of a digit first

    Digits that one of the splits lacks are left out of both. Raises UserError where the data are something
    else, and for sides and margins that do not fit.
    """
    if canvas < 16 or canvas % 16:
        raise UserError(f"the side of a scene must be a multiple of 16, not {canvas}.")
    sources = {split: load_source(name, split) for split in ("train", "test")}
    for source in sources.values():
        shape = source.fields["image"].shape[1:] if "image" in source.fields else (0, 0, 0)
        if "label" not in source.fields or shape[-1] != 1 or not 1 < (source.num_classes or 0) <= 10:
            raise UserError(
                f"scenes need grey images of digits with the labels 0 to 9, which {name} has not."
            )
        if not 0 <= 2 * margin < min(shape[:2]):
            raise UserError(f"a margin of {margin} leaves nothing of digits of {shape[0]}x{shape[1]} pixels.")
    common = sorted(set.intersection(*(set(s.fields["label"].tolist()) for s in sources.values())))
    if not combinations(common, "seen") or not combinations(common, "held_out"):
        raise UserError(f"{name} has too few digits in both splits to make scenes of: {common}.")

    def bank(source: Source) -> DigitBank:
        images = source.fields["image"][..., 0] * (255.0 / (source.num_levels - 1))
        kept = images[:, margin : images.shape[1] - margin, margin : images.shape[2] - margin]
        sides = (3 * canvas // 8, canvas // 2)
        label = source.fields["label"]
        members = {digit: np.flatnonzero(label == digit) for digit in common}
        return DigitBank(name, source.split, canvas, tuple(resized(kept, s) for s in sides), members)

    return bank(sources["train"]), bank(sources["test"])


# ---- scenes


def make_scene(bank: DigitBank, seed: int, index: int, which: Which) -> tuple[np.ndarray, tuple[Item, ...]]:
    """Scene number `index`: the picture uint8 [C, C], and what is in it."""
    rng = np.random.default_rng([seed, index, get_args(Which).index(which)])
    if which != "held_out" and rng.random() < _SINGLES:
        digit = sorted(bank.members)[rng.integers(len(bank.members))]
        size, place = int(rng.integers(len(SIZES))), int(rng.integers(len(PLACES)))
        items: tuple[Item, ...] = (Item(digit, size, place),)
    else:
        choices = bank.combinations[which]
        first, second, relation = choices[rng.integers(len(choices))]
        sizes = rng.integers(len(SIZES), size=2)
        items = tuple(
            Item(digit, int(of_digit), where)
            for digit, of_digit, where in zip((first, second), sizes, _PLACES_OF[relation], strict=True)
        )
    picture = np.zeros((bank.canvas, bank.canvas), np.uint8)
    for item in items:
        digit = bank.images[item.size][rng.choice(bank.members[item.digit])]
        row, column = _corner(bank.canvas, len(digit), item.place, rng)
        picture[row : row + len(digit), column : column + len(digit)] = digit
    return picture, items


def _corner(canvas: int, side: int, place: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where the upper left corner of an item goes: near the middle of its place, inside its half."""
    half, step = canvas // 2, canvas // 16
    row, column = ((canvas - side) // 2 + int(rng.integers(-step, step + 1)) for _ in range(2))
    inside = int(rng.integers(half - side + 1))
    match PLACES[place]:
        case "top":
            row = inside
        case "bottom":
            row = half + inside
        case "left":
            column = inside
        case "right":
            column = half + inside
    return row, column


def make_scenes(bank: DigitBank, *, seed: int, num: int, which: Which) -> Scenes:
    """The scenes 0 … num - 1."""
    images = np.empty((num, bank.canvas, bank.canvas, 1), np.uint8)
    digits = np.full((num, len(PLACES)), NO_DIGIT, np.int32)
    sizes = np.full((num, len(PLACES)), NO_SIZE, np.int32)
    captions = []
    for index in range(num):
        images[index, ..., 0], items = make_scene(bank, seed, index, which)
        captions.append(caption_of(items))
        for item in items:
            digits[index, item.place], sizes[index, item.place] = item.digit, item.size
    return Scenes(images, tuple(captions), digits, sizes)


# ---- captions


def encode_captions(
    tokenizer: Tokenizer, captions: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [N, length], from `<bos>` to the last `<pad>`, and how many are real, int32 [N].

    So the empty caption has one token. What is longer than `length` is cut.
    """
    tokens = np.full((len(captions), length), tokenizer.pad_id, np.int32)
    lengths = np.empty(len(captions), np.int32)
    for row, ids in enumerate(tokenizer.encode_all(list(captions))):
        kept = ids[: length - 1]
        tokens[row, 0], lengths[row] = tokenizer.bos_id, len(kept) + 1
        tokens[row, 1 : 1 + len(kept)] = kept
    return tokens, lengths


def load_captioned_folder(path: str, split: str, *, max_bytes: int = 2**30) -> tuple[Source, tuple[str, ...]]:
    """The images of a folder and their captions: a tenth, chosen by a hash of the file names, is for testing.

    Beside the images lies captions.tsv, UTF-8, with a line `FILE<tab>CAPTION` for each; FILE is relative to
    the folder. All images have one size and are all grey or all colour; more than `max_bytes` of them stay on
    disk. Raises UserError where a file is missing, no image or no such text.
    """
    folder = Path(os.path.expanduser(path))
    table = folder / CAPTIONS
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text: save it as UTF-8.") from error
    chosen: list[tuple[Path, str]] = []
    lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if not lines:
        raise UserError(f"{table} is empty: write a line FILE<tab>CAPTION for each image.")
    for number, line in lines:
        file, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"line {number} of {table} has no tab between file and caption: {line[:60]!r}.")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing, and line {number} of {table} names it.")
        if held_out(file) == (split == "test"):
            chosen.append((folder / file, " ".join(caption.split())))
    if not chosen:
        raise UserError(f"{table} names {len(lines)} images, of which none is for {split}: give more.")
    files = ImageFiles([file for file, _ in chosen])
    image = files if files.nbytes > max_bytes else files[:]
    source = Source(f"folder:{path}", split, {"image": image}, None, num_levels=256)
    return source, tuple(caption for _, caption in chosen)
