"""Words and their numbers: 0 is the most frequent word."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from jaxgen.types import UserError


class Index(dict[str, int]):
    """{word: number}, and `absent` for every other word."""

    def __init__(self, numbers: Mapping[str, int], absent: int = -1) -> None:
        super().__init__(numbers)
        self.absent = absent

    def __missing__(self, word: str) -> int:
        return self.absent


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`words` by falling count, ties by code point, and `counts` int64 [V], how often each occurs.

    unknown: the word that stands for all others; None: others have no number (-1).
    """

    words: tuple[str, ...]
    counts: np.ndarray
    unknown: str | None = None

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def index(self) -> Index:
        """{word: number}; `index[word]` of a word that is not in it is that of `unknown`, or -1."""
        numbers = {word: number for number, word in enumerate(self.words)}
        return Index(numbers, -1 if self.unknown is None else numbers[self.unknown])

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """The words' numbers, int32 [N]."""
        return np.fromiter(map(self.index.__getitem__, words), np.int32)

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """The words of these numbers; "?" for -1."""
        return ["?" if token < 0 else self.words[token] for token in tokens]


def build_vocabulary(
    counts: Mapping[str, int],
    *,
    min_count: int = 1,
    max_size: int | None = None,
    unknown: str | None = None,
    end: str | None = None,
) -> Vocabulary:
    """The words of {word: count} that occur `min_count` times or more, at most the `max_size` most frequent.

    unknown: a word, such as "<unk>", that joins the vocabulary, counted among `max_size`, and whose count is
    that of all words left out and its own in the text.
    end: a word, such as "<eos>", that is in the vocabulary however seldom it occurs, counted among
        `max_size`.
    """
    if min_count < 1 or (max_size is not None and max_size < 1):
        raise UserError("the least count of a word and the size of a vocabulary must be at least 1.")
    own = {word for word in (unknown, end) if word is not None}
    known = {word: count for word, count in counts.items() if count >= min_count and word not in own}
    ranked = sorted(known, key=lambda word: (-known[word], word))
    if max_size is not None:
        ranked = ranked[: max(max_size - len(own), 0)]
    if not ranked:
        most = max(counts.values(), default=0)
        raise UserError(
            f"no word is left of {len(counts)}: the most frequent one occurs {most} times and a word must "
            f"occur {min_count} times; lower min_count or give more text."
        )
    if end is not None:
        known[end] = counts.get(end, 0)
        ranked.append(end)
    if unknown is not None:
        known[unknown] = sum(counts.values()) - sum(known[word] for word in ranked)
        ranked.append(unknown)
    ranked.sort(key=lambda word: (-known[word], word))
    return Vocabulary(tuple(ranked), np.asarray([known[word] for word in ranked], np.int64), unknown)
