"""FID's weights from a file: what is folded, and what is refused (the network: parity/test_pytorch_fid)."""

import json
import struct

import numpy as np
import pytest
from inception_weights import random_weights, write_blank_weights

from jaxgen.interop.inception import expected_tensors, file_hash, inception_params, read_inception
from jaxgen.interop.safetensors import write_tensors
from jaxgen.types import UserError


def test_there_are_as_many_numbers_as_in_the_published_network():
    # torchvision's inception_v3 without its auxiliary head has 21,785,568 below the classifier, and 17,216
    # normalised channels; FID's classifier has 1,008 classes.
    sizes = {name: int(np.prod(shape)) for name, shape in expected_tensors().items()}
    trained = sum(size for name, size in sizes.items() if "running" not in name)
    assert trained == 21_785_568 + 2048 * 1008 + 1008
    assert sum(size for name, size in sizes.items() if name.endswith("running_mean")) == 17_216


def test_a_normalisation_folds_into_the_convolution_before_it(tmp_path):
    tensors = random_weights()
    write_tensors(tmp_path / "weights", tensors)
    params = inception_params(read_inception(tmp_path / "weights"))
    layer, name = params["Mixed_6b"]["branch7x7_2"], "Mixed_6b.branch7x7_2"
    x = np.random.default_rng(1).normal(size=(7, 128))  # what one pixel of the result sees
    convolved = np.einsum("wi,oiw->o", x, tensors[f"{name}.conv.weight"][:, :, 0, :])
    gamma, beta, mean, variance = (
        tensors[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = gamma * (convolved - mean) / np.sqrt(variance + 0.001) + beta
    assert layer["kernel"].shape == (1, 7, 128, 128)
    np.testing.assert_allclose(
        np.einsum("wi,wio->o", x, layer["kernel"][0]) + layer["bias"], expected, atol=1e-4
    )


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "blank.safetensors"
    write_blank_weights(path)
    return path


def _rewritten(blank, path, change):
    """The blank file with another header."""
    content = blank.open("rb")
    (length,) = struct.unpack("<Q", content.read(8))
    header = json.loads(content.read(length))
    end = blank.stat().st_size - 8 - length
    change(header)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    content.close()
    return path


def test_another_networks_weights_are_refused(blank, tmp_path):
    def rename(header):
        header["head.bias"] = header.pop("fc.bias")

    def transpose(header):
        header["fc.weight"]["shape"] = [2048, 1008]

    with pytest.raises(UserError, match=r"lacks fc\.bias: give the weights"):
        read_inception(_rewritten(blank, tmp_path / "renamed", rename))
    with pytest.raises(UserError, match=r"fc\.weight in .* has shape \(2048, 1008\) where .* \(1008, 2048\)"):
        read_inception(_rewritten(blank, tmp_path / "transposed", transpose))


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "text").write_text("not weights")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="cannot be read from /nowhere"):
        read_inception("/nowhere.pth")
    for name in ("text", "empty"):
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            read_inception(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_inception(tmp_path)


def test_the_hash_is_that_of_the_files_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == "ba7816bf"  # FIPS 180-2, appendix B.1
