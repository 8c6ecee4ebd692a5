"""From a source to training and validation images."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from ..images import ValueRange, ValueRanges
from ..label_columns import check_labels, encode_labels, why_unlabelled
from .files import collect
from .fingerprint import fingerprint
from .found import entry
from .fraction import ValFraction
from .from_folder import check_has_classes, find_in_folder, same_split
from .from_tables import find_column, find_in_tables
from .layout import val_splits
from .sources import UNDIVIDED, Reading, Source, read_source
from .splits import ImageSplits


def load_images(
        source: str | Path | datasets.Dataset | Mapping[str, datasets.Dataset | datasets.IterableDataset],
        *,
        name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = ValFraction.share,
        image_column: str | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        streaming: bool = False,
        unlabelled: bool = False,
        value_range: ValueRange | ValueRanges | None = None,
        seed: int = ValFraction.seed,
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
            first. There must be a validation split. A folder of image files is not streamed: it is never converted.
        unlabelled: the training images need no labels; those that they have are not used. Validation images may have
            some.
        value_range: black and white of images with more than 8 bits, perhaps by their kind, see `ImageSplits.sample`;
            None is the full range of their type.

    Raises:
        FileNotFoundError: nothing is there, or no images in it.
        PermissionError: a folder may not be read.
        ValueError: a folder can be read in two ways, a split or column is missing or ambiguous, there is but one class,
            a class has one image of which `val_fraction` should be taken, or a label is out of range.
    """
    if isinstance(value_range, tuple) and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be the values of black and of white, got {value_range}")
    if val_split == train_split:
        raise same_split(val_split)
    reading = Reading(name, train_split, val_split, image_column, label_column, streaming, unlabelled)
    fraction = ValFraction(val_fraction, seed)
    found = read_source(source, reading)
    pair = (find_in_folder if found.is_folder else find_in_tables)(found, reading, fraction, num_classes)
    described = _describe(source, name, pair.val_name)
    if pair.val_name not in found.splits:
        drawn_from = fingerprint(pair.sampled, pair.label_column)
        described |= {"val_fraction": val_fraction, "seed": seed, "drawn_from": drawn_from}
    return ImageSplits(
        pair.train, pair.val, pair.image_column, pair.label_column, pair.class_names, pair.sampled, described,
        pair.entries, unlabelled, value_range)


def load_split(
        source: str | Path, split: str | None = None, *, name: str | None = None, image_column: str | None = None,
        label_column: str | None = None, value_range: ValueRange | ValueRanges | None = None) -> ImageSplits:
    """One split as a whole, to measure a model on it; see `load_images`.

    Args:
        split: None is the first of "validation", "val", "valid", "test" that has labels, else the only one.

    Raises:
        ValueError: there are several others; or as `load_images`.
    """
    found = read_source(source, Reading(name, split or UNDIVIDED, None, image_column, label_column))
    split = found.find_split(split) if split else _measured_split(found, label_column)
    rows, path, left_out = found.splits[split], found.name, found.left_out
    if found.is_folder:
        check_has_classes(rows, trains=False)
        path, rows = rows.path, collect(rows, labelled=True)
        classes, image_column, label_column, left_out = rows.class_names, "image", "label", rows.left_out
    else:
        image_column = find_column(rows, image_column, datasets.Image, "image", path)
        label_column = find_column(rows, label_column, datasets.ClassLabel, "label", path)
        rows = encode_labels(rows, label_column)
        classes = rows.features[label_column].names
        check_labels(rows, label_column, len(classes), split)
    return ImageSplits(
        rows, rows, image_column, label_column, classes, rows, _describe(source, name, split),
        [entry(split, len(rows), len(classes), path, left_out)], value_range=value_range)


def _measured_split(source: Source, label_column: str | None) -> str:
    for split in val_splits(source.splits):
        rows = source.splits[split]
        if source.is_folder or why_unlabelled(
                rows, find_column(rows, label_column, datasets.ClassLabel, "label", source.name)) is None:
            return split
    if len(source.splits) > 1:
        raise ValueError(f"{source.name} has the splits {', '.join(source.splits)}, none of them for validation with"
                         " labels; name one (--val-split)")
    return next(iter(source.splits))


def _describe(source: Any, name: str | None, split: str) -> dict[str, Any]:
    if not isinstance(source, (str, Path)):
        return {"name": "images", "type": "imagefolder", "split": split}
    if Path(source).exists():
        return {"name": Path(source).resolve().name, "type": "imagefolder", "split": split}
    return {"name": str(source), "type": str(source), "config": name, "split": split, "hub_id": str(source)}
