import hashlib
import json
import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxgen.data import cache, load_source, tfds_builders
from jaxgen.types import UserError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows(image, label):
    """What identifies a record, in an order of its own: TFDS shuffles when it writes."""
    return sorted((bytes(i.reshape(-1)), int(y)) for i, y in zip(image, label, strict=True))


@pytest.mark.parametrize("name", tfds_builders.BUILDERS)
def test_names_versions_features_and_splits_are_the_stock_ones(name):
    stock, ours = tfds.builder_cls(name), tfds_builders.BUILDERS[name]
    assert str(stock.VERSION) == ours.version
    features = stock(data_dir="/nonexistent").info.features
    if ours.num_classes is not None:
        assert features["label"].num_classes == ours.num_classes
        assert features["image"].np_dtype == np.uint8
    originals = tfds_builders.registered_originals(name)
    assert originals
    assert all(o.filename and o.address.startswith("http") and len(o.sha256) == 64 for o in originals)


def test_mnist_is_prepared_decoded_and_read_back_by_the_stock_reader(small_mnist, own_cache):
    data_dir, arrays = small_mnist
    for split, prefix in (("train", "train"), ("test", "t10k")):
        source = load_source("mnist", split, data_dir=str(data_dir))
        expected = rows(
            arrays[f"{prefix}-images-idx3-ubyte.gz"].astype(np.uint8),
            arrays[f"{prefix}-labels-idx1-ubyte.gz"],
        )
        assert rows(source.fields["image"], source.fields["label"]) == expected
        assert source.fields["image"].shape[1:] == (28, 28, 1)
        assert (source.num_classes, source.num_levels) == (10, 256)
        stock = tfds.data_source("mnist", data_dir=own_cache / "tfds", split=split)
        np.testing.assert_array_equal(
            np.stack([stock[i]["image"] for i in range(len(stock))]), source.fields["image"]
        )
        np.testing.assert_array_equal([stock[i]["label"] for i in range(len(stock))], source.fields["label"])


def test_cifar10_is_taken_from_its_archive(small_cifar10, own_cache):
    data_dir, images, labels = small_cifar10
    train = load_source("cifar10", "train", data_dir=str(data_dir))
    assert rows(train.fields["image"], train.fields["label"]) == rows(images[:10], labels[:10])
    test = load_source("cifar10", "test", data_dir=str(data_dir))
    assert rows(test.fields["image"], test.fields["label"]) == rows(images[10:], labels[10:])
    stock = tfds.data_source("cifar10", data_dir=own_cache / "tfds", split="train")
    assert sorted(stock[i]["id"] for i in range(10)) == [f"train_{i:05d}".encode() for i in range(10)]
    np.testing.assert_array_equal(images[int(stock[3]["id"][-5:])], stock[3]["image"])


def test_later_loads_need_neither_originals_nor_records(small_mnist, own_cache, monkeypatch):
    data_dir, _ = small_mnist
    first = load_source("mnist", "train", data_dir=str(data_dir))
    shutil.rmtree(data_dir)
    shutil.rmtree(own_cache / "tfds")
    monkeypatch.setattr(tfds_builders, "decode", None)
    again = load_source("mnist", "train")
    assert again.fingerprint == first.fingerprint
    assert (again.name, again.split, again.num_classes, again.num_levels) == ("mnist", "train", 10, 256)


def test_records_prepared_elsewhere_are_used(small_mnist, own_cache, monkeypatch, tmp_path):
    data_dir, _ = small_mnist
    first = load_source("mnist", "test", data_dir=str(data_dir))
    (own_cache / "tfds").rename(tmp_path / "elsewhere")
    shutil.rmtree(own_cache)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    assert load_source("mnist", "test").fingerprint == first.fingerprint


def test_a_damaged_decoded_array_is_noticed_and_made_anew(small_mnist, own_cache, capsys):
    data_dir, _ = small_mnist
    first = load_source("mnist", "train", data_dir=str(data_dir))
    folder = own_cache / "decoded" / "mnist-3.0.1" / "train"
    file = folder / json.loads((folder / "meta.json").read_text())["files"]["image"]
    intact = file.read_bytes()
    for damaged in (intact[:-1] + bytes([intact[-1] ^ 1]), intact[:1000], b"", b"foreign"):
        file.write_bytes(damaged)
        assert cache.fetch(folder) is None
        assert load_source("mnist", "train").fingerprint == first.fingerprint
        assert file.read_bytes() == intact
    for damaged in ("", "{}", "[1]", "\x00"):
        (folder / "meta.json").write_text(damaged)
        assert cache.fetch(folder) is None
    said = capsys.readouterr().err
    assert f"Preparing mnist in {own_cache / 'tfds'}" in said
    assert f"The decoded data in {folder} are damaged and are made anew: " in said


def test_damaged_records_are_noticed(small_mnist, own_cache):
    data_dir, _ = small_mnist
    load_source("mnist", "test", data_dir=str(data_dir))
    shutil.rmtree(own_cache / "decoded")
    (records,) = (own_cache / "tfds" / "mnist" / "3.0.1").glob("*test.array_record*")
    records.write_bytes(records.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"mnist.*damaged.*delete that folder"):
        load_source("mnist", "test")


def test_a_missing_set_is_one_sentence_with_all_that_is_needed(own_cache, tmp_path):
    for data_dir in (None, str(tmp_path / "nowhere")):
        with pytest.raises(UserError) as caught:
            load_source("mnist", "train", data_dir=data_dir)
        message = str(caught.value)
        assert "\n" not in message
        # Address and checksum as published by TFDS for the stock builder.
        assert "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz" in message
        assert "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609" in message
        assert str(own_cache / "tfds" / "mnist" / "3.0.1") in message
        if data_dir:
            assert f"{data_dir}/mnist" in message


def test_only_the_files_that_lack_are_asked_for(small_mnist):
    data_dir, _ = small_mnist
    (data_dir / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"save t10k-labels-idx1-ubyte.gz \([^)]*\) in a folder"):
        load_source("mnist", "train", data_dir=str(data_dir))


def test_the_environment_names_the_data_dir(small_mnist, monkeypatch):
    monkeypatch.setenv("JAXGEN_DATA_DIR", str(small_mnist[0]))
    assert len(load_source("mnist", "test")) == 5


def test_a_damaged_original_is_named_with_both_checksums(small_mnist):
    data_dir, _ = small_mnist
    file = data_dir / "mnist" / "train-images-idx3-ubyte.gz"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"x")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte.gz is damaged.*{found}.*{expected}"):
        load_source("mnist", "train", data_dir=str(data_dir))


def test_a_cache_that_cannot_be_written_is_named(small_mnist, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*file.*set JAXGEN_CACHE_DIR"):
        load_source("mnist", "train", data_dir=str(small_mnist[0]))


def test_two_processes_that_prepare_at_once_do_not_harm_each_other(small_mnist, own_cache, monkeypatch):
    data_dir, _ = small_mnist
    write_records = tfds_builders._write_records
    others = []

    def write_while_another_finishes(*arguments):
        written = write_records(*arguments)
        if not others:
            others.append(None)  # the other process must not start one more
            others[0] = load_source("mnist", "train", data_dir=str(data_dir))
        return written

    monkeypatch.setattr(tfds_builders, "_write_records", write_while_another_finishes)
    assert load_source("mnist", "train", data_dir=str(data_dir)).fingerprint == others[0].fingerprint
    assert [path.name for path in (own_cache / "tfds").iterdir()] == ["mnist"]  # no leftovers
    decoded = own_cache / "decoded" / "mnist-3.0.1" / "train"
    assert len(list(decoded.iterdir())) == 3


def test_a_preparation_that_fails_leaves_nothing(small_mnist, own_cache, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds_builders, "_write_records", disk_full)
    with pytest.raises(UserError, match="No space left"):
        load_source("mnist", "train", data_dir=str(small_mnist[0]))
    assert list((own_cache / "tfds").iterdir()) == []


# The real files.


def test_real_mnist(real_data_dir, cache_dir):
    train = load_source("mnist", "train", data_dir=real_data_dir)
    test = load_source("mnist", "test", data_dir=real_data_dir)
    assert (len(train), len(test)) == (60000, 10000)
    # Label counts of the published files.
    assert np.bincount(test.fields["label"]).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert np.bincount(train.fields["label"])[:3].tolist() == [5923, 6742, 5958]
    # The mean and standard deviation of the training pixels that everyone normalises by.
    pixels = train.fields["image"] / np.float32(255)
    assert abs(pixels.mean(dtype=np.float64) - 0.1307) < 5e-5
    assert abs(pixels.std(dtype=np.float64) - 0.3081) < 5e-5
    stock = tfds.data_source("mnist", data_dir=cache_dir / "tfds", split="test")
    for i in (0, 1234, 9999):
        np.testing.assert_array_equal(stock[i]["image"], test.fields["image"][i])


def test_real_tiny_shakespeare(real_data_dir):
    sizes = {"train": 1003854, "validation": 55770, "test": 55770}
    parts = {split: load_source("tiny_shakespeare", split, data_dir=real_data_dir) for split in sizes}
    assert {split: len(part) for split, part in parts.items()} == sizes
    assert bytes(parts["train"].fields["tokens"][:14]) == b"First Citizen:"
    text = np.concatenate([part.fields["tokens"] for part in parts.values()])
    assert len(np.unique(text)) == 65
    # The sha256 of the published file.
    assert hashlib.sha256(text.tobytes()).hexdigest() == (
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    )


def test_real_cifar10_subset(real_data_dir):
    train = load_source("cifar10_30k", "train", data_dir=real_data_dir)
    test = load_source("cifar10_30k", "test", data_dir=real_data_dir)
    assert (len(train), len(test)) == (30000, 9966)
    assert np.bincount(train.fields["label"]).tolist() == [3000] * 10
    assert np.bincount(test.fields["label"]).tolist() == [1000] * 7 + [999, 967, 1000]
    # Means of the full CIFAR-10 training set, red, green, blue: 0.4914, 0.4822, 0.4465; a subset of 30,000
    # images is within 4 standard errors of them (standard deviation of an image's mean: about 0.13).
    means = train.fields["image"].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=4 * 0.13 / np.sqrt(30000))


def test_real_cifar10_is_missing_and_the_subset_is_suggested(real_data_dir, own_cache):
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz.*c4a38c50a1bc.*'cifar10_30k'"):
        load_source("cifar10", "train", data_dir=real_data_dir)


@pytest.mark.slow
def test_real_fashion_mnist(real_data_dir):
    for split, per_class in (("train", 6000), ("test", 1000)):
        source = load_source("fashion_mnist", split, data_dir=real_data_dir)
        assert np.bincount(source.fields["label"]).tolist() == [per_class] * 10
