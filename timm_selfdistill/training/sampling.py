"""Which images a process sees, and in what order."""
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of the data that depends on seed and epoch alone, shared between processes.

    Global batch i is the same set of images on any number of processes. The last, incomplete global batch of an
    epoch is left out. Iteration may begin in the middle, without drawing what is left behind.

    Args:
        size: images in the data set.
        global_batch: images per forward pass, all processes together.
    """

    def __init__(self, size: int, global_batch: int, rank: int, world_size: int, seed: int):
        if size < global_batch:
            raise ValueError(f"{size} training images do not fill a batch of {global_batch}; use a smaller batch_size")
        self.global_batch = global_batch
        self.usable = size // global_batch * global_batch
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.epoch = self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, and how many images of it (over all processes) are behind us."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        return iter(order[self.start + self.rank:self.usable:self.world_size].tolist())

    def __len__(self) -> int:
        return (self.usable - self.start) // self.world_size
