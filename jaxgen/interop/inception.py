"""The weights of `models.inception.InceptionV3` from a file that the user has.

Either the public `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, whose name ends with the first digits
of its SHA-256, or its tensors under the same names in a safetensors file.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxgen.interop.safetensors import read_tensors
from jaxgen.interop.torch_files import read_torch_tensors
from jaxgen.models.inception import InceptionV3
from jaxgen.types import PyTree, UserError

_EPSILON = 1e-3  # of the published batch normalisation
_NORM = ("weight", "bias", "running_mean", "running_var")
# The beginnings of PyTorch's two kinds of file: a ZIP, and a pickle.
_TORCH = (b"PK", b"\x80")


@functools.cache
def _expected() -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of one of our parameters: its shape}."""
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    variables = jax.eval_shape(InceptionV3(resize=False).init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"]).items()}


def expected_tensors() -> dict[str, tuple[int, ...]]:
    """{name of a tensor in the file: its shape}, all that are needed."""
    shapes = {}
    for (*modules, kind), shape in _expected().items():
        name = ".".join(modules)
        if modules == ["fc"]:
            shapes[f"fc.{'weight' if kind == 'kernel' else 'bias'}"] = shape[::-1]
        elif kind == "kernel":
            height, width, inputs, features = shape
            shapes[f"{name}.conv.weight"] = (features, inputs, height, width)
        else:
            shapes.update({f"{name}.bn.{part}": shape for part in _NORM})
    return shapes


def read_inception(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of the file by the names of pytorch-fid.

    Raises:
        UserError: the file is missing, damaged or of another format, or its tensors are another network's.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            beginning = file.read(2)
    except OSError as error:
        raise UserError(
            f"The weights of InceptionV3 cannot be read from {path} ({error.strerror}): give the path of "
            "pytorch-fid's .pth file, or of a safetensors file with its tensors."
        ) from error
    tensors = read_torch_tensors(path) if beginning.startswith(_TORCH) else read_tensors(path)
    for name, shape in expected_tensors().items():
        if name not in tensors:
            raise UserError(f"{path} lacks {name}: give the weights that pytorch-fid has.")
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} in {path} has shape {tensors[name].shape} where FID's InceptionV3 has {shape}: give "
                "the weights that pytorch-fid has."
            )
    return tensors


def inception_params(tensors: dict[str, np.ndarray]) -> PyTree:
    """The parameters of `InceptionV3`, float32, of the tensors that `read_inception` gives.

    A convolution w without bias and then gamma (y - mean) / sqrt(var + eps) + beta is the convolution with
    scale * w and the bias beta - scale * mean, where scale = gamma / sqrt(var + eps).
    """
    params: dict[tuple[str, ...], np.ndarray] = {}
    for path in _expected():
        *modules, kind = path
        name = ".".join(modules)
        if modules == ["fc"]:
            value = tensors["fc.weight"].T if kind == "kernel" else tensors["fc.bias"]
        else:
            gamma, beta, mean, variance = (tensors[f"{name}.bn.{part}"].astype(np.float64) for part in _NORM)
            scale = gamma / np.sqrt(variance + _EPSILON)
            if kind == "kernel":
                value = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale[None, None, None]
            else:
                value = beta - scale * mean
        params[path] = np.asarray(value, np.float32)
    return traverse_util.unflatten_dict(params)


def file_hash(path: str | os.PathLike[str]) -> str:
    """The first eight hexadecimal digits of the file's SHA-256."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
