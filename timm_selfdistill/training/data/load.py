"""From a source to training and validation images: splits, labels, class names."""
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.utils.stratify import stratified_shuffle_split_generate_indices

from ..images import ValueRange
from ..label_columns import is_secret, label_splits, label_streams, label_val, label_values
from ..stream import row_count
from .files import ImageFiles, collect, left_out_text
from .layout import pick_split
from .sources import Reading, Source, read_source
from .splits import ImageSplits, Rows
from .tree import Tree

STREAM_SHARDS = 64
"""Of a folder that is streamed."""


def load_images(
        source: str | Path | datasets.Dataset | Mapping[str, datasets.Dataset | datasets.IterableDataset],
        *,
        name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        image_column: str | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        streaming: bool = False,
        unlabelled: bool = False,
        value_range: ValueRange | None = None,
        seed: int = 42,
) -> ImageSplits:
    """Find images, labels, class names and a validation split.

    A folder of image files is read as timm reads it: the innermost folder of an image is its class, classes are in
    natural order, links are followed. Folders in it that have the name of a split and hold class folders are splits.

    Args:
        source: a folder (one subfolder per class, or parquet or arrow files, WebDataset shards, `save_to_disk`'s, or
            images with a metadata.csv or metadata.jsonl), a parquet or arrow file, the name of a data set on the Hub,
            or a `datasets` object. `IterableDataset`s must not be shuffled: the training run does it.
        name: configuration of a Hub data set.
        train_split, val_split: names of splits; another name of the same split does, too ("val" for "validation").
            `val_split` None is the first of "validation", "val", "valid", "test" that has labels; where there is none,
            `val_fraction` of the training split, drawn by `seed` class by class.
        image_column, label_column: None finds them by their feature type, Image and ClassLabel, or in WebDataset shards
            by the name "cls". For a folder of image files `image_column` may hold their extensions, ".webp;.png"; None
            is timm's.
        num_classes: K; a stream whose labels have no names must be told. It may be larger than the number of names.
        streaming: read the images one after the other while training, instead of downloading and converting them
            first. There must be a validation split.
        unlabelled: the training images need no labels; those that they have are not used. Validation images may have
            some.
        value_range: black and white of images with more than 8 bits; None is the full range of their type.

    Raises:
        FileNotFoundError: nothing is there, or no images in it.
        PermissionError: a folder may not be read.
        ValueError: a folder can be read in two ways, a split or column is missing or ambiguous, there is but one class,
            a class has one image of which `val_fraction` should be taken, or a label is out of range.
    """
    if val_split is not None and val_split == train_split:
        raise ValueError(f"the validation split {val_split!r} is what is trained on; name another one, or none to take"
                         " val_fraction (--val-fraction) of the training images")
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be the values of black and of white, got {value_range}")
    reading = Reading(name, train_split, val_split, image_column, label_column, streaming, unlabelled)
    fraction = _Fraction(val_fraction, seed)
    found = read_source(source, reading)
    if found.is_folder:
        pair = _pair_folders(found, reading, fraction, num_classes)
    else:
        pair = _pair_tables(found, reading, fraction, num_classes)
    return ImageSplits(
        pair.train, pair.val, pair.image_column, pair.label_column, pair.class_names, pair.sampled,
        _describe(source, name, pair.val_name), pair.found, unlabelled, value_range)


def load_split(
        source: str | Path, split: str, *, name: str | None = None, image_column: str | None = None,
        label_column: str | None = None, value_range: ValueRange | None = None) -> ImageSplits:
    """One split as a whole, to measure a model on it; see `load_images`."""
    found = read_source(source, Reading(name, split, None, image_column, label_column))
    split = _find_split(found, split)
    if found.is_folder:
        tree = found.splits[split]
        _check_has_classes(tree)
        rows = collect(tree, labelled=True)
        classes, image_column, label_column, left_out = rows.class_names, "image", "label", rows.left_out
    else:
        rows = found.splits[split]
        image_column = _find_column(rows, image_column, datasets.Image, "image", found.name)
        label_column = _find_column(rows, label_column, datasets.ClassLabel, "label", found.name)
        rows, _ = label_splits(rows, None, label_column, None, found.name)
        classes, left_out = rows.features[label_column].names, found.left_out
    entry = _entry(split, len(rows), len(classes), found.name, left_out)
    return ImageSplits(rows, rows, image_column, label_column, classes, rows, _describe(source, name, split), [entry],
                       value_range=value_range)


@dataclass
class _Pair:
    """Training and validation images; `sampled` are those before a part of them was taken for validation."""

    train: Rows
    val: Rows
    sampled: Rows
    val_name: str
    image_column: str
    label_column: str | None
    class_names: list[str]
    found: list[dict[str, Any]]


@dataclass(frozen=True)
class _Fraction:
    """Of the training images, for validation."""

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.share}")

    def split(self, labels: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of training and validation images, class by class where there is room for each class: the same as
        those of `datasets.Dataset.train_test_split`.

        Args:
            labels: (N,), class indices, or all -1.

        Raises:
            ValueError: a class has one image only.
        """
        counts = np.unique(labels, return_counts=True)
        if names and counts[1].min() < 2:
            raise ValueError(
                f"class {names[counts[0][counts[1].argmin()]]!r} has one image, which cannot be both trained on and"
                " measured: add images of it, or a validation split")
        held_out = math.ceil(self.share * len(labels))
        kept, draw = len(labels) - held_out, np.random.default_rng(self.seed)
        if not names or min(kept, held_out) < len(counts[0]):
            order = draw.permutation(len(labels))
            return order[held_out:], order[:held_out]
        return next(stratified_shuffle_split_generate_indices(labels, kept, held_out, rng=draw))

    def of(self, split: str) -> str:
        return f"{self.share:g} of {split}"


def _pair_folders(found: Source, reading: Reading, fraction: _Fraction, num_classes: int | None) -> _Pair:
    labelled = not reading.unlabelled
    train_name = _find_split(found, reading.train_split, reading.train_split != "train")
    tree = found.splits[train_name]
    if labelled:
        _check_has_classes(tree)
    train = collect(tree, labelled)
    if labelled:
        train = replace(train, class_names=_checked_classes(train.class_names, num_classes, tree.path))
    val_name = _find_val_folder(found, reading)
    val_tree = None if val_name is None else found.splits[val_name]
    if val_tree is not None:
        if labelled:
            _check_has_classes(val_tree)
        val = collect(val_tree, labelled or (val_tree.has_classes and not val_tree.images),
                      train.class_names if labelled else None)
        sampled = train
    else:
        whole = train if labelled else collect(tree, tree.has_classes and not tree.images)
        sampled = whole
        indices = fraction.split(whole.labels if labelled else np.full(len(whole), -1), train.class_names)
        train, val = (whole.select(part) for part in indices)
        val = replace(val, left_out=Counter())
        val_name = fraction.of(train_name)
    train = _without_shared(train, val)
    lines = [_entry(train_name, len(train), train.class_count if labelled else 0, tree.path,
                    train.left_out + found.left_out),
             _entry(val_name, len(val), val.class_count, (val_tree or tree).path, val.left_out)]
    classes = val.class_names if val.labels is not None else []
    train, val, sampled = (_streamed(part) if reading.streaming else part for part in (train, val, sampled))
    return _Pair(train, val, sampled, val_name, "image", "label" if classes else None, classes, lines)


def _find_split(found: Source, name: str, named: bool = True) -> str:
    """Raise ValueError where there is none, or several; see `pick_split`."""
    split = pick_split(found.splits, name, named)
    if split is None:
        raise ValueError(f"{found.name} has no split {name!r}; it has {', '.join(map(repr, found.splits))}")
    return split


def _find_val_folder(found: Source, reading: Reading) -> str | None:
    """The validation split; None without any that has class folders."""
    if reading.val_split is not None:
        return _find_split(found, reading.val_split)
    usable = [name for name, tree in found.splits.items() if tree.has_classes or reading.unlabelled]
    return next(_val_splits(usable), None)


def _val_splits(splits: Iterable[str]) -> Iterator[str]:
    """What can be measured on, the first choice first."""
    splits = list(splits)
    for kind in ("val", "test"):
        if (split := pick_split(splits, kind, named=False)) is not None:
            yield split


def _check_has_classes(tree: Tree) -> None:
    if not tree.has_classes:
        raise ValueError(
            f"{tree.path} holds {tree.count} images, but no folders of classes; expected one folder with images per"
            " class, at least 2; to learn from a frozen network alone, without labels, give unlabelled (--unlabelled)")


def _checked_classes(names: list[str], num_classes: int | None, path: str) -> list[str]:
    """The names of the classes, and of those that the network has beside them.

    Raises:
        ValueError: there are too few or too many.
    """
    if len(names) < 2:
        raise ValueError(f"the training images of {path} are of one class only ({names}); 2 are needed")
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"num_classes is {num_classes}, but {path} has {len(names)} classes: {names[:5]}")
    return [*names, *map(str, range(len(names), num_classes or 0))]


def _without_shared(train: ImageFiles, val: ImageFiles) -> ImageFiles:
    """Training images that are not validation images, too; links to one file are one image."""
    kept = train.without(val)
    shared = len(train) - len(kept)
    if not len(kept):
        raise ValueError(f"all {shared} training images are validation images, too")
    if shared:
        warnings.warn(f"{shared} training images are validation images, too, or links to them: they are not trained on",
                      stacklevel=4)
        kept.left_out["that are validation images, too"] += shared
    return kept


def _streamed(files: ImageFiles) -> datasets.IterableDataset:
    return files.table.to_iterable_dataset(num_shards=min(len(files), STREAM_SHARDS))


def _entry(split: str, count: int | None, classes: int, origin: str, left_out: Counter[str]) -> dict[str, Any]:
    """What a run says of a split."""
    return {"split": split, "images": count, "classes": classes, "from": origin, "left_out": left_out_text(left_out)}


def _pair_tables(found: Source, reading: Reading, fraction: _Fraction, num_classes: int | None) -> _Pair:
    train_name = _find_split(found, reading.train_split, reading.train_split != "train")
    train, named = found.splits[train_name], found.name
    if train.features is None:
        raise ValueError(f"{named} does not tell its columns before it is read; leave out streaming")
    image_column = _find_column(train, reading.image_column, datasets.Image, "image", named)
    label_column = reading.label_column
    if not reading.unlabelled:
        label_column = _find_column(train, label_column, datasets.ClassLabel, "label", named)
    val_name = _find_val_table(found, reading, train_name, label_column)
    val = None if val_name is None else found.splits[val_name]
    if val is not None and isinstance(val, datasets.IterableDataset) != isinstance(train, datasets.IterableDataset):
        raise TypeError("training and validation images must both be streamed or neither, got"
                        f" {type(train).__name__} and {type(val).__name__}")
    if reading.unlabelled:
        label_column = _find_val_labels(train if val is None else val, label_column, named)
    sampled = train
    if isinstance(train, datasets.IterableDataset):
        if val is None:
            raise ValueError(
                f"{named} has no validation split, and a stream cannot be divided; name one as val_split"
                " (--val-split), or leave out streaming")
        class_names = label_streams(None if reading.unlabelled else train, val, label_column, num_classes, named)
    elif reading.unlabelled:
        if val is None:
            indices = fraction.split(np.full(len(train), -1), [])
            train, val = (train.select(part) for part in indices)
            val_name = fraction.of(train_name)
        val, label_column, class_names = label_val(val, label_column, num_classes)
    else:
        train, val = label_splits(train, val, label_column, num_classes, named)
        class_names = train.features[label_column].names
        if val is None:
            indices = fraction.split(label_values(train, label_column), class_names)
            train, val = (train.select(part) for part in indices)
            val_name = fraction.of(train_name)
    lines = [_entry(train_name, row_count(train), 0 if reading.unlabelled else len(class_names), named,
                    found.left_out),
             _entry(val_name, row_count(val), len(class_names), named, Counter())]
    return _Pair(train, val, sampled, val_name, image_column, label_column, class_names, lines)


def _find_val_table(found: Source, reading: Reading, train_name: str, label_column: str | None) -> str | None:
    """The validation split; None without any whose labels are known."""
    if reading.val_split is not None:
        return _find_split(found, reading.val_split)
    for split in _val_splits(name for name in found.splits if name != train_name):
        if reading.unlabelled or not is_secret(found.splits[split], label_column):
            return split
        warnings.warn(f"the labels of split {split!r} are all -1, so that nothing can be measured on it; another one is"
                      " taken, or val_fraction (--val-fraction) of the training images", stacklevel=4)
    return None


def _find_column(rows: Any, column: str | None, feature: type, what: str, named: str) -> str:
    if column is not None:
        if column not in rows.features:
            raise ValueError(f"{named} has no column {column!r}; it has {', '.join(rows.features)}")
        return column
    found = [key for key, value in rows.features.items() if isinstance(value, feature)]
    if what == "label" and not found and "cls" in rows.features:
        return "cls"
    if len(found) == 1:
        return found[0]
    name_it = f"name one as {what}_column ({'--input-key' if what == 'image' else '--target-key'})"
    if found:
        raise ValueError(f"{named} has several {what} columns: {', '.join(found)}; {name_it}")
    raise ValueError(
        f"{named} has no {what} column ({feature.__name__}) among {', '.join(rows.features)}; {name_it}")


def _find_val_labels(val: Any, column: str | None, named: str) -> str | None:
    """The label column of validation images, if they have one."""
    found = column is not None or "cls" in val.features or any(
        isinstance(value, datasets.ClassLabel) for value in val.features.values())
    return _find_column(val, column, datasets.ClassLabel, "label", named) if found else None


def _describe(source: Any, name: str | None, split: str) -> dict[str, Any]:
    if not isinstance(source, (str, Path)):
        return {"name": "images", "type": "imagefolder", "split": split}
    if Path(source).exists():
        return {"name": Path(source).resolve().name, "type": "imagefolder", "split": split}
    return {"name": str(source), "type": str(source), "config": name, "split": split, "hub_id": str(source)}
