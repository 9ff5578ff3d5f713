"""Hidden Markov models by Baum-Welch: letters of a text, or images read row by row, one model a class.

  python -m jaxgen.run --config=experiments/hmm.py:letters --workdir=runs/hmm_letters
  python -m jaxgen.run --config=experiments/hmm.py:digits --workdir=runs/hmm_digits

An update is `em.iterations` EM iterations on the same batch each time; presets take all of the data, or as
much as is said. Several starts run side by side and the likeliest on the training data is kept.
Texts: the experiment of Cave & Neuwirth 1980: of the 26 letters and the space, in lower case, two states
find out the vowels; held-out bits a symbol are set beside those of unigrams and bigrams.
Images: emissions are Gaussian, pixels dequantised as in experiments/mixture.py; the class is the likeliest by
Bayes' rule. One state, which forgets the order of the rows, is the baseline.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, classifying, counting
from experiments.common.sequences import save_attention_picture, save_text_picture
from jaxgen import data, pictures, systems
from jaxgen.data.texts import load_text
from jaxgen.estimators import families, gmm, hmm
from jaxgen.estimators.common import index_keys, log_normalize
from jaxgen.estimators.families import Family
from jaxgen.estimators.hmm import HMM
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Mean,
    Metrics,
    Score,
    Scores,
    TrainState,
    UserError,
)

TEXTS = ("pydocs", "tiny_shakespeare", "ptb", "wikitext2")
ALPHABET = " " + string.ascii_lowercase
VOWELS = "aeiou"
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            **counting.SMOKE_TRAIN,
            "data.batch_size": 40,
            "data.length": 20,
            "em.num_starts": 2,
            "em.iterations": 2,
            "sampling.num": 3,
            "sampling.length": 20,
            "evaluation.batch_size": 512,
        },
    ),
    "letters": Preset("2 CPU cores", 1.5, "3.93 bits a symbol; vowels and consonants in two states", {}),
    "ptb": Preset(
        "2 CPU cores",
        5,
        "not run to the end yet",
        {"data.source": "ptb", "data.batch_size": 2048, "model.num_states": 10, "em.num_starts": 1},
    ),
    "digits": Preset(
        "2 CPU cores",
        1,
        "test error 15.3 % (one state, which forgets the order of rows: 45.8 %)",
        {
            "data.source": "digits",
            "data.batch_size": 1437,
            "model.num_states": 8,
            "em.num_starts": 3,
            "em.iterations": 5,
            "train.num_steps": 10,
            "sampling.num": 64,
            "evaluation.batch_size": 180,
        },
    ),
}
FIELD_CHECKS = {
    **{field: check for field, check in common.FIELD_CHECKS.items() if field.startswith("train.")},
    "data.source": ("text:{folder}/others.txt", {}),
    "em.variance_floor": (0.1, {"data.source": "digits"}),
}


class Models(NamedTuple):
    """hmm: of S starts for C classes, leaves [S, C, ...]; objective: its mean over the training steps [S, C],
    nats; log_weight: log p(class) [C]."""

    hmm: HMM
    objective: Array
    log_weight: Array

    def best(self) -> Models:
        """The likeliest start of each class, as the only one."""
        start = jnp.argmax(self.objective, axis=0)
        take = lambda leaf: leaf[start, jnp.arange(len(start))][None]
        return Models(jax.tree.map(take, self.hmm), take(self.objective), self.log_weight)


class Problem(NamedTuple):
    """What differs between the kinds of data.

    sequences: (batch, key) -> [B, T, ...]
    start: (key, sequences, mask [B, T]) -> a model to go on from
    num_dims: numbers in a sequence, all of which a likelihood is about
    """

    family: Family
    train: data.Source
    test: data.Source
    num_classes: int
    smoothing: float
    sequences: Callable[[Batch, Key], Array]
    start: Callable[[Key, Array, Array], HMM]
    num_dims: int


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `letters`."""
    config = counting.base_config(source="pydocs", batch_size=1600, num_steps=20)
    config.data.length = 256  # letters: how many make a sequence
    config.train.validate_every = 5
    config.train.checkpoint_every = 10
    config.model = ConfigDict({"num_states": 2})
    config.em = ConfigDict(
        {
            "iterations": 5,
            "num_starts": 4,
            "smoothing": 0.1,  # letters: pseudo-count of each in each state
            "state_smoothing": 0.1,  # pseudo-count of each first state and each transition
            "variance_floor": 1e-2,  # rows: of pixels in [-1, 1]
        }
    )
    config.sampling = ConfigDict({"num": 8, "length": 80})  # length: of letters
    config.evaluation = ConfigDict({"batch_size": 128})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.at_least(config, 1, "data.length", "model.num_states", "em.iterations", "em.num_starts")
    checks.at_least(config, 1, "sampling.num", "sampling.length", "evaluation.batch_size")
    checks.at_least(config, 0, "em.state_smoothing")
    checks.above(config, 0, "em.smoothing", "em.variance_floor")


# ---- the two kinds of data


def is_text(source: str) -> bool:
    """Whether data.source names a text, and not images."""
    return source in TEXTS or source.startswith("text:")


def to_letters(text: str) -> str:
    """Lower case, with one space for each stretch of anything but a to z, and for each <unk>."""
    return re.sub("[^a-z]+", " ", text.replace("<unk>", " ").lower())


def letter_problem(config: ConfigDict) -> Problem:
    """Pieces of a text in letters, tokens [N, T], and random starts."""

    def pieces(split: str) -> data.Source:
        letters = to_letters(load_text(config.data.source, split).text)
        length = config.data.length
        if len(letters) < length:
            raise UserError(
                f"The {split} split of {config.data.source} has {len(letters)} letters, fewer than "
                f"data.length={length}: give a longer text or a smaller length."
            )
        codes = np.frombuffer(letters.encode("ascii"), np.uint8)
        tokens = np.where(codes == ord(" "), 0, codes - ord("a") + 1).astype(np.int32)
        tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
        return data.Source(config.data.source, split, {"tokens": tokens}, None, 256)

    def start(key: Key, x: Array, mask: Array) -> HMM:
        del x, mask
        num_states = config.model.num_states
        move_key, emit_key = jax.random.split(key)
        return HMM(
            jax.nn.log_softmax(jnp.zeros(num_states)),
            jax.nn.log_softmax(jax.random.normal(move_key, (num_states, num_states))),
            families.Categoricals(
                jax.nn.log_softmax(jax.random.normal(emit_key, (num_states, len(ALPHABET))))
            ),
        )

    return Problem(
        family=families.categorical(len(ALPHABET)),
        train=pieces("train"),
        test=pieces("test"),
        num_classes=1,
        smoothing=config.em.smoothing,
        sequences=lambda batch, key: batch["tokens"],
        start=start,
        num_dims=config.data.length,
    )


def row_problem(config: ConfigDict) -> Problem:
    """Images as sequences of their rows, and starts by k-means of the rows."""
    train, test = common.load_images(config.data.source)
    shape, levels = train.fields["image"].shape[1:], train.num_levels
    family, num_states = families.GAUSSIAN_DIAGONAL, config.model.num_states

    def sequences(batch: Batch, key: Key) -> Array:
        x = batch["image"].reshape(-1, shape[0], shape[1] * shape[2])
        return x + (jax.random.uniform(key, x.shape) - 0.5) * (2 / (levels - 1))

    def start(key: Key, x: Array, mask: Array) -> HMM:
        rows, counts = x.reshape(-1, x.shape[2]), mask.reshape(-1)
        state = gmm.nearest(rows, gmm.kmeans(key, rows, num_states, counts)).reshape(mask.shape)
        smoothing = {"smoothing": config.em.variance_floor, "state_smoothing": config.em.state_smoothing}
        return hmm.fit(family, x, state, num_states, mask, **smoothing)

    return Problem(
        family=family,
        train=train,
        test=test,
        num_classes=classifying.num_classes(train),
        smoothing=config.em.variance_floor,
        sequences=sequences,
        start=start,
        num_dims=int(np.prod(shape)),
    )


# ---- the experiment


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds sequences, Baum-Welch and the scores of each kind."""
    check(config)
    problem = letter_problem(config) if is_text(config.data.source) else row_problem(config)
    family, num_classes = problem.family, problem.num_classes
    smoothing = {"smoothing": problem.smoothing, "state_smoothing": config.em.state_smoothing}

    def class_masks(batch: Batch, x: Array) -> Array:
        """Which steps are of each class [C, B, T]."""
        label = batch.get("label", jnp.zeros(x.shape[0], jnp.int32))
        one_hot = (label[None, :] == jnp.arange(num_classes)[:, None]).astype(jnp.float32)
        return jnp.broadcast_to(one_hot[:, :, None], (num_classes, *x.shape[:2]))

    def init(key: Key, batch: Batch) -> Models:
        start_key, noise_key = jax.random.split(key)
        x = problem.sequences(batch, noise_key)
        masks = class_masks(batch, x)
        keys = jax.random.split(start_key, (config.em.num_starts, num_classes))
        starts = jax.vmap(jax.vmap(problem.start, in_axes=(0, None, 0)), in_axes=(0, None, None))
        log_weight = log_normalize(jnp.sum(masks[:, :, 0], axis=1))
        return Models(starts(keys, x, masks), jnp.zeros(keys.shape), log_weight)

    def update(models: Models, batch: Batch, key: Key) -> tuple[Models, Metrics]:
        x = problem.sequences(batch, key)
        masks = class_masks(batch, x)

        def one(model: HMM, mask: Array) -> tuple[HMM, Array]:
            steps = {"max_steps": config.em.iterations, "tolerance": -jnp.inf}
            found = hmm.fit_em(family, model, x, mask, **smoothing, **steps)
            return found.params, found.objective[-1]

        moved, objective = jax.vmap(jax.vmap(one), in_axes=(0, None))(models.hmm, masks)
        share, num_steps = jnp.exp(models.log_weight), jnp.asarray(x.shape[0] * x.shape[1], jnp.float32)
        loss = -jnp.sum(share * jnp.max(objective, axis=0))  # of the best start, a step of a sequence
        return Models(moved, objective, models.log_weight), {"loss": Mean(loss * num_steps, num_steps)}

    stream = common.training_stream(config.data, problem.train, seed=config.seed, mesh=mesh)
    first_batch = functools.cache(lambda: stream(0))

    def measure(models: Models, batch: Mapping[str, Any], key: Key) -> Metrics:
        """Of the best start: nats a dimension, and where there are classes the share found."""
        x, best = problem.sequences(batch, key), models.best()
        model = jax.tree.map(lambda leaf: leaf[0], best.hmm)
        log_p = jax.vmap(lambda model: hmm.log_prob(family, model, x), out_axes=1)(model)
        joint = log_p + best.log_weight[None, :]
        nats = -jax.nn.logsumexp(joint, axis=1) / problem.num_dims
        found = {"loss": Mean.of(nats, batch["mask"])}
        if num_classes > 1:
            found["accuracy"] = Mean.of(jnp.argmax(joint, axis=1) == batch["label"], batch["mask"])
        return found

    validation = common.make_evaluation(
        measure, problem.test, mesh, batch_size=config.evaluation.batch_size, seed=config.seed
    )
    choose = jax.jit(Models.best)

    @jax.jit
    def one_state(batch: Batch, key: Key) -> Models:
        """The model of a single state of each class, which is fitted in one go."""
        x = problem.sequences(batch, key)
        masks = class_masks(batch, x)
        state = jnp.zeros(x.shape[:2], jnp.int32)
        model = jax.vmap(lambda mask: hmm.fit(family, x, state, 1, mask, **smoothing))(masks)
        log_weight = log_normalize(jnp.sum(masks[:, :, 0], axis=1))
        return Models(jax.tree.map(lambda leaf: leaf[None], model), jnp.zeros((1, num_classes)), log_weight)

    def letter_scores(models: Models) -> Scores:
        tokens, held_out = np.asarray(first_batch()["tokens"]), problem.test.fields["tokens"]
        unit = f"bits/symbol of {len(ALPHABET)}, held out"
        score = lambda bits: Score(bits, unit, held_out.size, False)
        scores = {
            "bits_per_symbol": score(float(validation(models)["loss"].value) / np.log(2)),
            "unigram_bits_per_symbol": score(unigram_bits(tokens, held_out, config.em.smoothing)),
            "bigram_bits_per_symbol": score(bigram_bits(tokens, held_out, config.em.smoothing)),
        }
        if config.model.num_states == 2:
            apart = vowels_apart(state_given_letter(letter_model(choose(models))))
            scores["vowels_apart"] = Score(
                apart, "share of the letters on the side of their kind", len(ALPHABET) - 1, True
            )
        return scores

    def row_scores(models: Models) -> Scores:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        step = np.log(2 / (problem.train.num_levels - 1))
        scores = {}
        for name, which in (("", models), ("one_state_", one_state(first_batch(), key))):
            values, num = common.mean_values(validation(which)), len(problem.test)
            scores[f"{name}test_error"] = Score(100 * (1 - values["accuracy"]), "%", num, False)
            bits = (values["loss"] - step) / np.log(2)
            unit = "bits/dim, upper bound (dequantised)"
            scores[f"{name}bits_per_dim"] = Score(bits, unit, num, False)
        return scores

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        del needed
        return (letter_scores if is_text(config.data.source) else row_scores)(state.params)

    def draw(models: Models, key: Key, num: int, length: int) -> Array:
        """Sequences [num, length, ...] of classes drawn by weight; number i depends on (key, i) alone."""
        model = jax.tree.map(lambda leaf: leaf[0], models.best().hmm)

        def one(key: Key) -> Array:
            class_key, path_key = jax.random.split(key)
            k = jax.random.categorical(class_key, models.log_weight)
            of_class = jax.tree.map(lambda leaf: leaf[k], model)
            return hmm.sample(family, of_class, path_key, 1, length)[1][0]

        return jax.vmap(one)(index_keys(key, num))

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        num, best = num or config.sampling.num, choose(state.params)
        if is_text(config.data.source):
            length = config.sampling.length
            drawn = np.asarray(jax.jit(functools.partial(draw, num=num, length=length))(state.params, key))
            return write_letters(letter_model(best), drawn, problem.test.fields["tokens"][0], directory)
        shape = problem.train.fields["image"].shape[1:]
        drawn = np.asarray(jax.jit(functools.partial(draw, num=num, length=shape[0]))(state.params, key))
        samples, emissions = directory / "samples.png", directory / "emissions.png"
        scale = max(1, 64 // shape[0])
        pictures.save_image_grid(samples, drawn.reshape(-1, *shape), scale=scale)
        # The states of a class one below the other, each the row of pixels that it expects.
        rows = np.asarray(best.hmm.emissions.mean[0]).reshape(num_classes, -1, *shape[1:])
        pictures.save_image_grid(emissions, rows, columns=num_classes, scale=scale)
        return [samples, emissions]

    return Experiment(
        system=systems.update_system(init, update),
        loop=common.loop_settings(config.train),
        train_batch=lambda step: first_batch(),
        validate=lambda state: validation(state.params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": problem.train.fingerprint, "test": problem.test.fingerprint},
        seed=config.seed,
    )


# ---- letters


def letter_model(models: Models) -> HMM:
    """The only model of `Models.best` of letters, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], models.hmm)


def unigram_bits(train: np.ndarray, test: np.ndarray, smoothing: float) -> float:
    """Bits a symbol of `test` by the shares of the symbols of `train`, both tokens [N, T]."""
    count = np.bincount(train.ravel(), minlength=len(ALPHABET)) + smoothing
    return float(-np.mean(np.log2(count / count.sum())[test]))


def bigram_bits(train: np.ndarray, test: np.ndarray, smoothing: float) -> float:
    """Bits a symbol of `test` given the one before it; the first of a sequence by the unigrams."""
    count = np.full((len(ALPHABET),) * 2, smoothing)
    np.add.at(count, (train[:, :-1].ravel(), train[:, 1:].ravel()), 1.0)
    log2 = np.log2(count / count.sum(axis=1, keepdims=True))
    first = unigram_bits(train, test[:, :1], smoothing) * len(test)
    return float((first - np.sum(log2[test[:, :-1], test[:, 1:]])) / test.size)


def state_given_letter(model: HMM) -> np.ndarray:
    """p(state given letter) [K, V] in the long run."""
    transition = np.exp(np.asarray(model.log_transition, np.float64))
    transition /= transition.sum(axis=1, keepdims=True)
    # Half of each step stays, so that a chain that goes round settles too.
    lazy = (transition + np.eye(len(transition))) / 2
    share = np.linalg.matrix_power(lazy, 4096)[0]
    joint = share[:, None] * np.exp(np.asarray(model.emissions.log_prob, np.float64))
    return joint / joint.sum(axis=0, keepdims=True)


def vowels_apart(share: np.ndarray) -> float:
    """How many letters lie on the side of their kind, given p(state given letter) [2, V]: a share >= 1/2."""
    is_vowel = np.asarray([letter in VOWELS for letter in ALPHABET[1:]])
    agree = np.mean(share.argmax(axis=0)[1:] == is_vowel)
    return float(max(agree, 1 - agree))


def write_letters(model: HMM, drawn: np.ndarray, held_out: np.ndarray, directory: Path) -> list[Path]:
    """The tables of the model, texts drawn from it, and the likeliest path through held-out tokens [T]."""
    to_text = lambda tokens: "".join(ALPHABET[token] for token in tokens)
    path = hmm.predict(families.categorical(len(ALPHABET)), model, held_out[None])[0][0]
    states = "".join(string.digits[k] if k < 10 else "*" for k in np.asarray(path))
    shown = "\n".join(f"{to_text(held_out)[i : i + 80]}\n{states[i : i + 80]}" for i in (0, 80))
    blocks = [shown, *map(to_text, drawn)]
    samples, text, tables = (directory / name for name in ("samples.png", "samples.txt", "emissions.png"))
    text.write_text("\n".join([*blocks, ""]), encoding="utf-8")
    save_text_picture(samples, blocks)
    order = sorted(range(len(ALPHABET)), key=lambda i: (ALPHABET[i].isalpha(), ALPHABET[i] not in VOWELS, i))
    letters = [ALPHABET[i].replace(" ", "␣") for i in order]
    states_named = [f"state {k}" for k in range(len(model.log_initial))]
    emission = np.exp(np.asarray(model.emissions.log_prob))
    save_attention_picture(
        tables,
        [
            (
                "p(letter given state), of the largest",
                (emission / emission.max())[:, order],
                states_named,
                letters,
            ),
            ("p(state given letter)", state_given_letter(model)[:, order], states_named, letters),
            (
                "p(next state given state)",
                np.exp(np.asarray(model.log_transition)),
                states_named,
                states_named,
            ),
        ],
        columns=1,
    )
    return [samples, text, tables]
