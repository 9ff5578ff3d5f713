"""Text-to-image diffusion: the noise predictor of DDPM is told a caption.

  python -m jaxgen.run --config=experiments/text_to_image.py:digits --workdir=runs/text_to_image_digits
  ... --mode=sample "--config.sampling.captions=a large 3 on the left;two small 5s side by side"
  ... --config=experiments/text_to_image.py:folder --config.data.source=folder:PICTURES  # with a captions.tsv

The captions say which digits are in the scene, how large and where; a fifth of all combinations of two digits
and a relation is never trained on. experiments/scene_reader.py reads the samples: a caption counts as obeyed
where nothing in the picture is other than it says. Read data/captioned_scenes, models/text_to_image,
samplers/negative_prompt and this file, in that order. `PRESETS` says what each preset needs and reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import common, scene_reader
from experiments.common import Preset, checks, judging
from experiments.common.unets import make_unet
from jaxgen import data, pictures, processes, sharding
from jaxgen.data import captioned_scenes
from jaxgen.data.captioned_scenes import Scenes, encode_captions
from jaxgen.data.tokenizers import BOS, PAD, UNK, Tokenizer, train_tokenizer
from jaxgen.metrics.frechet import FeatureStatistics, frechet_between
from jaxgen.metrics.generation import precision_and_recall
from jaxgen.models.text_to_image import TextToImage
from jaxgen.models.transformer import TransformerSpec
from jaxgen.models.unet import Context
from jaxgen.objectives import ddpm as objective
from jaxgen.samplers.chain import run_chain, sample_in_batches
from jaxgen.samplers.ddim import ddim_chain
from jaxgen.samplers.negative_prompt import negative_prompt_guidance
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    LossFn,
    Metrics,
    Need,
    PyTree,
    Score,
    Scores,
    TrainState,
    UserError,
)

PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.5,
        "runs",
        {
            "data.num_scenes": 60,
            "data.batch_size": 16,
            "model.channels": 8,
            "model.channel_multipliers": (1,),
            "model.attention_resolutions": (),
            "model.head_dim": 8,
            "model.num_groups": 4,
            "text.width": 8,
            "text.num_layers": 1,
            "text.num_heads": 2,
            "diffusion.num_steps": 8,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num_steps": 3,
            "sampling.num": 2,
            "evaluation.num": 20,
            "evaluation.batch_size": 20,
            "evaluation.guidances": (1.0,),
            "evaluation.reader": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 40, "captions obeyed: 0.96 seen, 0.95 held out, at guidance 2", {}),
    "mnist": Preset(
        "1 GPU",
        60,
        "not run to the end yet",
        {
            "data.source": "mnist",
            "data.canvas": 32,
            "data.margin": 3,
            "data.num_scenes": 100_000,
            "data.batch_size": 128,
            "model.channels": 64,
            "model.attention_resolutions": (8,),
            "model.head_dim": 64,
            "train.num_steps": 40_000,
            "train.validate_every": 2000,
            "train.checkpoint_every": 2000,
            "evaluation.num": 1000,
            "evaluation.reader": "mnist",
        },
    ),
    "folder": Preset(
        "1 GPU",
        120,
        "depends on the pictures",
        {
            "data.source": "folder:pictures",
            "data.batch_size": 128,
            "model.channels": 64,
            "model.channel_multipliers": (1, 2, 2, 2),
            "model.attention_resolutions": (),  # the middle attends all the same
            "text.width": 128,
            "text.num_layers": 4,
            "train.num_steps": 100_000,
            "train.validate_every": 5000,
            "train.checkpoint_every": 5000,
            "evaluation.reader": "",
        },
    ),
}
FIELD_CHECKS = {
    **{name: check for name, check in common.FIELD_CHECKS.items() if name != "data.augment"},
    "data.canvas": (32, {}),
    "data.max_length": (4, {}),
    "model.channel_multipliers": ((1, 2), {}),
    "model.attention_resolutions": ((8,), {}),
    "model.head_dim": (4, {}),
    "model.num_groups": (2, {}),
    "model.dropout": (0.1, {}),
    "text.num_heads": (4, {}),
    "text.dropout": (0.1, {}),
    "diffusion.prediction": ("eps", {}),
    "sampling.negative": ("a small 3 at the top", {}),
    "sampling.captions": ("a small 3 at the top", {}),
    "evaluation.guidances": ((1.0, 3.0), {}),
    "evaluation.reader": ("digits", {}),
    "evaluation.reader_workdir": ("runs/scene_reader", {}),
}
_NUM_CAPTIONS = 8  # in the picture, where none are asked for


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=8000)
    config.data = ConfigDict(
        {
            "source": "digits",  # or mnist, npz:PATH of digits to make scenes of, or folder:PATH of pictures
            "canvas": 16,  # side of a scene
            "margin": 0,  # cut off each side of a digit's image
            "num_scenes": 40_000,
            "max_length": 32,  # of captions in words, with their beginning; what is longer is cut
            "batch_size": 32,
        }
    )
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
    config.train.log_every = 100
    config.train.checkpoint_every = 500
    config.model = ConfigDict(
        {
            "patch": 2,  # side of what the U-Net sees as a pixel
            "channels": 48,
            "channel_multipliers": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),  # of the patches
            "head_dim": 48,  # 0: one head as wide as the level
            "num_groups": 8,
            "dropout": 0.0,
            "dtype": "float32",
        }
    )
    config.text = ConfigDict({"width": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0})
    config.diffusion = ConfigDict(
        {
            "num_steps": 200,  # with the cosine schedule
            "prediction": "v",  # eps, x0, v
            "caption_dropout": 0.1,  # share of captions hidden in training, for guidance
        }
    )
    config.sampling = ConfigDict(
        {
            "num_steps": 30,  # DDIM
            "eta": 0.0,
            "guidance": 2.0,  # 1 plain, more goes farther from what is drawn for `negative`
            "negative": "",
            "captions": "",  # of the picture, separated by ';'; "" takes held-out ones
            "num": 8,  # samples of each
        }
    )
    config.evaluation = ConfigDict(
        {
            "num": 300,  # captions of each kind, at each guidance
            "guidances": (1.0, 1.5, 2.0, 4.0),
            "batch_size": 100,
            "reader": "digits",  # the preset of experiments/scene_reader.py that judges; "" for none
            "reader_workdir": "",  # where such a run is; "" trains it
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.check_unet(config)
    checks.at_least(config, 1, "data.num_scenes", "text.width", "text.num_layers", "text.num_heads")
    checks.at_least(config, 2, "data.max_length", "evaluation.num")
    checks.at_least(config, 1, "model.patch", "diffusion.num_steps", "sampling.num", "evaluation.batch_size")
    checks.at_least(config, 0, "data.margin", "sampling.guidance", "evaluation.guidances")
    checks.one_of(config, get_args(processes.Prediction), "diffusion.prediction")
    checks.in_range(config, 0, 1, "text.dropout")
    checks.in_range(config, 0, 1, "diffusion.caption_dropout", "sampling.eta", closed=True)
    checks.in_range(config, 1, config.diffusion.num_steps, "sampling.num_steps", closed=True)
    checks.one_of(config, ("", *scene_reader.PRESETS), "evaluation.reader")


# ---- data


class Captioned(NamedTuple):
    """Pictures with captions.

    train, test: with the fields image, tokens and lengths
    seen, held_out: scenes of the test digits, in combinations that are trained on and in others; None for
        pictures that are not ours
    length: of the tokens, for the longest caption
    """

    train: data.Source
    test: data.Source
    test_captions: tuple[str, ...]
    seen: Scenes | None
    held_out: Scenes | None
    tokenizer: Tokenizer
    length: int

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [N, length] and their lengths int32 [N]."""
        return encode_captions(self.tokenizer, captions, self.length)


def load(config: ConfigDict) -> Captioned:
    """The data that config.data describes; config.evaluation.num test scenes of each kind."""
    kind, _, path = config.data.source.partition(":")
    seen = held_out = None
    if kind == "folder":
        train, captions = captioned_scenes.load_captioned_folder(path, "train")
        test, test_captions = captioned_scenes.load_captioned_folder(path, "test")
        images, test_images = (source.fields["image"] for source in (train, test))
        if images.shape[1:] != test_images.shape[1:]:
            raise UserError(f"the pictures of {path} differ in shape; all must have one shape.")
    else:
        banks = captioned_scenes.load_digit_banks(
            config.data.source, canvas=config.data.canvas, margin=config.data.margin
        )
        num, of_each = config.data.num_scenes, config.evaluation.num
        trained = captioned_scenes.make_scenes(banks[0], seed=config.seed, num=num, which="seen")
        seen = captioned_scenes.make_scenes(banks[1], seed=config.seed, num=of_each, which="seen")
        held_out = captioned_scenes.make_scenes(banks[1], seed=config.seed, num=of_each, which="held_out")
        images, captions, test_images, test_captions = *trained[:2], *seen[:2]
    tokenizer = train_tokenizer("word", captions, specials=(PAD, BOS, UNK))
    length = min(1 + max(len(caption.split()) for caption in captions), config.data.max_length)

    def source(split: str, images: Any, captions: Sequence[str]) -> data.Source:
        tokens, lengths = encode_captions(tokenizer, captions, length)
        fields = {"image": images, "tokens": tokens, "lengths": lengths}
        return data.Source(config.data.source, split, fields, None, num_levels=256)

    return Captioned(
        source("train", images, captions),
        source("test", test_images, test_captions),
        test_captions,
        seen,
        held_out,
        tokenizer,
        length,
    )


# ---- network and sampling


def make_model(config: ConfigDict, captioned: Captioned) -> TextToImage:
    """The network that config.model and config.text describe."""
    spec = TransformerSpec(
        width=config.text.width,
        num_layers=config.text.num_layers,
        num_heads=config.text.num_heads,
        max_length=captioned.length,
        dropout=config.text.dropout,
    )
    patch = config.model.patch
    channels = patch**2 * captioned.train.fields["image"].shape[-1]
    return TextToImage(
        len(captioned.tokenizer),
        spec,
        make_unet(config.model, out_channels=channels),
        patch,
        dtype=common.DTYPES[config.model.dtype],
    )


def dropped(key: Key, lengths: Array, share: float) -> Array:
    """Lengths [B] of captions, of which a share is cut to 1: nothing but their beginning."""
    return jnp.where(jax.random.bernoulli(key, share, lengths.shape), 1, lengths)


# (params, key, captions, guidance) -> images float32 [N, H, W, C], one for each caption.
Draw = Callable[[PyTree, Key, Sequence[str], float], np.ndarray]


def make_draw(config: ConfigDict, model: TextToImage, captioned: Captioned, mesh: jax.sharding.Mesh) -> Draw:
    """Sampling as config.sampling says; a sample depends on its place, its caption and the key alone.

    The guidance is to be config.sampling.guidance or one of config.evaluation.guidances.
    """
    schedule = processes.cosine_schedule(config.diffusion.num_steps)
    shape = captioned.train.fields["image"].shape[1:]
    levels = guidances(config)
    away = captioned.encode([config.sampling.negative])

    @jax.jit
    def sample(
        params: PyTree, key: Key, indices: Array, tokens: Array, lengths: Array, level: Array
    ) -> Array:
        variables = {"params": params}
        described = (jnp.concatenate(pair) for pair in zip((tokens, lengths), away, strict=True))
        contexts = model.apply(variables, *described, method=model.encode)

        def predict(x: Array, t: Array, numbers: Array) -> Array:
            context = jax.tree.map(lambda field: field[numbers], cast(Context, contexts))
            return cast(Array, model.apply(variables, x, t, context, method=model.denoise))

        told = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        scale = jnp.asarray(levels, jnp.float32)[level]
        chain = ddim_chain(
            negative_prompt_guidance(predict, told, jnp.full_like(told, tokens.shape[0]), scale),
            schedule,
            num_steps=config.sampling.num_steps,
            eta=config.sampling.eta,
            prediction=config.diffusion.prediction,
            spacing="even",
        )
        return run_chain(chain, key, indices, shape)

    def draw(params: PyTree, key: Key, captions: Sequence[str], guidance: float) -> np.ndarray:
        fields = captioned.encode(captions)
        level = np.int32(levels.index(guidance))

        def batch(indices: Array) -> np.ndarray:
            rows = np.minimum(np.asarray(indices), len(captions) - 1)
            told = [field[rows] for field in fields]
            laid = [sharding.spread(mesh, x) for x in (indices, *told, np.full(len(rows), level))]
            return sharding.to_host(sample(params, key, *laid))

        return sample_in_batches(batch, len(captions), config.evaluation.batch_size)

    return draw


def guidances(config: ConfigDict) -> tuple[float, ...]:
    """All scales of guidance that are scored, in order."""
    return tuple(sorted({config.sampling.guidance, *config.evaluation.guidances}))


def shown_captions(config: ConfigDict, captioned: Captioned) -> tuple[str, ...]:
    """The captions of the picture."""
    if config.sampling.captions:
        return tuple(" ".join(text.split()) for text in config.sampling.captions.split(";") if text.strip())
    of = captioned.test_captions if captioned.held_out is None else captioned.held_out.captions
    return tuple(dict.fromkeys(of))[:_NUM_CAPTIONS]


def save_caption_grid(path: Path, captions: Sequence[str], images: np.ndarray) -> None:
    """A PNG with a row of samples for each caption; images [R, K, H, W, C] in [-1, 1]."""
    columns, height = images.shape[1:3]
    scale = -(-64 // height)
    picture = pictures.image_grid(images.reshape(-1, *images.shape[2:]), columns, scale=scale)
    size = np.array(picture.shape[:2]) / 100
    figure = Figure(figsize=(float(size[1]) + 3.2, float(size[0])), dpi=100)
    left = 3.2 / (size[1] + 3.2)
    axes = figure.add_axes((float(left), 0.0, float(1 - left), 1.0))
    axes.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    for row, caption in enumerate(captions):
        where = 1 - ((row + 0.5) * (height + 1) + 0.5) * scale / picture.shape[0]
        text = figure.text(float(left) - 0.01, where, caption[:60], ha="right", va="center", fontsize=8)
        text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


# ---- the judge


class SceneJudge:
    """A trained scene_reader and what it makes of samples."""

    def __init__(self, state: TrainState, preset: str, mesh: jax.sharding.Mesh, batch_size: int) -> None:
        of_reader = scene_reader.get_config(preset).model
        look = lambda images: scene_reader.read(of_reader, state.sampling_params, images)
        self._look = jax.jit(look, out_shardings=sharding.replicated(mesh))
        self._mesh, self._batch_size = mesh, batch_size

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Digits and sizes [N, 5] and features [N, D] of images uint8 [N, C, C, 1]."""
        x = data.to_unit_range(images, 256)
        parts = [x[i : i + self._batch_size] for i in range(0, len(x), self._batch_size)]
        seen = [self._look(sharding.spread(self._mesh, part)) for part in parts]
        digits, sizes, features = (np.concatenate(of) for of in zip(*seen, strict=True))
        return digits, sizes, features

    def obeyed(self, images: np.ndarray, scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
        """Whether all of an image is as in the scene of its number, bool [N], and the features [N, D]."""
        digits, sizes, features = self.read(images)
        right = (digits == scenes.digits).all(axis=1) & (sizes == scenes.sizes).all(axis=1)
        return right, features


def reader_need(config: ConfigDict, mesh: jax.sharding.Mesh) -> Need:
    """The reader of scenes like these, as a run that the evaluation needs."""
    preset = config.evaluation.reader
    of_reader = scene_reader.get_config(preset)
    for field in ("source", "canvas", "margin"):
        of_reader.data[field] = config.data[field]
    return Need(
        experiment=scene_reader.build(common.for_devices(of_reader, mesh), mesh),
        source=f"experiments/scene_reader.py:{preset}",
        config=of_reader.to_dict(),
        workdir=config.evaluation.reader_workdir,
    )


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data, sampler and judge."""
    check(config)
    captioned = load(config)
    height, width, channels = captioned.train.fields["image"].shape[1:]
    if height % config.model.patch or width % config.model.patch:
        raise UserError(f"model.patch={config.model.patch} does not divide pictures of {height}x{width}.")
    patched = (height // config.model.patch, width // config.model.patch, channels)
    checks.check_unet_fits(config.model, patched)
    if config.evaluation.reader and captioned.seen is None:
        raise UserError(
            "evaluation.reader reads scenes of digits alone: set it to '' for pictures of a folder."
        )
    model = make_model(config, captioned)
    schedule = processes.cosine_schedule(config.diffusion.num_steps)

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        image = batch["image"]
        t = jnp.zeros(image.shape[0], jnp.int32)
        return model.init(key, image, t, batch["tokens"], batch["lengths"], train=False)["params"], {}

    def make_loss(*, train: bool) -> LossFn:
        """DDPM's loss of a network that is told the captions; in training some are hidden, with dropout."""

        def loss(
            params: PyTree, model_state: PyTree, batch: Batch, key: Key
        ) -> tuple[Array, tuple[Metrics, PyTree]]:
            drop_key, loss_key = jax.random.split(key)
            lengths = batch["lengths"]
            if train:
                lengths = dropped(drop_key, lengths, config.diffusion.caption_dropout)

            def apply(params: PyTree, x: Array, t: Array, label: object, key: Key | None) -> Array:
                rngs = {"dropout": cast(Key, key)} if train else None
                out = model.apply({"params": params}, x, t, batch["tokens"], lengths, train=train, rngs=rngs)
                return cast(Array, out)

            of_images = objective.make_loss(apply, schedule, prediction=config.diffusion.prediction)
            return of_images(params, model_state, batch, loss_key)

        return loss

    loss, held_out_loss = make_loss(train=True), make_loss(train=False)
    system = common.make_system(config, init, loss)
    stream = common.training_stream(config.data, captioned.train, seed=config.seed, mesh=mesh)
    checks.check_best_metric(config.train.best_metric, loss, system, stream(0))
    validation = common.make_evaluation(
        lambda params, batch, key: held_out_loss(params, {}, batch, key)[1][0],
        captioned.test,
        mesh,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )
    draw = make_draw(config, model, captioned, mesh)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        captions = shown_captions(config, captioned)
        num = num or config.sampling.num
        each = [caption for caption in captions for _ in range(num)]
        images = draw(state.sampling_params, key, each, config.sampling.guidance)
        path = directory / "captions.png"
        save_caption_grid(path, captions, images.reshape(len(captions), num, *images.shape[1:]))
        return [path]

    # ---- evaluation

    def judged(params: PyTree, judge: SceneJudge, seen: Scenes, held_out: Scenes) -> Scores:
        """Captions obeyed and the distance to real scenes of the same captions, for each guidance."""
        num, key = len(seen.captions), sharding.replicated_key(mesh, config.seed + 1)
        read_right, real = judge.obeyed(seen.images, seen)
        read_held_out, _ = judge.obeyed(held_out.images, held_out)
        # The floor: as many real scenes of the training digits.
        at_floor = judge.read(captioned.train.fields["image"][:num])[2]
        distance = lambda of: frechet_between(
            FeatureStatistics.of(of),
            FeatureStatistics.of(real),
            num_samples=len(of),
            num_reference=len(real),
        )
        floor = distance(at_floor), f"{len(at_floor)} real scenes of training digits, same features"
        by_reader = "real scenes of test digits of these captions, as the reader reads them"
        pairs = (seen.sizes != captioned_scenes.NO_SIZE).sum(axis=1) == 2
        scores: dict[str, Score] = {}
        for guidance in tqdm(guidances(config), desc="sampling", unit="guidance", leave=False):
            images = draw(params, key, (*seen.captions, *held_out.captions), guidance)
            judging.check_finite(images)
            images = data.from_unit_range(images, 256)
            obeyed, features = judge.obeyed(images[:num], seen)
            obeyed_held_out, _ = judge.obeyed(images[num:], held_out)
            accuracies = {
                "seen": (obeyed, read_right),
                "seen_pairs": (obeyed[pairs], read_right[pairs]),
                "held_out": (obeyed_held_out, read_held_out),
            }
            at = f"_guidance_{guidance:g}"
            for name, (right, read) in accuracies.items():
                if not len(right):
                    continue
                score = Score(
                    float(right.mean()), "share obeyed", len(right), True, float(read.mean()), by_reader
                )
                if guidance == config.sampling.guidance:
                    scores[f"caption_accuracy_{name}"] = score
                scores[f"caption_accuracy_{name}{at}"] = score
            unit = "squared feature distance, seen captions"
            scores[f"frechet_distance{at}"] = Score(distance(features), unit, num, False, *floor)
            precision, recall = precision_and_recall(features, real)
            scores[f"precision{at}"] = Score(precision, "share, seen captions", num, True)
            scores[f"recall{at}"] = Score(recall, "share, seen captions", num, True)
        return scores

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        params = state.sampling_params
        value = float(validation(params)["loss"].value)
        scores = {"test_loss": Score(value, "mean squared error", len(captioned.test), False)}
        if captioned.seen is not None and captioned.held_out is not None and "reader" in needed:
            preset, batch_size = config.evaluation.reader, config.evaluation.batch_size
            judge = SceneJudge(needed["reader"], preset, mesh, batch_size)
            scores.update(judged(params, judge, captioned.seen, captioned.held_out))
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: validation(state.sampling_params),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": captioned.train.fingerprint, "test": captioned.test.fingerprint},
        seed=config.seed,
        needs={"reader": reader_need(config, mesh)} if config.evaluation.reader else {},
    )
