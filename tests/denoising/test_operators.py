import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxgen import operators
from jaxgen.types import UserError

RNG = np.random.default_rng(0)
KERNEL = RNG.uniform(size=(3, 5)).astype(np.float32)  # neither square nor symmetric
X = jnp.asarray(RNG.normal(size=(2, 8, 12, 3)), jnp.float32)
MASK = jnp.asarray(RNG.integers(0, 2, (8, 12, 1)), jnp.float32)
OPERATORS = {
    "identity": operators.identity(),
    "mask": operators.masking(MASK),
    "mask of each image": operators.masking(jnp.stack([MASK, 1 - MASK])),
    "periodic": operators.blur(KERNEL, "periodic"),
    "replicate": operators.blur(KERNEL, "replicate"),
    "valid": operators.blur(KERNEL, "valid"),
    "valid, of each image": operators.blur(np.stack([KERNEL, KERNEL[::-1]]), "valid"),
    "downsampling": operators.downsampling(2),
    "grey": operators.grey_from_color(),
    "blurred and downsampled": operators.compose(
        operators.downsampling(4), operators.blur(KERNEL, "replicate")
    ),
}


def matrix(operator, shape):
    """A as a matrix, from what it does to each unit vector."""
    basis = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(operator.apply(basis)).reshape(len(basis), -1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_adjoint(name):
    # <A x, y> = <x, A^T y>, to the rounding of a few hundred float32 products.
    operator = OPERATORS[name]
    applied = operator.apply(X)
    y = jnp.asarray(RNG.normal(size=applied.shape), jnp.float32)
    left, right = (np.vdot(a, b) for a, b in ((applied, y), (X, operator.adjoint(y))))
    assert abs(left - right) < 1e-4 * np.linalg.norm(applied) * np.linalg.norm(y)
    assert np.linalg.norm(applied) > 0.1


@pytest.mark.parametrize("boundary", ["periodic", "replicate", "valid"])
def test_blur_is_scipy_s_convolution(boundary):
    mode = {"periodic": "wrap", "replicate": "nearest", "valid": "constant"}[boundary]
    expected = np.stack(
        [
            np.stack([ndimage.convolve(image[..., c], KERNEL, mode=mode) for c in range(3)], -1)
            for image in np.asarray(X, np.float64)
        ]
    )
    if boundary == "valid":
        expected = expected[:, 1:-1, 2:-2]
    np.testing.assert_allclose(OPERATORS[boundary].apply(X), expected, atol=2e-5)


def test_each_image_has_its_own_kernel():
    both = OPERATORS["valid, of each image"].apply(X)
    mirrored = operators.blur(KERNEL[::-1], "valid").apply(X)
    np.testing.assert_allclose(both[0], OPERATORS["valid"].apply(X)[0], atol=1e-6)
    np.testing.assert_allclose(both[1], mirrored[1], atol=1e-6)
    assert float(jnp.abs(both[1] - OPERATORS["valid"].apply(X)[1]).max()) > 0.1


def test_the_others_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(operators.downsampling(2).apply(x)[0, :, :, 0], [[0, 2], [8, 10]])
    color = jnp.asarray([[[[1.0, 10.0, 100.0]]]])
    np.testing.assert_allclose(
        operators.grey_from_color().apply(color)[0, 0, 0], [0.299 + 5.87 + 11.4], rtol=1e-6
    )
    np.testing.assert_array_equal(OPERATORS["mask"].apply(X), X * MASK[None])


def test_observations_have_noise_of_their_own_image():
    x = jnp.zeros((50, 8, 8, 1))
    y = operators.observe(operators.identity(), x, 0.5, jax.random.key(1))
    assert abs(float(y.std()) - 0.5) < 4 * 0.5 / np.sqrt(2 * y.size)
    few = operators.observe(operators.identity(), x[:2], 0.5, jax.random.key(1))
    np.testing.assert_array_equal(few, y[:2])


@pytest.mark.parametrize("name", ["replicate", "mask", "blurred and downsampled"])
def test_regularised_least_squares_against_the_normal_equations(name):
    operator, weight = OPERATORS[name], 0.3
    x = X[:, :, :, :1]
    y = operator.apply(x) + 1.0
    a = matrix(operator, x.shape[1:])
    anchor = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
    flat = lambda v: np.asarray(v, np.float64).reshape(2, -1)
    expected = np.linalg.solve(
        a.T @ a + weight * np.eye(a.shape[1]), (flat(y) @ a + weight * flat(anchor)).T
    ).T
    solve = jax.jit(lambda y, anchor: operators.regularised_least_squares(operator, y, anchor, weight, 60))
    # Conjugate gradients in float32; the condition number of the matrix is below 100.
    np.testing.assert_allclose(flat(solve(y, anchor)), expected, atol=2e-4)
    if "mask" not in name:  # an image's solution is its own
        np.testing.assert_allclose(solve(y[:1], anchor[:1]), solve(y, anchor)[:1], atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: operators.blur(KERNEL, "mirror"),
        lambda: operators.blur(np.ones((2, 3))),
        lambda: operators.blur(np.full((3, 3), np.nan)),
        lambda: operators.downsampling(0),
        lambda: operators.downsampling(3).apply(X),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
