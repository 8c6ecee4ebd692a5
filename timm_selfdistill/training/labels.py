"""Class indices of images, and data sets that have none."""
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .sampling import ATTEMPTS, seeded

NO_LABEL = -1
"""In the place of a class index, as `datasets` has it in splits whose labels are kept secret."""


def check_range(low: int, high: int, num_classes: int, column: str) -> None:
    if low < 0 or high >= num_classes:
        hint = "; -1 marks a split without labels: choose another" if low == -1 else ""
        if (low, high) == (1, num_classes):
            hint = "; they begin at 1, and must begin at 0"
        raise ValueError(
            f"labels in column {column!r} must lie in 0..{num_classes - 1}, got {low if low < 0 else high}{hint}")


def check_classes(model: nn.Module, data: Dataset) -> int:
    """How many classes a model and its images have, as far as either knows.

    Raises:
        ValueError: they differ.
    """
    classes, in_data = getattr(model, "num_classes", None), getattr(data, "num_classes", None)
    if classes is not None and in_data is not None and classes != in_data:
        raise ValueError(
            f"the model has {classes} classes, the data {in_data}; create the model with num_classes={in_data}, or for"
            f" a model that stays as it is take the images without labels: load_images(..., unlabelled=True) and"
            f" images.fitting_labels({classes})")
    return classes or in_data


def check_labels(data: Dataset, what: str, num_classes: int) -> bool:
    """Look at the label of the first image that can be read; whether it is soft, (K,). A stream checks its own.

    Args:
        what: the images are, for the error message.

    Raises:
        ValueError: it is no class index and no distribution over the classes.
    """
    if isinstance(data, IterableDataset):
        return False
    with seeded(0):
        label = _first(data)[1]
    if isinstance(label, (int, float, np.generic, np.ndarray, Tensor)):
        class_indices(torch.as_tensor(label)[None], num_classes, what, unlabelled=True)
        return np.ndim(label) == 1
    raise ValueError(f"the {what} images must have {_expected(num_classes)}, got {type(label).__name__} {label!r:.80}")


def class_indices(y: Tensor, num_classes: int, what: str, unlabelled: bool = False) -> Tensor:
    """Class indices (B,) of a batch of labels on the CPU: themselves, or the likeliest classes of soft labels (B, K).

    Args:
        what: the images are, for the error message.
        unlabelled: -1 is allowed.

    Raises:
        ValueError: they are neither.
    """
    soft = y.is_floating_point() and y.ndim == 2 and y.shape[1] == num_classes
    if soft and bool((y >= 0).all() & ((y.float().sum(1) - 1).abs() < 1e-2).all()):
        return y.argmax(1)
    if soft:
        raise ValueError(f"the {what} images must have {_expected(num_classes)}, got {y[0].tolist()}"[:300]
                         + ", which is none: accuracy is of one class an image")
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"the {what} images must have {_expected(num_classes)}, got {y.dtype} of shape {tuple(y.shape[1:])}")
    low, high = (int(bound) for bound in y.aminmax())
    if low < (NO_LABEL if unlabelled else 0) or high >= num_classes:
        hint = "; -1 stands for an image without a label" if low == NO_LABEL else ""
        raise ValueError(f"the {what} images must have {_expected(num_classes)}, got {low if low < 0 else high}{hint}")
    return y.long()


def _expected(num_classes: int) -> str:
    return (f"class indices, whole numbers from 0 to {num_classes - 1}, or probabilities ({num_classes},) that sum to 1"
            " as labels")


def is_labelled(data: Dataset) -> bool:
    """Whether the images of a data set have labels, which its `label_column` tells, or its first sample."""
    if hasattr(data, "label_column"):
        return data.label_column is not None
    label = next(iter(data))[1] if isinstance(data, IterableDataset) else _first(data)[1]
    return not (np.ndim(label) == 0 and bool(label == NO_LABEL))


class ImagesAlone(Dataset):
    """A data set of images (C, H, W) with no labels, as (image, -1)."""

    label_column = None

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], NO_LABEL


def paired(data: Dataset) -> Dataset:
    """A map-style data set of images alone with -1 for their labels; any other as it is."""
    if hasattr(data, "label_column") or isinstance(data, IterableDataset):
        return data
    return ImagesAlone(data) if isinstance(_first(data), Tensor) else data


def _first(data: Dataset) -> Any:
    """The first sample that can be read."""
    for index in range(min(ATTEMPTS, len(data))):
        try:
            return data[index]
        except (OSError, ValueError) as error:  # `on_bad_sample` decides about it when the images are loaded
            last = error
    raise last
