"""Hidden Markov models against the sum over every path, exactly; the parallel scan against the sequential."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.estimators import families, hmm
from jaxgen.types import UserError

K, T = 3, 5
LENGTHS = np.array([5, 3, 1, 0])
MASK = np.arange(T)[None, :] < LENGTHS[:, None]
rng = np.random.default_rng(0)
KINDS = {
    "categorical": (families.categorical(4), rng.integers(0, 4, (4, T))),
    "gaussian": (families.GAUSSIAN_DIAGONAL, rng.normal(size=(4, T, 2)).astype(np.float32)),
    "gaussian_full": (families.GAUSSIAN_FULL, rng.normal(size=(4, T, 2)).astype(np.float32)),
}
STATES = rng.integers(0, K, (4, T))
SMOOTHING = 0.1  # a pseudo-count and a least variance, so that no probability is zero


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    family, x = KINDS[request.param]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING, state_smoothing=0.5)
    return family, model, x


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def enumerate_paths(family, model, x, length):
    """(paths [K^length, length], their log p(path, x)) in float64, from the definition alone."""
    log_initial, log_transition = (np.asarray(a, np.float64) for a in model[:2])
    likelihood = np.asarray(family.log_likelihood(model.emissions, jnp.asarray(x, jnp.float32)), np.float64)
    paths = np.array(list(itertools.product(range(K), repeat=length)))
    joint = log_initial[paths[:, 0]] + likelihood[np.arange(length), paths].sum(1)
    return paths, joint + log_transition[paths[:, :-1], paths[:, 1:]].sum(1)


@pytest.mark.parametrize("parallel", [False, True])
def test_everything_agrees_with_the_sum_over_all_paths(case, parallel):
    """243 paths at most, float64; ragged lengths 5, 3, 1 and 0; float32 to 1e-4 nats."""
    family, model, x = case
    log_prob = hmm.log_prob(family, model, x, MASK, parallel=parallel)
    posterior = hmm.posterior(family, model, x, MASK, parallel=parallel)
    viterbi, best = hmm.predict(family, model, x, MASK)
    np.testing.assert_allclose(posterior.log_prob, log_prob, atol=1e-5)
    assert finite((log_prob, posterior, best))
    assert abs(float(log_prob[3])) < 1e-5
    assert float(jnp.abs(posterior.transitions[2:]).max()) == 0.0
    for b in range(3):
        length = LENGTHS[b]
        paths, joint = enumerate_paths(family, model, x[b, :length], length)
        evidence = np.logaddexp.reduce(joint)
        np.testing.assert_allclose(log_prob[b], evidence, atol=1e-4)
        weight = np.exp(joint - evidence)  # row P2: the joint, normalised, is the conditional
        gamma = np.stack([(weight[:, None] * (paths == k)).sum(0) for k in range(K)], -1)
        np.testing.assert_allclose(jnp.exp(posterior.log_gamma[b, :length]), gamma, atol=1e-4)
        moves = np.zeros((K, K))
        for t in range(length - 1):
            np.add.at(moves, (paths[:, t], paths[:, t + 1]), weight)
        np.testing.assert_allclose(posterior.transitions[b], moves, atol=1e-4)
        np.testing.assert_array_equal(viterbi[b, :length], paths[joint.argmax()])
        np.testing.assert_array_equal(viterbi[b, length:], viterbi[b, length - 1])
        np.testing.assert_allclose(best[b], joint.max(), atol=1e-4)


def test_log_joint_is_the_definition(case):
    family, model, x = case
    ours = hmm.log_joint(family, model, STATES, x, MASK)
    for b in range(3):
        paths, joint = enumerate_paths(family, model, x[b, : LENGTHS[b]], LENGTHS[b])
        index = np.flatnonzero((paths == STATES[b, : LENGTHS[b]]).all(1))[0]
        np.testing.assert_allclose(ours[b], joint[index], atol=1e-4)
    assert ours[3] == 0.0
    path, best = hmm.predict(family, model, x, MASK)
    np.testing.assert_allclose(hmm.log_joint(family, model, path, x, MASK), best, atol=1e-4)


def test_categorical_sequences_sum_to_one_over_everything():
    family, x = KINDS["categorical"]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING, state_smoothing=0.5)
    everything = np.array(list(itertools.product(range(4), repeat=3)))
    np.testing.assert_allclose(jnp.exp(hmm.log_prob(family, model, everything)).sum(), 1, rtol=1e-5)


def test_one_baum_welch_step_is_the_expected_counts_over_all_paths():
    """pi, A and B from 243 enumerated paths a sequence, in float64."""
    family, x = KINDS["categorical"]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING, state_smoothing=0.5)
    first, moves, table = np.zeros(K), np.zeros((K, K)), np.zeros((K, 4))
    for b in range(3):
        paths, joint = enumerate_paths(family, model, x[b, : LENGTHS[b]], LENGTHS[b])
        weight = np.exp(joint - np.logaddexp.reduce(joint))
        np.add.at(first, paths[:, 0], weight)
        for t in range(LENGTHS[b]):
            np.add.at(table, (paths[:, t], x[b, t]), weight)
            if t:
                np.add.at(moves, (paths[:, t - 1], paths[:, t]), weight)
    stepped = hmm.fit_em(family, model, x, MASK, smoothing=0.0, max_steps=1).params
    np.testing.assert_allclose(jnp.exp(stepped.log_initial), first / first.sum(), atol=1e-4)
    np.testing.assert_allclose(
        jnp.exp(stepped.log_transition), moves / moves.sum(1, keepdims=True), atol=1e-4
    )
    table /= table.sum(1, keepdims=True)
    np.testing.assert_allclose(jnp.exp(stepped.emissions.log_prob), table, atol=1e-4)


def test_baum_welch_never_falls_and_the_parallel_one_is_the_same(case):
    """Rounding of float32 in a mean of order 1: 2e-6 a step."""
    family, model, x = case
    fits = [
        hmm.fit_em(
            family, model, x, MASK, smoothing=SMOOTHING, max_steps=10, tolerance=-1.0, parallel=parallel
        )
        for parallel in (False, True)
    ]
    objective = np.asarray(fits[0].objective, np.float64)
    assert fits[0].num_steps == 10
    assert np.all(np.diff(objective) > -2e-6)
    assert objective[-1] > objective[0] + 0.05
    np.testing.assert_allclose(fits[1].objective, objective, atol=1e-3)
    log_prob = hmm.log_prob(family, fits[0].params, x, MASK).sum()
    log_prior = family.log_prior(fits[0].params.emissions, SMOOTHING)
    np.testing.assert_allclose(objective[-1], (log_prob + log_prior) / LENGTHS.sum(), rtol=1e-5)


def test_supervised_counts_by_hand():
    x, state = np.array([[0, 1, 1], [1, 0, 0]]), np.array([[0, 0, 1], [1, 1, 0]])
    model = hmm.fit(families.categorical(2), x, state, 2, np.array([[1, 1, 1], [1, 1, 0]]), smoothing=0.0)
    np.testing.assert_allclose(jnp.exp(model.log_initial), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(model.log_transition), [[0.5, 0.5], [0.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(model.emissions.log_prob), [[0.5, 0.5], [1 / 3, 2 / 3]], rtol=1e-5)


def test_parallel_equals_sequential_on_a_long_sequence_that_underflows():
    """2,000 steps with a log-probability near -2,800: exp of it is 0 even in float64. Float32 sums: 1e-4 of
    it.
    """
    family, x = KINDS["categorical"]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING, state_smoothing=0.5)
    _, x = hmm.sample(family, model, jax.random.key(0), 1, 2000)
    sequential = hmm.posterior(family, model, x)
    parallel = hmm.posterior(family, model, x, parallel=True)
    assert sequential.log_prob[0] < -1000
    np.testing.assert_allclose(parallel.log_prob, sequential.log_prob, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(parallel.log_gamma), jnp.exp(sequential.log_gamma), atol=2e-3)
    np.testing.assert_allclose(sequential.transitions.sum(), 1999, rtol=1e-3)


def test_many_features_leave_float32_digits_for_the_differences_between_states():
    """2,000 steps whose log p, near -180,000 in all, has a float32 spacing of 0.016; gammas and path against
    float64 from the same likelihoods.
    """
    family, num, dim = families.GAUSSIAN_DIAGONAL, 2000, 64
    state = rng.integers(0, K, (1, num))
    x = (0.1 * state[:, :, None] + rng.normal(size=(1, num, dim))).astype(np.float32)
    model = hmm.fit(family, x, state, K, smoothing=1e-3, state_smoothing=1.0)
    likelihood = np.asarray(family.log_likelihood(model.emissions, x[0]), np.float64)
    log_initial, log_transition = (np.asarray(a, np.float64) for a in model[:2])
    best = alpha = log_initial + likelihood[0]
    alphas, back = [alpha], []
    for row in likelihood[1:]:
        arrivals = best[:, None] + log_transition
        back.append(arrivals.argmax(0))
        best = arrivals.max(0) + row
        alpha = np.logaddexp.reduce(alpha[:, None] + log_transition, axis=0) + row
        alphas.append(alpha)
    path, betas = [best.argmax()], [np.zeros(K)]
    for came_from, row in zip(back[::-1], likelihood[:0:-1], strict=True):
        path.append(came_from[path[-1]])
        betas.append(np.logaddexp.reduce(log_transition + row + betas[-1], axis=1))
    gamma = np.exp(np.stack(alphas) + np.stack(betas[::-1]) - np.logaddexp.reduce(alpha))
    ours, log_joint = hmm.predict(family, model, x)
    np.testing.assert_array_equal(ours[0], path[::-1])
    np.testing.assert_allclose(log_joint, best.max(), rtol=1e-6)
    for parallel in (False, True):
        posterior = hmm.posterior(family, model, x, parallel=parallel)
        np.testing.assert_allclose(jnp.exp(posterior.log_gamma[0]), gamma, atol=2e-4)
        np.testing.assert_allclose(posterior.log_prob, np.logaddexp.reduce(alpha), rtol=1e-6)


def test_what_is_impossible_has_probability_zero():
    """State 0 alone is possible and gives 0 alone: of 0 0 0 the log p is 0, of 0 1 0 it is -inf."""
    family, never = families.categorical(2), jnp.log(jnp.eye(2))
    model = hmm.fit(family, [[0]], [[0]], 2, smoothing=0.0)
    model = hmm.HMM(never[0], never, model.emissions._replace(log_prob=never))
    x = np.array([[0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(hmm.predict(family, model, x)[1], [0.0, -np.inf])
    np.testing.assert_array_equal(hmm.log_prob(family, model, x, parallel=True), [0.0, -np.inf])
    np.testing.assert_array_equal(hmm.posterior(family, model, x[:1], parallel=True).log_gamma[0, :, 0], 0.0)


def test_zero_counts_constant_features_and_unused_states_stay_finite():
    """State 2 is never seen and feature 1 never changes; transitions that were never seen are zero."""
    features = np.array([[[0.0, 5.0], [0.0, 5.0], [1.0, 5.0]]] * 2, np.float32)
    state = np.array([[0, 0, 1]] * 2)
    for family, x in ((families.GAUSSIAN_DIAGONAL, features), (families.categorical(3), state)):
        model = hmm.fit(family, x, state, 3, smoothing=1e-6 if x.ndim == 3 else 0.0)
        for parallel in (False, True):
            posterior = hmm.posterior(family, model, x, parallel=parallel)
            assert finite((model, posterior))
        fit = hmm.fit_em(family, model, x, smoothing=1e-6 if x.ndim == 3 else 0.0, max_steps=3)
        assert finite((fit, hmm.log_prob(family, fit.params, x[:, :1])))
        np.testing.assert_array_equal(hmm.predict(family, fit.params, x)[0], state)


def test_padding_may_hold_nan_and_length_one_sequences_train():
    family, x = KINDS["gaussian"]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING)
    padded = np.where(MASK[..., None], x, np.nan)
    clean = hmm.fit_em(family, model, x, MASK, smoothing=SMOOTHING, max_steps=2)
    dirty = hmm.fit_em(family, model, padded, MASK, smoothing=SMOOTHING, max_steps=2)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert finite(hmm.fit_em(family, model, x[:, :1], smoothing=SMOOTHING, max_steps=2))
    assert finite(hmm.posterior(family, model, x[:, :1], parallel=True))


def test_draws_have_the_model_s_frequencies():
    """1500 draws of two steps: first states, moves and emissions within 5 standard errors."""
    family, x = KINDS["categorical"]
    model = hmm.fit(family, x, STATES, K, smoothing=SMOOTHING, state_smoothing=0.5)
    state, x = (np.asarray(a) for a in hmm.sample(family, model, jax.random.key(3), 1500, 2))
    initial, transition, table = (np.exp(np.asarray(a)) for a in (*model[:2], model.emissions.log_prob))

    def near(draws, p):
        share = np.bincount(draws, minlength=len(p)) / len(draws)
        assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / len(draws)) + 1e-6)

    near(state[:, 0], initial)
    for k in range(K):
        near(state[state[:, 0] == k, 1], transition[k])
        near(x[:, 1][state[:, 1] == k], table[k])


def test_wrong_shapes_are_refused_in_one_sentence():
    family, x = KINDS["categorical"]
    with pytest.raises(UserError, match="give sequences as"):
        hmm.fit(family, x[0], STATES[0], K, smoothing=1.0)
    with pytest.raises(UserError, match=r"state has shape \(4,\)"):
        hmm.fit(family, x, STATES[:, 0], K, smoothing=1.0)
    with pytest.raises(UserError, match="The mask has shape"):
        hmm.fit(family, x, STATES, K, MASK[:2], smoothing=1.0)
