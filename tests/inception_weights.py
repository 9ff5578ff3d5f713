"""Made-up weights of FID's InceptionV3, by the names in pytorch-fid's file."""

import json
import math
import struct

import numpy as np

from jaxgen.interop.inception import expected_tensors


def random_weights():
    """Tensors under which signals neither grow nor fade, each normalisation far from doing nothing."""
    rng = np.random.default_rng(0)

    def make(name, shape):
        kind = name.rsplit(".", 1)[-1]
        if len(shape) == 1:
            return {
                "weight": 1 + 0.2 * rng.normal(size=shape),
                "running_var": rng.uniform(0.5, 1.5, shape),
            }.get(kind, 0.2 * rng.normal(size=shape))
        return rng.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))

    return {name: make(name, shape).astype(np.float32) for name, shape in expected_tensors().items()}


def write_blank_weights(path):
    """A safetensors file of the right tensors, all zero, which takes no room on the disk."""
    header, end = {}, 0
    for name, shape in expected_tensors().items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
