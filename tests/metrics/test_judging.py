"""The one interface of image scores: which network judges and what it is called, counts, devices."""

import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT, environment
from inception_weights import write_blank_weights
from ml_collections import ConfigDict

from experiments import classifier, common, gan, pca
from experiments.common import generating, judging
from jaxgen import data, sharding
from jaxgen.interop import inception
from jaxgen.types import TrainState, UserError


def _source(num, seed, size=6, channels=1):
    rng = np.random.default_rng(seed)
    return data.Source(
        "made up",
        "train",
        {
            "image": rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8),
            "label": np.arange(num, dtype=np.int32) % 3,
        },
        num_classes=3,
        num_levels=256,
    )


TRAIN, TEST = _source(45, 1), _source(40, 2)
SAMPLES = data.to_unit_range(_source(35, 3).fields["image"], 256) * np.float32(0.9)


def _look(params, images):
    """Two fixed random layers, their features and the logits."""
    features = jnp.tanh(images.reshape(len(images), -1) @ params["features"])
    return features, features @ params["logits"]


def _eye(*, knows_classes=True):
    rng = np.random.default_rng(0)
    params = {"features": rng.normal(size=(36, 8)) / 3, "logits": 3 * rng.normal(size=(8, 3))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    return judging.Eye("fixed 12345678", params, _look, knows_classes)


def _scores(**options):
    # 35 samples in batches of 16: the last one, of 3, does not divide over four devices.
    judge = judging.ImageJudge(_eye(**options), TRAIN, TEST, sharding.make_mesh(), batch_size=16)
    return judge.scores(SAMPLES)


def test_a_judge_fits_any_number_of_devices():
    """Its own batches of 360 do not divide over 16 devices, and the user of another run cannot set them."""
    config = classifier.get_config("cifar10")
    mesh = jax.sharding.AbstractMesh((16, 1), ("data", "model"))
    assert common.for_devices(config, mesh).evaluation.batch_size == 368
    assert config.evaluation.batch_size == 360


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_not_judged(bad):
    samples = SAMPLES.copy()
    samples[3, 0, 0, 0] = samples[5, 1, 1, 0] = bad
    judge = judging.ImageJudge(_eye(), TRAIN, TEST, sharding.make_mesh(), batch_size=16)
    with pytest.raises(UserError, match="2 of 35 samples hold numbers that are not finite"):
        judge.scores(samples)


@pytest.fixture(scope="module")
def scores():
    return _scores()


def test_every_score_names_the_network_and_counts_the_samples(scores):
    assert set(scores) == {
        *("frechet_distance", "frechet_ratio_to_floor", "kernel_distance", "precision", "recall"),
        *("inception_score", "recognised_above_0.9", "class_entropy"),
    }
    for name, score in scores.items():
        assert score.n == (30 if name == "inception_score" else 35)  # ten equal parts
        assert "fixed 12345678" in score.unit or name == "frechet_ratio_to_floor"
        assert score.reference is not None
        assert "40 held-out images" in score.reference_source


def test_a_judge_of_other_classes_does_not_claim_to_recognise(scores):
    others = _scores(knows_classes=False)
    assert set(scores) - set(others) == {"recognised_above_0.9", "class_entropy"}
    assert all(others[name] == scores[name] for name in others)


def test_samples_like_the_training_images_score_the_floor():
    judge = judging.ImageJudge(_eye(), TRAIN, TEST, sharding.make_mesh(), batch_size=16)
    scores = judge.scores(data.to_unit_range(TRAIN.fields["image"], 256))
    # The floor looks at the same images in another order.
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        assert scores[name].value == pytest.approx(scores[name].reference, rel=1e-4, abs=1e-9)


def test_held_out_images_that_are_those_of_training_give_no_ratio():
    judge = judging.ImageJudge(_eye(), TRAIN, TRAIN, sharding.make_mesh(), batch_size=16)
    scores = judge.scores(SAMPLES)
    assert "frechet_ratio_to_floor" in scores  # 35 of the 45 images against all of them
    scores = judge.scores(data.to_unit_range(TRAIN.fields["image"], 256))
    assert "frechet_ratio_to_floor" not in scores
    assert scores["frechet_distance"].value == pytest.approx(0.0, abs=1e-6)


def test_four_devices_score_as_one_does(scores):
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(XLA_FLAGS=flags, NPROC="16", PYTHONPATH=str(ROOT / "tests")),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there.pop("devices") == 4
    assert there.keys() == scores.keys()
    for name, score in scores.items():
        # Every image is looked at on one device, in float32; the sums over images are float64 on the host.
        assert there[name] == pytest.approx(score.value, rel=1e-5, abs=1e-7)


def test_the_weights_of_a_file_judge_in_place_of_the_classifier(tmp_path):
    file = tmp_path / "weights.safetensors"
    write_blank_weights(file)
    evaluation = generating.evaluation_config(inception=str(file))
    with mock.patch.object(judging, "ImageJudge", lambda eye, *_, **options: (eye, options)):
        eye, options = judging.judge_of(evaluation, {}, TRAIN, TEST, sharding.make_mesh())
    assert eye.name == f"InceptionV3 of FID {inception.file_hash(file)}"
    assert not eye.knows_classes
    assert options == {"batch_size": evaluation.batch_size}
    shapes = jax.eval_shape(eye.look, eye.params, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
    assert [shape.shape for shape in shapes] == [(2, 2048), (2, 1008)]
    config = ConfigDict({"evaluation": evaluation.to_dict(), "data": {"source": "digits"}})
    generating.check_evaluation(config)
    assert generating.judge_needs(config, TRAIN, TEST, sharding.make_mesh()) == {}
    with pytest.raises(UserError, match=r"evaluation\.inception is for grey and RGB images"):
        generating.judge_needs(config, _source(9, 0, channels=2), TEST, sharding.make_mesh())
    with pytest.raises(UserError, match=r"evaluation\.inception needs at least 4 images"):
        generating.judge_needs(config, _source(3, 0), TEST, sharding.make_mesh())


def test_without_a_network_nobody_judges():
    evaluation = generating.evaluation_config(classifier="")
    assert judging.judge_of(evaluation, {}, TRAIN, TEST, sharding.make_mesh()) is None


def test_a_batch_that_came_out_short_is_noticed():
    config = ConfigDict({"seed": 0, "evaluation": {"num_samples": 5, "batch_size": 4}})
    judge = mock.Mock()
    with (
        mock.patch.object(generating, "sample_in_batches", return_value=np.zeros((4, 2, 2, 1))),
        pytest.raises(ValueError, match="5 samples were asked for, but 4"),
    ):
        generating.sample_scores(mock.Mock(), {}, judge, config, sharding.make_mesh())
    judge.scores.assert_not_called()


def _scores_after_a_step(module, tmp_path, train, test):
    """Of an experiment's smoke preset on these images, nobody judging."""
    path, label = tmp_path / "images.npz", np.zeros(len(train), np.int32)
    np.savez(path, image=train, label=label, test_image=test, test_label=np.zeros(len(test), np.int32))
    config = module.get_config("smoke")
    config.data.source, config.evaluation.classifier = f"npz:{path}", ""
    experiment = module.build(config, sharding.make_mesh())
    batch = experiment.train_batch(0)
    state = jax.jit(experiment.system.init)(jax.random.key(0), batch)
    return experiment.evaluate(jax.jit(experiment.system.step)(state, batch)[0], {})


def test_the_gans_discriminator_counts_the_training_images_it_saw(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    scores = _scores_after_a_step(gan, tmp_path, images[:20], images[20:])
    counts = {name: score.n for name, score in scores.items()}
    assert counts["discriminator_on_held_out"] == counts["discriminator_on_samples"] == 30
    assert counts["discriminator_on_training"] == 20


def test_images_that_are_all_one_have_no_variance_to_explain(tmp_path):
    scores = _scores_after_a_step(pca, tmp_path, *np.full((2, 20, 8, 8, 1), 77, np.uint8))
    assert set(scores) == {"reconstruction_error"}
    assert scores["reconstruction_error"].value == pytest.approx(0.0, abs=1e-10)


def test_the_classifier_eye_has_the_classifiers_features_and_logits():
    from experiments import classifier

    model = classifier.make_model(classifier.get_config("smoke").model, TRAIN)
    images = jnp.asarray(data.to_unit_range(TEST.fields["image"][:3], 256))
    params = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, (), None, jax.random.key(0))
    eye = judging.classifier_eye(state, "smoke", TRAIN)
    features, logits = jax.jit(eye.look)(eye.params, images)
    head = params["head"]
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"][None], atol=1e-5)
    assert eye.name.startswith("classifier smoke ")
    changed = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    assert judging.classifier_eye(state._replace(params=changed), "smoke", TRAIN).name != eye.name


if __name__ == "__main__":
    values = {name: score.value for name, score in _scores().items()}
    print(json.dumps({"devices": jax.device_count(), **values}))
