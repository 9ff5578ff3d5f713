"""What experiments on words have in common: the text they are trained on, and the judges of word vectors."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.common import checks
from jaxgen.data.cache import cache_dir, write_text
from jaxgen.estimators import linear
from jaxgen.interop.word2vec import write_word2vec
from jaxgen.metrics import words as judges
from jaxgen.types import Score, Scores, UserError
from jaxgen.words.text import Corpus, encode_file
from jaxgen.words.vocabulary import Vocabulary

SOURCES = ("pydocs", "wiki", "file")
# The fields of config.data that say which text is read, and in which words.
TEXT = {
    "source": "pydocs",  # pydocs, wiki, file
    "path": "",  # file: a text file
    "lowercase": True,
    "min_count": 3,
    "max_size": 100_000,  # of the vocabulary
}
FIELD_CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "data.source": ({"data.source": "file", "data.path": "{folder}/words.txt"}, {}),
    "data.path": ("{folder}/others.txt", {"data.source": "file", "data.path": "{folder}/words.txt"}),
    "data.lowercase": (False, {}),
    "data.min_count": (300, {}),
}
ANALOGY_WORDS = 30_000  # the vocabulary that answers are chosen from, as the C program's default
_SIMILARITIES = {
    "wordsim353": "EN-WS-353-ALL.txt",
    "wordsim353_related": "EN-WS-353-REL.txt",
    "wordsim353_similar": "EN-WS-353-SIM.txt",
    "men": "EN-MEN-TR-3k.txt",
    "simlex999": "EN-SIMLEX-999.txt",
    "simverb3500": "EN-SimVerb-3500.txt",
    "verb143": "EN-VERB-143.txt",
    "rare_words": "EN-RW-STANFORD.txt",
    "mturk287": "EN-MTurk-287.txt",
    "mturk771": "EN-MTurk-771.txt",
    "rg65": "EN-RG-65.txt",
    "mc30": "EN-MC-30.txt",
    "yp130": "EN-YP-130.txt",
}
# Those of the hypernyms of BLESS (Baroni & Lenci 2011) that are the classes which its words were chosen by.
_BLESS_CLASSES = (
    *("appliance", "bird", "building", "clothing", "container", "fish", "fruit", "furniture"),
    *("insect", "instrument", "mammal", "tool", "tree", "vegetable", "vehicle", "weapon"),
)


def check_text(config: ConfigDict) -> None:
    """UserError where config.data names a text that is not read, or no known one."""
    checks.one_of(config, SOURCES, "data.source")
    if config.data.path and config.data.source != "file":
        raise UserError(
            f"data.path={config.data.path} is not read with data.source={config.data.source}: add "
            "--config.data.source=file, or take the path away."
        )


def load_corpus(config: ConfigDict) -> Corpus:
    """The text that config.data describes, encoded once and kept in the cache."""
    path = text_file(config.source, config.path, config.lowercase)
    settings = f"{config.min_count}_{config.max_size}"
    directory = cache_dir() / "corpora" / f"{_name_of(path)}_{settings}"
    return encode_file(path, directory, min_count=config.min_count, max_size=config.max_size)


def _name_of(path: Path) -> str:
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', path.stem)[-60:]}_{digest}"


def text_file(source: str, path: str, lowercase: bool) -> Path:
    """A UTF-8 file of words apart by spaces, made where the source is none yet."""
    if source == "file":
        if not path:
            raise UserError("data.source=file needs the name of the text: --config.data.path=FILE.")
        return _lowered(Path(os.path.expanduser(path))) if lowercase else Path(os.path.expanduser(path))
    texts = cache_dir() / "texts"
    if source == "pydocs":
        made = texts / ("pydocs_lower.txt" if lowercase else "pydocs.txt")
        text = _python_documentation()
        text = text.lower() if lowercase else text
        if not made.is_file() or made.read_text(encoding="utf-8") != text:
            write_text(made, [text])
        return made
    folder = os.environ.get("JAXGEN_DATA_DIR", "")
    packed = Path(folder) / "wiki100m" / "enwiki_100m.txt.bz2"
    if not folder or not packed.is_file():
        raise UserError(
            f"The text wiki is not at {packed}: give the folder that holds wiki100m/ as --data_dir, or train "
            "on your own text with data.source=file."
        )
    made = texts / "enwiki_100m.txt"
    if not made.is_file():
        write_text(made, packed_lines(packed))
    return made


def packed_lines(path: Path) -> Iterator[str]:
    """The lines, with their ends, of a .gz, .bz2 or .xz file of UTF-8; UserError where it is damaged."""
    opens: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with opens[path.suffix](path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): get it again.") from error


def _lowered(path: Path) -> Path:
    """A lower-case copy of a text in the cache, made again when the text changes."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not path.is_file():
        raise UserError(f"{path} is no text file.")
    made = cache_dir() / "texts" / f"{_name_of(path)}_{status.st_size}_{status.st_mtime_ns}.txt"
    if not made.is_file():
        try:
            with path.open(encoding="utf-8") as text:
                write_text(made, (piece.lower() for piece in iter(lambda: text.read(1 << 22), "")))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    return made


def _python_documentation() -> str:
    """The words of the reference text inside the running CPython, a paragraph a line."""
    from pydoc_data import topics

    paragraphs = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).split("\n\n")
    return "\n".join(" ".join(re.findall(r"[^\W\d_]+", paragraph)) for paragraph in paragraphs) + "\n"


def scores(vectors: np.ndarray, words: Sequence[str]) -> Scores:
    """Analogies, similarities and categories, for as many of the sets as are at hand and know the words.

    vectors: float [V, D]; words: the most frequent first.
    """
    data = Path(os.environ.get("JAXGEN_DATA_DIR", ""))
    folder = data / "wordsim"
    found: dict[str, Score] = {}
    if (folder / "questions-words.txt").is_file():
        table = judges.Vectors(vectors, words, restrict=ANALOGY_WORDS, fold_case=True)
        questions = judges.read_analogies(folder / "questions-words.txt")
        by_addition = judges.analogies(table, questions)
        by_product = judges.analogies(table, questions, method="mul")["total"]
        asked = {
            "analogies": ("3CosAdd", by_addition.pop("total")),
            "analogies_3cosmul": ("3CosMul", by_product),
            **{f"analogies_{section}": ("3CosAdd", score) for section, score in by_addition.items()},
        }
        for name, (method, score) in asked.items():
            if score.asked:
                of = f"{score.out_of_vocabulary:,} out of the {min(len(words), ANALOGY_WORDS):,} words"
                found[name] = Score(score.accuracy, f"share, {method}, {of}", score.asked, True)
    table = judges.Vectors(vectors, words, fold_case=True)
    for name, file in _SIMILARITIES.items():
        if (folder / file).is_file():
            similarity = judges.similarity(table, judges.read_similarities(folder / file))
            if similarity.num_pairs > 2 and np.isfinite(similarity.rho):
                of = f"{similarity.out_of_vocabulary:,} pairs out of vocabulary"
                found[name] = Score(similarity.rho, f"Spearman, {of}", similarity.num_pairs, True)
    return {**found, **_category_scores(table, _bless_categories(data / "hypernyms"))}


def judged_pairs(files: Iterable[Path]) -> tuple[list[tuple[str, str]], list[bool]]:
    """Pairs of nouns of Shwartz, Santus & Schlechtweg 2017, and whether the second is a hypernym."""
    pairs, label = [], []
    for path in files:
        for line in packed_lines(path):
            x, y, is_a, _ = line.split("\t")
            if x.endswith("-n") and y.endswith("-n"):
                pairs.append((x[:-2], y[:-2]))
                label.append(is_a == "True")
    return pairs, label


def _bless_categories(folder: Path) -> dict[str, list[str]]:
    """{class: its words} of BLESS, without the words of several classes; empty where it is not at hand."""
    files = [folder / f"siege-BLESS.{part}.tsv.gz" for part in ("val", "test")]
    if not all(file.is_file() for file in files):
        return {}
    classes: dict[str, set[str]] = {}
    for (word, other), is_hypernym in zip(*judged_pairs(files), strict=True):
        if is_hypernym and other in _BLESS_CLASSES:
            classes.setdefault(word, set()).add(other)
    return {
        name: sorted(word for word, its in classes.items() if its == {name})
        for name in sorted(_BLESS_CLASSES)
    }


def _category_scores(table: judges.Vectors, categories: dict[str, list[str]]) -> Scores:
    """Purity of a clustering, and how often the one of another category is found among four of one."""
    known = {name: [word for word in words if table.find(word) >= 0] for name, words in categories.items()}
    missing = sum(map(len, categories.values())) - sum(map(len, known.values()))
    known = {name: words for name, words in known.items() if len(words) >= 4}
    if len(known) < 2:
        return {}
    of = f"{len(known)} classes of BLESS, {missing} words out of vocabulary"
    purity, num, _ = judges.categorisation(table, known)
    rng = np.random.default_rng(0)
    right = [
        judges.odd_one_out(table, [*rng.choice(words, 4, replace=False), stranger]).word == stranger
        for name, words in known.items()
        for other, strangers in known.items()
        if other != name
        for stranger in strangers
    ]
    return {
        "category_purity": Score(purity, f"share, spherical k-means, {of}", num, True),
        "odd_one_out": Score(
            float(np.mean(right)), f"share, one word among four of another class, {of}", len(right), True
        ),
    }


def write(vectors: np.ndarray, vocabulary: Vocabulary, directory: Path, num: int) -> list[Path]:
    """vectors.txt for gensim and others, neighbours of `num` words, and the picture of a plane of words."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in ("vectors.txt", "neighbours.txt", "plane.png")]
    write_word2vec(paths[0], vocabulary.words, vectors, binary=False)
    table = judges.Vectors(vectors, vocabulary.words)
    # Words of the middle: the most frequent ones are of all company.
    chosen = [word for word in vocabulary.words[len(vocabulary) // 50 :] if len(word) > 3][:num]
    lines = [
        f"{word}: {', '.join(near for near, _ in judges.nearest_neighbours(table, word, num=8))}"
        for word in chosen
    ]
    paths[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plane(table, vocabulary.words[: max(60, num)], paths[2])
    return paths


def _plane(table: judges.Vectors, words: Sequence[str], path: Path) -> None:
    """The words in the plane of their first two principal components."""
    rows = table.unit[table.rows(words)]
    points = np.asarray(linear.encode(linear.fit_pca(rows, min(2, *rows.shape)), rows))
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, -1], s=4)
    for word, point in zip(words, points, strict=True):
        axes.annotate(word.replace("$", r"\$"), (point[0], point[-1]), fontsize=7)
    axes.set_axis_off()
    figure.savefig(path, dpi=100, metadata={"Software": None})
