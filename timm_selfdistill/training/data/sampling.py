"""Order and augmentation of the images on each process, determined by seed, epoch and position alone."""

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
    """A map-style dataset with a length, such as `ImageDataset` or one of torchvision's, of (image (C, H, W), label) or
    of images without labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Batch: TypeAlias = tuple[Any, Tensor, Tensor, Tensor]
"""Images (B, C, H, W); class indices (B,); flags of images that replace unreadable ones (for a stream, the number of
images skipped before each); dataset indices, `NO_INDEX` for replacements and for a stream."""
NO_INDEX = -1


DRAWS = "seed and epoch"
"""How order and augmentation of the images are seeded; checkpoints without this entry used the sum of both."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of an epoch."""

    seed: int
    """Seed of its augmentation."""
    index: int
    """Index in the dataset."""


REPEATED_ROUND = 256
"""With repeated augmentation, timm rounds the images of an epoch down to a multiple of this, unless there are fewer."""


def mixed_seed(*parts: int) -> int:
    """Mix integers such as seed, epoch and process into a 32-bit seed; unlike a sum, it depends on each of them."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EpochSampler(Sampler[Draw]):
    """A permutation of the dataset, determined by seed and epoch alone and divided among the processes.

    Global batch i is the same set of images with the same augmentation on any number of processes and DataLoader
    workers. The last, incomplete global batch of an epoch is dropped. Iteration can start in the middle of an epoch
    without drawing the images before.

    Args:
        size: number of images in the dataset.
        global_batch: images per forward pass, over all processes.
        repeats: repetitions of each image in a row, spread over the processes; an epoch keeps its length and has fewer
            distinct images, as with `timm.data.distributed_sampler.RepeatAugSampler`. 0 is off.
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
        """Set the epoch, and the number of its images (over all processes) to skip."""
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
    """A map-style dataset indexed by the `Draw`s of an `EpochSampler`: image, class index, whether the image replaces
    an unreadable one, and its index.

    Everything that the dataset draws from the global generators of Python, NumPy and torch is seeded by the draw.

    Args:
        on_bad_sample: "raise", or "skip" to replace an image that cannot be read with another one.
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
            return *self._replacement(draw), True, NO_INDEX

    def _replacement(self, draw: Draw) -> tuple[Tensor, Any]:
        for index in np.random.randint(len(self.data), size=ATTEMPTS):
            try:
                return self.data[int(index)]
            except (OSError, ValueError) as error:
                last = error
        raise ValueError(f"neither image {draw.index} nor {ATTEMPTS} others can be read; last error: {last}") from last


def image_numbers(data: Dataset | IndexedImages) -> Tensor:
    """Return the number of the image, counted from 0, for each index of a dataset (N,). The two differ if a
    `torch.utils.data.Subset` contains an image several times."""
    if not isinstance(data, Subset):
        return torch.arange(len(data))  # type: ignore[arg-type]  # torch's Dataset does not define a length
    below = image_numbers(data.dataset)
    return below[torch.as_tensor(data.indices)].unique(return_inverse=True)[1]


ATTEMPTS = 10
_numpy_draws = np.random.MT19937()  # swapping NumPy's generator is a hundred times faster than restoring its state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager that seeds the global generators of Python, NumPy and torch (CPU) and restores them afterwards,
    except in a DataLoader worker, where nothing else uses them."""
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
