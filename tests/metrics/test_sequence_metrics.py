"""Scores of text against closed forms and hand counts."""

import math

import pytest

from jaxgen.metrics import sequences


def test_uniform_model_has_the_vocabulary_as_perplexity():
    assert sequences.perplexity(30 * math.log(7), 30) == pytest.approx(7)
    # The same text as 10 words: 7^3 a word.
    assert sequences.perplexity(30 * math.log(7), 10) == pytest.approx(343)
    assert sequences.perplexity(1e9, 1) == math.inf
    with pytest.raises(ValueError, match="at least one"):
        sequences.perplexity(1.0, 0)


def test_bits_per_character_of_a_uniform_byte():
    assert sequences.bits_per_character(5 * math.log(256), 5) == pytest.approx(8)
    with pytest.raises(ValueError, match="at least one"):
        sequences.bits_per_character(1.0, 0)


def test_bleu_by_hand():
    hypothesis, reference = "the cat sat on a mat", "the cat sat on the mat"
    # n-grams of the hypothesis in the reference: 5 of 6, 3 of 5, 2 of 4, 1 of 3; equal length: no penalty.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    score = sequences.bleu([hypothesis], [reference])
    assert score.value == pytest.approx(expected)
    assert "tok:13a" in score.signature
    assert "version:" in score.signature
    # A hypothesis of 5 words, all right, of a reference of 6: only the brevity penalty is left.
    short = sequences.bleu(["the cat sat on the"], [reference])
    assert short.value == pytest.approx(100 * math.exp(1 - 6 / 5))
    assert sequences.bleu(["THE CAT SAT ON THE MAT"], [reference], lowercase=True).value == pytest.approx(100)


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [
        (["A man rides a bicycle.", "Ein Mann fährt Rad."], "13a"),
        (["Мужчина едет на велосипеде.", "12 + 3"], "13a"),
        (["一個男人騎自行車。", "我喜歡你。"], "zh"),
        (["男の人が自転車に乗っている。"], "char"),
        (["", "..."], "13a"),
    ],
)
def test_bleu_splits_as_the_script_does(texts, tokenizer):
    assert sequences.bleu_tokenizer(texts) == tokenizer


def test_bleu_of_chinese():
    """13a finds a word a sentence, so no two in a row."""
    texts = ["我喜歡你。", "一個男人騎自行車。"]
    assert sequences.bleu(texts, texts).value == 0
    found = sequences.bleu(texts, texts, tokenize=sequences.bleu_tokenizer(texts))
    assert found.value == pytest.approx(100)
    assert "tok:zh" in found.signature


def test_chrf_ends():
    assert sequences.chrf(["abc def"], ["abc def"]).value == pytest.approx(100)
    assert sequences.chrf(["xyz"], ["abc"]).value == 0
    assert (
        "chrF2" in sequences.chrf(["a"], ["a"]).signature or "nc:6" in sequences.chrf(["a"], ["a"]).signature
    )


def test_exact_match():
    assert sequences.exact_match(["a", "b", "c", "d"], ["a", "b", "x", "D"]) == 0.5


@pytest.mark.parametrize("score", [sequences.bleu, sequences.chrf, sequences.exact_match])
def test_lists_must_match(score):
    with pytest.raises(ValueError, match="as many references"):
        score(["a"], [])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
