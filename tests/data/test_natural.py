import os

import numpy as np
import pytest

from jaxgen.data import natural
from jaxgen.types import UserError


def test_patches_by_hand():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    patches = natural.cut_patches(image, 2, 2)
    assert patches.shape == (6, 2, 2)
    np.testing.assert_array_equal(patches[4], [[14, 15], [20, 21]])
    assert natural.cut_patches(image, 5, 1).shape == (0, 5, 5)


def test_the_photographs_share_no_pixel_between_training_and_test():
    photos = natural.load_photographs("photos", patch=40, stride=40)
    mirrored = natural.load_photographs("photos_reversed", patch=40, stride=40)
    assert [image.shape for image in photos.test] == [(427, 214), (427, 214)]
    # What one tests on is the other's left end, in a mirror.
    first = photos.patches.fields["image"][0, :, :, 0]
    np.testing.assert_array_equal(mirrored.test[0][:40, ::-1][:, :40], first)
    assert photos.patches.fingerprint != mirrored.patches.fingerprint


def test_kernels_and_bad_names():
    for name in ("gaussian", "flat"):
        kernel = natural.blur_kernel(name)
        assert kernel.shape == (5, 5)
        assert abs(kernel.sum() - 1) < 1e-12
    np.testing.assert_array_equal(natural.blur_kernels("flat"), np.full((1, 5, 5), 1 / 25))
    with pytest.raises(UserError, match="unknown photographs"):
        natural.load_photographs("holidays", patch=8, stride=8)
    with pytest.raises(UserError, match="patch"):
        natural.load_photographs("photos", patch=1000, stride=8)


def test_missing_files_are_told(monkeypatch):
    monkeypatch.delenv("JAXGEN_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="JAXGEN_DATA_DIR"):
        natural.load_photographs("natural", patch=40, stride=40)


@pytest.mark.skipif("JAXGEN_DATA_DIR" not in os.environ, reason="JAXGEN_DATA_DIR is not set")
def test_the_real_files():
    assert len(natural.images_of("bsd68_gray.zip")) == 68
    set12 = natural.images_of("set12.zip")
    set14 = natural.images_of("set14_color.zip")
    assert len(set12) == 12
    # Those of Set14 that Set12 also has are not trained on: none of the rest is one of Set12.
    kept = [image for name, image in set14.items() if not name.lower().startswith(natural.IN_SET12)]
    assert len(kept) == len(set14) - 6
    kernel = natural.blur_kernel("levin09_1")
    assert kernel.shape == (19, 19)
    assert abs(kernel.sum() - 1) < 1e-6
    padded = natural.blur_kernels("levin09")
    assert padded.shape == (8, 27, 27)
    np.testing.assert_array_equal(padded[0][4:-4, 4:-4], kernel)
    np.testing.assert_allclose(padded.sum((1, 2)), 1.0, atol=1e-6)
    with pytest.raises(UserError, match="unknown blur kernel"):
        natural.blur_kernel("levin09_9")
