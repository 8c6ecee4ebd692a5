"""The images of a run, batch by batch, on every process."""

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
"""Through a stream, in a row, without one whole batch: the end of a run."""


class LoaderSettings(TypedDict):
    """Arguments of every DataLoader of a run."""

    num_workers: int
    persistent_workers: bool
    pin_memory: bool
    worker_init_fn: Callable[[int], None]
    generator: torch.Generator


class IndexedBatches:
    """Training batches of a map-style data set; the loading processes live as long as it does.

    Args:
        common: arguments of every DataLoader of the run.

    Raises:
        ValueError: the training images do not fill a batch.
    """

    def __init__(self, data: IndexedImages, config: TrainConfig, accelerator: Accelerator, common: LoaderSettings):
        for name in ("steps_per_epoch", "train_num_samples", "epoch_repeats"):
            if getattr(config, name):
                raise ValueError(f"{name} is for streamed images; these have an end, which is that of the epoch")
        world, rank = accelerator.num_processes, accelerator.process_index
        batch_size = known_batch_size(config)
        self.sampler = EpochSampler(len(data), batch_size * world, rank, world, config.seed, config.aug_repeats)
        self.global_batch, self.epoch_images = self.sampler.global_batch, self.sampler.usable
        self.loader = DataLoader(
            TrainImages(data, config.on_bad_sample), batch_size, sampler=self.sampler, drop_last=True, **common
        )
        self.started: Iterator[Batch] | None = None

    def start(self, epoch: int) -> None:
        """Let the loading processes begin with an epoch whose batches are asked for later."""
        self.started = self._iterate(epoch, 0)

    def batches(self, epoch: int, images: int) -> Iterator[Batch]:
        """The batches of an epoch after so many images (over all processes)."""
        started, self.started = self.started, None
        return self._iterate(epoch, images) if started is None else started

    def _iterate(self, epoch: int, images: int) -> Iterator[Batch]:
        self.sampler.begin(epoch, images)
        return iter(self.loader)

    def end_workers(self) -> None:
        """End the loading processes, until batches are asked for again."""
        self.started = None
        end_workers(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: epoch and images say where it stands."""
        return {}

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Raise ValueError for those of a stream."""
        if any(states):
            raise ValueError("the checkpoint is of a run on streamed images; resume with streaming")


class StreamedBatches:
    """Training batches of a stream, which goes on from epoch to epoch: an epoch is so many steps.

    Args:
        common: see `IndexedBatches`.

    Raises:
        ValueError: nobody knows how long an epoch is, or the images do not fill a batch.
    """

    def __init__(self, data: StreamedImages, config: TrainConfig, accelerator: Accelerator, common: LoaderSettings):
        world, rank = self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        batch_size = known_batch_size(config)
        self.global_batch = batch_size * world
        if config.aug_repeats:
            raise ValueError(
                "aug_repeats needs images that can be drawn twice, and streamed ones come once; leave out"
                " streaming or aug_repeats"
            )
        length = config.train_num_samples or data.length
        if config.steps_per_epoch is not None:
            if config.epoch_repeats or config.train_num_samples:
                raise ValueError(
                    "steps_per_epoch is the length of an epoch, and so are epoch_repeats and"
                    " train_num_samples; leave one out"
                )
            batches = config.steps_per_epoch * config.grad_accum_steps
        elif length is None:
            raise ValueError(
                "the stream does not tell its length; give steps_per_epoch (--steps-per-epoch) or train_num_samples"
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
                f"the stream has {shards} shards for each process, so that {workers} of {config.workers} loading"
                " processes read it; more and smaller files load faster",
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
        """The loading processes have not stopped."""

    def batches(self, epoch: int, images: int) -> Iterator[Batch]:
        """The batches of an epoch after so many images (over all processes)."""
        for _ in range((self.epoch_images - images) // self.global_batch):
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next one of this pass through the stream, or else of the one after it."""
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
                    f"the part of the stream that process {self.rank} of {self.world_size} reads does not fill a batch"
                    f" of {self.stream.batch_size} in any of its loading processes; use a smaller batch_size or fewer"
                    " workers"
                )
            self.loader, self.number, self.next_worker, self.places = None, self.number + 1, 0, {}

    def end_workers(self) -> None:
        """End the loading processes; what they have read ahead is read again."""
        end_workers(self.loader)
        self.loader = None

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands in its part of the stream."""
        return {
            "division": self.division,
            "pass": self.number,
            "next_worker": self.next_worker,
            "places": [tuple(place) for place in self.places.values()],
        }

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Go on, before the first batch, where the processes of a run stood.

        Raises:
            ValueError: they divided the stream in another way, or read none.
        """
        if not all(states):
            raise ValueError("the checkpoint is of a run on images that were not streamed; resume without streaming")
        saved = states[0]["division"]
        if differing := [
            f"{key} {value} instead of {saved.get(key)}"
            for key, value in self.division.items()
            if value != saved.get(key)
        ]:
            raise ValueError(
                f"the checkpoint's stream was divided in another way: {', '.join(differing)}; resume with"
                " the same processes, workers, files and shuffle_buffer"
            )
        state = states[self.rank]
        self.number, self.next_worker = state["pass"], state["next_worker"]
        self.places = {worker: Place(worker, *rest) for worker, *rest in state["places"]}


def check_counts(train_data: RunImages, val_data: RunImages) -> None:
    """Raise ValueError where there are no images."""
    for name, data in (("training", train_data), ("validation", val_data)):
        if image_count(data) == 0:
            raise ValueError(f"there are no {name} images")


def image_count(data: RunImages) -> int | None:
    """None for a stream that does not tell."""
    return data.length if isinstance(data, StreamedImages) else len(data)


def image_shape(data: RunImages, config: TrainConfig) -> tuple[int, int, int]:
    """(C, H, W) of training images, which may come as several views."""
    if isinstance(data, StreamedImages):
        image, _ = next(filter(None, data))
    else:
        image, *_ = TrainImages(data, config.on_bad_sample)[Draw(0, 0)]
    channels, height, width = image.shape[-3:]
    return channels, height, width


def known_batch_size(config: TrainConfig) -> int:
    """Images per process and forward pass; the run has found a number where it was told "auto".

    Raises:
        ValueError: it has not.
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
    """One of so many images of a map-style data set; None takes the place of one that cannot be read, if it may."""

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
    """Batches (images, class indices) of every validation image that can be read, once, however they divide between the
    processes.

    Attributes:
        unreadable: images of this process's part that could not be read the last time.
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
        """End the loading processes, until batches are asked for again."""
        end_workers(self.loader)


Images = TypeVar("Images", bound=IndexedImages)


class MeasuredImages(Generic[Images]):
    """Batches (images, class indices) of a map-style data set, in its order, to measure a saved model on.

    Args:
        on_bad_sample: "raise", or "skip": an image that cannot be read is left out.

    Attributes:
        kept: indices of the images that could be read in the last whole pass.
        unreadable: how many could not.
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
    seeds = torch.Generator()  # of the loading processes; without it they would be drawn from the run's own
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
        "generator": seeds,
    }


def end_workers(loader: DataLoader | Iterator | None) -> None:
    """End the loading processes of a DataLoader, or of an iterator of one, which stay as long as anything refers to it,
    the traceback of an error, say."""
    iterator = loader._iterator if isinstance(loader, DataLoader) else loader
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
    if isinstance(loader, DataLoader):
        loader._iterator = None


def _as_it_is(batch: Any) -> Any:
    return batch


def _collate_readable(samples: list[tuple[Tensor, Any] | None]) -> Any:
    """A batch of those that could be read, if any, and which they are."""
    readable = [sample is not None for sample in samples]
    found = [sample for sample in samples if sample is not None]
    return [*(default_collate(found) if found else ()), readable]
