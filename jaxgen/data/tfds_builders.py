"""The public data sets, as TFDS builders of stock name, version and features, prepared without TensorFlow.

The stock builders read their originals through TensorFlow's file layer and encode images with it. Here a
subclass of the stock builder replaces just the reading; the name, version, features, keys (and with them the
order of the records) and the file layout stay the stock ones, so `tfds.data_source` reads the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jaxgen.data import cache, cifar10_30k, originals
from jaxgen.data.notes import note
from jaxgen.data.source import Source
from jaxgen.types import UserError


@dataclasses.dataclass(frozen=True)
class Builder:
    """What jaxgen knows of a stock builder.

    version: asked of TFDS, which refuses another one; part of the paths of prepared data
    num_examples: {split: number of records}
    examples: takes the original files apart, {file name: bytes} -> {split: examples}
    num_classes: None for text
    folders: names under data_dir where the originals may lie
    """

    name: str
    version: str
    num_examples: Mapping[str, int]
    examples: Callable[[Mapping[str, bytes]], dict[str, originals.Examples]]
    num_classes: int | None
    folders: tuple[str, ...]


BUILDERS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        Builder(
            name="mnist",
            version="3.0.1",
            num_examples={"train": 60000, "test": 10000},
            examples=originals.mnist_examples,
            num_classes=10,
            folders=("mnist",),
        ),
        Builder(
            name="fashion_mnist",
            version="3.0.1",
            num_examples={"train": 60000, "test": 10000},
            examples=originals.mnist_examples,
            num_classes=10,
            folders=("fashion_mnist",),
        ),
        Builder(
            name="cifar10",
            version="3.0.2",
            num_examples={"train": 50000, "test": 10000},
            examples=originals.cifar10_examples,
            num_classes=10,
            folders=("cifar10",),
        ),
        Builder(
            name="tiny_shakespeare",
            version="1.0.0",
            num_examples={"train": 1, "validation": 1, "test": 1},
            examples=originals.tiny_shakespeare_examples,
            num_classes=None,
            folders=("tiny_shakespeare", "tinyshakespeare"),
        ),
    )
}


def load(name: str, split: str, data_dir: str | None) -> Source:
    """One split of a builder: from the decoded cache, else from prepared records, else from the originals.

    Raises UserError where the data set is nowhere, its original is damaged, or the cache cannot be written.
    """
    builder = BUILDERS[name]
    decoded = cache.cache_dir() / "decoded" / f"{name}-{builder.version}" / split
    source = cache.fetch(decoded)
    if source is None:
        source = decode(_find_prepared(builder) or _prepare(builder, data_dir), builder, split)
        cache.store(decoded, source)
    return source


def registered_originals(name: str) -> tuple[originals.Original, ...]:
    """The files that the stock builder would download, with TFDS's own checksums."""
    import tensorflow_datasets as tfds

    return tuple(
        originals.Original(filename=info.filename, address=address, sha256=info.checksum)
        for address, info in sorted(tfds.builder_cls(name).url_infos.items())
    )


def _prepared_places(builder: Builder) -> list[Path]:
    roots = [Path(os.environ["TFDS_DATA_DIR"])] if os.environ.get("TFDS_DATA_DIR") else []
    return [root / builder.name / builder.version for root in [*roots, cache.cache_dir() / "tfds"]]


def _find_prepared(builder: Builder) -> Path | None:
    # Records in TFDS's default format, tfrecord, cannot be read without TensorFlow: as good as absent.
    for place in _prepared_places(builder):
        if (place / "dataset_info.json").is_file() and any(place.glob("*.array_record*")):
            return place
    return None


def _prepare(builder: Builder, data_dir: str | None) -> Path:
    """Write the records of all splits to the cache from the originals, and return their folder."""
    files = _read_originals(builder, data_dir)
    target = cache.cache_dir() / "tfds" / builder.name / builder.version
    note(f"Preparing {builder.name} in {target}; this takes some seconds, once.")
    try:
        (cache.cache_dir() / "tfds").mkdir(parents=True, exist_ok=True)
        # A folder of its own, then a rename: two processes, or one that is killed, leave nothing half done.
        with tempfile.TemporaryDirectory(dir=cache.cache_dir() / "tfds", prefix=".preparing-") as work:
            prepared = _write_records(builder, builder.examples(files), Path(work))
            target.parent.mkdir(exist_ok=True)
            try:
                prepared.rename(target)
            except OSError:
                if not (target / "dataset_info.json").is_file():  # else another process was first
                    raise
    except OSError as error:
        raise cache.cannot_write(target, error) from error
    return target


def _read_originals(builder: Builder, data_dir: str | None) -> dict[str, bytes]:
    wanted = registered_originals(builder.name)
    folders = originals.data_folders(data_dir, builder.folders)
    folder = originals.find(wanted, folders)
    if folder is None:
        advice = ""
        if builder.name == "cifar10" and any(cifar10_30k.present(place) for place in folders):
            advice = f"; {folders[0]} does hold the subset 'cifar10_30k', a data set of its own"
        prepared = [f"{place} (prepared as array_record)" for place in _prepared_places(builder)]
        absent = [o for o in wanted if not any((place / o.filename).is_file() for place in folders)]
        raise originals.missing(builder.name, absent or wanted, [*map(str, folders), *prepared], advice)
    return {o.filename: originals.read_verified(folder / o.filename, o.sha256, o.address) for o in wanted}


def _write_records(builder: Builder, splits: Mapping[str, originals.Examples], data_dir: Path) -> Path:
    import tensorflow_datasets as tfds

    stock: Any = tfds.builder_cls(builder.name)

    class WithoutTensorFlow(stock, skip_registration=True):  # type: ignore[call-arg]
        name = stock.name

        def _split_generators(self, dl_manager):
            del dl_manager  # the originals are read and checked already
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from examples

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads, which it does not
        writer = WithoutTensorFlow(data_dir=data_dir, version=builder.version, file_format="array_record")
        writer.download_and_prepare(
            download_dir=data_dir / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return Path(writer.data_dir)


def decode(prepared: Path, builder: Builder, split: str) -> Source:
    """Read all records of a split from `prepared`, in TFDS's order, into arrays.

    Raises UserError where the records are damaged or not as many as the data set has.
    """
    import tensorflow_datasets as tfds

    try:
        reader = tfds.builder_from_directory(prepared)
        # Images are asked for as PNG bytes: TFDS's own decoding takes twice the time.
        features = () if builder.num_classes is None else ("image",)
        decoders = {feature: tfds.decode.SkipDecoding() for feature in features}
        records = reader.as_data_source(split, decoders=decoders or None)
        rows: Sequence[Mapping[str, Any]] = records.__getitems__(range(len(records)))
        if len(rows) != builder.num_examples[split]:
            raise ValueError(f"{len(rows)} records where {builder.num_examples[split]} are expected")
        fields: dict[str, np.ndarray]
        if builder.num_classes is None:
            fields = {"tokens": np.frombuffer(rows[0]["text"], np.uint8).copy()}
        else:
            images = [np.asarray(PIL.Image.open(io.BytesIO(row["image"]))) for row in rows]
            shape = reader.info.features["image"].shape
            fields = {
                "image": np.stack(images).reshape(-1, *shape),
                "label": np.asarray([row["label"] for row in rows], np.int32),
            }
    except Exception as error:  # whatever damaged records make the readers raise: the remedy is the same
        raise UserError(
            f"the records of {builder.name!r} in {prepared} are damaged ({error}): delete that folder"
        ) from error
    return Source(builder.name, split, fields, builder.num_classes, num_levels=256)
