"""What word2vec is trained on: pieces of running text, a function of (seed, step).

Text is read at `num_streams` places far apart, each going through a part of its own, so that the pieces of
one update have few words in common. (Neighbouring text has the same rare words again and again; updates that
add up over it were seen to diverge where updates over distant text do not.)
"""

from __future__ import annotations

import math

import numpy as np

from jaxgen.types import UserError
from jaxgen.words.text import Corpus
from jaxgen.words.training_pairs import word2vec_keep_probability


class Pieces:
    """`pieces(step)` -> what the step trains on; see `__call__`.

    num_streams: places where the text is read at once, B
    stretch: raw words that each stream reads a step, at most
    piece: places of a piece, T; window: the most words on a side of a place
    subsample: t of `word2vec_keep_probability`; 0 keeps all words
    noise: the distribution of the negatives [V]; negatives: how many a piece, K
    rates: learning rate at the first word and at the last, linear in between
    epochs: how often the text is gone through, in `num_steps` steps
    Raises UserError where the text is too short for the streams, or all of it is subsampled away.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        num_streams: int,
        stretch: int,
        piece: int,
        window: int,
        subsample: float,
        noise: np.ndarray,
        negatives: int,
        rates: tuple[float, float],
        epochs: float,
        seed: int,
        rows: slice = slice(None),
    ) -> None:
        self.tokens, self.starts = corpus.tokens, corpus.starts
        self.share = len(self.tokens) // num_streams  # raw words of a stream
        if self.share < 1:
            raise UserError(
                f"The text has {len(self.tokens)} words of the vocabulary, fewer than data.num_streams="
                f"{num_streams}: lower that, or give more text."
            )
        # Stretches of equal length, so that no step is left with a rest of a few words.
        self.stretch = -(-self.share // -(-self.share // stretch))
        self.piece, self.window, self.negatives, self.seed = piece, window, negatives, seed
        counts = corpus.vocabulary.counts
        self.keep = np.ones(len(counts), np.float32)
        if subsample:
            self.keep = word2vec_keep_probability(counts, subsample).astype(np.float32)
        kept = float(np.dot(self.keep, counts) / counts.sum())
        if kept * len(self.tokens) < 2:
            raise UserError(f"data.subsample={subsample} leaves no text to train on: raise it.")
        # Room for four standard deviations more than the mean; a stretch of rare words can still be longer,
        # and what does not fit is left out.
        room = kept * self.stretch + 4 * np.sqrt(kept * (1 - kept) * self.stretch)
        self.num_pieces = int(np.ceil(min(room, self.stretch) / piece))  # of a stream a step
        # Drawn by a look-up in a table of 2^22 entries: a share below 2^-22 is rounded to one entry.
        entries = np.maximum(np.rint(noise * 2**22), (noise > 0) * 1.0).astype(np.int64)
        self.noise_table = np.repeat(np.arange(len(noise), dtype=np.int32), entries)
        self.rates = rates
        self.steps_an_epoch = -(-self.share // self.stretch)
        self.num_steps = max(1, math.ceil(epochs * self.steps_an_epoch))
        self.streams = range(num_streams)[rows]

    @property
    def words_per_step(self) -> int:
        """Raw words read by a step, over all streams."""
        return self.stretch * len(self.streams)

    def rate(self, step: int) -> float:
        """The learning rate of a step, that of its middle word."""
        first, last = self.rates
        return first + (last - first) * min((step + 0.5) / self.num_steps, 1.0)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """tokens int32 [B, S, T + 2 window], left and right int32 [B, S, T], negatives int32 [B, S, K], rate
        float32 [B]: S pieces of each stream, one after the other, as `objectives.word2vec` takes them.

        A stream's words are subsampled first, so that a window reaches over what was left out, and a window's
        size is drawn anew for each place, as the C program does. No window crosses a sentence's end.
        """
        size, pad = self.num_pieces * self.piece, self.window
        tokens = np.zeros((len(self.streams), size + 2 * pad), np.int32)
        left, right = (np.zeros((len(self.streams), size), np.int32) for _ in range(2))
        shape = (len(self.streams), self.num_pieces, self.negatives)
        negatives = np.zeros(shape, np.int32)
        begin = step % self.steps_an_epoch * self.stretch
        for row, stream in enumerate(self.streams):
            rng = np.random.default_rng([self.seed, step, stream])
            first = stream * self.share + begin
            last = min(first + self.stretch, (stream + 1) * self.share)
            words = np.asarray(self.tokens[first:last])
            chosen = np.flatnonzero(rng.random(len(words), dtype=np.float32) < self.keep[words])[:size]
            words = words[chosen]
            tokens[row, pad : pad + len(words)] = words
            before, after = self._room(first, last, chosen)
            reach = rng.integers(1, self.window + 1, len(words))
            left[row, : len(words)] = np.minimum(reach, before)
            right[row, : len(words)] = np.minimum(reach, after)
            drawn = rng.integers(0, len(self.noise_table), shape[1:], dtype=np.int32)
            negatives[row] = self.noise_table[drawn]
        pieces = np.lib.stride_tricks.sliding_window_view(tokens, self.piece + 2 * pad, axis=1)
        return {
            "tokens": np.ascontiguousarray(pieces[:, :: self.piece]),
            "left": left.reshape(*shape[:2], self.piece),
            "right": right.reshape(*shape[:2], self.piece),
            "negatives": negatives,
            "rate": np.full(len(self.streams), self.rate(step), np.float32),
        }

    def _room(self, first: int, last: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many chosen words of the same sentence stand before and after each chosen one."""
        low, high = np.searchsorted(self.starts, (first, last), side="right")
        sentence_ends = np.searchsorted(chosen, self.starts[low:high] - first)  # among the chosen
        edges = np.unique(np.concatenate([[0], sentence_ends, [len(chosen)]]))
        lengths = np.diff(edges)
        place = np.arange(len(chosen))
        return place - np.repeat(edges[:-1], lengths), np.repeat(edges[1:], lengths) - 1 - place
