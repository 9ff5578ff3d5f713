"""Scores of text: perplexity per token and per word, bits per character, BLEU and chrF, exact match.

NumPy and Python on the host. BLEU and chrF are sacreBLEU's (Post 2018), which hands out the signature that
makes a figure comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def perplexity(nats: float, num: float) -> float:
    """exp(nats / num): of a text of `num` tokens, or words, that costs `nats` in all.

    A perplexity is per token of one tokeniser; divided by the number of words of the same text it can be
    compared between tokenisers. Infinite where the mean is beyond float64's range. Raises ValueError unless
    num > 0.
    """
    if num <= 0:
        raise ValueError(f"a perplexity needs at least one token, not {num}")
    try:
        return math.exp(nats / num)
    except OverflowError:
        return math.inf


def bits_per_character(nats: float, num_characters: int) -> float:
    """nats / (num_characters ln 2). Raises ValueError unless num_characters > 0."""
    if num_characters <= 0:
        raise ValueError(f"bits per character need at least one character, not {num_characters}")
    return nats / (num_characters * math.log(2))


class CorpusScore(NamedTuple):
    """A corpus score in [0, 100] and the signature of how it was computed."""

    value: float
    signature: str


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not len(hypotheses):
        raise ValueError(
            f"need as many references as hypotheses, and at least one, not {len(references)} and "
            f"{len(hypotheses)}"
        )


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacreBLEU's tokeniser for the script of these texts.

    13a splits at spaces, which Chinese and Japanese do not write: "zh" where Chinese characters prevail, and
    "char" where kana are among them.
    """
    letters = [c for c in "".join(references) if c.isalpha()]
    kana = sum("\u3040" <= c <= "\u30ff" for c in letters)
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    if 2 * (kana + chinese) <= len(letters):
        return "13a"
    return "char" if 10 * kana > chinese else "zh"


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False, tokenize: str = "13a"
) -> CorpusScore:
    """Corpus BLEU of detokenised text against one reference each (Papineni et al. 2002), by sacreBLEU.

    BP exp(¼ Σ_{n=1..4} log p_n), with p_n the clipped share of n-grams that are in the reference, and
    exponential smoothing of those that are 0. tokenize: 13a, or "zh" and others that sacreBLEU knows.
    Raises ValueError where the lists differ in length or are empty.
    """
    from sacrebleu.metrics import BLEU

    _check(hypotheses, references)
    metric = BLEU(lowercase=lowercase, tokenize=tokenize)
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return CorpusScore(score.score, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Corpus chrF2: the F-score of character n-grams, n = 1 ... 6, recall weighing twice (Popović 2015).

    Raises ValueError where the lists differ in length or are empty.
    """
    from sacrebleu.metrics import CHRF

    _check(hypotheses, references)
    metric = CHRF()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return CorpusScore(score.score, str(metric.get_signature()))


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The share of hypotheses that equal their reference, in [0, 1].

    Raises ValueError where the lists differ in length or are empty.
    """
    _check(hypotheses, references)
    return sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(hypotheses)
