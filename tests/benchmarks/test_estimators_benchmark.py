"""The cases of benchmarks/estimators.py at a tiny size; each checks that both sides fit the same."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("hmmlearn", reason="the comparison needs hmmlearn: install jaxgen[peers]")

from benchmarks import estimators


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (estimators.pca_case, (400, 16, 4)),
        (estimators.gmm_case, (300, 4, 3)),
        (estimators.hmm_case, (6, 20, 3)),
    ],
)
def test_both_sides_agree_and_are_timed(case, size):
    timed = case(size, rounds=1, seconds=0.1)
    assert timed.summary()["ratio"] > 0
    assert len(timed.rounds) >= 3
