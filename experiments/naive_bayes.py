"""Naive Bayes and logistic regression on the same images: the generative and the discriminative twin.

  python -m jaxgen.run --config=experiments/naive_bayes.py:digits --workdir=runs/naive_bayes_digits
  ... --config.data.batch_size=100        # both learn from 100 images alone (Ng & Jordan 2002)

Naive Bayes, one model for each family of densities, is fitted in one go before the first update, by counting;
an update is one L-BFGS iteration of logistic regression. Both see the same `data.batch_size` images at each
update; presets take all. What they see of an image x in [0, 1]: x itself for the Gaussian family and for
logistic regression, whether x > 1/2 for the Bernoulli family, x in sixteenths as counts for the multinomial.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, classifying, counting, rows_of
from jaxgen import pictures, systems
from jaxgen.estimators import families, logistic, naive_bayes
from jaxgen.estimators.families import Family
from jaxgen.estimators.logistic import Logistic
from jaxgen.estimators.mixture import Mixture
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
    unknown,
)

_SIXTEENTHS = 16


class Density(NamedTuple):
    """A family with what it sees of pixels in [0, 1], and the way back to pixels for pictures of samples."""

    family: Family
    features: Callable[[Array], Array]
    to_pixels: Callable[[Array], Array]
    unit: str  # of log p(x)


DENSITIES = {
    "gaussian": Density(
        families.GAUSSIAN_DIAGONAL, lambda x: x, lambda x: x, "nats/image, density of pixels in [0, 1]"
    ),
    "bernoulli": Density(
        families.BERNOULLI,
        lambda x: (x > 0.5).astype(x.dtype),
        lambda x: x,
        "nats/image, of pixels above 1/2 or not",
    ),
    "multinomial": Density(
        families.MULTINOMIAL,
        lambda x: jnp.round(_SIXTEENTHS * x),
        lambda x: x / _SIXTEENTHS,
        "nats/image, of counts in sixteenths given their sum",
    ),
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            **counting.SMOKE_TRAIN,
            "data.batch_size": 80,
            "sampling.num": 4,
            "evaluation.batch_size": 180,
        },
    ),
    "digits": Preset(
        "2 CPU cores",
        0.3,
        "test error 3.3 % (logistic), 5.0, 6.7, 10.8 % (Gaussian, multinomial, Bernoulli)",
        {},
    ),
    "mnist": Preset(
        "2 CPU cores",
        5,
        "not run to the end yet",
        {"data.source": "mnist", "data.batch_size": 60_000, "evaluation.batch_size": 1000},
    ),
    "fashion_mnist": Preset(
        "2 CPU cores",
        5,
        "not run to the end yet",
        {"data.source": "fashion_mnist", "data.batch_size": 60_000, "evaluation.batch_size": 1000},
    ),
}
FIELD_CHECKS = {
    **{field: check for field, check in common.FIELD_CHECKS.items() if field[:5] in ("data.", "train")},
    "model.families": (("bernoulli",), {}),
}


class Twins(NamedTuple):
    """naive_bayes: {family: its fit}; logistic: the iterate, with what L-BFGS remembers of those before."""

    naive_bayes: dict[str, Mixture]
    logistic: Logistic
    lbfgs: PyTree


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=100)
    del config.optim  # L-BFGS finds its rate by line search
    config.data.batch_size = 1437
    config.train.steps_per_dispatch = 5
    config.train.log_every = 5
    config.train.validate_every = 10
    config.train.checkpoint_every = 50
    config.model = ConfigDict(
        {
            "families": tuple(DENSITIES),
            "smoothing": 1.0,  # pseudo-count of each value of a discrete family
            "variance_floor": 0.01,  # of pixels in [0, 1]
            "l2": 1.0,  # l2 / 2 |W|^2 beside the sum of -log p(label given x)
        }
    )
    config.sampling = ConfigDict({"num": 50})
    config.evaluation = ConfigDict({"batch_size": 360})
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_data(config)
    checks.at_least(config, 1, "sampling.num", "evaluation.batch_size")
    checks.at_least(config, 0, "model.smoothing", "model.l2")
    checks.above(config, 0, "model.variance_floor")
    for name in config.model.families:
        if name not in DENSITIES:
            raise unknown("model.families", name, tuple(DENSITIES))
    if not config.model.families:
        raise UserError(f"model.families names none: choose among {', '.join(DENSITIES)}.")


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds both kinds of classifier, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    num_classes, shape = classifying.num_classes(train), train.fields["image"].shape[1:]
    used = {name: DENSITIES[name] for name in config.model.families}
    optimizer = optax.lbfgs()

    def loss_of(params: Logistic, batch: Batch) -> Array:
        """The objective of `logistic.fit`, nats a row."""
        x, label = rows_of(batch["image"]), batch["label"]
        penalty = 0.5 * config.model.l2 * jnp.sum(params.weight**2)
        return (penalty - jnp.sum(logistic.log_prob(params, x, label))) / len(x)

    def init(key: Key, batch: Batch) -> Twins:
        del key
        x = rows_of(batch["image"])
        start = Logistic(jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
        counted = {}
        for name, density in used.items():
            smoothing = config.model.variance_floor if name == "gaussian" else config.model.smoothing
            counted[name] = naive_bayes.fit(
                density.family, density.features(x), batch["label"], num_classes, smoothing=smoothing
            )
        return Twins(counted, start, optimizer.init(start))

    def update(twins: Twins, batch: Batch, key: Key) -> tuple[Twins, Metrics]:
        del key
        objective = functools.partial(loss_of, batch=batch)
        value, grad = optax.value_and_grad_from_state(objective)(twins.logistic, state=twins.lbfgs)
        step, lbfgs = optimizer.update(
            grad, twins.lbfgs, twins.logistic, value=value, grad=grad, value_fn=objective
        )
        moved = optax.apply_updates(twins.logistic, step)
        once = jnp.ones(())
        metrics = {"loss": Mean(value, once), "gradient_norm": Mean(optax.tree.norm(grad), once)}
        return twins._replace(logistic=moved, lbfgs=lbfgs), metrics

    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    first_batch = functools.cache(lambda: stream(0))

    def measure(twins: Twins, batch: Mapping[str, Any], key: Key) -> Metrics:
        """Of each classifier: -log p(label given x), whether it is wrong; of naive Bayes -log p(x) too."""
        x, label, mask = rows_of(batch["image"]), batch["label"], batch["mask"]
        given = {"logistic": logistic.predict_log_proba(twins.logistic, x)}
        found: dict[str, Mean] = {}
        for name, density in used.items():
            joint = naive_bayes.log_joint(density.family, twins.naive_bayes[name], density.features(x))
            given[name] = jax.nn.log_softmax(joint, axis=1)
            found[f"{name}_nats"] = Mean.of(-jax.nn.logsumexp(joint, axis=1), mask)
        for name, log_p in given.items():
            right = jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
            found[f"{name}_error"] = Mean.of(jnp.argmax(log_p, axis=1) != label, mask)
            found[f"{name}_cross_entropy"] = Mean.of(-right, mask)
        return {"loss": found["logistic_cross_entropy"], **found}

    validation = common.make_evaluation(
        measure, test, mesh, batch_size=config.evaluation.batch_size, seed=config.seed
    )

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        del needed
        values, num = common.mean_values(validation(state.params)), len(test)
        scores = {}
        for name in ("logistic", *used):
            scores[f"{name}_test_error"] = Score(100 * values[f"{name}_error"], "%", num, False)
            cross_entropy = values[f"{name}_cross_entropy"]
            scores[f"{name}_test_cross_entropy"] = Score(cross_entropy, "nats/label given x", num, False)
        for name, density in used.items():
            scores[f"{name}_test_log_prob"] = Score(-values[f"{name}_nats"], density.unit, num, True)
        return scores

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        """Draws from each family, and each class's mean with the weights of logistic regression below."""
        directory.mkdir(parents=True, exist_ok=True)
        scale, paths, rows = max(1, 64 // shape[0]), [], []
        for name, density in used.items():
            fitted = state.params.naive_bayes[name]
            _, x = naive_bayes.sample(density.family, fitted, key, num or config.sampling.num)
            paths.append(directory / f"samples_{name}.png")
            images = 2 * np.asarray(density.to_pixels(x)).reshape(-1, *shape) - 1
            pictures.save_image_grid(paths[-1], images, scale=scale)
            rows.append(_to_full_range(_class_means(fitted.components)))
        weight = np.asarray(state.params.logistic.weight).T
        rows.append(weight / max(np.abs(weight).max(), 1e-30))
        paths.append(directory / "classes.png")
        images = np.concatenate(rows).reshape(-1, *shape)
        pictures.save_image_grid(paths[-1], images, columns=num_classes, scale=scale)
        return paths

    return Experiment(
        system=systems.update_system(init, update),
        loop=common.loop_settings(config.train),
        train_batch=lambda step: first_batch(),
        validate=lambda state: validation(state.params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
    )


def _class_means(components: PyTree) -> np.ndarray:
    """What each class expects of each feature, up to a factor a class: [K, D]."""
    match components:
        case families.Gaussians():
            return np.asarray(components.mean)
        case families.Bernoullis():
            return np.exp(np.asarray(components.log_on))
        case _:
            return np.exp(np.asarray(components.log_prob))


def _to_full_range(x: np.ndarray) -> np.ndarray:
    """Each row of [K, D] stretched to [-1, 1]."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    return 2 * (x - low) / np.maximum(high - low, 1e-30) - 1
