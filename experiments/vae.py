"""Variational auto-encoders of images (Kingma & Welling 2014), and their importance-weighted kin (IWAE).

  python -m jaxgen.run --config=experiments/vae.py:digits --workdir=runs/vae_digits

Read models/vae, objectives/vae and this file, in that order. `data.binarise` makes the images black or
white, each pixel white with its brightness as probability: "dynamic" draws the training images anew at every
step, as Burda et al. 2016 do, "fixed" once. The test images are drawn once in either case, with a seed that
does not change, the same draws as experiments/pixelcnn.py has, so that the likelihoods compare. The
likelihood of held-out images is estimated by importance sampling; its unit says with how many samples.
`PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy.stats import norm

from experiments import common
from experiments.autoencoder import check_network, make_decoder, make_encoder, network_fields
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from experiments.pixelcnn import binarised
from jaxgen import data, pictures
from jaxgen.models.autoencoder import Mlp
from jaxgen.models.vae import VAE
from jaxgen.objectives import label_of
from jaxgen.objectives import vae as objective
from jaxgen.samplers.flow import draw_latents, interpolate
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

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_logistic")
_BURDA = {  # Burda et al. 2016, section 5, one stochastic layer
    "data.batch_size": 100,
    "model.widths": (200, 200),
    "model.activation": "tanh",
    "model.latent_size": 50,
    "train.num_steps": 120_000,
    "train.log_every": 500,
    "train.validate_every": 6000,
    "train.checkpoint_every": 6000,
    "evaluation.num_samples": 10_000,
    "evaluation.batch_size": 100,
    "evaluation.num_importance": 1000,
    "evaluation.num_likelihood": 10_000,
}
_MNIST = {**_BURDA, "data.source": "mnist", "evaluation.classifier": "mnist"}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "data.batch_size": 16,
            "model.widths": (8,),
            "model.second_widths": (4,),
            "model.latent_size": 2,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num": 4,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.num_importance": 3,
            "evaluation.num_likelihood": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 1, "22.5 nats of binary digits, 75 % of samples recognised", {}),
    "mnist": Preset(
        "2 CPU cores",
        18,
        "87.19 nats (Burda et al. 2016, a smaller network, 3,280 epochs: 86.76)",
        {
            **_MNIST,
            "model.widths": (500, 500),
            "model.activation": "gelu",
            "train.num_steps": 40_000,
            "train.validate_every": 2000,
            "train.checkpoint_every": 2000,
        },
    ),
    "mnist_burda": Preset(
        "2 CPU cores", 30, "91.85 nats in 200 epochs (Burda et al. 2016, 3,280 epochs: 86.76)", _MNIST
    ),
    "mnist_iwae": Preset(
        "2 CPU cores",
        40,
        "87.02 nats (Burda et al. 2016, a smaller network, 3,280 epochs: 84.78)",
        {
            **_MNIST,
            "model.widths": (500, 500),
            "model.activation": "gelu",
            "objective.bound": "iwae",
            "objective.num_samples": 50,
            "optim.learning_rate": 2e-3,
            "train.num_steps": 18_000,
            "train.validate_every": 3000,
            "train.checkpoint_every": 500,
        },
    ),
    "mnist_2d": Preset(
        "2 CPU cores", 15, "not recorded yet", {**_MNIST, "model.latent_size": 2, "train.num_steps": 30_000}
    ),
    "mnist_two_layers": Preset(
        "2 CPU cores",
        60,
        "85.3 nats (Burda et al. 2016, 3,280 epochs)",
        {**_MNIST, "model.latent_size": 100, "model.second_size": 50, "model.second_widths": (100, 100)},
    ),
    "fashion_mnist": Preset(
        "2 CPU cores",
        30,
        "no published figure",
        {**_BURDA, "data.source": "fashion_mnist", "evaluation.classifier": "fashion_mnist"},
    ),
    "cifar10": Preset(
        "1 GPU",
        60,
        "no published figure for so small a network",
        {
            **_BURDA,
            "data.source": "cifar10",
            "data.augment": "flip",
            "data.binarise": "",
            "model.network": "conv",
            "model.widths": (64, 128, 256),
            "model.activation": "gelu",
            "model.latent_size": 128,
            "model.likelihood": "discretized_logistic",
            "objective.least_rate": 0.1,
            "evaluation.num_importance": 200,
            "evaluation.classifier": "cifar10",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "data.binarise": ("fixed", {}),
    "model.network": ("conv", {}),
    "model.widths": ((6, 5), {}),
    "model.activation": ("gelu", {}),
    "model.likelihood": ("discretized_logistic", {}),
    "model.std": (0.25, {"model.likelihood": "gaussian"}),
    "model.second_widths": ((5,), {"model.second_size": 3}),
    "objective.bound": ("iwae", {}),
}
# (bound, samples a step, layers) on binary MNIST: nats, and where.
_PUBLISHED = {
    ("elbo", 1, 1): (86.76, "Burda et al. 2016, table 1, VAE"),
    ("elbo", 50, 1): (86.35, "Burda et al. 2016, table 1, VAE k=50"),
    ("iwae", 50, 1): (84.78, "Burda et al. 2016, table 1, IWAE k=50"),
    ("elbo", 1, 2): (85.33, "Burda et al. 2016, table 1, VAE of two layers"),
}
_NUM_PATHS, _NUM_POINTS = 6, 9  # of the picture of interpolations
_BOUND_SAMPLES = 50  # of the IWAE bound that is told beside the likelihood
_NUM_TILES, _NUM_DOTS = 15, 2000  # of the picture of a latent plane


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=6000)
    config.data.batch_size = 100
    config.data.binarise = "dynamic"  # dynamic, fixed; "" leaves the grey levels
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 0.0
    config.optim.ema_decay = 0.999
    config.train.steps_per_dispatch = 50
    config.train.log_every = 100
    config.train.validate_every = 1000
    config.train.checkpoint_every = 1000
    config.model = ConfigDict(
        {
            **network_fields((128, 128)),
            "activation": "tanh",
            "latent_size": 12,
            "second_size": 0,  # of a second layer of latent variables above the first; 0 for none
            "second_widths": (64, 64),
            "conditional": False,  # told the class
            "likelihood": "bernoulli",  # bernoulli, gaussian, discretized_logistic
            "std": 0.2,  # of a gaussian likelihood, on a range of 2
        }
    )
    config.objective = ConfigDict(
        {
            "bound": "elbo",  # elbo, iwae
            "num_samples": 1,  # draws of the latent variables for each image and step
            "beta": 1.0,  # the weight of the rate
            "least_rate": 0.0,  # free bits: nats that each latent dimension has for nothing
        }
    )
    config.sampling = ConfigDict(
        {
            "num": 64,
            "draw": False,  # draw pixels; else show their means
        }
    )
    config.evaluation = generating.evaluation_config(
        num_importance=1000,  # samples of each image's likelihood
        num_likelihood=360,  # held-out images whose likelihood is estimated
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    check_network(config)
    checks.one_of(config, ("dynamic", "fixed", ""), "data.binarise")
    checks.one_of(config, LIKELIHOODS, "model.likelihood")
    checks.one_of(config, get_args(objective.Bound), "objective.bound")
    checks.at_least(config, 1, "model.latent_size", "model.second_widths", "sampling.num")
    checks.at_least(config, 1, "objective.num_samples", "evaluation.num_importance")
    checks.at_least(config, 1, "evaluation.num_likelihood")
    checks.at_least(config, 0, "model.second_size", "objective.beta", "objective.least_rate")
    checks.above(config, 0, "model.std")
    if config.model.likelihood == "bernoulli" and not config.data.binarise:
        raise UserError(
            "model.likelihood=bernoulli is for binary images: set data.binarise, or take another."
        )
    generating.check_evaluation(config)


def make_likelihood(config: ConfigDict, channels: int, num_levels: int) -> objective.Likelihood:
    """The distribution of an image given its code that config.model describes."""
    if config.likelihood == "bernoulli":
        return objective.bernoulli_likelihood(channels)
    if config.likelihood == "gaussian":
        return objective.gaussian_likelihood(channels, config.std)
    return objective.discretized_logistic_likelihood(channels, num_levels)


def make_model(
    config: ConfigDict, size: tuple[int, int], num_parameters: int, num_classes: int | None
) -> VAE:
    """The networks that config.model describes, for images of `size` with `num_parameters` a pixel."""
    dtype = common.DTYPES[config.dtype]

    def second(num_outputs: int) -> Mlp | None:
        widths = tuple(config.second_widths)
        return Mlp(widths, num_outputs, config.activation, dtype) if config.second_size else None

    return VAE(
        encoder=make_encoder(config, 2 * config.latent_size),
        decoder=make_decoder(config, size, num_parameters),
        num_classes=num_classes,
        above=second(2 * config.second_size),
        prior=second(2 * config.latent_size),
    )


def networks_of(model: VAE, latent_sizes: tuple[int, ...]) -> objective.Networks:
    """The module's methods as functions of its parameters."""

    def gaussian(params: PyTree, *args: Array | None, method: str) -> objective.Gaussian:
        return objective.Gaussian(
            *cast(tuple[Array, Array], model.apply({"params": params}, *args, method=method))
        )

    return objective.Networks(
        encode=lambda params, x, label: gaussian(params, x, label, method="encode"),
        decode=lambda params, z, label: cast(
            Array, model.apply({"params": params}, z, label, method="decode")
        ),
        latent_sizes=latent_sizes,
        encode_above=(lambda params, z1: gaussian(params, z1, method="encode_above"))
        if model.above
        else None,
        prior_below=(lambda params, z2: gaussian(params, z2, method="prior_below")) if model.prior else None,
    )


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds networks, bound, data, sampler and metrics."""
    check(config)
    grey_train, grey_test = train, test = common.load_images(config.data.source)
    if config.data.binarise:
        test = binarised(grey_test)
    if config.data.binarise == "fixed":
        train = binarised(grey_train)
    shape = train.fields["image"].shape[1:]
    num_classes = train.num_classes if config.model.conditional else None
    conditional = num_classes is not None
    if config.model.conditional and not conditional:
        raise UserError(f"model.conditional needs labels, and {train.name} has none.")
    likelihood = make_likelihood(config.model, shape[2], test.num_levels)
    model = make_model(config.model, (shape[0], shape[1]), likelihood.num_parameters, num_classes)
    latent_sizes = tuple(size for size in (config.model.latent_size, config.model.second_size) if size)
    networks = networks_of(model, latent_sizes)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        label = label_of(batch, conditional)
        return model.init(key, batch["image"], label)["params"], {}

    goal = config.objective
    settings = {
        "bound": goal.bound,
        "num_samples": goal.num_samples,
        "beta": goal.beta,
        "least_rate": goal.least_rate,
        "conditional": conditional,
    }
    loss = objective.make_loss(networks, likelihood, **settings, binary=config.data.binarise == "dynamic")
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- sampling: sample number i is of class i mod num_classes where the model is conditional

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        label = None if num_classes is None else indices % num_classes
        latent_key, pixel_key = jax.random.split(key)
        eps = tuple(draw_latents(latent_key, indices, [(size,) for size in latent_sizes]))
        outputs = networks.decode(params, objective.prior_draw(networks, params, eps), label)
        if not config.sampling.draw:
            return likelihood.mean(outputs)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(pixel_key, indices)
        return jax.vmap(likelihood.draw)(keys, outputs)

    @jax.jit
    def code_of(params: PyTree, x: Array, label: Array) -> Array:
        return networks.encode(params, x, label if conditional else None).mean

    @jax.jit
    def image_of(params: PyTree, z: Array, label: Array) -> Array:
        """The mean images of codes [N, B, K]: [N, B, H, W, C]."""
        decode = lambda z: likelihood.mean(networks.decode(params, z, label if conditional else None))
        return jax.vmap(decode)(z)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params, batch_size = state.sampling_params, config.evaluation.batch_size
        grid = generating.write_grid(sample, params, key, num or config.sampling.num, batch_size, directory)
        shown = min(len(test), _NUM_DOTS)
        real = data.to_unit_range(test.fields["image"][:shown], test.num_levels)
        labels = test.fields.get("label", np.zeros(len(test), np.int32))[:shown]
        codes, scale = np.asarray(code_of(params, real, labels)), max(1, 64 // shape[0])
        rebuilt, strip = (directory / f"{name}.png" for name in ("reconstructions", "interpolations"))
        again = np.asarray(image_of(params, codes[None, :8], labels[:8]))[0]
        pictures.save_image_grid(rebuilt, np.concatenate([real[:8], again]), columns=len(again), scale=scale)
        # A path stays within a class, so that a conditional model can be told which.
        first = np.arange(min(_NUM_PATHS, shown))
        last = [int(np.flatnonzero(labels == labels[i])[-1]) for i in first]
        starts, ends = (jnp.asarray(codes[rows]) for rows in (first, last))
        [points] = interpolate([starts], [ends], _NUM_POINTS)
        frames = np.asarray(image_of(params, points, labels[first]))
        pictures.save_strip(strip, frames, scale=scale)
        paths = [grid, rebuilt, strip]
        if latent_sizes == (2,) and not conditional:
            quantiles = norm.ppf((np.arange(_NUM_TILES) + 0.5) / _NUM_TILES).astype(np.float32)
            across, down = np.meshgrid(quantiles, quantiles[::-1])
            points = jnp.asarray(np.stack([across, down], axis=-1))
            tiles = np.asarray(image_of(params, points, labels[:_NUM_TILES]))
            paths.append(directory / "latent_plane.png")
            draw_plane(codes, labels, tiles).savefig(paths[-1], dpi=110, metadata={"Software": None})
        return paths

    # ---- evaluation: the same noise every time

    held_out_loss = objective.make_loss(networks, likelihood, **settings)
    validation = common.make_evaluation(
        lambda params, batch, key: held_out_loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )
    estimators = {
        name: objective.make_log_evidence(networks, likelihood, num_samples=num)
        for name, num in (("nll", config.evaluation.num_importance), ("iwae_bound", _BOUND_SAMPLES))
    }

    def negative_log_evidence(params: PyTree, batch: Batch, key: Key) -> Metrics:
        label = label_of(batch, conditional)
        keys = jax.random.split(key, len(estimators))
        return {
            name: Mean.of(-estimate(params, batch["image"], label, keys[i]), batch["mask"])
            for i, (name, estimate) in enumerate(estimators.items())
        }

    evidence = common.make_evaluation(
        negative_log_evidence,
        test,
        mesh,
        batch_size=config.evaluation.batch_size,
        limit=config.evaluation.num_likelihood,
        seed=config.seed,
    )

    def likelihood_scores(params: PyTree) -> Scores:
        terms, values = common.mean_values(validation(params)), common.mean_values(evidence(params))
        nats = "nats per image" + (" given the class" if conditional else "")
        if config.model.likelihood == "gaussian":
            nats = f"{nats}, of a density"
        num, num_importance = (
            min(config.evaluation.num_likelihood, len(test)),
            config.evaluation.num_importance,
        )
        reference: tuple[float | None, str] = (None, "")
        if config.data.source == "mnist" and config.data.binarise and not conditional:
            reference = _PUBLISHED.get((goal.bound, goal.num_samples, len(latent_sizes)), reference)
        sampled = f"importance sampling, {num_importance} samples"
        scores = {
            "nll": Score(values["nll"], f"{nats}, {sampled}", num, False, *reference),
            f"iwae_bound_{_BOUND_SAMPLES}": Score(
                values["iwae_bound"], f"{nats}, negative bound, {_BOUND_SAMPLES} samples", num, False
            ),
            "negative_elbo": Score(terms["negative_elbo"], nats, len(test), False),
            "rate": Score(terms["rate"], f"{nats}, KL(q(z|x) || p(z))", len(test), False),
            "distortion": Score(terms["distortion"], f"{nats}, -E log p(x|z)", len(test), False),
        }
        if config.model.likelihood == "discretized_logistic":
            bits = values["nll"] / (math.prod(shape) * math.log(2.0))
            scores["bits_per_dim"] = Score(bits, f"bits/dim, {sampled}", num, False)
        return scores

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        scores = dict(likelihood_scores(params))
        # Drawn pixels are black or white where the data are; means are as grey as the data were.
        sides = (grey_train, grey_test)
        if config.sampling.draw and config.data.binarise:
            sides = (binarised(grey_train), test)
        if judge := judge_of(config.evaluation, needed, *sides, mesh):
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


def draw_plane(codes: np.ndarray, labels: np.ndarray, tiles: np.ndarray) -> Figure:
    """Codes [N, 2] coloured by label [N], beside the images [T, T, H, W, C] decoded over the plane.

    The images are at the quantiles of the standard normal, so that they show what samples look like.
    """
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots = left.scatter(codes[:, 0], codes[:, 1], c=labels, cmap="tab10", s=4)
    left.legend(*dots.legend_elements(), frameon=False, fontsize=7, loc="upper left")
    left.set_aspect("equal", "datalim")
    left.set_xlabel("z1")
    left.set_ylabel("z2")
    images = tiles.reshape(-1, *tiles.shape[2:])
    picture = pictures.image_grid(images, columns=tiles.shape[1], padding=0)
    right.imshow(picture, cmap="gray", vmin=0, vmax=255)
    right.set_axis_off()
    return figure
