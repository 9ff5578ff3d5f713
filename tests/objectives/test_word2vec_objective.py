"""The losses of word2vec: NumPy loops, numerical gradients, probabilities that sum to one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import word2vec as objective
from jaxgen.words.huffman import huffman_paths

T, WINDOW, D, K = 4, 2, 3, 5
H = T + 2 * WINDOW


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _log_sigmoid(x):
    return -np.log1p(np.exp(-np.float64(x)))


def test_skip_gram_of_the_lectures_is_a_loop():
    """Row R8: J = -1/T sum_t sum_j log softmax(u_o . v_c), and its gradient numerically."""
    text = np.array([2, 0, 1, 3, 0, 2])
    v, u = _normal(0, 4, D), _normal(1, 4, D)
    pairs = [(t, t + j) for t in range(6) for j in (-2, -1, 1, 2) if 0 <= t + j < 6]

    def loop(v, u):
        total = 0.0
        for t, o in pairs:
            scores = [float(np.dot(u[w], v[text[t]])) for w in range(4)]
            total -= scores[text[o]] - np.log(np.sum(np.exp(scores)))
        return total / 6

    centre, context = text[[t for t, _ in pairs]], text[[o for _, o in pairs]]
    loss = lambda v, u: jnp.sum(objective.softmax_loss(v[centre], u, context)) / 6
    v64, u64 = np.asarray(v, np.float64), np.asarray(u, np.float64)
    assert float(loss(v, u)) == pytest.approx(loop(v64, u64), rel=1e-5)
    gradient = jax.grad(loss)(v, u)
    for index in [(0, 0), (2, 1), (3, 2)]:
        step = np.zeros((4, D))
        step[index] = 1e-5
        numerical = (loop(v64 + step, u64) - loop(v64 - step, u64)) / 2e-5
        assert float(gradient[index]) == pytest.approx(numerical, rel=1e-3, abs=1e-5)


def test_negative_sampling_is_equation_4():
    h, positive, negatives = _normal(0, D), _normal(1, D), _normal(2, K, D)
    expected = -_log_sigmoid(np.dot(positive, h)) - sum(_log_sigmoid(-np.dot(n, h)) for n in negatives)
    assert float(objective.negative_sampling_loss(h, positive, negatives)) == pytest.approx(
        expected, rel=1e-5
    )


def test_negative_sampling_finds_the_shifted_pmi():
    """Its optimum for each pair is log p(w, c) / (p(w) p(c)) - log k (Levy & Goldberg 2014, section 3.1)."""
    joint = np.array([[0.3, 0.1], [0.2, 0.4]])
    p, q, k = joint.sum(axis=1), joint.sum(axis=0), 3

    def expected_loss(scores):  # over pairs, and noise words drawn by their frequency
        attracted = jnp.sum(joint * jax.nn.softplus(-scores))
        return attracted + jnp.sum(k * p[:, None] * q[None, :] * jax.nn.softplus(scores))

    best = np.log(joint / (p[:, None] * q[None, :])) - np.log(k)
    np.testing.assert_allclose(jax.grad(expected_loss)(jnp.asarray(best, jnp.float32)), 0, atol=1e-6)


def test_noise_distribution():
    p = objective.noise_distribution(np.array([16, 1, 0]), 0.75)
    np.testing.assert_allclose(p, [8 / 9, 1 / 9, 0])
    assert objective.noise_distribution(np.array([5, 1]), 0.0).tolist() == [0.5, 0.5]


def test_hierarchical_softmax_normalises():
    paths = huffman_paths(np.array([9, 5, 3, 2, 1]))
    u, h = _normal(0, 4, D), _normal(1, D)
    losses = objective.hierarchical_softmax_loss(
        jnp.broadcast_to(h[None], (5, D)), u[paths.nodes], jnp.asarray(paths.turns)
    )
    assert float(jnp.exp(-losses).sum()) == pytest.approx(1.0, rel=1e-5)


def test_huffman_paths_are_short_for_frequent_words_and_optimal():
    counts = np.array([45, 16, 13, 12, 9, 5])  # Cormen et al., section 16.3: lengths 1, 3, 3, 3, 4, 4
    lengths = (huffman_paths(counts).turns != 0).sum(axis=1)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    assert np.dot(counts, lengths) == 224
    assert np.sum(0.5**lengths) == 1  # Kraft: the code is complete


@pytest.fixture
def piece():
    left = np.array([[0, 1, 2, 1], [2, 0, 0, 2]], np.int32)
    right = np.array([[2, 1, 0, 1], [1, 0, 2, 2]], np.int32)
    inside = objective.window_mask(jnp.asarray(left), jnp.asarray(right), WINDOW)
    return left, right, inside


def test_window_mask(piece):
    left, right, inside = piece
    for b in range(2):
        for t in range(T):
            belong = {WINDOW + j for j in range(-left[b, t], right[b, t] + 1) if j}
            assert set(np.flatnonzero(inside[b, t])) == belong


def test_products_with_neighbours_and_their_gradients_are_those_of_a_loop():
    """Against dense matrices, whose gradients autodiff writes."""
    weights, centre, around = _normal(0, 2, T, 2 * WINDOW + 1), _normal(1, 2, T, D), _normal(2, 2, H, D)
    gather = lambda around: jnp.stack([around[:, t : t + 2 * WINDOW + 1] for t in range(T)], axis=1)
    plain_products = lambda centre, around: jnp.einsum("btd,btnd->btn", centre, gather(around))
    plain_sums = lambda weights, around: jnp.einsum("btn,btnd->btd", weights, gather(around))
    for ours, plain, first, out in (
        (objective.neighbour_products, plain_products, centre, weights),
        (objective.neighbour_sums, plain_sums, weights, centre),
    ):
        found, expected = jax.vjp(ours, first, around), jax.vjp(plain, first, around)
        chex.assert_trees_all_close(found[0], expected[0], atol=1e-5)
        chex.assert_trees_all_close(found[1](out), expected[1](out), atol=1e-5)
    words = np.arange(H)
    expected = [[t + j for j in range(2 * WINDOW + 1)] for t in range(T)]
    np.testing.assert_array_equal(objective.neighbours(words, 2 * WINDOW + 1), expected)


@pytest.mark.parametrize(("num_shared", "groups"), [(K, 2), (1, 2), (K, 1)])
def test_piece_of_skip_gram_is_the_sum_over_its_pairs(piece, num_shared, groups):
    """With the negatives that all pairs share, each weighted num_negatives / K."""
    _, _, inside = piece
    centre, around, shared = _normal(0, 2, T, D), _normal(1, 2, H, D), _normal(2, groups, num_shared, D)
    expected = np.zeros(2)
    for b, t, j in np.argwhere(np.asarray(inside)):
        expected[b] -= _log_sigmoid(np.dot(around[b, t + j], centre[b, t]))
        group = shared[b * groups // 2]
        expected[b] -= sum(7 / num_shared * _log_sigmoid(-np.dot(n, centre[b, t])) for n in group)
    losses = objective.skip_gram_piece_loss(inside, centre, around, shared, 7)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "sum", "word2vec"])
def test_piece_of_cbow_is_the_sum_over_its_places(piece, kind):
    _, _, inside = piece
    inside = inside.at[0, 0].set(0.0)  # a place with nothing around it counts for nothing
    centre, around, shared = _normal(0, 2, T, D), _normal(1, 2, H, D), _normal(2, 2, K, D)
    expected = np.zeros(2)
    for b in range(2):
        for t in range(T):
            near = np.asarray(around[b])[t + np.flatnonzero(inside[b, t])]
            if len(near):
                h = near.sum(axis=0) if kind == "sum" else near.mean(axis=0)
                expected[b] += float(objective.negative_sampling_loss(h, centre[b, t], shared[b]))
    losses = objective.cbow_piece_loss(inside, centre, around, shared, K, kind)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_cbow_of_the_c_program_passes_the_whole_error_to_each_word(piece):
    _, _, inside = piece
    around, error = _normal(1, 2, H, D), _normal(3, 2, T, D)
    value = lambda kind: lambda around: jnp.sum(objective.cbow_context(inside, around, kind) * error)
    chex.assert_trees_all_close(value("mean")(around), value("word2vec")(around), rtol=1e-5)
    chex.assert_trees_all_equal(jax.grad(value("sum"))(around), jax.grad(value("word2vec"))(around))


def test_pieces_with_softmax_and_tree_are_the_sums_over_their_pairs(piece):
    _, _, inside = piece
    paths = huffman_paths(np.arange(1, 7))
    centre, output, words = _normal(0, 2, T, D), _normal(1, 6, D), np.arange(2 * H).reshape(2, H) % 6
    pairs = np.argwhere(np.asarray(inside))
    expected = np.zeros((2, 2))
    for b, t, j in pairs:
        word = words[b, t + j]
        expected[0, b] += objective.softmax_loss(centre[b, t], output, jnp.asarray(word))
        expected[1, b] += objective.hierarchical_softmax_loss(
            centre[b, t], output[:5][paths.nodes[word]], jnp.asarray(paths.turns[word])
        )
    plain = objective.skip_gram_piece_softmax_loss(inside, centre, output, jnp.asarray(words))
    tree = objective.skip_gram_piece_hierarchical_loss(
        inside, centre, output[:5][paths.nodes[words]], jnp.asarray(paths.turns[words])
    )
    np.testing.assert_allclose(plain, expected[0], rtol=1e-5)
    np.testing.assert_allclose(tree, expected[1], rtol=1e-5)
