"""PyTorch's files without PyTorch: both layouts give its tensors, and nothing in a file is run."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from jaxgen.interop.torch_files import read_torch_tensors
from jaxgen.types import UserError


class _Storage:
    def __init__(self, numbers, kind):
        self.numbers, self.kind = np.asarray(numbers), kind


class _Global:
    """Pickled as a reference to a function of that name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class _Call:
    """Pickled as the call of such a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    """Writes the above without importing what they name."""

    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, _Storage):
            return None
        self.storages.append(value)
        kind, key = _Global("torch", value.kind), str(len(self.storages) - 1)
        return ("storage", kind, key, "cpu", value.numbers.size)

    def save(self, value, *arguments, **options):
        if isinstance(value, _Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *arguments, **options)


REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
NUMBERS = _Storage(np.arange(12, dtype=np.float32), "FloatStorage")


def _tensor(shape, strides, offset=0, storage=NUMBERS, *, function=REBUILD):
    return _Call(function, storage, offset, shape, strides, False, collections.OrderedDict())


def _pickled(value, protocol=2):
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol)
    pickler.dump(value)
    return stream.getvalue(), pickler.storages


def _write_zip(path, value, protocol=2):
    program, storages = _pickled(value, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", program)
        for key, storage in enumerate(storages):
            archive.writestr(f"weights/data/{key}", storage.numbers.tobytes())


def _write_legacy(path, value, protocol=2):
    program, storages = _pickled(value, protocol)
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {"int": 4}}]
    with open(path, "wb") as file:
        for part in head:
            file.write(pickle.dumps(part, protocol=2))
        file.write(program)
        file.write(pickle.dumps([str(key) for key in range(len(storages))], protocol=2))
        for storage in storages:
            file.write(struct.pack("<q", storage.numbers.size) + storage.numbers.tobytes())


WRITERS = [_write_zip, _write_legacy]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_come_back(write, protocol, tmp_path):
    whole = _Storage(np.asarray([7, 8], np.int64), "LongStorage")
    value = {
        "plain": _tensor((3, 4), (4, 1)),
        "transposed": _tensor((4, 3), (1, 4)),
        "part": _tensor((2, 2), (4, 1), offset=5),
        "scalar": _tensor((), (), 1, whole),
        "none": _tensor((0, 4), (4, 1)),
        "parameter": _Call(
            _Global("torch._utils", "_rebuild_parameter"),
            _tensor((2,), (1,)),
            True,
            collections.OrderedDict(),
        ),
    }
    write(tmp_path / "file", value, protocol)
    read = read_torch_tensors(tmp_path / "file")
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "plain": grid,
        "transposed": grid.T,
        "part": grid[1:, 1:3],
        "scalar": np.asarray(8),
        "none": grid[:0],
        "parameter": grid[0, :2],
    }
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor)
        assert read[name].dtype == (np.int64 if name == "scalar" else np.float32)


RUNS_CODE = _Call(_Global("os", "mkdir"), "broken_in")
REFUSED = {
    "a call": ({"a": RUNS_CODE}, "it asks for os.mkdir"),
    "a call for its own sake": ([RUNS_CODE], "it asks for os.mkdir"),
    "a function that is no call": ({"a": _Global("builtins", "eval")}, "it asks for builtins.eval"),
    "another type of number": (
        {"a": _tensor((1,), (1,), 0, _Storage(np.zeros(1, np.int16), "BFloat16Storage"))},
        "it asks for torch.BFloat16Storage",
    ),
    "a list": ([_tensor((3,), (1,))], "it holds a list"),
    "other values": ({"a": _tensor((3,), (1,)), "epoch": 3}, "'epoch' in it is no tensor"),
    "names that are none": ({1: _tensor((3,), (1,))}, "1 in it is no tensor"),
}
DAMAGED = {
    "beyond the end": {"a": _tensor((3, 5), (4, 1))},
    "before the start": {"a": _tensor((3,), (1,), -1)},
    "backwards": {"a": _tensor((3,), (-1,), 2)},
    "far beyond the end": {"a": _tensor((2,), (1 << 40,))},
    "more than there is": {"a": _tensor((1 << 20, 1 << 20), (0, 0))},
    "no shape": {"a": _tensor("ab", (1, 1))},
    "fewer strides": {"a": _tensor((3, 4), (1,))},
    "no storage": {"a": _tensor((3,), (1,), 0, "storage")},
    "no dict of items": {"a": _Call(_Global("collections", "OrderedDict"), 3)},
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_and_not_run(write, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = REFUSED[case]
    write("file", value)
    with pytest.raises(UserError, match="is not just tensors by name: " + message):
        read_torch_tensors("file")
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_lie_in_the_file_are_refused(write, case, tmp_path):
    write(tmp_path / "file", DAMAGED[case])
    with pytest.raises(UserError, match="not a readable PyTorch file"):
        read_torch_tensors(tmp_path / "file")


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_cut_anywhere_is_refused(write, tmp_path):
    write(tmp_path / "whole", {"a": _tensor((3, 4), (4, 1)), "b": _tensor((2,), (1,), 5)})
    content = (tmp_path / "whole").read_bytes()
    for end in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:end])
        with pytest.raises(UserError):
            read_torch_tensors(tmp_path / "cut")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth cannot be read"):
        read_torch_tensors(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_pytorch_itself_are_read(as_zip, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (1, 5)), torch.nn.BatchNorm2d(3))
    state = net.state_dict()
    state["transposed"] = state["0.weight"].transpose(0, 1)
    state["half"] = torch.ones(3).half()
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=as_zip)
    read = read_torch_tensors(tmp_path / "net.pth")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name], tensor.numpy())
        assert read[name].dtype == tensor.numpy().dtype
    whole_module = tmp_path / "module.pth"
    torch.save(net, whole_module, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"it asks for torch.nn.modules.container.Sequential"):
        read_torch_tensors(whole_module)
