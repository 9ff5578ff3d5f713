"""Language models of text: Transformers and recurrent networks over bytes, characters, words or pieces.

  python -m jaxgen.run --config=experiments/language_model.py:pydocs_char --workdir=runs/pydocs_char
  python -m jaxgen.run --config=experiments/language_model.py:file --workdir=runs/mine \\
      --config.data.source=text:/path/to/my.txt
  python -m jaxgen.run --config=... --workdir=... --mode=sample --num_samples=4 \\
      --config.sampling.temperature=0.8 --config.sampling.prompt='The '

pydocs_char: the reference text inside CPython, 5 minutes on 2 CPU cores, 1.9 bits a character;
shakespeare_char_cpu: 25 minutes on 2 CPU cores, 1.42 nats a character on validation; shakespeare_char:
nanoGPT's setting (10.8M parameters), for a GPU; with train.num_steps=2000 and optim.accumulate=8 two hours on
2 CPU cores that multiply bfloat16, 1.39 nats; ptb_lstm_small, _medium, _large: Zaremba et al. 2014, test
perplexity 114.5, 82.7, 78.4 there and 115.2, 83.7 here, the first in 25 minutes on 2 CPU cores, the second in
3 hours if they multiply bfloat16, the last for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks
from experiments.common import sequences as shared
from jaxgen import sharding
from jaxgen.data import sequences as batches
from jaxgen.data.texts import load_text
from jaxgen.data.tokenizers import EOS, UNK, Tokenizer, cached_tokenizer
from jaxgen.metrics import sequences as metrics
from jaxgen.models.language_model import RecurrentLM
from jaxgen.models.transformer import TransformerLM
from jaxgen.objectives import sequences as objective
from jaxgen.objectives.classification import KeylessLossFn
from jaxgen.samplers.autoregressive import decode_chain
from jaxgen.samplers.chain import run_chain, sample_in_batches
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Mean,
    Metrics,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

_PTB_EPOCH = 46479  # tokens of each of the 20 streams


def _zaremba(
    *, width: int, length: int, epochs: int, flat_epochs: int, decay: float, clip: float, **other: Any
) -> dict[str, Any]:
    """Zaremba et al. 2014, section 4.1. The loss there is the sum over time of the mean over rows: its rate
    of 1 and its clipping are, for the mean over both, `length` times as much and a `length`th of it. The
    program they published begins to lower the rate an epoch later than the paper says; with that the small
    network overfits more (perplexity 123.6 on validation and 117.9 on test)."""
    epoch = _PTB_EPOCH // length
    return {
        "data.source": "ptb",
        "data.tokenizer": "word",
        "data.order": "contiguous",
        "data.batch_size": 20,
        "data.length": length,
        "model.kind": "lstm",
        "model.width": width,
        "model.num_layers": 2,
        "model.tied": False,
        "optim.optimizer": "sgd",
        "optim.b1": 0.0,
        "optim.weight_decay": 0.0,
        "optim.learning_rate": float(length),
        "optim.warmup_steps": 0,
        "optim.schedule": "step",
        "optim.decay_rate": decay,
        "optim.decay_steps": tuple(epoch * done for done in range(flat_epochs, epochs)),
        "optim.clip_norm": clip / length,
        "train.num_steps": epoch * epochs,
        "train.steps_per_dispatch": 10,
        "train.log_every": 100,
        "train.validate_every": epoch,
        "train.checkpoint_every": epoch,
        "evaluation.batch_size": 1,
        "evaluation.num_tokens": 0,
        "sampling.prompt": "\n",
        "sampling.length": 60,
        **other,
    }


_SHAKESPEARE_GPU = {
    "data.source": "tiny_shakespeare",
    "data.batch_size": 64,
    "data.length": 256,
    "model.width": 384,
    "model.num_layers": 6,
    "model.num_heads": 6,
    "model.positions": "learned",
    "model.dropout": 0.2,
    "model.dtype": "bfloat16",
    "optim.learning_rate": 1e-3,
    "optim.b2": 0.99,
    "optim.weight_decay": 0.1,
    "train.num_steps": 5000,
    "train.log_every": 50,
    "train.validate_every": 250,
    "train.checkpoint_every": 250,
    "train.best_metric": "nats",
    "evaluation.batch_size": 64,
    "sampling.length": 255,
    "sampling.temperature": 0.8,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            "data.batch_size": 4,
            "data.length": 12,
            "model.width": 8,
            "model.num_heads": 2,
            "model.num_layers": 1,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "optim.warmup_steps": 1,
            "evaluation.num_tokens": 200,
            "evaluation.batch_size": 4,
            "sampling.num": 2,
            "sampling.length": 8,
        },
    ),
    "pydocs_char": Preset("2 CPU cores", 5, "1.9 bits/character", {}),
    "shakespeare_char": Preset(
        "1 GPU",
        5,
        "1.39 nats/character (validation), 1.56 (test) after 2,000 of its 5,000 updates",
        _SHAKESPEARE_GPU,
    ),
    "shakespeare_char_cpu": Preset(
        "2 CPU cores",
        25,
        "1.42 nats/character (validation), 1.57 (test)",
        {
            "data.source": "tiny_shakespeare",
            "data.batch_size": 32,
            "data.length": 128,
            "model.width": 128,
            "model.num_layers": 4,
            "model.dropout": 0.05,
            "train.num_steps": 3000,
            "train.validate_every": 500,
            "train.checkpoint_every": 500,
            "train.best_metric": "nats",
            "evaluation.batch_size": 32,
        },
    ),
    "ptb_lstm_small": Preset(
        "2 CPU cores",
        25,
        "test perplexity 115.2 (Zaremba et al. 2014: 114.5)",
        _zaremba(
            width=200,
            length=20,
            epochs=13,
            flat_epochs=4,
            decay=0.5,
            clip=5.0,
            **{"model.init_scale": 0.1},
        ),
    ),
    "ptb_lstm_medium": Preset(
        "2 CPU cores with bfloat16 units, or 1 GPU",
        165,
        "test perplexity 83.7 (Zaremba et al. 2014: 82.7)",
        _zaremba(
            width=650,
            length=35,
            epochs=39,
            flat_epochs=6,
            decay=1 / 1.2,
            clip=5.0,
            **{"model.init_scale": 0.05, "model.dropout": 0.5, "model.dtype": "bfloat16"},
        ),
    ),
    "ptb_lstm_large": Preset(
        "1 GPU",
        150,
        "not recorded yet (Zaremba et al. 2014: test perplexity 78.4)",
        _zaremba(
            width=1500,
            length=35,
            epochs=55,
            flat_epochs=14,
            decay=1 / 1.15,
            clip=10.0,
            **{"model.init_scale": 0.04, "model.dropout": 0.65},
        ),
    ),
    "wikitext2": Preset(
        "1 GPU",
        60,
        "not recorded yet",
        {
            "data.source": "wikitext2",
            "data.tokenizer": "word",
            "data.order": "contiguous",
            "data.batch_size": 40,
            "data.length": 70,
            "model.kind": "lstm",
            "model.width": 650,
            "model.dropout": 0.5,
            "model.init_scale": 0.05,
            "optim.learning_rate": 1e-3,
            "optim.weight_decay": 0.0,
            "train.num_steps": 29800,  # 40 epochs
            "train.validate_every": 745,
            "train.checkpoint_every": 745,
            "train.best_metric": "nats",
            "evaluation.batch_size": 10,
            "evaluation.num_tokens": 0,
            "sampling.length": 60,
        },
    ),
    "file": Preset(
        "2 CPU cores",
        10,
        "depends on the text",
        {
            "data.source": "text:README.md",
            "data.batch_size": 16,
            "data.length": 64,
            "train.num_steps": 2000,
        },
    ),
}
_LSTM: dict[str, Any] = {"model.kind": "lstm"}
FIELD_CHECKS = {
    **{name: check for name, check in common.FIELD_CHECKS.items() if name != "data.augment"},
    **shared.FIELD_CHECKS,
    **shared.CHOICE_FIELD_CHECKS,
    "data.source": ("text:pyproject.toml", {}),
    "data.tokenizer": ("byte", {}),
    "data.vocabulary_size": (40, {"data.tokenizer": "word"}),
    "data.order": ("contiguous", {}),
    "optim.accumulate": (2, {}),
    "model.tied": (False, {}),
    "model.variational": (True, {**_LSTM, "model.dropout": 0.3}),
    "model.init_scale": (0.3, _LSTM),
    "optim.weight_decay": (0.3, {}),
    "sampling.prompt": ("The ", {}),
    "sampling.length": (6, {}),
    "train.best_metric": ("nats", {}),
}
# Published perplexities (validation, test) by (source, kind, width), Zaremba et al. 2014, table 1.
_PERPLEXITY = {
    ("ptb", "lstm", 200): (120.7, 114.5),
    ("ptb", "lstm", 650): (86.2, 82.7),
    ("ptb", "lstm", 1500): (82.2, 78.4),
}
_NANOGPT = (1.4697, "nanoGPT's README, 10.6M parameters, validation on the last tenth")


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `pydocs_char`."""
    config = shared.base_config(num_steps=2000)
    config.data = ConfigDict(
        {
            "source": "pydocs",
            "tokenizer": "char",  # byte, char, word, bpe, unigram
            "vocabulary_size": 0,  # word: at most so many, 0 for all; bpe and unigram: so many pieces
            "order": "windows",  # windows: from random places; contiguous: parallel streams, in order
            "batch_size": 32,
            "length": 128,
        }
    )
    config.optim.learning_rate = 3e-3
    config.optim.weight_decay = 0.1
    config.model = ConfigDict(
        {
            **shared.transformer_fields(),
            "tied": True,
            "variational": False,  # recurrent: one dropout mask a sequence
            "init_scale": 0.0,  # recurrent: weights uniform in +-init_scale; 0: the network's own
        }
    )
    config.sampling = ConfigDict(
        {**shared.choice_fields(temperature=0.8), "num": 4, "length": 120, "prompt": "\n"}
    )
    config.evaluation = ConfigDict(
        {"batch_size": 32, "num_tokens": 40000}  # num_tokens: of the validation in training; 0: all
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    shared.check(config)
    shared.check_choice(config)
    checks.one_of(config, shared.TOKENIZERS, "data.tokenizer")
    checks.one_of(config, ("windows", "contiguous"), "data.order")
    checks.at_least(config, 0, "data.vocabulary_size", "evaluation.num_tokens", "model.init_scale")
    checks.at_least(config, 1, "data.length", "evaluation.batch_size", "sampling.num", "sampling.length")
    if _carries(config) and config.optim.accumulate > 1:
        raise UserError(
            "optim.accumulate must be 1 where a recurrent network reads data.order=contiguous: its state is "
            "that of the whole batch."
        )


def _carries(config: ConfigDict) -> bool:
    """Whether a state is carried from batch to batch."""
    return config.model.kind != "transformer" and config.data.order == "contiguous"


def make_model(config: ConfigDict, vocab_size: int) -> TransformerLM | RecurrentLM:
    """The network that config.model describes."""
    model, dtype = config.model, common.DTYPES[config.model.dtype]
    if model.kind == "transformer":
        spec = shared.transformer_spec(model, max_length=config.data.length, tied=model.tied)
        return TransformerLM(vocab_size, spec, dtype=dtype)
    return RecurrentLM(
        vocab_size,
        embed=model.width,
        hidden=model.width,
        num_layers=model.num_layers,
        kind=model.kind,
        dropout=model.dropout,
        variational=model.variational,
        tied=model.tied,
        init_scale=model.init_scale or None,
        dtype=dtype,
    )


def make_stream(
    config: ConfigDict, tokens: np.ndarray, *, seed: int, mesh: jax.sharding.Mesh
) -> batches.ContiguousStream | batches.WindowStream:
    """The training batches that config.data describes."""
    sharding.check_divides(mesh, config.batch_size, "data.batch_size")
    common_settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "length": config.length,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if config.order == "contiguous":
        return batches.ContiguousStream(tokens, **common_settings)
    return batches.WindowStream(tokens, seed=seed, **common_settings)


def make_evaluation(
    loss: KeylessLossFn, initial_carry: Callable[[], PyTree], windows: batches.Rows
) -> Callable[[PyTree], Metrics]:
    """params -> the loss's Means over a text in `evaluation_windows`, a state being carried through it.

    Without a state each window is read by itself: its first tokens have little context.
    """
    num = min(64, len(windows["tokens"]))
    missing = -len(windows["tokens"]) % num
    padded = {
        name: np.concatenate([field, np.zeros((missing, *field.shape[1:]), field.dtype)])
        for name, field in windows.items()
    }

    @jax.jit
    def some(params: PyTree, carry: PyTree, windows: Batch) -> tuple[PyTree, Metrics]:
        def body(carry: PyTree, window: Batch) -> tuple[PyTree, Metrics]:
            _, (found, carry) = loss(params, carry, window, None)
            return carry, found

        carry, found = jax.lax.scan(body, carry, windows)
        return carry, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), found)

    def evaluate(params: PyTree) -> Metrics:
        carry, total = initial_carry(), None
        for start in range(0, len(padded["tokens"]), num):
            part = {name: field[start : start + num] for name, field in padded.items()}
            carry, found = some(params, carry, part)
            # In float64: thousands of sums of sums.
            sums = {
                name: Mean(*(np.asarray(x, np.float64) for x in (m.total, m.count)))  # type: ignore[arg-type]
                for name, m in found.items()
            }
            total = sums if total is None else {name: m.merge(sums[name]) for name, m in total.items()}
        return cast(Metrics, total)

    return evaluate


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds text, network, loss, decoding and scores."""
    check(config)
    texts = {split: load_text(config.data.source, split) for split in ("train", "validation", "test")}
    tokenizer = cached_tokenizer(
        config.data.tokenizer,
        [texts["train"].text],
        specials=(UNK, EOS) if config.data.tokenizer == "word" else (UNK,),
        vocabulary_size=config.data.vocabulary_size,
    )
    tokens = {split: tokenizer.encode(text.text) for split, text in texts.items()}
    model: Any = make_model(config, len(tokenizer))
    carries, recurrent = _carries(config), config.model.kind != "transformer"

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        params = model.init(key, batch["tokens"][:1])["params"]
        return params, model.initial_carry(batch["tokens"].shape[0]) if carries else {}

    def apply(params: PyTree, carry: PyTree, batch: Batch, key: Key | None) -> tuple[Array, PyTree]:
        settings = shared.dropout_arguments(key)
        if not recurrent:
            return model.apply({"params": params}, batch["tokens"], **settings), carry
        start = (
            (objective.reset_carry(carry, batch["reset"]) if "reset" in batch else carry) if carries else None
        )
        logits, end = model.apply({"params": params}, batch["tokens"], start, **settings)
        return logits, end if carries else carry

    loss = objective.make_loss(apply, **config.objective.to_dict())
    system = common.make_system(config, init, loss)
    stream = make_stream(config.data, tokens["train"], seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- evaluation

    def evaluation_of(split: str, limit: int = 0) -> Callable[[PyTree], Metrics]:
        size = config.evaluation.batch_size
        windows = batches.evaluation_windows(
            tokens[split][: limit + 1 if limit else None], batch_size=size, length=config.data.length
        )
        return make_evaluation(loss, lambda: model.initial_carry(size) if carries else {}, windows)

    validation = evaluation_of("validation", config.evaluation.num_tokens)
    # Made now: a split that is too short is said before the training.
    whole = {split: evaluation_of(split) for split in ("validation", "test")}

    def evaluate(state: TrainState, needs: object) -> Scores:
        scores: dict[str, Score] = {}
        for split, evaluation in whole.items():
            found = evaluation(state.sampling_params)
            scores.update(text_scores(config, tokenizer, split, texts[split].text, tokens[split], found))
        return scores

    # ---- samples

    prompt = tokenizer.encode(config.sampling.prompt)
    if not len(prompt):
        raise UserError("sampling.prompt must have at least one token: it is what the samples go on from.")
    room = len(prompt) + config.sampling.length
    if not recurrent and room > config.data.length:
        raise UserError(
            f"sampling.prompt and sampling.length make {room} tokens, but the network was trained on "
            f"data.length={config.data.length}: lower sampling.length."
        )
    choose = shared.make_choose(config.sampling)

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        variables, extra = {"params": params}, {} if recurrent else {"cache_length": room}
        chain = decode_chain(
            lambda rows, lengths: model.apply(variables, rows, lengths, method="prefill", **extra),
            lambda cache, token, position: model.apply(variables, cache, token, position, method="step"),
            jnp.tile(jnp.asarray(prompt)[None], (len(indices), 1)),
            jnp.full(len(indices), len(prompt), jnp.int32),
            max_new_tokens=config.sampling.length,
            choose=choose,
            repetition_penalty=config.sampling.repetition_penalty,
        )
        return run_chain(chain, key, indices, (config.sampling.length,))

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """A text file a sample, and a picture of the first ones."""
        num = num or config.sampling.num
        ids = sample_in_batches(
            lambda indices: sample(state.sampling_params, key, indices), num, min(num, config.sampling.num)
        )
        written = [tokenizer.decode([*prompt, *row]) for row in ids]
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"sample_{number:03d}.txt" for number in range(num)]
        for path, text in zip(paths, written, strict=True):
            path.write_text(text, encoding="utf-8")
        picture = directory / "samples.png"
        shared.save_text_picture(picture, written[:6])
        return [*paths, picture]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.sampling_params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={
            **{split: text.fingerprint for split, text in texts.items()},
            "tokenizer": tokenizer.fingerprint,
        },
        seed=config.seed,
    )


def text_scores(
    config: ConfigDict, tokenizer: Tokenizer, split: str, text: str, tokens: np.ndarray, found: Metrics
) -> Scores:
    """What the mean cross-entropy of a text means per token, per word and per character."""
    num = int(found["nats"].count)
    nats = float(found["nats"].total)
    accuracy = Score(float(found["accuracy"].value), "share of tokens", num, True)
    published = _PERPLEXITY.get((config.data.source, config.model.kind, config.model.width))
    if config.data.tokenizer == "word":
        reference = None if published is None else published[split == "test"]
        source = "" if published is None else "Zaremba et al. 2014, table 1"
        value = metrics.perplexity(nats, num)
        return {
            f"{split}_perplexity": Score(value, "per word, line ends counted", num, False, reference, source),
            f"{split}_nats": Score(nats / num, "nats/word", num, False),
            f"{split}_accuracy": accuracy,
        }
    is_shakespeare = config.data.source == "tiny_shakespeare" and config.data.tokenizer == "char"
    nano = _NANOGPT if is_shakespeare and split == "validation" else (None, "")
    characters = len(text) - len(tokenizer.decode(tokens[:1]))
    words = max(len(text.split()) + text.count("\n"), 1)  # what a model of words predicts
    return {
        f"{split}_nats": Score(nats / num, "nats/token", num, False, *nano),
        f"{split}_perplexity": Score(metrics.perplexity(nats, num), "per token", num, False),
        f"{split}_bits_per_character": Score(
            metrics.bits_per_character(nats, characters), "bits/character", characters, False
        ),
        f"{split}_perplexity_per_word": Score(
            metrics.perplexity(nats, words), "per word, line ends counted", words, False
        ),
        f"{split}_accuracy": accuracy,
    }
