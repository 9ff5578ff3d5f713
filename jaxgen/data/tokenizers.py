"""Text to token ids and back: bytes, characters, words, byte-level BPE and unigram pieces.

A tokeniser is trained on the training split alone. Ids 0 ... S - 1 are its special symbols, in the order they
were asked for; the vocabulary follows. A special symbol is never made from text that merely spells it, but
for `<unk>`, which corpora such as the Penn Treebank print.

What an unknown character or word becomes:
  byte     nothing is unknown
  char     `<unk>`, which decodes to U+FFFD, the replacement character
  word     `<unk>`, which decodes to "<unk>"
  bpe      nothing is unknown: pieces are made of bytes (Sennrich et al. 2016; GPT-2's byte level)
  unigram  `<unk>`, which decodes to U+FFFD (Kudo 2018)
A tokeniser with no `<unk>` among its symbols refuses unknown text with a UserError.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxgen.data import cache
from jaxgen.types import UserError, unknown

Kind = Literal["byte", "char", "word", "bpe", "unigram"]
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_SYMBOLS = (PAD, BOS, EOS, UNK)
_LINE_END = "\0"  # stands for a line's end among the words; NUL is in no text
_SUBWORDS = ("bpe", "unigram")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained tokeniser.

    specials: the special symbols, ids from 0
    vocabulary: what stands for the ids after them: characters, words or pieces; empty for bytes
    model: for bpe and unigram, the JSON of the library `tokenizers`; else ""
    """

    kind: Kind
    specials: tuple[str, ...]
    vocabulary: tuple[str, ...]
    model: str = ""

    def __len__(self) -> int:
        """The number of ids."""
        return len(self.specials) + (256 if self.kind == "byte" else len(self.vocabulary))

    @property
    def pad_id(self) -> int:
        return self._special(PAD)

    @property
    def bos_id(self) -> int:
        return self._special(BOS)

    @property
    def eos_id(self) -> int:
        return self._special(EOS)

    @property
    def unk_id(self) -> int:
        return self._special(UNK)

    def _special(self, symbol: str) -> int:
        try:
            return self.specials.index(symbol)
        except ValueError:
            raise UserError(f"This {self.kind} tokeniser has no symbol {symbol}.") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of its JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # ---- text to ids and back

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [N], N >= 0.

        word: words are what white space separates, and a line's end is `<eos>` where that is a symbol of the
        tokeniser, else only a space. Raises UserError for unknown text where there is no `<unk>`.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; faster than one by one where pieces are made by the library."""
        offset = len(self.specials)
        if self.kind == "byte":
            return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + offset for t in texts]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if self.kind == "word":
            end = f" {_LINE_END} " if EOS in self.specials else " "
            return [self._encode_words(text.replace("\n", end).split()) for text in texts]
        encodings = self._library.encode_batch(list(texts), add_special_tokens=False)
        if self.kind == "bpe":
            return [np.asarray(e.ids, np.int32) + offset for e in encodings]
        # The library's id 0 is its own <unk>.
        places = [np.asarray(e.ids, np.int32) - 1 for e in encodings]
        for text, found, encoding in zip(texts, places, encodings, strict=True):
            if UNK not in self.specials and (found < 0).any():
                start, end = encoding.offsets[int(np.argmax(found < 0))]
                raise self._unknown(text[start:end])
        return [self._with_unknown(found) for found in places]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. `<pad>`, `<bos>` and, but for words, `<eos>` are left out; a word's `<eos>` ends a
        line. Bytes that are no UTF-8, as a model may write, become U+FFFD."""
        offset = len(self.specials)
        ids = [int(i) for i in ids]
        if self.kind == "word":
            words = [self.specials[i] if i < offset else self.vocabulary[i - offset] for i in ids]
            lines = " ".join(word for word in words if word not in (PAD, BOS)).split(EOS)
            return "\n".join(line.strip() for line in lines)
        unk = self.specials.index(UNK) if UNK in self.specials else -1
        kept = [i for i in ids if i >= offset or i == unk]
        if self.kind == "byte":
            return bytes(i - offset for i in kept if i >= offset).decode("utf-8", "replace")
        if self.kind == "char":
            return "".join("\ufffd" if i == unk else self.vocabulary[i - offset] for i in kept)
        if self.kind == "bpe":
            return self._library.decode([i - offset for i in kept if i >= offset])
        pieces = ["\ufffd" if i == unk else self.vocabulary[i - offset] for i in kept]
        return "".join(pieces).replace("▁", " ").removeprefix(" ")

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        index = {piece: i for i, piece in enumerate(self.vocabulary, len(self.specials))}
        found = {UNK: UNK, _LINE_END: EOS}
        return {**index, **{w: self.specials.index(s) for w, s in found.items() if s in self.specials}}

    def _encode_words(self, words: list[str]) -> np.ndarray:
        index = self._index
        ids = np.fromiter((index.get(word, -1) for word in words), np.int32, len(words))
        if UNK in self.specials:
            ids[ids < 0] = self.unk_id
        elif (ids < 0).any():
            raise self._unknown(words[int(np.argmax(ids < 0))])
        return ids

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return np.asarray([ord(c) for c in self.vocabulary], np.uint32)  # sorted when trained

    def _encode_characters(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        table = self._code_points
        places = np.minimum(np.searchsorted(table, points), len(table) - 1)
        found = np.where(table[places] == points, places, -1).astype(np.int32)
        if UNK not in self.specials and (found < 0).any():
            raise self._unknown(text[int(np.argmax(found < 0))])
        return self._with_unknown(found)

    def _with_unknown(self, places: np.ndarray) -> np.ndarray:
        """Places in the vocabulary, -1 for unknown -> ids."""
        unk = self.specials.index(UNK) if UNK in self.specials else -1
        return np.where(places < 0, unk, places + len(self.specials)).astype(np.int32)

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"{what!r} is not in the vocabulary of this {self.kind} tokeniser, and it has no {UNK} symbol: "
            "train it on text that has it."
        )

    @functools.cached_property
    def _library(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.model)

    # ---- JSON

    def to_json(self) -> str:
        """All of it as JSON, the same bytes for the same tokeniser."""
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, ensure_ascii=False, sort_keys=True)


def from_json(text: str, origin: str = "the tokeniser") -> Tokenizer:
    """The tokeniser that `to_json` wrote. Raises UserError, naming `origin`, where it is something else."""
    try:
        fields = json.loads(text)
        if fields.pop("format") != _FORMAT or fields["kind"] not in get_args(Kind):
            raise ValueError("another format")
        for name in ("specials", "vocabulary"):
            fields[name] = tuple(fields[name])
        tokenizer = Tokenizer(**fields)
        if tokenizer.kind in _SUBWORDS:
            _ = tokenizer._library
        return tokenizer
    except Exception as error:  # json's, the library's and our own: the remedy is the same
        raise UserError(f"{origin} cannot be read as a tokeniser: {error}") from error


def train_tokenizer(
    kind: Kind, texts: Sequence[str], *, specials: tuple[str, ...] = (UNK,), vocabulary_size: int = 0
) -> Tokenizer:
    """A tokeniser of the training texts.

    texts: a long text as one entry, or lines
    vocabulary_size: word: at most this many words, the most frequent (ties by spelling); bpe and unigram: at
        most this many pieces, special symbols apart; 0: all words. Bytes and characters are all taken.
    Raises UserError where the texts are empty or no tokeniser of this size can be made of them.
    """
    if kind not in get_args(Kind):
        raise unknown("data.tokenizer", kind, get_args(Kind))
    if any(symbol not in _SYMBOLS for symbol in specials) or len(set(specials)) != len(specials):
        raise ValueError(f"special symbols are some of {_SYMBOLS}, each once, not {specials}")
    if kind == "byte":
        return Tokenizer(kind, specials, ())
    if not any(text.strip() for text in texts):
        raise UserError("The training text is empty: there is nothing to train a tokeniser on.")
    if kind == "char":
        return Tokenizer(kind, specials, tuple(sorted(set().union(*texts))))
    if kind == "word":
        counts = collections.Counter(word for text in texts for word in text.split())
        for symbol in specials:
            counts.pop(symbol, None)
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return Tokenizer(kind, specials, tuple(words[: vocabulary_size or None]))
    return _train_pieces(kind, texts, specials, vocabulary_size)


def _train_pieces(
    kind: Kind, texts: Sequence[str], specials: tuple[str, ...], vocabulary_size: int
) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "bpe" and vocabulary_size < 257:
        raise UserError(
            f"data.vocabulary_size is {vocabulary_size}, but bpe needs the 256 bytes and at least one more."
        )
    if kind == "unigram" and vocabulary_size < 2:
        raise UserError(f"data.vocabulary_size must be at least 2 for unigram, not {vocabulary_size}.")
    trainer: Any
    if kind == "bpe":
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        library = tokenizers.Tokenizer(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary_size + 1, special_tokens=[UNK], unk_token=UNK, show_progress=False
        )
    try:
        library.train_from_iterator(texts, trainer)
    except BaseException as error:  # the library's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"No {kind} tokeniser of data.vocabulary_size={vocabulary_size} fits this text: {error}"
        ) from error
    by_id = sorted((i, piece) for piece, i in library.get_vocab().items())
    pieces = tuple(piece for _, piece in (by_id if kind == "bpe" else by_id[1:]))
    return Tokenizer(kind, specials, pieces, library.to_str())


def cached_tokenizer(
    kind: Kind, texts: Sequence[str], *, specials: tuple[str, ...] = (UNK,), vocabulary_size: int = 0
) -> Tokenizer:
    """`train_tokenizer`, kept as JSON in the cache folder by the content of the texts.

    A second run, or going on with one, reads the same file: the library's unigram training does not promise
    the same pieces twice. Bytes, characters and words are made in a moment and not kept.
    """
    if kind not in _SUBWORDS:
        return train_tokenizer(kind, texts, specials=specials, vocabulary_size=vocabulary_size)
    digest = hashlib.sha256(json.dumps([kind, specials, vocabulary_size]).encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    path = cache.cache_dir() / "tokenizers" / f"{kind}-{vocabulary_size}-{digest.hexdigest()[:16]}.json"
    if path.is_file():
        return from_json(path.read_text(encoding="utf-8"), str(path))
    tokenizer = train_tokenizer(kind, texts, specials=specials, vocabulary_size=vocabulary_size)
    cache.write_text(path, tokenizer.to_json())
    return tokenizer
