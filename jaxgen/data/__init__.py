"""The data path: sources, batches as a pure function of (seed, step), and their way to the device."""

from jaxgen.data.augment import AUGMENTATIONS
from jaxgen.data.folder import ImageFiles
from jaxgen.data.load import load_source
from jaxgen.data.prefetch import prefetch
from jaxgen.data.source import Source, from_unit_range, to_unit_range
from jaxgen.data.stream import Stream, evaluation_batches

__all__ = [
    "AUGMENTATIONS",
    "ImageFiles",
    "Source",
    "Stream",
    "evaluation_batches",
    "from_unit_range",
    "load_source",
    "prefetch",
    "to_unit_range",
]
