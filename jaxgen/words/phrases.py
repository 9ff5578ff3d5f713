"""Phrases as words: "new york" becomes "new_york" where the two stand together more often than chance has it.

Mikolov et al. 2013, "Distributed representations of words and phrases and their compositionality", section 4.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator

import numpy as np

from jaxgen.types import UserError
from jaxgen.words.sentences import sentence_numbers
from jaxgen.words.text import Corpus, write_corpus
from jaxgen.words.vocabulary import build_vocabulary


def phrase_score(pair: np.ndarray, first: np.ndarray, second: np.ndarray, discount: float) -> np.ndarray:
    """(count(w_i w_j) - delta) / (count(w_i) count(w_j))   (Mikolov et al. 2013, eq. 6)."""
    return (pair - discount) / (first.astype(np.float64) * second)


def find_phrases(
    corpus: Corpus,
    *,
    discount: float = 5.0,
    threshold: float = 100.0,
    excluded: tuple[str, ...] = (),
    max_pairs: int = 20_000_000,
    chunk: int = 1 << 20,
) -> np.ndarray:
    """The pairs of neighbouring words of a sentence that make phrases, sorted int64 [P, 2].

    discount: delta, which keeps rare words from making phrases. threshold: the least score, times the number
    of words in the text, as in the C program: how many times as often as by chance the words must meet.
    excluded: words, such as "<eos>", that make no phrases; the vocabulary's unknown word never does.
    max_pairs: when there are more different pairs the rarest are forgotten, as `count_words` does.
    """
    size, tokens = len(corpus.vocabulary), corpus.tokens
    if max_pairs < 1 or discount < 0:
        raise UserError("phrases need at least one pair of words and a discount that is not negative.")
    barred = np.asarray(
        [word in excluded or word == corpus.vocabulary.unknown for word in corpus.vocabulary.words]
    )
    keys, counts, forgotten = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    for begin in range(0, len(tokens) - 1, chunk):
        words = np.asarray(tokens[begin : begin + chunk + 1], np.int64)
        sentence = sentence_numbers(corpus.starts, begin, begin + len(words))
        first, second = words[:-1], words[1:]
        met = (sentence[:-1] == sentence[1:]) & (first >= 0) & (second >= 0)
        met &= ~barred[first] & ~barred[second]
        new, number = np.unique(first[met] * size + second[met], return_counts=True)
        keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, number]), len(keys)).astype(np.int64)
        while len(keys) > max_pairs:
            forgotten += 1
            keys, counts = keys[counts > forgotten], counts[counts > forgotten]
    pairs = np.stack([keys // size, keys % size], axis=1)
    occurrences = corpus.vocabulary.counts
    score = phrase_score(counts, occurrences[pairs[:, 0]], occurrences[pairs[:, 1]], discount)
    return pairs[score * occurrences.sum() > threshold]


def join_phrases(
    corpus: Corpus,
    pairs: np.ndarray,
    directory: str | os.PathLike[str],
    *,
    joiner: str = "_",
    min_count: int = 1,
    chunk: int = 1 << 20,
) -> Corpus:
    """The corpus with each of the pairs int [P, 2] joined to one word, written to `directory`.

    From left to right of each sentence, no word in two phrases. Longer phrases come of joining the result
    again with its own pairs. Words that then occur less than `min_count` times become the unknown word or,
    where there is none, are left out.
    """
    old = corpus.vocabulary
    keys = np.sort(pairs[:, 0] * len(old) + pairs[:, 1]) if len(pairs) else np.zeros(0, np.int64)
    first, second = keys // len(old), keys % len(old)
    # Words by their number in the joined text: those there were, then the phrases.
    names = [
        *old.words,
        *(old.words[a] + joiner + old.words[b] for a, b in zip(first, second, strict=True)),
    ]
    occurrences = np.zeros(len(names), np.int64)
    for tokens, _ in _joined(corpus, keys, chunk):
        occurrences += np.bincount(tokens[tokens >= 0], minlength=len(names))
    counted: collections.Counter[str] = collections.Counter()
    for name, count in zip(names, occurrences, strict=True):
        if count:  # a phrase may be a word of the text already
            counted[name] += int(count)
    new = build_vocabulary(counted, min_count=min_count, unknown=old.unknown)
    numbers = new.encode(names)
    request = {"phrases_of": corpus.fingerprint, "joiner": joiner, "min_count": min_count}
    return write_corpus(directory, _renumbered(_joined(corpus, keys, chunk), numbers), new, request)


def _joined(corpus: Corpus, keys: np.ndarray, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (tokens, places where sentences end), phrase i of `keys` being the token V + i."""
    size, position = len(corpus.vocabulary), 0
    while position < len(corpus.tokens):
        # One word more than is given out, for the last word may begin a phrase.
        words = np.asarray(corpus.tokens[position : position + chunk + 1], np.int64)
        sentence = sentence_numbers(corpus.starts, position, position + len(words))
        key = words[:-1] * size + words[1:]
        met = (sentence[:-1] == sentence[1:]) & (words[:-1] >= 0) & (words[1:] >= 0)
        phrase = np.minimum(np.searchsorted(keys, key), max(len(keys) - 1, 0))
        if len(keys):
            met &= keys[phrase] == key
        else:
            met[:] = False
        # Of a run of pairs that overlap, from left to right, every second one is taken.
        place = np.arange(len(met))
        run_start = np.maximum.accumulate(np.where(met & ~np.concatenate([[False], met[:-1]]), place, 0))
        taken = met & ((place - run_start) % 2 == 0)
        tokens = words.copy()
        tokens[:-1][taken] = size + phrase[taken]
        kept = np.concatenate([[True], ~taken])
        used = len(words)
        if used > chunk and kept[-1]:  # the word looked ahead to is the next block's
            used -= 1
        ends = corpus.starts[
            np.searchsorted(corpus.starts, position, "right") : np.searchsorted(
                corpus.starts, position + used, "right"
            )
        ]
        numbers = np.cumsum(kept[:used])
        yield tokens[:used][kept[:used]], numbers[ends - position - 1]
        position += used


def _renumbered(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], numbers: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks with their words' new numbers; -1 stays, and words new to it are left out."""
    for tokens, ends in blocks:
        renumbered = np.where(tokens < 0, -1, numbers[tokens]).astype(np.int32)
        kept = (tokens < 0) | (renumbered >= 0)
        yield renumbered[kept], np.concatenate([[0], np.cumsum(kept)])[ends]
