"""Word vectors from running text: skip-gram and CBOW (Mikolov et al. 2013a, 2013b).

  python -m jaxgen.run --config=experiments/word2vec.py:pydocs --workdir=runs/words
  python -m jaxgen.run --config=experiments/word2vec.py:file --config.data.path=MY.txt --workdir=runs/mine

Read objectives/word2vec, words/pieces, systems.row_descent and this file. The samples are the vectors, as
vectors.txt, which gensim reads, the neighbours of frequent words, and a picture of the words' plane.
pydocs is the 65,000 words of reference text inside CPython; wiki, 100 MB of Wikipedia, needs --data_dir.
Texts are plain UTF-8, words apart by spaces, a sentence a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, word_vectors
from jaxgen import sharding, systems
from jaxgen.objectives import word2vec as objective
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
from jaxgen.words.huffman import huffman_paths
from jaxgen.words.pieces import Pieces

GENERATES = False
_OWN_TRAIN_FIELDS = ("epochs", "learning_rate", "last_learning_rate", "longest_step")  # not of `LoopSettings`
ARCHITECTURES = ("skip_gram", "cbow")
LOSSES = ("negative_sampling", "hierarchical_softmax", "softmax")
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "data.max_size": 200,
            "data.stretch": 64,
            "data.num_streams": 4,
            "data.piece": 8,
            "model.dim": 8,
            "train.epochs": 0.016,
            "train.log_every": 1,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
        },
    ),
    "pydocs": Preset("2 CPU cores", 0.5, "neighbours of `list`: `tuple`, `sequence`, `dictionary`", {}),
    "file": Preset(
        "2 CPU cores",
        5,
        "depends on the text",
        {
            "data.source": "file",
            "train.epochs": 5.0,
            "train.log_every": 10,
            "train.validate_every": 100,
            "train.checkpoint_every": 1000,
        },
    ),
    "wiki": Preset(
        "2 CPU cores",
        2,
        "analogies 0.396 of the 30,000 commonest words, WordSim-353 0.693",
        {
            "data.source": "wiki",
            "data.min_count": 5,
            "data.stretch": 8192,
            "data.num_streams": 32,
            "data.subsample": 1e-3,
            "model.dim": 200,
            "train.epochs": 5.0,
            "train.log_every": 10,
            "train.validate_every": 100,
            "train.checkpoint_every": 100,
        },
    ),
    "large": Preset(
        "1 GPU",
        600,
        "depends on the text",
        {
            "data.source": "file",
            "data.min_count": 5,
            "data.max_size": 1_000_000,
            "data.stretch": 8192,
            "data.num_streams": 256,
            "data.subsample": 1e-5,
            "model.dim": 300,
            "train.epochs": 3.0,
            "train.log_every": 10,
            "train.validate_every": 100,
            "train.checkpoint_every": 100,
        },
    ),
}
FIELD_CHECKS = {
    **word_vectors.FIELD_CHECKS,
    "data.subsample": (1e-2, {}),
    "model.architecture": ("cbow", {}),
    "model.context": ("sum", {"model.architecture": "cbow"}),
    "objective.loss": ("softmax", {}),
    "objective.shared_negatives": (8, {}),
    "objective.sharing": (2, {}),
    "train.best_metric": ("loss", {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `pydocs`."""
    config = common.base_config(num_steps=0)
    del config.optim, config.data, config.train.num_steps
    config.data = ConfigDict(
        {
            **word_vectors.TEXT,
            "subsample": 1e-3,  # words more frequent than this share are thinned out; 0: none
            "num_streams": 16,  # places where the text is read at once
            "stretch": 1024,  # words that each of them reads a step
            "piece": 32,  # words of a piece, which share their negatives
        }
    )
    config.model = ConfigDict(
        {
            "architecture": "skip_gram",  # skip_gram, cbow
            "context": "word2vec",  # cbow: mean, sum, word2vec (the mean with the gradient of the sum)
            "dim": 100,
            "window": 5,
        }
    )
    config.objective = ConfigDict(
        {
            "loss": "negative_sampling",  # negative_sampling, hierarchical_softmax, softmax
            "negatives": 5,  # of a pair
            "shared_negatives": 40,  # that pieces draw together, weighted to stand for those of all pairs
            "sharing": 4,  # pieces of an update that share their negatives
            "ns_exponent": 0.75,
        }
    )
    config.train.epochs = 20.0
    config.train.learning_rate = 0.025
    config.train.last_learning_rate = 1e-4
    config.train.longest_step = 1.0  # of a vector by one look-up; 0: any, which diverges with wide windows
    config.train.steps_per_dispatch = 1
    config.train.log_every = 1
    config.train.validate_every = 20
    config.train.checkpoint_every = 20
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense, or would train nothing."""
    checks.at_least(config, 0, "seed", "data.subsample", "train.last_learning_rate", "train.longest_step")
    checks.at_least(config, 1, "data.min_count", "data.max_size", "data.num_streams", "data.stretch")
    checks.at_least(config, 1, "data.piece", "model.dim", "model.window")
    checks.at_least(config, 1, "objective.shared_negatives", "objective.sharing")
    word_vectors.check_text(config)
    checks.one_of(config, ARCHITECTURES, "model.architecture")
    checks.one_of(config, get_args(objective.ContextKind), "model.context")
    checks.one_of(config, LOSSES, "objective.loss")
    for field in ("train.epochs", "train.learning_rate"):
        checks.above(config, 0, field)
    for name, value in (
        ("data.num_streams", config.data.num_streams),
        ("objective.shared_negatives", config.objective.shared_negatives),
    ):
        if value % config.objective.sharing:
            raise UserError(
                f"objective.sharing={config.objective.sharing} must divide {name}={value}: change either."
            )
    if config.objective.loss == "negative_sampling" and config.objective.negatives < 1:
        raise UserError(
            f"objective.negatives={config.objective.negatives} trains nothing: without negatives all vectors "
            "come to point one way; give at least 1, or another objective.loss."
        )


def make_update(config: ConfigDict, counts: np.ndarray, num_sides: int = 1) -> tuple[Any, Any]:
    """(init, (update, mean_loss)) for `systems.update_system`: a step goes through its pieces in turn.

    num_sides: on CPU the streams of an update are worked out in this many parts side by side, which keeps
        as many cores busy
    """
    window, piece = config.model.window, config.data.piece
    skip_gram = config.model.architecture == "skip_gram"
    loss_name, negatives = config.objective.loss, config.objective.negatives
    size, dim = len(counts), config.model.dim
    paths = huffman_paths(counts) if loss_name == "hierarchical_softmax" else None
    outer = "centre" if not skip_gram else "around"  # the words whose output vectors are used

    def init(key: Key, batch: Batch) -> dict[str, Array]:
        spread = (jax.random.uniform(key, (size, dim)) - 0.5) / dim
        return {"input": spread, "output": jnp.zeros((size - (paths is not None), dim))}

    def loss_of_rows(rows: Mapping[str, Array], inside: Array, words: Mapping[str, Array]) -> Array:
        """The sum over the pieces `[B]` that are looked at together."""
        if loss_name == "negative_sampling":
            shared = rows["negatives"].reshape(-1, config.objective.shared_negatives, dim)
            parts = (inside, rows["centre"], rows["around"], shared, negatives)
            if skip_gram:
                return objective.skip_gram_piece_loss(*parts).sum()
            return objective.cbow_piece_loss(*parts, config.model.context).sum()
        if skip_gram:
            if loss_name == "softmax":
                return objective.skip_gram_piece_softmax_loss(
                    inside, rows["centre"], rows["output"], words["around"]
                ).sum()
            return objective.skip_gram_piece_hierarchical_loss(
                inside, rows["centre"], rows["nodes"], words["turns"]
            ).sum()
        h = objective.cbow_context(inside, rows["around"], config.model.context)
        counted = inside.sum(axis=-1) > 0
        if loss_name == "softmax":
            each = objective.softmax_loss(h, rows["output"], words["centre"])
        else:
            each = objective.hierarchical_softmax_loss(h, rows["nodes"], words["turns"])
        return jnp.where(counted, each, 0.0).sum()

    def looked_up(part: Mapping[str, Array]) -> tuple[dict[str, tuple[str, Array]], dict[str, Array], Array]:
        """(the rows a piece looks up, its words, its window mask)."""
        words = {"around": part["tokens"], "centre": part["tokens"][:, window : window + piece]}
        inside = objective.window_mask(part["left"], part["right"], window)
        inner = "centre" if skip_gram else "around"
        look_ups = {inner: ("input", words[inner])}
        if loss_name == "negative_sampling":
            look_ups |= {outer: ("output", words[outer]), "negatives": ("output", part["negatives"])}
        elif loss_name == "softmax":
            look_ups["output"] = ("output", jnp.arange(size))
        else:
            assert paths is not None
            look_ups["nodes"] = ("output", jnp.asarray(paths.nodes)[words[outer]])
            words["turns"] = jnp.asarray(paths.turns)[words[outer]]
        return look_ups, words, inside

    def mean_loss(tables: Mapping[str, Array], part: Mapping[str, Array]) -> Mean:
        """Per pair (skip-gram) or place (CBOW), in nats."""
        look_ups, words, inside = looked_up(part)
        rows = {name: tables[table][numbers] for name, (table, numbers) in look_ups.items()}
        count = inside.sum() if skip_gram else (inside.sum(axis=-1) > 0).sum().astype(jnp.float32)
        return Mean(loss_of_rows(rows, inside, words), jnp.maximum(count, 1.0))

    def update(tables: PyTree, batch: Batch, key: Key) -> tuple[PyTree, Metrics]:
        fields = ("tokens", "left", "right", "negatives")
        parts = {name: jnp.moveaxis(batch[name], 1, 0) for name in fields}
        rate = batch["rate"][0]
        sides_here = num_sides if jax.default_backend() == "cpu" else 1

        def loss_and_look_ups(part: Mapping[str, Array]) -> tuple[Any, Any]:
            look_ups, words, inside = looked_up(part)
            return (lambda rows: loss_of_rows(rows, inside, words)), look_ups

        def one(tables: PyTree, part: Mapping[str, Array]) -> tuple[PyTree, None]:
            sides = zip(*(jnp.split(field, sides_here) for field in part.values()), strict=True)
            losses = [loss_and_look_ups(dict(zip(part, side, strict=True))) for side in sides]
            return systems.row_descent(losses, tables, rate, config.train.longest_step), None

        tables, _ = jax.lax.scan(one, tables, parts)
        return tables, {"loss": mean_loss(tables, {name: part[0] for name, part in parts.items()})}

    return init, (update, mean_loss)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds text, windows, loss and the judges of vectors."""
    check(config)
    corpus = word_vectors.load_corpus(config.data)
    vocabulary = corpus.vocabulary
    devices = mesh.devices.size
    if config.data.num_streams % devices:
        raise UserError(
            f"data.num_streams={config.data.num_streams} must be a multiple of {devices} devices."
        )
    share = config.data.num_streams // jax.process_count()
    pieces = Pieces(
        corpus,
        num_streams=config.data.num_streams,
        stretch=config.data.stretch,
        piece=config.data.piece,
        window=config.model.window,
        subsample=config.data.subsample,
        noise=objective.noise_distribution(vocabulary.counts, config.objective.ns_exponent),
        negatives=config.objective.shared_negatives // config.objective.sharing,
        rates=(config.train.learning_rate, config.train.last_learning_rate),
        epochs=config.train.epochs,
        seed=config.seed,
        rows=slice(jax.process_index() * share, (jax.process_index() + 1) * share),
    )
    # A table that is looked up whole must not be looked up twice.
    halves = config.data.num_streams % (2 * config.objective.sharing) == 0 and devices == 1
    num_sides = 2 if halves and config.objective.loss != "softmax" else 1
    init, (update, mean_loss) = make_update(config, vocabulary.counts, num_sides)
    system = systems.update_system(init, update)
    settings = {
        name: value for name, value in config.train.to_dict().items() if name not in _OWN_TRAIN_FIELDS
    }
    loop = common.loop_settings(ConfigDict({**settings, "num_steps": pieces.num_steps}))
    if config.train.best_metric not in ("", "loss"):
        raise UserError(f"train.best_metric must be loss or nothing, not {config.train.best_metric}.")

    @jax.jit
    def validation_loss(tables: PyTree, part: Mapping[str, Array]) -> Metrics:
        return {"loss": mean_loss(tables, part)}

    fixed = sharding.place(mesh, {name: field[:, 0] for name, field in pieces(0).items() if name != "rate"})

    def validate(state: TrainState) -> Metrics:
        return validation_loss(state.params, fixed)

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        loss = validation_loss(state.params, fixed)["loss"]
        of = "pair" if config.model.architecture == "skip_gram" else "place"
        scores = {"loss": Score(float(loss.value), f"nats a {of}, of training text", int(loss.count), False)}
        return {**scores, **word_vectors.scores(np.asarray(state.params["input"]), vocabulary.words)}

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        return word_vectors.write(np.asarray(state.params["input"]), vocabulary, directory, num or 20)

    return Experiment(
        system=system,
        loop=loop,
        train_batch=pieces,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"text": corpus.fingerprint},
        seed=config.seed,
    )
