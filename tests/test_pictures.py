"""Grids, strips and charts."""

import io
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen import pictures
from jaxgen.types import UserError


def test_to_uint8_is_the_inverse_of_how_images_are_read():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pictures.to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)
    np.testing.assert_array_equal(
        pictures.to_uint8(np.array([-7.0, -1.0, 0.0, 1.0, 1.5])), [0, 0, 128, 255, 255]
    )
    # bfloat16 has 8 bits of precision: 0.5 is exact, and 127.5 * 1.5 = 191.25.
    np.testing.assert_array_equal(pictures.to_uint8(jnp.array([0.5], jnp.bfloat16)), [191])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_refused(bad):
    images = np.zeros((2, 4, 4, 1), np.float32)
    images[1, 2, 3, 0] = bad
    with pytest.raises(UserError, match="1 of 32 pixels are not finite"):
        pictures.image_grid(images)


def test_integers_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="floats"):
        pictures.to_uint8(np.zeros((2, 4, 4, 1), np.uint8))
    for shape in ((4, 4, 1), (2, 4, 4, 2), (0, 4, 4, 1)):
        with pytest.raises(ValueError, match="shape"):
            pictures.image_grid(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="scale"):
        pictures.image_grid(np.zeros((1, 2, 2, 1), np.float32), scale=0)
    with pytest.raises(ValueError, match=r"\[T, N"):
        pictures.save_strip("x.png", np.zeros((2, 4, 4, 1), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_against_a_loop(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 4, 6, channels)).astype(np.float32)
    columns, padding, scale = 3, 2, 3
    expected = np.full((2 * (4 + 2) + 2, 3 * (6 + 2) + 2, channels), 128, np.uint8)
    for index, image in enumerate(images):
        top, left = 2 + (index // columns) * (4 + 2), 2 + (index % columns) * (6 + 2)
        expected[top : top + 4, left : left + 6] = np.round((image + 1) * 127.5)
    expected = np.kron(expected, np.ones((scale, scale, 1), np.uint8))
    grid = pictures.image_grid(images, columns, padding, scale)
    assert grid.dtype == np.uint8
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize(("num", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (64, 8)])
def test_grids_are_as_square_as_can_be(num, columns):
    grid = pictures.image_grid(np.zeros((num, 2, 2, 1), np.float32), padding=0)
    assert grid.shape == (2 * -(-num // columns), 2 * columns, 1)


def test_save_image_grid_enlarges_digits_until_they_can_be_read(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    pictures.save_image_grid(tmp_path / "new" / "x.png", images)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert (picture.mode, picture.size) == ("L", (6 * (2 * 9 + 1), 6 * (2 * 9 + 1)))
        np.testing.assert_array_equal(np.asarray(picture), pictures.image_grid(images, scale=6)[..., 0])
    pictures.save_image_grid(tmp_path / "y.png", images, columns=4, scale=1, padding=0)
    with Image.open(tmp_path / "y.png") as picture:
        assert picture.size == (32, 8)
    first = (tmp_path / "y.png").read_bytes()
    pictures.save_image_grid(tmp_path / "y.png", images, columns=4, scale=1, padding=0)
    assert (tmp_path / "y.png").read_bytes() == first


def test_save_strip_has_samples_in_rows_and_time_in_columns(tmp_path):
    frames = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3, 3, 3)).astype(np.float32)
    pictures.save_strip(tmp_path / "x.png", frames, padding=0, scale=1)
    with Image.open(tmp_path / "x.png") as picture:
        strip = np.asarray(picture)
    assert strip.shape == (2 * 3, 5 * 3, 3)
    for time in range(5):
        for sample in range(2):
            cell = strip[3 * sample : 3 * sample + 3, 3 * time : 3 * time + 3]
            np.testing.assert_array_equal(cell, pictures.to_uint8(frames[time, sample]))


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=40)
    values[[7, 8]] = np.nan
    mean = pictures.running_mean(values, 5)
    for index in range(40):
        if index in (7, 8):
            assert np.isnan(mean[index])
        else:
            # float64 sums in another order
            np.testing.assert_allclose(
                mean[index], np.nanmean(values[max(0, index - 2) : index + 3]), rtol=1e-12
            )
    # A window wider than the curve averages all of it.
    np.testing.assert_allclose(pictures.running_mean([1.0, 2.0, 6.0], 7), [3.0, 3.0, 3.0])


def test_only_noisy_curves_are_smoothed():
    steps = np.arange(300)
    rng = np.random.default_rng(0)
    assert pictures.smoothed(np.exp(-steps / 100)) is None
    assert pictures.smoothed(np.minimum(steps / 50, 1.0)) is None
    assert pictures.smoothed(rng.normal(size=59)) is None
    noisy = np.exp(-steps / 100) + 0.1 * rng.normal(size=300)
    mean = pictures.smoothed(noisy)
    # The mean of 11 values has a noise of 0.1 / sqrt(11) = 0.03.
    assert np.abs(mean - np.exp(-steps / 100))[10:-10].max() < 4 * 0.1 / np.sqrt(11)


def svg_of(curves, **kwargs):
    buffer = io.BytesIO()
    pictures.save_curves(buffer, curves, format="svg", **kwargs)
    text = buffer.getvalue().decode()
    tree = ElementTree.fromstring(text)
    return text, ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_name_axes_units_and_curves():
    curves = {"train/loss": [(step, 2.0 - step / 100) for step in range(100)], "_eval $x^2$": [(50, 1.0)]}
    text, words = svg_of(curves, ylabel="nats <&>", title="Loss $5")
    assert {"step", "nats <&>", "Loss $5", "train/loss", " _eval $x^2$"} <= set(words)
    assert svg_of(curves, ylabel="nats <&>", title="Loss $5")[0] == text  # the same bytes


@pytest.mark.parametrize(
    ("values", "log_y", "is_log"),
    [
        ([100.0, 1.0], None, True),
        ([2.0, 1.0], None, False),
        ([100.0, 0.0], None, False),
        ([100.0, -1.0], True, False),
        ([2.0, 1.0], True, True),
        ([100.0, 1.0], False, False),
        ([float("nan")], None, False),
    ],
)
def test_log_scale_is_chosen_by_the_data(values, log_y, is_log):
    _, words = svg_of({"x": list(enumerate(values))}, ylabel="nats", log_y=log_y)
    assert ("nats (log scale)" in words) is is_log


def test_charts_of_nothing_and_of_gaps_are_drawn(tmp_path):
    pictures.save_curves(tmp_path / "empty.png", {})
    curve = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    pictures.save_curves(tmp_path / "gaps.png", {"x": curve}, size=(4.0, 3.0))
    with Image.open(tmp_path / "gaps.png") as picture:
        assert picture.size == (600, 450)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = np.array([0x2F, 0x6F, 0xB5])
    assert (np.abs(pixels - blue).sum(-1) < 30).sum() > 20  # two dots in the first colour
    first = (tmp_path / "gaps.png").read_bytes()
    pictures.save_curves(tmp_path / "gaps.png", {"x": curve}, size=(4.0, 3.0))
    assert (tmp_path / "gaps.png").read_bytes() == first
