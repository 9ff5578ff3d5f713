"""A cache of its own for every run of these tests, and where the real files are."""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxgen.data import tfds_builders
from jaxgen.data.originals import Original

REAL_DATA_DIR = os.environ.get("JAXGEN_DATA_DIR")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache_dir(monkeypatch, session_cache):
    """All tests share a cache, so that MNIST is prepared once; nothing is written to ~/.cache."""
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(session_cache))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return session_cache


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache that is empty and this test's alone, and no data_dir from the environment."""
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXGEN_DATA_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def real_data_dir():
    if not REAL_DATA_DIR or not Path(REAL_DATA_DIR).is_dir():
        pytest.skip("JAXGEN_DATA_DIR does not name a folder with the original files")
    return REAL_DATA_DIR


def idx(array: np.ndarray) -> bytes:
    """`array` in IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(monkeypatch, tmp_path, own_cache):
    """A data_dir with "mnist" of 12 training and 5 test images that counts as the published one."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (12, 28, 28)),
        "train-labels-idx1-ubyte.gz": rng.integers(0, 10, 12),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte.gz": rng.integers(0, 10, 5),
    }
    files = {name: gzip.compress(idx(array)) for name, array in arrays.items()}
    _install(monkeypatch, tmp_path / "data", "mnist", files, {"train": 12, "test": 5})
    return tmp_path / "data", arrays


@pytest.fixture
def small_cifar10(monkeypatch, tmp_path, own_cache):
    """A data_dir with "cifar10" of 5 x 2 training images and 3 test images, in the published layout."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 13, dtype=np.uint8)
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(13, -1)], axis=1)
    members = {f"data_batch_{i + 1}.bin": records[2 * i : 2 * i + 2] for i in range(5)}
    members["test_batch.bin"] = records[10:]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, part in members.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = part.size
            archive.addfile(entry, io.BytesIO(part.tobytes()))
    files = {"cifar-10-binary.tar.gz": packed.getvalue()}
    _install(monkeypatch, tmp_path / "data", "cifar10", files, {"train": 10, "test": 3})
    return tmp_path / "data", images, labels


def _install(monkeypatch, data_dir, name, files, num_examples):
    (data_dir / name).mkdir(parents=True)
    for filename, data in files.items():
        (data_dir / name / filename).write_bytes(data)
    registered = tuple(
        Original(filename, f"https://example.org/{filename}", hashlib.sha256(data).hexdigest())
        for filename, data in files.items()
    )
    monkeypatch.setattr(tfds_builders, "registered_originals", lambda _: registered)
    builder = dataclasses.replace(tfds_builders.BUILDERS[name], num_examples=num_examples)
    monkeypatch.setitem(tfds_builders.BUILDERS, name, builder)
