"""Naive Bayes: scikit-learn on the same data, counts by hand, the joint normalised, EM that never falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB

from jaxgen.estimators import families, naive_bayes
from jaxgen.types import UserError

DIGITS = load_digits()
COUNTS, LABEL = DIGITS.data[:240].astype(np.float32), DIGITS.target[:240]
BITS = (COUNTS > 7).astype(np.float32)
# kind: (family, data, smoothing)
KINDS = {
    "gaussian": (families.GAUSSIAN_DIAGONAL, COUNTS, 1.0),
    "multinomial": (families.MULTINOMIAL, COUNTS, 1.0),
    "bernoulli": (families.BERNOULLI, BITS, 1.0),
}


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def test_a_worked_example():
    """Manning et al. 2008, example 13.1: three documents on China, one not; d5 is on China, p = 0.69."""
    # Vocabulary: Chinese Beijing Shanghai Macao Tokyo Japan
    x = np.array([[2, 1, 0, 0, 0, 0], [2, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1]])
    model = naive_bayes.fit(families.MULTINOMIAL, x, np.array([0, 0, 0, 1]), 2, smoothing=1.0)
    np.testing.assert_allclose(
        jnp.exp(model.components.log_prob[0, [0, 4, 5]]), [3 / 7, 1 / 14, 1 / 14], rtol=1e-5
    )
    np.testing.assert_allclose(jnp.exp(model.components.log_prob[1, [0, 4, 5]]), [2 / 9] * 3, rtol=1e-5)
    document = np.array([[3, 0, 0, 0, 1, 1]])
    joint = np.array([3 / 4 * (3 / 7) ** 3 / 14**2, 1 / 4 * (2 / 9) ** 5])
    probability = jnp.exp(naive_bayes.predict_log_proba(families.MULTINOMIAL, model, document))
    np.testing.assert_allclose(probability[0], joint / joint.sum(), rtol=1e-4)
    assert naive_bayes.predict(families.MULTINOMIAL, model, document)[0] == 0


@pytest.mark.parametrize("kind", ["multinomial", "bernoulli"])
def test_counts_agree_with_sklearn(kind):
    """Log probabilities within 1e-3 of values down to -1000: float32 sums of 64 terms."""
    family, x, _ = KINDS[kind]
    theirs = {"multinomial": MultinomialNB, "bernoulli": BernoulliNB}[kind](alpha=0.5).fit(x, LABEL)
    ours = naive_bayes.fit(family, x, LABEL, 10, smoothing=0.5)
    tables = ours.components.log_prob if kind == "multinomial" else ours.components.log_on
    np.testing.assert_allclose(tables, theirs.feature_log_prob_, atol=1e-5)
    np.testing.assert_allclose(ours.log_weight, theirs.class_log_prior_, atol=1e-5)
    log_proba = naive_bayes.predict_log_proba(family, ours, x)
    np.testing.assert_allclose(log_proba, theirs.predict_log_proba(x), atol=2e-3)


def test_gaussian_agrees_with_sklearn():
    """On features with variance, where neither scikit-learn's 1e-9 nor our floor shows; float32 rounding."""
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32) + (np.arange(60) % 3)[:, None]
    x, label = x.astype(np.float32), np.arange(60) % 3
    theirs = GaussianNB().fit(x.astype(np.float64), label)
    ours = naive_bayes.fit(families.GAUSSIAN_DIAGONAL, x, label, 3, smoothing=1e-9)
    np.testing.assert_allclose(ours.components.mean, theirs.theta_, atol=1e-5)
    np.testing.assert_allclose(ours.components.variance, theirs.var_, rtol=1e-4)
    joint = naive_bayes.log_joint(families.GAUSSIAN_DIAGONAL, ours, x)
    np.testing.assert_allclose(joint, theirs._joint_log_likelihood(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_joint_normalises_to_the_conditional(kind):
    """Row P2: p(y given x) = p(x, y) / sum_y p(x, y), and the sum is what log_prob gives."""
    family, x, smoothing = KINDS[kind]
    model = naive_bayes.fit(family, x, LABEL, 10, smoothing=smoothing)
    joint = np.asarray(naive_bayes.log_joint(family, model, x), np.float64)
    evidence = np.logaddexp.reduce(joint, axis=1)
    np.testing.assert_allclose(naive_bayes.log_prob(family, model, x), evidence, rtol=1e-5)
    conditional = np.asarray(naive_bayes.predict_log_proba(family, model, x))
    np.testing.assert_allclose(conditional, joint - evidence[:, None], atol=2e-3)
    # A compiler may compute the joint once for the sum and once for the difference: its rounding shows.
    np.testing.assert_allclose(
        np.exp(conditional).sum(1), 1.0, atol=16 * np.spacing(np.float32(abs(joint).max()))
    )


def test_discrete_joints_sum_to_one_over_everything():
    """All 2^3 bit rows, and all multinomial rows of 4 items over 3 words, each times every class."""
    bits = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T
    rng = np.random.default_rng(1)
    model = naive_bayes.fit(
        families.BERNOULLI, rng.integers(0, 2, (20, 3)), np.arange(20) % 2, 2, smoothing=1.0
    )
    np.testing.assert_allclose(
        jnp.exp(naive_bayes.log_prob(families.BERNOULLI, model, bits)).sum(), 1, rtol=1e-5
    )
    rows = np.array([(i, j, 4 - i - j) for i in range(5) for j in range(5 - i)])
    model = naive_bayes.fit(
        families.MULTINOMIAL, rng.integers(0, 3, (20, 3)), np.arange(20) % 2, 2, smoothing=1.0
    )
    np.testing.assert_allclose(
        jnp.exp(naive_bayes.log_prob(families.MULTINOMIAL, model, rows)).sum(), 1, rtol=1e-5
    )
    likelihood = families.MULTINOMIAL.log_likelihood(model.components, jnp.asarray(rows, jnp.float32))[:, 0]
    probability = np.exp(np.asarray(model.components.log_prob[0], np.float64))
    np.testing.assert_allclose(
        likelihood, scipy.stats.multinomial(4, probability / probability.sum()).logpmf(rows), atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_em_never_falls_and_ends_where_it_says(kind):
    """20 labels of 240. Rounding: 240 rows of about 1e2 to 1e3 nats in float32 leave 1e-6 of the mean."""
    family, x, smoothing = KINDS[kind]
    label = np.where(np.arange(240) < 20, LABEL, -1)
    fit = naive_bayes.fit_em(family, x, label, 10, smoothing=smoothing, max_steps=15)
    objective = np.asarray(fit.objective, np.float64)
    assert np.all(np.diff(objective) >= -2e-6 * np.abs(objective[0]))
    assert objective[-1] > objective[0] + 1e-2
    joint = np.asarray(naive_bayes.log_joint(family, fit.params, x), np.float64)
    rows = np.where(label >= 0, joint[np.arange(240), label], np.logaddexp.reduce(joint, axis=1))
    log_prior = float(family.log_prior(fit.params.components, smoothing))
    np.testing.assert_allclose(objective[-1], rows.mean() + log_prior / 240, rtol=1e-5)


def test_em_without_unlabelled_rows_is_the_closed_form():
    fit = naive_bayes.fit_em(families.BERNOULLI, BITS, LABEL, 10, smoothing=1.0)
    closed = naive_bayes.fit(families.BERNOULLI, BITS, LABEL, 10, smoothing=1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fit.params, closed)
    assert fit.num_steps == 1
    half = np.where(np.arange(240) < 120, LABEL, -1)
    ignored = naive_bayes.fit_em(families.BERNOULLI, BITS, half, 10, smoothing=1.0, unlabelled_weight=0.0)
    closed = naive_bayes.fit(families.BERNOULLI, BITS[:120], LABEL[:120], 10, smoothing=1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ignored.params, closed)


def test_unlabelled_rows_help():
    """Two well-parted bit patterns, one label each: EM finds both, which one row a class could not."""
    rng = np.random.default_rng(2)
    truth = np.arange(200) % 2
    x = (rng.random((200, 12)) < np.where(truth[:, None] == 1, 0.75, 0.25)).astype(np.float32)
    label = np.where(np.arange(200) < 2, truth, -1)
    alone = naive_bayes.fit(families.BERNOULLI, x, label, 2, smoothing=1.0)
    helped = naive_bayes.fit_em(families.BERNOULLI, x, label, 2, smoothing=1.0).params
    accuracy = [
        float((naive_bayes.predict(families.BERNOULLI, m, x) == truth).mean()) for m in (alone, helped)
    ]
    assert accuracy[1] > 0.95
    assert accuracy[1] > accuracy[0] + 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [1e-6, 0.0])
def test_empty_classes_zero_counts_constant_features_and_duplicates_stay_finite(kind, smoothing):
    """Gaussians need a floor above zero; counts do not."""
    family = KINDS[kind][0]
    smoothing = smoothing or (1e-6 if kind == "gaussian" else 0.0)
    x = np.tile(np.array([[1.0, 0.0, 1.0]], np.float32), (6, 1))
    label = np.array([0, 0, 0, 2, -1, -1])  # no row of class 1, no count of feature 1
    model = naive_bayes.fit(family, x, label, 3, smoothing=smoothing)
    fit = naive_bayes.fit_em(family, x, label, 3, smoothing=smoothing, max_steps=4)
    test = np.array([[1, 0, 1], [0, 1, 0]], np.float32)
    for params in (model, fit.params):
        assert finite((params, naive_bayes.log_joint(family, params, test)))
        assert naive_bayes.predict(family, params, test)[0] == 0
    assert finite(fit)


def test_masked_rows_do_not_count_even_when_they_are_nan():
    padded = np.concatenate([COUNTS[:50], np.full((3, 64), np.nan, np.float32)])
    label, mask = np.append(LABEL[:50], [0, 1, 2]), np.arange(53) < 50
    for family, _, smoothing in KINDS.values():
        ours = naive_bayes.fit_em(family, padded, label, 10, mask, smoothing=smoothing)
        expected = naive_bayes.fit_em(family, COUNTS[:50], LABEL[:50], 10, smoothing=smoothing)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


def test_draws_have_the_model_s_class_means():
    """Means of 3000 draws within 5 standard errors, feature by feature (12 of them)."""
    model = naive_bayes.fit(families.BERNOULLI, BITS[:, 18:30], LABEL % 2, 2, smoothing=1.0)
    z, x = naive_bayes.sample(families.BERNOULLI, model, jax.random.key(0), 3000)
    for k in range(2):
        p = np.exp(np.asarray(model.components.log_on[k]))
        draws = np.asarray(x[z == k])
        assert np.all(np.abs(draws.mean(0) - p) < 5 * np.sqrt(p * (1 - p) / len(draws)))
    model = naive_bayes.fit(families.MULTINOMIAL, np.array([[3, 1], [0, 4]]), np.arange(2), 2, smoothing=0.0)
    z, x = naive_bayes.sample(families.MULTINOMIAL, model, jax.random.key(0), 400)
    np.testing.assert_array_equal(x.sum(1), 4)
    assert abs(float(x[z == 0][:, 0].mean()) - 3) < 5 * np.sqrt(4 * 0.75 * 0.25 / 150)


def test_vmap_fits_many_problems_at_once():
    label = LABEL.reshape(2, 120)
    fit_one = lambda x, y: naive_bayes.fit_em(families.BERNOULLI, x, y, 10, smoothing=1.0, max_steps=3).params
    many = jax.vmap(fit_one)(BITS.reshape(2, 120, 64), label)
    one = fit_one(BITS[120:], LABEL[120:])
    np.testing.assert_allclose(many.components.log_on[1], one.components.log_on, atol=1e-5)


def test_wrong_shapes_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="one label for each of the 240 rows"):
        naive_bayes.fit(families.BERNOULLI, BITS, LABEL[:5], 10, smoothing=1.0)
    with pytest.raises(UserError, match="num_classes must be at least 1"):
        naive_bayes.fit(families.BERNOULLI, BITS, LABEL, 0, smoothing=1.0)
    with pytest.raises(UserError, match="max_steps must be at least 0"):
        naive_bayes.fit_em(families.BERNOULLI, BITS, LABEL, 10, smoothing=1.0, max_steps=-1)
