"""Original files as their authors publish them: found, checked, and taken apart in memory."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image

from jaxgen.types import UserError

Examples: TypeAlias = Iterator[tuple[Any, dict[str, Any]]]  # (key, {feature: value}), as TFDS builders yield


@dataclasses.dataclass(frozen=True)
class Original:
    """One published file: `filename` is what it is called on disk, `address` where it is published."""

    filename: str
    address: str
    sha256: str


def missing(name: str, originals: Sequence[Original], places: Sequence[str], advice: str = "") -> UserError:
    """The error for a data set that is nowhere: what, where it was looked for, its address and checksum."""
    files = ", ".join(f"{o.filename} ({o.address}, sha256 {o.sha256})" for o in originals)
    return UserError(
        f"data set {name!r} is missing: looked for in {' and '.join(places)}; save {files} in a folder "
        f"<data_dir>/{name} and give --data_dir or set JAXGEN_DATA_DIR{advice}"
    )


def data_folders(data_dir: str | None, names: Sequence[str]) -> list[Path]:
    """The folders `names` in `data_dir`, else in the environment's JAXGEN_DATA_DIR, else none."""
    root = data_dir or os.environ.get("JAXGEN_DATA_DIR")
    return [Path(os.path.expanduser(root)) / name for name in names] if root else []


def find(originals: Sequence[Original], folders: Sequence[Path]) -> Path | None:
    """The first of `folders` that holds all the files, by name alone."""
    return next((d for d in folders if all((d / o.filename).is_file() for o in originals)), None)


def read_verified(path: Path, expected_sha256: str, address: str) -> bytes:
    """The bytes of `path`. Raises UserError where they are not the published ones."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected_sha256:
        raise UserError(
            f"{path} is damaged: its sha256 is {found} but should be {expected_sha256}; "
            f"get it again from {address}"
        )
    return data


def parse_idx(data: bytes, origin: str) -> np.ndarray:
    """An IDX file of bytes (LeCun's MNIST format), gzipped or not -> uint8 array of the shape it states.

    Big-endian header: two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes as
    32-bit words; then exactly that many bytes. Raises UserError, naming `origin`, for anything else.
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{origin} is a damaged gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] == 0:
        raise UserError(f"{origin} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{origin} ends inside its IDX header")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) - start != math.prod(shape):
        raise UserError(
            f"{origin} holds {len(data) - start} bytes where its IDX header {shape} says otherwise"
        )
    try:
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except ValueError as error:  # more dimensions than NumPy has, or sizes beyond its integers
        raise UserError(f"{origin} has an IDX header that makes no array: {shape}") from error


def mnist_examples(files: Mapping[str, bytes]) -> dict[str, Examples]:
    """MNIST and Fashion-MNIST: keys are positions, images 28x28 grey."""

    def examples(prefix: str) -> Examples:
        parts = [f"{prefix}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
        images, labels = (parse_idx(files[part], part) for part in parts)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": PIL.Image.fromarray(image), "label": int(label)}

    return {"train": examples("train"), "test": examples("t10k")}


def cifar10_examples(files: Mapping[str, bytes]) -> dict[str, Examples]:
    """CIFAR-10, binary version: records of one label byte and 3 planes of 32x32 bytes, 10,000 a file."""
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}

    def examples(split: str) -> Examples:
        # Members are read in memory, by exact name: nothing in the archive can choose a path on disk.
        with tarfile.open(fileobj=io.BytesIO(files["cifar-10-binary.tar.gz"]), mode="r:gz") as archive:
            members = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in batches[split]]
            data = b"".join(member.read() for member in members if member is not None)
        records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        for i, (image, label) in enumerate(zip(images, records[:, 0], strict=True)):
            example = {"id": f"{split}_{i:05d}", "image": PIL.Image.fromarray(image), "label": int(label)}
            yield i, example

    return {"train": examples("train"), "test": examples("test")}


def split_text(text: bytes) -> dict[str, bytes]:
    """The first 90 % for training, half of the rest for validation, the other for testing (as in TFDS)."""
    train_end = int(len(text) * 0.9)
    validation_end = train_end + int((len(text) - train_end) * 0.5)
    return {
        "train": text[:train_end],
        "validation": text[train_end:validation_end],
        "test": text[validation_end:],
    }


def tiny_shakespeare_examples(files: Mapping[str, bytes]) -> dict[str, Examples]:
    """Tiny Shakespeare: one example a split, its whole text. The file is ASCII: bytes are characters."""
    return {split: iter([(split, {"text": text})]) for split, text in split_text(files["input.txt"]).items()}
