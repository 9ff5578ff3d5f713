"""Word vectors as files: the text and binary formats of the word2vec program, and safetensors.

Both word2vec formats begin with a line "V D"; then each word, a space and its D numbers: in decimal,
separated by spaces, up to a line's end; or as 4 D bytes, little-endian float32, with or without a line's end.
The files are UTF-8. A file is mapped, not loaded, and memory is taken only for vectors that the file is large
enough to hold, whatever its first line says. Words have no white space in them (other than, as in files of
other programs, the Unicode kinds, such as a no-break space) and occur once; all numbers are finite.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import safetensors
from numpy.typing import ArrayLike

from jaxgen.interop.safetensors import read_tensors, write_tensors
from jaxgen.types import UserError

# Longer than any word: fastText and word2vec cut theirs at 1000 and 100 bytes.
_LONGEST_WORD = 1 << 16
_LONGEST_NUMBER = 64
_NOT_IN_WORDS = frozenset(" \t\n\r\v\f\0")

Style: TypeAlias = Literal["gensim", "c"]


class WordVectors(NamedTuple):
    """`words`, V different strings, and `vectors` float32 [V, D], one each."""

    words: tuple[str, ...]
    vectors: np.ndarray


def read_word2vec(
    path: str | os.PathLike[str], *, binary: bool | None = None, limit: int | None = None
) -> WordVectors:
    """The vectors of a word2vec file, of gensim, of the C program, or of fastText (.vec).

    binary: None means binary if the name ends in .bin. limit: read only the first so many words.

    Raises:
        UserError: where there is no such file, or anything in it is not as this module's page says.
    """
    path = Path(os.path.expanduser(path))
    binary = path.suffix == ".bin" if binary is None else binary
    if limit is not None and limit < 1:
        raise UserError(f"at least 1 word must be read, not {limit}.")
    if not path.is_file():
        raise UserError(f"there is no file {path}: give the path of word vectors.")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is empty: get the file again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, binary, limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def write_word2vec(
    path: str | os.PathLike[str],
    words: Sequence[str],
    vectors: ArrayLike,
    *,
    binary: bool | None = None,
    style: Style = "gensim",
) -> None:
    """Write vectors [V, D] to a word2vec file, the same bytes as gensim or the C program for float32.

    binary: None means binary if the name ends in .bin.
    style: "gensim" writes the shortest decimals that give the same float32 back, and nothing after a binary
        vector; "c" writes six decimals, and a line's end after each.

    Raises:
        UserError: where a word cannot be written, occurs twice, or a number is not finite.
    """
    path = Path(os.path.expanduser(path))
    binary = path.suffix == ".bin" if binary is None else binary
    if style not in ("gensim", "c"):
        raise UserError(f"word vectors are written in the style 'gensim' or 'c', not {style!r}.")
    table = _checked(path, words, vectors)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(b"%d %d\n" % table.shape)
            for word, row in zip(words, table, strict=True):
                if binary:
                    file.write(word.encode() + b" " + row.astype("<f4").tobytes())
                    file.write(b"\n" if style == "c" else b"")
                elif style == "c":
                    file.write((word + " " + "".join(f"{number:f} " for number in row) + "\n").encode())
                else:
                    file.write((word + " " + " ".join(map(str, row)) + "\n").encode())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): choose another place.") from error


def read_word_safetensors(path: str | os.PathLike[str]) -> WordVectors:
    """The vectors that `write_word_safetensors` wrote.

    Raises:
        UserError: where there is no such file, or it is damaged or holds something else.
    """
    tensors = read_tensors(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            words = json.loads(file.metadata()["words"])
        vectors = tensors["vectors"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError("words are a list of strings")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no word vectors: write it with write_word_safetensors.") from error
    return WordVectors(tuple(words), _checked(path, words, vectors))


def write_word_safetensors(path: str | os.PathLike[str], words: Sequence[str], vectors: ArrayLike) -> None:
    """Write vectors [V, D] as the tensor "vectors" float32 and the words as JSON in the file's metadata.

    Raises:
        UserError: as `write_word2vec`.
    """
    table = _checked(path, words, vectors)
    write_tensors(path, {"vectors": table}, {"words": json.dumps(list(words), ensure_ascii=False)})


def _checked(path: str | os.PathLike[str], words: Sequence[str], vectors: ArrayLike) -> np.ndarray:
    """The vectors as float32 [V, D], if they and the words may stand in a file."""
    try:
        with np.errstate(over="ignore"):
            table = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"the vectors of {path} are not numbers.") from error
    if table.ndim != 2 or len(table) != len(words) or not table.size:
        raise UserError(f"{len(words)} words need vectors [words, dimensions], not {table.shape}, in {path}.")
    if not np.all(np.isfinite(table)):
        word = words[int(np.argmin(np.isfinite(table).all(axis=1)))]
        raise UserError(f"the vector of {word!r} in {path} is not finite: train the vectors again.")
    seen: set[str] = set()
    for word in words:
        if not word or not _NOT_IN_WORDS.isdisjoint(word) or _not_unicode(word):
            raise UserError(
                f"the word {word!r} cannot stand in {path}: words have at least one character, none of them "
                "white space."
            )
        if word in seen:
            raise UserError(f"the word {word!r} occurs twice in {path}: give each word one vector.")
        seen.add(word)
    return table


def _not_unicode(word: str) -> bool:
    try:
        return len(word.encode()) > _LONGEST_WORD
    except UnicodeEncodeError:
        return True


def _parse(path: Path, data: mmap.mmap, binary: bool, limit: int | None) -> WordVectors:
    kind = "binary" if binary else "text"
    damaged = f"{path} is not a whole word2vec {kind} file"
    size, end = len(data), data.find(b"\n", 0, 64)
    header = data[: max(end, 0)].split()
    if len(header) != 2 or not all(number.isdigit() and int(number) > 0 for number in header):
        raise UserError(f"{damaged}: its first line is not the number of words and of dimensions.")
    num_words, dim = map(int, header)
    # The least that a row takes: a letter, a space and the vector; or a letter and for each number a space
    # and a digit, with a line's end but after the last.
    least = num_words * (2 + 4 * dim) if binary else num_words * (2 + 2 * dim) - 1
    if least > size - end - 1:
        raise UserError(
            f"{damaged}: {num_words} words of {dim} numbers need at least {least} bytes more than its first "
            f"line and it has {size - end - 1}; get the file again."
        )
    count = num_words if limit is None else min(num_words, limit)
    vectors, words = np.empty((count, dim), np.float32), []
    place = end + 1
    for number in range(count):
        row = f"{damaged}: word {number + 1} of {num_words}"
        if binary:
            while data[place : place + 1] == b"\n":
                place += 1
            space = data.find(b" ", place, place + _LONGEST_WORD + 1)
            after = space + 1 + 4 * dim
            if space < 0 or after > size:
                raise UserError(f"{row} is cut short; get the file again.")
            word = data[place:space]
            vectors[number] = np.frombuffer(data[space + 1 : after], "<f4")
        else:
            furthest = min(size, place + _LONGEST_WORD + (1 + _LONGEST_NUMBER) * dim)
            after = data.find(b"\n", place, furthest)
            after = furthest if after < 0 else after
            word, *fields = data[place:after].rstrip(b" \r").split(b" ")
            if len(fields) != dim:
                raise UserError(f"{row} has {len(fields)} numbers, not {dim}: words may have no spaces.")
            vectors[number] = _numbers(fields, row)
            after += 1
        try:
            words.append(word.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{row} is not UTF-8: convert the file to UTF-8.") from error
        place = after
    if count == num_words and data[place : place + 64].strip(b" \r\n"):
        raise UserError(f"{damaged}: more follows after its {num_words} words; get the file again.")
    return WordVectors(tuple(words), _checked(path, words, vectors))


def _numbers(fields: Sequence[bytes], row: str) -> np.ndarray:
    try:
        if any(b"_" in field for field in fields):  # Python takes 1_0 for 10
            raise ValueError
        with np.errstate(over="ignore"):
            return np.asarray([float(field) for field in fields], np.float64).astype(np.float32)
    except ValueError as error:
        raise UserError(f"{row} has something else than numbers behind it.") from error
