"""The memory of answers in a run: where it is kept, and what an update reads and writes, on all processes."""

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
"""Maximum size of a memory on the device; a larger one is kept in files."""
FOLDER = ".memory"
"""Folder of these files in the run directory, with a folder for each process."""


def memory_loss(task: TrainingTask) -> SelfDistillLoss | None:
    """Return the loss of a task whose teacher is a memory; None for any other task."""
    if isinstance(task, SelfDistillTask) and task.criterion.teacher == "memory":
        return task.criterion
    return None


def nothing_remembered(task: TrainingTask, images: int, classes: int, device: torch.device | str) -> list[Remembered]:
    """Return the extra arguments of a task for images it has never seen: an empty `Remembered` if its teacher is a
    memory, otherwise none."""
    if memory_loss(task) is None:
        return []
    return [
        Remembered(torch.zeros(images, classes, device=device), torch.zeros(images, dtype=torch.bool, device=device))
    ]


def create_memory(
    task: TrainingTask, config: TrainConfig, data: RunImages, classes: int, accelerator: Accelerator
) -> "RunMemory | None":
    """Create the memory of a run whose teacher it is, without allocating or writing anything yet; None for any other
    run.

    Raises:
        ValueError: images are streamed, or all of them are mixed, so that no single image has an answer.
    """
    loss = memory_loss(task)
    if loss is None:
        return None
    if isinstance(data, IterableDataset):
        raise ValueError(
            "the teacher 'memory' (--teacher memory) stores answers by image index, which streamed images (--streaming)"
            " do not have; leave out streaming, or use the teacher 'ensemble'"
        )
    always = (config.mixup or config.cutmix or config.cutmix_minmax) and config.mixup_prob == 1
    if always and not 0 < config.mixup_off_epoch < config.epochs:
        raise ValueError(
            "the teacher 'memory' (--teacher memory) stores answers to single images, but mixup or CutMix with"
            " mixup_prob 1 (--mixup-prob) mixes all of them; use mixup_prob below 1, mixup_off_epoch"
            " (--mixup-off-epoch) below the number of epochs, or the teacher 'ensemble'"
        )
    return RunMemory(loss, image_numbers(data), classes, accelerator)


class RunMemory:
    """An `AnswerMemory` of the training images of a run, identical on all processes.

    The answer to a mixture of two images belongs to neither and is not written. For a mixture, the answers of both
    images are read and mixed in the same way, if both are known. Images that replace unreadable ones are neither read
    nor written.

    Args:
        loss: the loss whose teacher it is.
        numbers: number of the image for each index of the dataset.
        classes: K.
    """

    def __init__(self, loss: SelfDistillLoss, numbers: Tensor, classes: int, accelerator: Accelerator):
        self.loss, self.numbers, self.classes, self.accelerator = loss, numbers, classes, accelerator
        self.images = int(numbers.max()) + 1
        self.opened: AnswerMemory | None = None
        self.pending: list[tuple[Tensor, Tensor]] = []

    @property
    def memory(self) -> AnswerMemory:
        """The memory; available after `open`."""
        if self.opened is None:
            raise RuntimeError("there is no memory of answers yet; open creates it")
        return self.opened

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError if a run with this number of epochs would never learn from the memory."""
        if self.loss.memory_warmup_epochs >= epochs:
            raise ValueError(
                f"memory_warmup_epochs (--memory-warmup-epochs) must be less than the run's {epochs} epochs, got"
                f" {self.loss.memory_warmup_epochs}"
            )

    @property
    def device_bytes(self) -> int:
        """Size of the memory on the device; 0 if it is kept in files."""
        size = memory_bytes(self.images, self.classes, self.loss.memory_topk)
        return size if size <= DEVICE_BYTES else 0

    def open(self, output: Path) -> None:
        """Allocate the memory on the device, or in the run directory if it is large; call it on every process.

        Raises:
            OSError: there is not enough disk space.
        """
        if self.opened:
            return
        accelerator, folder = self.accelerator, None
        if accelerator.is_main_process:
            shutil.rmtree(output / FOLDER, ignore_errors=True)  # left by a killed run
        if not self.device_bytes:
            accelerator.wait_for_everyone()
            folder = output / FOLDER / str(accelerator.process_index)
        self.opened = self.loss.create_memory(self.images, self.classes, device=accelerator.device, folder=folder)

    def close(self, output: Path) -> None:
        """Remove the files at the end of a run. Their content remains readable as long as this object exists."""
        if self.accelerator.is_main_process:
            shutil.rmtree(output / FOLDER, ignore_errors=True)

    def __str__(self) -> str:
        kept = self.memory.kept
        classes = f"{kept} classes" if kept == self.classes else f"the {kept} most likely of {self.classes} classes"
        size = f"{self.memory.bytes / 1e6:,.1f} MB"
        files = f"per process in {FOLDER}/ of the run directory"
        place = f"on {self.accelerator.device}" if self.device_bytes else files
        return f"memory of the answers to {self.images:,} images: {classes}, {size} {place}"

    def recall(self, indices: Tensor, weight: Tensor, epoch: int) -> Remembered:
        """Return the remembered answers for the images of a batch.

        Args:
            indices: dataset indices (B,), or (S * B,) for S views of each image.
            weight: weight of each image in its mixture, as returned by `TargetMixer.mix`.
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
        """Hold the answers to a batch until `write`.

        Args:
            indices, weight: as in `recall`.
            answers: (B, K).
        """
        rows = self._rows(indices).to(weight.device, non_blocking=True)
        self.pending.append((torch.where(weight == 1, rows, NO_INDEX), answers))

    def write(self) -> None:
        """Store the answers noted on all processes, after the update; call it on every process."""
        rows, answers = (torch.cat(parts) for parts in zip(*self.pending))
        self.memory.update(*self.accelerator.gather((rows, answers)))
        self.forget()

    def forget(self) -> None:
        """Discard the noted answers, after a skipped update."""
        self.pending = []

    def _rows(self, indices: Tensor) -> Tensor:
        return torch.where(indices == NO_INDEX, NO_INDEX, self.numbers[indices])
