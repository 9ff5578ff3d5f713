import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.dncnn import DnCNN
from jaxgen.types import UserError

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 1)), jnp.float32)
SIGMA = jnp.array([0.1, 0.5])


def made(model):
    """Parameters of the initial size, none of them 0."""
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), X, SIGMA))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), abstract)


def test_the_published_size():
    # 20 layers of 64: 9 * 64 + 64, 18 of 9 * 64 * 64 + 64, and 9 * 64 + 1.
    model = DnCNN(conditional=False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X, SIGMA))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 640 + 18 * 36_928 + 577


def test_a_fresh_network_leaves_images_alone():
    model = DnCNN(3, 4)
    out, _ = model.init_with_output(jax.random.key(0), X, SIGMA)
    np.testing.assert_array_equal(out, X)


def test_sigma_matters_where_the_network_is_told_and_not_where_it_is_blind():
    for conditional in (True, False):
        model = DnCNN(3, 4, conditional)
        variables = made(model)
        apply = jax.jit(lambda x, sigma, model=model, variables=variables: model.apply(variables, x, sigma))
        differs = np.abs(apply(X, SIGMA) - apply(X, 3 * SIGMA)).max() > 1e-3
        assert differs == conditional
        # Each image by itself.
        np.testing.assert_allclose(apply(X[::-1], SIGMA[::-1])[::-1], apply(X, SIGMA), atol=1e-5)


def test_bad_sizes():
    with pytest.raises(UserError):
        jax.eval_shape(lambda: DnCNN(1).init(jax.random.key(0), X, SIGMA))
