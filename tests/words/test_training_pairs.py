import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.types import UserError
from jaxgen.words import training_pairs
from jaxgen.words.one_hot import look_up, one_hot
from jaxgen.words.sentences import pack

FOX = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
# Printed in the lecture, window 2, up to the centre word "fox".
PRINTED = """the quick, the brown, quick the, quick brown, quick fox, brown the, brown quick, brown fox,
brown jumps, fox quick, fox brown, fox jumps, fox over"""
MATRIX = jnp.asarray([[17, 24, 1], [23, 5, 7], [4, 6, 13], [10, 12, 19], [11, 18, 25]], jnp.float32)


def test_motel_and_hotel_are_orthogonal():
    # The lecture's vectors of 15 words: motel is word 10 and hotel word 7.
    motel, hotel = one_hot(jnp.asarray([10, 7]), 15)
    assert motel.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert hotel.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert float(motel @ hotel) == 0
    np.testing.assert_array_equal(one_hot(jnp.arange(15), 15) @ one_hot(jnp.arange(15), 15).T, np.eye(15))


def test_one_hot_times_matrix_is_a_row_look_up():
    row = one_hot(jnp.asarray(3), 5)
    assert row.tolist() == [0, 0, 0, 1, 0]
    assert (row @ MATRIX).tolist() == [10, 12, 19]
    assert look_up(MATRIX, jnp.asarray(3)).tolist() == [10, 12, 19]
    tokens = jnp.asarray([[0, 4, 4], [-1, 5, 2]])
    np.testing.assert_array_equal(look_up(MATRIX, tokens), one_hot(tokens, 5) @ MATRIX)


def test_the_gradient_of_a_look_up_falls_on_its_row():
    gradient = jax.grad(lambda m: look_up(m, jnp.asarray(3)) @ jnp.asarray([1.0, 2.0, 3.0]))(MATRIX)
    np.testing.assert_array_equal(gradient, np.outer([0, 0, 0, 1, 0], [1, 2, 3]))


def test_the_lecture_s_pairs():
    tokens, starts = pack([range(len(FOX))])
    pairs = training_pairs.skip_gram_pairs(tokens, starts, 2)
    assert pairs.dtype == np.int32
    words = [f"{FOX[a]} {FOX[b]}" for a, b in pairs]
    printed = [pair.strip() for pair in PRINTED.replace("\n", " ").split(",")]
    assert words[: len(printed)] == printed
    # Ten centres with four neighbours each, but for three missing at either end.
    assert len(words) == 10 * 4 - 6


def brute_force(sentences, radius):
    found, t = [], 0
    for s in sentences:
        for place, centre in enumerate(s):
            near = range(max(place - radius[t], 0), min(place + radius[t] + 1, len(s)))
            found += [(centre, s[other]) for other in near if other != place]
            t += 1
    return np.asarray(found).reshape(-1, 2)


def test_pairs_against_a_loop():
    rng = np.random.default_rng(0)
    sentences = [rng.integers(0, 20, n).tolist() for n in (5, 0, 1, 9, 2, 0)]
    tokens, starts = pack(sentences)
    np.testing.assert_array_equal(
        training_pairs.skip_gram_pairs(tokens, starts, 3), brute_force(sentences, np.full(len(tokens), 3))
    )
    radius = rng.integers(0, 5, len(tokens))
    np.testing.assert_array_equal(
        training_pairs.skip_gram_pairs(tokens, starts, radius), brute_force(sentences, radius)
    )
    assert training_pairs.skip_gram_pairs(*pack([]), 2).shape == (0, 2)


def test_dynamic_windows_weigh_neighbours_by_distance():
    windows = np.asarray(training_pairs.dynamic_windows(jax.random.key(0), 20_000, 5))
    assert set(windows) == {1, 2, 3, 4, 5}
    for distance in range(1, 6):
        p = (5 - distance + 1) / 5
        # Four standard errors of a share.
        assert abs(np.mean(windows >= distance) - p) <= 4 * np.sqrt(p * (1 - p) / len(windows))


def test_subsampling_of_words_whose_share_is_known():
    counts = np.asarray([900, 90, 9, 1, 0])
    paper = training_pairs.subsampling_keep_probability(counts, 0.009)
    np.testing.assert_allclose(paper, [0.1, np.sqrt(0.1), 1, 1, 1], rtol=1e-12)
    program = training_pairs.word2vec_keep_probability(counts, 0.009)
    np.testing.assert_allclose(program, [0.11, np.sqrt(0.1) + 0.1, 1, 1, 1], rtol=1e-12)


def test_subsample_keeps_each_word_at_its_rate():
    keep = jnp.asarray([0.1, 0.5, 1.0])
    tokens = jnp.tile(jnp.arange(3), 8000)
    kept = np.asarray(training_pairs.subsample(jax.random.key(1), tokens, keep))
    for word, p in enumerate([0.1, 0.5, 1.0]):
        assert abs(kept[word::3].mean() - p) <= 4 * np.sqrt(p * (1 - p) / 8000)  # four standard errors


def test_what_cannot_be_done_is_said():
    with pytest.raises(UserError, match="negative"):
        training_pairs.skip_gram_pairs(*pack([[0, 1]]), -1)
    with pytest.raises(UserError, match="at least 1"):
        training_pairs.dynamic_windows(jax.random.key(0), 3, 0)
    with pytest.raises(UserError, match="threshold"):
        training_pairs.subsampling_keep_probability(np.ones(3), 0.0)
