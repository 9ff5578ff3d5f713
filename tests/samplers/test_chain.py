import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.samplers.chain import normal, run_chain, run_chain_with_history, sample_in_batches
from jaxgen.types import Chain, UserError


def random_walk(num_steps, step=None):
    """x <- 0.9 x + x_n noise, a chain whose steps differ."""
    return Chain(
        init=normal,
        step=step or (lambda keys, x, scale: 0.9 * x + scale * normal(keys, x.shape[1:])),
        xs=jnp.linspace(0.1, 1.0, num_steps),
        finish=lambda x: 2.0 * x,
    )


def by_hand(chain, key, index, shape):
    """The same as a Python loop for one sample: finish of every state."""
    sample_key = jax.random.fold_in(key, index)
    states = [chain.init(jax.random.fold_in(sample_key, 0)[None], shape)]
    for number, x in enumerate(chain.xs, start=1):
        states.append(chain.step(jax.random.fold_in(sample_key, number)[None], states[-1], x))
    return np.stack([np.asarray(chain.finish(state))[0] for state in states])


def test_run_chain_is_the_loop_it_stands_for():
    chain, key = random_walk(7), jax.random.key(3)
    samples = run_chain(chain, key, jnp.array([5, 0]), (2, 3))
    chex.assert_shape(samples, (2, 2, 3))
    expected = np.stack([by_hand(chain, key, i, (2, 3))[-1] for i in (5, 0)])
    # The scan fuses differently from the loop: float32 rounding of values of order 1.
    np.testing.assert_allclose(samples, expected, atol=2e-6)


@pytest.mark.parametrize("num_frames", [2, 3, 5, 8])
def test_history_holds_equally_spaced_states(num_frames):
    chain, key, indices = random_walk(7), jax.random.key(3), jnp.array([4, 9])
    samples, frames = run_chain_with_history(chain, key, indices, (3,), num_frames)
    chex.assert_shape(frames, (num_frames, 2, 3))
    states = np.stack([by_hand(chain, key, i, (3,)) for i in (4, 9)], axis=1)
    picked = np.round(np.linspace(0, 7, num_frames)).astype(int)
    np.testing.assert_allclose(frames, states[picked], atol=2e-6)
    chex.assert_trees_all_equal(samples, frames[-1])
    np.testing.assert_allclose(samples, run_chain(chain, key, indices, (3,)), atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch():
    chain, key = random_walk(5), jax.random.key(0)
    run = jax.jit(lambda indices: run_chain(chain, key, indices, (4,)))
    together = run(jnp.arange(9))
    for i in (0, 3, 8):
        np.testing.assert_allclose(run(jnp.array([i]))[0], together[i], atol=1e-6)
    np.testing.assert_allclose(run(jnp.array([8, 2]))[0], together[8], atol=1e-6)


def test_samples_steps_and_keys_draw_different_noise():
    recorded = Chain(
        init=lambda keys, shape: jnp.zeros((len(keys), 6)).at[:, 0].set(normal(keys, ())),
        step=lambda keys, x, n: x.at[:, n].set(normal(keys, ())),
        xs=jnp.arange(1, 6),
        finish=lambda x: x,
    )
    draws = [run_chain(recorded, jax.random.key(seed), jnp.arange(500), ()) for seed in (0, 1)]
    values = np.asarray(jnp.concatenate(draws, axis=1))  # [500, 12]: 2 keys x (initial state and 5 steps)
    # Equal draws would give a correlation of 1; 4 standard errors of a correlation of 500 pairs.
    correlation = np.corrcoef(values.T) - np.eye(12)
    assert np.abs(correlation).max() < 4 / np.sqrt(500)


def test_the_step_is_traced_once_and_the_program_does_not_grow():
    @chex.assert_max_traces(n=1)
    def step(keys, x, scale):
        return x + scale * normal(keys, x.shape[1:])

    run = jax.jit(lambda key, indices: run_chain(random_walk(200, step), key, indices, (2,)))
    run(jax.random.key(0), jnp.arange(3))
    run(jax.random.key(1), jnp.arange(3))

    def size(num_steps, sample):
        jaxpr = jax.make_jaxpr(lambda key, indices: sample(random_walk(num_steps), key, indices, (2,)))
        return len(str(jaxpr(jax.random.key(0), jnp.arange(3))).splitlines())

    for sample in (run_chain, functools.partial(run_chain_with_history, num_frames=4)):
        assert size(10, sample) == size(1000, sample)


def test_sample_in_batches_compiles_once_and_gives_what_one_batch_gives():
    chain, key = random_walk(3), jax.random.key(0)
    chex.clear_trace_counter()
    sample = jax.jit(chex.assert_max_traces(lambda indices: run_chain(chain, key, indices, (2,)), n=1))
    seen = []
    samples = sample_in_batches(sample, 10, 4, progress=lambda done, total: seen.append((done, total)))
    assert isinstance(samples, np.ndarray)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    np.testing.assert_allclose(samples, run_chain(chain, key, jnp.arange(10), (2,)), atol=1e-6)
    assert sample_in_batches(sample, 2, 4).shape == (2, 2)
    assert sample_in_batches(sample, 8, 4).shape == (8, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_in_batches(lambda i: i, 0, 4), "must be at least 1"),
        (lambda: sample_in_batches(lambda i: i, 4, 0), "must be at least 1"),
        (
            lambda: run_chain_with_history(random_walk(4), jax.random.key(0), jnp.arange(2), (), 1),
            "2 to 5 frames",
        ),
        (
            lambda: run_chain_with_history(random_walk(4), jax.random.key(0), jnp.arange(2), (), 6),
            "2 to 5 frames",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
