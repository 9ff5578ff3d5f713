"""Small tasks on sequences: recall and sentiment on generated data, labelling of real Python source.

Each gives a `Source` with the columns `tokens` int32 [N, T], 0 being padding, `lengths` int32 [N] and
`targets`: int32 [N], a class of the whole, or [N, T], a class for each token.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import keyword
import tokenize
from pathlib import Path

import numpy as np

from jaxgen.data.source import Source
from jaxgen.data.texts import split_of
from jaxgen.types import UserError, unknown

_SALTS = {"train": 1, "test": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A split of a task, and what its numbers mean.

    symbols: the text of each token id; classes: the name of each class
    generated: whether the data are made up; else they are real
    """

    source: Source
    symbols: tuple[str, ...]
    classes: tuple[str, ...]
    generated: bool


def load_task(name: str, split: str, *, num: int, length: int, seed: int) -> Task:
    """`num` examples of at most `length` tokens of `recall`, `labelling` or `sentiment`, split train or test.

    The same arguments give the same examples; labelling takes the same ones for any seed. Raises UserError
    for an unknown name and for a length that the task does not fit in.
    """
    makers = {"recall": recall, "labelling": labelling, "sentiment": sentiment}
    if name not in makers:
        raise unknown("data.source", name, tuple(makers))
    if split not in _SALTS:
        raise unknown("split", split, tuple(_SALTS))
    return makers[name](split, num=num, length=length, seed=seed)


# ---- recall


RECALL_SYMBOLS, RECALL_NOISE = 8, 4


def recall(split: str, *, num: int, length: int, seed: int) -> Task:
    """One of 8 symbols, then length - 2 tokens of noise, then a question mark: which symbol was it?

    Generated. Nothing but the first token tells, so a network has to carry it over length - 1 steps.
    """
    if length < 3:
        raise UserError(f"data.length must be at least 3 for recall, not {length}.")
    generator = np.random.default_rng([seed, _SALTS[split], 21])
    symbols = (" ", *"ABCDEFGH", *".,:;"[:RECALL_NOISE], "?")
    first = 1 + generator.integers(0, RECALL_SYMBOLS, (num, 1))
    noise = 1 + RECALL_SYMBOLS + generator.integers(0, RECALL_NOISE, (num, length - 2))
    question = np.full((num, 1), len(symbols) - 1)
    tokens = np.concatenate([first, noise, question], axis=1).astype(np.int32)
    targets = (first[:, 0] - 1).astype(np.int32)
    return _task("recall", split, tokens, np.full(num, length), targets, symbols, tuple("ABCDEFGH"), True)


# ---- labelling


CLASSES = ("space", "keyword", "name", "number", "string", "comment", "operator")
# Modules of the standard library, in Python: what is tested on is in none of those learned from.
_MODULES = {
    "train": (
        *("argparse", "ast", "bisect", "calendar", "cmd", "colorsys", "configparser", "csv", "difflib"),
        *("fileinput", "fractions", "getopt", "gettext", "heapq", "inspect", "locale", "mailbox", "optparse"),
    ),
    "test": ("random", "shlex", "statistics", "string", "textwrap", "zipapp"),
}


def character_classes(text: str) -> np.ndarray:
    """The lexical class of each character of a Python file by the module `tokenize`: numbers of CLASSES."""
    starts = np.concatenate([[0], np.cumsum([len(line) for line in io.StringIO(text)])])
    classes = np.zeros(len(text), np.int32)
    kinds = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
        tokenize.OP: "operator",
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = kinds.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        elif tokenize.tok_name[token.type].startswith("FSTRING"):  # from Python 3.12 on
            kind = "string"
        if kind is not None:
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            classes[first:last] = CLASSES.index(kind)
    return classes


@functools.lru_cache(maxsize=2)
def _python_source(split: str) -> tuple[str, np.ndarray]:
    folder = Path(json.__file__).parents[1]
    texts = [(folder / f"{module}.py").read_text(encoding="utf-8") for module in _MODULES[split]]
    return "".join(texts), np.concatenate([character_classes(text) for text in texts])


def labelling(split: str, *, num: int, length: int, seed: int) -> Task:
    """Pieces of CPython's own library; each character is to be labelled with its lexical class.

    Real text; the labels are `tokenize`'s. The pieces begin at places spread evenly over the split's files,
    so what stands before a piece, such as an opening quote, is often out of sight. Characters beyond Latin-1
    are one token, "?". It differs a little between Python versions, which the fingerprint tells.
    """
    text, classes = _python_source(split)
    if length > len(text) // 2:
        raise UserError(f"data.length must be at most {len(text) // 2} for labelling, not {length}.")
    points = np.asarray([ord(c) + 1 if ord(c) < 256 else ord("?") + 1 for c in text], np.int32)
    starts = np.linspace(0, len(text) - length, num).astype(np.int64)
    places = starts[:, None] + np.arange(length)
    symbols = (" ", *(chr(i) for i in range(256)))
    lengths = np.full(num, length)
    return _task("labelling", split, points[places], lengths, classes[places], symbols, CLASSES, False)


# ---- sentiment


_WORDS = {
    "good": ("good", "great", "moving", "funny", "clever", "warm"),
    "bad": ("bad", "dull", "weak", "silly", "slow", "cold"),
    "noun": ("film", "plot", "acting", "music", "ending", "script"),
    "degree": ("very", "rather", "quite", "truly"),
}
_SYMBOLS = (
    ("<pad>", "the", "was", "not", "and", "but")
    + _WORDS["noun"]
    + _WORDS["degree"]
    + _WORDS["good"]
    + _WORDS["bad"]
)


def sentiment(split: str, *, num: int, length: int, seed: int) -> Task:
    """Sentences such as "the plot was not very good but the music was moving": for or against?

    Generated by a small grammar of one to three clauses. "not" turns a clause round; after "but" what was
    said before no longer counts; clauses joined by "and" agree. A hash puts each sentence in one split.
    """
    longest = 3 * 6 + 2
    if length < longest:
        raise UserError(f"data.length must be at least {longest} for sentiment, not {length}.")
    generator = np.random.default_rng([seed, _SALTS[split], 22])
    index = {word: i for i, word in enumerate(_SYMBOLS)}
    tokens, lengths = np.zeros((num, length), np.int32), np.zeros(num, np.int32)
    targets, row = np.zeros(num, np.int32), 0
    while row < num:
        words, label = _review(generator)
        in_test = split_of(" ".join(words)) == "test"
        if in_test == (split == "test"):
            tokens[row, : len(words)] = [index[word] for word in words]
            lengths[row], targets[row] = len(words), label
            row += 1
    return _task("sentiment", split, tokens, lengths, targets, _SYMBOLS, ("against", "for"), True)


def _review(generator: np.random.Generator) -> tuple[list[str], int]:
    pick = lambda kind: _WORDS[kind][generator.integers(len(_WORDS[kind]))]
    label = int(generator.integers(2))
    words = []
    for clause in range(1 + int(generator.integers(3))):
        if clause:
            turn = bool(generator.integers(2))
            words.append("but" if turn else "and")
            label = 1 - label if turn else label
        negated = bool(generator.integers(2))
        words += ["the", pick("noun"), "was", *(["not"] if negated else [])]
        words += [pick("degree")] if generator.integers(2) else []
        words.append(pick("good" if label != negated else "bad"))
    return words, label


def _task(
    name: str,
    split: str,
    tokens: np.ndarray,
    lengths: np.ndarray,
    targets: np.ndarray,
    symbols: tuple[str, ...],
    classes: tuple[str, ...],
    generated: bool,
) -> Task:
    fields = {"tokens": tokens, "lengths": lengths.astype(np.int32), "targets": targets}
    return Task(Source(name, split, fields, None, num_levels=256), symbols, classes, generated)
