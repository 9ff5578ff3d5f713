"""Where data comes from: a name -> one split, decoded in memory."""

from __future__ import annotations

import numpy as np

from jaxgen.data import cifar10_30k, tfds_builders
from jaxgen.data.files import load_npz, load_text
from jaxgen.data.folder import load_folder
from jaxgen.data.source import Source
from jaxgen.types import unknown

IN_MEMORY_BYTES = 8 * 2**30  # above this, a folder of images is read while training


def load_source(
    name: str, split: str, *, data_dir: str | None = None, max_bytes: int = IN_MEMORY_BYTES
) -> Source:
    """The data set `name`, one `split` of it.

    name: `digits` (bundled); `mnist`, `fashion_mnist`, `cifar10`, `tiny_shakespeare`, `cifar10_30k` (files in
        `<data_dir>/<name>`, or prepared before); `folder:PATH`, `npz:PATH`, `text:PATH` (the user's own)
    split: `train` or `test`; texts also have `validation`
    data_dir: only read from; default: the environment's JAXGEN_DATA_DIR. Prepared data goes to
        JAXGEN_CACHE_DIR (default ~/.cache/jaxgen); TFDS_DATA_DIR is looked into for prepared sets
    max_bytes: a folder of images that decodes to more stays on disk and is read through Grain
    Never uses the network. Raises UserError, one sentence, for an unknown name or split and for data that is
    missing, damaged, empty or of the wrong shape or type.
    """
    kind, _, path = name.partition(":")
    if path and kind == "folder":
        return load_folder(path, split, max_bytes=max_bytes)
    if path and kind == "npz":
        return load_npz(path, split)
    if path and kind == "text":
        return load_text(path, split)

    splits: dict[str, tuple[str, ...]] = {
        "digits": ("train", "test"),
        "cifar10_30k": ("train", "test"),
        **{b.name: tuple(b.num_examples) for b in tfds_builders.BUILDERS.values()},
    }
    if name not in splits:
        raise unknown("data set", name, (*splits, "folder:PATH", "npz:PATH", "text:PATH"))
    if split not in splits[name]:
        raise unknown(f"split of {name!r}", split, splits[name])
    if name == "digits":
        return load_digits(split)
    if name == "cifar10_30k":
        return cifar10_30k.load(split, data_dir)
    return tfds_builders.load(name, split, data_dir)


def load_digits(split: str) -> Source:
    """The 1,797 handwritten digits that ship inside scikit-learn (UCI optical digits, test part), 8x8, 0..16.

    Test are 360 images, about as many of each class, drawn once; the other 1,437 are for training. The file
    goes round the classes (0, 1, …, 9, 0, …), so to take every fifth would favour some.
    """
    from sklearn.datasets import load_digits as bundled  # 0.8 s

    digits = bundled()
    in_test = np.zeros(len(digits.target), bool)
    in_test[np.random.default_rng(0).permutation(len(in_test))[:360]] = True
    chosen = in_test if split == "test" else ~in_test
    fields = {
        "image": digits.images[chosen].astype(np.uint8)[..., None],
        "label": digits.target[chosen].astype(np.int32),
    }
    return Source("digits", split, fields, num_classes=10, num_levels=17)
