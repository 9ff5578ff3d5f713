"""What generators of images have in common: the judge they need, their scores, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.common import checks
from experiments.common.judging import classifier_need, sample_images
from jaxgen import data, pictures
from jaxgen.samplers.chain import sample_in_batches
from jaxgen.types import Array, Key, Metrics, Need, PyTree, Score, Scores, UserError

# (params, key, sample numbers [B]) -> samples [B, H, W, C] in [-1, 1]; compiled.
Sample = Callable[[PyTree, Key, Array], Array]


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
            **values,
        }
    )


def check_evaluation(config: ConfigDict, classifier_presets: tuple[str, ...]) -> None:
    """UserError where a value of config.evaluation makes no sense."""
    checks.at_least(config, 1, "evaluation.batch_size")
    checks.at_least(config, 2, "evaluation.num_samples")  # a covariance needs two
    checks.one_of(config, ("", *classifier_presets), "evaluation.classifier")


def classifier_needs(
    config: ConfigDict, train: data.Source, test: data.Source, mesh: jax.sharding.Mesh
) -> dict[str, Need]:
    """The classifier that config.evaluation asks for, by the name "classifier"; {} for none."""
    if not config.evaluation.classifier:
        return {}
    if train.num_classes is None:
        raise UserError(
            f"evaluation.classifier needs labels, and {train.name} has none: set it to '' to go without."
        )
    if min(len(train), len(test)) < 2:
        raise UserError(
            f"evaluation.classifier needs at least 2 images to train and 2 to test on, and {train.name} has "
            f"{len(train)} and {len(test)}."
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
