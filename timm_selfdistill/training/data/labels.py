"""Labels: class indices, class names, and datasets without labels."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .sampling import ATTEMPTS

if TYPE_CHECKING:
    from .sampling import IndexedImages
    from .streams import RunImages


def some_names(names: list[str], count: int = 3) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")


def listed(names: list[str], other: list[str] | None = None) -> str:
    """Return class names as text for a message: all of them, or some of a long list.

    Args:
        other: list to compare with; a long list is then shown from the first difference on.
    """
    if len(names) <= 20:
        return f"{len(names)} classes ({some_names(names, 20)})"
    if other is None:
        return f"{len(names)} classes ({some_names(names)})"
    first = next((index for index, pair in enumerate(zip(names, other)) if len(set(pair)) > 1), len(other))
    return f"{len(names)} classes (from index {first}: {some_names(names[first:])})"


NO_LABEL = -1
"""Label of images without one, as in the `datasets` splits whose labels are hidden."""


def check_range(low: int, high: int, num_classes: int, column: str) -> None:
    if low < 0 or high >= num_classes:
        hint = "; -1 marks a split without labels: choose another split" if low == -1 else ""
        if (low, high) == (1, num_classes):
            hint = "; they start at 1, but must start at 0"
        raise ValueError(
            f"labels in column {column!r} must lie in 0..{num_classes - 1}, got {low if low < 0 else high}{hint}"
        )


def check_classes(model: nn.Module, data: "RunImages") -> int | None:
    """Return the number of classes of model and images; None if neither knows it.

    Raises:
        ValueError: the numbers differ.
    """
    classes, in_data = getattr(model, "num_classes", None), getattr(data, "num_classes", None)
    if classes is not None and in_data is not None and classes != in_data:
        raise ValueError(
            f"the model has {classes} classes, but the data have {in_data}; create the model with"
            f" num_classes={in_data}, or for a frozen model use the images without labels:"
            f" load_images(..., unlabelled=True) and images.fitting_labels({classes})"
        )
    return classes or in_data


def check_first_labels(num_classes: int, mixes: bool, train_data: "RunImages", val_data: "RunImages") -> None:
    """Check the label of the first sample of map-style datasets; see `check_targets` and `check_indices`."""
    for data, check in ((train_data, partial(check_targets, mixes=mixes)), (val_data, check_indices)):
        if not isinstance(data, IterableDataset) and is_labelled(data):
            check(default_collate([_first(data)[1]]), num_classes)


def check_targets(y: Any, num_classes: int, mixes: bool = False) -> Tensor:
    """Return the labels of a training batch as the losses expect them: class indices (B,) or soft labels (B, K).

    Args:
        y: labels from the DataLoader; class indices may be (B, 1). Values are checked only on the CPU.
        num_classes: K.
        mixes: whether the run turns class indices into soft labels (mixup, CutMix, smoothing).

    Raises:
        ValueError: the labels are neither, e.g. several classes per image.
    """
    if not _are_soft(y, num_classes, "training"):
        return _check_range(y, num_classes, "training")
    y = y if y.is_floating_point() else y.float()
    if mixes:
        raise ValueError(
            "mixup, cutmix and smoothing turn class indices into soft labels, but the training images already have soft"
            " labels; leave these settings out, or use class indices"
        )
    return y


def check_indices(y: Any, num_classes: int) -> Tensor:
    """Return the class indices (B,) of a validation batch; for soft labels, the most likely class.

    Args:
        y: class indices (B,) or (B, 1), or soft labels (B, K), e.g. one-hot.
        num_classes: K.

    Raises:
        ValueError: the labels are neither, e.g. several classes per image.
    """
    return y.argmax(1) if _are_soft(y, num_classes, "validation") else _check_range(y, num_classes, "validation")


def _are_soft(y: Any, num_classes: int, which: str) -> bool:
    """Whether labels are probabilities (B, K).

    Raises:
        ValueError: they have the shape (B, K), but are not probabilities.
    """
    if not (isinstance(y, Tensor) and y.ndim == 2 and y.shape[1] == num_classes > 1):
        return False
    if y.device.type == "cpu" and not ((y >= 0).all() and (y.sum(1) - 1).abs().max() < 1e-2):
        raise _wrong_labels(
            y, num_classes, which, ", whose rows do not sum to 1; several classes per image are not supported"
        )
    return True


def _check_range(y: Any, num_classes: int, which: str) -> Tensor:
    """Return class indices (B,); raise ValueError if they are not in range."""
    whole = isinstance(y, Tensor) and not y.is_floating_point() and y.dtype != torch.bool
    if not whole or y.shape not in ((len(y),), (len(y), 1)):
        raise _wrong_labels(y, num_classes, which)
    if y.device.type == "cpu" and len(y):
        low, high = (int(value) for value in y.aminmax())
        if low < 0 or high >= num_classes:
            raise _wrong_labels(y, num_classes, which, f", with the class index {low if low < 0 else high}")
    return y.flatten().long()


def _wrong_labels(y: Any, num_classes: int, which: str, more: str = "") -> ValueError:
    given = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    return ValueError(
        f"{which} labels must be class indices (B,) from 0 to {num_classes - 1}, or soft labels (B,"
        f" {num_classes}) that sum to 1, got {given}{more}"
    )


def name_classes(model: nn.Module, *data: "RunImages") -> list[str]:
    """Return the class names in the order of their indices, from the model or the images, and store them in a timm
    model that has none.

    Raises:
        ValueError: the names of model and images differ.
    """
    backbone = getattr(model, "backbone", model)
    known = getattr(backbone, "pretrained_cfg", {})
    names = list(known.get("label_names") or ())
    own = names if len(names) == getattr(model, "num_classes", None) else []
    for found in filter(None, (list(getattr(part, "class_names", ())) for part in data)):
        if own and found != own:
            raise ValueError(
                f"the model has {listed(own, found)}, but the images have {listed(found, own)}; reorder the images with"
                " images.in_order(names), or rename the model's classes with"
                " model_data_config(backbone, class_names=images.class_names)"
            )
        own = found
    if own and known:
        known.update(label_names=own)
    return own


def is_labelled(data: "RunImages") -> bool:
    """Whether the images of a dataset have labels, judged by its `label_column` or its first sample."""
    if hasattr(data, "label_column"):
        return data.label_column is not None
    label = next(iter(data))[1] if isinstance(data, IterableDataset) else _first(data)[1]
    return not (np.ndim(label) == 0 and bool(label == NO_LABEL))


class ImagesAlone(Dataset[tuple[Tensor, int]]):
    """Dataset of (image, -1) from a dataset of images (C, H, W) without labels."""

    label_column = None

    def __init__(self, images: "IndexedImages"):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], NO_LABEL


def paired(data: "RunImages", which: str) -> "RunImages":
    """Return a map-style dataset of images without labels as (image, -1), and any other dataset unchanged.

    Args:
        which: "training" or "validation", for the message.

    Raises:
        TypeError: the data are not images (C, H, W) as floating-point tensors, with or without labels.
    """
    if isinstance(data, DataLoader):
        raise TypeError(
            f"the {which} data must be a dataset, for which Trainer creates its own DataLoader, got a"
            f" DataLoader; pass its dataset, {type(data.dataset).__name__}"
        )
    if hasattr(data, "label_column") or isinstance(data, IterableDataset):
        return data
    sample = _first(data)
    image = sample[0] if isinstance(sample, (tuple, list)) and len(sample) == 2 else sample
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        raise TypeError(
            f"expected {which} samples (image, label) with the image as a floating-point tensor (C, H, W), got"
            f" {_kind(sample)}; convert them in the dataset's __getitem__ or transform"
        )
    return ImagesAlone(data) if sample is image else data


def _kind(sample: Any) -> str:
    if isinstance(sample, (tuple, list)):
        return f"({', '.join(map(_kind, sample))})"
    if isinstance(sample, Tensor):
        return f"{str(sample.dtype).removeprefix('torch.')} tensor {tuple(sample.shape)}"
    return f"a dict of {', '.join(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__


def _first(data: "IndexedImages") -> Any:
    """Return the first sample that can be read."""
    for index in range(min(ATTEMPTS, len(data))):
        try:
            return data[index]
        except (OSError, ValueError) as error:  # handled by `on_bad_sample` when the images are loaded
            last = error
    raise last
