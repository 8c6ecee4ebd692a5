"""Tensors in files that are mapped to memory, for what may be larger than it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from errno import ENOSPC
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorFile:
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


def create_files(folder: Path, files: Sequence[TensorFile], what: str, remedy: str) -> None:
    """Make files of zeros in a folder of their own, which is emptied first. Disk space is reserved: writing to a mapped
    file without it kills the process with SIGBUS.

    Args:
        what: the files hold, in the plural, for the message.
        remedy: what to do where the disk is too small.

    Raises:
        OSError: the disk is too small; nothing is left in the folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.bytes for file in files), shutil.disk_usage(folder.parent).free
    try:
        if needed > free:
            raise OSError(ENOSPC, "no space left on device")
        for file in files:
            path = Path(file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as opened:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, file.bytes)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{what} take {needed / 1e6:,.0f} MB, and {folder.parent} has {free / 1e6:,.0f} MB free"
            f" ({error.strerror}); {remedy}"
        ) from error
