"""Label columns: class indices with names."""
import warnings
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .sampling import ATTEMPTS

NO_LABEL = -1
"""In the place of a class index, as `datasets` has it in splits whose labels are kept secret."""


def label_splits(
        train: datasets.Dataset, val: datasets.Dataset | None, column: str, num_classes: int | None, name: str,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Both with class indices that were looked at."""
    train = encode_labels(train, column, num_classes=num_classes)
    class_names = train.features[column].names
    found = check_labels(train, column, len(class_names), "training")
    if len(found) < 2:
        names = [class_names[label] for label in found]
        raise ValueError(f"the training images of {name} are of one class only ({names}); 2 are needed")
    if val is not None:
        val = encode_labels(val, column, class_names, len(class_names))
        check_labels(val, column, len(class_names), "validation")
    return train, val


def label_val(
        val: datasets.Dataset, column: str | None, num_classes: int | None,
) -> tuple[datasets.Dataset, str | None, list[str]]:
    """Validation images, the only ones whose labels are looked at, with label column and class names, if all of them
    have labels, and none that are kept secret.

    Args:
        num_classes: of the network; labels of more classes than it has are for `ImageSplits.fitting_labels` to judge.
    """
    if column is None:
        return val, None, []
    values = set(val.unique(column))
    if values & {NO_LABEL, None}:
        if len(values - {NO_LABEL, None}):
            warnings.warn(f"some of the {len(val)} validation images have no label: the labels of the others are not"
                          " used, agreement with the deepest classifier is measured", stacklevel=3)
        return val, None, []
    val = encode_labels(val, column)
    if num_classes and num_classes > len(val.features[column].names):
        val = encode_labels(val, column, num_classes=num_classes)
    class_names = val.features[column].names
    check_labels(val, column, len(class_names), "validation")
    return val, column, class_names


def label_streams(
        train: datasets.IterableDataset | None, val: datasets.IterableDataset, column: str | None,
        num_classes: int | None, name: str) -> list[str]:
    """The class names of both, or of validation images alone, if they have any."""
    if train is None:
        return [] if column is None else stream_class_names(val, column, num_classes=num_classes)
    class_names = stream_class_names(train, column, num_classes=num_classes)
    if len(class_names) < 2:
        raise ValueError(f"the training images of {name} are of one class only ({class_names}); 2 are needed")
    return stream_class_names(val, column, class_names, len(class_names))


def encode_labels(
        rows: datasets.Dataset, column: str, class_names: list[str] | None = None, num_classes: int | None = None,
) -> datasets.Dataset:
    """Make the column a ClassLabel, with the class names of the training split where they are given.

    Args:
        num_classes: K; classes beyond those that the column names are named by their index.
    """
    _check_column(rows, column)
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        values = rows.unique(column)
        if None in values or any(isinstance(value, float) for value in values):
            raise TypeError(f"column {column!r} must hold class indices or names, got {feature}: {values[:3]}")
        if isinstance(values[0], str):
            names = class_names or _extended(sorted(values), num_classes)
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise ValueError(f"classes {unknown[:5]} are in the validation split but not in the training split")
        else:
            names = class_names or list(map(str, range(num_classes or max(values) + 1)))
            check_range(min(values), max(values), len(names), column)
        feature = datasets.ClassLabel(names=names)
    feature = datasets.ClassLabel(names=_extended(feature.names, num_classes))
    _check_names(feature.names, class_names, num_classes)
    return rows if rows.features[column] == feature else rows.cast_column(column, feature)


def stream_class_names(
        rows: datasets.IterableDataset, column: str, class_names: list[str] | None = None,
        num_classes: int | None = None) -> list[str]:
    """Of a column whose values nobody has seen yet.

    Args:
        class_names: those of the training split.
        num_classes: K, needed where the column holds bare class indices.
    """
    _check_column(rows, column)
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = _extended(feature.names, num_classes)
        _check_names(names, class_names, num_classes)
        return names
    if not feature.dtype.startswith(("int", "uint")):
        raise TypeError(
            f"column {column!r} of a stream must hold class indices, got {feature}; their names are known only when all"
            " rows were read: leave out streaming")
    if class_names is None and num_classes is None:
        raise ValueError(
            f"column {column!r} of the stream does not say how many classes there are; give num_classes"
            " (--num-classes)")
    return class_names or list(map(str, range(num_classes)))


def check_labels(rows: datasets.Dataset, column: str, num_classes: int, split_name: str) -> np.ndarray:
    """The labels that occur; raise for those that cannot be."""
    if len(rows) == 0:
        raise ValueError(f"the {split_name} split is empty")
    labels = rows.select_columns([column]).with_format("arrow")[:][column]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} of {len(rows)} rows of the {split_name} split have no label")
    values = np.unique(labels.to_numpy())
    check_range(int(values[0]), int(values[-1]), num_classes, column)
    return values


def check_range(low: int, high: int, num_classes: int, column: str) -> None:
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels in column {column!r} must lie in 0..{num_classes - 1}, got {low if low < 0 else high}"
            + ("; -1 marks a split without labels: choose another" if low == -1 else "")
        )


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


def is_labelled(data: Dataset) -> bool:
    """Whether the images of a data set have labels, which its `label_column` tells, or its first sample."""
    if hasattr(data, "label_column"):
        return data.label_column is not None
    label = next(iter(data))[1] if isinstance(data, IterableDataset) else _first(data)[1]
    return not (np.ndim(label) == 0 and int(label) == NO_LABEL)


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


def _check_column(rows: Any, column: str) -> None:
    feature = rows.features.get(column)
    if feature is None:
        raise ValueError(f"the validation split has no column {column!r}; it has {', '.join(rows.features)}")
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise TypeError(f"column {column!r} must hold one class index or name a row, got {feature}")


def _extended(names: list[str], num_classes: int | None) -> list[str]:
    return [*names, *map(str, range(len(names), num_classes or 0))]


def _check_names(names: list[str], class_names: list[str] | None, num_classes: int | None) -> None:
    if class_names is not None and names != class_names:
        raise ValueError(f"training and validation split differ in classes: {class_names[:5]}, {names[:5]}")
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"num_classes is {num_classes}, but the data have {len(names)} classes: {names[:5]}")
