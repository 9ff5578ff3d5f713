"""Encoded text in memory or mapped from disk: `tokens` [N] and where its sentences start.

`tokens` are whole numbers, the words' places in a vocabulary of V words; -1 is a word outside it. `starts` [S
+ 1] rises from 0 to N: sentence s is tokens[starts[s]:starts[s + 1]]. Text without sentences is one sentence,
[0, N].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

_PIECE = 1 << 20


def pack(sentences: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sentences as (tokens int32 [N], starts int64 [S + 1])."""
    rows = [np.asarray(sentence, np.int32).reshape(-1) for sentence in sentences]
    starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return np.concatenate([*rows, np.zeros(0, np.int32)]), starts


def check(tokens: np.ndarray, starts: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError where `tokens` and `starts` are not as this module's page says."""
    if tokens.ndim != 1 or starts.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens and starts must be lists of whole numbers, not {tokens.dtype} {tokens.shape} and "
            f"{starts.shape}"
        )
    if not len(starts) or starts[0] != 0 or starts[-1] != len(tokens) or not _rises(starts):
        raise ValueError(f"starts must rise from 0 to the number of tokens, {len(tokens)}")
    if len(tokens) and not (tokens.min() >= -1 and tokens.max() < vocab_size):
        raise ValueError(
            f"tokens must lie in -1..{vocab_size - 1}, not in {tokens.min()}..{tokens.max()}, "
            f"for a vocabulary of {vocab_size} words"
        )


def _rises(starts: np.ndarray) -> bool:
    """Whether no element is below the one before it; by pieces, since `starts` may be larger than memory."""
    pieces = range(0, len(starts), _PIECE)
    return all(not np.any(np.diff(starts[first : first + _PIECE + 1]) < 0) for first in pieces)


def sentence_numbers(starts: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Which sentence each of the tokens begin..end-1 belongs to, int64 [end - begin]."""
    return np.searchsorted(starts, np.arange(begin, end), side="right") - 1
