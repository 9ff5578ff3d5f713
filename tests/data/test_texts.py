"""Corpora and the user's files: splits, bad input, and the real files where they are there."""

import gzip
import hashlib
import lzma
import os

import pytest

from jaxgen.data import dates, texts
from jaxgen.data.texts import load_pairs, load_text
from jaxgen.data.tokenizers import EOS, UNK, train_tokenizer
from jaxgen.types import UserError

DATA = os.environ.get("JAXGEN_DATA_DIR", "")


def _needs(folder):
    there = bool(DATA) and os.path.isdir(os.path.join(DATA, folder))
    return pytest.mark.skipif(not there, reason=f"no {folder} in JAXGEN_DATA_DIR")


# ---- running text


def test_user_text_is_cut_by_characters(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(200))
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    parts = [load_text(f"text:{tmp_path}/t.txt", split).text for split in texts.SPLITS]
    assert [len(part) for part in parts] == [180, 10, 10]
    assert "".join(parts) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\xff\xfe", "not UTF-8 text: byte 3"),
        ("größe".encode("latin-1"), "convert the file to UTF-8"),
        ("text".encode("utf-16"), "byte"),
        (b"a", "validation split is empty"),
    ],
)
def test_bad_text_files(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(f"text:{tmp_path}/t.txt", "validation")


def test_names_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no file"):
        load_text(f"text:{tmp_path}/none.txt", "train")
    with pytest.raises(UserError, match="did you mean 'pydocs'"):
        load_text("pydoc", "train")
    with pytest.raises(UserError, match="did you mean 'train'"):
        load_text("pydocs", "trai")
    monkeypatch.delenv("JAXGEN_DATA_DIR", raising=False)
    with pytest.raises(UserError, match=r"'ptb' is missing.*JAXGEN_DATA_DIR is not set.*sha256 fcea"):
        load_text("ptb", "train")
    with pytest.raises(UserError, match="such as multi30k:de-en"):
        load_pairs("multi30k:de-xx", "train")
    with pytest.raises(UserError, match="such as tatoeba:fra-eng"):
        load_pairs("tatoeba:fra-cmn", "train")


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_a_corpus_file_plain_or_compressed_and_damaged(tmp_path, monkeypatch, ending):
    content = b"some words\n"
    corpus = texts.Corpus("c", "somewhere", {"a.txt": hashlib.sha256(content).hexdigest()})
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / f"a.txt{ending}"
    path.write_bytes(pack(content))
    assert texts.read_corpus_file(corpus, "a.txt", str(tmp_path)) == content.decode()
    for damaged in (pack(b"other words\n"), pack(content)[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged.*get it again from somewhere"):
            texts.read_corpus_file(corpus, "a.txt", str(tmp_path))


def test_python_documentation_is_there():
    text = load_text("pydocs", "train")
    assert len(text.text) > 300_000
    assert (
        text.fingerprint
        == load_text("pydocs", "train").fingerprint
        != load_text("pydocs", "test").fingerprint
    )


@_needs("ptb")
def test_penn_treebank_has_its_published_counts():
    counts = {"train": 929_589, "validation": 73_760, "test": 82_430}
    splits = {split: load_text("ptb", split).text for split in counts}
    tokenizer = train_tokenizer("word", [splits["train"]], specials=(UNK, EOS))
    assert len(tokenizer) == 10_000
    assert {split: len(tokenizer.encode(text)) for split, text in splits.items()} == counts


@_needs("wikitext2")
def test_wikitext2_has_its_published_counts():
    train = load_text("wikitext2", "train").text
    tokenizer = train_tokenizer("word", [train], specials=(UNK, EOS))
    assert (len(tokenizer), len(tokenizer.encode(train))) == (33_278, 2_088_628)


# ---- pairs


def _write_lines(tmp_path, source, target):
    (tmp_path / "a").write_text(source)
    (tmp_path / "b").write_text(target)
    return f"lines:{tmp_path}/a,{tmp_path}/b"


def test_line_parallel_files_are_split_by_the_source_and_stay_parallel(tmp_path):
    source = [f"satz {i}" for i in range(400)]
    name = _write_lines(tmp_path, "\n".join(source), "\r\n".join(f"line {i}" for i in range(400)) + "\n")
    seen = {}
    for split in texts.SPLITS:
        pairs = load_pairs(name, split)
        assert all(s.split()[1] == t.split()[1] for s, t in zip(pairs.source, pairs.target, strict=True))
        seen[split] = set(pairs.source)
    assert set().union(*seen.values()) == set(source)
    assert sum(map(len, seen.values())) == 400
    # Binomial(400, 1/20): mean 20, standard deviation 4.4; a hash decides, so this holds for ever.
    assert 7 < len(seen["test"]) < 33


def test_empty_sides_are_left_out(tmp_path, capsys):
    source = "".join(f"s {i}\n" if i % 2 else "\n" for i in range(200))
    target = "".join(f"t {i}\n" if i % 3 else "  \n" for i in range(200))
    pairs = load_pairs(_write_lines(tmp_path, source, target), "train")
    assert "pairs with an empty side are left out." in capsys.readouterr().err
    numbers = {int(s.split()[1]) for s in pairs.source}
    assert numbers == {i for i in range(200) if i % 2 and i % 3 and texts.split_of(f"s {i}") == "train"}


def test_bad_pairs(tmp_path):
    with pytest.raises(UserError, match=r"has 2 lines but .* has 1"):
        load_pairs(_write_lines(tmp_path, "a\nb\n", "c\n"), "train")
    with pytest.raises(UserError, match="has no pair"):
        load_pairs(_write_lines(tmp_path, "a\n\n", "\nb\n"), "train")
    (tmp_path / "a").write_bytes(b"\xe4hnlich\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_pairs(f"lines:{tmp_path}/a,{tmp_path}/b", "train")
    (tmp_path / "t.tsv").write_text("a\tb\n\nno tab\n")
    with pytest.raises(UserError, match="line 3, has no tab"):
        load_pairs(f"tsv:{tmp_path}/t.tsv", "train")
    with pytest.raises(UserError, match="unknown pairs"):
        load_pairs("lines:only_one", "train")


def test_tsv_ignores_further_columns_and_keeps_unicode_separators_inside(tmp_path):
    (tmp_path / "t.tsv").write_text("".join(f"a {i}\u2028x\tb {i}\tlicence\n" for i in range(40)))
    pairs = load_pairs(f"tsv:{tmp_path}/t.tsv", "train")
    assert all("\u2028" in s for s in pairs.source)
    assert all("licence" not in t for t in pairs.target)


@_needs("multi30k")
def test_multi30k_has_its_published_counts():
    pairs = {split: load_pairs("multi30k:de-en", split) for split in texts.SPLITS}
    assert [len(p) for p in pairs.values()] == [29_000, 1_014, 1_000]
    reverse = load_pairs("multi30k:en-de", "test")
    assert (reverse.source, reverse.target) == (pairs["test"].target, pairs["test"].source)


def test_no_source_of_tatoeba_is_tested_that_was_learned(monkeypatch):
    english = [f"line {i}" for i in range(200)]
    phrases = [f"phrase {i - i % 3 % 2}" for i in range(200)]  # of two sentences, of one, and so on
    rows = "".join(f"{line}\t{phrase}\n" for line, phrase in zip(english, phrases, strict=True))
    monkeypatch.setattr(texts, "read_corpus_file", lambda *_: rows)
    learned = set(load_pairs("tatoeba:fra-eng", "train").source)
    for split in ("validation", "test"):
        of_split = [i for i, line in enumerate(english) if texts.split_of(line) == split]
        kept = [english[i] for i in of_split if phrases[i] not in learned]
        assert 0 < len(kept) < len(of_split)
        assert list(load_pairs("tatoeba:fra-eng", split).target) == kept
        assert list(load_pairs("tatoeba:eng-fra", split).source) == [english[i] for i in of_split]


@pytest.mark.slow
@_needs("tatoeba")
def test_tatoeba_keeps_an_english_sentence_in_one_split():
    train, test = (load_pairs("tatoeba:fra-eng", split) for split in ("train", "test"))
    assert not set(train.target) & set(test.target)
    assert not set(train.source) & set(test.source)
    assert len(train) + len(test) + len(load_pairs("tatoeba:fra-eng", "validation")) == 165_578
    assert sum(len(load_pairs("tatoeba:eng-fra", split)) for split in texts.SPLITS) == 167_130


# ---- dates


def test_dates_are_right_disjoint_and_reproducible():
    train, test = (dates.date_pairs(split, 300, seed=1) for split in ("train", "test"))
    assert not set(train.target) & set(test.target)
    assert train.fingerprint == dates.date_pairs("train", 300, seed=1).fingerprint
    assert train.fingerprint != dates.date_pairs("train", 300, seed=2).fingerprint
    day = dates.datetime.date(2005, 4, 3)
    assert dates.write_date(day, "es", "full") == "domingo, 3 de abril de 2005"
    assert dates.write_date(day, "ja", "long") == "2005年4月3日"


def test_no_text_stands_for_two_dates():
    """Every eleventh day of the century, which meets all weekdays, days and months, in all locales."""
    seen = {}
    for number in range(0, 36525, 11):
        day = dates.FIRST + dates.datetime.timedelta(days=number)
        for locale in dates.LOCALES:
            for form in dates.FORMATS:
                assert seen.setdefault(dates.write_date(day, locale, form), day) == day
