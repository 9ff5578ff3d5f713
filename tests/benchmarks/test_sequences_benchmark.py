"""The benchmark of sequences at toy size: every case runs on both sides, on the same network."""

import jax
import numpy as np
import pytest

from benchmarks import sequences

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def toy():
    torch.set_num_threads(1)  # threads that wait for one another by spinning cost more than toy work
    return sequences.TransformerSetting(vocab=11, width=8, layers=1, heads=2, length=8, batch=2)


def test_training_runs_on_both_sides(toy):
    for pair in (
        sequences.transformer_training(toy, "cpu", bfloat16=False),
        sequences.lstm_training(
            sequences.LSTMSetting(vocab=11, hidden=4, layers=1, unroll=3, batch=2, steps=1), "cpu", False
        ),
    ):
        pair.ours()
        pair.peer()
        assert pair.work in (16, 6)


def test_both_sides_decode_the_same_tokens(toy):
    decoders = sequences.Decoders(toy, "cpu", bfloat16=False)
    pair = decoders.decode(2, 3, 4)  # raises where they differ
    assert pair.work == 8
    prefill = decoders.prefill(1, 4)
    prefill.ours()
    prefill.peer()
    floor = sequences.floor(decoders, rounds=1)
    weights = sum(leaf.size for leaf in jax.tree.leaves(decoders.params))
    assert floor["weights read for a token, GB"] == pytest.approx(4e-9 * weights)


def test_operations_of_a_trained_token():
    # nanoGPT's count for its model of characters: 10.65M weights without the positions.
    gflops = sequences.training_gflops_per_token(sequences.CHAR)
    assert gflops == pytest.approx(6e-9 * (10.65e6 + 6 * 2 * 256 * 384), rel=0.01)
    assert np.isclose(
        sequences.training_gflops_per_token(sequences.PTB_SMALL), 6e-9 * (2 * 8 * 200**2 + 10_000 * 200)
    )
