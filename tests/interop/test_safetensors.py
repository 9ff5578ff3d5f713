"""Trees to safetensors files and back, bit for bit, and what damaged or foreign files end in."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxgen.interop.safetensors import load_tree, read_tensors, save_tree, write_tensors
from jaxgen.types import UserError


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "dense": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.zeros(4, np.float16)},
        "steps": np.int32(7).reshape(()),
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float32),
        # Memory in another order than the shape says: what a transposed weight is.
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    save_tree(tmp_path / "a.safetensors", tree, {"made by": "a test"})
    loaded = load_tree(tmp_path / "a.safetensors")
    assert loaded.keys() == tree.keys()
    assert loaded["dense"].keys() == tree["dense"].keys()
    for ours, expected in [(loaded["dense"][k], tree["dense"][k]) for k in tree["dense"]] + [
        (loaded[k], tree[k]) for k in tree if k != "dense"
    ]:
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(ours, expected)


def test_names_that_are_no_tree_are_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": np.ones(1), "a.b": np.ones(2)})
    with pytest.raises(UserError, match="it is no tree"):
        load_tree(tmp_path / "a.safetensors")


def test_the_file_is_what_others_write_and_read(tmp_path):
    tensors = {"a.b": np.arange(3.0), "c": np.ones((2, 2), np.float32)}
    write_tensors(tmp_path / "ours.safetensors", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert len(os.listdir(tmp_path)) == 2  # nothing partial is left
    assert load_tree(tmp_path / "theirs.safetensors")["a"]["b"].tolist() == [0, 1, 2]


def test_missing_and_damaged_files_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path)
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.arange(100.0)})
    whole = path.read_bytes()
    # Cut in the data, cut in the header, a pickle's first bytes, nothing at all.
    for damaged in (whole[:-1], whole[:20], b"\x80\x04\x95" + whole, b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read_tensors(path)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="without a dot"):
        save_tree(tmp_path / "a.safetensors", {"a.b": np.zeros(1)})
    with pytest.raises(UserError, match="without a dot"):
        save_tree(tmp_path / "a.safetensors", {"layers": {0: np.zeros(1)}})
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(tmp_path / "no folder" / "a.safetensors", {"a": np.zeros(1)})
    assert os.listdir(tmp_path) == []
