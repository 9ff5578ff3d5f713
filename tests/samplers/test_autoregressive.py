"""Decoding with a table as the network: logit functions, chains, and beam search against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.samplers.autoregressive import (
    apply_temperature,
    chooser,
    decode_chain,
    draw_token,
    first_largest,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from jaxgen.samplers.beam import beam_search, length_penalty_of, repeat_rows
from jaxgen.samplers.chain import run_chain
from jaxgen.types import UserError

V, EOS, PAD = 4, 1, 0
P = jnp.array([0.1, 0.4, 0.3, 0.2])


def table_network(seed):
    """A language model that is a table of the last two tokens and the position; the cache is the last."""
    table = jax.random.normal(jax.random.key(seed), (V + 1, V + 1, 12, V)) * 1.5
    rows = lambda tokens, n: jnp.take_along_axis(tokens, jnp.maximum(n, 0)[:, None], 1)[:, 0]

    def prefill(tokens, lengths):
        last = rows(tokens, lengths - 1)
        before = jnp.where(lengths > 1, rows(tokens, lengths - 2), V)
        return table[before, last, lengths - 1], last

    def step(last, token, position):
        return table[last, token, position], token

    return table, prefill, step


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits))).tolist()


def test_logit_functions_by_hand():
    logits = jnp.log(P)
    assert [kept(keep_top_k(logits, k)) for k in (1, 2, 4, 9)] == [[1], [1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [kept(keep_top_p(logits, p)) for p in (1e-6, 0.39, 0.41, 0.71, 0.91, 1.0)] == [
        [1],
        [1],
        [1, 2],
        [1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert [kept(keep_min_p(logits, p)) for p in (0.2, 0.3, 0.6, 1.0)] == [
        [0, 1, 2, 3],
        [1, 2, 3],
        [1, 2],
        [1],
    ]
    np.testing.assert_allclose(
        jax.nn.softmax(apply_temperature(logits, 0.5)), P**2 / jnp.sum(P**2), rtol=1e-5
    )
    penalized = penalize_repetition(jnp.array([[2.0, -2.0, 3.0]]), jnp.array([[True, True, False]]), 2.0)
    np.testing.assert_array_equal(penalized, [[1.0, -4.0, 3.0]])
    batched = keep_top_p(jnp.stack([logits, logits[::-1]]), 0.5)
    assert (kept(batched[0]), kept(batched[1])) == ([1, 2], [1, 2])
    # Of equals the lower numbers, and no more of them than are needed.
    assert [kept(keep_top_p(jnp.array([0.0, 2.0, 2.0, 2.0]), p)) for p in (0.3, 0.6)] == [[1], [1, 2]]


def test_first_largest_is_argmax():
    x = jax.random.randint(jax.random.key(0), (300, 7), 0, 4).astype(jnp.float32)
    x = x.at[0].set(-jnp.inf).at[1, 3].set(jnp.inf)
    np.testing.assert_array_equal(jax.jit(first_largest)(x), jnp.argmax(x, axis=-1))


def test_a_token_is_drawn_as_jax_draws_it():
    """The same noise on the same logits, also where most tokens are ruled out."""
    logits = jnp.where(jnp.arange(50) % 3 > 0, jnp.sin(jnp.arange(50.0)), -jnp.inf)
    drawn, wanted = (
        jax.vmap(draw, (0, None))(jax.random.split(jax.random.key(0), 400), logits)
        for draw in (draw_token, jax.random.categorical)
    )
    np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / jnp.sum(P**2)),
        ({"top_k": 2}, jnp.array([0, 4, 3, 0]) / 7),
        ({"top_p": 0.75}, jnp.array([0, 4, 3, 2]) / 9),
        ({"min_p": 0.6}, jnp.array([0, 4, 3, 0]) / 7),
        (
            {"top_k": 3, "top_p": 0.5},
            jnp.array([0, 4, 3, 0]) / 7,
        ),  # of 4/9, 3/9 and 2/9 the first two reach it
        ({"temperature": 0.0}, jnp.array([0.0, 1.0, 0.0, 0.0])),
    ],
)
def test_frequencies_of_the_chosen_tokens(settings, expected):
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    tokens = jax.jit(chooser(**settings))(keys, jnp.broadcast_to(jnp.log(P), (n, V)))
    share = np.bincount(np.asarray(tokens), minlength=V) / n
    error = np.sqrt(np.asarray(expected * (1 - expected)) / n)
    assert np.all(np.abs(share - expected) <= 4.5 * error)  # exactly zero where the probability is


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}]
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="top_p"):
        chooser(**settings)


PROMPT, LENGTHS = jnp.array([[2, 3, 0], [3, 0, 0], [2, 2, 3]]), jnp.array([2, 1, 3])


def decode(indices, num=8, prompt=PROMPT, lengths=LENGTHS, seed=0, **fields):
    _, prefill, step = table_network(seed)
    fields = {"choose": chooser(), "eos": EOS, "pad": PAD} | fields
    chain = decode_chain(prefill, step, prompt, lengths, max_new_tokens=num, **fields)
    run = jax.jit(lambda key: run_chain(chain, key, jnp.asarray(indices), (num,)))
    return np.asarray(run(jax.random.key(5)))


def test_greedy_is_the_loop_written_out():
    table, *_ = table_network(0)
    made = decode([0, 1, 2], choose=chooser(temperature=0.0))
    for row in range(3):
        tokens = [V, *np.asarray(PROMPT[row, : LENGTHS[row]])]
        for n in range(8):
            if EOS in tokens[1 + int(LENGTHS[row]) :]:
                assert made[row, n] == PAD
                continue
            token = int(jnp.argmax(table[tokens[-2], tokens[-1], len(tokens) - 2]))
            assert made[row, n] == token
            tokens.append(token)


def test_a_sample_does_not_depend_on_its_batch():
    together = decode([4, 7, 9])
    for row, index in enumerate([4, 7, 9]):
        # Alone, and with its prompt less padded.
        width = int(LENGTHS[row])
        alone = decode([index], prompt=PROMPT[row : row + 1, :width], lengths=LENGTHS[row : row + 1])
        np.testing.assert_array_equal(alone[0], together[row])
    assert not np.array_equal(decode([4, 8, 9])[1], together[1])


def test_the_end_is_kept_padded_and_ends_the_calls():
    calls = []
    _, prefill, step = table_network(0)

    def counted(cache, token, position):
        jax.debug.callback(lambda: calls.append(1), ordered=True)
        return step(cache, token, position)

    never = lambda forbidden: (
        lambda keys, logits: chooser(temperature=0.0)(keys, logits.at[:, forbidden].set(-jnp.inf))
    )
    at_once = lambda keys, logits: jnp.full(len(logits), EOS, jnp.int32)
    for choose, expected in ((at_once, 0), (never(EOS), 7)):
        calls.clear()
        chain = decode_chain(
            prefill, counted, PROMPT, LENGTHS, max_new_tokens=8, choose=choose, eos=EOS, pad=PAD
        )
        made = jax.jit(lambda key: run_chain(chain, key, jnp.arange(3), (8,)))(jax.random.key(0))
        jax.effects_barrier()
        assert len(calls) == expected
        ends = np.asarray(made) == EOS
        assert ends[:, 0].all() == (expected == 0)
        assert not ends[:, 1:].any()
    assert decode([0, 1, 2], num=1).shape == (3, 1)
    # With no end asked for, eos is a token like any other.
    assert (decode(range(3), num=12, eos=None, choose=at_once) == EOS).all()


def test_repetition_penalty_sees_prompt_and_output():
    table, *_ = table_network(0)
    settings = {"num": 6, "eos": None, "choose": chooser(temperature=0.0)}
    made = decode([0, 1, 2], repetition_penalty=3.0, **settings)
    for row in range(3):
        tokens = [V, *np.asarray(PROMPT[row, : LENGTHS[row]]).tolist()]
        for n in range(6):
            logits = np.array(table[tokens[-2], tokens[-1], len(tokens) - 2])
            for seen in set(tokens[1:]):
                logits[seen] = logits[seen] / 3 if logits[seen] > 0 else logits[seen] * 3
            tokens.append(int(np.argmax(logits)))
            assert made[row, n] == tokens[-1]
    assert not np.array_equal(made, decode([0, 1, 2], **settings))
    with pytest.raises(UserError, match="penalty"):
        decode([0, 1, 2], repetition_penalty=0.0)


def brute_force(table, prompt, num, alpha):
    """All continuations of a prompt, ended by EOS or cut at `num`, best first: [(score, tokens)]."""
    found = []

    def grow(tokens, made, log_p):
        if made and (made[-1] == EOS or len(made) == num):
            found.append((log_p / float(length_penalty_of(len(made), alpha)), made))
            return
        logits = table[tokens[-2], tokens[-1], len(tokens) - 2]
        for token, value in enumerate(logits - np.log(np.sum(np.exp(logits)))):
            grow([*tokens, token], [*made, token], log_p + value)

    grow([V, *prompt], [], 0.0)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("early_stop", [True, False])
def test_beam_search_is_exhaustive_search(alpha, early_stop):
    num, beam = 4, V**4  # room for every continuation
    table, prefill, step = table_network(3)
    search = jax.jit(
        lambda: beam_search(
            prefill,
            step,
            PROMPT,
            LENGTHS,
            beam=beam,
            max_new_tokens=num,
            eos=EOS,
            pad=PAD,
            length_penalty=alpha,
            early_stop=early_stop,
        )
    )
    found = search()
    for row in range(3):
        every = brute_force(
            np.asarray(table, np.float64), np.asarray(PROMPT[row, : LENGTHS[row]]).tolist(), num, alpha
        )
        assert len(every) == sum(3**n for n in range(num)) + 3**num
        scores = np.array([score for score, _ in every])
        np.testing.assert_allclose(found.scores[row, : len(every)], scores, atol=1e-4)
        assert np.all(np.isneginf(found.scores[row, len(every) :]))
        best = every[0][1]
        assert int(found.lengths[row, 0]) == len(best)
        assert found.tokens[row, 0].tolist() == best + [PAD] * (num - len(best))
        assert len({tuple(t) for t in found.tokens[row, : len(every)].tolist()}) == len(every)


def test_a_narrow_beam_is_the_same_with_and_without_early_stop_and_beam_1_is_greedy():
    _, prefill, step = table_network(3)
    search = lambda beam, **fields: jax.jit(
        lambda: beam_search(
            prefill, step, PROMPT, LENGTHS, beam=beam, max_new_tokens=8, eos=EOS, pad=PAD, **fields
        )
    )()
    for alpha in (0.0, 1.0):
        one, other = (search(3, length_penalty=alpha, early_stop=early) for early in (True, False))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert bool(jnp.all(one.scores[:, :-1] >= one.scores[:, 1:]))
    # Beam 1 without the choice to end is greedy.
    table, prefill, step = table_network(4)
    no_end = lambda logits: logits.at[:, EOS].set(-1e9)
    found = beam_search(
        lambda t, n: (no_end(prefill(t, n)[0]), prefill(t, n)[1]),
        lambda c, t, p: (no_end(step(c, t, p)[0]), step(c, t, p)[1]),
        PROMPT,
        LENGTHS,
        beam=1,
        max_new_tokens=5,
        eos=EOS,
    )
    for row in range(3):
        tokens = [V, *np.asarray(PROMPT[row, : LENGTHS[row]]).tolist()]
        for _ in range(5):
            logits = np.array(table[tokens[-2], tokens[-1], len(tokens) - 2])
            logits[EOS] = -np.inf
            tokens.append(int(np.argmax(logits)))
        assert found.tokens[row, 0].tolist() == tokens[-5:]


def test_beams_with_an_expensive_cache_follow_their_parents():
    # A cache that holds all tokens read: after the search each live row's cache must be its own history.
    def prefill(tokens, lengths):
        return jnp.zeros((len(tokens), V)).at[:, 2].set(1.0), jnp.zeros((len(tokens), 6))

    def step(cache, token, position):
        cache = cache.at[jnp.arange(len(token)), position].set(token.astype(jnp.float32))
        total = jnp.sum(cache * (10.0 ** jnp.arange(6))[None], axis=1)
        logits = jnp.sin(total[:, None] * jnp.arange(1.0, V + 1)[None])  # depends on the whole history
        return logits, cache

    found = beam_search(prefill, step, jnp.array([[2]]), jnp.array([1]), beam=81, max_new_tokens=3, eos=EOS)

    def log_p(tokens):
        logits, cache = prefill(jnp.array([[2]]), jnp.array([1]))
        total = 0.0
        for n, token in enumerate(tokens):
            total += float(jax.nn.log_softmax(logits)[0, token])
            logits, cache = step(cache, jnp.array([token]), jnp.array([1 + n]))
        return total

    for rank in (0, 1, 5, 11):
        tokens = found.tokens[0, rank, : int(found.lengths[0, rank])].tolist()
        assert float(found.scores[0, rank]) == pytest.approx(log_p(tokens), abs=1e-4)
    open_ended = sum(EOS not in t for t in itertools.product(range(V), repeat=3))
    assert int(jnp.sum(jnp.isfinite(found.scores))) == 1 + 3 + 9 + open_ended


def test_bad_searches_are_refused_and_rows_repeat():
    _, prefill, step = table_network(0)
    for fields in ({"beam": 0}, {"max_new_tokens": 0}, {"length_penalty": -1.0}, {"eos": V}):
        with pytest.raises(UserError):
            beam_search(
                prefill, step, PROMPT, LENGTHS, **({"beam": 2, "max_new_tokens": 2, "eos": EOS} | fields)
            )
    with pytest.raises(UserError, match="max_new_tokens"):
        decode([0, 1, 2], num=0)
    tree = repeat_rows({"a": jnp.array([1, 2]), "b": jnp.array(3)}, 2)
    assert (tree["a"].tolist(), int(tree["b"])) == ([1, 1, 2, 2], 3)
