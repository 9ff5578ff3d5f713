"""Logistic regression: scikit-learn on the same data, the stationary point, the odds of a 2 x 2 table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from jaxgen.estimators import logistic
from jaxgen.types import UserError

X, LABEL = load_iris(return_X_y=True)
X = X.astype(np.float32)[::2]
LABEL = LABEL[::2]


@pytest.fixture(scope="module")
def iris():
    return logistic.fit(X, LABEL, 3, l2=1.0)


def test_agrees_with_sklearn(iris):
    """float32 L-BFGS to a gradient of 1e-5 against float64 to 1e-10: 2e-3 in weights of size 2."""
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(X.astype(np.float64), LABEL)
    assert iris.gradient_norm <= 1e-5
    np.testing.assert_allclose(iris.params.weight.T, theirs.coef_, atol=2e-3)
    np.testing.assert_allclose(
        iris.params.bias - iris.params.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-2
    )
    ours = logistic.predict_log_proba(iris.params, X)
    np.testing.assert_allclose(ours, theirs.predict_log_proba(X), atol=5e-3)
    np.testing.assert_array_equal(logistic.predict(iris.params, X), theirs.predict(X))


def test_residuals_vanish_at_the_optimum(iris):
    """Bishop 2006, eq. 4.109: X^T (y - p) = l2 W, and the residuals of every class sum to zero."""
    residual = np.eye(3)[LABEL] - np.exp(np.asarray(logistic.predict_log_proba(iris.params, X), np.float64))
    np.testing.assert_allclose(X.T @ residual, iris.params.weight, atol=2e-3)
    np.testing.assert_allclose(residual.sum(0), 0, atol=2e-3)
    np.testing.assert_allclose(
        iris.loss * len(X),
        -logistic.log_prob(iris.params, X, LABEL).sum() + 0.5 * (iris.params.weight**2).sum(),
        rtol=1e-5,
    )


def test_a_binary_feature_gives_the_log_odds_of_its_table():
    """Counts 6:2 where x = 1 and 1:3 where x = 0: with next to no l2 the fit is the table itself."""
    x = np.array([1] * 8 + [0] * 4, np.float32)[:, None]
    label = np.array([1] * 6 + [0] * 2 + [1] + [0] * 3)
    params = logistic.fit(x, label, 2, l2=1e-6).params
    log_odds = lambda p: p[:, 1] - p[:, 0]
    test = log_odds(logistic.predict_log_proba(params, np.array([[1.0], [0.0]])))
    np.testing.assert_allclose(test, np.log([6 / 2, 1 / 3]), atol=1e-3)


def test_masks_constant_features_empty_classes_duplicates_and_vmap():
    x = np.concatenate([np.ones((12, 1)), np.repeat(np.arange(4.0), 3)[:, None]], axis=1).astype(np.float32)
    label = np.repeat([0, 0, 2, 2], 3)  # no row of class 1
    plain = logistic.fit(x, label, 3)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(plain))
    np.testing.assert_array_equal(logistic.predict(plain.params, x), label)
    padded = np.concatenate([x, np.full((2, 2), np.nan, np.float32)])
    labels, mask = np.append(label, [-1, 7]), np.arange(14) < 12
    many = jax.vmap(lambda x, y, m: logistic.fit(x, y, 3, m))(
        np.stack([padded] * 2), np.stack([labels] * 2), np.stack([mask] * 2)
    )
    for i in range(2):
        np.testing.assert_allclose(many.params.weight[i], plain.params.weight, atol=1e-3)


def test_wrong_shapes_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="one label for each of the 75 rows"):
        logistic.fit(X, LABEL[:3], 3)
    with pytest.raises(UserError, match="num_classes must be at least 1"):
        logistic.fit(X, LABEL, 0)
