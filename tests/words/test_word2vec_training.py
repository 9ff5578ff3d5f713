"""What word2vec is trained on, its row-wise step, and a planted structure that it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import word2vec
from jaxgen import sharding, systems
from jaxgen.objectives.word2vec import noise_distribution
from jaxgen.types import UserError
from jaxgen.words.huffman import huffman_paths
from jaxgen.words.pieces import Pieces
from jaxgen.words.text import Corpus, encode_file
from jaxgen.words.vocabulary import Vocabulary


def _corpus(sentences):
    tokens = np.concatenate(sentences).astype(np.int32)
    counts = np.bincount(tokens)
    words = tuple(f"w{number}" for number in range(len(counts)))
    starts = np.cumsum([0, *map(len, sentences)])
    return Corpus(tokens, starts, Vocabulary(words, counts.astype(np.int64)), "0" * 64)


def _pieces(corpus, **changes):
    noise = noise_distribution(corpus.vocabulary.counts, 0.75)
    settings = {
        "num_streams": 2, "stretch": 10, "piece": 4, "window": 2, "subsample": 0.0, "noise": noise,
        "negatives": 3, "rates": (0.1, 0.0), "epochs": 5.0, "seed": 0,
    }  # fmt: skip
    return Pieces(corpus, **{**settings, **changes})


@pytest.fixture
def corpus():
    return _corpus([np.arange(7), np.arange(7, 12), np.arange(12, 40) % 23])


def test_a_step_covers_its_stretch_of_each_stream_in_order(corpus):
    pieces = _pieces(corpus)
    for step in (0, 1, 2, 3):
        batch = pieces(step)
        middle = batch["tokens"][:, :, 2:-2].reshape(2, -1)
        begin = step * 10 % 20
        for stream in range(2):
            first = 20 * stream + begin
            np.testing.assert_array_equal(middle[stream, :10], corpus.tokens[first : first + 10])
        assert batch["rate"][0] == pytest.approx(0.1 * (1 - (step + 0.5) / 10))
    whole = batch["tokens"].reshape(2, -1, 8)
    np.testing.assert_array_equal(whole[:, :-1, 4:], whole[:, 1:, :4])  # pieces overlap by two windows


def test_windows_stay_in_the_sentence_and_in_the_text(corpus):
    pieces = _pieces(corpus, stretch=20, window=3)
    sentence = np.searchsorted(corpus.starts, np.arange(40), side="right") - 1
    sizes = set()
    for step in range(5):
        batch = pieces(step)
        for stream in range(2):
            left, right = (batch[name][stream].reshape(-1) for name in ("left", "right"))
            assert not left[20:].any()
            assert not right[20:].any()
            for place in range(20):
                here = stream * 20 + place
                reach = np.arange(here - left[place], here + right[place] + 1)
                assert set(sentence[reach]) == {sentence[here]}
                assert stream * 20 <= reach[0]
                assert reach[-1] < stream * 20 + 20
                sizes.add(int(max(left[place], right[place])))
    assert sizes >= {1, 2, 3}  # drawn anew for each place


def test_pieces_are_a_function_of_seed_and_step_and_of_the_process_share(corpus):
    pieces, other = _pieces(corpus), _pieces(corpus, seed=1)
    for name, field in pieces(3).items():
        np.testing.assert_array_equal(field, _pieces(corpus)(3)[name])
    assert (pieces(3)["negatives"] != other(3)["negatives"]).any()
    halves = [_pieces(corpus, rows=slice(i, i + 1))(3) for i in range(2)]
    for name, field in pieces(3).items():
        np.testing.assert_array_equal(field, np.concatenate([half[name] for half in halves]))


def test_every_epoch_reads_every_word_once():
    """Two streams of 51 words, 9 at a time: the last step of an epoch reads 6 of each."""
    corpus = _corpus([np.arange(103)])
    pieces = _pieces(corpus, stretch=10, epochs=3, window=1, subsample=0.0)
    seen = np.zeros(103, int)
    for step in range(pieces.num_steps):
        batch = pieces(step)
        read = batch["tokens"][:, :, 1:-1][batch["left"] + batch["right"] > 0]
        np.add.at(seen, read, 1)
    assert set(seen[:102].tolist()) == {3}
    assert seen[102] == 0  # two streams of equal length


def test_subsampling_and_negatives_have_their_frequencies():
    rng = np.random.default_rng(0)
    tokens = rng.choice(4, 40_000, p=[0.7, 0.2, 0.08, 0.02])
    corpus = _corpus([tokens])
    pieces = _pieces(corpus, num_streams=4, stretch=10_000, subsample=0.05, window=1)
    batch = pieces(0)
    counted = batch["left"] + batch["right"] > 0
    seen = np.bincount(batch["tokens"][:, :, 1:-1][counted], minlength=4)
    expected = pieces.keep * corpus.vocabulary.counts
    np.testing.assert_allclose(seen, expected, atol=4 * np.sqrt(expected).max())  # four standard errors
    drawn = np.bincount(batch["negatives"].reshape(-1), minlength=4)
    noise = noise_distribution(corpus.vocabulary.counts, 0.75) * drawn.sum()
    np.testing.assert_allclose(drawn, noise, atol=4 * np.sqrt(noise.max()))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"num_streams": 100}, "num_streams"), ({"subsample": 1e-12}, "subsample")],
)
def test_texts_that_train_nothing_are_refused(corpus, changes, problem):
    with pytest.raises(UserError, match=problem):
        _pieces(corpus, **changes)


def test_row_descent_is_gradient_descent_on_the_whole_table():
    rng = np.random.default_rng(0)
    tables = {name: jnp.asarray(rng.standard_normal((6, 3)), jnp.float32) for name in ("a", "b", "c")}
    numbers = {"x": jnp.array([[1, 4], [4, 4]]), "y": jnp.array([0, 4]), "z": jnp.array([2, 2, 5])}
    where = {"x": "a", "y": "a", "z": "b"}
    loss = lambda rows: sum(jnp.sum(jnp.sin(row) * (n + 1)) for n, row in enumerate(rows.values()))

    def of_tables(tables):
        return loss({name: tables[where[name]][numbers[name]] for name in ("x", "y", "z")})

    look_ups = {name: (where[name], numbers[name]) for name in ("x", "y", "z")}
    moved = jax.jit(lambda t: systems.row_descent([(loss, look_ups)], t, jnp.float32(0.1)))(tables)
    gradient = jax.grad(of_tables)(tables)
    for name in tables:
        np.testing.assert_allclose(moved[name], tables[name] - 0.1 * gradient[name], rtol=1e-5, atol=1e-6)
    # A step of a look-up is scaled down to the length allowed, before those of a row are added up.
    short = systems.row_descent([(loss, look_ups)], tables, jnp.float32(0.1), 0.05)
    expected = {name: np.array(table) for name, table in tables.items()}
    for name, slope in jax.grad(lambda rows: 0.1 * loss(rows))(
        {n: tables[where[n]][numbers[n]] for n in where}
    ).items():
        for number, step in zip(np.ravel(numbers[name]), np.reshape(slope, (-1, 3)), strict=True):
            expected[where[name]][number] -= step * min(1.0, 0.05 / np.linalg.norm(step))
    for name in tables:
        np.testing.assert_allclose(short[name], expected[name], rtol=1e-5, atol=1e-6)
    # Two losses at once move along the sum of their gradients.
    doubled = jax.jit(lambda t: systems.row_descent([(loss, look_ups)] * 2, t, jnp.float32(0.05)))(tables)
    for name in tables:
        np.testing.assert_allclose(doubled[name], moved[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [
        ("skip_gram", "negative_sampling"),
        ("skip_gram", "hierarchical_softmax"),
        ("skip_gram", "softmax"),
        ("cbow", "negative_sampling"),
        ("cbow", "hierarchical_softmax"),
        ("cbow", "softmax"),
    ],
)
def test_planted_groups_are_found(architecture, loss, tmp_path):
    """Words of three groups; a sentence has words of one group only, so they come to lie together."""
    rng = np.random.default_rng(0)
    lines = [" ".join(f"{'abc'[i % 3]}{w}" for w in rng.integers(0, 8, 12)) for i in range(600)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    config = word2vec.get_config("smoke")
    for field, value in {
        "data.source": "file", "data.path": str(path), "data.subsample": 0.0, "data.stretch": 300,
        "model.architecture": architecture, "model.dim": 6, "objective.loss": loss, "train.epochs": 12.0,
        "train.learning_rate": 0.025,
    }.items():  # fmt: skip
        config.update_from_flattened_dict({field: value})
    experiment = word2vec.build(config, sharding.make_mesh())
    state = experiment.system.init(jax.random.key(0), experiment.train_batch(0))
    step = jax.jit(experiment.system.step)
    for number in range(experiment.loop.num_steps):
        state, _ = step(state, experiment.train_batch(number))
    words = encode_file(path, tmp_path / "again").vocabulary.words
    unit = np.array(state.params["input"])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    group = np.array([word[0] for word in words])
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    nearest = group[np.argmax(cosine, axis=1)]
    assert np.mean(nearest == group) > 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective.negatives", 0), ("model.window", 0), ("train.learning_rate", 0.0), ("train.epochs", 0.0),
        ("data.min_count", 10**9), ("data.subsample", 1e-15),
    ],
)  # fmt: skip
def test_settings_that_train_nothing_are_refused(field, value):
    config = word2vec.get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError):
        word2vec.build(config, sharding.make_mesh())


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _step_pair_by_pair(config, counts, tables, batch):
    """One update in NumPy float64, a pair at a time: what `make_update` does by products of pieces."""
    vectors, outputs = (np.asarray(tables[name], np.float64).copy() for name in ("input", "output"))
    paths, kind, window = huffman_paths(counts), config.model.context, config.model.window
    share, sharing = config.objective.negatives / config.objective.shared_negatives, config.objective.sharing

    def pair(h, target, negatives, moved):
        """The gradient by h; that by the outputs is added to `moved`."""
        gradient = np.zeros_like(h)
        if config.objective.loss == "softmax":
            p = np.exp(outputs @ h) / np.exp(outputs @ h).sum() - np.eye(len(outputs))[target]
            moved += np.outer(p, h)
            return p @ outputs
        if config.objective.loss == "hierarchical_softmax":
            turns = zip(paths.nodes[target], paths.turns[target], strict=True)
            terms = [(node, -turn * _sigmoid(-turn * (h @ outputs[node]))) for node, turn in turns if turn]
        else:
            terms = [(target, _sigmoid(h @ outputs[target]) - 1)]
            terms += [(negative, share * _sigmoid(h @ outputs[negative])) for negative in negatives]
        for row, error in terms:
            gradient += error * outputs[row]
            moved[row] += error * h
        return gradient

    for piece in range(batch["left"].shape[1]):
        moved_vectors, moved_outputs = np.zeros_like(vectors), np.zeros_like(outputs)
        for stream in range(len(batch["left"])):
            tokens = batch["tokens"][stream, piece]
            first = stream - stream % sharing
            negatives = batch["negatives"][first : first + sharing, piece].reshape(-1)
            for place in range(batch["left"].shape[2]):
                left, right = (batch[side][stream, piece, place] for side in ("left", "right"))
                around = [tokens[window + place + j] for j in range(-left, right + 1) if j]
                centre = tokens[window + place]
                if config.model.architecture == "skip_gram":
                    for word in around:
                        moved_vectors[centre] += pair(vectors[centre], word, negatives, moved_outputs)
                elif around:
                    total = vectors[around].sum(axis=0)
                    h = total if kind == "sum" else total / len(around)
                    error = pair(h, centre, negatives, moved_outputs)
                    for word in around:
                        moved_vectors[word] += error / (len(around) if kind == "mean" else 1)
        vectors -= batch["rate"][0] * moved_vectors
        outputs -= batch["rate"][0] * moved_outputs
    return {"input": vectors, "output": outputs}


@pytest.mark.parametrize("loss", word2vec.LOSSES)
@pytest.mark.parametrize("kind", ["skip_gram", "mean", "sum", "word2vec"])
def test_an_update_is_descent_pair_by_pair(loss, kind):
    rng = np.random.default_rng(0)
    counts = np.array([40, 20, 13, 9, 7, 5, 4, 3, 2])
    config = word2vec.get_config("smoke")
    config.model.architecture = "skip_gram" if kind == "skip_gram" else "cbow"
    config.model.context = "mean" if kind == "skip_gram" else kind
    config.objective.loss, config.objective.shared_negatives, config.objective.sharing = loss, 6, 2
    config.train.longest_step = 0.0
    config.model.dim, config.model.window, config.data.piece = 4, 2, 4
    shape, size = (4, 2), len(counts)
    tables = {
        "input": rng.standard_normal((size, 4)),
        "output": rng.standard_normal((size - (loss == "hierarchical_softmax"), 4)),
    }
    batch = {
        "tokens": rng.integers(0, size, (*shape, 8)),
        "left": rng.integers(0, 3, (*shape, 4)),
        "right": rng.integers(0, 3, (*shape, 4)),
        "negatives": rng.integers(0, size, (*shape, 3)),
        "rate": np.full(4, 0.1, np.float32),
    }
    batch["left"][0, 0, 0] = batch["right"][0, 0, 0] = 0  # a place with nothing around it
    on_device = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tables)
    expected = _step_pair_by_pair(config, counts, on_device, batch)
    for num_sides in (1, 2):
        _, (update, _) = word2vec.make_update(config, counts, num_sides)
        moved, _ = jax.jit(update)(on_device, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
        for name, table in expected.items():
            np.testing.assert_allclose(moved[name], table, atol=5e-6)  # float32; moves are of 0.3 to 1.4
