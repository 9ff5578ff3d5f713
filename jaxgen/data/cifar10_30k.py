"""A subset of CIFAR-10 (Krizhevsky 2009): 30,000 of the 50,000 training and 9,966 of the 10,000 test images.

The images are the official ones, pixel for pixel, with their labels; the training set is balanced (3,000 a
class), the test set lacks 1 horse and 33 ships. Numbers reported on it must say that they are on this subset:
they are not comparable with published CIFAR-10 results, which train on 50,000 images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from jaxgen.data import cache
from jaxgen.data.originals import data_folders
from jaxgen.data.source import Source
from jaxgen.types import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """Arrays `<split>_r` and `<split>_y` of a file, with the sha256 of decoded pixels and of labels."""

    filename: str
    pixels_sha256: str
    labels_sha256: str


# The pixels' checksums are those published with the files; the labels' were taken from the files.
PARTS: dict[str, tuple[Part, ...]] = {
    "train": (
        Part(
            "cifar10_20k_5k.npz",
            "353c670a5d1209677499d2f0eb689d244b546c2f1a72d1be1db18c2e64c934d3",
            "296a5410adaa8ef50b536f7635cdfc297e4bfd3b52b1ac10a0e71affdd12e9c8",
        ),
        Part(
            "cifar10_train_more.npz",
            "aa856194f66530de57a62e8fbbf9181efac2d9acced56d4ef4448d419a12994d",
            "f24756e9fc27107597cd054b9df7247b4e5ab61780d1e5d55e7b1015307573de",
        ),
    ),
    "test": (
        Part(
            "cifar10_20k_5k.npz",
            "99a4a6eda519ce6d6f78a16c95bfe680190575c71f18cc0d9c36e57623aa4e7f",
            "c9a54e6bf707245247bf724c88fc4a21e5cac18c8d2d759bc64d14a3b99c008a",
        ),
        Part(
            "cifar10_test_rest.npz",
            "38e65cace777a2b52ded62b5dffbd1d370aca7fc82b794a9b7dd83f2954f9e28",
            "ef797e9fbb4515fb1ddade2d3451bf2f3754c4b0b471fb7708371a8741feab42",
        ),
    ),
}
FILENAMES = sorted({part.filename for parts in PARTS.values() for part in parts})


def present(folder: Path) -> bool:
    """Whether `folder` holds the files of the subset."""
    return all((folder / filename).is_file() for filename in FILENAMES)


def load(split: str, data_dir: str | None) -> Source:
    """One split, from the decoded cache, else from `<data_dir>/cifar10`.

    Raises UserError where the files are missing or do not have the known content.
    """
    decoded = cache.cache_dir() / "decoded" / "cifar10_30k" / split
    source = cache.fetch(decoded)
    if source is None:
        folder = next(iter(data_folders(data_dir, ["cifar10"])), None)
        if folder is None or not present(folder):
            raise UserError(
                f"data set 'cifar10_30k' is missing: looked for {', '.join(FILENAMES)} in "
                f"{folder or 'no folder, because neither --data_dir nor JAXGEN_DATA_DIR is set'}; give the "
                "folder above them, or use 'cifar10', whose files are published"
            )
        parts = [_read(folder / part.filename, split, part) for part in PARTS[split]]
        fields = {
            "image": np.concatenate([images for images, _ in parts]),
            "label": np.concatenate([labels for _, labels in parts]).astype(np.int32),
        }
        source = Source("cifar10_30k", split, fields, num_classes=10, num_levels=256)
        cache.store(decoded, source)
    return source


def undo_differences(differences: np.ndarray) -> np.ndarray:
    """Stored planes (G, R - G, B - G) [3, N, H, W], each as differences along rows and columns, -> RGB.

    Returns [N, H, W, 3]; all is uint8, modulo 256.
    """
    planes = np.cumsum(np.cumsum(differences, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    return np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], axis=-1)


def _read(path: Path, split: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            images = undo_differences(arrays[f"{split}_r"])
            labels = arrays[f"{split}_y"]
    except Exception as error:  # whatever a damaged zip makes NumPy raise: the remedy is the same
        raise UserError(f"{path} is damaged ({error}): get it again") from error
    for what, array, expected in (
        ("pixels", images, part.pixels_sha256),
        ("labels", labels, part.labels_sha256),
    ):
        found = hashlib.sha256(array.tobytes()).hexdigest()
        if found != expected:
            raise UserError(
                f"{path} is damaged: the sha256 of its decoded {split} {what} is {found} but should be "
                f"{expected}; get it again"
            )
    return images, labels
