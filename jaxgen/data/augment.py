"""Random changes to training images, drawn for the whole batch whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from jaxgen.types import UserError, unknown

# (generator, B) -> draws [B, ...]
Draw: TypeAlias = Callable[[np.random.Generator, int], np.ndarray]
# (images uint8 [b, H, W, C], their draws [b, ...]) -> images uint8 [b, H, W, C]
Apply: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


def draw_flips(generator: np.random.Generator, num: int) -> np.ndarray:
    """A fair coin an image: bool [num]."""
    return generator.random(num) < 0.5


def flip(images: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Mirror left and right the images [b, H, W, C] for which `flips` [b] is true."""
    flipped = images.copy()
    flipped[flips] = images[flips, :, ::-1]
    return flipped


def draw_offsets(generator: np.random.Generator, num: int) -> np.ndarray:
    """Where the crop begins in the padded image, down and right: int [num, 2], each uniform on 0..8."""
    return generator.integers(0, 9, (num, 2))


def crop4(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pad images [b, H, W, C] by 4 pixels of value 0 on each side and cut H x W out at `offsets` [b, 2]."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    cropped = np.empty_like(images)
    for i, (down, right) in enumerate(offsets.tolist()):  # copies of blocks: faster than one gather of pixels
        cropped[i] = padded[i, down : down + height, right : right + width]
    return cropped


# The salts keep the draws apart. They are not 0: NumPy seeds [seed, step, 0] and [seed, step] alike, and the
# latter belongs to the shuffle.
AUGMENTATIONS: dict[str, tuple[int, Draw, Apply]] = {
    "flip": (1, draw_flips, flip),
    "crop4": (2, draw_offsets, crop4),
}


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for an augmentation that does not exist or is named twice."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, tuple(AUGMENTATIONS))
    if len(set(names)) != len(names):
        raise UserError(f"an augmentation is named twice in {', '.join(names)}")


def augment(
    images: np.ndarray, names: Sequence[str], *, seed: int, step: int, batch_size: int, rows: slice
) -> np.ndarray:
    """Apply `names`, in order, to the uint8 images that are the `rows` of the batch of `step`."""
    for name in names:
        salt, draw, apply = AUGMENTATIONS[name]
        images = apply(images, draw(np.random.default_rng([seed, step, salt]), batch_size)[rows])
    return images
