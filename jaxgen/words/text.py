"""Plain text files of any size, encoded once to a memory-mapped file of word numbers.

A text file is UTF-8, its words separated by white space (Chinese must be segmented so beforehand); a line is
a sentence unless the caller says otherwise. It is read twice, a few megabytes at a time: to count its words,
and to encode them. What is kept in memory is the vocabulary, never the text.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.types import UserError
from jaxgen.words.vocabulary import Index, Vocabulary, build_vocabulary

_FORMAT = 1
_SPACES = (b" ", b"\n", b"\t", b"\r")
_LONGEST_WORD = 1 << 20  # bytes without a space that say that a file is not made of words
_LINE_END = "\0"  # stands for a line's end among the words; NUL is in no text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Encoded text on disk: `tokens` int32 [N], `starts` int64 [S + 1] of `jaxgen.words.sentences`.

    fingerprint: sha256 (64 hex digits) of the tokens, the starts and the vocabulary.
    """

    tokens: np.ndarray
    starts: np.ndarray
    vocabulary: Vocabulary
    fingerprint: str


def count_words(
    path: str | os.PathLike[str],
    *,
    end: str | None = None,
    max_types: int = 10_000_000,
    chunk_bytes: int = 1 << 22,
) -> collections.Counter[str]:
    """{word: how often it occurs} of a text file.

    end: a word to count once a line. max_types: when there are more different words the rarest are forgotten,
    first those seen once, the next time those seen up to twice, and so on (as the C program of word2vec
    does), so that memory is bounded; then the counts of rare words are too low.
    """
    if max_types < 1 or chunk_bytes < 1:
        raise UserError("a text needs at least one different word and is read at least one byte at a time.")
    counts: collections.Counter[str] = collections.Counter()
    forgotten = 0
    for piece in _pieces(path, chunk_bytes):
        counts.update(piece.split())
        if end is not None:
            counts[end] += piece.count("\n")
        while len(counts) > max_types:
            forgotten += 1
            counts = collections.Counter({w: n for w, n in counts.items() if n > forgotten or w == end})
    return counts


def encode_file(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    min_count: int = 1,
    max_size: int | None = None,
    unknown: str | None = None,
    end: str | None = None,
    lines: bool = True,
    drop_unknown: bool = True,
    vocabulary: Vocabulary | None = None,
    max_types: int = 10_000_000,
    chunk_bytes: int = 1 << 22,
) -> Corpus:
    """The corpus of a text file, kept in `directory` and only opened where it is there already.

    The vocabulary is that of `build_vocabulary(count_words(...))` with these settings, or the `vocabulary`
    given, as for a test text. Words outside it are its word `unknown`, if it has one; else they are left out,
    so that their neighbours become each other's, as word2vec does, or kept as -1 where not `drop_unknown`.
    lines: whether a line is a sentence (empty ones are left out); otherwise the text is one.
    end: a word, such as "<eos>", that is put at the end of every line, empty lines too.

    A corpus is found again by the file's path, size and time of change, and the settings. Raises UserError
    where the file is missing, empty or not UTF-8, or no word is left.
    """
    path, directory = Path(os.path.expanduser(path)), Path(os.path.expanduser(directory))
    if end is not None and not lines:
        raise UserError("an end-of-sentence word needs lines that are sentences.")
    settings = {"min_count": min_count, "max_size": max_size, "unknown": unknown, "max_types": max_types}
    request: dict[str, Any] = {
        "source": {"path": str(path.absolute()), **_size_and_time(path)},
        "end": end,
        "lines": lines,
        "drop_unknown": drop_unknown,
        "vocabulary": settings if vocabulary is None else _vocabulary_digest(vocabulary),
    }
    if _made_of(directory) == request:
        return open_corpus(directory)
    if vocabulary is None:
        counts = count_words(path, end=end, max_types=max_types, chunk_bytes=chunk_bytes)
        if not any(word != end for word in counts):
            raise UserError(f"{path} has no words; give a text file.")
        vocabulary = build_vocabulary(
            counts, min_count=min_count, max_size=max_size, unknown=unknown, end=end
        )
    blocks = _encoded(path, vocabulary, lines, end, drop_unknown, chunk_bytes)
    return write_corpus(directory, blocks, vocabulary, request)


def _pieces(path: str | os.PathLike[str], chunk_bytes: int) -> Iterator[str]:
    """The text in pieces that end at white space, the last one with a line's end."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    done, carry, last = 0, b"", b""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                done = len(codecs.BOM_UTF8)
            file.seek(done)
            while block := file.read(chunk_bytes):
                carry, last = carry + block, block[-1:]
                cut = 1 + max(carry.rfind(space) for space in _SPACES)
                if cut:
                    yield _decoded(carry[:cut], path, done)
                    done, carry = done + cut, carry[cut:]
                if len(carry) > _LONGEST_WORD:
                    raise UserError(
                        f"{path} has no space within {len(carry)} bytes from byte {done} on; separate its "
                        "words by spaces."
                    )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if last not in (b"", b"\n"):  # the last line has no end of its own
        yield _decoded(carry + b"\n", path, done)


def _decoded(piece: bytes, path: Path, offset: int) -> str:
    if b"\0" in piece:
        raise UserError(f"{path} is not a text file: byte {offset + piece.index(0)} is zero.")
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {offset + error.start} does not fit; convert the file to UTF-8."
        ) from error


def _encoded(
    path: Path, vocabulary: Vocabulary, lines: bool, end: str | None, drop_unknown: bool, chunk_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of the text for `write_corpus`."""
    line_end = len(vocabulary)
    index = Index({**vocabulary.index, _LINE_END: line_end}, vocabulary.index.absent)
    for piece in _pieces(path, chunk_bytes):
        words = (piece.replace("\n", f" {_LINE_END} ") if lines else piece).split()
        tokens = np.fromiter(map(index.__getitem__, words), np.int32, len(words))
        ends = tokens == line_end
        if end is not None:
            tokens[ends] = vocabulary.index[end]
            kept = np.ones(len(tokens), bool)
        else:
            kept = ~ends
        if drop_unknown:
            kept &= tokens >= 0
        # The number of tokens kept up to and with each line's end.
        yield tokens[kept], np.cumsum(kept)[ends]


def write_corpus(
    directory: str | os.PathLike[str],
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    vocabulary: Vocabulary,
    request: dict[str, Any],
) -> Corpus:
    """Writes a corpus from blocks of (tokens int32 [n], places in 0 ... n where a sentence ends).

    The last sentence ends with the text; sentences without tokens are left out. request: what the corpus was
    made of, as JSON. All files are written aside and moved, the description last, so that a corpus half
    written is none, and processes that encode the same text at once do not harm each other.
    """
    directory = Path(os.path.expanduser(directory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".encoding-") as folder:
            part = Path(folder)
            num_tokens, num_starts, token_digest, start_digest = _write_streams(part, blocks)
            if not num_tokens:
                raise UserError("no word of the text is in the vocabulary; choose another one.")
            lines = [
                f"{word} {count}\n" for word, count in zip(vocabulary.words, vocabulary.counts, strict=True)
            ]
            (part / "vocabulary.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
            digests = (token_digest, start_digest, _vocabulary_digest(vocabulary))
            description = {
                "format": _FORMAT,
                "num_tokens": num_tokens,
                "num_starts": num_starts,
                "unknown": vocabulary.unknown,
                "digests": digests,
                "request": request,
            }
            text = json.dumps(description, ensure_ascii=False, indent=1)
            (part / "corpus.json").write_text(text, encoding="utf-8")
            if _made_of(directory) != request:
                (directory / "corpus.json").unlink(missing_ok=True)
            # Whoever has the old ones mapped keeps them: written over, they would end that process by SIGBUS.
            for name in ("tokens.i32", "starts.i64", "vocabulary.txt", "corpus.json"):
                (part / name).replace(directory / name)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    return open_corpus(directory)


def _write_streams(
    directory: Path, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[int, int, str, str]:
    """Writes tokens.i32 and starts.i64; returns how many there are of each, and their sha256."""
    num_tokens, num_starts, last = 0, 1, 0
    token_digest, start_digest = hashlib.sha256(), hashlib.sha256()
    with (directory / "tokens.i32").open("wb") as tokens, (directory / "starts.i64").open("wb") as starts:

        def append(ends: np.ndarray) -> None:
            nonlocal num_starts, last
            ends = np.unique(ends)
            ends = ends[ends > last]
            if len(ends):
                num_starts, last = num_starts + len(ends), int(ends[-1])
            data = ends.astype("<i8").tobytes()
            start_digest.update(data)
            starts.write(data)

        first = np.zeros(1, "<i8").tobytes()
        start_digest.update(first)
        starts.write(first)
        for block, ends in blocks:
            data = block.astype("<i4").tobytes()
            token_digest.update(data)
            tokens.write(data)
            append(num_tokens + np.asarray(ends, np.int64))
            num_tokens += len(block)
        append(np.asarray([num_tokens], np.int64))
    return num_tokens, num_starts, token_digest.hexdigest(), start_digest.hexdigest()


def open_corpus(directory: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """The corpus in `directory`. Raises UserError where it is missing or damaged.

    verify: whether to read all of it and compare its checksums; otherwise only the sizes are compared.
    """
    directory = Path(os.path.expanduser(directory))
    description = _read_description(directory)
    again = f"{directory} is damaged: delete it and encode the text again"
    try:
        words, counts = [], []
        for line in (directory / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]:
            word, count = line.rsplit(" ", 1)
            words.append(word)
            counts.append(int(count))
        vocabulary = Vocabulary(tuple(words), np.asarray(counts, np.int64), description["unknown"])
        arrays = []
        for name, dtype, size in (
            ("tokens.i32", "<i4", description["num_tokens"]),
            ("starts.i64", "<i8", description["num_starts"]),
        ):
            if (directory / name).stat().st_size != size * np.dtype(dtype).itemsize:
                raise UserError(f"{again} ({name} has the wrong size).")
            arrays.append(np.memmap(directory / name, dtype, mode="r"))
        digests = description["digests"]
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{again} ({error}).") from error
    if verify:
        found = [hashlib.sha256(array.data).hexdigest() for array in arrays]
        if [*found, _vocabulary_digest(vocabulary)] != digests:
            raise UserError(f"{again} (its checksums do not fit).")
    return Corpus(arrays[0], arrays[1], vocabulary, fingerprint)


def _made_of(directory: Path) -> dict[str, Any] | None:
    """The request of the corpus in `directory`; None where there is none."""
    try:
        return _read_description(directory)["request"]
    except UserError:
        return None


def _read_description(directory: Path) -> dict[str, Any]:
    file = directory / "corpus.json"
    if not file.is_file():
        raise UserError(f"there is no encoded text in {directory}; encode a text file first.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != _FORMAT or "request" not in description:
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): encode the text again.") from error
    return description


def _size_and_time(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _vocabulary_digest(vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256(f"{vocabulary.unknown}\n".encode())
    digest.update("\n".join(vocabulary.words).encode())
    digest.update(vocabulary.counts.astype("<i8").tobytes())
    return digest.hexdigest()
