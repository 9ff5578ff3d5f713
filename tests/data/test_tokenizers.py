"""Tokenisers: round trips, what unknown text becomes, JSON, the cache."""

import numpy as np
import pytest

from jaxgen.data import tokenizers
from jaxgen.data.tokenizers import BOS, EOS, PAD, UNK, from_json, train_tokenizer
from jaxgen.types import UserError

ALL = (PAD, BOS, EOS, UNK)
LINES = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "größer, 漢字 and é"] * 5
SIZES = {"bpe": 300, "unigram": 60}


def _train(kind, specials=ALL, texts=LINES):
    return train_tokenizer(kind, texts, specials=specials, vocabulary_size=SIZES.get(kind, 0))


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe", "unigram"])
def test_known_text_comes_back_and_ids_are_in_range(kind):
    tokenizer = _train(kind)
    for line in LINES[:4]:
        ids = tokenizer.encode(line)
        assert ids.dtype == np.int32
        assert ids.min() >= len(ALL)
        assert ids.max() < len(tokenizer)
        assert tokenizer.decode(ids) == line
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == line
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe", "unigram"])
def test_json_gives_the_same_tokeniser_and_fingerprint(kind):
    tokenizer = _train(kind)
    again = from_json(tokenizer.to_json())
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert _train(kind, specials=(UNK,)).fingerprint != tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode("the log"), tokenizer.encode("the log"))


def test_characters_are_the_sorted_ones_of_the_training_text():
    tokenizer = train_tokenizer("char", ["bca"], specials=(UNK,))
    assert tokenizer.vocabulary == ("a", "b", "c")
    np.testing.assert_array_equal(tokenizer.encode("cab!z"), [3, 1, 2, 0, 0])
    assert tokenizer.decode([3, 0]) == "c\ufffd"


def test_words_by_frequency_then_spelling_and_line_ends():
    tokenizer = train_tokenizer("word", ["b b a c a b\nc"], specials=(UNK, EOS), vocabulary_size=2)
    assert tokenizer.vocabulary == ("b", "a")
    np.testing.assert_array_equal(tokenizer.encode("a b\n\nzz <unk>\n"), [3, 2, 1, 1, 0, 0, 1])
    assert tokenizer.decode([3, 2, 1, 0]) == "a b\n<unk>"
    without = train_tokenizer("word", ["b a"], specials=(UNK,))
    np.testing.assert_array_equal(without.encode("a\nb"), without.encode("a b"))


def test_unknown_text():
    assert "\ufffd" in _train("unigram").decode(_train("unigram").encode("cat Ж"))
    assert _train("bpe").decode(_train("bpe").encode("cat Ж")) == "cat Ж"
    assert _train("byte").decode(_train("byte").encode("Ж")) == "Ж"
    assert _train("byte").decode(_train("byte").encode("Ж")[:1]) == "\ufffd"  # half a character
    for kind in ("char", "word"):
        with pytest.raises(UserError, match="not in the vocabulary"):
            train_tokenizer(kind, ["a b"], specials=()).encode("a Ж")
    without = train_tokenizer("unigram", LINES, specials=(), vocabulary_size=60)
    assert without.decode(without.encode("cat")) == "cat"
    with pytest.raises(UserError, match="'Ж' is not in the vocabulary of this unigram tokeniser"):
        without.encode("cat Ж")


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe", "unigram"])
def test_text_that_spells_a_special_symbol_is_text(kind):
    text = f"{PAD} {BOS} {EOS}"
    ids = _train(kind, texts=[*LINES, text]).encode(text)
    assert not {ALL.index(symbol) for symbol in (PAD, BOS, EOS)} & set(ids.tolist())


def test_bad_requests():
    with pytest.raises(UserError, match="did you mean 'word'"):
        train_tokenizer("words", LINES)
    with pytest.raises(UserError, match="empty"):
        train_tokenizer("char", ["", " \n"])
    with pytest.raises(UserError, match="256 bytes"):
        train_tokenizer("bpe", LINES, vocabulary_size=100)
    with pytest.raises(UserError, match="at least 2"):
        train_tokenizer("unigram", LINES, vocabulary_size=1)
    with pytest.raises(UserError, match="no symbol <pad>"):
        _ = train_tokenizer("byte", [], specials=(UNK,)).pad_id
    for text in ("{", "[]", '{"format": 7}', _train("bpe").to_json().replace("merges", "m")):
        with pytest.raises(UserError, match="cannot be read as a tokeniser"):
            from_json(text)


def test_pieces_are_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(tmp_path))
    first = tokenizers.cached_tokenizer("unigram", LINES, specials=ALL, vocabulary_size=60)
    (path,) = (tmp_path / "tokenizers").iterdir()
    assert from_json(path.read_text()) == first
    monkeypatch.setattr(tokenizers, "train_tokenizer", None)  # not trained again
    assert tokenizers.cached_tokenizer("unigram", LINES, specials=ALL, vocabulary_size=60) == first
    path.write_text("{}")
    with pytest.raises(UserError, match=str(path)):
        tokenizers.cached_tokenizer("unigram", LINES, specials=ALL, vocabulary_size=60)
