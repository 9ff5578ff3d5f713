"""Gated PixelCNN (van den Oord et al. 2016) and PixelCNN++ (Salimans et al. 2017) on images.

  python -m jaxgen.run --config=experiments/pixelcnn.py:digits --workdir=runs/pixelcnn_digits

Read models/pixelcnn, objectives/pixelcnn, samplers/pixels and this file, in that order. `data.binarise` draws
each pixel black or white once, with its brightness as probability, as the published binary MNIST was made
(other draws, so scores compare but for their noise). `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from jaxgen import data
from jaxgen.models.pixelcnn import PixelCNN, Variant, cached_functions
from jaxgen.objectives import pixelcnn as objective
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.pixels import PixelNetwork, pixel_chain, whole_image_network
from jaxgen.types import Array, Batch, Experiment, Key, PyTree, Score, Scores, TrainState, UserError

LIKELIHOODS = ("bernoulli", "categorical", "logistic_mixture")
_MNIST = {
    "data.source": "mnist",
    "data.batch_size": 64,
    "data.binarise": True,
    "model.likelihood": "bernoulli",
    "model.num_layers": 7,
    "train.num_steps": 3000,
    "train.validate_every": 1000,
    "train.checkpoint_every": 250,
    "evaluation.num_samples": 1000,
    "evaluation.batch_size": 100,
    "evaluation.classifier": "mnist",
}
_PLUSPLUS = {
    "data.batch_size": 128,
    "model.variant": "plusplus",
    "model.likelihood": "logistic_mixture",
    "optim.schedule": "exponential",
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 0,
    "optim.ema_decay": 0.9995,
    "train.log_every": 500,
    "train.validate_every": 5000,
    "train.checkpoint_every": 5000,
    "evaluation.num_samples": 10_000,
    "evaluation.batch_size": 500,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.features": 4,
            "model.num_layers": 2,
            "data.batch_size": 16,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 4, "1.72 bits/dim (exact), 0.87 recognised, Fréchet ratio 2.4", {}),
    "mnist": Preset("2 CPU cores", 30, "87.57 nats (exact; published 81.3), 0.59 recognised", _MNIST),
    "fashion_mnist": Preset(
        "1 GPU",
        120,
        "not run yet",
        {
            **_PLUSPLUS,
            "data.source": "fashion_mnist",
            "model.features": 64,
            "model.num_layers": 12,
            "model.dropout": 0.2,
            "optim.decay_rate": 0.78,  # 0.999995 a step
            "train.num_steps": 50_000,
            "evaluation.classifier": "fashion_mnist",
        },
    ),
    "cifar10": Preset(
        "8 GPUs",
        7000,
        "2.92 bits/dim (Salimans et al. 2017)",
        {
            **_PLUSPLUS,
            "data.source": "cifar10",
            "model.features": 160,
            "model.num_layers": 30,
            "model.dropout": 0.5,
            "model.num_mixtures": 10,
            "optim.decay_rate": 0.082,  # 0.999995 a step
            "train.num_steps": 500_000,
            "evaluation.classifier": "cifar10",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "model.variant": ("plusplus", {}),
    "model.likelihood": ("logistic_mixture", {}),
    "model.num_mixtures": (3, {"model.likelihood": "logistic_mixture"}),
    "model.dropout": (0.5, {}),
}
# What is published for a data set: bits/dim, or nats for binary images, and where.
_BITS_PER_DIM = {"cifar10": (2.92, "Salimans et al. 2017, table 1")}
_NATS = {"mnist": (81.3, "PixelCNN in van den Oord et al. 2016a, table 4; other draws of binary MNIST")}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=2000)
    config.data.batch_size = 64
    config.data.binarise = False
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.995
    config.model = ConfigDict(
        {
            "variant": "gated",  # gated, plusplus
            "likelihood": "categorical",  # bernoulli, categorical, logistic_mixture
            "num_mixtures": 5,  # logistic_mixture
            "features": 32,
            "num_layers": 5,
            "dropout": 0.2,
            "conditional": False,  # told the class
            "dtype": "float32",
        }
    )
    config.sampling = ConfigDict({"cached": True, "num": 64})
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.features", "model.num_layers", "model.num_mixtures", "sampling.num")
    checks.in_range(config, 0, 1, "model.dropout")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.one_of(config, get_args(Variant), "model.variant")
    checks.one_of(config, LIKELIHOODS, "model.likelihood")
    if config.model.likelihood == "bernoulli" and not config.data.binarise:
        raise UserError(
            "model.likelihood=bernoulli is for binary images: set data.binarise, or take another."
        )
    generating.check_evaluation(config)


def binarised(source: data.Source) -> data.Source:
    """The source with each pixel drawn once, 1 with probability value / (num_levels - 1), else 0."""
    image = np.asarray(source.fields["image"][np.arange(len(source))])
    uniform = np.random.default_rng(source.split == "test").random(image.shape, np.float32)
    bright = (uniform * (source.num_levels - 1) < image).astype(np.uint8)
    return dataclasses.replace(source, fields={**source.fields, "image": bright}, num_levels=2)


def make_likelihood(config: ConfigDict, channels: int, num_levels: int) -> objective.PixelLikelihood:
    """The distribution of a pixel that config.model describes."""
    if config.likelihood == "bernoulli":
        return objective.bernoulli_likelihood(channels)
    if config.likelihood == "logistic_mixture":
        return objective.logistic_mixture_likelihood(config.num_mixtures, channels, num_levels)
    if channels > 1:
        raise UserError(
            f"model.likelihood=categorical is for images of one channel, and these have {channels}: take "
            "logistic_mixture."
        )
    return objective.categorical_likelihood(num_levels)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    if config.data.binarise:
        train, test = binarised(train), binarised(test)
    shape = train.fields["image"].shape[1:]
    num_classes = train.num_classes if config.model.conditional else None
    if config.model.conditional and num_classes is None:
        raise UserError(f"model.conditional needs labels, and {train.name} has none.")
    likelihood = make_likelihood(config.model, shape[-1], train.num_levels)
    model = PixelCNN(
        variant=config.model.variant,
        features=config.model.features,
        num_layers=config.model.num_layers,
        num_outputs=likelihood.num_parameters,
        channels=shape[-1],
        num_classes=num_classes,
        dropout=config.model.dropout,
        dtype=common.DTYPES[config.model.dtype],
    )

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        label = batch["label"] if num_classes is not None else None
        return model.init(key, batch["image"], label)["params"], {}

    def apply(params: PyTree, x: Array, label: Array | None, key: Key | None) -> Array:
        rngs = None if key is None else {"dropout": key}
        return cast(Array, model.apply({"params": params}, x, label, train=key is not None, rngs=rngs))

    loss = objective.make_loss(apply, likelihood, conditional=num_classes is not None)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling: sample number i is of class i mod num_classes where the model is conditional

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        label = None if num_classes is None else indices % num_classes
        if config.sampling.cached:
            network = PixelNetwork(*cached_functions(model, params, label))
        else:
            network = whole_image_network(lambda x: apply(params, x, label, None))
        return run_chain(pixel_chain(network, likelihood.draw, shape[0]), key, indices, shape)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        num, batch_size = num or config.sampling.num, config.evaluation.batch_size
        return [generating.write_grid(sample, state.sampling_params, key, num, batch_size, directory)]

    # ---- evaluation: without dropout

    held_out_loss = objective.make_loss(
        lambda params, x, label, _: apply(params, x, label, None),
        likelihood,
        conditional=num_classes is not None,
    )
    validation = common.make_evaluation(
        lambda params, batch, key: held_out_loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def likelihood_scores(params: PyTree) -> Scores:
        values = common.mean_values(validation(params))
        given = " given the class" if num_classes else ""
        published: dict[str, dict[str, tuple[float, str]]] = {"bits": {}, "nats": {}}
        if num_classes is None:
            published = (
                {"bits": {}, "nats": _NATS} if config.data.binarise else {"bits": _BITS_PER_DIM, "nats": {}}
            )
        bits, nats = (published[unit].get(config.data.source, (None, "")) for unit in ("bits", "nats"))
        return {
            "bits_per_dim": Score(values["loss"], f"bits/dim, exact{given}", len(test), False, *bits),
            "nll": Score(values["nats"], f"nats per image, exact{given}", len(test), False, *nats),
        }

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores = dict(likelihood_scores(params))
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            scores.update(generating.sample_scores(sample, params, judge, config, mesh))
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.sampling_params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
        needs=generating.judge_needs(config, train, test, mesh),
    )
