"""Normalising flows on images: Glow (Kingma & Dhariwal 2018) and RealNVP (Dinh et al. 2017).

  python -m jaxgen.run --config=experiments/glow.py:digits --workdir=runs/glow_digits
  ... --config.model.kind=realnvp

Read models/flows, objectives/flow, samplers/flow and this file, in that order. The likelihood is exact but
for the dequantisation, which makes the bits/dim an upper bound. `PRESETS` says what each preset needs and
reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from jaxgen import data, pictures
from jaxgen.models.flows import Flow, Kind, latent_shapes
from jaxgen.objectives import flow as objective
from jaxgen.samplers.flow import draw_latents, interpolate
from jaxgen.types import Array, Batch, Experiment, Key, PyTree, Score, Scores, TrainState, UserError

_PUBLISHED = {
    "data.batch_size": 64,
    "model.num_steps": 32,
    "model.width": 512,
    "optim.learning_rate": 1e-3,
    "optim.schedule": "constant",
    "optim.ema_decay": 0.999,
    "train.num_steps": 500_000,
    "train.log_every": 500,
    "train.validate_every": 5000,
    "train.checkpoint_every": 5000,
    "evaluation.num_samples": 10_000,
    "evaluation.batch_size": 250,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "model.num_scales": 1,
            "model.num_steps": 1,
            "model.width": 4,
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
    "digits": Preset("2 CPU cores", 4, "2.31 bits/dim (bound), 0.78 recognised, Fréchet ratio 8.8", {}),
    "mnist": Preset(
        "2 CPU cores",
        25,
        "1.69 bits/dim (bound), 0.48 recognised, Fréchet ratio 29.5",
        {
            "data.source": "mnist",
            "model.num_steps": 12,
            "model.width": 64,
            "train.num_steps": 3000,
            "train.validate_every": 1000,
            "train.checkpoint_every": 250,
            "evaluation.num_samples": 1000,
            "evaluation.batch_size": 100,
            "evaluation.classifier": "mnist",
        },
    ),
    "fashion_mnist": Preset(
        "1 GPU",
        300,
        "not run yet",
        {
            **_PUBLISHED,
            "data.source": "fashion_mnist",
            "model.num_steps": 16,
            "model.width": 256,
            "train.num_steps": 50_000,
            "evaluation.classifier": "fashion_mnist",
        },
    ),
    "cifar10": Preset(
        "8 GPUs",
        5000,
        "3.35 bits/dim (Kingma & Dhariwal 2018)",
        {
            **_PUBLISHED,
            "data.source": "cifar10",
            "data.augment": "flip",
            "data.batch_size": 512,
            "model.num_scales": 3,
            "optim.warmup_steps": 1000,
            "evaluation.classifier": "cifar10",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "model.kind": ("realnvp", {}),
}
_BITS_PER_DIM = {
    ("glow", "cifar10"): (3.35, "Kingma & Dhariwal 2018, table 2"),
    ("realnvp", "cifar10"): (3.49, "Dinh et al. 2017, table 1"),
}
_NUM_PATHS, _NUM_POINTS = 6, 9  # of the picture of interpolations


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    # Of 2,000 updates on 1,437 digits, held-out bits/dim were best between 500 and 1,000, then 0.3 worse.
    config = common.base_config(num_steps=800)
    config.data.batch_size = 64
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.995
    config.train.validate_every = 200
    config.train.checkpoint_every = 200
    config.model = ConfigDict(
        {
            "kind": "glow",  # glow, realnvp
            "num_scales": 2,
            "num_steps": 6,  # a scale
            "width": 64,
            "conditional": False,  # told the class
            "dtype": "float32",
        }
    )
    config.sampling = ConfigDict({"temperature": 0.7, "num": 64})
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.num_scales", "model.num_steps", "model.width", "sampling.num")
    checks.at_least(config, 0, "sampling.temperature")
    checks.one_of(config, common.DTYPES, "model.dtype")
    checks.one_of(config, get_args(Kind), "model.kind")
    generating.check_evaluation(config)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape, num_levels = train.fields["image"].shape[1:], train.num_levels
    num_classes = train.num_classes if config.model.conditional else None
    if config.model.conditional and num_classes is None:
        raise UserError(f"model.conditional needs labels, and {train.name} has none.")
    try:
        shapes = latent_shapes(shape, config.model.num_scales)
    except ValueError as error:
        raise UserError(f"model.num_scales={config.model.num_scales} is too many: {error}.") from error
    model = Flow(
        kind=config.model.kind,
        num_scales=config.model.num_scales,
        num_steps=config.model.num_steps,
        width=config.model.width,
        num_classes=num_classes,
        dtype=common.DTYPES[config.model.dtype],
    )

    def forward(params: PyTree, y: Array, label: Array | None) -> tuple[list[Array], Array]:
        return cast(tuple[list[Array], Array], model.apply({"params": params}, y, label))

    def inverse(params: PyTree, zs: list[Array], label: Array | None) -> Array:
        y = cast(Array, model.apply({"params": params}, zs, label, method="inverse"))
        return objective.quantise(y, num_levels)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        """The parameters; those of ActNorm come from the batch."""
        noise_key, init_key = jax.random.split(key)
        noise = objective.dequantisation_noise(noise_key, batch["image"].shape)
        y = objective.dequantise(batch["image"], noise, num_levels)
        label = batch["label"] if num_classes is not None else None
        return model.init(init_key, y, label)["params"], {}

    loss = objective.make_loss(forward, num_levels=num_levels, conditional=num_classes is not None)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling: sample number i is of class i mod num_classes where the model is conditional

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        label = None if num_classes is None else indices % num_classes
        zs = draw_latents(key, indices, shapes, config.sampling.temperature)
        return inverse(params, zs, label)

    @jax.jit
    def between(params: PyTree, first: Array, last: Array, label: Array) -> Array:
        """Images [_NUM_POINTS, B, H, W, C] on the lines between the latents of images [B, H, W, C]."""
        of_class = None if num_classes is None else label

        def latents(x: Array) -> list[Array]:
            middle = objective.dequantise(x, jnp.full(x.shape, 0.5), num_levels)
            return forward(params, middle, of_class)[0]

        points = interpolate(latents(first), latents(last), _NUM_POINTS)
        return jax.lax.map(lambda zs: inverse(params, zs, of_class), points)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params = state.sampling_params
        num = num or config.sampling.num
        grid = generating.write_grid(sample, params, key, num, config.evaluation.batch_size, directory)
        # A path stays within a class, so that a conditional model can be told which.
        labels = test.fields.get("label", np.zeros(len(test), np.int32))
        first = np.arange(min(_NUM_PATHS, len(test)))
        last = [int(np.flatnonzero(labels == labels[i])[-1]) for i in first]
        images = (
            jnp.asarray(data.to_unit_range(test.fields["image"][rows], num_levels)) for rows in (first, last)
        )
        frames = between(params, *images, jnp.asarray(labels[first]))
        strip = directory / "interpolations.png"
        pictures.save_strip(strip, np.asarray(frames), scale=max(1, 64 // shape[0]))
        return [grid, strip]

    # ---- evaluation: the same noise every time

    validation = common.make_evaluation(
        lambda params, batch, key: loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )

    def likelihood_scores(params: PyTree) -> Scores:
        value = float(validation(params)["loss"].value)
        unit = "bits/dim, upper bound by dequantisation" + (" given the class" if num_classes else "")
        published = {} if num_classes else _BITS_PER_DIM
        reference = published.get((config.model.kind, config.data.source), (None, ""))
        return {"bits_per_dim": Score(value, unit, len(test), False, *reference)}

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
