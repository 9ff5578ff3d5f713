"""The word vectors that the figures of words are drawn from: a file of the user's, or ones made here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import cooccurrence
from experiments.common import word_vectors
from experiments.figures import command
from jaxgen.data.cache import cache_dir
from jaxgen.interop.word2vec import read_word2vec, write_word2vec
from jaxgen.metrics.words import Vectors
from jaxgen.types import UserError
from jaxgen.words import factorize


def parser(name: str) -> argparse.ArgumentParser:
    """`command.parser` with --vectors."""
    made = command.parser(name)
    made.add_argument(
        "--vectors",
        type=Path,
        help="a word2vec file (.txt, .bin); without it, vectors are counted from wiki100m of JAXGEN_DATA_DIR "
        "and kept in the cache (2 minutes)",
    )
    return made


def file_of(given: Path | None) -> Path:
    """The file asked for, or that of experiments/cooccurrence.py:wiki's vectors, made where it is not."""
    if given is not None:
        return given
    made = cache_dir() / "vectors" / "cooccurrence_wiki.bin"
    if not made.is_file():
        config = cooccurrence.get_config("wiki")
        corpus = word_vectors.load_corpus(config.data)
        svd = factorize.truncated_svd(
            factorize.sparse_operator(cooccurrence.matrix_of(corpus, config.model)),
            config.model.dim,
            jax.random.key(config.seed),
            num_iterations=config.train.num_steps - 1,
        )
        vectors = np.asarray(factorize.word_vectors(svd, power=config.model.power))
        made.parent.mkdir(parents=True, exist_ok=True)
        write_word2vec(made, corpus.vocabulary.words, vectors)
    return made


def load(given: Path | None, *, restrict: int | None = None) -> Vectors:
    """The table of the vectors, or of the first `restrict` of them, upper and lower case folded."""
    words, vectors = read_word2vec(file_of(given), limit=restrict)
    return Vectors(vectors, words, fold_case=True)


def unit_rows(table: Vectors, words: Sequence[str]) -> np.ndarray:
    """The words' vectors of length 1, float32 [N, D]. Raises UserError where one has none."""
    missing = [word for word in words if table.find(word) < 0]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no vector among these {len(table.words)}; give other vectors."
        )
    return table.unit[table.rows(words)]
