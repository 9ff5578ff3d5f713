"""What generators of images have in common: the judge they need, their scores, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import classifier
from experiments.common import checks
from experiments.common.judging import LEAST_IMAGES, classifier_need, sample_images
from jaxgen import data, pictures
from jaxgen.interop.inception import read_inception
from jaxgen.samplers.chain import sample_in_batches
from jaxgen.types import Array, Key, Metrics, Need, PyTree, Score, Scores, UserError

# (params, key, sample numbers [B]) -> samples [B, H, W, C] in [-1, 1]; compiled.
Sample = Callable[[PyTree, Key, Array], Array]
# For tests/test_config_fields.py: the fields of `evaluation_config` that name something.
FIELD_CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "evaluation.classifier": ("digits", {}),
    "evaluation.classifier_workdir": ("runs/classifier", {}),
    "evaluation.inception": ("{folder}/inception.safetensors", {}),
}


class Judge(Protocol):
    """What `judging.ImageJudge` does."""

    def scores(self, samples: np.ndarray) -> Scores: ...


def evaluation_config(**values: object) -> ConfigDict:
    """config.evaluation with the fields that the functions below read; `values` replace them or add."""
    return ConfigDict(
        {
            "num_samples": 1437,
            "batch_size": 180,
            "classifier": "digits",  # the preset of experiments/classifier.py that judges; "" for none
            "classifier_workdir": "",  # where such a run is; "" trains it
            "inception": "",  # the file with the weights of FID's InceptionV3, which then judges instead
            **values,
        }
    )


def check_evaluation(config: ConfigDict) -> None:
    """UserError where a value of config.evaluation makes no sense."""
    checks.at_least(config, 1, "evaluation.batch_size")
    checks.at_least(config, LEAST_IMAGES, "evaluation.num_samples")
    checks.one_of(config, ("", *classifier.PRESETS), "evaluation.classifier")
    if config.evaluation.inception:
        read_inception(config.evaluation.inception)


def judge_needs(
    config: ConfigDict, train: data.Source, test: data.Source, mesh: jax.sharding.Mesh
) -> dict[str, Need]:
    """The classifier that config.evaluation asks for, as "classifier"; {} where it has not to judge."""
    field = "evaluation." + ("inception" if config.evaluation.inception else "classifier")
    if not (config.evaluation.inception or config.evaluation.classifier):
        return {}
    if min(len(train), len(test)) < LEAST_IMAGES:
        raise UserError(
            f"{field} needs at least {LEAST_IMAGES} images to train and {LEAST_IMAGES} to test on, and "
            f"{train.name} has {len(train)} and {len(test)}."
        )
    if config.evaluation.inception:
        channels = train.fields["image"].shape[-1]
        if channels not in (1, 3):
            raise UserError(f"{field} is for grey and RGB images, and {train.name} has {channels} channels.")
        return {}
    if train.num_classes is None:
        raise UserError(
            f"evaluation.classifier needs labels, and {train.name} has none: set it to '' to go without, or "
            "evaluation.inception to the weights of InceptionV3."
        )
    need = classifier_need(
        config.evaluation.classifier,
        workdir=config.evaluation.classifier_workdir,
        source=config.data.source,
        mesh=mesh,
    )
    return {"classifier": need}


def sample_scores(
    sample: Sample, params: PyTree, judge: Judge, config: ConfigDict, mesh: jax.sharding.Mesh
) -> Scores:
    """The judge's scores of config.evaluation.num_samples samples, drawn with the seed after the run's."""
    num = config.evaluation.num_samples
    with tqdm(total=num, desc="sampling", unit="image", leave=False) as bar:
        samples = sample_in_batches(
            sample_images(sample, params, mesh, seed=config.seed + 1),
            num,
            config.evaluation.batch_size,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    if len(samples) != num:
        raise ValueError(f"{num} samples were asked for, but {len(samples)} were drawn")
    return judge.scores(samples)


def loss_scores(metrics: Metrics, num: int, unit: str) -> dict[str, Score]:
    """The loss on held-out data as a score."""
    return {"test_loss": Score(float(metrics["loss"].value), unit, num, False)}


def write_grid(sample: Sample, params: PyTree, key: Key, num: int, batch_size: int, directory: Path) -> Path:
    """Samples 0..num-1 as samples.png in `directory`, which is made."""
    images = sample_in_batches(lambda indices: sample(params, key, indices), num, batch_size)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "samples.png"
    pictures.save_image_grid(path, images, scale=max(1, 64 // images.shape[1]))
    return path


def left_half_mask(shape: tuple[int, ...]) -> np.ndarray:
    """1 in the left half of images of `shape` [H, W, C], 0 in the right, float32 [1, H, W, 1]."""
    height, width, _ = shape
    mask = np.zeros((1, height, width, 1), np.float32)
    mask[:, :, : width // 2] = 1.0
    return mask


def filling_frames(truth: np.ndarray, mask: np.ndarray, fillings: np.ndarray) -> np.ndarray:
    """[masked, fillings ..., truth] for `pictures.save_strip`: [F + 2, N, H, W, C].

    truth [N, H, W, C]; mask [1, H, W, 1]; fillings [F, N, H, W, C]. What is masked is shown grey.
    """
    return np.concatenate([(truth * mask)[None], fillings, truth[None]])
