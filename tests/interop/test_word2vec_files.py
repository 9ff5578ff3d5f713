"""word2vec files against gensim's bytes, a writer in the C program's words, and damage of every kind."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxgen.interop import word2vec as files
from jaxgen.interop.safetensors import write_tensors
from jaxgen.types import UserError

WORDS = ("the", "naïve", "猫", "new_york", "x\u00a0y")
TABLE = np.asarray(
    [
        [0.1, -1.0, 1e-5],
        [3.4e38, 1.5, -0.0],
        [1 / 3, 2.0, 1e-40],
        [123456.789, 0.0, 7],
        [-1e10, 1e16, 0.25],
    ],
    np.float32,
)


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_writes_the_same_bytes_and_reads_ours(binary, tmp_path):
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    keyed = models.KeyedVectors(3)
    keyed.add_vectors(list(WORDS), TABLE)
    keyed.save_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    files.write_word2vec(tmp_path / "ours", WORDS, TABLE, binary=binary)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for style in ("gensim", "c"):
        files.write_word2vec(tmp_path / "ours", WORDS, TABLE, binary=binary, style=style)
        read = models.KeyedVectors.load_word2vec_format(str(tmp_path / "ours"), binary=binary)
        found = files.read_word2vec(tmp_path / "ours", binary=binary)
        assert tuple(read.index_to_key) == found.words == WORDS
        np.testing.assert_array_equal(read.vectors, found.vectors)


def test_the_c_programs_bytes(tmp_path):
    """fprintf("%lld %lld\\n"), then "%s ", then fwrite of the floats or "%lf " each, then "\\n"."""
    binary = b"5 3\n" + b"".join(
        word.encode() + b" " + struct.pack("<3f", *row) + b"\n"
        for word, row in zip(WORDS, TABLE, strict=True)
    )
    text = b"5 3\n" + b"".join(
        word.encode() + b" " + b"".join(b"%.6f " % number for number in row) + b"\n"
        for word, row in zip(WORDS, TABLE.astype(np.float64), strict=True)
    )
    for name, expected in (("c.bin", binary), ("c.txt", text)):
        files.write_word2vec(tmp_path / name, WORDS, TABLE, style="c")
        assert (tmp_path / name).read_bytes() == expected
        found = files.read_word2vec(tmp_path / name)
        assert found.words == WORDS
        # Six decimals: half a unit of the last, and the rounding of float32.
        tolerance = {"rtol": 0, "atol": 0} if name == "c.bin" else {"rtol": 1e-6, "atol": 5.1e-7}
        np.testing.assert_allclose(found.vectors, TABLE, **tolerance)


word = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\r\v\f\0"), min_size=1, max_size=8
)


@given(
    st.lists(word, min_size=1, max_size=5, unique=True).flatmap(
        lambda words: st.tuples(
            st.just(tuple(words)),
            arrays.arrays(
                np.float32,
                st.tuples(st.just(len(words)), st.integers(1, 4)),
                elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
            ),
        )
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_to_the_bit(tmp_path, written):
    words, table = written
    for name in ("v.txt", "v.bin"):
        files.write_word2vec(tmp_path / name, words, table)
        found = files.read_word2vec(tmp_path / name)
        assert found.words == words
        np.testing.assert_array_equal(found.vectors.view(np.int32), table.view(np.int32))
    files.write_word2vec(tmp_path / "c.bin", words, table, style="c")
    np.testing.assert_array_equal(files.read_word2vec(tmp_path / "c.bin").vectors, table)
    files.write_word_safetensors(tmp_path / "v.safetensors", words, table)
    found = files.read_word_safetensors(tmp_path / "v.safetensors")
    assert found.words == words
    np.testing.assert_array_equal(found.vectors, table)


@given(st.binary(max_size=60), st.sampled_from([b"", b"1 1\n", b"2 1\n", b"1 2\n"]), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_vectors_or_one_sentence(tmp_path, noise, header, binary):
    (tmp_path / "noise").write_bytes(header + noise)
    try:
        found = files.read_word2vec(tmp_path / "noise", binary=binary)
    except UserError:
        return
    assert np.all(np.isfinite(found.vectors))
    assert len(set(found.words)) == len(found.words) == len(found.vectors)
    files.write_word2vec(tmp_path / "again", *found, binary=binary)  # what is read can be written
    assert files.read_word2vec(tmp_path / "again", binary=binary).words == found.words


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_truncation_is_noticed(tmp_path, data):
    """But the loss of a last line's end, and of digits of the very last number of a text file."""
    name = data.draw(st.sampled_from(["v.txt", "v.bin"]))
    files.write_word2vec(tmp_path / name, WORDS, TABLE)
    whole = (tmp_path / name).read_bytes()
    kept = data.draw(st.integers(0, len(whole) - 6))
    (tmp_path / name).write_bytes(whole[:kept])
    with pytest.raises(UserError):
        files.read_word2vec(tmp_path / name)


BAD_TEXT = {
    "no header": b"a 1.0\n",
    "words with spaces": b"1 2\nnew york 1.0 2.0\n",
    "too few numbers": b"1 2\na 1.0\n",
    "more words than said": b"1 1\na 1.0\nb 2.0\n",
    "fewer words than said": b"3 1\na 1.0\nb 2.0\n",
    "a duplicate": b"2 1\na 1.0\na 2.0\n",
    "not a number": b"2 1\na nan\nb 2.0\n",
    "infinite in float32": b"1 1\na 1e39\n",
    "letters": b"1 1\na x\n",
    "an underscore": b"1 1\na 1_0\n",
    "not UTF-8": b"1 1\n\xff 1.0\n",
    "negative": b"-1 1\na 1\n",
    "zero": b"0 5\n",
    "huge": b"1000000000000 300\na 1.0\n",
    "huge dimensions": b"1 1000000000000\na 1.0\n",
    "huge both": b"9" * 30 + b" " + b"9" * 30 + b"\na 1.0\n",
    "a long first line": b"1" * 200,
    "empty word": b"1 1\n 1.0\n",
    "empty file": b"",
}
BAD_BINARY = {
    "huge": b"1000000000000 300\na " + bytes(1200),
    "cut": b"2 1\na " + bytes(4) + b"b " + bytes(3),
    "no space": b"1 1\n" + b"a" * 100,
    "not a number": b"1 1\na " + struct.pack("<f", float("nan")),
    "a duplicate": b"2 1\na " + bytes(4) + b"a " + bytes(4),
    "more than said": b"1 1\na " + bytes(4) + b"b " + bytes(4),
    "not UTF-8": b"1 1\n\xff\xfe " + bytes(4),
    "a word with a tab": b"1 1\na\tb " + bytes(4),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(pytest.param("v.txt", content, id=f"text: {what}") for what, content in BAD_TEXT.items()),
        *(pytest.param("v.bin", content, id=f"binary: {what}") for what, content in BAD_BINARY.items()),
    ],
)
def test_damaged_and_hostile_files_end_in_one_sentence_and_little_memory(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        files.read_word2vec(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_first_words(tmp_path):
    for name in ("v.txt", "v.bin"):
        files.write_word2vec(tmp_path / name, WORDS, TABLE)
        found = files.read_word2vec(tmp_path / name, limit=2)
        assert found.words == WORDS[:2]
        np.testing.assert_array_equal(found.vectors, TABLE[:2])
        assert files.read_word2vec(tmp_path / name, limit=99).words == WORDS
    with pytest.raises(UserError, match="at least 1 word"):
        files.read_word2vec(tmp_path / "v.txt", limit=0)
    with pytest.raises(UserError, match="no file"):
        files.read_word2vec(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (("a b",), np.ones((1, 1))),
        (("",), np.ones((1, 1))),
        (("a", "a"), np.ones((2, 1))),
        (("a",), np.full((1, 1), np.inf)),
        (("a",), np.ones((2, 1))),
        (("a",), np.ones((1, 0))),
        (("\ud800",), np.ones((1, 1))),
    ],
)
def test_what_no_file_can_hold_is_not_written(words, table, tmp_path):
    for write in (files.write_word2vec, files.write_word_safetensors):
        with pytest.raises(UserError):
            write(tmp_path / "v.bin", words, table)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"words": "["},
        {"words": "[1, 2]"},
        {"words": '["a"]'},
        {"words": '["a", "a"]'},
        {"words": "3"},
        {"words": '{"a": 1, "b": 2}'},
        {"words": "[" * 100_000},
        {"x": json.dumps(["a", "b"])},
    ],
)
def test_foreign_safetensors_end_in_one_sentence(metadata, tmp_path):
    path = tmp_path / "v.safetensors"
    write_tensors(path, {"vectors": np.ones((2, 3), np.float32)}, metadata)
    with pytest.raises(UserError) as caught:
        files.read_word_safetensors(path)
    assert str(path) in str(caught.value)
    (tmp_path / "other").write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError):
        files.read_word_safetensors(tmp_path / "other")
