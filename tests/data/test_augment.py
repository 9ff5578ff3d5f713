import numpy as np
import pytest

from jaxgen.data import augment as a
from jaxgen.data.augment import AUGMENTATIONS, augment


def images(b=6, height=5, width=7, channels=3):
    return np.random.default_rng(0).integers(1, 256, (b, height, width, channels), dtype=np.uint8)


def test_flip_mirrors_the_chosen_images_only():
    x = images()
    flips = np.array([True, False, True, False, False, True])
    y = a.flip(x, flips)
    for i in range(len(x)):
        np.testing.assert_array_equal(y[i], x[i, :, ::-1] if flips[i] else x[i])


def test_crop4_is_a_window_of_the_padded_image():
    x = images(b=81)
    offsets = np.stack(np.divmod(np.arange(81), 9), axis=1)
    y = a.crop4(x, offsets)
    for i, (down, right) in enumerate(offsets):
        padded = np.zeros((13, 15, 3), np.uint8)
        padded[4:9, 4:11] = x[i]
        np.testing.assert_array_equal(y[i], padded[down : down + 5, right : right + 7])
    np.testing.assert_array_equal(y[40], x[40])  # offset (4, 4) is the image itself


def test_draws_have_the_stated_distributions():
    rng = np.random.default_rng(7)
    n = 40_000
    flips = a.draw_flips(rng, n)
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(n)  # 4 standard errors
    offsets = a.draw_offsets(rng, n)
    assert offsets.min() == 0
    assert offsets.max() == 8
    for axis in range(2):
        share = np.bincount(offsets[:, axis], minlength=9) / n
        assert np.abs(share - 1 / 9).max() < 4 * np.sqrt(1 / 9 * 8 / 9 / n)
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_share_of_the_batch_gets_its_share_of_the_draws(name):
    x = images(b=8)
    whole = augment(x, [name], seed=1, step=2, batch_size=8, rows=slice(0, 8))
    share = augment(x[4:6], [name], seed=1, step=2, batch_size=8, rows=slice(4, 6))
    np.testing.assert_array_equal(share, whole[4:6])
    other_step = augment(x, [name], seed=1, step=3, batch_size=8, rows=slice(0, 8))
    assert (other_step != whole).any()


def test_draws_of_augmentations_and_shuffle_come_from_different_generators():
    salts = [salt for salt, _, _ in AUGMENTATIONS.values()]
    assert 0 not in salts
    assert len(set(salts)) == len(salts)
    states = {np.random.default_rng([1, 2, salt]).random() for salt in salts}
    states.add(np.random.default_rng([1, 2]).random())
    assert len(states) == len(salts) + 1
    # Why 0 is no salt:
    assert np.random.default_rng([1, 2, 0]).random() == np.random.default_rng([1, 2]).random()
