"""word2vec against gensim: raw words a second, and the vectors' accuracy, on the same text and settings.

  python -m benchmarks.word2vec [--quick] [--record] [--text=FILE] [--runs=DIR --seeds=1,2,3]

200 dimensions, 5 negatives, subsampling 1e-3, min_count 5, rate 0.025 to 0.0001, windows 5 and 8, skip-gram
and CBOW, 5 epochs, 2 workers for gensim. Speed is measured in turn, in this process, on the first words of
the text, without making the vocabulary, gensim in its fastest mode (corpus_file), ours without the loop's log
and checkpoints. With --runs each side also trains on the whole text, a run per seed, and its vectors are
judged by the same code, mean and standard deviation over the seeds; gensim then reads lines, as its
corpus_file mode with 2 workers does not bring the rate down to the last one (each worker counts its own words
against the whole). A run's figures stay in DIR, so that a stopped benchmark goes on. Without --text the text
is wiki100m of JAXGEN_DATA_DIR.

The floor of a skip-gram update by pieces of T = 32 words, windows of 5 and K = 16 shared negatives at D = 200
is 6 D (T + 10 + K) = 70 kFLOP for a word kept of 1.34 read, 98 with the 40 negatives of now, and about 5 rows
of 800 bytes read and written; CBOW's is 55 kFLOP and as many rows. What an update of 1,024 kept words costs
on one core of two (CPU time, least of 80, with other work beside it), and what was tried, with 16 negatives:

- products of pieces and their transposes as dense batches of 32 x 42, a negative for each two words:
  skip-gram 1.08 ms (window 8: 1.16), CBOW 0.83 (0.90). Products of this size reach 70 to 100 GFLOP/s here,
  large ones 200.
- gradients of the banded products as sums of shifted copies (0.07 ms instead of 0.17 and 0.24), negatives
  shared by 4 pieces (0.16 ms instead of 0.29, a fourth of the rows), the rate multiplied in early: skip-gram
  0.70 ms (0.99), CBOW 0.81 (0.92). Analogies after 5 epochs of wiki100m, window 5: skip-gram
  0.361 (0.366 before), CBOW 0.317.
- the two halves of an update without waiting for each other, each on a core of its own up to the scatter: by
  the clock 0.47 ms instead of 0.62 (skip-gram) and 0.68 (CBOW), the CPU time the same. This is what is there.
  Two whole updates of tables of their own, to be merged now and then, as a program for two devices: 0.44 and
  0.36 ms an update before any merging (50 ms for all rows), hardly faster, and not the same descent.
- CBOW's sums as shifted copies forwards too: 2.5 ms, as XLA looks every row up 10 times; an optimization
  barrier between them is gone before the fusion. Of CBOW's time half is looking rows up and adding them (40
  to 80 ns a row, one thread): at gensim's figure of about 1 us a kept word and core, 3 times as fast would
  leave 0.3 us for 5 rows and 55 kFLOP, and either alone takes as much.
- pieces of 16 words: a third slower; of 64 and of 128 words, 16 or 64 pieces an update, rows padded to 208:
  within the noise of 10 %.
- accuracy (analogies, skip-gram, seed 1; gensim 0.379 at window 5, 0.403 at window 8): with 16 negatives for
  128 words 0.368 at window 5, and NaN at window 8 from the first step on, with fewer pieces an update too.
  With look-ups that move a vector by a length of at most 0.5, 1, 2, 4, 8: 0.265, 0.317, 0.324, 0.307, 0.291
  at window 8, 0.370 (2) at window 5. Then 16 negatives for 32 words 0.372, half as many pieces an update
  0.367; negatives for 128 words: 32 of them 0.398 (window 5: 0.402), 48 0.423. So a length of 1 and 40
  negatives: at least gensim's everywhere, at two thirds of the speed that 16 negatives had (skip-gram 3.9 and
  4.4 times gensim, CBOW 1.1).
- 40 and 32 negatives for 256 words: 0.399 and 0.390 at window 5, 0.365 (32) at window 8, no faster. CBOW with
  16 negatives for 128 words: 0.316 at window 5 and 0.318 at window 8; 24: 0.341 at window 8; 40: 0.333 and
  0.345 (gensim 0.308 and 0.342). Over three seeds CBOW with 40 at window 8 is level with gensim, elsewhere
  ours is ahead.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from experiments import word2vec
from experiments.common import word_vectors
from jaxgen import data, sharding
from jaxgen.workdir import write_json

EPOCHS, LINE = 5, 10_000  # gensim takes lines of at most 10,000 words
JUDGED = (
    "analogies",
    "analogies_3cosmul",
    "wordsim353",
    "men",
    "simlex999",
    "category_purity",
    "odd_one_out",
)
CASES = (("skip_gram", 5, 6.0), ("skip_gram", 8, 6.0), ("cbow", 5, 3.0), ("cbow", 8, 3.0))


def text_in_lines(source: Path, target: Path, num_words: int | None) -> int:
    """The first words of a text as lines of LINE words, for both sides; returns how many."""
    all_words = source.read_text(encoding="utf-8").split()[:num_words]
    lines = (" ".join(all_words[start : start + LINE]) for start in range(0, len(all_words), LINE))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(all_words)


def settings(architecture: str, window: int, seed: int, path: Path) -> Any:
    """The config of the preset wiki with this text."""
    config = word2vec.get_config("wiki")
    config.data.source, config.data.path, config.data.lowercase = "file", str(path), False
    config.model.architecture, config.model.window, config.seed = architecture, window, seed
    return config


def ours(config: Any) -> Callable[[], Any]:
    """A function that trains all epochs, from where it is, and returns the state."""
    experiment = word2vec.build(config, sharding.make_mesh())
    step = jax.jit(experiment.system.step, donate_argnums=0)
    state = jax.jit(experiment.system.init)(jax.random.key(config.seed), experiment.train_batch(0))
    pieces: Any = experiment.train_batch

    def train() -> Any:
        nonlocal state
        first = lambda stacked: {name: field[0] for name, field in stacked.items()}
        for _, batch in data.prefetch(pieces, ((number, 1) for number in range(pieces.num_steps)), first):
            state, _ = step(state, batch)
        return jax.block_until_ready(state)

    return train


def theirs(config: Any, path: Path, *, fastest: bool) -> tuple[Any, Callable[[], Any]]:
    """gensim's model with its vocabulary made, and a function that trains it on the text.

    fastest: in its corpus_file mode, else from lines
    """
    from gensim.models import Word2Vec
    from gensim.models.word2vec import LineSentence

    model = Word2Vec(
        vector_size=config.model.dim,
        window=config.model.window,
        negative=config.objective.negatives,
        sample=config.data.subsample,
        min_count=config.data.min_count,
        alpha=config.train.learning_rate,
        min_alpha=config.train.last_learning_rate,
        sg=int(config.model.architecture == "skip_gram"),
        workers=2,
        seed=config.seed,
    )
    model.build_vocab(corpus_file=str(path))
    if fastest:
        words = {"corpus_file": str(path), "total_words": model.corpus_total_words}
    else:
        words = {"corpus_iterable": LineSentence(str(path)), "total_examples": model.corpus_count}
    return model, lambda: model.train(**words, epochs=EPOCHS)


def accuracy(library: str, architecture: str, window: int, seed: int, path: Path) -> dict[str, float]:
    """The JUDGED scores after EPOCHS epochs on the whole text, those whose sets are at hand."""
    config = settings(architecture, window, seed, path)
    if library == "gensim":
        model, train = theirs(config, path, fastest=False)
        train()
        vectors, vocabulary = model.wv.vectors, tuple(model.wv.index_to_key)
    else:
        train = ours(config)
        vectors = np.asarray(train().params["input"])
        vocabulary = word_vectors.load_corpus(config.data).vocabulary.words
    scores = word_vectors.scores(vectors, vocabulary)
    return {name: scores[name].value for name in JUDGED if name in scores}


def _mean_and_spread(values: Sequence[float]) -> list[float]:
    return [round(float(np.mean(values)), 4), round(float(np.std(values, ddof=min(1, len(values) - 1))), 4)]


def main() -> None:
    """Speed, and with --runs accuracy."""
    flags = timing.parser(__doc__ or "")
    flags.add_argument("--text", type=Path, help="a text file of words apart by spaces")
    flags.add_argument("--runs", type=Path, help="the folder that keeps each run's accuracy")
    flags.add_argument("--seeds", default="1,2,3")
    asked = flags.parse_args()
    timing.require("gensim")
    warnings.simplefilter("ignore")
    source = asked.text or word_vectors.text_file("wiki", "", lowercase=False)
    cache = word_vectors.cache_dir() / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / "part.txt"
    num_words = text_in_lines(source, part, 400_000 if asked.quick else 4_000_000)
    cases = []
    for architecture, window, goal in CASES:
        config = settings(architecture, window, 1, part)
        config.data.stretch = 8192 if not asked.quick else 4096
        train = ours(config)
        _, peer = theirs(config, part, fastest=True)
        cases.append(
            timing.compare(
                f"{architecture}, window {window}",
                train,
                peer,
                work=EPOCHS * num_words,
                unit="raw words/s",
                goal=goal,
                rounds=3 if asked.quick else 5,
                seconds=60.0,
            )
        )
    notes: dict[str, Any] = {"words": num_words, "epochs": EPOCHS}
    if asked.runs:
        asked.runs.mkdir(parents=True, exist_ok=True)
        whole = cache / "whole.txt"
        text_in_lines(source, whole, None)
        seeds = asked.seeds.split(",")
        found: dict[str, list[dict[str, float]]] = {}
        for seed, (architecture, window, _), library in itertools.product(seeds, CASES, ("jaxgen", "gensim")):
            case = f"{library} {architecture}, window {window}"
            kept = asked.runs / f"{library}_{architecture}_{window}_{seed}.json"
            if not kept.is_file():
                write_json(kept, accuracy(library, architecture, window, int(seed), whole))
            found.setdefault(case, []).append(json.loads(kept.read_text()))
            print(case, f"seed {seed}", found[case][-1], flush=True)
        notes["seeds"] = len(seeds)
        notes["mean and standard deviation"] = {
            case: {name: _mean_and_spread([run[name] for run in runs]) for name in JUDGED if name in runs[0]}
            for case, runs in found.items()
        }
    timing.report("word2vec", cases, ("gensim", "numpy"), asked.record, notes)


if __name__ == "__main__":
    main()
