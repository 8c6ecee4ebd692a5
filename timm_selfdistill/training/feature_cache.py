"""What a frozen backbone gives for a data set, kept in files, so that it runs once."""
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ..output import BackboneOutput
from .accelerator import ask_main_process
from .config import TrainConfig
from .loading import loader_settings
from .update import Updater


class TensorFile(NamedTuple):
    """A tensor (images, *shape) in a file that is mapped to memory."""

    path: str
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.count * prod(self.shape) * self.dtype.itemsize

    def open(self) -> Tensor:
        size = self.count * prod(self.shape)
        return torch.from_file(self.path, shared=True, size=size, dtype=self.dtype).view(self.count, *self.shape)


class FeatureCache(Dataset):
    """(BackboneOutput, label) of each image of a data set, once `fill` was called.

    Args:
        data: map-style data set of (image (C, H, W), label).
    """

    def __init__(self, data: Dataset):
        self.data: Dataset | None = data
        self.count = len(data)
        self.files: list[TensorFile] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[BackboneOutput, Any]:
        *maps, logits, label = (tensor[index] for tensor in self.tensors)
        return BackboneOutput(tuple(maps), logits), label

    def __getstate__(self) -> dict[str, Any]:
        """For a loading process, which maps the files itself."""
        return {"data": None, "count": self.count, "files": self.files}

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [file.open() for file in self.files]

    def fill(self, update: Updater, folder: Path, config: TrainConfig) -> None:
        """Run the backbone over the images; call it on every process, each does its part.

        Args:
            update: holds the model.
            folder: gets the files; every process must see it.

        Raises:
            OSError: the disk is too small.
        """
        accelerator = update.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        first = self._compute(update, *default_collate([self.data[0]]))
        self.files = [TensorFile(str(folder / f"{index}.bin"), self.count, tuple(value.shape[1:]), value.dtype)
                      for index, value in enumerate(first)]
        ask_main_process(accelerator, partial(_create, folder, self.files))
        begin = rank
        loader = DataLoader(
            Subset(self.data, range(rank, self.count, world)), config.batch_size,
            **loader_settings(config, accelerator) | {"persistent_workers": False})
        for batch in loader:
            for tensor, value in zip(self.tensors, self._compute(update, *batch)):
                tensor[begin::world][:len(value)] = value
            begin += world * len(value)
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def _compute(self, update: Updater, x: Tensor, label: Tensor) -> list[Tensor]:
        x, _ = update.to_device(x, label)
        with update.accelerator.autocast():
            maps, logits = update.plain_task.get_trainable_module().forward_backbone(x)
        return [*(value.cpu() for value in (*maps, logits)), label]


def fill_caches(caches: list[FeatureCache], update: Updater, output: Path, config: TrainConfig) -> None:
    """Fill those of training and validation images; their files lie in the run directory."""
    for cache, name in zip(caches, ("train", "val")):
        cache.fill(update, output / "features" / name, config)


def drop_caches(caches: list[FeatureCache], output: Path, accelerator: Accelerator) -> None:
    """Remove the files, at the end of a run."""
    if caches and accelerator.is_main_process:
        shutil.rmtree(output / "features", ignore_errors=True)


def _create(folder: Path, files: Sequence[TensorFile]) -> None:
    """Make room."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed, free = sum(file.bytes for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the features of {files[0].count} images take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB"
            " free; leave out cache_features, or choose another output, fewer images or a smaller image size")
