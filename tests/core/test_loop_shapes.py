"""Batches whose shape changes from dispatch to dispatch, as bucketed sequences have: a program a shape."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import loop, sharding, systems
from jaxgen.data import sequences
from jaxgen.data.texts import Pairs
from jaxgen.data.tokenizers import BOS, EOS, PAD, UNK, train_tokenizer
from jaxgen.types import Experiment, LoopSettings, Mean

SETTINGS = LoopSettings(num_steps=22, steps_per_dispatch=2, log_every=4, validate_every=8, checkpoint_every=8)
TOKENIZER = train_tokenizer("char", ["ab"], specials=(PAD, BOS, EOS, UNK))


def _experiment(num_steps):
    texts = tuple("ab"[i % 2] * (1 + i % 7) for i in range(40))
    pairs = sequences.encode_pairs(
        Pairs("t", "train", texts, texts), TOKENIZER, TOKENIZER, max_length=8, truncate=False
    )
    stream = sequences.PairStream(
        pairs,
        batch_size=4,
        buckets=(4, 8),
        group=SETTINGS.steps_per_dispatch,
        seed=2,
        bos=TOKENIZER.bos_id,
        pad_id=TOKENIZER.pad_id,
    )

    def init(key, batch):
        return {"w": jax.random.normal(key, (len(TOKENIZER),))}, {}

    def loss(params, model_state, batch, key):
        mean = Mean.of(jnp.square(params["w"][batch["targets"]] - 1.0), batch["mask"])
        return mean.value, ({"loss": mean}, model_state)

    experiment = Experiment(
        system=systems.gradient_system(init, loss, optax.adam(0.1)),
        loop=LoopSettings(**{**SETTINGS.__dict__, "num_steps": num_steps}),
        train_batch=stream,
        validate=lambda state: {"w": Mean.of(state.params["w"])},
        evaluate=lambda state, needs: {},
        write_samples=lambda state, key, num, directory: [],
        data_fingerprints={},
        seed=3,
    )
    return experiment, stream


def _train(experiment, workdir):
    return loop.train(experiment, workdir, sharding.make_mesh(), show_progress=False)


def test_two_shapes_train_with_a_trace_each_and_resume_to_the_same_bits(tmp_path):
    experiment, stream = _experiment(22)
    assert {stream(step)["tokens"].shape for step in range(22)} == {(4, 4), (4, 8)}
    # Once for each shape; the run ends on a whole dispatch, so that there are no single steps.
    step = chex.assert_max_traces(experiment.system.step, n=2)
    whole = _train(
        Experiment(**{**experiment.__dict__, "system": experiment.system._replace(step=step)}),
        tmp_path / "whole",
    )
    _train(_experiment(8)[0], tmp_path / "parts")
    again = _train(experiment, tmp_path / "parts")
    assert int(again.step) == 22
    chex.assert_trees_all_equal(
        *(jax.device_get(state._replace(key=jax.random.key_data(state.key))) for state in (whole, again))
    )
    assert np.abs(np.asarray(whole.params["w"])[TOKENIZER.pad_id] - 1) > 0  # padding is never learned from
