import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets

from jaxgen.models.convnet import ConvNet

SMALL = ConvNet(widths=(4, 8), hidden=16, num_classes=3, dropout=0.5)


@pytest.fixture(scope="module")
def variables():
    """Parameters of the initial size, biases included, without the seconds that compiling `init` takes."""
    rng = np.random.default_rng(1)
    init = functools.partial(SMALL.init, train=False)
    abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), abstract)


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)), jnp.float32)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (7, 9, 1)])
def test_shapes(shape):
    key, image = jax.random.key(0), jnp.zeros((5, *shape))
    variables = jax.eval_shape(functools.partial(SMALL.init, train=False), key, image)
    assert set(variables) == {"params"}, "no running statistics: the model state is {}"
    logits = jax.eval_shape(functools.partial(SMALL.apply, train=False), variables, image)
    features = jax.eval_shape(functools.partial(SMALL.apply, method=ConvNet.features), variables, image)
    assert logits.shape == (5, 3)
    assert features.shape == (5, 16)


def test_number_of_parameters(variables):
    # 3x3 kernels and biases of two stages; 8x8 pooled twice leaves 2x2x8 for the hidden layer.
    expected = (9 * 1 * 4 + 4) + (9 * 4 * 8 + 8) + (32 * 16 + 16) + (16 * 3 + 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_features_by_hand(variables, image):
    """The same network in float64 NumPy: 3x3 windows, SiLU, mean of 2x2, hidden layer."""

    def silu(x):
        return x / (1 + np.exp(-x))

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x = np.asarray(image, np.float64)
    for name in ("convs_0", "convs_1"):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # [B, H, W, C, 3, 3]
        y = silu(np.einsum("bhwcij,ijco->bhwo", windows, p[name]["kernel"]) + p[name]["bias"])
        b, h, w, c = y.shape
        x = y.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    features = silu(x.reshape(len(x), -1) @ p["embed"]["kernel"] + p["embed"]["bias"])
    logits = features @ p["head"]["kernel"] + p["head"]["bias"]
    got = SMALL.apply(variables, image, method=ConvNet.features)
    np.testing.assert_allclose(got, features, rtol=1e-4, atol=1e-6)  # float32 sums of up to 36 terms
    np.testing.assert_allclose(SMALL.apply(variables, image, train=False), logits, rtol=1e-4, atol=1e-5)


def test_dropout_in_training_only(variables, image):
    @functools.partial(jax.jit, static_argnames="train")
    def run(seed, train):
        return SMALL.apply(variables, image, train=train, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(2, True), run(2, True))
    assert np.abs(run(2, True) - run(3, True)).max() > 1e-3
    np.testing.assert_array_equal(run(2, False), run(3, False))
    no_dropout = SMALL.clone(dropout=0.0).apply(variables, image, train=True)
    np.testing.assert_allclose(run(2, False), no_dropout, rtol=1e-5, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters(variables, image):
    model = SMALL.clone(dtype=jnp.bfloat16)
    assert model.apply(variables, image, method=ConvNet.features).dtype == jnp.bfloat16
    logits = model.apply(variables, image, train=False)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: about 1 % of logits of order 1 after four layers.
    np.testing.assert_allclose(logits, SMALL.apply(variables, image, train=False), atol=0.05)

    def parameter_dtypes(model):
        abstract = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
        return {leaf.dtype for leaf in jax.tree.leaves(abstract)}

    assert parameter_dtypes(model) == {jnp.dtype("float32")}
    assert parameter_dtypes(SMALL.clone(param_dtype=jnp.bfloat16)) == {jnp.dtype("bfloat16")}


def test_traces_once_under_jit(variables, image):
    apply = jax.jit(chex.assert_max_traces(lambda v, x: SMALL.apply(v, x, train=False), n=1))
    for scale in (1.0, 0.5):
        expected = SMALL.apply(variables, scale * image, train=False)
        np.testing.assert_allclose(apply(variables, scale * image), expected, rtol=1e-4, atol=1e-6)


def test_learns_the_real_digits():
    """97 % of 360 held-out digits after 30 epochs of some 50 ms; a linear model reaches about 96 %."""
    digits = sklearn.datasets.load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    image = jnp.asarray(digits.images[order][..., None] / 8.0 - 1.0, jnp.float32)
    label = jnp.asarray(digits.target[order], jnp.int32)
    model = ConvNet(widths=(16, 32), hidden=64)
    batches = np.concatenate([rng.permutation(1437)[:1408].reshape(22, 64) for _ in range(30)])
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, len(batches)))

    @jax.jit
    def step(params, opt_state, index):
        def loss(params):
            logits = model.apply({"params": params}, image[index], train=True)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label[index]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), image[:1])["params"]
    opt_state = jax.jit(tx.init)(params)
    for (
        index
    ) in batches:  # no lax.scan: on the CPU, XLA runs a convolution's gradient 40 times slower in a loop
        params, opt_state = step(params, opt_state, index)
    logits = model.apply({"params": params}, image[1437:], train=False)
    assert logits.shape == (360, 10)
    assert float(jnp.mean(jnp.argmax(logits, axis=-1) == label[1437:])) >= 0.97
