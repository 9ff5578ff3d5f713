"""Planted projections are found again; thresholds, closures and splits against brute force."""

import itertools

import jax
import numpy as np
import pytest

from experiments import hypernyms as experiment
from jaxgen.estimators import hypernyms
from jaxgen.types import UserError


def _planted(num=200, dim=4, clusters=2):
    """x near one of two far places, y = Phi_k x exactly, with offsets that tell the clusters apart."""
    rng = np.random.default_rng(0)
    phi = np.eye(dim) + 0.3 * rng.normal(size=(clusters, dim, dim))
    phi[:, :, 0] += 20 * np.eye(dim)[:clusters]  # the first entry of x moves y far, each cluster its own way
    x = rng.normal(size=(num, dim))
    x[:, 0] = 1 + 0.1 * rng.normal(size=num)
    kind = np.arange(num) % clusters
    return x, np.einsum("nij,nj->ni", phi[kind], x), phi, kind


@pytest.mark.parametrize("clusters", [1, 2])
def test_a_planted_projection_is_recovered(clusters):
    x, y, phi, kind = _planted(clusters=clusters)
    found = hypernyms.fit(jax.random.key(0), x, y, clusters, ridge=0.0)
    order = [int(hypernyms.nearest((y - x)[kind == k][:1], found.centres)[0]) for k in range(clusters)]
    assert sorted(order) == list(range(clusters))
    # float32 normal equations with a condition number of about 100.
    np.testing.assert_allclose(np.asarray(found.phi)[order], phi, atol=2e-3)
    assert float(hypernyms.distance(found, x, y).max()) < 1e-4
    brute = [
        min(
            (float(np.sum((np.asarray(c) - (t - s)) ** 2)), float(np.sum((np.asarray(p) @ s - t) ** 2)))
            for c, p in zip(found.centres, found.phi, strict=True)
        )[1]
        for s, t in zip(x, y[::-1], strict=True)
    ]
    np.testing.assert_allclose(hypernyms.distance(found, x, y[::-1]), brute, rtol=1e-3, atol=1e-3)


def test_two_projections_fit_what_one_cannot_and_a_ridge_draws_to_the_identity():
    x, y, _, _ = _planted()
    one, two = (hypernyms.fit(jax.random.key(0), x, y, k) for k in (1, 2))
    assert np.mean(hypernyms.distance(one, x, y)) > 100 * np.mean(hypernyms.distance(two, x, y))
    stiff = hypernyms.fit(jax.random.key(0), x, y, ridge=1e6)
    np.testing.assert_allclose(stiff.phi[0], np.eye(4), atol=1e-3)
    # Fewer pairs than dimensions.
    assert np.all(np.isfinite(hypernyms.fit(jax.random.key(0), x[:2], y[:2], 2).phi))


def test_baselines_by_the_definition():
    x, y, _, _ = _planted(num=6)
    centres = np.asarray([[0.0, 1, 2, 3], [20, 0, 0, 0]])
    expected = [min(sum((s + c - t) ** 2) for c in centres) for s, t in zip(x, y, strict=True)]
    np.testing.assert_allclose(hypernyms.offset_distance(centres, x, y), expected, rtol=1e-4)
    cosine = [s @ t / np.sqrt(s @ s * (t @ t)) for s, t in zip(x, y, strict=True)]
    np.testing.assert_allclose(hypernyms.cosine_distance(x, y), 1 - np.asarray(cosine), atol=1e-6)


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(1)
    for _ in range(20):
        score, label = rng.integers(0, 6, 12).astype(float), rng.integers(0, 2, 12)
        if not label.any():
            continue
        found = hypernyms.detection(score < hypernyms.choose_threshold(score, label), label).f1
        best = max(hypernyms.detection(score < t, label).f1 for t in np.arange(0.5, 7))
        assert found == best > 0
    with pytest.raises(UserError, match="at least one"):
        hypernyms.choose_threshold([1.0], [0])


def test_precision_recall_and_f1():
    found = hypernyms.detection([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert found == (2 / 3, 2 / 3, pytest.approx(2 / 3), 5)
    assert hypernyms.detection([0, 0], [1, 0]) == (0.0, 0.0, 0.0, 2)


def test_closure_and_cycles_against_matrices():
    rng = np.random.default_rng(2)
    for _ in range(10):
        edges = {(int(i), int(j)): float(rng.uniform()) for i, j in rng.integers(0, 6, (9, 2)) if i != j}
        reach = np.zeros((6, 6), int)
        reach[tuple(np.transpose(list(edges)))] = 1
        for _ in range(6):
            reach = ((reach + reach @ reach) > 0).astype(int)
        assert hypernyms.transitive_closure(edges) == set(zip(*np.nonzero(reach), strict=True))
        kept = hypernyms.remove_cycles(edges)
        closed = hypernyms.transitive_closure(kept)
        assert not any((i, i) in closed for i in range(6))
        for i, j in set(edges) - kept:  # each that went would close a cycle of nearer pairs
            nearer = {pair for pair in kept if edges[pair] <= edges[i, j]}
            assert (j, i) in hypernyms.transitive_closure(nearer)
    assert hypernyms.remove_cycles({("dog", "animal"): 0.1, ("animal", "dog"): 0.9}) == {("dog", "animal")}
    assert hypernyms.transitive_closure([("dog", "canine"), ("canine", "animal")]) >= {("dog", "animal")}


def test_no_word_is_in_two_parts():
    rng = np.random.default_rng(3)
    pairs = [(f"w{i}", f"w{j}") for i, j in rng.integers(0, 60, (300, 2))]
    parts = hypernyms.lexical_split(pairs)
    words = [{word for row in part for word in pairs[row]} for part in parts]
    assert all(len(part) for part in parts)
    assert not any(a & b for a, b in itertools.combinations(words, 2))
    again = hypernyms.lexical_split(pairs)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], hypernyms.lexical_split(pairs, seed=1)[0])


def test_bad_arguments_are_refused():
    x, y, _, _ = _planted(num=3)
    for arguments in ((x, y, 4), (x, y[:2], 1), (x, y, 0)):
        with pytest.raises(UserError):
            hypernyms.fit(jax.random.key(0), *arguments)
    with pytest.raises(UserError, match="ridge"):
        hypernyms.fit(jax.random.key(0), x, y, ridge=-1.0)
    with pytest.raises(UserError, match="share"):
        hypernyms.lexical_split([("a", "b")], shares=(1.0, 0.0))


def test_a_pair_that_follows_from_the_others_is_not_a_false_one():
    true = [("dog", "mammal"), ("mammal", "animal"), ("cat", "mammal"), ("bird", "animal"), ("robin", "bird")]
    pairs, label = experiment._with_false(true, set(true))
    false = {pair for pair, is_a in zip(pairs, label, strict=True) if not is_a}
    assert false
    assert not false & hypernyms.transitive_closure(true)
