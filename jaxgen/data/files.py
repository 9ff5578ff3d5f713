"""The user's own files: `.npz` arrays of images, and text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data.fingerprint import held_out
from jaxgen.data.originals import split_text
from jaxgen.data.source import Source
from jaxgen.types import UserError, unknown


def load_npz(path: str, split: str) -> Source:
    """Arrays `image` [N, H, W, C] or [N, H, W] and, if there, `label` [N] of a NumPy `.npz` file.

    Images are uint8, or floats in [0, 1], which are rounded to 256 levels; labels are whole numbers from 0.
    Plural names (`images`, `labels`) work too. Where `test_image` is there, it and `test_label` are the test
    split; else a tenth of the records, chosen by a hash of their positions, is. Pickled objects are not read.
    Raises UserError for whatever does not fit this.
    """
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    wanted = ("image", "images", "label", "labels")
    try:
        arrays: dict[str, Any] = {}
        # Opened here, because NumPy leaves a file open that proves to be no zip.
        with file.open("rb") as stored, np.load(stored, allow_pickle=False) as archive:
            names = list(archive.files)
            own_test = any(name in names for name in ("test_image", "test_images"))
            prefix = "test_" if own_test and split == "test" else ""
            for name in wanted:
                if prefix + name in names:
                    arrays[name.removesuffix("s")] = archive[prefix + name]
            labelled, test_labelled = (
                f"{own}label" in names or f"{own}labels" in names for own in ("", "test_")
            )
            # Labels of both splits, so that both agree on the number of classes.
            labels = [archive[n] for n in ("label", "labels", "test_label", "test_labels") if n in names]
    except Exception as error:  # whatever a foreign or damaged file makes zipfile, zlib and NumPy raise
        raise UserError(f"{file} cannot be read as a NumPy .npz file: {error}") from error

    if "image" not in arrays:
        raise UserError(f"{file} has no array 'image' (it has: {', '.join(names) or 'nothing'})")
    if own_test and labelled != test_labelled:
        raise UserError(f"{file} has labels for only one of train and test: give 'label' and 'test_label'")
    fields = {"image": _as_images(arrays["image"], file)}
    num_classes = None
    if "label" in arrays:
        checked = [_as_labels(label, file) for label in labels]
        num_classes = 1 + max(int(label.max()) for label in checked)
        fields["label"] = _as_labels(arrays["label"], file)
        if len(fields["label"]) != len(fields["image"]):
            raise UserError(
                f"{file} has {len(fields['image'])} images but {len(fields['label'])} labels for {split!r}"
            )
    if not own_test:
        chosen = [i for i in range(len(fields["image"])) if held_out(str(i)) == (split == "test")]
        fields = {name: column[chosen] for name, column in fields.items()}
    return Source(f"npz:{path}", split, fields, num_classes, num_levels=256)


def _as_images(images: Any, file: Path) -> np.ndarray:
    """The stored images as uint8 [N, H, W, C]."""
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "uf":
        raise UserError(f"{file}: images must be uint8, or floats in [0, 1], not {_kind(images)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{file}: images have shape {images.shape} but must be [N, height, width] or "
            "[N, height, width, channels] with 1 or 3 channels and N > 0"
        )
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise UserError(f"{file}: images contain NaN or infinity")
        if images.min() < 0 or images.max() > 1:
            raise UserError(
                f"{file}: float images must lie in [0, 1], not in [{images.min():.4g}, {images.max():.4g}]"
            )
        images = np.rint(images.astype(np.float64) * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise UserError(f"{file}: images must be uint8, or floats in [0, 1], not {_kind(images)}")
    return images


def _as_labels(labels: Any, file: Path) -> np.ndarray:
    """The stored labels as int32 [N]."""
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{file}: labels must be a list of whole numbers, not {_kind(labels)}")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= 2**31 - 1:
        raise UserError(f"{file}: labels must be whole numbers from 0")
    return labels.astype(np.int32)


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def load_text(path: str, split: str) -> Source:
    """A text file as `tokens` uint8 [N], its bytes: first 90 % train, 5 % validation, 5 % test.

    Raises UserError where there is no such file, or the split is empty.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        splits = split_text(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if split not in splits:
        raise unknown("split", split, tuple(splits))
    tokens = np.frombuffer(splits[split], np.uint8).copy()
    return Source(f"text:{path}", split, {"tokens": tokens}, num_classes=None, num_levels=256)
