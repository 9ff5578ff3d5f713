import numpy as np
import pytest

from jaxgen.data import load_source
from jaxgen.data.cifar10_30k import FILENAMES, undo_differences
from jaxgen.types import UserError


def test_undo_differences_inverts_the_coding():
    x = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    red, green, blue = (x[..., channel] for channel in range(3))
    planes = np.stack([green, red - green, blue - green])
    along_rows = np.diff(planes, axis=2, prepend=np.uint8(0))
    stored = np.diff(along_rows, axis=3, prepend=np.uint8(0))
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(undo_differences(stored), x)


def test_missing_files_are_named(own_cache, tmp_path):
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(UserError, match=r"'cifar10_30k' is missing.*cifar10_test_rest.npz"):
            load_source("cifar10_30k", "train", data_dir=data_dir)


def test_files_of_other_content_are_refused(own_cache, tmp_path):
    (tmp_path / "cifar10").mkdir()
    for name in FILENAMES:
        (tmp_path / "cifar10" / name).write_bytes(b"PK foreign")
    with pytest.raises(UserError, match=r"cifar10_20k_5k.npz is damaged"):
        load_source("cifar10_30k", "train", data_dir=str(tmp_path))
    stored = {"train_r": np.zeros((3, 2, 32, 32), np.uint8), "train_y": np.zeros(2, np.uint8)}
    for name in FILENAMES:
        np.savez(tmp_path / "cifar10" / name, **stored)
    with pytest.raises(UserError, match=r"sha256 of its decoded train pixels is .* but should be 353c670a"):
        load_source("cifar10_30k", "train", data_dir=str(tmp_path))
