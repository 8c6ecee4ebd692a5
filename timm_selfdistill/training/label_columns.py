"""Label columns: class indices with names."""
import warnings
from typing import Any

import datasets
import numpy as np

from .labels import NO_LABEL, check_range


def label_splits(
        train: datasets.Dataset, val: datasets.Dataset | None, column: str, num_classes: int | None, name: str,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Both with class indices that were looked at; a warning says where classes have no training image."""
    named = isinstance(train.features.get(column), datasets.ClassLabel) and len(train.features[column].names)
    train = encode_labels(train, column, num_classes=num_classes)
    class_names = train.features[column].names
    found = check_labels(train, column, len(class_names), "training")
    _warn_of_gaps(found, class_names[:named or found[-1] + 1])
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


def why_unlabelled(rows: Any, column: str) -> str | None:
    """Why nothing can be measured on a split, as on a test split whose labels are secret; None where it can.

    Of a stream the first row tells.
    """
    if column not in rows.features:
        return f"has no column {column!r}"
    _check_column(rows, column)
    if isinstance(rows, datasets.IterableDataset):
        values = {row[column] for row in rows.select_columns([column]).take(1)}
    else:
        values = set(rows.unique(column))
    if not values:
        return "is empty"
    return "has labels that are all -1 or missing" if values <= {NO_LABEL, None} else None


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


def _warn_of_gaps(found: np.ndarray, class_names: list[str]) -> None:
    missing = [f"{index} ({name})" if name != str(index) else name for index, name in enumerate(class_names)
               if index not in set(found.tolist())]
    if missing:
        shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        begin = ", since they begin at 1" if missing == ["0"] else ""
        warnings.warn(f"no training image has label {shown}{begin}: {len(class_names)} classes, {len(found)} of them"
                      " with images", stacklevel=5)


def label_values(rows: datasets.Dataset, column: str) -> np.ndarray:
    """(N,)."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_numpy()


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
