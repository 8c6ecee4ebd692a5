"""The images of a run, batch by batch, on every process."""
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .config import TrainConfig
from .interrupt import leave_process_group
from .sampling import EpochSampler, TrainImages

Batch = tuple[Tensor, Tensor, Tensor]
"""Images, class indices, and which of them took another's place."""


class Loading:
    """Loaders of this process; loading processes live as long as they do.

    Args:
        train_data, val_data: see `Trainer`.

    Raises:
        ValueError: the training images do not fill a batch.
    """

    def __init__(self, train_data: Dataset, val_data: Dataset, config: TrainConfig, accelerator: Accelerator):
        world, rank = accelerator.num_processes, accelerator.process_index
        self.sampler = EpochSampler(len(train_data), config.batch_size * world, rank, world, config.seed)
        self.seeds = torch.Generator()  # of the loading processes; without it they would be drawn from the run's own
        common = {"num_workers": config.workers, "persistent_workers": config.workers > 0,
                  "pin_memory": accelerator.device.type == "cuda", "worker_init_fn": leave_process_group,
                  "generator": self.seeds}
        self.train = DataLoader(
            TrainImages(train_data, config.on_bad_sample), config.batch_size, sampler=self.sampler, drop_last=True,
            **common)
        own_share = Subset(val_data, range(rank, len(val_data), world))  # every image once, however they divide
        self.val = DataLoader(own_share, config.validation_batch_size or config.batch_size, **common)
        self.updates_per_epoch = -(-len(self.train) // config.grad_accum_steps)
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
        return iter(self.train)
