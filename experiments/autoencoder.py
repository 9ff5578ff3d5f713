"""Auto-encoders of images: plain, deep, convolutional, sparse, contractive and denoising.

  python -m jaxgen.run --config=experiments/autoencoder.py:digits --workdir=runs/autoencoder_digits

`objective` says which: corruption makes it denoising (Vincent et al. 2010), sparsity_weight sparse (Ng 2011),
contraction_weight contractive (Rifai et al. 2011), several of them several. Errors are squared distances
summed over an image's pixels on the scale [0, 1], as in experiments/pca.py, beside that of PCA with as many
components as the code has numbers. mnist is the network of Hinton & Salakhutdinov 2006, trained at once by
Adam where they stacked Boltzmann machines first. `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating, rows_of
from jaxgen import data, pictures
from jaxgen.estimators import linear, logistic
from jaxgen.models import autoencoder as models
from jaxgen.objectives import autoencoder as objective
from jaxgen.objectives.score_matching import sum_dims
from jaxgen.samplers.flow import draw_latents
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

CORRUPTIONS = {
    "masking": objective.masking_noise,
    "salt_and_pepper": objective.salt_and_pepper_noise,
    "gaussian": objective.gaussian_noise,
}
NETWORKS = ("mlp", "conv")
_MNIST = {
    "data.batch_size": 250,
    "model.widths": (1000, 500, 250),
    "model.code_size": 30,
    "train.num_steps": 24_000,
    "train.log_every": 200,
    "train.validate_every": 2400,
    "train.checkpoint_every": 2400,
    "evaluation.num_probe": 10_000,
    "evaluation.batch_size": 500,
}
_SIGMOID_CODE = {"model.widths": (), "model.code_size": 64, "model.code_activation": "sigmoid"}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.2,
        "runs",
        {
            "data.batch_size": 16,
            "model.widths": (8,),
            "model.code_size": 4,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num": 4,
            "evaluation.num_probe": 40,
        },
    ),
    "digits": Preset("2 CPU cores", 1, "squared error 0.35 per image at 16 numbers of 64, PCA 0.73", {}),
    "digits_sparse": Preset(
        "2 CPU cores",
        1,
        "not recorded yet",
        {**_SIGMOID_CODE, "objective.sparsity_weight": 0.1, "objective.sparsity_target": 0.1},
    ),
    "digits_contractive": Preset(
        "2 CPU cores", 1, "not recorded yet", {**_SIGMOID_CODE, "objective.contraction_weight": 0.1}
    ),
    "digits_denoising": Preset(
        "2 CPU cores", 1, "not recorded yet", {**_SIGMOID_CODE, "objective.corruption": "masking"}
    ),
    "mnist": Preset(
        "2 CPU cores",
        20,
        "squared error 3.36 per image at 30 dimensions, PCA 13.87 (Hinton & Salakhutdinov 2006: 3.00)",
        {"data.source": "mnist", **_MNIST},
    ),
    "mnist_denoising": Preset(
        "2 CPU cores",
        10,
        "not recorded yet",
        {
            "data.source": "mnist",
            **_MNIST,
            "model.widths": (),
            "model.code_size": 500,
            "model.code_activation": "sigmoid",
            "objective.reconstruction": "cross_entropy",
            "objective.corruption": "masking",
        },
    ),
    "fashion_mnist": Preset(
        "2 CPU cores", 20, "no published figure", {"data.source": "fashion_mnist", **_MNIST}
    ),
    "cifar10": Preset(
        "1 GPU",
        20,
        "no published figure",
        {
            "data.source": "cifar10",
            "data.augment": "flip",
            **_MNIST,
            "model.network": "conv",
            "model.widths": (64, 128, 256),
            "model.code_size": 256,
            "model.output": "linear",
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    "model.network": ("conv", {}),
    "model.widths": ((6, 5), {}),
    "model.activation": ("tanh", {}),
    "model.code_activation": ("sigmoid", {}),
    "model.output": ("linear", {}),
    "objective.reconstruction": ("cross_entropy", {}),
    "objective.corruption": ("masking", {}),
    "objective.corruption_level": (0.5, {"objective.corruption": "gaussian"}),
    "objective.alpha": (2.0, {"objective.corruption": "salt_and_pepper"}),
    "objective.beta": (0.0, {"objective.corruption": "masking"}),
    "objective.sparsity_weight": (0.1, {"model.code_activation": "sigmoid"}),
    "objective.sparsity_target": (
        0.1,
        {"model.code_activation": "sigmoid", "objective.sparsity_weight": 0.1},
    ),
    "objective.contraction_weight": (0.1, {}),
}
# Squared error per image on the test set, scale [0, 1].
_PUBLISHED = {("mnist", 30): (3.00, "Hinton & Salakhutdinov 2006, 784-1000-500-250-30")}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=4000)
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.train.steps_per_dispatch = 20
    config.train.log_every = 100
    config.model = ConfigDict(
        {
            **network_fields((128, 64)),
            "code_size": 16,
            "code_activation": "linear",  # tanh, relu, gelu, sigmoid, linear
            "output": "sigmoid",  # sigmoid, linear
        }
    )
    config.objective = ConfigDict(
        {
            "reconstruction": "squared_error",  # squared_error, cross_entropy
            "corruption": "",  # masking, salt_and_pepper, gaussian; "" for none
            "corruption_level": 0.25,  # the share of pixels, or the noise's deviation on a range of 2
            "alpha": 1.0,  # the weight of corrupted pixels
            "beta": 1.0,  # and of the others
            "sparsity_weight": 0.0,
            "sparsity_target": 0.05,
            "contraction_weight": 0.0,
        }
    )
    config.sampling = ConfigDict({"num": 64})
    config.evaluation = ConfigDict(
        {
            "batch_size": 180,
            "num_probe": 1437,  # training images of the linear classifier; 0 for none
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def network_fields(widths: tuple[int, ...]) -> dict[str, Any]:
    """The fields of config.model that `make_encoder` and `make_decoder` read."""
    return {
        "network": "mlp",  # mlp, conv
        "widths": widths,  # of the encoder's layers; the decoder has them in reverse
        "activation": "gelu",  # tanh, relu, gelu, sigmoid, linear
        "dtype": "float32",
    }


def check_network(config: ConfigDict) -> None:
    """The fields of `network_fields`."""
    checks.at_least(config, 1, "model.widths")
    checks.one_of(config, NETWORKS, "model.network")
    checks.one_of(config, get_args(models.Activation), "model.activation")
    checks.one_of(config, common.DTYPES, "model.dtype")


def make_encoder(config: ConfigDict, num_outputs: int) -> models.MlpEncoder | models.ConvEncoder:
    """The encoder that config.model describes."""
    make = models.MlpEncoder if config.network == "mlp" else models.ConvEncoder
    dtype = common.DTYPES[config.dtype]
    return make(tuple(config.widths), num_outputs, activation=config.activation, dtype=dtype)


def make_decoder(
    config: ConfigDict, size: tuple[int, int], channels: int
) -> models.MlpDecoder | models.ConvDecoder:
    """The decoder that config.model describes, for images of `size` with `channels` numbers a pixel."""
    settings = {"activation": config.activation, "dtype": common.DTYPES[config.dtype]}
    if config.network == "mlp":
        return models.MlpDecoder(tuple(config.widths)[::-1], size, channels, **settings)
    return models.ConvDecoder(tuple(config.widths), size, channels, **settings)


def make_model(config: ConfigDict, shape: tuple[int, ...]) -> models.AutoEncoder:
    """The auto-encoder that config.model describes, of images of `shape` [H, W, C]."""
    return models.AutoEncoder(
        encoder=make_encoder(config, config.code_size),
        decoder=make_decoder(config, (shape[0], shape[1]), shape[2]),
        code_activation=config.code_activation,
        output=config.output,
    )


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    check_network(config)
    checks.one_of(config, get_args(models.Activation), "model.code_activation")
    checks.one_of(config, get_args(models.Output), "model.output")
    checks.one_of(config, get_args(objective.Reconstruction), "objective.reconstruction")
    checks.one_of(config, ("", *CORRUPTIONS), "objective.corruption")
    checks.at_least(config, 1, "model.code_size", "sampling.num", "evaluation.batch_size")
    checks.at_least(config, 0, "evaluation.num_probe", "objective.alpha", "objective.beta")
    checks.at_least(config, 0, "objective.sparsity_weight", "objective.contraction_weight")
    checks.above(config, 0, "objective.corruption_level", "objective.sparsity_target")
    checks.in_range(config, 0, 1, "objective.sparsity_target")
    if config.objective.corruption in ("masking", "salt_and_pepper"):
        checks.in_range(config, 0, 1, "objective.corruption_level")
    if config.objective.reconstruction == "cross_entropy" and config.model.output != "sigmoid":
        raise UserError("objective.reconstruction=cross_entropy needs model.output=sigmoid.")
    if config.objective.sparsity_weight and config.model.code_activation != "sigmoid":
        raise UserError(
            "objective.sparsity_weight needs a code between 0 and 1: set model.code_activation=sigmoid."
        )


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    dim, code_size, batch_size = int(np.prod(shape)), config.model.code_size, config.evaluation.batch_size
    model = make_model(config.model, shape)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        return model.init(key, batch["image"])["params"], {}

    def encode(params: PyTree, x: Array) -> Array:
        return cast(Array, model.apply({"params": params}, x, method="encode"))

    def decode(params: PyTree, code: Array) -> Array:
        return cast(Array, model.apply({"params": params}, code, method="decode"))

    def image_of(outputs: Array) -> Array:
        return models.image_of(outputs, config.model.output)

    def contraction(params: PyTree, x: Array) -> Array:
        one_layer = config.model.network == "mlp" and not config.model.widths
        if one_layer and config.model.code_activation == "sigmoid":
            return objective.sigmoid_jacobian_norm(
                encode(params, x), params["encoder"]["mlp"]["out"]["kernel"]
            )
        return objective.jacobian_norm(lambda x: encode(params, x), x)

    goal = config.objective
    corrupt = CORRUPTIONS[goal.corruption](goal.corruption_level) if goal.corruption else None

    def make_loss(corrupt: objective.Corrupt | None) -> Any:
        return objective.make_loss(
            encode,
            decode,
            image_of,
            goal.reconstruction,
            corrupt=corrupt,
            alpha=goal.alpha,
            beta=goal.beta,
            sparsity_weight=goal.sparsity_weight,
            sparsity_target=goal.sparsity_target,
            contraction=contraction,
            contraction_weight=goal.contraction_weight,
        )

    loss, clean_loss = make_loss(corrupt), make_loss(None)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))

    # ---- pictures

    @jax.jit
    def rebuild(params: PyTree, key: Key, x: Array) -> tuple[Array, Array]:
        """What the encoder sees of the images, and the reconstruction."""
        seen = x if corrupt is None else corrupt(key, x).x
        return seen, image_of(decode(params, encode(params, seen)))

    @jax.jit
    def random_images(params: PyTree, key: Key, x: Array, indices: Array) -> Array:
        """Codes drawn from a normal with the means and deviations of those of x, decoded."""
        codes = encode(params, x)
        [eps] = draw_latents(key, indices, [(code_size,)])
        drawn = jnp.mean(codes, 0)[None] + jnp.std(codes, 0)[None] * eps
        return image_of(decode(params, drawn))

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        params = state.sampling_params
        grid_key, noise_key = jax.random.split(key)
        shown = min(len(test), 1000)
        real = jnp.asarray(data.to_unit_range(test.fields["image"][:shown], test.num_levels))
        draw = lambda params, key, indices: random_images(params, key, real, indices)
        paths = [generating.write_grid(draw, params, grid_key, num or config.sampling.num, 64, directory)]
        x, scale = real[:8], max(1, 64 // shape[0])
        seen, again = rebuild(params, noise_key, x)
        rows = [x, again] if corrupt is None else [x, seen, again]
        paths.append(directory / "reconstructions.png")
        pictures.save_image_grid(paths[-1], np.concatenate(rows), columns=len(x), scale=scale)
        if config.model.network == "mlp":
            first = params["encoder"]["mlp"]["dense_0" if config.model.widths else "out"]["kernel"]
            filters = np.asarray(first, np.float32).T[:64].reshape(-1, *shape)
            filters = filters / np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), 1e-12)
            paths.append(directory / "filters.png")
            pictures.save_image_grid(paths[-1], filters, scale=scale)
        return paths

    # ---- evaluation

    validation = common.make_evaluation(
        lambda params, batch, key: clean_loss(params, {}, batch, key)[1][0],
        test,
        mesh,
        batch_size=batch_size,
        seed=config.seed,
    )

    def denoising_errors(params: PyTree, batch: Batch, key: Key) -> Metrics:
        x, mask = batch["image"], batch["mask"]
        seen, again = rebuild(params, key, x)
        errors = {"denoised": again, "corrupted": seen}
        return {
            name: Mean.of(sum_dims(objective.squared_error(image, x)), mask) for name, image in errors.items()
        }

    denoising = common.make_evaluation(denoising_errors, test, mesh, batch_size=batch_size, seed=config.seed)
    probe_accuracies = _probe(
        encode, train, test, num_probe=config.evaluation.num_probe, batch_size=batch_size
    )
    pca_error = _pca_error(train, test, mesh, rank=code_size, batch_size=batch_size, seed=config.seed)

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        unit = f"squared, per image of {dim} pixels in [0, 1]"
        error = common.mean_values(validation(params))["squared_error"]
        reference: tuple[float | None, str] = (None, "")
        scores = {}
        if code_size <= dim:
            of_pca = pca_error()
            reference = of_pca, f"PCA with {code_size} components, this run"
            scores["pca_reconstruction_error"] = Score(of_pca, unit, len(test), False)
        reference = _PUBLISHED.get((config.data.source, code_size), reference)
        scores["reconstruction_error"] = Score(error, unit, len(test), False, *reference)
        if corrupt is not None:
            values = common.mean_values(denoising(params))
            what = f"{goal.corruption} {goal.corruption_level}"
            scores["denoising_error"] = Score(
                values["denoised"],
                f"{unit}, from images with {what}",
                len(test),
                False,
                values["corrupted"],
                "those images themselves",
            )
        if config.evaluation.num_probe and train.num_classes is not None:
            of_code, of_pixels = probe_accuracies(params)
            num = min(config.evaluation.num_probe, len(train))
            unit = f"share, logistic regression on {num} training images"
            scores["linear_accuracy_code"] = Score(
                of_code, unit, len(test), True, of_pixels, "the same on raw pixels"
            )
            scores["linear_accuracy_pixels"] = Score(of_pixels, unit, len(test), True)
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
    )


def _pca_error(
    train: data.Source, test: data.Source, mesh: jax.sharding.Mesh, *, rank: int, batch_size: int, seed: int
) -> Any:
    """() -> the squared error per held-out image of PCA of the training images, as in experiments/pca.py."""
    dim = int(np.prod(train.fields["image"].shape[1:]))

    @jax.jit
    def add(scatter: linear.Scatter, batch: Batch) -> linear.Scatter:
        return linear.merge_scatter(scatter, linear.scatter_of(rows_of(batch["image"]), batch["mask"]))

    fit = jax.jit(lambda scatter: linear.pca_of_scatter(scatter, rank))
    errors = common.make_evaluation(
        lambda pca, batch, key: {
            "error": Mean.of(linear.reconstruction_error(pca, rows_of(batch["image"])), batch["mask"])
        },
        test,
        mesh,
        batch_size=batch_size,
        seed=seed,
    )

    def compute() -> float:
        scatter = linear.Scatter(jnp.zeros(()), jnp.zeros(dim), jnp.zeros((dim, dim)))
        for batch in data.evaluation_batches(train, batch_size=batch_size):
            scatter = add(scatter, batch)
        return float(errors(fit(scatter))["error"].value)

    return compute


def _probe(
    encode: objective.Encode, train: data.Source, test: data.Source, *, num_probe: int, batch_size: int
) -> Any:
    """params -> the accuracies (on codes, on pixels) of logistic regression on training images.

    Features are centred and divided by their deviation over all of them, so that the penalty on the weights
    means the same for codes of any size.
    """

    @jax.jit
    def features(params: PyTree, x: Array) -> tuple[Array, Array]:
        return encode(params, x), rows_of(x)

    @jax.jit
    def accuracy(x: Array, label: Array, test_x: Array, test_label: Array) -> Array:
        mean = jnp.mean(x, axis=0)[None]
        scale = jnp.maximum(jnp.std(x - mean), 1e-12)
        fit = logistic.fit((x - mean) / scale, label, train.num_classes or 1)
        return jnp.mean(logistic.predict(fit.params, (test_x - mean) / scale) == test_label)

    def see(params: PyTree, source: data.Source, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batches = data.evaluation_batches(source, batch_size=batch_size, limit=num)
        seen = [(*features(params, batch["image"]), batch["label"]) for batch in batches]
        codes, pixels, labels = (
            np.concatenate([np.asarray(x) for x in xs])[:num] for xs in zip(*seen, strict=True)
        )
        return codes, pixels, labels

    def compute(params: PyTree) -> tuple[float, float]:
        codes, pixels, labels = see(params, train, min(num_probe, len(train)))
        test_codes, test_pixels, test_labels = see(params, test, len(test))
        return (
            float(accuracy(codes, labels, test_codes, test_labels)),
            float(accuracy(pixels, labels, test_pixels, test_labels)),
        )

    return compute
