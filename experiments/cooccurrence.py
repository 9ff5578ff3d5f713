"""Word vectors by counting: window co-occurrence, what it says beyond chance (PPMI), and its truncated SVD.

  python -m jaxgen.run --config=experiments/cooccurrence.py:pydocs --workdir=runs/counted
  python -m jaxgen.run --config=experiments/cooccurrence.py:file --config.data.path=MY.txt --workdir=runs/mine

The text is counted once, a chunk at a time, so that memory is that of the matrix. An update is a round of
subspace iteration on the matrix (Halko, Martinsson & Tropp 2011); its loss is the share of the squared
entries that the vectors leave out. model.matrix=lsa takes the words of each line instead, weighted by log and
entropy. The vectors are judged and written as those of experiments/word2vec.py, skip-gram's being implicitly
a factorisation of the shifted PMI matrix (Levy & Goldberg 2014); model.shift is its number of negatives.
pydocs: 10 seconds on 2 CPU cores. wiki: 80 seconds, 2.2 GB of memory, and 100 MB of Wikipedia in --data_dir.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, counting, word_vectors
from jaxgen import systems
from jaxgen.types import Batch, Experiment, Key, Mean, Metrics, Score, Scores, TrainState, UserError
from jaxgen.words import counts, factorize
from jaxgen.words.factorize import SVD
from jaxgen.words.text import Corpus

GENERATES = False
MATRICES = ("ppmi", "lsa")
BLOCK = 1 << 13  # entries of the matrix that are multiplied at once
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            **counting.SMOKE_TRAIN,
            "data.max_size": 200,
            "model.dim": 8,
            "model.oversamples": 4,
        },
    ),
    "pydocs": Preset("2 CPU cores", 0.2, "not recorded yet", {}),
    "file": Preset("2 CPU cores", 1, "depends on the text", {"data.source": "file"}),
    "wiki": Preset(
        "2 CPU cores",
        1.5,
        "analogies 0.346 of the 20,000 words, WordSim-353 0.656",
        {
            "data.source": "wiki",
            "data.min_count": 5,
            "data.max_size": 20_000,
            "train.num_steps": 4,
            "train.validate_every": 4,
            "train.checkpoint_every": 2,
        },
    ),
}
FIELD_CHECKS = {
    **{field: value for field, value in common.FIELD_CHECKS.items() if field.startswith("train.")},
    **word_vectors.FIELD_CHECKS,
    "model.matrix": ("lsa", {}),
    "model.direction": ("left", {}),
    "model.weighting": ("harmonic", {}),
    "model.shift": (3.0, {}),
}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `pydocs`."""
    config = counting.base_config(source="", batch_size=0, num_steps=10)
    config.data = ConfigDict(word_vectors.TEXT)
    config.model = ConfigDict(
        {
            "matrix": "ppmi",  # ppmi, lsa
            "window": 5,
            "direction": "both",  # of the window: both, left, right
            "weighting": "uniform",  # of a neighbour at d places: 1 (uniform), 1/d (harmonic)
            "shift": 1.0,  # log of it is taken off the PMI
            "smoothing": 0.75,  # of the contexts' distribution, an exponent; 1: none
            "dim": 100,
            "oversamples": 10,  # dimensions that are iterated beyond dim
            "power": 0.5,  # of the singular values in the vectors U S^power
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.at_least(config, 0, "seed", "model.oversamples", "model.power")
    checks.at_least(config, 1, "data.min_count", "data.max_size", "model.window", "model.dim")
    checks.above(config, 0, "model.shift", "model.smoothing")
    word_vectors.check_text(config)
    checks.one_of(config, MATRICES, "model.matrix")
    checks.one_of(config, get_args(counts.Direction), "model.direction")
    checks.one_of(config, get_args(counts.Weighting), "model.weighting")
    common.loop_settings(config.train)  # looks at its fields itself


def matrix_of(corpus: Corpus, config: ConfigDict) -> scipy.sparse.csr_matrix:
    """The matrix that config.model describes: words [V] by words, or by lines, float64."""
    text = (corpus.tokens, corpus.starts, len(corpus.vocabulary))
    if config.matrix == "lsa":
        return factorize.log_entropy(counts.document_counts(*text))
    counted = counts.cooccurrence(
        *text, window=config.window, direction=config.direction, weighting=config.weighting
    )
    return counts.ppmi(counted, shift=config.shift, smoothing=config.smoothing)


def blocks_of(matrix: scipy.sparse.csr_matrix, multiple: int) -> dict[str, np.ndarray]:
    """The entries as `row`, `column` int32 and `value` float32, all [N, BLOCK], `multiple` dividing N."""
    cells = matrix.tocoo()
    size = BLOCK * multiple
    filled = (0, -(-cells.nnz // size) * size - cells.nnz)  # with zeros at (0, 0)
    fields = {"row": cells.row, "column": cells.col, "value": cells.data}
    dtypes = {"row": np.int32, "column": np.int32, "value": np.float32}
    return {
        name: np.pad(field.astype(dtypes[name]), filled).reshape(-1, BLOCK) for name, field in fields.items()
    }


def iterate(svd: SVD, batch: Batch) -> SVD:
    """A round of subspace iteration on the batch's matrix A [V, C]: from U, Z = orth(A^T U), then A Z.

    The SVD U S W^T of A Z gives A ~ A Z Z^T = U S (Z W)^T, the best within the span of Z.
    """
    row, column, value = batch["row"], batch["column"], batch["value"]
    z, _ = jnp.linalg.qr(factorize.sparse_product(column, row, value, svd.vt.shape[1], svd.u))
    q, r = jnp.linalg.qr(factorize.sparse_product(row, column, value, svd.u.shape[0], z))
    u, s, wt = jnp.linalg.svd(r)
    exact = jax.lax.Precision.HIGHEST
    return SVD(jnp.matmul(q, u, precision=exact), s, jnp.matmul(wt, z.T, precision=exact))


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds the text, its matrix, the iteration and the judges of vectors."""
    check(config)
    corpus = word_vectors.load_corpus(config.data)
    matrix = matrix_of(corpus, config.model)
    if not matrix.nnz:
        raise UserError(
            f"model.shift={config.model.shift} leaves nothing of the matrix: lower it, or give more text."
        )
    checks.at_most(config, min(matrix.shape), "model.dim")
    dim, power = config.model.dim, config.model.power
    size = min(dim + config.model.oversamples, *matrix.shape)
    whole = float(np.sum(matrix.data**2))
    # Every update takes the whole matrix, of which each process holds its share.
    blocks = blocks_of(matrix, mesh.devices.size)
    share = len(blocks["row"]) // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    batch = {name: field[mine] for name, field in blocks.items()}

    def init(key: Key, batch: Batch) -> SVD:
        start, _ = jnp.linalg.qr(jax.random.normal(key, (matrix.shape[0], size)))
        return SVD(start, jnp.zeros(size), jnp.zeros((size, matrix.shape[1])))

    def left_out(svd: SVD) -> Metrics:
        share = 1 - jnp.sum(svd.s[:dim] ** 2) / whole
        return {"loss": Mean(share, jnp.ones(()))}

    def update(svd: SVD, batch: Batch, key: Key) -> tuple[SVD, Metrics]:
        svd = iterate(svd, batch)
        return svd, left_out(svd)

    validation = jax.jit(left_out)
    vectors_of = jax.jit(
        lambda svd: factorize.word_vectors(SVD(svd.u[:, :dim], svd.s[:dim], svd.vt[:dim]), power=power)
    )

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        explained = 1 - float(validation(state.params)["loss"].value)
        unit = f"share of the squared entries of the {config.model.matrix} matrix"
        scores = {"explained": Score(explained, unit, matrix.nnz, True)}
        return {
            **scores,
            **word_vectors.scores(np.asarray(vectors_of(state.params)), corpus.vocabulary.words),
        }

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        vectors = np.asarray(vectors_of(state.params))
        return word_vectors.write(vectors, corpus.vocabulary, directory, num or 20)

    return Experiment(
        system=systems.update_system(init, update),
        loop=common.loop_settings(config.train),
        train_batch=lambda step: batch,
        validate=lambda state: validation(state.params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"text": corpus.fingerprint},
        seed=config.seed,
    )
