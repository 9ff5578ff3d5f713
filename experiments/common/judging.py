"""Scores of generated images in the eyes of a network: FID's InceptionV3, or a classifier of the same data.

The weights of InceptionV3 are a file that `evaluation.inception` names; without one the judge is the
classifier that experiments/classifier.py trains, `evaluation.classifier` its preset. Their distances do not
compare, so every score carries the network's name and a hash of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classifier, common
from jaxgen import data, sharding
from jaxgen.interop import inception
from jaxgen.metrics.classification import class_entropy, class_histogram, share_recognised
from jaxgen.metrics.frechet import FeatureStatistics, frechet_between
from jaxgen.metrics.generation import inception_score, kernel_distance, precision_and_recall
from jaxgen.models.inception import InceptionV3
from jaxgen.types import Array, Need, PyTree, Score, Scores, TrainState, UserError

_RECOGNISED = 0.9
LEAST_IMAGES = 4  # of samples, of training and of held-out images, for neighbours of the third order
_MOST_PAIRED = 10_000  # precision, recall and the kernel distance look at all pairs of so many images at most
_PARTS = 10  # of the images, whose Inception scores are averaged (Salimans et al. 2016)


def classifier_need(preset: str, *, workdir: str, source: str, mesh: jax.sharding.Mesh) -> Need:
    """The classifier of this preset, on the data set `source`, as a run that an evaluation needs."""
    config = classifier.get_config(preset)
    config.data.source = source
    return Need(
        experiment=classifier.build(common.for_devices(config, mesh), mesh),
        source=f"experiments/classifier.py:{preset}",
        config=config.to_dict(),
        workdir=workdir,
    )


def check_finite(samples: np.ndarray) -> None:
    """UserError where a sampler has diverged."""
    bad = len(samples) - int(np.isfinite(samples).reshape(len(samples), -1).all(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(samples)} samples hold numbers that are not finite, so they cannot be judged: "
            "take other values of the fields of sampling, or train for longer."
        )


def _weights_hash(params: PyTree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:8]


class Eye(NamedTuple):
    """A network that looks at images.

    name: with a hash of its weights
    look: (params, images [B, H, W, C] in [-1, 1]) -> features [B, D], logits [B, K], float32
    knows_classes: the K classes are those of the data
    """

    name: str
    params: PyTree
    look: Callable[[PyTree, Array], tuple[Array, Array]]
    knows_classes: bool


def classifier_eye(state: TrainState, preset: str, train: data.Source) -> Eye:
    """A trained classifier of this preset of experiments/classifier.py."""
    model = classifier.make_model(ConfigDict(classifier.get_config(preset).model), train)

    def look(params: PyTree, images: Array) -> tuple[Array, Array]:
        variables = {"params": params}
        features = cast(Array, model.apply(variables, images, method=model.features))
        logits = cast(Array, model.apply(variables, images, train=False))
        return features.astype(jnp.float32), logits

    params = state.sampling_params
    return Eye(f"classifier {preset} {_weights_hash(params)}", params, look, knows_classes=True)


def inception_eye(path: str) -> Eye:
    """The InceptionV3 of FID with the weights in this file."""
    model = InceptionV3()

    def look(params: PyTree, images: Array) -> tuple[Array, Array]:
        return cast(tuple[Array, Array], model.apply({"params": params}, images))

    params = inception.inception_params(inception.read_inception(path))
    return Eye(f"InceptionV3 of FID {inception.file_hash(path)}", params, look, knows_classes=False)


def judge_of(
    evaluation: ConfigDict,
    needed: Mapping[str, TrainState],
    train: data.Source,
    test: data.Source,
    mesh: jax.sharding.Mesh,
) -> ImageJudge | None:
    """The judge that config.evaluation asks for, `needed` as `generating.judge_needs` says; None for none."""
    if evaluation.inception:
        eye = inception_eye(evaluation.inception)
    elif evaluation.classifier:
        eye = classifier_eye(needed["classifier"], evaluation.classifier, train)
    else:
        return None
    return ImageJudge(eye, train, test, mesh, batch_size=evaluation.batch_size)


class ImageJudge:
    """A network with the held-out images and the training images that samples are compared with.

    The floor is the distance between as many training images as there are samples and the held-out images:
    what a generator that draws from the training set itself would get.
    """

    def __init__(
        self,
        eye: Eye,
        train: data.Source,
        test: data.Source,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
    ) -> None:
        def look(params: PyTree, images: Array) -> tuple[Array, Array]:
            features, logits = eye.look(params, images)
            return features, jax.nn.softmax(logits)

        self._look = jax.jit(look, out_shardings=sharding.replicated(mesh))
        self._params = jax.device_put(eye.params, sharding.replicated(mesh))
        self._mesh, self._batch_size = mesh, batch_size
        self._train, self._test = train, test
        self._knows_classes = eye.knows_classes
        self.name = eye.name

    def _see(self, images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and class probabilities [N, K] of batches of images."""
        seen = (self._look(self._params, sharding.spread(self._mesh, rows)) for rows in images)
        features, probabilities = zip(*seen, strict=True)
        return np.concatenate(features), np.concatenate(probabilities)

    def _batches(self, images: np.ndarray) -> Iterable[np.ndarray]:
        return (images[i : i + self._batch_size] for i in range(0, len(images), self._batch_size))

    def _real(self, source: data.Source, num: int) -> Iterable[np.ndarray]:
        """The first `num` images of a fixed shuffle of the source, in [-1, 1]."""
        chosen = np.random.default_rng(0).permutation(len(source))[:num]
        for indices in self._batches(chosen):
            yield data.to_unit_range(source.fields["image"][indices], source.num_levels)

    def scores(self, samples: np.ndarray) -> Scores:
        """Fréchet and kernel distance, precision and recall beside their floors, and the Inception score.

        A judge that knows the classes adds the share that it recognises, and the spread over classes.

        samples: float32 [N, H, W, C], nominally in [-1, 1]; they are rounded to the data's levels first, as
        they would be when written to a file.
        """
        check_finite(samples)
        levels = self._test.num_levels
        samples = data.to_unit_range(data.from_unit_range(samples, levels), levels)
        num, num_test = len(samples), len(self._test)
        num_floor = min(num, len(self._train))
        of_samples, p_samples = self._see(self._batches(samples))
        of_test, p_test = self._see(self._real(self._test, num_test))
        of_floor, _ = self._see(self._real(self._train, num_floor))
        gaussian = FeatureStatistics.of(of_test)
        distance, floor = (
            frechet_between(FeatureStatistics.of(x), gaussian, num_samples=n, num_reference=num_test)
            for x, n in ((of_samples, num), (of_floor, num_floor))
        )
        few_samples, few_test, few_floor = (x[:_MOST_PAIRED] for x in (of_samples, of_test, of_floor))
        of_pairs = min(num, _MOST_PAIRED)
        # Else the floor is rounding, as where the held-out images are those of training. The root of a
        # singular covariance has about half the digits of float64.
        has_floor = floor > 1e-6 * np.trace(gaussian.covariance)
        against = f"{num_floor} training against {num_test} held-out images, same features"
        return {
            **(self._class_scores(p_samples, p_test) if self._knows_classes else {}),
            **(
                {"frechet_ratio_to_floor": Score(distance / floor, "ratio", num, False, 1.0, against)}
                if has_floor
                else {}
            ),
            "frechet_distance": Score(
                distance, f"squared feature distance, {self.name}", num, False, floor, against
            ),
            "kernel_distance": Score(
                kernel_distance(few_samples, few_test),
                f"squared kernel distance, {self.name}",
                of_pairs,
                False,
                kernel_distance(few_floor, few_test),
                against,
            ),
            **{
                name: Score(value, f"share, {self.name}", of_pairs, True, at_floor, against)
                for name, value, at_floor in zip(
                    ("precision", "recall"),
                    precision_and_recall(few_samples, few_test),
                    precision_and_recall(few_floor, few_test),
                    strict=True,
                )
            },
            **self._inception_score(p_samples, p_test),
        }

    def _class_scores(self, p_samples: np.ndarray, p_test: np.ndarray) -> Scores:
        def entropy(p: np.ndarray) -> float:
            return class_entropy(class_histogram(p.argmax(axis=1), p.shape[1]))

        real, num = f"the {len(p_test)} held-out images, same classifier", len(p_samples)
        return {
            "recognised_above_0.9": Score(
                share_recognised(p_samples, _RECOGNISED),
                f"share, {self.name}",
                num,
                True,
                share_recognised(p_test, _RECOGNISED),
                real,
            ),
            "class_entropy": Score(
                entropy(p_samples), f"nats, {self.name}", num, True, entropy(p_test), real
            ),
        }

    def _inception_score(self, p_samples: np.ndarray, p_test: np.ndarray) -> Scores:
        parts = min(_PARTS, len(p_samples), len(p_test))
        value, of_test = (float(inception_score(p, parts).mean()) for p in (p_samples, p_test))
        num, num_test = (len(p) // parts * parts for p in (p_samples, p_test))  # equal parts, without a rest
        unit = f"classes, mean of {parts} parts, {self.name}"
        return {
            "inception_score": Score(
                value, unit, num, True, of_test, f"{num_test} held-out images, same network"
            )
        }


def sample_images(
    sample: Callable[[PyTree, Array, Array], Array],
    params: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
) -> Callable[[Array], np.ndarray]:
    """(sample numbers [B]) -> images on the host, B laid over the devices; for `sample_in_batches`."""
    key = sharding.replicated_key(mesh, seed)

    def run(indices: Array) -> np.ndarray:
        return sharding.to_host(sample(params, key, sharding.spread(mesh, indices)))

    return run
