"""Batches of a run's images on every process."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypedDict, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..config import TrainConfig
from ..runtime.interrupt import leave_process_group
from .sampling import DRAWS, Batch, Draw, EpochSampler, IndexedImages, TrainImages
from .streams import Place, RunImages, StreamedImages, TrainStream

EMPTY_PASSES = 3
"""Consecutive passes through a stream without a complete batch after which a run ends."""


class LoaderSettings(TypedDict):
    """Arguments shared by all DataLoaders of a run."""

    num_workers: int
    persistent_workers: bool
    pin_memory: bool
    worker_init_fn: Callable[[int], None]
    generator: torch.Generator


class IndexedBatches:
    """Training batches of a map-style dataset; the DataLoader workers persist from epoch to epoch.

    Args:
        common: arguments shared by all DataLoaders of the run.

    Raises:
        ValueError: the training images do not fill a batch.
    """

    def __init__(self, data: IndexedImages, config: TrainConfig, accelerator: Accelerator, common: LoaderSettings):
        for name in ("steps_per_epoch", "train_num_samples", "epoch_repeats"):
            if getattr(config, name):
                raise ValueError(f"{name} is only for streamed images; an epoch of these images is one pass over all")
        world, rank = accelerator.num_processes, accelerator.process_index
        batch_size = known_batch_size(config)
        self.sampler = EpochSampler(len(data), batch_size * world, rank, world, config.seed, config.aug_repeats)
        self.global_batch, self.epoch_images = self.sampler.global_batch, self.sampler.usable
        self.loader = DataLoader(
            TrainImages(data, config.on_bad_sample), batch_size, sampler=self.sampler, drop_last=True, **common
        )
        self.started: Iterator[Batch] | None = None

    def start(self, epoch: int) -> None:
        """Let the DataLoader workers start on an epoch before its batches are requested."""
        self.started = self._iterate(epoch, 0)

    def batches(self, epoch: int, images: int) -> Iterator[Batch]:
        """Return the batches of an epoch after the given number of images (over all processes)."""
        started, self.started = self.started, None
        return self._iterate(epoch, images) if started is None else started

    def _iterate(self, epoch: int, images: int) -> Iterator[Batch]:
        self.sampler.begin(epoch, images)
        return iter(self.loader)

    def end_workers(self) -> None:
        """Shut down the DataLoader workers until batches are requested again."""
        self.started = None
        end_workers(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: epoch and number of images define the position."""
        return {}

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Raise ValueError if the states are those of a stream."""
        if any(states):
            raise ValueError("the checkpoint is from a run on streamed images; resume with streaming")


class StreamedBatches:
    """Training batches of a stream, which continues from epoch to epoch; an epoch is a fixed number of batches.

    Args:
        common: see `IndexedBatches`.

    Raises:
        ValueError: the length of an epoch is unknown, or the images do not fill a batch.
    """

    def __init__(self, data: StreamedImages, config: TrainConfig, accelerator: Accelerator, common: LoaderSettings):
        world, rank = self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        batch_size = known_batch_size(config)
        self.global_batch = batch_size * world
        if config.aug_repeats:
            raise ValueError(
                "aug_repeats does not work with streaming, which reads each image once; leave out streaming or"
                " aug_repeats"
            )
        length = config.train_num_samples or data.length
        if config.steps_per_epoch is not None:
            if config.epoch_repeats or config.train_num_samples:
                raise ValueError(
                    "steps_per_epoch already defines the length of an epoch; leave out epoch_repeats and"
                    " train_num_samples"
                )
            batches = config.steps_per_epoch * config.grad_accum_steps
        elif length is None:
            raise ValueError(
                "the length of the stream is unknown; set steps_per_epoch (--steps-per-epoch) or train_num_samples"
            )
        else:
            batches = int(length * max(1, config.epoch_repeats)) // self.global_batch
            if not batches:
                raise ValueError(
                    f"{length} training images do not fill a batch of {self.global_batch}; use a smaller batch_size"
                )
        self.epoch_images = batches * self.global_batch
        part = data.split_by_node(rank, world, config.workers)
        shards = part.rows.num_shards
        workers = min(config.workers, shards)
        if workers < config.workers and accelerator.is_main_process:
            warnings.warn(
                f"the stream has only {shards} shards per process, so only {workers} of {config.workers} DataLoader"
                " workers are used; more and smaller files load faster",
                stacklevel=4,
            )
        self.division = {
            "processes": world,
            "loading processes": max(workers, 1),
            "shards": part.shards,
            "rows in a block": config.shuffle_buffer,
            "draws": DRAWS,
        }
        self.stream = TrainStream(part, batch_size, config.shuffle_buffer, config.seed, rank, config.on_bad_sample)
        self.settings = {**common, "num_workers": workers, "persistent_workers": False}
        self.loader: Iterator[tuple[Batch, Place] | None] | None = None
        self.number, self.next_worker, self.empty_passes = 0, 0, 0
        self.places: dict[int, Place] = {}

    def start(self, epoch: int) -> None:
        """Do nothing: the DataLoader workers keep reading ahead between epochs."""

    def batches(self, epoch: int, images: int) -> Iterator[Batch]:
        """Yield the batches of an epoch after the given number of images (over all processes)."""
        for _ in range((self.epoch_images - images) // self.global_batch):
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """Return the next batch, starting a new pass through the stream at its end."""
        while True:
            if self.loader is None:
                self.stream.begin(self.number, self.next_worker, dict(self.places))
                self.loader = iter(DataLoader(self.stream, batch_size=None, collate_fn=_as_it_is, **self.settings))
            for batch, place in filter(None, self.loader):
                self.places[place.worker] = place
                self.next_worker = (place.worker + 1) % self.division["loading processes"]
                return batch
            self.empty_passes = 0 if self.places else self.empty_passes + 1
            if self.empty_passes == EMPTY_PASSES:
                raise ValueError(
                    f"the part of the stream for process {self.rank} of {self.world_size} does not fill a batch of"
                    f" {self.stream.batch_size} in any of its DataLoader workers; use a smaller batch_size or fewer"
                    " workers"
                )
            self.loader, self.number, self.next_worker, self.places = None, self.number + 1, 0, {}

    def end_workers(self) -> None:
        """Shut down the DataLoader workers; what they have read ahead will be read again."""
        end_workers(self.loader)
        self.loader = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process in its part of the stream."""
        return {
            "division": self.division,
            "pass": self.number,
            "next_worker": self.next_worker,
            "places": [tuple(place) for place in self.places.values()],
        }

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Restore the position from the states of all processes, before the first batch.

        Raises:
            ValueError: the stream was divided differently, or the images were not streamed.
        """
        if not all(states):
            raise ValueError("the checkpoint is from a run on images that were not streamed; resume without streaming")
        saved = states[0]["division"]
        if differing := [
            f"{key.replace('loading processes', 'DataLoader workers')} {value} instead of {saved.get(key)}"
            for key, value in self.division.items()
            if value != saved.get(key)
        ]:
            raise ValueError(
                f"the stream was divided differently when the checkpoint was written: {', '.join(differing)}; resume"
                " with the same processes, workers, files and shuffle_buffer"
            )
        state = states[self.rank]
        self.number, self.next_worker = state["pass"], state["next_worker"]
        self.places = {worker: Place(worker, *rest) for worker, *rest in state["places"]}


def check_counts(train_data: RunImages, val_data: RunImages) -> None:
    """Raise ValueError if there are no images."""
    for name, data in (("training", train_data), ("validation", val_data)):
        if image_count(data) == 0:
            raise ValueError(f"there are no {name} images")


def image_count(data: RunImages) -> int | None:
    """Return the number of images; None for a stream of unknown length."""
    return data.length if isinstance(data, StreamedImages) else len(data)


def image_shape(data: RunImages, config: TrainConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of an image, which the dataset may return as several views."""
    if isinstance(data, StreamedImages):
        image, _ = next(filter(None, data))
    else:
        image, *_ = TrainImages(data, config.on_bad_sample)[Draw(0, 0)]
    channels, height, width = image.shape[-3:]
    return channels, height, width


def known_batch_size(config: TrainConfig) -> int:
    """Return the images per process and forward pass, once "auto" has been replaced by a number.

    Raises:
        ValueError: it is still "auto".
    """
    if isinstance(config.batch_size, str):
        raise ValueError(f"batch_size must be a number of images, got {config.batch_size!r}")
    return config.batch_size


TrainBatches = IndexedBatches | StreamedBatches


def train_batches(data: RunImages, config: TrainConfig, accelerator: Accelerator) -> TrainBatches:
    settings = loader_settings(config, accelerator)
    if isinstance(data, StreamedImages):
        return StreamedBatches(data, config, accelerator, settings)
    return IndexedBatches(data, config, accelerator, settings)


class ValImages(Dataset[tuple[Tensor, Any] | None]):
    """Every `world_size`-th image of a map-style dataset; with "skip", None for an image that cannot be read."""

    def __init__(self, data: IndexedImages, rank: int, world_size: int, on_bad_sample: str):
        self.data, self.indices = data, range(rank, len(data), world_size)
        self.on_bad_sample = on_bad_sample

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any] | None:
        try:
            return self.data[self.indices[index]]
        except (OSError, ValueError):
            if self.on_bad_sample == "raise":
                raise
        return None


class ValBatches:
    """Batches (images, class indices) in which each readable validation image occurs exactly once over all processes.

    Attributes:
        unreadable: number of images in this process's part that could not be read in the last pass.
    """

    def __init__(self, data: RunImages, config: TrainConfig, accelerator: Accelerator):
        world, rank = accelerator.num_processes, accelerator.process_index
        settings = loader_settings(config, accelerator)
        part: StreamedImages | ValImages
        if isinstance(data, StreamedImages):
            part = data.split_by_node(rank, world, config.workers)
            part.skips_unreadable = config.on_bad_sample == "skip"
            workers = min(config.workers, part.rows.num_shards)
            settings |= {"num_workers": workers, "persistent_workers": workers > 0}
        else:
            part = ValImages(data, rank, world, config.on_bad_sample)
        self.unreadable = 0
        self.loader = DataLoader(
            part, config.validation_batch_size or known_batch_size(config), collate_fn=_collate_readable, **settings
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable = 0
        for *batch, readable in self.loader:
            self.unreadable += readable.count(False)
            if batch:
                yield tuple(batch)

    def end_workers(self) -> None:
        """Shut down the DataLoader workers until batches are requested again."""
        end_workers(self.loader)


Images = TypeVar("Images", bound=IndexedImages)


class MeasuredImages(Generic[Images]):
    """Batches (images, class indices) of a map-style dataset, in its order, to evaluate a saved model on.

    Args:
        on_bad_sample: "raise", or "skip" to skip an image that cannot be read.

    Attributes:
        kept: indices of the images that could be read in the last complete pass.
        unreadable: number of images that could not be read.
    """

    def __init__(self, data: Images, batch_size: int, workers: int, on_bad_sample: str):
        self.data, self.unreadable = data, 0
        self.kept: list[int] = []
        self.loader = DataLoader(
            ValImages(data, 0, 1, on_bad_sample),
            batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate_readable,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen: list[bool] = []
        for *batch, readable in self.loader:
            seen += readable
            if batch:
                yield tuple(batch)
        self.kept, self.unreadable = [index for index, could in enumerate(seen) if could], seen.count(False)


def loader_settings(config: TrainConfig, accelerator: Accelerator) -> LoaderSettings:
    seeds = torch.Generator()  # for the workers' seeds, which otherwise would be drawn from the run's own generator
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
        "generator": seeds,
    }


def end_workers(loader: DataLoader | Iterator | None) -> None:
    """Shut down the workers of a DataLoader or of its iterator. Otherwise they live as long as anything refers to it,
    e.g. the traceback of an error."""
    iterator = loader._iterator if isinstance(loader, DataLoader) else loader
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
    if isinstance(loader, DataLoader):
        loader._iterator = None


def _as_it_is(batch: Any) -> Any:
    return batch


def _collate_readable(samples: list[tuple[Tensor, Any] | None]) -> Any:
    """Collate the samples that could be read, if any, followed by flags of which they are."""
    readable = [sample is not None for sample in samples]
    found = [sample for sample in samples if sample is not None]
    return [*(default_collate(found) if found else ()), readable]
