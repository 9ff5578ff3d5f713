"""Parameter trees as safetensors files: plain tensors with names, no code inside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from jaxgen.types import PyTree, UserError


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, by name.

    Raises:
        UserError: where there is no such file, or it is damaged or of another format.
    """
    try:
        return safetensors.numpy.load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give the path of a safetensors file.") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        # KeyError: a type that NumPy has no name for.
        raise UserError(
            f"{path} is not a readable safetensors file ({error}): fetch or export it again."
        ) from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name, whole or not at all: the file appears under `path` once complete."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    # Views (a transpose, a broadcast) are made contiguous: the format stores the buffer as it lies in memory.
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, partial, dict(metadata) if metadata else None)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}): choose another place.") from error


def load_tree(path: str | os.PathLike[str]) -> PyTree:
    """The nested dict of NumPy arrays that `save_tree` wrote: the name "a.b" is the leaf ["a"]["b"]."""
    try:
        return traverse_util.unflatten_dict(read_tensors(path), sep=".")
    except (IndexError, TypeError) as error:  # "a" and "a.b"
        raise UserError(
            f"{path} has a tensor whose name is the beginning of another's: it is no tree."
        ) from error


def save_tree(path: str | os.PathLike[str], tree: PyTree, metadata: Mapping[str, str] | None = None) -> None:
    """Write a nested dict of arrays, its keys (strings without a dot) joined by dots.

    Raises:
        UserError: where a key has a dot in it or is not a string.
    """
    flat = traverse_util.flatten_dict(tree)
    for keys in flat:
        if any(not isinstance(key, str) or "." in key for key in keys):
            raise UserError(f"the tree's key {keys} cannot be written as a name: use strings without a dot.")
    write_tensors(path, {".".join(keys): leaf for keys, leaf in flat.items()}, metadata)
