"""Photographs for denoising and restoration: patches to train on, and other images, whole, to test on.

No pixel is in both parts. `photos` needs no file: the two photographs that ship inside scikit-learn, of which
the left two thirds are for training and the right third for testing. `natural` takes the files of the folder
restoration/ of JAXGEN_DATA_DIR: trained on Kodak, Set14 and Set5, tested on BSD68 (or Set12).
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from jaxgen.data.originals import data_folders, read_verified
from jaxgen.data.source import Source
from jaxgen.types import UserError

# sha256 of the archives; all from the test sets of cszn/FFDNet and majedelhelou/denoising_datasets.
ARCHIVES = {
    "kodak8_crop500.zip": "1dc5259c091d9299e3efaf5010841239858184ed3a0d804c5cc26f5a8e25ac63",
    "set14_color.zip": "6f6cbf1a02b1ce13071b61780220d6da1e6741d2b771078381bcf7ad79b2113d",
    "set5_color.zip": "493a144e2cf101a1f795b94d61193d5873231fd2554a4ee8cac20ac6431d59ba",
    "bsd68_gray.zip": "92a0bfe5ae097cbcde9d69e19fd2f6bb9c15bc7d867f2a88a50b5b79176720db",
    "set12.zip": "e8b024533a2969fd882221d5f1115f2caa062cffbaf9187474ce47dd0d5f5589",
}
KERNELS = ("blur_kernels.npz", "9e6d07f7dafcd420e2ef4153db46199152cd9a928d972c21de547a0bd8894adc")
# Barbara, the man, Lena and the others of Set14 that are in Set12 too must not be trained on.
IN_SET12 = ("barbara", "lenna", "lena", "man", "monarch", "pepper", "foreman")
TRAINING = ("kodak8_crop500.zip", "set14_color.zip", "set5_color.zip")


@dataclasses.dataclass(frozen=True)
class Photographs:
    """patches: Source of uint8 [N, P, P, 1] for training; test: grey images uint8 [H, W], of any sizes."""

    patches: Source
    test: tuple[np.ndarray, ...]


def to_grey(image: ArrayLike) -> np.ndarray:
    """Luminance uint8 [H, W] of uint8 [H, W, 3] (ITU-R BT.601, rounded), or [H, W] as it is."""
    array = np.asarray(image)
    if array.ndim == 2:
        return array
    return np.rint(array[..., :3].astype(np.float64) @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)


def cut_patches(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All patches of size x size at multiples of `stride` of an image uint8 [H, W]: uint8 [N, size, size]."""
    if min(image.shape) < size:
        return np.zeros((0, size, size), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size))[::stride, ::stride]
    return windows.reshape(-1, size, size).copy()


def _folder() -> Path:
    folders = data_folders(None, ["restoration"])
    if not folders or not folders[0].is_dir():
        raise UserError(
            "data set 'natural' is missing: set JAXGEN_DATA_DIR to a folder that holds restoration/ with "
            f"{', '.join((*ARCHIVES, KERNELS[0]))}, or take data.source=photos, which needs no files."
        )
    return folders[0]


def _read(filename: str, sha256: str) -> bytes:
    return read_verified(_folder() / filename, sha256, "the test sets of cszn/FFDNet and cszn/DPIR")


def images_of(archive: str) -> dict[str, np.ndarray]:
    """{name: grey image uint8 [H, W]} of one of the `ARCHIVES`, by name."""
    with zipfile.ZipFile(io.BytesIO(_read(archive, ARCHIVES[archive]))) as file:
        return {
            Path(name).stem: to_grey(np.asarray(Image.open(io.BytesIO(file.read(name)))))
            for name in sorted(file.namelist())
            if name.endswith(".png")
        }


def gaussian_kernel(size: int, std: float) -> np.ndarray:
    """A Gaussian of standard deviation `std` pixels on size x size places, of sum 1, float64."""
    line = np.exp(-0.5 * np.square((np.arange(size) - (size - 1) / 2) / std))
    kernel = np.outer(line, line)
    return np.asarray(kernel / kernel.sum(), np.float64)


def blur_kernel(name: str) -> np.ndarray:
    """A kernel float64 [K, K] that sums to 1: levin09_1 to 8 (motion; Levin et al. 2009), kernels_12_1 to 12.

    "gaussian" is 5x5 of standard deviation 1, "flat" 5x5 of equal weights; they need no file. UserError for
    an unknown name.
    """
    if name == "flat":
        return np.full((5, 5), 1 / 25)
    if name == "gaussian":
        return gaussian_kernel(5, 1.0)
    with np.load(io.BytesIO(_read(*KERNELS)), allow_pickle=False) as kernels:
        if name not in kernels:
            raise UserError(
                f"unknown blur kernel {name!r}; choose gaussian, flat or one of {', '.join(sorted(kernels))}."
            )
        return np.asarray(kernels[name], np.float64)


def blur_kernels(name: str) -> np.ndarray:
    """The kernels of a set, float64 [N, K, K]: "levin09" are its eight, with zeros around to 27x27.

    Any other name is that of one kernel, as `blur_kernel` has it.
    """
    names = [f"levin09_{i}" for i in range(1, 9)] if name == "levin09" else [name]
    kernels = [blur_kernel(name) for name in names]
    size = max(len(kernel) for kernel in kernels)
    return np.stack([np.pad(kernel, (size - len(kernel)) // 2) for kernel in kernels])


def load_photographs(name: str, *, patch: int, stride: int) -> Photographs:
    """`photos`, `natural` (tested on BSD68) or `natural_set12`, with patches of patch x patch pixels.

    `photos_reversed` are the photos seen in a mirror, so that their left thirds are for testing.

    Raises UserError for an unknown name, missing or damaged files, and patches larger than all images.
    """
    if name in ("photos", "photos_reversed"):
        from sklearn.datasets import load_sample_images

        mirror = slice(None, None, -1 if name == "photos_reversed" else 1)
        photographs = [to_grey(image)[:, mirror] for image in load_sample_images().images]
        cuts = [2 * image.shape[1] // 3 for image in photographs]
        train = [image[:, :cut] for image, cut in zip(photographs, cuts, strict=True)]
        test = [image[:, cut:] for image, cut in zip(photographs, cuts, strict=True)]
    elif name in ("natural", "natural_set12"):
        train = [
            image
            for archive in TRAINING
            for title, image in images_of(archive).items()
            if not title.lower().startswith(IN_SET12)
        ]
        test = list(images_of("bsd68_gray.zip" if name == "natural" else "set12.zip").values())
    else:
        raise UserError(
            f"unknown photographs {name!r}; choose photos, photos_reversed, natural or natural_set12."
        )
    patches = np.concatenate([cut_patches(image, patch, stride) for image in train])
    if not len(patches):
        raise UserError(f"no photograph of {name} holds a patch of {patch}x{patch} pixels; ask for smaller.")
    source = Source(name, "train", {"image": patches[..., None]}, num_classes=None, num_levels=256)
    return Photographs(source, tuple(test))
