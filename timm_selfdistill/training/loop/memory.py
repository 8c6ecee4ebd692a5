"""The memory of each image's answers in a run: where it is, what is read and written in an update, on all processes."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from torch import Tensor
from torch.utils.data import IterableDataset

from ...loss import SelfDistillLoss
from ...memory import AnswerMemory, Remembered, memory_bytes
from ...task import SelfDistillTask
from ..config import TrainConfig
from ..data.sampling import NO_INDEX, image_numbers
from ..data.streams import RunImages

DEVICE_BYTES = 10**9
"""A larger memory is kept in files."""
FOLDER = ".memory"
"""Of these, in the run directory; each process has a folder in it."""


def memory_loss(task: TrainingTask) -> SelfDistillLoss | None:
    """The loss of a task whose teacher is a memory; None for any other task."""
    if isinstance(task, SelfDistillTask) and task.criterion.teacher == "memory":
        return task.criterion
    return None


def nothing_remembered(task: TrainingTask, images: int, classes: int, device: torch.device | str) -> list[Remembered]:
    """What a task is given beside images it has never seen and their target: nothing, unless its teacher is a
    memory."""
    if memory_loss(task) is None:
        return []
    return [
        Remembered(torch.zeros(images, classes, device=device), torch.zeros(images, dtype=torch.bool, device=device))
    ]


def create_memory(
    task: TrainingTask, config: TrainConfig, data: RunImages, classes: int, accelerator: Accelerator
) -> "RunMemory | None":
    """The memory of a run, for a task whose teacher it is; nothing is reserved or written yet.

    Raises:
        ValueError: there is no answer to an image of the data alone.
    """
    loss = memory_loss(task)
    if loss is None:
        return None
    if isinstance(data, IterableDataset):
        raise ValueError(
            "the teacher 'memory' (--teacher memory) keeps the answers to each image of a data set, and an image of a"
            " stream (--streaming) has no index there; leave out streaming, or take the teacher 'ensemble'"
        )
    always = (config.mixup or config.cutmix or config.cutmix_minmax) and config.mixup_prob == 1
    if always and not 0 < config.mixup_off_epoch < config.epochs:
        raise ValueError(
            "the teacher 'memory' (--teacher memory) keeps answers to single images, and mixup or CutMix with"
            " mixup_prob 1 (--mixup-prob) mixes all of them; give mixup_prob below 1, mixup_off_epoch"
            " (--mixup-off-epoch) below the number of epochs, or the teacher 'ensemble'"
        )
    return RunMemory(loss, image_numbers(data), classes, accelerator)


class RunMemory:
    """An `AnswerMemory` of the training images of a run, equal on all processes.

    An answer to a mixture of two images is no answer to either, and is not written. Read are the two memories, mixed
    as the images are, where both are known. An image that took the place of another has no part in it.

    Args:
        loss: whose teacher it is.
        numbers: of the image, for each index of the data set.
        classes: K.
    """

    def __init__(self, loss: SelfDistillLoss, numbers: Tensor, classes: int, accelerator: Accelerator):
        self.loss, self.numbers, self.classes, self.accelerator = loss, numbers, classes, accelerator
        self.images = int(numbers.max()) + 1
        self.opened: AnswerMemory | None = None
        self.pending: list[tuple[Tensor, Tensor]] = []

    @property
    def memory(self) -> AnswerMemory:
        """From `open` on."""
        if self.opened is None:
            raise RuntimeError("there is no memory of answers yet; open makes it")
        return self.opened

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError where a run of so many epochs would not learn from it."""
        if self.loss.memory_warmup_epochs >= epochs:
            raise ValueError(
                f"memory_warmup_epochs (--memory-warmup-epochs) must be less than the run's {epochs} epochs, got"
                f" {self.loss.memory_warmup_epochs}"
            )

    @property
    def device_bytes(self) -> int:
        """What it takes of the device; 0 where it is kept in files."""
        size = memory_bytes(self.images, self.classes, self.loss.memory_topk)
        return size if size <= DEVICE_BYTES else 0

    def open(self, output: Path) -> None:
        """Reserve the memory, on the device, or if it is large in the run directory; call it on every process.

        Raises:
            OSError: the disk is too small.
        """
        if self.opened:
            return
        accelerator, folder = self.accelerator, None
        if accelerator.is_main_process:
            shutil.rmtree(output / FOLDER, ignore_errors=True)  # of a run that was killed
        if not self.device_bytes:
            accelerator.wait_for_everyone()
            folder = output / FOLDER / str(accelerator.process_index)
        self.opened = self.loss.create_memory(self.images, self.classes, device=accelerator.device, folder=folder)

    def close(self, output: Path) -> None:
        """Remove the files, at the end of a run. What they held can be read until this object is gone."""
        if self.accelerator.is_main_process:
            shutil.rmtree(output / FOLDER, ignore_errors=True)

    def __str__(self) -> str:
        kept = self.memory.kept
        classes = f"{kept} classes" if kept == self.classes else f"the {kept} most likely of {self.classes} classes"
        size = f"{self.memory.bytes / 1e6:,.1f} MB"
        files = f"in {FOLDER}/ of the run directory, for each process"
        place = f"on {self.accelerator.device}" if self.device_bytes else files
        return f"memory of the answers to {self.images:,} images: {classes}, {size} {place}"

    def recall(self, indices: Tensor, weight: Tensor, epoch: int) -> Remembered:
        """What is remembered of the images of a batch.

        Args:
            indices: in the data set (B,), or of S views of each image, (S * B,).
            weight: of each image in its mixture, as `TargetMixer.mix` gives it.
            epoch: from 0.
        """
        logits, known = (
            found.to(weight.device, non_blocking=True) for found in self.memory.lookup(self._rows(indices))
        )
        if epoch < self.loss.memory_warmup_epochs:
            return Remembered(logits, torch.zeros_like(known))
        mixed = torch.lerp(logits.flip(0), logits, weight[:, None])
        return Remembered(mixed, known & (known.flip(0) | (weight == 1)))

    def note(self, indices: Tensor, weight: Tensor, answers: Tensor) -> None:
        """Keep the answers of a batch until `write`.

        Args:
            indices, weight: as of `recall`.
            answers: (B, K).
        """
        rows = self._rows(indices).to(weight.device, non_blocking=True)
        self.pending.append((torch.where(weight == 1, rows, NO_INDEX), answers))

    def write(self) -> None:
        """Take what was noted on all processes, after the update that it is of; call it on every process."""
        rows, answers = (torch.cat(parts) for parts in zip(*self.pending))
        self.memory.update(*self.accelerator.gather((rows, answers)))
        self.forget()

    def forget(self) -> None:
        """Leave out what was noted: the update was left out, too."""
        self.pending = []

    def _rows(self, indices: Tensor) -> Tensor:
        return torch.where(indices == NO_INDEX, NO_INDEX, self.numbers[indices])
