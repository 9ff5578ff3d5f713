"""The numbers behind the figures of the lectures on probability and on networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.figures import (
    divergences,
    em,
    naive_bayes_against_logistic,
    regularisation,
    residual,
    unit_circle,
)
from jaxgen.estimators import mixture


def _written(module, name, tmp_path, *arguments):
    assert module.main([f"--out={tmp_path}", *arguments]) == 0
    assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 0


def test_the_circle_is_turned_then_stretched_and_ends_in_the_matrix(tmp_path, capsys):
    products = [product for _, product in unit_circle.steps(unit_circle.MATRIX)]
    np.testing.assert_allclose(products[1] @ products[1].T, np.eye(2), atol=1e-12)
    # The shear's singular values are the golden ratio and its inverse.
    golden = (1 + np.sqrt(5)) / 2
    np.testing.assert_allclose(np.linalg.norm(products[2], axis=1), [golden, 1 / golden])
    np.testing.assert_allclose(products[3], unit_circle.MATRIX, atol=1e-12)
    _written(unit_circle, "unit_circle", tmp_path)
    assert "1.618" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert unit_circle.main([f"--out={tmp_path / 'file'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_forward_fit_covers_both_modes_and_the_reverse_fit_sits_on_one(tmp_path):
    forward, left, right = divergences.compute().values()
    weight, mean, std = map(np.asarray, (divergences.WEIGHT, divergences.MEAN, divergences.STD))
    assert forward.mean == pytest.approx(weight @ mean, abs=1e-5)
    assert forward.std**2 == pytest.approx(weight @ (std**2 + mean**2) - (weight @ mean) ** 2, rel=1e-5)
    for fit, mode in ((left, 0), (right, 1)):
        assert fit.mean == pytest.approx(mean[mode], abs=0.1)
        assert fit.std == pytest.approx(std[mode], rel=0.1)
        # All but the other mode's share of the mass is matched: KL(q || p) is about -log(weight).
        assert fit.reverse == pytest.approx(-np.log(weight[mode]), abs=0.02)
        assert fit.reverse < forward.reverse
        assert fit.forward > forward.forward
        assert fit.forward > 2 * fit.reverse  # not symmetric
    _written(divergences, "divergences", tmp_path)


def test_em_never_lowers_the_likelihood_and_finds_the_clusters(tmp_path):
    shown = (0, 1, 12, 40)
    x, mixtures, curve = em.compute(shown)
    assert len(curve) == 41
    assert np.diff(curve).min() > -1e-5  # float32's rounding of a mean of 600 points of about 3 nats
    true = float(np.mean(np.asarray(mixture.log_prob(em.FAMILY, em.truth(), x))))
    assert curve[-1] >= true - 1e-3  # the fit is at least as likely as what the points come from
    means = np.asarray(mixtures[-1].components.mean)
    expected = np.asarray(em.truth().components.mean)
    # Five standard errors of the smallest cluster's mean, 120 points of variance at most 1.2.
    assert np.abs(means[:, None] - expected[None]).max(axis=2).min(axis=0).max() < 5 * np.sqrt(1.2 / 120)
    figure = em.draw(x, mixtures, shown, curve)
    figure.savefig(tmp_path / "em.png", dpi=40)


def test_naive_bayes_is_ahead_with_few_digits_and_behind_with_many():
    """Means of 6 draws: 0.41 against 0.46 with 20 examples, 0.107 against 0.093 with 600."""
    task = naive_bayes_against_logistic.tasks()["digits, Bernoulli"]
    found = naive_bayes_against_logistic.compute(task, (20, 600), 6)
    few, many = (found[size].mean(axis=1) for size in (20, 600))
    assert found[20].shape == (2, 6)
    assert few[0] < few[1]
    assert many[1] < many[0] < few[0]
    naive_bayes_against_logistic.draw({"digits": found})


def test_features_are_standardised_by_the_rows_to_learn_from():
    task = naive_bayes_against_logistic.tasks()["breast cancer, Gaussian"]
    np.testing.assert_allclose(task.x.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(task.x.std(0), 1.0, rtol=1e-12)


def test_each_draw_has_the_size_asked_for_and_all_classes():
    label = np.repeat(np.arange(4), 25)
    masks = naive_bayes_against_logistic.draws(label, 9, 3)
    np.testing.assert_array_equal(masks.sum(axis=1), 9)
    for mask in masks:
        assert set(label[mask > 0]) == {0, 1, 2, 3}
    assert (masks[0] != masks[1]).any()


def test_a_shift_moves_by_at_most_a_pixel():
    image = jnp.full((64, 5, 5, 1), -1.0).at[:, 2, 2].set(1.0)
    moved = np.asarray(regularisation.shift(image, jax.random.key(0)))[..., 0]
    assert (moved == 1).sum(axis=(1, 2)).tolist() == [1] * 64
    places = {tuple(np.argwhere(one == 1)[0]) for one in moved}
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}  # 64 draws of 9 places


def test_networks_fit_their_training_images_and_the_curves_are_drawn():
    few, held_out = regularisation.load()
    assert few["image"].shape[0] == regularisation.NUM_IMAGES
    curve = regularisation.train(
        few, held_out, dropout=0.2, augmented=True, num_steps=60, num_points=3, width=4
    )
    assert curve.step.tolist() == [20, 40, 60]
    assert curve.train_loss[-1] < curve.train_loss[0]
    assert np.isfinite(np.stack(curve[1:])).all()
    regularisation.draw({"both": curve})


def test_block_deletion_looks_at_every_block_of_a_network_trained_on_the_spot():
    config = residual.spot_config(depth=8, residual=True, channels=2, num_steps=4, seed=0)
    trained = residual.train(config, num_points=2)
    assert [step for step, _ in trained.curve] == [2, 4]
    assert trained.curve[-1][1] == trained.whole
    assert len(trained.without) == 3
    residual.draw({residual.name_of(config): trained})


def test_a_folder_without_a_run_is_told(tmp_path, capsys):
    assert residual.main([f"--out={tmp_path}", f"--workdir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err
