"""Batches of token sequences: language-model streams, random windows, and pairs bucketed by length.

Every training stream is a callable step -> {field: [b, ...]}, a pure function of the step: skipping to any
step costs nothing and a resumed run sees the batches of an uninterrupted one. Fields are `tokens` (what a
network reads), `targets` (what it must say), `mask` float32 (1: counts, 0: padding) and, where sequences
differ in length, `lengths`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgen.data.notes import note
from jaxgen.data.stream import _rows_of_process
from jaxgen.data.texts import Pairs
from jaxgen.data.tokenizers import Tokenizer
from jaxgen.types import UserError

Rows = dict[str, np.ndarray]
_ORDER_SALT, _START_SALT, _BUCKET_SALT = 11, 12, 13


# ---- running text


class ContiguousStream:
    """B parallel streams through a text, for truncated back-propagation through time (Zaremba et al. 2014).

    The text of N tokens is cut into B stretches of (N - 1) // B; row b of step s holds `length` tokens of
    stretch b, following on from step s - 1. An epoch is `steps_per_epoch` = ((N - 1) // B) // length steps;
    the tokens that do not fill a step at the end of a stretch are not read. At the first step of an epoch
    `reset` [B] is 1, for the recurrent state to begin anew; else it is 0.

    Fields: tokens, targets int32 [b, length]; mask, all ones; reset float32 [b].
    Raises UserError where the text is too short for one step.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        length: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self.length = length
        stretch = (len(tokens) - 1) // batch_size
        self.steps_per_epoch = stretch // length
        if self.steps_per_epoch < 1:
            raise UserError(
                f"The text has {len(tokens)} tokens, but data.batch_size={batch_size} rows of "
                f"data.length={length} need {batch_size * length + 1}: lower one of them."
            )
        ids = np.asarray(tokens, np.int32)
        self._inputs = ids[: stretch * batch_size].reshape(batch_size, stretch)[self._rows]
        self._targets = ids[1 : stretch * batch_size + 1].reshape(batch_size, stretch)[self._rows]

    def __call__(self, step: int) -> Rows:
        """This process's rows of the batch of `step`."""
        window = step % self.steps_per_epoch
        span = slice(window * self.length, (window + 1) * self.length)
        tokens, targets = self._inputs[:, span], self._targets[:, span]
        return {
            "tokens": tokens,
            "targets": targets,
            "mask": np.ones(tokens.shape, np.float32),
            "reset": np.full(len(tokens), window == 0, np.float32),
        }


class WindowStream:
    """Windows of a text that begin at random places, each drawn alike and anew at every step.

    Fields: tokens, targets int32 [b, length], targets one token ahead; mask, all ones.
    Raises UserError where the text is shorter than a window and the token after it.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        length: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(tokens) < length + 1:
            raise UserError(
                f"The text has {len(tokens)} tokens, but data.length={length} needs {length + 1}: lower it."
            )
        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self._tokens = np.asarray(tokens, np.int32)
        self._batch_size, self._length, self._seed = batch_size, length, seed

    def __call__(self, step: int) -> Rows:
        """This process's rows of the batch of `step`."""
        generator = np.random.default_rng([self._seed, step, _START_SALT])
        starts = generator.integers(0, len(self._tokens) - self._length, self._batch_size)[self._rows]
        windows = self._tokens[starts[:, None] + np.arange(self._length + 1)]
        return {
            "tokens": windows[:, :-1],
            "targets": windows[:, 1:],
            "mask": np.ones((len(starts), self._length), np.float32),
        }


def evaluation_windows(tokens: np.ndarray, *, batch_size: int, length: int) -> Rows:
    """All of a text, once, in order: tokens, targets int32 and mask float32 [S, B, length].

    Row b of the steps reads stretch b of B equal stretches, so that a recurrent state can be carried from
    step to step; every token but the first is a target exactly once, and padding at the ends has mask 0.
    Raises UserError for a text of fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise UserError(f"A text of {len(tokens)} token has nothing to predict: give at least 2 tokens.")
    num = len(tokens) - 1
    stretch = -(-num // batch_size)
    steps = -(-stretch // length)
    # Stretch b begins at token b * stretch; the last ones may be short or empty.
    places = np.arange(batch_size)[:, None] * stretch + np.arange(steps * length)
    counts = (np.arange(steps * length) < stretch) & (places < num)
    ids = np.asarray(tokens, np.int32)
    inputs = np.where(counts, ids[np.minimum(places, num - 1)], 0)
    targets = np.where(counts, ids[np.minimum(places, num - 1) + 1], 0)
    fields = {"tokens": inputs, "targets": targets, "mask": counts.astype(np.float32)}
    return {
        name: np.ascontiguousarray(field.reshape(batch_size, steps, length).swapaxes(0, 1))
        for name, field in fields.items()
    }


# ---- pairs


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Pairs as ids. source[i] ends with `<eos>`; target[i] is [y_1 ... y_n, `<eos>`]."""

    source: tuple[np.ndarray, ...]
    target: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """The longer side of each pair, int [N]."""
        return np.asarray([max(len(s), len(t)) for s, t in zip(self.source, self.target, strict=True)])


def encode_pairs(
    pairs: Pairs, source: Tokenizer, target: Tokenizer, *, max_length: int, truncate: bool
) -> EncodedPairs:
    """The ids of sentence pairs, `<eos>` included in each length.

    A pair with a side of more than `max_length` ids is left out, or with `truncate`, as in a test set, where
    every sentence counts, it is cut so that its last id is `<eos>`. Raises UserError where no pair is left.
    """
    sides = []
    for tokenizer, texts in ((source, pairs.source), (target, pairs.target)):
        end = np.asarray([tokenizer.eos_id], np.int32)
        sides.append([np.append(ids, end) for ids in tokenizer.encode_all(texts)])
    if truncate:
        ends = (source.eos_id, target.eos_id)
        sides = [
            [ids if len(ids) <= max_length else np.append(ids[: max_length - 1], np.int32(end)) for ids in s]
            for s, end in zip(sides, ends, strict=True)
        ]
    kept = [(s, t) for s, t in zip(*sides, strict=True) if max(len(s), len(t)) <= max_length]
    if not kept:
        raise UserError(
            f"Every pair of the {pairs.split} split of {pairs.name} is longer than "
            f"data.max_length={max_length}: raise it."
        )
    if len(kept) < len(pairs):
        note(
            f"{pairs.name}, {pairs.split}: {len(pairs) - len(kept)} of {len(pairs)} pairs are longer than "
            f"data.max_length={max_length} and are left out."
        )
    sources, targets = zip(*kept, strict=True)
    return EncodedPairs(sources, targets)


def assign_buckets(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The number of the first of the rising `buckets` that each length fits in: int [N]."""
    if list(buckets) != sorted(set(buckets)) or not len(buckets):
        raise UserError(f"data.buckets must rise, such as 16,32,64, not {tuple(buckets)}.")
    if len(lengths) and np.max(lengths) > buckets[-1]:
        raise UserError(f"A length of {np.max(lengths)} fits in none of data.buckets={tuple(buckets)}.")
    return np.searchsorted(np.asarray(buckets), lengths)


def pad(sequences: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Sequences side by side, filled up at the end: int32 [N, length]."""
    padded = np.full((len(sequences), length), value, np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def pair_batch(pairs: EncodedPairs, indices: np.ndarray, length: int, *, bos: int, pad_id: int) -> Rows:
    """The pairs `indices`, padded to `length`, as a sequence-to-sequence model learns from them.

    source int32 [b, length] with source_lengths [b]; tokens [b, length] = [`<bos>`, y_1, ..., y_n] with
    lengths [b]; targets [b, length] = [y_1, ..., y_n, `<eos>`]; mask float32 [b, length].
    """
    source = [pairs.source[i] for i in indices]
    target = [pairs.target[i] for i in indices]
    lengths = np.asarray([len(ids) for ids in target], np.int32)
    shifted = [np.concatenate([[bos], ids[:-1]]) for ids in target]
    return {
        "source": pad(source, length, pad_id),
        "source_lengths": np.asarray([len(ids) for ids in source], np.int32),
        "tokens": pad(shifted, length, pad_id),
        "lengths": lengths,
        "targets": pad(target, length, pad_id),
        "mask": (np.arange(length) < lengths[:, None]).astype(np.float32),
    }


class PairStream:
    """Endless batches of pairs, all of one batch from one bucket of lengths, so that little of it is padding.

    The number of batch shapes, and so of compiled programs, is at most the number of buckets. All batches of
    `group` steps from a multiple of `group` on are of one bucket: what the loop stacks into one dispatch has
    one shape. Group g is of the bucket where the fraction of u + g (sqrt(5) - 1) / 2 falls when the unit
    interval is divided by the buckets' shares of the pairs, u drawn by the seed: an even spread, with as many
    rows from each bucket as it has pairs. Within a bucket the stream is one random permutation of its pairs
    after the other.

    Raises UserError for buckets that do not fit the pairs.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        *,
        batch_size: int,
        buckets: Sequence[int],
        group: int,
        seed: int,
        bos: int,
        pad_id: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._pairs, self._batch_size, self._group, self._seed = pairs, batch_size, group, seed
        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self._buckets, self._bos, self._pad_id = tuple(buckets), bos, pad_id
        number = assign_buckets(pairs.lengths, buckets)
        self._members = [np.flatnonzero(number == bucket) for bucket in range(len(buckets))]
        sizes = np.asarray([len(members) for members in self._members])
        self._edges = np.cumsum(sizes) / np.sum(sizes)
        self._offset = np.random.default_rng([seed, _BUCKET_SALT]).random()
        self._order = np.zeros(0, np.int64)  # the bucket of each group, made as far as it is asked for

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which as many pairs pass as there are, rounded up."""
        return -(-len(self._pairs) // self._batch_size)

    def __call__(self, step: int) -> Rows:
        """This process's rows of the batch of `step`, as `pair_batch` describes them."""
        group, within = divmod(step, self._group)
        order = self._buckets_of_groups(group + 1)
        bucket = int(order[group])
        earlier = int(np.count_nonzero(order[:group] == bucket)) * self._group + within
        members = self._members[bucket]
        positions = np.arange(self._rows.start, self._rows.stop) + earlier * self._batch_size
        indices = np.empty(len(positions), np.int64)
        for epoch in np.unique(positions // len(members)):
            here = positions // len(members) == epoch
            seed = [self._seed, int(epoch), bucket, _ORDER_SALT]
            permutation = np.random.default_rng(seed).permutation(members)
            indices[here] = permutation[positions[here] % len(members)]
        return pair_batch(self._pairs, indices, self._buckets[bucket], bos=self._bos, pad_id=self._pad_id)

    def _buckets_of_groups(self, num: int) -> np.ndarray:
        order = self._order
        if len(order) < num:
            groups = np.arange(max(num, 2 * len(order)))
            fractions = (self._offset + groups * ((np.sqrt(5) - 1) / 2)) % 1.0
            order = self._order = np.searchsorted(self._edges, fractions, side="right")
        return order


def pair_batches(
    pairs: EncodedPairs, *, batch_size: int, buckets: Sequence[int], bos: int, pad_id: int
) -> Iterator[tuple[np.ndarray, Rows]]:
    """Every pair once, bucket by bucket: (which pairs, int [n], the batch of batch_size rows).

    The last batch of a bucket is filled up with copies of a pair whose mask is 0; n <= batch_size says how
    many rows count.
    """
    number = assign_buckets(pairs.lengths, buckets)
    for bucket, length in enumerate(buckets):
        members = np.flatnonzero(number == bucket)
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            filled = np.append(indices, np.full(batch_size - len(indices), indices[0]))
            rows = pair_batch(pairs, filled, length, bos=bos, pad_id=pad_id)
            rows["mask"][len(indices) :] = 0.0
            yield indices, rows
