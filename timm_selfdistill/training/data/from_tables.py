"""Training and validation images from tables of `datasets`."""
import warnings
from collections import Counter
from typing import Any

import datasets

from ..label_columns import label_splits, label_streams, label_val, label_values, why_unlabelled
from ..stream import row_count
from .found import Found, entry
from .fraction import ValFraction
from .from_folder import same_split
from .layout import val_splits
from .sources import Reading, Source


def find_in_tables(source: Source, reading: Reading, fraction: ValFraction, num_classes: int | None) -> Found:
    """Both, with the classes of the training images, or of those for validation where the others have none.

    Raises:
        ValueError: a column is missing or ambiguous, labels do not fit, or a stream has no validation split.
        TypeError: one of them is streamed, and the other is not; or the labels are none.
    """
    name, path = source.find_split(reading.train_split, named=reading.train_split != "train"), source.name
    train = source.splits[name]
    if train.features is None:
        raise ValueError(f"{path} does not tell its columns before it is read; leave out streaming")
    image_column = find_column(train, reading.image_column, datasets.Image, "image", path)
    label_column = reading.label_column
    if not reading.unlabelled:
        label_column = find_column(train, label_column, datasets.ClassLabel, "label", path)
    val_name = _val_split(source, reading, name, label_column)
    if val_name == name:
        raise same_split(name)
    val, sampled = source.splits.get(val_name), train
    if val is not None and isinstance(val, datasets.IterableDataset) != isinstance(train, datasets.IterableDataset):
        raise TypeError("training and validation images must both be streamed or neither, got"
                        f" {type(train).__name__} and {type(val).__name__}")
    if reading.unlabelled:
        label_column = _find_val_labels(train if val is None else val, label_column, path)
    if isinstance(train, datasets.IterableDataset):
        if val is None:
            raise ValueError(
                f"{path} has no validation split, and a stream cannot be divided; name one as val_split"
                " (--val-split), or leave out streaming")
        class_names = label_streams(None if reading.unlabelled else train, val, label_column, num_classes, path)
    elif reading.unlabelled:
        if val is None:
            train, val = _divide(train, None, fraction)
        val, label_column, class_names = label_val(val, label_column, num_classes)
    else:
        train, val = label_splits(train, val, label_column, num_classes, path)
        class_names = train.features[label_column].names
        if val is None:
            train, val = _divide(train, label_column, fraction)
    val_name = val_name or fraction.of(name)
    return Found(
        train, val, sampled, val_name, image_column, label_column, class_names,
        [entry(name, row_count(train), 0 if reading.unlabelled else len(class_names), path, source.left_out),
         entry(val_name, row_count(val), len(class_names), path, Counter())])


def find_column(rows: Any, column: str | None, feature: type, what: str, path: str) -> str:
    """The column of images or labels, by name or by type.

    Raises:
        ValueError: there is none, or there are several.
    """
    if column is not None:
        if column not in rows.features:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(rows.features)}")
        return column
    found = [key for key, value in rows.features.items() if isinstance(value, feature)]
    if what == "label" and not found and "cls" in rows.features:
        return "cls"
    if len(found) == 1:
        return found[0]
    name_it = f"name one as {what}_column ({'--input-key' if what == 'image' else '--target-key'})"
    if found:
        raise ValueError(f"{path} has several {what} columns: {', '.join(found)}; {name_it}")
    raise ValueError(
        f"{path} has no {what} column ({feature.__name__}) among {', '.join(rows.features)}; {name_it}")


def _val_split(source: Source, reading: Reading, train_name: str, label_column: str | None) -> str | None:
    """The validation split; None without any whose labels are known."""
    if reading.val_split is not None:
        return source.find_split(reading.val_split)
    for split in val_splits(name for name in source.splits if name != train_name):
        reason = None if reading.unlabelled else why_unlabelled(source.splits[split], label_column)
        if reason is None:
            return split
        warnings.warn(f"split {split!r} {reason}, so that nothing can be measured on it; another one is taken, or"
                      " val_fraction (--val-fraction) of the training images", stacklevel=4)
    return None


def _find_val_labels(val: Any, column: str | None, path: str) -> str | None:
    """The label column of validation images, if they have one."""
    found = column is not None or "cls" in val.features or any(
        isinstance(value, datasets.ClassLabel) for value in val.features.values())
    return find_column(val, column, datasets.ClassLabel, "label", path) if found else None


def _divide(
        rows: datasets.Dataset, label_column: str | None, fraction: ValFraction,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels = None if label_column is None else label_values(rows, label_column)
    names = [] if label_column is None else rows.features[label_column].names
    kept, held_out = fraction.draw(labels, len(rows), names)
    return rows.select(kept), rows.select(held_out)
