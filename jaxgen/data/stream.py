"""Batches as a pure function of (seed, step): resuming needs the step alone, and skipping costs nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from jaxgen.data.augment import augment, check_names
from jaxgen.data.source import Source, to_unit_range
from jaxgen.types import UserError


class Stream:
    """The endless training stream: the concatenation of one random permutation of the records per epoch.

    Row r of the batch of `step` sits at position p = step * batch_size + r of the stream and is record
    permutation(seed, epoch)[p % N] with epoch = p // N. Every epoch thus shows each record once, a batch may
    straddle epochs, and batch_size may exceed N.

    `stream(step)` gives the rows of this process, the process_index-th of process_count equal parts, so that
    the parts of all processes, concatenated, are the one-process batch, augmentation included.

    batch_size: rows of the global batch
    seed: 0 <= seed < 2**32
    augment: names from `AUGMENTATIONS`, applied in order to the images
    Raises UserError for arguments out of range and unknown augmentations.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        augment: tuple[str, ...] = (),
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_names(augment)
        if augment and "image" not in source.fields:
            raise UserError(f"data set {source.name!r} has no images to augment by {', '.join(augment)}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed} but must be at least 0 and below 2**32")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps after which every record has been seen: N / batch_size, rounded up."""
        return -(-len(self.source) // self.batch_size)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of `step`.

        Returns `image` float32 [b, H, W, C] in [-1, 1], `label` int32 [b], `tokens` int32 [b, ...], whichever
        the source has, with b = batch_size / process_count.
        """
        indices = self.indices(step)
        fields = {name: column[indices] for name, column in self.source.fields.items()}
        if self.augment:
            fields["image"] = augment(
                fields["image"],
                self.augment,
                seed=self.seed,
                step=step,
                batch_size=self.batch_size,
                rows=self._rows,
            )
        return _as_batch(fields, self.source.num_levels)

    def indices(self, step: int) -> np.ndarray:
        """The numbers of the records that are this process's rows of the batch of `step`: int64 [b]."""
        if step < 0:
            raise ValueError(f"step is {step} but must not be negative")
        num_records = len(self.source)
        position = step * self.batch_size + self._rows.start
        end = step * self.batch_size + self._rows.stop
        parts = []
        while position < end:
            epoch, start = divmod(position, num_records)
            part = self._permutation(epoch)[start : start + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.source))


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """`limit` records (default: all) in order, this process's rows of each batch of `batch_size`.

    Which records is a random choice, the same at every call and on every process. The fields are those of a
    training batch, and `mask` float32 [b]: the last batch is filled up with copies of the last record, whose
    mask is 0. Every process gets the same number of batches.
    Raises UserError for arguments out of range.
    """
    rows = _rows_of_process(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise UserError(f"the number of records to evaluate is {limit} but must be at least 1")
    num_records = len(source) if limit is None else min(limit, len(source))
    # Not the first: folders of images are sorted by class.
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:num_records])

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, num_records, batch_size):
            positions = np.arange(first + rows.start, first + rows.stop)
            indices = chosen[np.minimum(positions, num_records - 1)]
            fields = {name: column[indices] for name, column in source.fields.items()}
            mask = (positions < num_records).astype(np.float32)
            yield {**_as_batch(fields, source.num_levels), "mask": mask}

    return batches()


def _rows_of_process(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size} but must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"there is no process {process_index} among {process_count}")
    if batch_size % process_count:
        raise UserError(f"the batch size {batch_size} is not a multiple of the {process_count} processes")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _as_batch(fields: Mapping[str, np.ndarray], num_levels: int) -> dict[str, np.ndarray]:
    """Stored columns in the types that losses take: images float32 in [-1, 1], all else int32."""
    return {
        name: to_unit_range(column, num_levels) if name == "image" else column.astype(np.int32, copy=False)
        for name, column in fields.items()
    }
