"""The benchmark of the samplers at toy size: both sides take the same number of network calls."""

import pytest


@pytest.mark.slow
def test_both_chains_run_on_both_sides():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from benchmarks import samplers

    setting = samplers.Setting(
        size=4, channels=8, multipliers=(1,), num_groups=4, batch=2, num_steps=4, num_levels=2
    )
    cases = samplers.cases(setting, rounds=1, seconds=0.0)
    assert [case.name for case in cases] == ["ancestral_4_steps", "annealed_langevin_4_steps"]
    assert all(case.summary()["ratio"] > 0 for case in cases)
    assert all(case.summary()["goal"] == 1.5 for case in cases)
