"""PixelCNN: what each output sees, exactly; sampling with caches equals sampling without."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.pixelcnn import PixelCNN, cached_functions
from jaxgen.objectives import pixelcnn as objective
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.pixels import PixelNetwork, pixel_chain, whole_image_network

H, W = 5, 4


@pytest.fixture(scope="module", params=["gated", "plusplus"])
def network(request):
    """(model, params) of a conditional network on H x W images of two channels, with no zero weights."""
    model = PixelCNN(request.param, features=4, num_layers=3, num_outputs=5, channels=2, num_classes=3)
    x = jnp.zeros((1, H, W, 2))
    params = jax.jit(lambda key: model.init(key, x, jnp.zeros(1, jnp.int32)))(jax.random.key(0))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    # Biases start at 0, where a ReLU could hide a path.
    return model, jax.tree.unflatten(
        tree, [leaf + jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


def _image(num=1, seed=1):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (num, H, W, 2)), jnp.float32)


def test_an_output_sees_all_pixels_before_it_and_none_other(network):
    model, params = network
    label = jnp.zeros(1, jnp.int32)

    @jax.jit
    def jacobian(x):
        function = lambda x: jnp.sum(model.apply({"params": params}, x, label)[0], axis=-1).reshape(-1)
        return jax.jacrev(function)(x)

    gradient = np.abs(np.asarray(jacobian(_image()))).reshape(H * W, H, W, 2).max(axis=-1)
    for i, (r, c) in enumerate(itertools.product(range(H), range(W))):
        before = np.arange(H * W).reshape(H, W) < i
        assert np.all(gradient[i][~before] == 0.0), f"{r, c} sees itself or what comes later"
        # The first layer and three more reach at least 6 columns to either side and 4 rows up: all there are.
        assert np.all(gradient[i][before] > 0.0), (
            f"{r, c} is blind to {np.argwhere(before & (gradient[i] == 0))}"
        )


def test_the_class_changes_the_output_and_jit_does_not(network):
    model, params = network
    outputs = [
        jax.jit(lambda x, label: model.apply({"params": params}, x, label))(_image(), jnp.asarray([k]))
        for k in (0, 1)
    ]
    assert float(jnp.max(jnp.abs(outputs[0] - outputs[1]))) > 1e-3
    plain = model.apply({"params": params}, _image(), jnp.asarray([0]))
    chex.assert_trees_all_close(outputs[0], plain, atol=1e-5)  # float32, another order of sums


def test_rows_and_pixels_one_by_one_give_what_the_whole_image_gives(network):
    model, params = network
    image, label = _image(2), jnp.asarray([0, 2])
    start, row, pixel = cached_functions(model, params, label)

    @jax.jit
    def one_by_one(image):
        def do_row(cache, r):
            cache = row(cache, image, r)
            return jax.lax.scan(lambda cache, c: pixel(cache, image, r, c), cache, jnp.arange(W))

        _, outputs = jax.lax.scan(do_row, start(2, image.shape[1:]), jnp.arange(H))
        return outputs.transpose(2, 0, 1, 3)

    whole = model.apply({"params": params}, image, label)
    chex.assert_trees_all_close(one_by_one(image), whole, atol=2e-5)  # float32, another order of sums


def test_the_cached_sampler_equals_the_naive_one_and_samples_do_not_see_their_batch(network):
    model, params = network
    likelihood = objective.bernoulli_likelihood(2)
    shape, key = (H, W, 2), jax.random.key(3)
    first_two = lambda key, parameters: likelihood.draw(key, parameters[:2])

    @jax.jit
    def cached(indices):
        caching = PixelNetwork(*cached_functions(model, params, indices % 3))
        return run_chain(pixel_chain(caching, first_two, H), key, indices, shape)

    @jax.jit
    def naive(indices):
        logits = lambda x: model.apply({"params": params}, x, indices % 3)
        return run_chain(pixel_chain(whole_image_network(logits), first_two, H), key, indices, shape)

    indices = jnp.arange(6, dtype=jnp.int32)
    samples = cached(indices)
    chex.assert_trees_all_equal(samples, naive(indices))
    assert set(np.unique(samples)) == {-1.0, 1.0}
    assert len(np.unique(np.asarray(samples).reshape(6, -1), axis=0)) == 6
    chex.assert_trees_all_equal(cached(indices[::-1])[::-1], samples)


def test_the_probabilities_of_all_small_images_sum_to_one_and_the_sampler_follows_them():
    """All 16 binary images of 2 x 2: exact probabilities, and 4,000 draws within 4.5 standard errors."""
    model = PixelCNN("gated", features=3, num_layers=1, num_outputs=1, channels=1)
    images = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=4))).reshape(16, 2, 2, 1)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: 3.0 * leaf + 0.1, params)
    likelihood = objective.bernoulli_likelihood(1)

    @jax.jit
    def probabilities():
        parameters = model.apply({"params": params}, images)
        return jnp.exp(objective.image_log_likelihood(likelihood, parameters, images))

    @jax.jit
    def sample(indices):
        network = PixelNetwork(*cached_functions(model, params, None))
        return run_chain(pixel_chain(network, likelihood.draw, 2), jax.random.key(1), indices, (2, 2, 1))

    p = np.asarray(probabilities())
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    assert p.max() > 2 * p.min()
    num = 4000
    drawn = np.asarray(sample(jnp.arange(num, dtype=jnp.int32))).reshape(num, 4) > 0
    counts = np.bincount(drawn @ (8, 4, 2, 1), minlength=16)
    assert np.all(np.abs(counts / num - p) < 4.5 * np.sqrt(p * (1 - p) / num))


def test_dropout_acts_in_training_only():
    model = PixelCNN("plusplus", features=4, num_layers=2, num_outputs=1, channels=2, dropout=0.5)
    x = _image()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = [model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1)]
    assert float(jnp.max(jnp.abs(train[0] - train[1]))) > 0
    chex.assert_trees_all_equal(model.apply(variables, x), model.apply(variables, x))
