"""Hidden Markov models against hmmlearn, from the same parameters on the same ragged sequences."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.estimators import families, hmm

learn = pytest.importorskip("hmmlearn.hmm", reason="the comparison needs hmmlearn: install jaxgen[peers]")

K, LENGTHS, STEPS = 3, np.array([12, 1, 7, 12]), 3
MASK = np.arange(LENGTHS.max())[None] < LENGTHS[:, None]
rng = np.random.default_rng(0)
INITIAL, TRANSITION = rng.dirichlet(np.ones(K)), rng.dirichlet(np.ones(K), K)
SYMBOLS = rng.integers(0, 5, (*MASK.shape, 1))
POINTS = rng.normal(size=(*MASK.shape, 2)) + 2.0 * rng.integers(0, K, (*MASK.shape, 1))
EMISSION = rng.dirichlet(np.ones(5), K)
MEANS, VARIANCES = np.arange(K)[:, None] * 2.0 + rng.normal(size=(K, 2)), rng.uniform(0.5, 2, (K, 2))


def _ours(emissions):
    return hmm.HMM(jnp.log(jnp.asarray(INITIAL)), jnp.log(jnp.asarray(TRANSITION)), emissions)


def _theirs(model, **emissions):
    model.startprob_, model.transmat_ = INITIAL, TRANSITION
    for name, value in emissions.items():
        setattr(model, name, value)
    return model


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _categorical():
    family = families.categorical(5)
    model = learn.CategoricalHMM(K, n_iter=STEPS, tol=-np.inf, init_params="", n_features=5)
    return (
        family,
        _ours(families.Categoricals(_f32(np.log(EMISSION)))),
        SYMBOLS,
        _theirs(model, emissionprob_=EMISSION),
    )


def _gaussian():
    settings = {"n_iter": STEPS, "tol": -np.inf, "init_params": "", "covars_prior": 0.0, "min_covar": 0.0}
    model = learn.GaussianHMM(K, "diag", covars_weight=1.0, **settings)
    family = families.GAUSSIAN_DIAGONAL
    return (
        family,
        _ours(families.Gaussians(_f32(MEANS), _f32(VARIANCES))),
        POINTS,
        _theirs(model, means_=MEANS, covars_=VARIANCES),
    )


@pytest.mark.parametrize("make", [_categorical, _gaussian])
def test_evidence_posteriors_paths_and_baum_welch_agree(make):
    family, ours, x, theirs = make()
    rows = x[MASK]
    given = jnp.asarray(x[..., 0]) if x.dtype.kind == "i" else _f32(x)
    # Float32 against float64, sums over 32 steps.
    posterior = hmm.posterior(family, ours, given, MASK)
    assert float(jnp.sum(posterior.log_prob)) == pytest.approx(theirs.score(rows, LENGTHS), abs=1e-3)
    np.testing.assert_allclose(
        np.exp(posterior.log_gamma)[MASK], theirs.predict_proba(rows, LENGTHS), atol=1e-5
    )
    path, _ = hmm.predict(family, ours, given, MASK)
    np.testing.assert_array_equal(np.asarray(path)[MASK], theirs.predict(rows, LENGTHS))
    fitted = hmm.fit_em(family, ours, given, MASK, smoothing=0.0, max_steps=STEPS, tolerance=-np.inf).params
    theirs.fit(rows, LENGTHS)
    np.testing.assert_allclose(np.exp(fitted.log_initial), theirs.startprob_, atol=1e-4)
    np.testing.assert_allclose(np.exp(fitted.log_transition), theirs.transmat_, atol=1e-4)
    if family is families.GAUSSIAN_DIAGONAL:
        np.testing.assert_allclose(fitted.emissions.mean, theirs.means_, atol=1e-3)
        np.testing.assert_allclose(fitted.emissions.variance, theirs._covars_, atol=1e-3)
    else:
        np.testing.assert_allclose(np.exp(fitted.emissions.log_prob), theirs.emissionprob_, atol=1e-4)
