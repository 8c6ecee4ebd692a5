"""What the network answered to each image in earlier epochs, the teacher of `SelfDistillLoss(teacher="memory")`."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mapped_file import TensorFile, create_files

MOMENTUM = 0.6
FEW_CLASSES, TOPK = 200, 50
"""Unless told otherwise, all of up to so many classes are kept, and of more the most likely."""


class Remembered(NamedTuple):
    """What a memory holds of the images of a batch.

    Examples:
        >>> import torch
        >>> from timm_selfdistill import AnswerMemory
        >>> logits, known = AnswerMemory(images=100, num_classes=10).lookup(torch.tensor([0, 1]))
        >>> logits.shape, known
        (torch.Size([2, 10]), tensor([False, False]))
    """

    logits: Tensor
    """(B, K) in float32; zeros where nothing is known."""
    known: Tensor
    """(B,), whether there is an answer."""


def kept_classes(num_classes: int, topk: int | None = None) -> int:
    """How many classes of an answer a memory keeps.

    Args:
        topk: 0 is all; None is all of up to 200 classes, and of more the 50 most likely.
    """
    if topk is None:
        topk = 0 if num_classes <= FEW_CLASSES else TOPK
    return topk if 0 < topk < num_classes else num_classes


def memory_tensors(
    images: int, num_classes: int, topk: int | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of an `AnswerMemory`, by name."""
    kept = kept_classes(num_classes, topk)
    rows = images + 1  # the last takes what is of no image
    if kept == num_classes:
        return {"answers": ((rows, kept), torch.float16), "counts": ((rows,), torch.int32)}
    index = torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32
    return {
        "answers": ((rows, kept + 1), torch.float16),
        "classes": ((rows, kept), index),
        "counts": ((rows,), torch.int32),
    }


def memory_files(folder: Path, images: int, num_classes: int, topk: int | None = None) -> dict[str, TensorFile]:
    """The same as files."""
    return {
        name: TensorFile(str(folder / f"{name}.bin"), shape[0], shape[1:], dtype)
        for name, (shape, dtype) in memory_tensors(images, num_classes, topk).items()
    }


def memory_bytes(images: int, num_classes: int, topk: int | None = None) -> int:
    """How large an `AnswerMemory` is."""
    return sum(file.bytes for file in memory_files(Path(), images, num_classes, topk).values())


class AnswerMemory:
    """The running mean of the logits that were answered to each image, in float16 (temporal ensembling,
    arXiv:1610.02242).

    For the answers a_1, ..., a_n to an image, oldest first::

        m = sum_k momentum^(n - k) a_k / sum_k momentum^(n - k)

    The denominator corrects the bias towards zero of the first ones, as in Adam: after the first answer m = a_1. With
    momentum 0, m is the last answer.

    Args:
        images: number of images in the data set.
        num_classes: K.
        momentum: in [0, 1).
        topk: number of logits kept per image, the largest. The other classes share one value, so that their total
            probability stays the same and is spread evenly. 0 keeps all classes; None keeps all of up to 200 classes,
            otherwise 50.
        temperature: at which this probability is computed; that of the loss.
        device: where the memory lies.
        folder: keep the memory in files there, mapped to memory, instead of on `device`. The folder is created, or
            emptied; whoever gave it removes it.

    Raises:
        ValueError: an argument is out of its range.
        OSError: there is no room for the files.

    Examples:
        >>> import torch
        >>> from timm_selfdistill import AnswerMemory
        >>> memory = AnswerMemory(images=100, num_classes=10)
        >>> memory.update(torch.tensor([3, 7]), torch.randn(2, 10))
        >>> memory.lookup(torch.tensor([3, 4])).known
        tensor([ True, False])
    """

    def __init__(
        self,
        images: int,
        num_classes: int,
        momentum: float = MOMENTUM,
        topk: int | None = None,
        temperature: float = 3.0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ):
        if images < 1 or num_classes < 1:
            raise ValueError(f"a memory needs images and classes, got {images} images of {num_classes} classes")
        check_momentum(momentum, "momentum")
        check_topk(topk, "topk")
        self.images, self.num_classes = images, num_classes
        self.momentum, self.temperature = momentum, temperature
        self.kept = kept_classes(num_classes, topk)
        self.tensors = (
            self._in_files(folder, topk)
            if folder
            else {
                name: torch.zeros(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in memory_tensors(images, num_classes, topk).items()
            }
        )

    def _in_files(self, folder: Path, topk: int | None) -> dict[str, Tensor]:
        files = memory_files(folder, self.images, self.num_classes, topk)
        remedy = "choose another folder, or keep fewer classes (topk, --memory-topk)"
        create_files(folder, list(files.values()), "the answers to the images", remedy)
        return {name: file.open() for name, file in files.items()}

    @property
    def device(self) -> torch.device:
        return self.tensors["counts"].device

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @torch.no_grad()
    def lookup(self, indices: Tensor) -> Remembered:
        """What is remembered of images.

        Args:
            indices: in the data set, (B,); -1 is no image, of which nothing is known.

        Raises:
            ValueError: (checked on the CPU) there is no such image.

        Examples:
            >>> import torch
            >>> from timm_selfdistill import AnswerMemory
            >>> AnswerMemory(images=100, num_classes=10).lookup(torch.tensor([5])).logits.shape
            torch.Size([1, 10])
        """
        rows = self._rows(indices)
        known = (self.tensors["counts"][rows] > 0) & (rows >= 0)
        return Remembered(torch.where(known[:, None], self._read(rows), 0), known)

    @torch.no_grad()
    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Take the answers of one update of the weights. Where an image comes several times among them, the mean of its
        answers counts as one.

        Args:
            indices: as of `lookup`; what is given for -1 is not kept.
            logits: (B, K), finite.

        Raises:
            ValueError: (checked on the CPU) there is no such image, or the logits have another shape.

        Examples:
            >>> import torch
            >>> from timm_selfdistill import AnswerMemory
            >>> memory = AnswerMemory(images=100, num_classes=10, momentum=0.0)
            >>> memory.update(torch.tensor([5]), torch.ones(1, 10))
            >>> memory.lookup(torch.tensor([5])).logits[0, 0].item()
            1.0
        """
        if logits.shape != (len(indices), self.num_classes):
            raise ValueError(
                f"expected logits ({len(indices)}, {self.num_classes}) for {len(indices)} images, got"
                f" {tuple(logits.shape)}"
            )
        rows, answers = _mean_of_each(self._rows(indices), logits.to(self.device, torch.float32))
        counts = self.tensors["counts"][rows] + 1
        share = ((1 - self.momentum) / (1 - self.momentum ** counts.float())).clamp(max=1)
        self._write(rows, torch.lerp(self._read(rows), answers, share[:, None]))
        self.tensors["counts"][rows] = counts

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, not copied, a row per image."""
        return {name: tensor[:-1] for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the content of another memory.

        Raises:
            ValueError: it is of other images or classes, or keeps more or fewer of them.
        """
        own, saved = (
            {name: tuple(tensor.shape) for name, tensor in part.items()} for part in (self.state_dict(), state)
        )
        if own != saved:
            raise ValueError(
                f"the saved memory of answers has the tensors {saved}, and this one {own}: images, classes or topk are"
                " others; take those that it was made with"
            )
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _rows(self, indices: Tensor) -> Tensor:
        """Indices on the device; -1 is the last row, which is of no image."""
        if indices.device.type == "cpu" and len(indices):
            low, high = (int(value) for value in indices.aminmax())
            if low < -1 or high >= self.images:
                raise ValueError(
                    f"indices of images must lie in 0..{self.images - 1}, or be -1 for none, got"
                    f" {low if low < -1 else high}"
                )
        return indices.to(self.device, torch.long, non_blocking=True)

    def _read(self, rows: Tensor) -> Tensor:
        """The logits of rows, (B, K)."""
        answers = self.tensors["answers"][rows].float()
        if self.kept == self.num_classes:
            return answers
        others = answers[:, -1:].expand(-1, self.num_classes)
        return others.scatter(1, self.tensors["classes"][rows].long(), answers[:, :-1])

    def _write(self, rows: Tensor, logits: Tensor) -> None:
        if self.kept < self.num_classes:
            top, classes = logits.topk(self.kept)
            scaled = logits.scatter(1, classes, -torch.inf) / self.temperature
            mean = torch.logsumexp(scaled, 1, keepdim=True) - math.log(self.num_classes - self.kept)
            self.tensors["classes"][rows] = classes.to(self.tensors["classes"].dtype)
            logits = torch.cat([top, self.temperature * mean], dim=1)
        limit = torch.finfo(torch.float16).max
        self.tensors["answers"][rows] = logits.clamp(-limit, limit).half()


def _mean_of_each(rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in their order, and at each place the mean of all answers of its row; the same in every run, also on a GPU,
    where sums of `index_add` come in any order."""
    rows, order = rows.sort(stable=True)
    number = (rows.diff(prepend=rows[:1]) != 0).cumsum(0)  # 0, 0, 1, 2, 2, ...: which row, counted from 0
    counts = torch.zeros_like(rows).index_add_(0, number, torch.ones_like(rows))
    means = torch.segment_reduce(answers[order], "mean", lengths=counts, axis=0, unsafe=True)
    return rows, means[number]


def check_momentum(momentum: Any, name: str) -> None:
    """Raise ValueError unless it lies in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {momentum}")


def check_topk(topk: Any, name: str) -> None:
    """Raise ValueError unless it is a number of classes, or None."""
    if topk is not None and (not isinstance(topk, int) or topk < 0):
        raise ValueError(f"{name} must be a number of classes, 0 for all, or None, got {topk!r}")
