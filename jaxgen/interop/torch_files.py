"""Tensors from PyTorch's own files (.pth, .pt), without PyTorch and without running what is in them.

Such a file is a pickle, a program that may call any function, beside the raw numbers. Here the program is
followed by a machine of our own that knows only the instructions, and the four names, that a dict of tensors
needs; any other ends the reading. Both layouts are read: the ZIP of PyTorch >= 1.6 and the one before.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from jaxgen.types import UserError

_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}
# Of the layout before PyTorch 1.6.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_DAMAGED = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, EOFError, OverflowError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, NotImplementedError),
)


class _Refused(Exception):
    """The file asks for something that a dict of tensors does not need."""


class _Name(NamedTuple):
    """module.name, which nothing is looked up by."""

    module: str
    name: str


class _Storage(NamedTuple):
    """Numbers in a row that tensors are views of."""

    key: str
    dtype: np.dtype[Any]
    size: int


class _View(NamedTuple):
    """A tensor: where it begins in a storage, and its sizes and strides in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# What a file may call, and what is done for it.
_CALLS: dict[_Name, Callable[..., Any]] = {
    _Name("collections", "OrderedDict"): lambda *items: dict(*items),
    _Name("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _View(
        storage, offset, shape, strides
    ),
    _Name("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


def read_torch_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a file that `torch.save` wrote of a dict of tensors (a `state_dict`), by name.

    Raises:
        UserError: where there is no such file, it is damaged, or it holds anything but tensors by name.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            views, storages = read(file)
        return {name: _array(view, storages) for name, view in views.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give the path of a .pth file.") from error
    except _Refused as error:
        raise UserError(
            f"{path} is not just tensors by name: {error}; nothing of it was run, save its state_dict anew."
        ) from error
    except _DAMAGED as error:
        raise UserError(f"{path} is not a readable PyTorch file ({error!r}): fetch it again.") from error


def _read_zip(file: IO[bytes]) -> tuple[dict[str, _View], Mapping[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (program,) = (name for name in names if name.endswith("data.pkl"))
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        views = _tensors(_follow(io.BytesIO(archive.read(program))))
        keys = {view.storage.key for view in views.values()}
        return views, {key: archive.read(f"{folder}data/{key}") for key in keys}


def _read_legacy(file: IO[bytes]) -> tuple[dict[str, _View], Mapping[str, bytes]]:
    if _follow(file) != _MAGIC or _follow(file) != _VERSION:
        raise ValueError("it does not begin as one")
    if not _follow(file)["little_endian"]:
        raise _Refused("its numbers are big-endian")
    views = _tensors(_follow(file))
    sizes = {view.storage.key: view.storage for view in views.values()}
    storages = {}
    for key in _follow(file):
        (count,) = struct.unpack("<q", file.read(8))
        storages[key] = file.read(count * sizes[key].dtype.itemsize)
    return views, storages


def _tensors(root: Any) -> dict[str, _View]:
    if not isinstance(root, dict):
        raise _Refused(f"it holds a {type(root).__name__}")
    for name, value in root.items():
        if not (isinstance(name, str) and isinstance(value, _View)):
            raise _Refused(f"{name!r} in it is no tensor")
    return root


def _array(view: _View, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = view
    numbers = np.frombuffer(storages[storage.key], storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # as_strided believes what it is told: nothing before, beyond or more often than what is there.
    inside = offset >= 0 and min(strides, default=0) >= 0 and last < len(numbers)
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    if len(numbers) != storage.size or not inside or math.prod(shape) > len(numbers):
        raise ValueError(f"a tensor of shape {shape} does not lie within its {len(numbers)} numbers")
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False).copy()


def _storage(stated: tuple[Any, ...]) -> _Storage:
    """What the numbered storages are called: ("storage", type, key, device, count[, view])."""
    kind, storage_type, key, _, count, *view = stated
    if kind != "storage" or any(part is not None for part in view):
        raise _Refused(f"it refers to a {kind} that is no plain storage")
    return _Storage(key, np.dtype(_TYPES[storage_type.name]), count)


def _allowed(module: str, name: str) -> _Name:
    asked = _Name(module, name)
    if asked in _CALLS or (module == "torch" and name in _TYPES):
        return asked
    raise _Refused(f"it asks for {module}.{name}")


def _follow(stream: IO[bytes]) -> Any:
    """What the pickle at the stream's position stands for; the stream is left behind its end."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for opcode, argument, _ in pickletools.genops(stream):
        op, value = opcode.name, cast(Any, argument)
        if op in _IGNORED:
            continue
        if op in _PUSHED:
            stack.append(value)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in _TUPLES:
            start = len(stack) - _TUPLES[op]
            stack[start:] = [tuple(stack[start:])]
        elif op == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif op == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            if op == "SETITEM":
                marks.append(len(stack) - 2)
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif op == "GLOBAL":
            stack.append(_allowed(*value.split(" ")))
        elif op == "STACK_GLOBAL":
            name = stack.pop()
            stack.append(_allowed(stack.pop(), name))
        elif op == "REDUCE":
            arguments = stack.pop()
            stack.append(_CALLS[stack.pop()](*arguments))
        elif op == "BUILD":
            stack.pop()  # attributes of a dict, which a state_dict keeps its versions in
            if not isinstance(stack[-1], dict):
                raise _Refused("it sets attributes of what is no dict")
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif op == "STOP":
            return stack.pop()
        else:
            raise _Refused(f"it has the instruction {op}")
    raise EOFError("it ends in the middle")
