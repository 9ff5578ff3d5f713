"""The benchmark of the DDPM at toy size: both sides run the same work, and the report has its agreed form."""

import json

import jax
import numpy as np
import pytest

from benchmarks import timing
from benchmarks.timing import Case, Round

TOY = {
    "size": 4,
    "channels": 8,
    "multipliers": (1,),
    "attention": (4,),
    "num_groups": 4,
    "train_batch": 2,
    "sample_batch": 2,
    "sample_steps": 2,
}


def test_the_ratio_is_ours_over_the_peer_s_in_undisturbed_rounds():
    rounds = [Round(2.0, 3.0, 0.0), Round(2.0, 1.0, 0.0), Round(4.0, 8.0, 0.01), Round(1.0, 100.0, 1.9)]
    case = Case("a", work=12.0, unit="images/s", goal=0.7, rounds=rounds, first_ours=1.0, first_peer=2.0)
    assert case.counted == rounds[:3]
    assert case.summary() == {"ours": 6.0, "peer": 4.0, "ratio": 1.5, "unit": "images/s", "goal": 0.7}
    noisy = Case("a", 12.0, "images/s", None, rounds[2:], 1.0, 2.0)
    assert noisy.counted == rounds[2:]
    assert "DISTURBED" in timing.table([noisy])
    assert "DISTURBED" not in timing.table([case])


def test_both_sides_are_called_equally_often_in_turn():
    calls = []
    case = timing.compare(
        "a", lambda: calls.append("ours"), lambda: calls.append("peer"), work=1.0, unit="calls/s", seconds=0.0
    )
    assert len(case.rounds) == 3
    assert calls == ["ours", "peer"] * 2 + ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_the_last_line_is_json_and_the_record_says_where_it_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    case = Case("a", 1.0, "images/s", 0.7, [Round(1.0, 2.0, 0.0)] * 3, 1.0, 2.0)
    timing.report("toy", [case], ("no-such-package",), record=True, notes={"peak": 1})
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"a": {"ours": 1.0, "peer": 0.5, "ratio": 2.0, "unit": "images/s", "goal": 0.7}}
    record = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert record["cases"] == summary
    assert record["notes"] == {"peak": 1}
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["no-such-package"] is None


def test_a_missing_peer_ends_in_one_sentence_and_status_2(capsys):
    with pytest.raises(SystemExit) as error:
        timing.require("numpy", "no_such_peer")
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_network_and_operations_run_on_both_sides():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from benchmarks import ddpm

    setting = ddpm.Setting(**TOY)
    cases = ddpm.network_cases(setting, "cpu", False, (0.7, 1.0), rounds=1, seconds=0.0)
    assert [case.name for case in cases] == ["train_step", "sample_2_steps"]
    for op in ddpm.operations(2, ((4, 16),)):
        ours = op.jax(*op.arrays)
        theirs = op.torch(*(_to_torch(a, layout) for a, layout in zip(op.arrays, op.layouts, strict=True)))
        if theirs.ndim == 4:
            theirs = theirs.permute(0, 2, 3, 1) if "attention" not in op.name else theirs.reshape(ours.shape)
        # The same operation on both sides, or the comparison would mean nothing; float32, in another order.
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)
        cases += ddpm.operation_cases(op, rounds=1, seconds=0.0)
    assert all(case.summary()["ratio"] > 0 for case in cases)


def test_flops_of_a_training_step():
    from benchmarks import ddpm

    setting = ddpm.Setting(**TOY)
    # The convolutions hold nearly all weights, and each works at all 16 positions, in three products a step
    # (the output, the gradients of input and kernel) of two operations a weight; edges fall off the kernels.
    model = ddpm.UNet(channels=8, channel_multipliers=(1,), attention_resolutions=(4,), out_channels=1)
    x = jax.ShapeDtypeStruct((1, *setting.shape), "float32")
    t = jax.ShapeDtypeStruct((1,), "float32")
    params = jax.eval_shape(lambda x, t: model.init(jax.random.key(0), x, t, train=False), x, t)
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.shape[:2] == (3, 3))
    flops = ddpm.flops_per_image(setting)
    assert 0.5 < flops / (kernels * 16 * 3 * 2) < 1.5


def _to_torch(array, layout):
    import torch

    return torch.tensor(array).permute(*layout)
