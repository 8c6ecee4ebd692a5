"""Images that come one after the other, without an index: `datasets` in streaming mode."""
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .images import decode_image, to_mode
from .labels import check_range
from .sampling import ATTEMPTS, seeded

Batch = tuple[Tensor, Tensor, Tensor]


class StreamedImages(IterableDataset):
    """Rows of a `datasets.IterableDataset` as (image (C, H, W), class index), each once.

    Args: see `ImageDataset`.
    """

    skips_unreadable = False
    """Whether None takes the place of an image that cannot be read."""

    def __init__(self, rows: datasets.IterableDataset, image_column: str, label_column: str, transform: Any, mode: str,
                 num_classes: int, source: dict[str, Any] | None = None):
        rows = rows.select_columns([image_column, label_column])
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.mode = transform, mode
        self.num_classes, self.source = num_classes, source

    @property
    def length(self) -> int | None:
        """Rows of the whole split, where its description tells."""
        split = (self.rows.info.splits or {}).get(str(self.rows.split))
        return split.num_examples or None if split else None

    def share(self, rank: int, world_size: int, workers: int) -> "StreamedImages":
        """What one of several processes reads: some shards, or where they do not divide, one row of so many.

        Args:
            workers: loading processes; files are divided into smaller shards where there are too few for all.
        """
        share = StreamedImages.__new__(StreamedImages)
        share.__dict__.update(self.__dict__)
        rows = self.rows.reshard() if self.rows.num_shards < world_size * workers else self.rows
        share.rows = split_dataset_by_node(rows, rank, world_size)
        return share

    def image(self, row: dict[str, Any], number: int) -> Tensor:
        """The image of a row.

        Args:
            number: of the row, for the error message.

        Raises:
            ValueError: it cannot be read.
        """
        return self.transform(to_mode(decode_image(row[self.image_column], number), self.mode))

    def label(self, row: dict[str, Any]) -> int:
        """The class index of a row.

        Raises:
            ValueError: it is none of `num_classes`.
        """
        label = row[self.label_column]
        if label is None:
            raise ValueError(f"a row of the stream has no label in column {self.label_column!r}")
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
    """Where a loading process stands in its share of the stream, after a batch."""

    reader: int
    """The loading process."""
    rows: dict[str, Any] | None
    """State of `datasets` where the block begins; None is the beginning."""
    block: int
    offset: int
    """Rows of the block that are behind us."""


class TrainStream(IterableDataset):
    """Batches of one pass through a process's share of the stream, each with the place behind it.

    The order of the shards depends on (seed, pass). Rows are read in blocks, which are shuffled; order and augmentation
    depend on (seed, pass, process, loading process, block), so that the stream goes on from any place as it would have.
    The last, incomplete batch of each loading process is left out.

    Args:
        data: the process's share.
        block: rows that are shuffled together.
        on_bad_sample: "raise", or "skip": a row that cannot be read is left out; the row after it counts it.
    """

    def __init__(self, data: StreamedImages, batch_size: int, block: int, seed: int, rank: int, on_bad_sample: str):
        self.data, self.batch_size, self.block, self.seed, self.rank = data, batch_size, block, seed, rank
        self.on_bad_sample = on_bad_sample
        self.number, self.next_reader, self.places = 0, 0, {}

    def begin(self, number: int, next_reader: int = 0, places: dict[int, Place] | None = None) -> None:
        """Set the pass, and in the middle of one, whose batch comes first and where everyone stands."""
        self.number, self.next_reader, self.places = number, next_reader, places or {}
        # Not in the loading processes, which share it. `datasets` takes 0 for "not shuffled".
        self.data.rows.set_epoch(1 + self.seed + number)

    def __iter__(self) -> Iterator[tuple[Batch, Place] | None]:
        """None stands for a batch that was taken before."""
        worker = get_worker_info()
        reader = worker.id if worker else 0
        if reader < self.next_reader:
            yield None  # torch begins with the first loading process
        begin = self.places.get(reader, Place(reader, None, 0, 0))
        samples: list[tuple[Tensor, int, int]] = []
        for place, sample in self._samples(begin):
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield default_collate(samples), place
                samples = []

    def _samples(self, begin: Place) -> Iterator[tuple[Place, tuple[Tensor, int, int]]]:
        """Samples (image, label, unreadable rows before it) after a place, each with the place behind it."""
        for place, block in self._blocks(begin):
            draw = np.random.default_rng([self.seed, self.number, self.rank, place.reader, place.block])
            order, seeds = draw.permutation(len(block)), draw.integers(2**63 - 1, size=len(block))
            unreadable = 0
            for position in range(place.offset, len(block)):
                index = int(order[position])
                label = self.data.label(block[index])
                try:
                    with seeded(int(seeds[position])):
                        image = self.data.image(block[index], place.block * self.block + index)
                except (OSError, ValueError):
                    unreadable += 1
                    if self.on_bad_sample == "raise" or unreadable > ATTEMPTS:
                        raise
                    continue
                yield place._replace(offset=position + 1), (image, label, unreadable)
                unreadable = 0

    def _blocks(self, place: Place) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
        rows = self.data.rows
        if place.rows is not None:
            rows.load_state_dict(place.rows)
        stream = iter(rows)
        for number in count(place.block):
            block = list(islice(stream, self.block))
            if not block:
                return
            yield place, block
            place = Place(place.reader, rows.state_dict(), number + 1, 0)


def first_row(rows: datasets.IterableDataset, split_name: str) -> dict[str, Any]:
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"the {split_name} split is empty")
    return row
