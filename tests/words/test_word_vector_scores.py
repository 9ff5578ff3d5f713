"""The judges of word vectors on sets written here, with vectors whose answers are known."""

from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np
import pytest

from experiments.common import word_vectors
from jaxgen.metrics import words as judges
from jaxgen.types import UserError

BIRDS, TREES = ["crow", "dove", "eagle", "hawk", "owl"], ["elm", "oak", "pine", "birch"]


@pytest.fixture
def bless(tmp_path, monkeypatch):
    """A data folder whose BLESS has two classes, and one word of both of them."""
    monkeypatch.setenv("JAXGEN_DATA_DIR", str(tmp_path))
    pairs = [(word, "bird", True) for word in [*BIRDS, "both", "unheard"]]
    pairs += [(word, "tree", True) for word in [*TREES, "both"]]
    pairs += [("crow", "tree", False), ("oak", "plant", True)]
    lines = [f"{word}-n\t{other}-n\t{true}\thyper\n" for word, other, true in pairs]
    (tmp_path / "hypernyms").mkdir()
    for part, some in (("val", lines[:3]), ("test", lines[3:])):
        with gzip.open(tmp_path / "hypernyms" / f"siege-BLESS.{part}.tsv.gz", "wt", encoding="utf-8") as file:
            file.writelines(some)


def _vectors(words, dim=6):
    """Near the first axis for birds, near the second for others."""
    rng = np.random.default_rng(0)
    axes = np.asarray([np.eye(dim)[0 if word in BIRDS else 1] for word in words])
    return axes + 0.1 * rng.standard_normal((len(words), dim))


def test_classes_far_apart_are_told_apart(bless):
    words = [*BIRDS, *TREES, "both"]
    scores = word_vectors.scores(_vectors(words), words)
    assert scores["category_purity"].value == 1
    assert scores["category_purity"].n == 9
    # Each of 4 trees among birds, each of 5 birds among trees.
    assert scores["odd_one_out"].value == 1
    assert scores["odd_one_out"].n == 9
    assert "1 words out of vocabulary" in scores["odd_one_out"].unit


def test_known_words_of_a_class_left_out_are_not_out_of_vocabulary():
    table = judges.Vectors(_vectors([*BIRDS, *TREES, "elk"]), [*BIRDS, *TREES, "elk"])
    classes = {"bird": BIRDS, "tree": [*TREES, "yew"], "mammal": ["elk"]}  # one mammal: too few to judge
    unit = word_vectors._category_scores(table, classes)["odd_one_out"].unit
    assert "2 classes of BLESS, 1 words out of vocabulary" in unit


@pytest.mark.parametrize(
    ("name", "pack"), [("a.gz", gzip.compress), ("a.bz2", bz2.compress), ("a.xz", lzma.compress)]
)
def test_packed_text_and_damaged_packed_text(tmp_path, name, pack):
    text = "one\r\ntwo\u2028three\n" * 1000
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert "".join(word_vectors.packed_lines(tmp_path / name)) == text
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"none" + whole, pack("\u00e9".encode("latin-1"))):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or cannot be read"):
            list(word_vectors.packed_lines(tmp_path / name))


def test_a_text_that_is_cut_short_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "wiki100m").mkdir()
    packed = bz2.compress(np.random.default_rng(0).integers(97, 120, 10_000, dtype=np.uint8).tobytes())
    (tmp_path / "wiki100m" / "enwiki_100m.txt.bz2").write_bytes(packed[:-100])
    with pytest.raises(UserError, match="damaged"):
        word_vectors.text_file("wiki", "", True)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    (tmp_path / "cache" / "texts").rmdir()
    (tmp_path / "cache" / "texts").write_text("in the way")
    with pytest.raises(UserError, match="JAXGEN_CACHE_DIR"):
        word_vectors.text_file("wiki", "", True)


def test_vectors_of_chance_find_the_odd_word_as_often_as_chance(bless):
    words, found = [*BIRDS, *TREES], []
    for seed in range(60):
        vectors = np.random.default_rng(seed).standard_normal((len(words), 50))
        found.append(word_vectors.scores(vectors, words)["odd_one_out"].value)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - 1 / 5) < 4 * error


def test_too_few_words_give_no_score(bless):
    assert "odd_one_out" not in word_vectors.scores(_vectors(BIRDS), BIRDS)
    assert "category_purity" not in word_vectors.scores(_vectors(BIRDS), BIRDS)


def test_no_sets_at_hand_give_no_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_DATA_DIR", str(tmp_path))
    assert word_vectors.scores(_vectors(BIRDS), BIRDS) == {}
