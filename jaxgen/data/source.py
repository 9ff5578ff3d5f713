"""A decoded data set, and the two maps between stored pixels and what a network sees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.data.fingerprint import fingerprint
from jaxgen.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set, decoded once.

    name, split: what was loaded
    fields: columns of equal length N: `image` uint8 [N, H, W, C], `label` int32 [N], `tokens` uint8 or int32
        [N, ...]; NumPy arrays, or for folders too large for memory an `ImageFiles`, which is indexed like one
    num_classes: labels lie in [0, num_classes); None where there are no labels
    num_levels: pixel values lie in [0, num_levels); 256, or 17 for the bundled digits
    Raises UserError where the columns do not fit this description.
    """

    name: str
    split: str
    fields: Mapping[str, Any]
    num_classes: int | None
    num_levels: int

    def __post_init__(self) -> None:
        def require(holds: bool, problem: str) -> None:
            if not holds:
                raise UserError(f"data set {self.name!r}, split {self.split!r}: {problem}")

        require(bool(self.fields), "it has no fields")
        for name, column in self.fields.items():
            require(column.ndim >= 1 and len(column) > 0, f"{name} is empty (shape {column.shape})")
        lengths = {name: len(column) for name, column in self.fields.items()}
        require(len(set(lengths.values())) == 1, f"the fields differ in length: {lengths}")

        if "image" in self.fields:
            image = self.fields["image"]
            require(image.dtype == np.uint8, f"images must be uint8, not {image.dtype}")
            require(
                image.ndim == 4 and 0 not in image.shape,
                f"images must be [N, height, width, channels], not of shape {image.shape}",
            )
            if self.num_levels < 256:
                top = int(np.max(image))
                require(top < self.num_levels, f"pixel value {top} is not below {self.num_levels}")
        if "label" in self.fields:
            label = self.fields["label"]
            require(label.dtype == np.int32 and label.ndim == 1, f"labels are {label.dtype} {label.shape}")
            require(self.num_classes is not None, "it has labels but no number of classes")
            low, high = int(np.min(label)), int(np.max(label))
            require(low >= 0 and high < (self.num_classes or 0), f"labels {low} to {high} leave the classes")

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: field names, dtypes, shapes and bytes."""
        return fingerprint(self.fields)


def to_unit_range(image_uint8: np.ndarray, num_levels: int) -> np.ndarray:
    """Pixel values {0, ..., num_levels - 1} of any shape -> float32 2 x / (num_levels - 1) - 1 in [-1, 1].

    Correctly rounded; both ends are met exactly. Raises ValueError where a value is not below `num_levels`.
    """
    if image_uint8.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, not {image_uint8.dtype}")
    top = num_levels - 1
    if top < 255 and image_uint8.size and image_uint8.max() > top:
        raise ValueError(f"pixel value {image_uint8.max()} is not below num_levels = {num_levels}")
    x = np.multiply(image_uint8, np.float32(2))
    x -= np.float32(top)  # whole numbers until here, so that the division is the only rounding
    x /= np.float32(top)
    return x


def from_unit_range(x: np.ndarray, num_levels: int) -> np.ndarray:
    """Float images in [-1, 1] of any shape -> the nearest pixel value, uint8; what lies outside is clipped.

    The inverse of `to_unit_range`. Raises ValueError on NaN, which is no pixel.
    """
    scaled = (np.asarray(x, np.float32) + 1.0) * ((num_levels - 1) / 2.0)
    if np.isnan(scaled).any():
        raise ValueError("NaN cannot be turned into a pixel")
    return np.rint(np.clip(scaled, 0, num_levels - 1)).astype(np.uint8)
