"""What the sequence experiments promise beyond what every experiment does (tests/test_experiments.py)."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import language_model, sequence_tasks, translation
from experiments.common import sequences as shared
from experiments.figures import (
    gradient_norm,
    masked_attention,
    positional_encoding,
    sequence_recall,
    translation_attention,
)
from jaxgen import sharding
from jaxgen.data import sequences as batches
from jaxgen.data.sequence_tasks import load_task
from jaxgen.data.texts import load_text
from jaxgen.data.tokenizers import BOS, EOS, PAD, UNK, train_tokenizer
from jaxgen.models.language_model import RecurrentLM
from jaxgen.objectives import sequences as objective
from jaxgen.types import UserError

PTB = os.path.isdir(os.path.join(os.environ.get("JAXGEN_DATA_DIR", "-"), "ptb"))


@pytest.mark.parametrize(
    ("preset", "epochs", "length", "published"),
    [("small", 13, 20, 114.5), ("medium", 39, 35, 82.7), ("large", 55, 35, 78.4)],
)
def test_zarembas_settings(preset, epochs, length, published):
    config = language_model.get_config(f"ptb_lstm_{preset}")
    epoch = ((929_589 - 1) // 20) // length
    assert config.train.num_steps == epochs * epoch
    flat = {"small": 4, "medium": 6, "large": 14}[preset]
    assert config.optim.decay_steps == tuple(epoch * n for n in range(flat, epochs))
    # Rate and clipping are those of the sum over time.
    assert config.optim.learning_rate / length == 1
    assert config.optim.clip_norm * length == pytest.approx({"large": 10}.get(preset, 5))
    assert config.optim.weight_decay == config.optim.b1 == 0
    assert language_model._PERPLEXITY[("ptb", "lstm", config.model.width)][1] == published


@pytest.mark.skipif(not PTB, reason="no ptb in JAXGEN_DATA_DIR")
def test_an_epoch_of_ptb_is_as_long_as_the_presets_say():
    text = load_text("ptb", "train").text
    tokens = train_tokenizer("word", [text], specials=(UNK, EOS)).encode(text)
    config = language_model.get_config("ptb_lstm_small")
    stream = language_model.make_stream(config.data, tokens, seed=0, mesh=sharding.make_mesh())
    assert stream.steps_per_epoch * 13 == config.train.num_steps


def test_vaswanis_settings():
    config = translation.get_config("transformer_base")
    optim = config.optim
    assert (optim.b1, optim.b2, optim.eps, optim.clip_norm, optim.weight_decay) == (0.9, 0.98, 1e-9, 0, 0)
    assert optim.learning_rate == pytest.approx((config.model.width * optim.warmup_steps) ** -0.5, rel=0.01)
    assert config.evaluation.num_pairs > 0  # of a twentieth of millions


def test_evaluation_in_windows_with_a_carry_is_one_pass_over_the_text():
    model = RecurrentLM(7, embed=4, hidden=4, num_layers=1, kind="lstm")
    tokens = np.random.default_rng(0).integers(0, 7, 30).astype(np.int32)
    params = model.init(jax.random.key(0), tokens[None, :5])["params"]

    def apply(params, carry, batch, key):
        return model.apply({"params": params}, batch["tokens"], carry)

    loss = objective.make_loss(apply)
    values = []
    for length in (4, 29):
        windows = batches.evaluation_windows(tokens, batch_size=1, length=length)
        evaluate = language_model.make_evaluation(loss, lambda: model.initial_carry(1), windows)
        values.append(evaluate(params)["nats"])
    assert [int(value.count) for value in values] == [29, 29]
    np.testing.assert_allclose(values[0].value, values[1].value, rtol=1e-5)  # float32, another order


def _refused(module, match, **settings):
    config = module.get_config("smoke")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    with pytest.raises(UserError, match=match):
        module.build(config, sharding.make_mesh())


def test_bad_settings_of_language_models(tmp_path):
    _refused(language_model, "did you mean 'word'", data__tokenizer="words")
    _refused(language_model, r"make 21 tokens.*data\.length=12", sampling__length=20)
    _refused(language_model, "at least one token", sampling__prompt="")
    _refused(language_model, r"optim\.accumulate", **{**LSTM, "optim__accumulate": 2})
    _refused(language_model, "did you mean 'lstm'", model__kind="lst")
    (tmp_path / "short.txt").write_text("abc " * 10)
    _refused(language_model, "36 tokens", data__source=f"text:{tmp_path}/short.txt", data__length=40)


LSTM = {"model__kind": "lstm", "data__order": "contiguous"}


def test_bad_settings_of_translation(tmp_path):
    _refused(translation, r"data\.buckets", data__buckets=(24, 32))
    _refused(
        translation,
        r"steps_per_dispatch=2 must divide train\.log_every=3",
        data__buckets=(24, 40),
        train__log_every=3,
    )
    _refused(translation, "needs data.shared_vocabulary", model__shared_embedding=True)
    (tmp_path / "a").write_text("x\ny\n")
    (tmp_path / "b").write_text("x\n")
    _refused(translation, "2 lines but .* has 1", data__source=f"lines:{tmp_path}/a,{tmp_path}/b")
    _refused(translation, "longer than data.max_length=2", data__max_length=2)


def test_bad_settings_of_tasks():
    _refused(sequence_tasks, "did you mean 'recall'", data__source="recal")
    _refused(sequence_tasks, "at least 20 for sentiment", data__source="sentiment")


@pytest.mark.parametrize("module", [language_model, sequence_tasks, translation])
def test_embeddings_are_scaled_to_the_size_of_sinusoidal_positions(module):
    for positions in ("sinusoidal", "learned", "rotary", "none"):
        model = module.get_config("smoke").model
        model.positions = positions
        spec = shared.transformer_spec(model, max_length=9)
        assert spec.scale_embedding == (positions == "sinusoidal")


def test_attention_maps_come_in_order_of_the_layers():
    sown = lambda number: {"cross_attention": {"attention_weights": (np.full((1, 1, 1, 1), number),)}}
    found = shared.attention_maps({"decoder": {f"block_{n}": sown(n) for n in range(12)}}, cross=True)
    assert [weights.item() for _, weights in found] == list(range(12))


def test_long_attention_maps_are_cut(tmp_path):
    labels = ["a"] * 500
    shared.save_attention_picture(tmp_path / "map.png", [("head", np.eye(500), labels, labels)] * 4)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width * picture.height < 12_000_000


def test_classes_of_tokens_are_told_apart():
    task = load_task("labelling", "train", num=4, length=16, seed=0)
    every = np.arange(len(task.classes))
    shown = sequence_tasks.describe(task, np.zeros(len(every), np.int32), len(every), every, every)
    signs = shown.splitlines()[1].removeprefix("class").strip()
    assert len(set(signs)) == len(task.classes) == len(signs)


@pytest.mark.parametrize("asked", [3, 8])
def test_learned_positions_do_not_depend_on_how_long_a_translation_may_be(asked):
    config = translation.get_config("smoke")
    config.model.positions, config.sampling.max_new_tokens = "learned", asked
    model, tokens = translation.make_model(config, 9, 9), jnp.ones((1, 3), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, jnp.array([3]), tokens)["params"]
    for side in ("encoder", "decoder"):
        assert len(params[side]["positions"]["embedding"]) == config.data.buckets[-1]


def test_text_ends_at_the_first_eos():
    tokenizer = train_tokenizer("char", ["abc"], specials=(PAD, BOS, EOS, UNK))
    assert translation.to_text(tokenizer, np.asarray([4, 5, 2, 6, 0])) == "ab"
    assert translation.to_text(tokenizer, np.asarray([4, 5])) == "ab"


def test_pictures_of_text_that_the_font_lacks(tmp_path):
    assert shared.drawable("a漢é$\n") == "a□é$\n"
    shared.save_text_picture(tmp_path / "t.png", ["漢字 $x$ " * 40, "", "b"])
    shared.save_attention_picture(tmp_path / "a.png", [("$漢$", np.eye(2), ["a", "b"], ["漢", "d"])])
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_printed_masked_table():
    """Row "one" is printed as if divided by more than its five shown entries: 0.012 off; the others round."""
    table = masked_attention.masked()
    assert np.abs(table - masked_attention.PRINTED).max() < 0.0125
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-6)
    assert not np.triu(table, 1).any()


def test_recall_is_trained_for_every_step_asked_for(monkeypatch):
    counting = types.SimpleNamespace(
        system=types.SimpleNamespace(init=lambda key, batch: 0, step=lambda state, batch: (state + 1, None)),
        train_batch=lambda step: np.int32(step),
        validate=lambda state: {"accuracy": types.SimpleNamespace(value=state)},
    )
    monkeypatch.setattr(sequence_recall.sequence_tasks, "build", lambda *_: counting)
    for num_steps in (3, 50, 120):
        assert sequence_recall.accuracy("rnn", 10, num_steps=num_steps) == num_steps


def test_attention_is_shown_for_the_pieces_that_were_written():
    given = batches.EncodedPairs((np.asarray([4, 2]), np.asarray([5, 2])), (np.asarray([2]),) * 2)
    found = np.asarray([[5, 6, 2, 0], [4, 5, 6, 7]])
    both = translation_attention.as_written(given, found, eos=2)
    assert both.source == given.source
    assert [ids.tolist() for ids in both.target] == [[5, 6, 2], [4, 5, 6, 7]]


def test_figures_say_what_they_show():
    _, alike = positional_encoding.compute()
    np.testing.assert_allclose(alike[3, 10], alike[50, 57], atol=1e-5)  # PE(p) . PE(q) depends on p - q
    np.testing.assert_allclose(np.diagonal(alike), 1, rtol=1e-5)
    found = gradient_norm.gradient_norm(
        jax.random.key(0), depth=10, gain=1.3, residual=False, tanh=False, clipped=True
    )
    np.testing.assert_allclose(found, gradient_norm.CLIP, rtol=1e-5)
    plain, residual = (
        gradient_norm.gradient_norm(
            jax.random.key(0), depth=20, gain=0.7, residual=residual, tanh=True, clipped=False
        )
        for residual in (False, True)
    )
    assert plain < 1e-3 < 0.5 < residual
