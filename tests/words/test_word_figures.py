"""The figures of word vectors, on vectors whose geometry is planted."""

import numpy as np
import PIL.Image
import pytest

from experiments.figures import analogy, countries_capitals, offset_clusters
from jaxgen.interop.word2vec import write_word2vec

DIM = 12


def _not_blank(path):
    with PIL.Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def _cells(line):
    return line.split()


@pytest.fixture(scope="module")
def countries(tmp_path_factory):
    """Each capital is its country, moved by one offset."""
    path = tmp_path_factory.mktemp("vectors") / "countries.bin"
    rng = np.random.default_rng(0)
    starts = 0.3 * rng.normal(size=(len(countries_capitals.PAIRS), DIM))
    offset = np.zeros(DIM)
    offset[0] = 2.0
    words = [word.lower() for pair in countries_capitals.PAIRS for word in pair]
    write_word2vec(path, words, np.stack([starts, starts + offset], axis=1).reshape(-1, DIM))
    return path


def test_capitals_lie_to_one_side_of_their_countries(countries, tmp_path, capsys):
    assert countries_capitals.main([f"--out={tmp_path}", f"--vectors={countries}"]) == 0
    _not_blank(tmp_path / "countries_capitals.png")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["country", "x", "y", "capital", "x", "y", "cosine"]
    rows = [_cells(line) for line in lines[: len(countries_capitals.PAIRS)]]
    assert [(row[0], row[3]) for row in rows] == list(countries_capitals.PAIRS)
    moved = np.asarray([float(row[4]) - float(row[1]) for row in rows])
    assert np.all(moved > 0) or np.all(moved < 0)
    assert min(float(row[6]) for row in rows) > 0.5  # the offset is of length 2, what is not shared of 1


def test_the_plane_and_cosines_by_the_definition():
    rng = np.random.default_rng(1)
    countries, capitals = rng.normal(size=(2, 5, DIM)).astype(np.float32)
    plane = countries_capitals.compute(countries, capitals)
    rows = np.concatenate([countries, capitals])
    centred = rows - rows.mean(axis=0)
    s = np.linalg.svd(centred, compute_uv=False)
    assert plane.share == pytest.approx(np.sum(s[:2] ** 2) / np.sum(s**2), rel=1e-4)
    offsets = capitals - countries
    for i in range(5):
        others = np.delete(offsets, i, axis=0).mean(axis=0)
        expected = offsets[i] @ others / np.linalg.norm(offsets[i]) / np.linalg.norm(others)
        assert plane.cosines[i] == pytest.approx(expected, abs=1e-5)


def test_the_fourth_corner_is_found_and_drawn(tmp_path, capsys):
    a, b, c = (np.eye(DIM)[i] for i in range(3))
    queen = (b - a + c) / np.linalg.norm(b - a + c)
    words = ["man", "king", "woman", "queen", "royal", "table", "chair"]
    vectors = [a, b, c, queen, b + 0.5 * queen, np.eye(DIM)[5], np.eye(DIM)[6]]
    write_word2vec(tmp_path / "v.txt", words, np.asarray(vectors))
    assert analogy.main([f"--out={tmp_path}", f"--vectors={tmp_path / 'v.txt'}"]) == 0
    _not_blank(tmp_path / "analogy.png")
    lines = capsys.readouterr().out.splitlines()
    best = _cells(lines[1])
    assert best[0] == "queen"
    assert float(best[1]) == pytest.approx(1.0, abs=1e-3)
    assert _cells(lines[2])[0] == "royal"
    table = analogy.word_table.load(tmp_path / "v.txt")
    found = analogy.compute(table, ("man", "king", "woman"))
    # The plane keeps the sides and the angle between them: |b - a| = |c - a| = sqrt 2, 60 degrees.
    expected = np.sqrt(2) * np.asarray([[0, 0], [1, 0], [0.5, np.sqrt(0.75)], [1.5, np.sqrt(0.75)]])
    np.testing.assert_allclose(found.corners, expected, atol=1e-5)
    for answer in found.answers:
        away = table.unit[table.find(answer.word)] - a
        assert answer.point @ answer.point + answer.height**2 == pytest.approx(away @ away, abs=1e-4)


def test_clusters_of_offsets_are_named(tmp_path, capsys):
    rng = np.random.default_rng(2)
    words, vectors, pairs = [], [], []
    for kind, hypernym in enumerate(("animal", "metal", "city")):
        centre = 4 * np.eye(DIM)[kind]
        words.append(hypernym)
        vectors.append(centre + 4 * np.eye(DIM)[3 + kind])
        for number in range(10 - kind):
            words.append(f"{hypernym}{number}")
            vectors.append(centre + 0.1 * rng.normal(size=DIM))
            pairs.append(f"{words[-1]}\t{hypernym}")
    write_word2vec(tmp_path / "v.bin", words, np.asarray(vectors))
    (tmp_path / "pairs.tsv").write_text("\n".join([*pairs, "unknown\tanimal"]) + "\n")
    asked = [f"--out={tmp_path}", f"--vectors={tmp_path / 'v.bin'}", f"--pairs={tmp_path / 'pairs.tsv'}"]
    assert offset_clusters.main([*asked, "--clusters=3"]) == 0
    _not_blank(tmp_path / "offset_clusters.png")
    rows = [_cells(line) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[:2] for row in rows] == [["10", "animal"], ["9", "metal"], ["8", "city"]]
    assert all(word.startswith(row[1]) for row in rows for word in row[2:])
    assert offset_clusters.main([*asked, "--clusters=99"]) == 2
    assert "1 to 27 clusters" in capsys.readouterr().err


@pytest.mark.parametrize("figure", [analogy, countries_capitals, offset_clusters])
def test_vectors_that_cannot_be_used_end_in_one_sentence(figure, tmp_path, capsys):
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    write_word2vec(tmp_path / "other.bin", ["one", "two"], np.eye(2))
    (tmp_path / "pairs.tsv").write_text("dog\tanimal\n")
    more = [f"--pairs={tmp_path / 'pairs.tsv'}"] if figure is offset_clusters else []
    for name in ("absent.bin", "bad.bin", "other.bin"):
        assert figure.main([f"--out={tmp_path}", f"--vectors={tmp_path / name}", *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_three_different_words_make_an_analogy(countries, tmp_path, capsys):
    asked = [f"--out={tmp_path}", f"--vectors={countries}"]
    assert analogy.main([*asked, "--words=paris,france,paris"]) == 2
    assert "on a line" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        analogy.main([*asked, "--words=paris,france"])
