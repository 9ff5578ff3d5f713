"""The figure of a GAN through training, cut short: its numbers and its picture."""

import numpy as np
import PIL.Image

from experiments.figures import gan_training


def test_the_generator_comes_nearer_and_the_discriminator_ends_at_a_half(tmp_path, capsys):
    assert gan_training.main([f"--out={tmp_path}", "--steps=100,800"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = np.asarray(rows[1:4], np.float64)
    np.testing.assert_array_equal(table[:, 0], [0, 100, 800])
    distance = table[:, 3]
    assert distance[2] < 0.5 * distance[0]
    np.testing.assert_allclose(table[2, 1:3], 0.5, atol=0.1)
    with PIL.Image.open(tmp_path / "gan_training.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_density_estimate_is_the_density_of_its_draws():
    """Normal draws smoothed by a normal kernel are normal, of the summed variance."""
    drawn = np.random.default_rng(0).normal(size=20_000)
    width = 3 * (gan_training.GRID[1] - gan_training.GRID[0])
    variance = 1 + width**2
    expected = np.exp(-0.5 * gan_training.GRID**2 / variance) / np.sqrt(2 * np.pi * variance)
    # The standard error at the mode is below sqrt(0.4 / (20,000 * 2 sqrt(pi) width)) = 0.006; 4 of them.
    np.testing.assert_allclose(gan_training.p_generator(drawn), expected, atol=0.024)
