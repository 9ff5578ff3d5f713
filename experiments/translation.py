"""Translation of sentences: encoder-decoder Transformers and recurrent networks with attention.

  python -m jaxgen.run --config=experiments/translation.py:dates --workdir=runs/dates
  python -m jaxgen.run --config=experiments/translation.py:pairs --workdir=runs/mine \\
      --config.data.source=lines:/path/to/source.txt,/path/to/target.txt
  python -m jaxgen.run --config=... --workdir=... --mode=sample --config.sampling.beam=5

dates: dates as 22 languages write them, in three lengths, to ISO 8601 (made with Babel's CLDR data), 3
minutes on 2 CPU cores, at least 99 % of unseen dates exactly right; multi30k_de_en: image captions, for a
GPU; multi30k_de_en_cpu: an hour on 2 CPU cores, BLEU 38.4 on test2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import common
from experiments.common import Preset, checks
from experiments.common import sequences as shared
from jaxgen import sharding
from jaxgen.data import sequences as batches
from jaxgen.data.dates import date_pairs
from jaxgen.data.texts import Pairs, load_pairs
from jaxgen.data.tokenizers import BOS, EOS, PAD, UNK, Tokenizer, cached_tokenizer
from jaxgen.metrics import sequences as metrics
from jaxgen.models.seq2seq import RecurrentSeq2Seq
from jaxgen.models.transformer import EncoderDecoder
from jaxgen.objectives import sequences as objective
from jaxgen.samplers.autoregressive import decode_chain
from jaxgen.samplers.beam import beam_search, repeat_rows
from jaxgen.samplers.chain import run_chain
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Metrics,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

_MULTI30K = {
    "data.source": "multi30k:de-en",
    "data.tokenizer": "bpe",
    "data.vocabulary_size": 8000,
    "data.shared_vocabulary": True,
    "data.num_pairs": 0,
    "data.batch_size": 128,
    "data.max_length": 64,
    "data.buckets": (16, 24, 32, 64),
    "model.width": 256,
    "model.num_layers": 3,
    "model.mlp_width": 512,
    "model.dropout": 0.3,
    "objective.label_smoothing": 0.1,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 1000,
    "optim.weight_decay": 1e-4,
    "optim.ema_decay": 0.999,
    "train.num_steps": 12000,
    "train.log_every": 100,
    "train.validate_every": 500,
    "train.checkpoint_every": 500,
    "train.best_metric": "nats",
    "evaluation.num_pairs": 0,
    "evaluation.beam": 5,
    "sampling.beam": 5,
    "sampling.length_penalty": 0.6,
    "sampling.max_new_tokens": 64,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "data.num_pairs": 40,
            "data.batch_size": 4,
            "data.buckets": (40,),
            "model.width": 8,
            "model.num_layers": 1,
            "model.num_heads": 2,
            "optim.warmup_steps": 1,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "evaluation.num_pairs": 6,
            "evaluation.batch_size": 3,
            "sampling.num": 2,
            "sampling.max_new_tokens": 4,
        },
    ),
    "dates": Preset("2 CPU cores", 3, "exact match 0.99", {}),
    "multi30k_de_en": Preset("1 GPU", 20, "not recorded yet", _MULTI30K),
    "multi30k_de_en_cpu": Preset(
        "2 CPU cores",
        60,
        "BLEU 38.4, with a beam of 5 38.8",
        {
            **_MULTI30K,
            "data.vocabulary_size": 5000,
            "data.batch_size": 64,
            "model.width": 128,
            "model.num_layers": 2,
            "model.dropout": 0.2,
            "optim.learning_rate": 2e-3,
            "optim.warmup_steps": 500,
            "train.num_steps": 10000,
        },
    ),
    # The base model of Vaswani et al. 2017, table 3, in batches of about 25,000 tokens of each side.
    "transformer_base": Preset(
        "8 GPUs",
        720,
        "not run; Vaswani et al. 2017: BLEU 27.3, tokenised, on newstest2014, another test set",
        {
            **_MULTI30K,
            "data.source": "lines:source.txt,target.txt",
            "data.vocabulary_size": 37_000,
            "data.batch_size": 896,
            "data.max_length": 128,
            "data.buckets": (32, 64, 128),
            "model.width": 512,
            "model.num_layers": 6,
            "model.num_heads": 8,
            "model.mlp_width": 2048,
            "model.activation": "relu",
            "model.norm": "post",
            "model.shared_embedding": True,
            "model.dropout": 0.1,
            "optim.learning_rate": 7e-4,  # (512 * 4000)^-1/2, the peak of section 5.3
            "optim.schedule": "rsqrt",
            "optim.warmup_steps": 4000,
            "optim.weight_decay": 0.0,
            "optim.clip_norm": 0.0,
            "optim.eps": 1e-9,
            "train.num_steps": 100_000,
            "train.validate_every": 2000,
            "train.checkpoint_every": 2000,
            "sampling.beam": 4,
            "evaluation.beam": 4,
            "evaluation.num_pairs": 3000,  # as many as newstest2014; a twentieth of WMT would be 225,000
            "sampling.max_new_tokens": 128,
        },
    ),
    "pairs": Preset(
        "2 CPU cores",
        30,
        "depends on the text",
        {
            **_MULTI30K,
            "data.source": "lines:source.txt,target.txt",
            "data.vocabulary_size": 2000,
            "data.batch_size": 64,
            "model.width": 128,
            "model.num_layers": 2,
            "model.dropout": 0.1,
            "train.num_steps": 4000,
        },
    ),
}
_GRU: dict[str, Any] = {"model.kind": "gru"}
FIELD_CHECKS = {
    **{name: check for name, check in common.FIELD_CHECKS.items() if name != "data.augment"},
    **shared.FIELD_CHECKS,
    **shared.CHOICE_FIELD_CHECKS,
    # Two line-parallel files that are there wherever the tests run.
    "data.source": ("lines:README.md,README.md", {}),
    "data.tokenizer": ("byte", {"data.max_length": 60, "data.buckets": (60,)}),
    "data.vocabulary_size": (300, {"data.tokenizer": "bpe", "data.vocabulary_size": 280}),
    "data.max_length": (24, {"data.buckets": (24, 40)}),
    "data.buckets": ((24, 40), {}),
    "data.batch_size": (6, {}),
    "model.shared_embedding": (True, {"data.shared_vocabulary": True}),
    "model.attention": ("luong", _GRU),
    "optim.accumulate": (2, {}),
    "sampling.beam": (3, {}),
    "sampling.length_penalty": (0.6, {"sampling.beam": 2}),
    "evaluation.beam": (2, {}),
    "train.best_metric": ("nats", {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `dates`."""
    config = shared.base_config(num_steps=1500)
    config.data = ConfigDict(
        {
            "source": "dates",
            "num_pairs": 30000,  # dates: training pairs made; else at most so many, 0 for all
            "tokenizer": "char",  # byte, char, word, bpe, unigram
            "vocabulary_size": 0,  # of each side
            "shared_vocabulary": False,  # one tokeniser of both sides
            "batch_size": 64,
            "max_length": 40,  # longer pairs are left out; longer test sentences are cut
            "buckets": (16, 24, 40),  # lengths that batches are padded to
        }
    )
    config.optim.learning_rate = 3e-3
    config.model = ConfigDict(
        {
            **shared.transformer_fields(),
            "width": 64,
            "positions": "sinusoidal",
            "attention": "bahdanau",  # recurrent: bahdanau, luong
            "shared_embedding": False,  # transformer with data.shared_vocabulary: one table for both sides
        }
    )
    config.sampling = ConfigDict(
        {
            **shared.choice_fields(temperature=0.0),
            "num": 6,
            "beam": 1,  # above 1: beam search, and the choices above are not used
            "length_penalty": 0.0,
            "max_new_tokens": 12,
        }
    )
    config.evaluation = ConfigDict(
        {
            "batch_size": 100,
            "num_pairs": 2000,  # of validation and test; 0: all
            "beam": 1,  # above 1: the test set is translated by beam search too
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    shared.check(config)
    shared.check_choice(config)
    checks.one_of(config, shared.TOKENIZERS, "data.tokenizer")
    checks.one_of(config, ("bahdanau", "luong"), "model.attention")
    checks.at_least(config, 0, "data.vocabulary_size", "data.num_pairs", "evaluation.num_pairs")
    checks.at_least(config, 0, "sampling.length_penalty")
    checks.at_least(config, 2, "data.max_length", "data.buckets")
    checks.at_least(config, 1, "evaluation.batch_size", "evaluation.beam")
    checks.at_least(config, 1, "sampling.num", "sampling.beam", "sampling.max_new_tokens")
    if config.model.shared_embedding and not config.data.shared_vocabulary:
        raise UserError("model.shared_embedding needs data.shared_vocabulary: set both or none.")
    if config.data.source == "dates" and not (config.data.num_pairs and config.evaluation.num_pairs):
        raise UserError("data.source=dates needs data.num_pairs and evaluation.num_pairs of at least 1.")
    if not config.data.buckets or max(config.data.buckets) < config.data.max_length:
        raise UserError(
            f"The last of data.buckets={tuple(config.data.buckets)} must be at least data.max_length="
            f"{config.data.max_length}."
        )
    learned = config.model.kind == "transformer" and config.model.positions == "learned"
    if learned and config.sampling.max_new_tokens > max(config.data.buckets):
        raise UserError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} is more than the "
            f"{max(config.data.buckets)} positions that are learned, the last of data.buckets: lower it."
        )
    # A dispatch stacks batches of one shape, so a bucket must not change inside one.
    for field in ("log_every", "validate_every", "sample_every", "checkpoint_every"):
        if config.train[field] % config.train.steps_per_dispatch and len(config.data.buckets) > 1:
            raise UserError(
                f"train.steps_per_dispatch={config.train.steps_per_dispatch} must divide train.{field}="
                f"{config.train[field]} where there are several data.buckets."
            )


def load(config: ConfigDict, *, seed: int) -> dict[str, Pairs]:
    """The splits that config.data and config.evaluation name."""
    limits = {
        "train": config.data.num_pairs,
        "validation": config.evaluation.num_pairs,
        "test": config.evaluation.num_pairs,
    }
    if config.data.source == "dates":
        return {split: date_pairs(split, num, seed=seed) for split, num in limits.items()}
    found = {split: load_pairs(config.data.source, split) for split in limits}
    return {
        split: Pairs(
            pairs.name, split, pairs.source[: limits[split] or None], pairs.target[: limits[split] or None]
        )
        for split, pairs in found.items()
    }


def make_tokenizers(config: ConfigDict, train: Pairs) -> tuple[Tokenizer, Tokenizer]:
    """The tokenisers of both sides, trained on the training pairs; one and the same where shared."""
    sides: Sequence[tuple[str, ...]] = (train.source, train.target)
    if config.shared_vocabulary:
        sides = [train.source + train.target] * 2
    source, target = (
        cached_tokenizer(
            config.tokenizer, side, specials=(PAD, BOS, EOS, UNK), vocabulary_size=config.vocabulary_size
        )
        for side in sides
    )
    return source, target


def make_model(config: ConfigDict, source_vocab: int, target_vocab: int) -> EncoderDecoder | RecurrentSeq2Seq:
    """The network that config.model describes."""
    model, dtype = config.model, common.DTYPES[config.model.dtype]
    if model.kind == "transformer":
        spec = shared.transformer_spec(model, max_length=config.data.buckets[-1])
        return EncoderDecoder(
            source_vocab, target_vocab, spec, shared_embedding=model.shared_embedding, dtype=dtype
        )
    return RecurrentSeq2Seq(
        source_vocab,
        target_vocab,
        embed=model.width,
        hidden=model.width,
        num_layers=model.num_layers,
        kind=model.kind,
        attention=model.attention,
        dropout=model.dropout,
        dtype=dtype,
    )


def make_translate(
    config: ConfigDict, model: Any, target: Tokenizer, *, beam: int
) -> Callable[[PyTree, Key, ArrayLike, ArrayLike, ArrayLike], Array]:
    """(params, key, sample numbers `[B]`, source `[B, S]`, lengths `[B]`) -> int32 `[B, max_new_tokens]`.

    The best of `beam`, or where that is 1 a chain of choices as config.sampling makes them.
    """
    num = config.max_new_tokens
    choose = shared.make_choose(config)

    @jax.jit
    def translate(params: PyTree, key: Key, indices: Array, source: Array, lengths: Array) -> Array:
        variables = {"params": params}
        memory = model.apply(variables, source, lengths, method="encode")
        tiled = repeat_rows(memory, beam)
        start = jnp.full((len(indices), 1), target.bos_id, jnp.int32)
        ones = jnp.ones(len(indices), jnp.int32)
        prefill = lambda rows, n: model.apply(variables, memory, rows, n, cache_length=num, method="prefill")
        step = lambda cache, token, at: model.apply(variables, tiled, cache, token, at, method="step")
        ends = {"eos": target.eos_id, "pad": target.pad_id, "max_new_tokens": num}
        if beam > 1:
            found = beam_search(
                prefill, step, start, ones, beam=beam, length_penalty=config.length_penalty, **ends
            )
            return found.tokens[:, 0]
        chain = decode_chain(
            prefill,
            step,
            start,
            ones,
            choose=choose,
            repetition_penalty=config.repetition_penalty,
            **ends,
        )
        return run_chain(chain, key, indices, (num,))

    return translate


def make_look(model: Any) -> Callable[[PyTree, Mapping[str, ArrayLike]], list[Array]]:
    """(params, a batch) -> the attention over the source of each layer, `[B, heads, T, S]`."""

    @jax.jit
    def look(params: PyTree, rows: Batch) -> list[Array]:
        inputs = [rows[name] for name in ("source", "source_lengths", "tokens")]
        _, state = model.apply({"params": params}, *inputs, mutable="intermediates")
        return [weights for _, weights in shared.attention_maps(state["intermediates"], cross=True)]

    return look


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds sentence pairs, network, loss, decoding and scores."""
    check(config)
    pairs = load(config, seed=config.seed)
    source, target = make_tokenizers(config.data, pairs["train"])
    encoded = {
        split: batches.encode_pairs(
            side, source, target, max_length=config.data.max_length, truncate=split != "train"
        )
        for split, side in pairs.items()
    }
    model: Any = make_model(config, len(source), len(target))
    ids: dict[str, int] = {"bos": target.bos_id, "pad_id": target.pad_id}
    buckets = tuple(config.data.buckets)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        one = {name: field[:1] for name, field in batch.items()}
        return model.init(key, one["source"], one["source_lengths"], one["tokens"])["params"], {}

    def apply(params: PyTree, model_state: PyTree, batch: Batch, key: Key | None) -> tuple[Array, PyTree]:
        logits = model.apply(
            {"params": params},
            batch["source"],
            batch["source_lengths"],
            batch["tokens"],
            **shared.dropout_arguments(key),
        )
        return logits, model_state

    loss = objective.make_loss(apply, **config.objective.to_dict())
    system = common.make_system(config, init, loss)
    sharding.check_divides(mesh, config.data.batch_size, "data.batch_size")
    stream = batches.PairStream(
        encoded["train"],
        batch_size=config.data.batch_size,
        buckets=buckets,
        group=config.train.steps_per_dispatch,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **ids,
    )
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- evaluation

    @jax.jit
    def means(params: PyTree, batch: Batch) -> Metrics:
        return loss(params, {}, batch, None)[1][0]

    def evaluation_batches(split: str) -> Iterable[tuple[np.ndarray, batches.Rows]]:
        return batches.pair_batches(
            encoded[split], batch_size=config.evaluation.batch_size, buckets=buckets, **ids
        )

    def mean_losses(params: PyTree, split: str) -> Metrics:
        total: Metrics | None = None
        for _, rows in evaluation_batches(split):
            found = jax.device_get(means(params, rows))
            total = found if total is None else {name: m.merge(found[name]) for name, m in total.items()}
        return cast(Metrics, total)

    def translations(params: PyTree, translate: Callable[..., Array], key: Key) -> list[str]:
        written = [""] * len(pairs["test"])
        size = config.evaluation.batch_size
        with tqdm(total=len(written), desc="translating", unit="sentence", leave=False) as bar:
            for members, rows in evaluation_batches("test"):
                numbers = np.append(members, np.full(size - len(members), members[0])).astype(np.int32)
                found = translate(params, key, numbers, rows["source"], rows["source_lengths"])
                for number, row in zip(members, np.asarray(found), strict=False):
                    written[number] = to_text(target, row)
                bar.update(len(members))
        return written

    decoders = {
        beam: make_translate(config.sampling, model, target, beam=beam)
        for beam in {1, config.evaluation.beam, config.sampling.beam}
    }

    def evaluate(state: TrainState, needs: object) -> Scores:
        params = state.sampling_params
        found = mean_losses(params, "test")
        num_tokens = int(found["nats"].count)
        nats, accuracy = float(found["nats"].value), float(found["accuracy"].value)
        scores: dict[str, Score] = {}
        for beam in sorted({1, config.evaluation.beam}):
            written = translations(params, decoders[beam], jax.random.key(config.seed))
            scores.update(translation_scores(written, pairs["test"].target, beam=beam))
        return {
            **scores,
            "test_perplexity": Score(metrics.perplexity(nats, 1), "per token", num_tokens, False),
            "test_token_accuracy": Score(accuracy, "share, given those before", num_tokens, True),
        }

    # ---- samples

    look = make_look(model)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """Translations of test sentences drawn by the key, a text file each; the attention of the first."""
        num = num or config.sampling.num
        params, size = state.sampling_params, min(num, config.sampling.num)
        which_key, choice_key = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(which_key, jnp.arange(num))
        limit = len(pairs["test"])
        which = np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, limit))(keys))
        written: list[str] = []
        for start in range(0, num, size):
            numbers = np.minimum(np.arange(start, start + size), num - 1).astype(np.int32)
            rows = batches.pair_batch(encoded["test"], which[numbers], buckets[-1], **ids)
            found = decoders[config.sampling.beam](
                params, choice_key, numbers, rows["source"], rows["source_lengths"]
            )
            written += [to_text(target, row) for row in np.asarray(found)]
        test, shown, paths = pairs["test"], [], []
        directory.mkdir(parents=True, exist_ok=True)
        for number, (index, text) in enumerate(zip(which, written, strict=False)):
            shown.append(
                f"source      {test.source[index]}\nreference   {test.target[index]}\nours        {text}"
            )
            paths.append(directory / f"sample_{number:03d}.txt")
            paths[-1].write_text(shown[-1] + "\n", encoding="utf-8")
        pictures = [directory / "translations.png", directory / "attention.png"]
        shared.save_text_picture(pictures[0], shown[:8])
        rows = batches.pair_batch(encoded["test"], which[:1], buckets[-1], **ids)
        save_alignment(pictures[1], look(params, rows), rows, source, target)
        return [*paths, *pictures]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: mean_losses(state.sampling_params, "validation"),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={
            **{split: side.fingerprint for split, side in pairs.items()},
            "source_tokenizer": source.fingerprint,
            "target_tokenizer": target.fingerprint,
        },
        seed=config.seed,
    )


def to_text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of ids up to the first `<eos>`."""
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return tokenizer.decode(ids[: ends[0]] if len(ends) else ids)


def translation_scores(written: Sequence[str], references: Sequence[str], *, beam: int) -> Scores:
    """BLEU and chrF with their signatures, and the share that is exactly right."""
    bleu = metrics.bleu(written, references, tokenize=metrics.bleu_tokenizer(references))
    chrf = metrics.chrf(written, references)
    suffix, num = (f"_beam{beam}" if beam > 1 else ""), len(written)
    exact = metrics.exact_match(written, references)
    return {
        f"exact_match{suffix}": Score(exact, "share of sentences", num, True),
        f"bleu{suffix}": Score(bleu.value, f"BLEU, {bleu.signature}", num, True),
        f"chrf{suffix}": Score(chrf.value, f"chrF2, {chrf.signature}", num, True),
    }


def save_alignment(
    path: Path, maps: Sequence[Array], rows: batches.Rows, source: Tokenizer, target: Tokenizer
) -> None:
    """The attention of the last layer's heads over the source, for the first of `rows`, as a picture."""
    last = np.asarray(maps[-1][0])  # [H, T, S]
    num, width = int(rows["lengths"][0]), int(rows["source_lengths"][0])
    columns = [piece(source, i) for i in rows["source"][0, :width]]
    labels = [piece(target, i) for i in rows["targets"][0, :num]]
    titles = [f"head {head + 1}" if len(last) > 1 else "attention" for head in range(len(last))]
    shown = [
        (title, weights[:num, :width], labels, columns) for title, weights in zip(titles, last, strict=True)
    ]
    shared.save_attention_picture(path, shown)


def piece(tokenizer: Tokenizer, number: int) -> str:
    """How one id is shown in a picture: its text, or the name of its symbol."""
    return tokenizer.specials[number] if number < len(tokenizer.specials) else tokenizer.decode([number])
