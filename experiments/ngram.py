"""n-gram language models: counts of a text, smoothed, their perplexity and the text that they write.

  python -m jaxgen.run --config=experiments/ngram.py:ptb --workdir=runs/ngram_ptb

The n-grams of the training text are enumerated beforehand; an update adds the counts of a batch of positions.
Every line is a sentence that ends with <eos>; words seen fewer than data.min_count times are <unk>, which is
predicted as any other word.
ptb: a minute on 2 CPU cores, JAXGEN_DATA_DIR/ptb: perplexity 141.2 of the 5-gram modified Kneser-Ney model.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, counting
from experiments.common.sequences import save_text_picture
from jaxgen import systems
from jaxgen.data.texts import load_text
from jaxgen.types import Array, Batch, Experiment, Key, Mean, Metrics, Score, Scores, TrainState
from jaxgen.words import ngrams, smoothing
from jaxgen.words.sentences import pack
from jaxgen.words.vocabulary import build_vocabulary

END, UNKNOWN = "<eos>", "<unk>"
SMOOTHINGS = ("kneser_ney", "witten_bell", "add_k")
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            **counting.SMOKE_TRAIN,
            "data.batch_size": 32_768,
            "model.order": 2,
            "sampling.num": 3,
            "sampling.max_length": 12,
        },
    ),
    "pydocs": Preset("2 CPU cores", 0.3, "runs", {}),
    "ptb": Preset(
        "2 CPU cores",
        1,
        "perplexity 141.2",
        {
            "data.source": "ptb",
            "data.min_count": 1,
            "data.batch_size": 65_536,
            "train.num_steps": 15,
            "train.validate_every": 15,
            "train.checkpoint_every": 15,
            "model.order": 5,
        },
    ),
    "file": Preset("2 CPU cores", 1, "your text's perplexity", {"data.source": "text:PATH"}),
}
FIELD_CHECKS = {
    **{field: value for field, value in common.FIELD_CHECKS.items() if field.startswith("train.")},
    "data.source": ("text:{folder}/text.txt", {}),
    "data.min_count": (3, {}),
    "model.smoothing": ("witten_bell", {}),
    "model.k": (0.5, {"model.smoothing": "add_k"}),
    "sampling.max_length": (1, {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `pydocs`."""
    config = counting.base_config(source="pydocs", batch_size=16_384, num_steps=8)
    config.data.min_count = 2
    config.model = ConfigDict({"order": 3, "smoothing": "kneser_ney", "k": 0.01})  # k: of add_k
    config.sampling = ConfigDict({"num": 8, "max_length": 40})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.at_least(config, 1, "data.min_count", "model.order", "sampling.num", "sampling.max_length")
    checks.at_least(config, 1e-9, "model.k")
    checks.one_of(config, SMOOTHINGS, "model.smoothing")


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds the text, the counts and the models made from them."""
    check(config)
    texts = {split: load_text(config.data.source, split) for split in ("train", "validation", "test")}
    lines = {
        split: [[*line.split(), END] for line in text.text.rstrip("\n").split("\n")]
        for split, text in texts.items()
    }
    seen = collections.Counter(word for line in lines["train"] for word in line)
    vocabulary = build_vocabulary(seen, min_count=config.data.min_count, unknown=UNKNOWN, end=END)
    encoded = {
        split: pack([vocabulary.encode(line).tolist() for line in part]) for split, part in lines.items()
    }
    tokens, starts = encoded["train"]
    types = ngrams.count_ngrams(tokens, starts, len(vocabulary), config.model.order)
    entries = np.stack([entry for entry, _ in ngrams.walk(types, tokens, starts)], axis=1).astype(np.int32)
    batches = counting.one_pass(config, len(tokens), lambda at: {"entries": entries[at]}, mesh)

    def init(key: Key, batch: Batch) -> tuple[Array, ...]:
        del key, batch
        return tuple(jnp.zeros(len(level), jnp.int32) for level in types.counts)

    def update(counts: tuple[Array, ...], batch: Batch, key: Key) -> tuple[tuple[Array, ...], Metrics]:
        """Adds the n-grams that end at the positions; the loss is what unigrams so far say of them."""
        del key
        word, real = batch["entries"][:, 0], batch["mask"]
        share = (counts[0][word] + 1) / (jnp.sum(counts[0]) + len(vocabulary))
        new = []
        for level, count in enumerate(counts):
            entry = batch["entries"][:, level]
            # An index past the end is dropped.
            there = (entry >= 0) & (real > 0)
            new.append(count.at[jnp.where(there, entry, len(count))].add(1, mode="drop"))
        return tuple(new), {"loss": Mean.of(-jnp.log(share), real)}

    def model_of(state: TrainState) -> ngrams.NgramModel:
        counts = tuple(np.asarray(level, np.int64) for level in state.params)
        counted = ngrams.NgramCounts(types.vocab_size, types.keys, counts, types.contexts)
        if config.model.smoothing == "add_k":
            return smoothing.add_k(counted, config.model.k)
        return getattr(smoothing, config.model.smoothing)(counted)

    def validate(state: TrainState) -> Metrics:
        found = ngrams.perplexity(model_of(state), *encoded["validation"])
        nats = jnp.asarray(np.log(found.value) * found.num_words, jnp.float32)
        return {"loss": Mean(nats, jnp.asarray(found.num_words, jnp.float32))}

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        del needed
        found = ngrams.perplexity(model_of(state), *encoded["test"])
        known = config.data.source == "ptb" and config.data.min_count == 1 and config.model.order == 5
        known = known and config.model.smoothing == "kneser_ney"
        unit = f"perplexity a word, {END} and {UNKNOWN} predicted, of {len(vocabulary)} words"
        return {
            "perplexity": Score(
                found.value,
                unit,
                found.num_words,
                False,
                141.2 if known else None,
                "Mikolov & Zweig 2012, KN5" if known else "",
            ),
            "bits_per_word": Score(found.bits_per_word, "bits/word", found.num_words, False),
        }

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        sentences = ngrams.sample(
            model_of(state),
            key,
            num or config.sampling.num,
            end=vocabulary.index[END],
            max_length=config.sampling.max_length,
        )
        texts = [" ".join(vocabulary.decode(sentence)) for sentence in sentences]
        k = f" {config.model.k}" if config.model.smoothing == "add_k" else ""
        title = f"{len(texts)} from {config.model.order}-grams, {config.model.smoothing}{k}"
        text, picture = directory / "samples.txt", directory / "samples.png"
        text.write_text("\n".join([title, *texts, ""]), encoding="utf-8")
        save_text_picture(picture, [title, *texts])
        return [text, picture]

    return Experiment(
        system=systems.update_system(init, update),
        loop=common.loop_settings(config.train),
        train_batch=batches,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={split: text.fingerprint for split, text in texts.items()},
        seed=config.seed,
    )
