"""The user's folder of images: which files, which labels, and reading through Grain where they are many."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jaxgen.data.fingerprint import held_out
from jaxgen.data.source import Source
from jaxgen.types import UserError, unknown

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def load_folder(path: str, split: str, *, max_bytes: int) -> Source:
    """Images in `path`, flat or one subfolder a class (labels: position of its name among the sorted names).

    Where `path` has folders `train` and `test`, these are the splits; else a tenth of the files, chosen by a
    hash of the file name, is the test split. All images must have one size and be all grey or all colour;
    transparency is dropped. Decoded images of more than `max_bytes` in all stay on disk as an `ImageFiles`.
    Raises UserError for a folder without images, a file that is no image, and images of different shapes.
    """
    root = Path(os.path.expanduser(path))
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    try:
        if (root / "train").is_dir() and (root / "test").is_dir():
            files = _list_images(root / split)
            classes = sorted({name for name, _ in _list_images(root / "train") if name is not None})
        else:
            found = _list_images(root)
            is_test = split == "test"
            files = [(c, f) for c, f in found if held_out(f.relative_to(root).as_posix()) == is_test]
            classes = sorted({name for name, _ in found if name is not None})
    except OSError as error:
        raise UserError(f"folder {root} cannot be read: {error}") from error
    if not files:
        raise UserError(f"folder {root} has no images ({', '.join(SUFFIXES)}) for the split {split!r}")

    image = ImageFiles([file for _, file in files])
    fields: dict[str, Any] = {"image": image if image.nbytes > max_bytes else image[:]}
    if classes:
        strays = [f"{file}" for name, file in files if name not in classes]
        if strays:
            raise UserError(f"{strays[0]} is in no class folder of {root / 'train'}")
        fields["label"] = np.asarray([classes.index(str(name)) for name, _ in files], np.int32)
    return Source(f"folder:{path}", split, fields, len(classes) or None, num_levels=256)


def _list_images(folder: Path) -> list[tuple[str | None, Path]]:
    """(class or None, file) for each image in `folder` or one level below, sorted by name."""

    def images(of: Path) -> list[Path]:
        return sorted(f for f in of.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))

    flat: list[tuple[str | None, Path]] = [(None, file) for file in images(folder)]
    subfolders = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    classed: list[tuple[str | None, Path]] = [(d.name, file) for d in subfolders for file in images(d)]
    if flat and classed:
        raise UserError(
            f"folder {folder} has images beside class folders ({flat[0][1].name} and {classed[0][0]}/): keep "
            "either kind"
        )
    return flat or classed


def decode_image(path: Path) -> np.ndarray:
    """An image file -> uint8 [H, W, 1] (grey files) or [H, W, 3] (all others); UserError if it is none."""
    try:
        with PIL.Image.open(path, formats=("BMP", "JPEG", "PNG", "WEBP")) as image:
            if image.mode[0] in "IF":
                raise UserError(f"image {path} has more than 8 bits a channel: convert it to 8 bits")
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the decoders raise
        raise UserError(f"image {path} cannot be decoded: {error}") from error
    return pixels[:, :, None] if grey else pixels


class ImageFiles:
    """Image files as a column: indexed like the uint8 array [N, H, W, C] that they decode to.

    An index (integer, slice or integer array) reads just these files, decoded by Grain's threads. Raises
    UserError, naming the file, where one has another shape than the first.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, paths: Sequence[Path], *, num_threads: int = 16):
        self.paths = tuple(paths)
        self.num_threads = num_threads
        self.shape: tuple[int, ...] = (len(self.paths), *decode_image(self.paths[0]).shape)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):
            key = np.arange(*key.indices(len(self)))
        indices = np.asarray(key)
        if indices.ndim != 1:
            return self[indices.reshape(-1)].reshape(*indices.shape, *self.shape[1:])
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        row = 0
        for chunk in self._read(indices):
            images[row : row + len(chunk)] = chunk
            row += len(chunk)
        return images

    def _read(self, indices: np.ndarray) -> Iterator[list[np.ndarray]]:
        """The images, in order, in chunks: Grain's cost a record is several times that of a small image."""
        import grain  # 1.3 s, so only where files are read

        size = max(1, len(indices) // (2 * self.num_threads))
        chunks = [indices[i : i + size].tolist() for i in range(0, len(indices), size)]
        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads)
        records = grain.MapDataset.source(chunks).map(lambda chunk: [self._decode(i) for i in chunk])
        with contextlib.closing(iter(records.to_iter_dataset(options))) as reader:
            yield from reader

    def _decode(self, index: int) -> np.ndarray:
        image = decode_image(self.paths[index])
        if image.shape != self.shape[1:]:
            raise UserError(
                f"image {self.paths[index]} is {image.shape} but {self.paths[0]} is {self.shape[1:]}; "
                "all images of a folder must have one shape"
            )
        return image

    def digest(self) -> bytes:
        """For fingerprints: a hash of the files' names and sizes; reading them all would take too long."""
        digest = hashlib.sha256()
        for path in self.paths:
            name = f"{path.parent.name}/{path.name}:{path.stat().st_size};"
            digest.update(name.encode("utf-8", "surrogateescape"))
        return digest.digest()
