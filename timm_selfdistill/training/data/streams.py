"""Streamed images, which have no index: `datasets` in streaming mode."""

import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .images import ValueRanges, read_image, undecoded
from .labels import NO_LABEL, check_range
from .sampling import ATTEMPTS, NO_INDEX, Batch, IndexedImages, mixed_seed, seeded

if TYPE_CHECKING:
    import datasets

    from ...hub import ImageSource
    from .transforms import Transform

Row: TypeAlias = dict[str, Any]
"""Row of a `datasets` table, by column."""

FEW_SHARDS = 4
"""Shards per process below which an uneven division of shards would be too unbalanced."""


def row_count(rows: Any) -> int | None:
    """Return the number of rows of a `datasets` table; None for a stream of unknown length."""
    if hasattr(rows, "__len__"):
        return len(rows)
    split = (rows.info.splits or {}).get(str(rows.split))
    return split.num_examples or None if split else None


class StreamedImages(IterableDataset[tuple[Tensor, int] | None]):
    """Iterable dataset of (image (C, H, W), class index) from a `datasets.IterableDataset`, each row once.

    Args: see `ImageDataset`.
    """

    skips_unreadable = False
    """Whether an image that cannot be read is replaced by None."""
    augmented: bool | None = None
    data_config: dict[str, Any] | None = None
    class_names: Sequence[str] = ()
    """All three as in `ImageDataset`."""

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        image_column: str,
        label_column: str | None,
        transform: "Transform",
        mode: str,
        num_classes: int | None,
        source: "ImageSource | None" = None,
        ranges: ValueRanges | None = None,
        label_map: list[int] | None = None,
    ):
        self.rows = undecoded(rows, image_column, label_column)
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.mode, self.ranges = transform, mode, ranges
        self.num_classes, self.label_map = num_classes, label_map
        self.source, self.shards = source, rows.num_shards

    @property
    def length(self) -> int | None:
        """Number of rows of the whole split, if known."""
        return row_count(self.rows)

    def split_by_node(self, rank: int, world_size: int, workers: int) -> "StreamedImages":
        """Return the part of the stream that one of several processes reads: every `world_size`-th shard, or if there
        are few shards that do not divide evenly, every `world_size`-th row of all shards.

        Args:
            workers: number of DataLoader workers; if there are too few parquet files for all of them, row groups are
                divided instead.
        """
        from datasets.distributed import split_dataset_by_node

        rows, part = self.rows, copy(self)
        if rows.num_shards % world_size or rows.num_shards < world_size * max(workers, 1):
            rows = rows.reshard()
        if rows.num_shards % world_size and rows.num_shards >= FEW_SHARDS * world_size:
            part.rows = rows.shard(world_size, rank, contiguous=False)
        else:
            part.rows = split_dataset_by_node(rows, rank, world_size)
        part.shards = rows.num_shards
        return part

    def image(self, row: Row, number: int) -> Tensor:
        """Return the image of a row.

        Args:
            number: number of the row, for the error message.

        Raises:
            ValueError: the image cannot be read.
        """
        return self.transform(read_image(row[self.image_column], self.mode, number, self.ranges))

    def label(self, row: Row) -> int:
        """Return the class index of a row, or -1 without a label column.

        Raises:
            ValueError: it is missing or not below `num_classes`.
        """
        if self.label_column is None:
            return NO_LABEL
        label = row[self.label_column]
        if label is None:
            raise ValueError(f"a row of the stream has no label in column {self.label_column!r}")
        if self.label_map is not None and 0 <= label < len(self.label_map):
            return self.label_map[label]
        if self.num_classes is not None:
            check_range(label, label, self.num_classes, self.label_column)
        return label

    def __iter__(self) -> Iterator[tuple[Tensor, int] | None]:
        for number, row in enumerate(self.rows):
            label = self.label(row)
            try:
                yield self.image(row, number), label
            except (OSError, ValueError):
                if not self.skips_unreadable:
                    raise
                yield None


class Place(NamedTuple):
    """Position of a DataLoader worker in its part of the stream, after a batch."""

    worker: int
    """Number of the DataLoader worker."""
    rows: dict[str, Any] | None
    """State of `datasets` at the start of the block; None is the start of the stream."""
    block: int
    offset: int
    """Number of rows of the block that were already read."""


class TrainStream(IterableDataset[tuple[Batch, Place] | None]):
    """Batches of one pass through a process's part of the stream, each with the position after it.

    The order of the shards depends on (seed, pass). Rows are read and shuffled in blocks; their order and augmentation
    depend on (seed, pass, process, DataLoader worker, block), so that a stream can be resumed from any position. The
    last, incomplete batch of each DataLoader worker is dropped.

    Args:
        data: the part of the stream that the process reads.
        block: number of rows shuffled together.
        on_bad_sample: "raise", or "skip" to skip a row that cannot be read; the next row carries the count.
    """

    def __init__(self, data: StreamedImages, batch_size: int, block: int, seed: int, rank: int, on_bad_sample: str):
        self.data, self.batch_size, self.block, self.seed, self.rank = data, batch_size, block, seed, rank
        self.on_bad_sample = on_bad_sample
        self.number = self.next_worker = 0
        self.places: dict[int, Place] = {}

    def begin(self, number: int, next_worker: int = 0, places: dict[int, Place] | None = None) -> None:
        """Set the number of the pass and, to resume within it, the next worker and the positions of all workers."""
        self.number, self.next_worker, self.places = number, next_worker, places or {}
        # Not in the DataLoader workers, which share it. `datasets` takes epoch 0 as "not shuffled".
        self.data.rows.set_epoch(1 + mixed_seed(self.seed, number))

    def __iter__(self) -> Iterator[tuple[Batch, Place] | None]:
        """Iterate over batches with positions; None stands for a batch that was already consumed."""
        info = get_worker_info()
        worker = info.id if info else 0
        if worker < self.next_worker:
            yield None  # torch starts with the first worker
        begin = self.places.get(worker, Place(worker, None, 0, 0))
        samples: list[tuple[Tensor, int, int, int]] = []
        for place, sample in self._samples(begin):
            samples.append((*sample, NO_INDEX))
            if len(samples) == self.batch_size:
                yield default_collate(samples), place
                samples = []

    def _samples(self, begin: Place) -> Iterator[tuple[Place, tuple[Tensor, int, int]]]:
        """Yield samples (image, label, number of unreadable rows before it), each with the position after it."""
        unreadable = 0
        for place, block in self._blocks(begin):
            draw = np.random.default_rng([self.seed, self.number, self.rank, place.worker, place.block])
            order, seeds = draw.permutation(len(block)).tolist(), draw.integers(2**63 - 1, size=len(block)).tolist()
            for position in range(place.offset, len(block)):
                index = order[position]
                row, block[index] = block[index], {}  # frees memory for the next block
                label = self.data.label(row)
                try:
                    with seeded(seeds[position]):
                        image = self.data.image(row, place.block * self.block + index)
                except (OSError, ValueError) as error:
                    unreadable += 1
                    if self.on_bad_sample == "raise":
                        raise
                    if unreadable > ATTEMPTS:
                        raise ValueError(
                            f"{unreadable} consecutive rows of the stream cannot be read; last error: {error}"
                        ) from error
                    continue
                yield place._replace(offset=position + 1), (image, label, unreadable)
                unreadable = 0

    def _blocks(self, place: Place) -> Iterator[tuple[Place, list[Row]]]:
        rows = self.data.rows
        if place.rows is not None:
            rows.load_state_dict(place.rows)
        stream = iter(rows)
        for number in count(place.block):
            block = list(islice(stream, self.block))
            if not block:
                return
            if place == (0, None, 0, 0) and not self.number and not self.rank:
                self._check_mixed(block)
            yield place, block
            place = Place(place.worker, rows.state_dict(), number + 1, 0)

    def _check_mixed(self, block: list[Row]) -> None:
        """Warn if the rows are sorted by class, as those of a folder are."""
        classes = self.data.num_classes
        if self.data.label_column is None or classes is None:
            return
        found = len({self.data.label(row) for row in block})
        expected = classes * (1 - (1 - 1 / classes) ** len(block))
        if found < expected / 2:
            warnings.warn(
                f"the first {len(block)} rows of the stream contain only {found} of {classes} classes: the rows seem to"
                " be sorted by class, which harms training; write them in random order, or leave out streaming",
                stacklevel=2,
            )


RunImages: TypeAlias = IndexedImages | StreamedImages
"""Datasets that `Trainer` accepts for training and validation."""
