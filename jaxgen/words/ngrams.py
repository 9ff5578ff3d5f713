"""n-gram language models: P(w_1 ... w_m) = prod_i P(w_i | the n - 1 words before), from counted n-grams.

Every smoothing of `jaxgen.words.smoothing` is one recursion over the length k of the n-gram h w, whose
context h has k - 1 words and, without its first word, is h':

    p_k(w | h) = alpha_k(h w) + gamma_k(h) p_{k-1}(w | h'),   p_0(w) = 1 / V,

with alpha 0 for an n-gram never seen and gamma 1 for a context never seen. So a model is two arrays a length,
and sums to one in every context, seen or not, if sum_w alpha_k(h w) + gamma_k(h) = 1 in the seen ones.

The counts are a trie: an n-gram is the pair (its first n - 1 words, an entry of the level above; its last
word), one 64-bit key, so that counting is sorting and looking up is bisection, both of whole arrays, for any
n.

Sentences are independent: a marker, which is never predicted, stands once before each of them, and contexts
do not reach across it. An end-of-sentence word, where it is wanted, is an ordinary word at the end of each
sentence. Words outside the vocabulary (token -1) are not predicted, and cut the contexts that hold them
short; text in which they were replaced by a word "<unk>" of the vocabulary, as in the Penn Treebank, has
none: "<unk>" is then predicted as any other word, and the perplexity is that of the replaced text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxgen.types import Key, UserError
from jaxgen.words.sentences import check


@dataclasses.dataclass(frozen=True)
class NgramCounts:
    """The n-grams of a text, for n = 1 ... order; entry k - 1 of each tuple is about those of k words.

    keys: sorted int64 [E_k], (entry of the first k - 1 words) * (V + 1) + last word; E_1 = V + 1, one a word
    and
        the sentence marker V, in order, whether seen or not.
    counts: int64 [E_k], how often each occurs; 0 for the marker alone, which is not predicted.
    contexts: int64 [E_k], the entry of the first k - 1 words at the level above, 0 for k = 1.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    contexts: tuple[np.ndarray, ...]

    @property
    def order(self) -> int:
        return len(self.keys)

    @property
    def marker(self) -> int:
        """The token that stands before every sentence."""
        return self.vocab_size

    def num_contexts(self, level: int) -> int:
        return 1 if level == 1 else len(self.keys[level - 2])

    def find(self, level: int, context: np.ndarray, word: np.ndarray) -> np.ndarray:
        """The entries of the n-grams (context, word) of `level` words, int64, -1 where there is none.

        context: entries at the level above, -1 for none (0 at level 1); word: tokens, -1 for an unknown word.
        """
        if level == 1:
            return np.where(context < 0, -1, word).astype(np.int64)
        keys, wanted = self.keys[level - 1], context * (self.vocab_size + 1) + word
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        found = (context >= 0) & (word >= 0) & (len(keys) > 0)
        if len(keys):
            found &= keys[place] == wanted
        return np.where(found, place, -1)


def count_ngrams(tokens: np.ndarray, starts: np.ndarray, vocab_size: int, order: int) -> NgramCounts:
    """The n-grams of up to `order` words within the sentences (`jaxgen.words.sentences`) of a text.

    N-grams with an unknown word are not counted.
    """
    tokens, starts = np.asarray(tokens), np.asarray(starts)
    check(tokens, starts, vocab_size)
    if order < 1:
        raise UserError(f"the order of an n-gram model must be at least 1, not {order}.")
    if not np.any(tokens >= 0):
        raise UserError("there is nothing to count: the text has no word of the vocabulary.")
    words, place = _with_markers(tokens, starts, vocab_size)
    width = vocab_size + 1
    unigrams = np.bincount(words[words >= 0], minlength=width)
    unigrams[vocab_size] = 0
    keys, counts, contexts = [np.arange(width)], [unigrams], [np.zeros(width, np.int64)]
    entry = words.astype(np.int64)  # of the n-gram that ends at each place; -1: there is none
    for length in range(2, order + 1):
        before = np.concatenate([[-1], entry[:-1]])
        whole = (before >= 0) & (words >= 0) & (place >= length - 1)
        unique, inverse, count = np.unique(
            before[whole] * width + words[whole], return_inverse=True, return_counts=True
        )
        entry = np.full(len(words), -1, np.int64)
        entry[whole] = inverse
        keys.append(unique)
        counts.append(count)
        contexts.append(unique // width)
    return NgramCounts(vocab_size, tuple(keys), tuple(counts), tuple(contexts))


def _with_markers(tokens: np.ndarray, starts: np.ndarray, marker: int) -> tuple[np.ndarray, np.ndarray]:
    """The text with a marker before each sentence, and each token's place in it (0: the marker)."""
    words = np.insert(tokens.astype(np.int64), starts[:-1], marker)
    lengths = np.diff(starts) + 1
    first = np.repeat(starts[:-1] + np.arange(len(lengths)), lengths)
    return words, np.arange(len(words)) - first


class NgramModel(NamedTuple):
    """alphas[k - 1] float64 [E_k] and gammas[k - 1] float64 [E_{k-1}] of this module's recursion."""

    counts: NgramCounts
    alphas: tuple[np.ndarray, ...]
    gammas: tuple[np.ndarray, ...]


def walk(
    counts: NgramCounts, tokens: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For k = 1 ... order: int64 [N] entries of the k words ending at each token, and of the k - 1 before.

    -1 stands for an n-gram or context that was never counted or does not fit in the sentence.
    """
    tokens, starts = np.asarray(tokens), np.asarray(starts)
    check(tokens, starts, counts.vocab_size)
    words, place = _with_markers(tokens, starts, counts.marker)
    context = np.zeros(len(words), np.int64)
    for length in range(1, counts.order + 1):
        entry = counts.find(length, context, words)
        yield entry[place > 0], context[place > 0]
        context = np.concatenate([[-1], entry[:-1]])
        context[place == 0] = -1


def word_probabilities(model: NgramModel, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """P(w_i | the words before it in its sentence), float64 [N]; NaN for an unknown word."""
    probability = np.full(len(tokens), 1.0 / model.counts.vocab_size)
    for (entry, context), alpha, gamma in zip(
        walk(model.counts, tokens, starts), model.alphas, model.gammas, strict=True
    ):
        seen = context >= 0
        if len(alpha):  # an order longer than every sentence has no n-grams
            probability = np.where(seen, gamma[context], 1.0) * probability
            probability += np.where(entry >= 0, alpha[entry], 0.0)
    return np.where(np.asarray(tokens) >= 0, probability, np.nan)


class Perplexity(NamedTuple):
    """exp of the mean of -ln P(w_i | ...) over `num_words` words; `num_unknown` others were left out."""

    value: float
    bits_per_word: float
    num_words: int
    num_unknown: int


def perplexity(model: NgramModel, tokens: np.ndarray, starts: np.ndarray) -> Perplexity:
    """The perplexity of a text, infinite where the model gives a word probability 0.

    End-of-sentence words in `tokens` are predicted and counted, sentence markers are not; unknown words (-1)
    are neither, so two models are compared only if they know the same words.
    """
    probabilities = word_probabilities(model, tokens, starts)
    known = probabilities[~np.isnan(probabilities)]
    if not len(known):
        raise UserError("a perplexity needs at least one word of the vocabulary.")
    with np.errstate(divide="ignore"):
        bits = float(-np.mean(np.log2(known)))
    return Perplexity(2.0**bits, bits, len(known), len(probabilities) - len(known))


def distribution(model: NgramModel, context: Sequence[int]) -> np.ndarray:
    """P(w | context) of every word of the vocabulary, float64 [V], where `context` begins a sentence."""
    counts = model.counts
    words = [counts.marker, *context]
    probability = np.full(counts.vocab_size + 1, 1.0 / counts.vocab_size)
    for length in range(1, counts.order + 1):
        if length - 1 > len(words):
            break
        entry = np.zeros(1, np.int64)
        for level, word in enumerate(words[len(words) - (length - 1) :], start=1):
            entry = counts.find(level, entry, np.asarray([word]))
        if entry[0] < 0:
            break  # a longer context, which ends in this one, was not seen either
        first, last = np.searchsorted(counts.contexts[length - 1], [entry[0], entry[0] + 1])
        followers = counts.keys[length - 1][first:last] % (counts.vocab_size + 1)
        if len(model.gammas[length - 1]) and len(counts.keys[length - 1]):
            probability *= model.gammas[length - 1][entry[0]]
            probability[followers] += model.alphas[length - 1][first:last]
    return probability[: counts.vocab_size]


def sample(
    model: NgramModel, key: Key, num: int, *, end: int | None = None, max_length: int = 100
) -> list[np.ndarray]:
    """`num` sentences, int64 [at most max_length] each, word by word; a sentence ends with the word `end`.

    Sentence i depends on (model, key, i) alone.
    """
    sentences = []
    for index in range(num):
        uniforms = np.asarray(jax.random.uniform(jax.random.fold_in(key, index), (max_length,)), np.float64)
        words: list[int] = []
        for uniform in uniforms:
            cumulative = np.cumsum(distribution(model, words))
            # Divided by the last sum, which is 1 up to rounding, so that the index stays within the
            # vocabulary.
            words.append(int(np.searchsorted(cumulative / cumulative[-1], uniform, side="right")))
            if words[-1] == end:
                break
        sentences.append(np.asarray(words, np.int64))
    return sentences
