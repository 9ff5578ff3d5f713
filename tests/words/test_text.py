import bz2
import codecs
import collections
import lzma
import tracemalloc

import numpy as np
import pytest

from jaxgen.types import UserError
from jaxgen.words import text
from jaxgen.words.phrases import find_phrases, join_phrases, phrase_score
from jaxgen.words.vocabulary import build_vocabulary

SMALL = "the cat sat\n\n  the dog   sat on\tthe mat \nend"
CHINESE = "我 今天 下午 打 篮球\n我 今天 上午 看 书\n"


def write(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def sentences(corpus):
    return [
        corpus.vocabulary.decode(corpus.tokens[a:b])
        for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
    ]


def test_words_are_ranked_by_count_then_code_point():
    vocabulary = build_vocabulary({"b": 2, "a": 2, "z": 9, "rare": 1}, min_count=2)
    assert vocabulary.words == ("z", "a", "b")
    assert vocabulary.counts.tolist() == [9, 2, 2]
    assert vocabulary.encode(["a", "rare", "z"]).tolist() == [1, -1, 0]
    assert vocabulary.decode([0, -1, 2]) == ["z", "?", "b"]


def test_the_unknown_word_counts_all_that_is_left_out():
    counts = {"a": 5, "b": 3, "c": 2, "d": 1, "<unk>": 2}
    vocabulary = build_vocabulary(counts, max_size=3, unknown="<unk>")
    assert vocabulary.words == ("<unk>", "a", "b")
    assert vocabulary.counts.tolist() == [5, 5, 3]
    assert vocabulary.encode(["c", "never", "b"]).tolist() == [0, 0, 2]


@pytest.mark.parametrize("chunk_bytes", [1, 5, 1 << 20])
def test_encoding_small_text(tmp_path, chunk_bytes):
    corpus = text.encode_file(write(tmp_path, SMALL), tmp_path / "corpus", chunk_bytes=chunk_bytes)
    assert sentences(corpus) == [["the", "cat", "sat"], ["the", "dog", "sat", "on", "the", "mat"], ["end"]]
    assert corpus.vocabulary.words[:2] == ("the", "sat")
    assert corpus.vocabulary.counts[:2].tolist() == [3, 2]
    assert (corpus.tokens.dtype, corpus.starts.dtype) == (np.int32, np.int64)
    assert isinstance(corpus.tokens, np.memmap)


def test_every_line_ends_with_the_end_word(tmp_path):
    for content in (SMALL, SMALL + "\n", SMALL + " "):
        path = write(tmp_path, content)
        corpus = text.encode_file(path, tmp_path / "corpus", end="<eos>")
        assert sentences(corpus) == [[*line.split(), "<eos>"] for line in SMALL.split("\n")]
        assert corpus.vocabulary.counts[corpus.vocabulary.index["<eos>"]] == 4
        assert corpus.vocabulary.counts.sum() == len(corpus.tokens)


def test_the_end_word_is_in_the_vocabulary_however_few_lines_there_are(tmp_path):
    path = write(tmp_path, "a b a b c\n")
    for unknown in (None, "<unk>"):
        corpus = text.encode_file(path, tmp_path / "corpus", end="<eos>", min_count=2, unknown=unknown)
        rest = [] if unknown is None else [unknown]
        assert sentences(corpus) == [["a", "b", "a", "b", *rest, "<eos>"]]
    small = build_vocabulary({"a": 3, "b": 2, "<eos>": 1}, max_size=2, end="<eos>")
    assert small.words == ("a", "<eos>")


def test_processes_that_encode_the_same_text_at_once_do_not_harm_each_other(tmp_path, monkeypatch):
    path = write(tmp_path, SMALL)
    counted = text.count_words

    def another_comes_between(*arguments, **settings):
        monkeypatch.setattr(text, "count_words", counted)
        others.append(text.encode_file(path, tmp_path / "corpus"))
        return counted(*arguments, **settings)

    others = []
    monkeypatch.setattr(text, "count_words", another_comes_between)
    corpus = text.encode_file(path, tmp_path / "corpus")
    assert sentences(corpus) == sentences(others[0]) == sentences(text.open_corpus(tmp_path / "corpus"))
    with pytest.raises(UserError, match="not UTF-8"):
        text.write_corpus(tmp_path / "corpus", _torn(), corpus.vocabulary, {"another": "text"})
    assert sentences(text.open_corpus(tmp_path / "corpus", verify=True)) == sentences(corpus)
    assert not list((tmp_path / "corpus").glob(".encoding-*"))


def _torn():
    yield np.zeros(2, np.int32), np.zeros(0, np.int64)
    raise UserError("the text is not UTF-8")


def test_text_without_sentences(tmp_path):
    corpus = text.encode_file(write(tmp_path, SMALL), tmp_path / "corpus", lines=False)
    assert sentences(corpus) == [SMALL.split()]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_chinese_with_and_without_a_byte_order_mark(tmp_path, chunk_bytes):
    for content in (CHINESE.encode(), codecs.BOM_UTF8 + CHINESE.encode()):
        corpus = text.encode_file(
            write(tmp_path, content), tmp_path / "corpus", chunk_bytes=chunk_bytes, min_count=1
        )
        assert sentences(corpus) == [line.split() for line in CHINESE.splitlines()]
    # The ideographic space separates words too.
    corpus = text.encode_file(write(tmp_path, CHINESE.replace(" ", "\u3000")), tmp_path / "wide")
    assert sentences(corpus) == [line.split() for line in CHINESE.splitlines()]


def test_words_left_out(tmp_path):
    path = write(tmp_path, "a b a x c\ny\nb a")
    left_out = text.encode_file(path, tmp_path / "1", min_count=2)
    assert sentences(left_out) == [["a", "b", "a"], ["b", "a"]]
    kept = text.encode_file(path, tmp_path / "2", min_count=2, drop_unknown=False)
    assert sentences(kept) == [["a", "b", "a", "?", "?"], ["?"], ["b", "a"]]
    unknown = text.encode_file(path, tmp_path / "3", min_count=2, unknown="<unk>")
    assert sentences(unknown) == [["a", "b", "a", "<unk>", "<unk>"], ["<unk>"], ["b", "a"]]
    test = text.encode_file(write(tmp_path, "b q", "test.txt"), tmp_path / "4", vocabulary=unknown.vocabulary)
    assert sentences(test) == [["b", "<unk>"]]
    assert test.vocabulary.words == unknown.vocabulary.words


def test_the_text_is_encoded_once_and_again_when_it_or_the_settings_change(tmp_path, monkeypatch):
    path = write(tmp_path, SMALL)
    first = text.encode_file(path, tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr(text, "count_words", None)  # it is not read again
        assert text.encode_file(path, tmp_path / "corpus").fingerprint == first.fingerprint
    assert text.encode_file(path, tmp_path / "corpus", lines=False).fingerprint != first.fingerprint
    write(tmp_path, SMALL + " more")
    changed = text.encode_file(path, tmp_path / "corpus")
    assert sentences(changed)[-1] == ["end", "more"]
    # The fingerprint is of the content: another folder has the same.
    assert text.encode_file(path, tmp_path / "other").fingerprint == changed.fingerprint
    reopened = text.open_corpus(tmp_path / "other", verify=True)
    assert sentences(reopened) == sentences(changed)


def test_a_damaged_corpus_is_refused(tmp_path):
    text.encode_file(write(tmp_path, SMALL), tmp_path / "corpus")
    tokens = tmp_path / "corpus" / "tokens.i32"
    good = tokens.read_bytes()
    tokens.write_bytes(good[:-1])
    with pytest.raises(UserError, match="wrong size"):
        text.open_corpus(tmp_path / "corpus")
    tokens.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(UserError, match="checksums"):
        text.open_corpus(tmp_path / "corpus", verify=True)
    (tmp_path / "corpus" / "vocabulary.txt").write_text("no count\n")
    with pytest.raises(UserError, match="damaged"):
        text.open_corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").write_text("{")
    with pytest.raises(UserError, match="encode the text again"):
        text.open_corpus(tmp_path / "corpus")
    # Encoding again mends it.
    corpus = text.encode_file(tmp_path / "text.txt", tmp_path / "corpus")
    assert text.open_corpus(tmp_path / "corpus", verify=True).fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no words"),
        (b" \n\t \n", "has no words"),
        (b"ok words\nand \xff\xfe bad", "not UTF-8 text: byte 13"),
        ("caf\u00e9 latin".encode("latin-1"), "not UTF-8"),
        (b"cut short \xe6\x88", "not UTF-8"),
        (b"a b\0c", "byte 3 is zero"),
        (b"x" * 3_000_000, "separate its words"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    for end in (None, "<eos>"):
        with pytest.raises(UserError, match=message):
            text.encode_file(write(tmp_path, content), tmp_path / "corpus", end=end)
    with pytest.raises(UserError, match="no encoded text"):
        text.open_corpus(tmp_path / "corpus")


def test_settings_that_leave_nothing_are_refused(tmp_path):
    path = write(tmp_path, SMALL)
    with pytest.raises(UserError, match="lower min_count"):
        text.encode_file(path, tmp_path / "corpus", min_count=4)
    with pytest.raises(UserError, match="lower min_count"):
        text.encode_file(path, tmp_path / "corpus", max_size=1, unknown="<unk>")
    with pytest.raises(UserError, match="there is no file"):
        text.encode_file(tmp_path / "missing.txt", tmp_path / "corpus")
    with pytest.raises(UserError, match="there is no file"):
        text.encode_file(tmp_path, tmp_path / "corpus")
    with pytest.raises(UserError, match="at least 1"):
        text.encode_file(path, tmp_path / "corpus", min_count=0)
    with pytest.raises(UserError, match="needs lines"):
        text.encode_file(path, tmp_path / "corpus", end="<eos>", lines=False)
    with pytest.raises(UserError, match="no word of the text"):
        text.encode_file(path, tmp_path / "corpus", vocabulary=build_vocabulary({"other": 1}))


def test_rare_words_are_forgotten_when_there_are_too_many(tmp_path):
    path = write(tmp_path, "\n".join(f"often word{i}" for i in range(1000)))
    counts = text.count_words(path, max_types=100, chunk_bytes=500)
    assert counts["often"] == 1000
    assert len(counts) <= 100
    assert text.count_words(path, chunk_bytes=500) == collections.Counter(path.read_text().split())


def test_memory_does_not_grow_with_the_text(tmp_path):
    rng = np.random.default_rng(0)
    peaks = []
    for lines in (2_000, 20_000):  # 0.1 and 1 MB
        words = rng.integers(0, 300, (lines, 10))
        path = write(tmp_path, "\n".join(" ".join(f"w{w}" for w in row) for row in words))
        tracemalloc.start()
        corpus = text.encode_file(path, tmp_path / f"{lines}", chunk_bytes=1 << 14)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(corpus.tokens) == 10 * lines
    # Ten times the text, 0.8 MB more of tokens; the peak may differ by noise alone.
    assert peaks[1] < 1.3 * peaks[0]


def test_phrase_score_by_hand():
    # (count(new york) - 5) / (count(new) count(york)).
    assert phrase_score(np.asarray([25]), np.asarray([100]), np.asarray([50]), 5)[0] == 20 / 5000


def brute_force_join(words, pairs):
    joined, i = [], 0
    while i < len(words):
        if tuple(words[i : i + 2]) in pairs:
            joined.append("_".join(words[i : i + 2]))
            i += 2
        else:
            joined.append(words[i])
            i += 1
    return joined


@pytest.mark.parametrize("chunk", [1, 2, 3, 10, 1000])
def test_joining_phrases_against_a_loop(tmp_path, chunk):
    rng = np.random.default_rng(0)
    lines = [[str(w) for w in rng.choice(list("aabcd"), rng.integers(1, 12))] for _ in range(50)]
    corpus = text.encode_file(write(tmp_path, "\n".join(map(" ".join, lines))), tmp_path / "plain")
    pairs = {("a", "a"), ("a", "b"), ("b", "a"), ("c", "d")}
    encoded = np.asarray([[corpus.vocabulary.index[w] for w in pair] for pair in sorted(pairs)])
    joined = join_phrases(corpus, encoded, tmp_path / "joined", chunk=chunk)
    expected = [brute_force_join(line, pairs) for line in lines]
    assert sentences(joined) == expected
    counted = collections.Counter(w for line in expected for w in line)
    assert dict(zip(joined.vocabulary.words, joined.vocabulary.counts.tolist(), strict=True)) == counted


@pytest.mark.parametrize("chunk", [3, 1000])
def test_the_planted_phrase_is_found(tmp_path, chunk):
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(300):
        words = [f"w{w}" for w in rng.integers(0, 30, 6)]
        if rng.random() < 0.3:
            words[2:2] = ["new", "york"]
        # "york new" and "x <eos>" meet often only across or at the ends of sentences.
        lines.append([*words, "<eos>"])
    corpus = text.encode_file(write(tmp_path, "\n".join(map(" ".join, lines))), tmp_path / "plain")
    pairs = find_phrases(corpus, discount=5, threshold=10, excluded=("<eos>",), chunk=chunk)
    assert [corpus.vocabulary.decode(pair) for pair in pairs] == [["new", "york"]]
    joined = join_phrases(corpus, pairs, tmp_path / "joined")
    assert "new_york" in joined.vocabulary.words
    assert "york" not in joined.vocabulary.words
    assert len(find_phrases(corpus, discount=5, threshold=1e9)) == 0
    untouched = join_phrases(corpus, np.zeros((0, 2), np.int64), tmp_path / "same", chunk=7)
    assert sentences(untouched) == sentences(corpus)


def test_rare_phrases_become_unknown_or_are_left_out(tmp_path):
    content = "a b\na c\na d\na d\na e e e"
    for unknown, rare in ((None, []), ("<unk>", ["<unk>"])):
        corpus = text.encode_file(write(tmp_path, content), tmp_path / "plain", unknown=unknown)
        pairs = np.asarray([[corpus.vocabulary.index["a"], corpus.vocabulary.index[w]] for w in "bd"])
        joined = join_phrases(corpus, pairs, tmp_path / "joined", min_count=2)
        expected = [rare, ["a", *rare], ["a_d"], ["a_d"], ["a", "e", "e", "e"]]
        assert sentences(joined) == [s for s in expected if s]


def test_the_penn_treebank_has_its_published_counts(real_data_dir, tmp_path):
    path = write(tmp_path, lzma.decompress((real_data_dir / "ptb" / "ptb.train.txt.xz").read_bytes()))
    corpus = text.encode_file(path, tmp_path / "corpus", end="<eos>")
    assert (len(corpus.tokens), len(corpus.starts) - 1, len(corpus.vocabulary)) == (929_589, 42_068, 10_000)
    assert corpus.vocabulary.words[:3] == ("the", "<unk>", "<eos>")


def test_phrases_of_wikipedia(real_data_dir, tmp_path):
    with bz2.open(real_data_dir / "wiki100m" / "enwiki_100m.txt.bz2") as file:
        path = write(tmp_path, file.read(4_000_000))
    corpus = text.encode_file(path, tmp_path / "corpus", min_count=5)
    pairs = find_phrases(corpus, threshold=200)
    names = {" ".join(corpus.vocabulary.decode(pair)) for pair in pairs}
    assert {"united states", "new york", "los angeles"} <= names
    assert "of the" not in names
