"""Images in memory for runs of a minute: drawn class by class, moved by a pixel while they train."""

import hashlib
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
from fashion_mnist import read_idx
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

TYPEFACES = Path("output/typefaces")
DATA = {"families": 100, "characters": 62, "fashion": 10}
"""Classes of each data set: `typefaces.py` makes the first two, the third is Fashion-MNIST."""
FASHION_VALIDATION = 10_000
"""The last images of the training file."""


class Images(Dataset):
    """Images (1, 32, 32) from -1 to 1, with class indices; larger ones are interpolated, and have three channels.

    Args:
        moved: by up to a pixel in each direction, anew each time that an image is read.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, moved: bool, size: int = 32):
        self.labels, self.border, self.size = labels.tolist(), int(moved), size
        padded = pad(pixels, [self.border] * 4, value=-1.0)
        self.windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 1, top, left, 32, 32), a view

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = torch.randint(2 * self.border + 1, (2,)).tolist()
        image = self.windows[index, :, top, left]
        if self.size != 32:
            image = interpolate(image[None], self.size, mode="bilinear")[0].expand(3, -1, -1)
        return image, self.labels[index]


def load_training(data: str, per_class: int | None, seed: int, size: int = 32) -> Images:
    """So many images of each class, or all where there are fewer; None takes all."""
    pixels, labels = read_split(data, "train")
    if per_class is not None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[labels[order] == label][:per_class] for label in range(DATA[data])])
        pixels, labels = pixels[rows], labels[rows]
    return Images(pixels, labels, moved=True, size=size)


def load_measured(data: str, split: str, size: int = 32) -> Images:
    """All images of "validation" or "test"."""
    return Images(*read_split(data, split), moved=False, size=size)


@cache
def digest(data: str) -> str:
    """The first half of the SHA-256 of all training images and labels."""
    pixels, labels = read_split(data, "train")
    return hashlib.sha256(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:32]


@cache
def read_split(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) from -1 to 1, and class indices (N,)."""
    pixels, labels = _read_fashion(split) if data == "fashion" else _read_typefaces(data, split)
    edge = (32 - pixels.shape[-1]) // 2
    pixels = np.pad(pixels, ((0, 0), (edge, edge), (edge, edge)))
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1, torch.tensor(labels, dtype=torch.long)


def _read_typefaces(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    path = TYPEFACES / data / f"{split}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; make it with python benchmarks/typefaces.py")
    rows = datasets.Dataset.from_parquet(str(path))
    return np.stack([np.asarray(image) for image in rows["image"]]), np.array(rows["label"])


def _read_fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = "t10k" if split == "test" else "train"
    pixels = read_idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
    if split == "test":
        return pixels, labels
    end = len(labels) - FASHION_VALIDATION
    return (pixels[:end], labels[:end]) if split == "train" else (pixels[end:], labels[end:])
