"""Which images a process sees, in what order, and how each is augmented: a matter of seed, epoch and position alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset, get_worker_info


class IndexedImages(Protocol):
    """A map-style data set that tells how many samples it has, such as `ImageDataset` or one of torchvision's: (image
    (C, H, W), label), or images alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Batch: TypeAlias = tuple[Any, Tensor, Tensor, Tensor]
"""Images (B, C, H, W), class indices (B,), which of them took another's place (of a stream, how many were left out
before each), and their indices in the data set, `NO_INDEX` for those in another's place and of a stream."""
NO_INDEX = -1


DRAWS = "seed and epoch"
"""What order and augmentation of the images depend on; their sum, in checkpoints that do not tell."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of an epoch."""

    seed: int
    """Of its augmentation."""
    index: int
    """In the data set."""


REPEATED_ROUND = 256
"""To a multiple of it timm rounds the images of an epoch with repeated augmentation, unless they are fewer."""


def mixed_seed(*parts: int) -> int:
    """A seed of 32 bits that is another for every seed, epoch, process, ..., also where their sums are equal."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EpochSampler(Sampler[Draw]):
    """A permutation of the data that depends on seed and epoch alone, shared between processes.

    Global batch i is the same set of images, augmented in the same way, on any number of processes and loading
    processes. The last, incomplete global batch of an epoch is left out. Iteration may begin in the middle, without
    drawing what is left behind.

    Args:
        size: images in the data set.
        global_batch: images per forward pass, all processes together.
        repeats: as often each image comes in a row, in as many other processes as there are; an epoch is then as long,
            of as many fewer images, as that of `timm.data.distributed_sampler.RepeatAugSampler`. 0 is off.
    """

    def __init__(self, size: int, global_batch: int, rank: int, world_size: int, seed: int, repeats: float = 0.0):
        self.repeats = repeats
        length = size // REPEATED_ROUND * REPEATED_ROUND or size if repeats else size
        if length < global_batch:
            raise ValueError(f"{size} training images do not fill a batch of {global_batch}; use a smaller batch_size")
        self.global_batch = global_batch
        self.usable = length // global_batch * global_batch
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.epoch = self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, and how many images of it (over all processes) are behind us."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        if self.repeats:
            order = order[(torch.arange(self.size) / self.repeats).long()]
        seeds = torch.randint(2**63 - 1, (self.size,), generator=generator)
        mine = slice(self.start + self.rank, self.usable, self.world_size)
        return map(Draw, seeds[mine].tolist(), order[mine].tolist())

    def __len__(self) -> int:
        return (self.usable - self.start) // self.world_size


class TrainImages(Dataset[tuple[Tensor, Any, bool, int]]):
    """A map-style data set under the `Draw`s of an `EpochSampler`: image, class index, whether it took another's place,
    and its index.

    Whatever the data set draws from Python's, numpy's or torch's global generator comes from the draw's own seed.

    Args:
        on_bad_sample: "raise", or "skip": an image that cannot be read gives its place to another one.
    """

    def __init__(self, data: "IndexedImages", on_bad_sample: str):
        self.data, self.on_bad_sample = data, on_bad_sample

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Any, bool, int]:
        with seeded(draw.seed):
            try:
                return *self.data[draw.index], False, draw.index
            except (OSError, ValueError):
                if self.on_bad_sample == "raise":
                    raise
            return *self._another(draw), True, NO_INDEX

    def _another(self, draw: Draw) -> tuple[Tensor, Any]:
        for index in np.random.randint(len(self.data), size=ATTEMPTS):
            try:
                return self.data[int(index)]
            except (OSError, ValueError) as error:
                last = error
        raise ValueError(f"neither image {draw.index} nor {ATTEMPTS} others can be read; the last: {last}") from last


def image_numbers(data: Dataset | IndexedImages) -> Tensor:
    """For each index of a data set the number of its image (N,), counted from 0. They differ from the indices where a
    `torch.utils.data.Subset` has an image several times."""
    if not isinstance(data, Subset):
        return torch.arange(len(data))  # type: ignore[arg-type]  # torch's Dataset promises no length
    below = image_numbers(data.dataset)
    return below[torch.as_tensor(data.indices)].unique(return_inverse=True)[1]


ATTEMPTS = 10
_numpy_draws = np.random.MT19937()  # to exchange numpy's generator takes a hundredth of the time of restoring its state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global generators of Python, numpy and torch (on the CPU) start from a seed; afterwards they are
    as they were, except in a loading process, where nobody else draws."""
    if get_worker_info() is not None:
        _seed(seed)
        yield
        return
    before = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    mtrand.set_bit_generator(_numpy_draws)
    _seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        mtrand.set_bit_generator(before[1])
        torch.set_rng_state(before[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
