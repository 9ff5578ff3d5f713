"""Few labels, many images: what images without labels add to a classifier, for two generative models.

  python -m jaxgen.run --config=experiments/semisupervised.py:digits --workdir=runs/semisupervised_digits
  python -m jaxgen.run --config=experiments/semisupervised.py:digits_m2 --workdir=runs/digits_m2

naive_bayes: EM with `model.components` densities for each class, begun from the labelled images dealt out to
them, where images without a label weigh `model.unlabelled_weight` (Nigam et al. 2000, sections 5.2 and 5.3).
Its twin is naive Bayes of the labelled images. An update is an EM iteration.
m2: the model of Kingma et al. 2014 (models and objectives/semisupervised.py); its twin is a network like its
classifier, trained on the labels alone by the same updates. Pixels are binarised anew at each update, and at
test time the networks see the pixels as they are.
Labels are kept of `data.num_labels` images, as many of each class, drawn by the seed; `data.num_splits` such
draws are trained side by side in one program, and scores are means over them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, classifying, counting, rows_of
from experiments.naive_bayes import DENSITIES
from jaxgen import data, pictures, systems
from jaxgen.estimators import mixture, naive_bayes
from jaxgen.models.semisupervised import M2
from jaxgen.objectives import semisupervised as objective
from jaxgen.objectives.classification import cross_entropy
from jaxgen.objectives.vae import Gaussian, binarise
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
    System,
    TrainState,
    UserError,
)

KINDS = ("m2", "naive_bayes")
FAMILIES = ("bernoulli", "multinomial")
_M2: dict[str, Any] = {
    "model.kind": "m2",
    "data.batch_size": 100,
    "train.num_steps": 3000,
    "train.steps_per_dispatch": 25,
    "train.log_every": 100,
    "train.validate_every": 500,
    "train.checkpoint_every": 1000,
}
_MNIST = {"data.source": "mnist", "evaluation.batch_size": 1000}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            **_M2,
            **counting.SMOKE_TRAIN,
            "data.batch_size": 16,
            "data.num_labels": 20,
            "data.num_splits": 2,
            "data.labelled_batch_size": 8,
            "model.components": 2,
            "model.latent_dim": 2,
            "model.hidden": (8,),
            "sampling.num": 10,
            "evaluation.batch_size": 180,
        },
    ),
    "digits": Preset("2 CPU cores", 0.3, "9.7 % error with 100 labels (17.3 without the other images)", {}),
    "digits_m2": Preset("2 CPU cores", 2, "6.5 % error with 100 labels (7.0 for its twin)", _M2),
    "mnist": Preset(
        "2 CPU cores",
        5,
        "20.9 % error with 100 labels (28.6 without the other images)",
        {**_MNIST, "data.batch_size": 60_000, "train.num_steps": 20},
    ),
    "mnist_m2": Preset(
        "1 GPU",
        20,
        "not run to the end yet; 11.97 % in Kingma et al. 2014",
        {
            **_M2,
            **_MNIST,
            "train.num_steps": 30_000,
            "train.validate_every": 3000,
            "train.checkpoint_every": 3000,
            "model.latent_dim": 50,
            "model.hidden": (500,),
            "optim.learning_rate": 3e-4,
        },
    ),
}
_NAIVE_BAYES = {"model.kind": "naive_bayes"}
FIELD_CHECKS = {
    **{field: value for field, value in common.FIELD_CHECKS.items() if field != "model.dtype"},
    "data.num_labels": (40, {}),
    "model.kind": ("naive_bayes", {}),
    "model.family": ("multinomial", _NAIVE_BAYES),
    "model.components": (1, _NAIVE_BAYES),
    "model.smoothing": (0.5, _NAIVE_BAYES),
    "model.unlabelled_weight": (0.5, _NAIVE_BAYES),
    "model.hidden": ((4,), {}),
    "optim.clip_norm": (1.0, {}),
}
# Test error in percent by (data, model, labels).
_PUBLISHED = {("mnist", "m2", 100): (11.97, "Kingma et al. 2014, table 1, M2: 11.97 ± 1.71")}


class Learner(NamedTuple):
    """A kind of model, on all splits at once.

    predict: (params, image [B, H, W, C]) -> log p(class given image) [S, B, K], of the model and of its twin
    draw: (params, key, number of the image) -> an image [D] of split 0, in [-1, 1]
    """

    system: System
    predict: Callable[[PyTree, Array], tuple[Array, Array]]
    draw: Callable[[PyTree, Key, Array], Array]
    train_batch: Callable[[int], Mapping[str, Any]]


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=30)
    config.data.batch_size = 1437
    config.data.num_labels = 100
    config.data.num_splits = 5
    config.data.labelled_batch_size = 100  # m2: labelled images of each split at each update
    config.optim.clip_norm = 0.0
    config.train.steps_per_dispatch = 5
    config.train.log_every = 5
    config.train.validate_every = 5
    config.train.checkpoint_every = 10
    config.model = ConfigDict(
        {
            "kind": "naive_bayes",  # naive_bayes, m2
            "family": "bernoulli",  # naive_bayes: bernoulli, multinomial
            "components": 10,  # naive_bayes: densities of each class
            "smoothing": 1.0,  # naive_bayes: pseudo-count of each value
            "unlabelled_weight": 1.0,  # naive_bayes
            "latent_dim": 8,  # m2
            "hidden": (128,),  # m2
        }
    )
    config.objective = ConfigDict({"alpha": 10.0, "labelled_weight": 1.0})  # m2
    config.sampling = ConfigDict({"num": 50})
    config.evaluation = ConfigDict({"batch_size": 360})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "data.num_labels", "data.num_splits", "data.labelled_batch_size")
    checks.at_least(config, 1, "model.latent_dim", "model.hidden", "sampling.num", "evaluation.batch_size")
    checks.at_least(config, 0, "model.unlabelled_weight", "objective.alpha", "objective.labelled_weight")
    checks.at_least(config, 1, "model.components")
    checks.above(config, 0, "model.smoothing")
    checks.one_of(config, KINDS, "model.kind")
    checks.one_of(config, FAMILIES, "model.family")
    if not config.model.hidden:
        raise UserError("model.hidden must have a width for each hidden layer, such as 500,.")


def choose_labelled(
    label: np.ndarray, num_classes: int, num_labels: int, seed: int, split: int
) -> np.ndarray:
    """The numbers of the images that keep their label in a split: as many of each class, int64 [num_labels].

    Raises:
        UserError: the classes cannot have equal shares, or a class has too few images.
    """
    share, rest = divmod(num_labels, num_classes)
    if rest:
        raise UserError(f"data.num_labels={num_labels} is not a multiple of the {num_classes} classes.")
    generator = np.random.default_rng([seed, split])
    chosen = []
    for k in range(num_classes):
        members = np.flatnonzero(label == k)
        if len(members) < share:
            raise UserError(f"Class {k} has {len(members)} images, too few for data.num_labels={num_labels}.")
        chosen.append(generator.choice(members, share, replace=False))
    return np.concatenate(chosen)


def naive_bayes_learner(
    config: ConfigDict, train: data.Source, num_classes: int, chosen: np.ndarray, mesh: jax.sharding.Mesh
) -> Learner:
    """EM of naive Bayes; `chosen` [S, L] are the numbers of the labelled images of each split.

    Density number k is of class k // components. What is known of an image is the density that it begins in,
    which tells its class, or -1.
    """
    density, model = DENSITIES[config.model.family], config.model
    num_densities = num_classes * model.components
    # `chosen` goes through the classes one after another, so its images are dealt out to their densities.
    begin = train.fields["label"][chosen] * model.components + np.arange(chosen.shape[1]) % model.components
    known = np.full((len(train), len(chosen)), -1, np.int32)
    np.put_along_axis(known, chosen.T, begin.T.astype(np.int32), axis=0)
    fields = {"image": train.fields["image"], "known": known}
    stream = common.training_stream(
        config.data, dataclasses.replace(train, fields=fields), seed=config.seed, mesh=mesh
    )
    first_batch = functools.cache(lambda: stream(0))

    def init(key: Key, batch: Batch) -> dict[str, mixture.Mixture]:
        del key
        x, known = density.features(rows_of(batch["image"])), batch["known"].T

        def fit(label: Array, num: int) -> mixture.Mixture:
            return naive_bayes.fit(density.family, x, label, num, smoothing=model.smoothing)

        return {
            "model": jax.vmap(lambda known: fit(known, num_densities))(known),
            "twin": jax.vmap(lambda known: fit(known // model.components, num_classes))(known),
        }

    def update(
        params: dict[str, mixture.Mixture], batch: Batch, key: Key
    ) -> tuple[dict[str, mixture.Mixture], Metrics]:
        del key
        x = density.features(rows_of(batch["image"]))

        def one(start: mixture.Mixture, known: Array) -> tuple[mixture.Mixture, Array]:
            is_known, own = known >= 0, jnp.arange(num_densities) // model.components
            possible = (known // model.components)[:, None] == own[None, :]
            found = mixture.em(
                density.family,
                start,
                x,
                jnp.where(is_known[:, None] & ~possible, -jnp.inf, 0.0),
                jnp.where(is_known, 1.0, model.unlabelled_weight),
                smoothing=model.smoothing,
                weight_smoothing=0.0,
                max_steps=1,
                tolerance=-jnp.inf,
            )
            return found.params, found.objective[0]

        moved, value = jax.vmap(one)(params["model"], batch["known"].T)
        return {**params, "model": moved}, {"loss": Mean.of(-value)}

    def predict(params: dict[str, mixture.Mixture], image: Array) -> tuple[Array, Array]:
        x = density.features(rows_of(image))
        log_proba = jax.vmap(lambda fitted: naive_bayes.predict_log_proba(density.family, fitted, x))
        of_densities = log_proba(params["model"])
        of_classes = of_densities.reshape(*of_densities.shape[:2], num_classes, model.components)
        return jax.nn.logsumexp(of_classes, axis=3), log_proba(params["twin"])

    def draw(params: dict[str, mixture.Mixture], key: Key, number: Array) -> Array:
        own = jax.tree.map(lambda leaf: leaf[0], params["model"])
        density_key, pixel_key = jax.random.split(jax.random.fold_in(key, number))
        weights = own.log_weight.reshape(num_classes, model.components)[number % num_classes]
        k = number % num_classes * model.components + jax.random.categorical(density_key, weights)
        return 2 * density.to_pixels(density.family.sample(own.components, k, pixel_key)) - 1

    return Learner(systems.update_system(init, update), predict, draw, lambda step: first_batch())


def m2_learner(
    config: ConfigDict, train: data.Source, num_classes: int, chosen: np.ndarray, mesh: jax.sharding.Mesh
) -> Learner:
    """M2 and its classifier's twin; `chosen` [S, L] are the numbers of the labelled images of each split."""
    num_pixels = int(np.prod(train.fields["image"].shape[1:]))
    model = M2(num_pixels, num_classes, config.model.latent_dim, tuple(config.model.hidden))
    unlabelled = dataclasses.replace(train, fields={"image": train.fields["image"]})
    stream = common.training_stream(config.data, unlabelled, seed=config.seed, mesh=mesh)
    rows = data.to_unit_range(train.fields["image"][chosen], train.num_levels)
    labelled_image = jnp.asarray(rows.reshape(*chosen.shape, num_pixels))
    label = jnp.asarray(train.fields["label"][chosen])
    num_drawn = min(config.data.labelled_batch_size, chosen.shape[1])

    def classify(params: PyTree, x: Array) -> Array:
        return cast(Array, model.apply({"params": params}, x, method=M2.classify))

    networks = objective.Networks(
        classify=classify,
        encode=lambda params, x, y: Gaussian(*model.apply({"params": params}, x, y, method=M2.encode)),
        decode=lambda params, z, y: cast(Array, model.apply({"params": params}, z, y, method=M2.decode)),
        num_classes=num_classes,
        latent_dim=config.model.latent_dim,
    )
    bound = objective.make_loss(
        networks, labelled_weight=config.objective.labelled_weight, alpha=config.objective.alpha
    )

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        del batch
        x, y = jnp.zeros((1, num_pixels)), jnp.zeros((1, num_classes))

        def one(key: Key) -> PyTree:
            model_key, twin_key = jax.random.split(key)
            made = model.init(model_key, x, y), model.init(twin_key, x, method=M2.classify)
            return {
                name: flax.core.unfreeze(variables)["params"]
                for name, variables in zip(("model", "twin"), made, strict=True)
            }

        return jax.vmap(one)(jax.random.split(key, len(chosen))), {}

    def loss_fn(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        """The sum over splits of M2's loss and of the twin's: no parameter is in two of the terms."""
        image_key, pixel_key, row_key, latent_key = jax.random.split(key, 4)
        image = binarise(image_key, batch["image"].reshape(-1, num_pixels))
        drawn = jax.random.permutation(row_key, chosen.shape[1])[:num_drawn]
        few, few_label = binarise(pixel_key, labelled_image[:, drawn]), label[:, drawn]

        def one(params: PyTree, few: Array, few_label: Array, key: Key) -> tuple[Array, Metrics]:
            own = {"image": image, "labelled_image": few, "label": few_label}
            loss, (metrics, _) = bound(params["model"], {}, own, key)
            twin = Mean.of(cross_entropy(classify(params["twin"], few), few_label))
            return loss + twin.value, {**metrics, "twin_cross_entropy": twin}

        keys = jax.random.split(latent_key, len(chosen))
        losses, metrics = jax.vmap(one)(params, few, few_label, keys)
        means = {name: Mean(mean.total.sum(), mean.count.sum()) for name, mean in metrics.items()}
        return jnp.sum(losses), (means, model_state)

    system = common.make_system(config, init, loss_fn)

    def predict(params: PyTree, image: Array) -> tuple[Array, Array]:
        x = image.reshape(-1, num_pixels)
        log_proba = lambda params: jax.nn.log_softmax(classify(params, x))
        return jax.vmap(log_proba)(params["model"]), jax.vmap(log_proba)(params["twin"])

    def draw(params: PyTree, key: Key, number: Array) -> Array:
        """Each row of the picture is one z in all classes."""
        own = jax.tree.map(lambda leaf: leaf[0], params["model"])
        z = jax.random.normal(jax.random.fold_in(key, number // num_classes), (config.model.latent_dim,))
        y = jax.nn.one_hot(number % num_classes, num_classes)
        return jnp.tanh(0.5 * networks.decode(own, z, y))

    return Learner(system, predict, draw, stream)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds a model with its twin, the splits and the scores."""
    check(config)
    train, test = common.load_images(config.data.source)
    num_classes, shape = classifying.num_classes(train), train.fields["image"].shape[1:]
    num_splits, num_labels = config.data.num_splits, config.data.num_labels
    chosen = np.stack(
        [
            choose_labelled(train.fields["label"], num_classes, num_labels, config.seed, split)
            for split in range(num_splits)
        ]
    )
    make = m2_learner if config.model.kind == "m2" else naive_bayes_learner
    learner = make(config, train, num_classes, chosen, mesh)

    def measure(params: PyTree, batch: Mapping[str, Any], key: Key) -> Metrics:
        """Of the model and of its twin: cross-entropy, and the share right of each split [S]."""
        label, mask = jnp.broadcast_to(batch["label"][None], (num_splits, len(batch["label"]))), batch["mask"]
        found = {}
        for name, log_p in zip(("", "supervised_"), learner.predict(params, batch["image"]), strict=True):
            right = (jnp.argmax(log_p, axis=2) == label) * mask[None]
            count = jnp.full(num_splits, jnp.sum(mask))
            found[f"{name}accuracy"] = Mean(jnp.sum(right, axis=1), count)
            found[f"{name}loss"] = Mean(jnp.sum(cross_entropy(log_p, label) * mask[None], axis=1), count)
        return found

    by_split = common.make_evaluation(
        measure, test, mesh, batch_size=config.evaluation.batch_size, seed=config.seed
    )

    def validate(state: TrainState) -> Metrics:
        found = by_split(state.sampling_params)
        return {name: Mean(jnp.sum(mean.total), jnp.sum(mean.count)) for name, mean in found.items()}

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        del needed
        found = by_split(state.sampling_params)
        wrong = {name: 100 * (1 - np.asarray(found[f"{name}accuracy"].value)) for name in ("", "supervised_")}
        published = _PUBLISHED.get((config.data.source, config.model.kind, num_labels), (None, ""))
        unit = f"%, mean of {num_splits} draws of {num_labels} labels"
        scores = {
            "test_error": Score(float(wrong[""].mean()), unit, len(test), False, *published),
            "supervised_test_error": Score(float(wrong["supervised_"].mean()), unit, len(test), False),
            "draws_won": Score(
                float(np.mean(wrong[""] < wrong["supervised_"])),
                "share of the draws where the images without labels help",
                num_splits,
                True,
            ),
        }
        if num_splits > 1:
            for name, values in wrong.items():
                scores[f"{name}test_error_spread"] = Score(
                    float(values.std(ddof=1)), "%, standard deviation over the draws", num_splits, False
                )
        return scores

    draw_all = jax.jit(
        lambda params, key, numbers: jax.vmap(lambda number: learner.draw(params, key, number))(numbers)
    )

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        images = np.asarray(draw_all(state.sampling_params, key, jnp.arange(num or config.sampling.num)))
        path = directory / "samples.png"
        pictures.save_image_grid(
            path, images.reshape(-1, *shape), columns=num_classes, scale=max(1, 64 // shape[0])
        )
        return [path]

    return Experiment(
        system=learner.system,
        loop=common.loop_settings(config.train),
        train_batch=learner.train_batch,
        validate=validate,
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
    )
