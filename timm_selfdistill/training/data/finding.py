"""Finding training and validation images in a source."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...hub import ImageSource
from .folder import ImageFiles, Tree, collect, split_kind, val_splits
from .images import ValueRange, ValueRanges
from .labels import NO_LABEL, check_range
from .sources import UNDIVIDED, Found, Reading, Source, Table, ValFraction, entry, fingerprint, read_source
from .splits import ImageSplits
from .streams import row_count


def label_splits(
    train: datasets.Dataset,
    val: datasets.Dataset | None,
    column: str,
    num_classes: int | None,
    name: str,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return both splits with checked class indices; warn about classes without training images."""
    named = isinstance(train.features.get(column), datasets.ClassLabel) and len(train.features[column].names)
    train = encode_labels(train, column, num_classes=num_classes)
    class_names = train.features[column].names
    found = check_labels(train, column, len(class_names), "training")
    _warn_of_gaps(found, class_names[: named or found[-1] + 1])
    if len(found) < 2:
        names = [class_names[label] for label in found]
        raise ValueError(f"the training images of {name} have only one class ({names}); at least 2 are needed")
    if val is not None:
        val = encode_labels(val, column, class_names, len(class_names))
        check_labels(val, column, len(class_names), "validation")
    return train, val


def label_val(
    val: datasets.Dataset,
    column: str | None,
    num_classes: int | None,
) -> tuple[datasets.Dataset, str | None, list[str]]:
    """Prepare the labels of validation images for training without labels.

    Args:
        num_classes: of the network; `ImageSplits.fitting_labels` handles labels of more classes.

    Returns:
        The images, their label column and class names; None and no names unless every image has a label.
    """
    if column is None:
        return val, None, []
    values = set(val.unique(column))
    if values & {NO_LABEL, None}:
        if len(values - {NO_LABEL, None}):
            warnings.warn(
                f"some of the {len(val)} validation images have no label: labels are ignored, and agreement with the"
                " deepest exit is measured",
                stacklevel=3,
            )
        return val, None, []
    val = encode_labels(val, column)
    if num_classes and num_classes > len(val.features[column].names):
        val = encode_labels(val, column, num_classes=num_classes)
    class_names = val.features[column].names
    check_labels(val, column, len(class_names), "validation")
    return val, column, class_names


def label_streams(
    train: datasets.IterableDataset,
    val: datasets.IterableDataset,
    column: str,
    num_classes: int | None,
    name: str,
) -> list[str]:
    """Return the class names of both streams."""
    class_names = stream_class_names(train, column, num_classes=num_classes)
    if len(class_names) < 2:
        raise ValueError(f"the training images of {name} have only one class ({class_names}); at least 2 are needed")
    return stream_class_names(val, column, class_names, len(class_names))


def why_unlabelled(rows: Table, column: str) -> str | None:
    """Return why a split cannot be used for validation, e.g. a test split with hidden labels; None if it can.

    Of a stream only the first row is checked.
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
    rows: datasets.Dataset,
    column: str,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
) -> datasets.Dataset:
    """Convert the column to a ClassLabel, with the class names of the training split if they are given.

    Args:
        num_classes: K; classes without a name in the column are named by their index.
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
                raise ValueError(f"classes {unknown[:5]} are in the validation split, but not in the training split")
        else:
            names = class_names or list(map(str, range(num_classes or max(values) + 1)))
            check_range(min(values), max(values), len(names), column)
        feature = datasets.ClassLabel(names=names)
    feature = datasets.ClassLabel(names=_extended(feature.names, num_classes))
    _check_names(feature.names, class_names, num_classes)
    return rows if rows.features[column] == feature else rows.cast_column(column, feature)


def stream_class_names(
    rows: datasets.IterableDataset, column: str, class_names: list[str] | None = None, num_classes: int | None = None
) -> list[str]:
    """Return the class names of a stream's label column without reading its values.

    Args:
        class_names: class names of the training split.
        num_classes: K, needed if the column holds class indices without names.
    """
    _check_column(rows, column)
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = _extended(feature.names, num_classes)
        _check_names(names, class_names, num_classes)
        return names
    if not feature.dtype.startswith(("int", "uint")):
        raise TypeError(
            f"column {column!r} of a stream must hold class indices, got {feature}; class names are only known after"
            " reading all rows: leave out streaming"
        )
    if class_names:
        return class_names
    if num_classes is None:
        raise ValueError(
            f"column {column!r} of the stream does not define the number of classes; set num_classes (--num-classes)"
        )
    return list(map(str, range(num_classes)))


def check_labels(rows: datasets.Dataset, column: str, num_classes: int, split_name: str) -> np.ndarray:
    """Return the labels that occur; raise ValueError if one is missing or out of range."""
    if len(rows) == 0:
        raise ValueError(f"the {split_name} split is empty")
    labels = rows.select_columns([column]).with_format("arrow")[:][column]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} of {len(rows)} rows of the {split_name} split have no label")
    values = np.unique(labels.to_numpy())
    check_range(int(values[0]), int(values[-1]), num_classes, column)
    return values


def _warn_of_gaps(found: np.ndarray, class_names: list[str]) -> None:
    missing = [
        f"{index} ({name})" if name != str(index) else name
        for index, name in enumerate(class_names)
        if index not in set(found.tolist())
    ]
    if missing:
        shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        start = ", since labels start at 1" if missing == ["0"] else ""
        warnings.warn(
            f"no training image has label {shown}{start}: {len(class_names)} classes, {len(found)} of them with images",
            stacklevel=5,
        )


def label_values(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Return the labels as an array (N,)."""
    return rows.select_columns([column]).with_format("arrow")[:][column].to_numpy()


def _check_column(rows: Table, column: str) -> None:
    feature = rows.features.get(column)
    if feature is None:
        raise ValueError(f"the validation split has no column {column!r}; it has {', '.join(rows.features)}")
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise TypeError(f"column {column!r} must hold one class index or name per row, got {feature}")


def _extended(names: list[str], num_classes: int | None) -> list[str]:
    return [*names, *map(str, range(len(names), num_classes or 0))]


def _check_names(names: list[str], class_names: list[str] | None, num_classes: int | None) -> None:
    if class_names is not None and names != class_names:
        raise ValueError(f"training and validation split have different classes: {class_names[:5]}, {names[:5]}")
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"num_classes is {num_classes}, but the data have {len(names)} classes: {names[:5]}")


def find_in_folder(source: Source, reading: Reading, fraction: ValFraction, num_classes: int | None) -> Found:
    """Find training and validation images in folders of image files, with the classes of the training images.

    Raises:
        ValueError: there are no class folders, or fewer than two, or validation images have other classes.
    """
    labelled = not reading.unlabelled
    name = source.find_split(reading.train_split, named=reading.train_split != "train")
    tree = source.splits[name]
    if labelled:
        check_has_classes(tree)
    train = collect(tree, labelled)
    if labelled:
        train = replace(train, class_names=_classes(train.class_names, num_classes, tree.path))
    val_name = _val_split(source, reading, name)
    if val_name == name:
        raise same_split(val_name)
    others = Counter(
        {
            f"images in {other}/": part.count
            for other, part in source.splits.items()
            if other not in (name, val_name) and (part.has_classes or not labelled)
        }
    )
    sampled = train
    if val_name is None:
        train, val = _divide(tree, train, labelled, fraction)
        val_name, val_path = fraction.of(name), tree.path
    else:
        val_tree = source.splits[val_name]
        val, val_path = _collect_val(val_tree, train if labelled else None), val_tree.path
    train = _without_shared(train, val)
    return Found(
        train,
        val,
        sampled,
        val_name,
        "image",
        None if val.labels is None else "label",
        val.class_names,
        [
            entry(
                name,
                len(train),
                len(train.classes_with_images) if labelled else 0,
                tree.path,
                train.left_out + source.left_out + others,
            ),
            entry(val_name, len(val), len(val.classes_with_images), val_path, val.left_out),
        ],
    )


def check_has_classes(tree: Tree, trains: bool = True) -> None:
    """Raise ValueError for a folder of images without class folders."""
    if tree.has_classes:
        return
    advice = f"; if {tree.name}/ itself is a class, rename it" if split_kind(tree.name) else ""
    if trains:
        advice += "; to train the exits of a frozen backbone without labels, set unlabelled (--unlabelled)"
    raise ValueError(
        f"{tree.path} holds {tree.count} images, but no class folders; expected at least 2 folders of images, one per"
        f" class, or a metadata.csv with a column file_name and a label column (--target-key){advice}"
    )


def same_split(name: str) -> ValueError:
    return ValueError(
        f"the validation split {name!r} is also the training split; name another one, or none to hold out val_fraction"
        " (--val-fraction) of the training images"
    )


def _val_split(source: Source, reading: Reading, train_name: str) -> str | None:
    """Return the name of the validation split; None if there is none with class folders."""
    if reading.val_split is not None:
        return source.find_split(reading.val_split)
    return next(
        val_splits(
            name
            for name, tree in source.splits.items()
            if name != train_name and (tree.has_classes or reading.unlabelled)
        ),
        None,
    )


def _divide(tree: Tree, train: ImageFiles, labelled: bool, fraction: ValFraction) -> tuple[ImageFiles, ImageFiles]:
    files = train if labelled else collect(tree, _is_labelled(tree))
    kept, held_out = fraction.draw(files.labels if labelled else None, len(files), files.class_names)
    return files.select(kept), replace(files.select(held_out), left_out=Counter())


def _collect_val(tree: Tree, train: ImageFiles | None) -> ImageFiles:
    """Return the validation images with the classes of the training images; if these are unlabeled (None), with their
    own classes if all images have one."""
    if train is None:
        return collect(tree, _is_labelled(tree))
    check_has_classes(tree)
    return collect(tree, True, train.class_names)


def _is_labelled(tree: Tree) -> bool:
    return tree.has_classes and not tree.images


def _classes(names: list[str], num_classes: int | None, path: str) -> list[str]:
    """Return the class names, extended by indices for further classes of the network.

    Raises:
        ValueError: there are too few or too many classes.
    """
    if len(names) < 2:
        raise ValueError(f"the training images of {path} have only one class ({names}); at least 2 are needed")
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"num_classes is {num_classes}, but {path} has {len(names)} classes: {names[:5]}")
    return [*names, *map(str, range(len(names), num_classes or 0))]


def _without_shared(train: ImageFiles, val: ImageFiles) -> ImageFiles:
    """Return the training images without those that are also validation images; links to one file are one image.

    Raises:
        ValueError: a class would have no training images left.
    """
    kept = train.without(val)
    shared = len(train) - len(kept)
    if not shared:
        return train
    if not len(kept):
        raise ValueError(f"all {shared} training images are also validation images")
    if lost := sorted(set(train.classes_with_images) - set(kept.classes_with_images)):
        raise ValueError(f"all training images of class {lost[0]!r} are also validation images, or links to them")
    warnings.warn(
        f"{shared} of the training images are also validation images, or links to them; they are not used for training",
        stacklevel=5,
    )
    return replace(kept, left_out=kept.left_out + Counter({"that are also validation images": shared}))


def find_in_tables(source: Source, reading: Reading, fraction: ValFraction, num_classes: int | None) -> Found:
    """Find both splits in tables, with the classes of the training images, or of validation images if these have none.

    Raises:
        ValueError: a column is missing or ambiguous, labels do not fit, or a stream has no validation split.
        TypeError: only one of the splits is streamed, or a column does not hold labels.
    """
    name, path = source.find_split(reading.train_split, named=reading.train_split != "train"), source.name
    train = source.splits[name]
    if train.features is None:
        raise ValueError(f"the columns of {path} are not known before it is read; leave out streaming")
    image_column = find_column(train, reading.image_column, datasets.Image, "image", path)
    train_column = None  # without labels
    if not reading.unlabelled:
        train_column = find_column(train, reading.label_column, datasets.ClassLabel, "label", path)
    val_name = _val_table(source, reading, name, train_column)
    if val_name == name:
        raise same_split(name)
    val, sampled = None if val_name is None else source.splits.get(val_name), train
    if val is not None and isinstance(val, datasets.IterableDataset) != isinstance(train, datasets.IterableDataset):
        raise TypeError(
            "training and validation images must both be streamed or neither, got"
            f" {type(train).__name__} and {type(val).__name__}"
        )
    label_column = train_column
    if train_column is None:
        label_column = _find_val_labels(train if val is None else val, reading.label_column, path)
    if isinstance(train, datasets.IterableDataset):
        if val is None:
            raise ValueError(
                f"{path} has no validation split, and a stream cannot be divided; set val_split (--val-split), or leave"
                " out streaming"
            )
        if train_column is not None:
            class_names = label_streams(train, val, train_column, num_classes, path)
        else:
            class_names = [] if label_column is None else stream_class_names(val, label_column, None, num_classes)
    elif train_column is None:
        if val is None:
            train, val = _divide_table(train, None, fraction)
        val, label_column, class_names = label_val(val, label_column, num_classes)
    else:
        train, val = label_splits(train, val, train_column, num_classes, path)
        class_names = train.features[train_column].names
        if val is None:
            train, val = _divide_table(train, train_column, fraction)
    val_name = val_name or fraction.of(name)
    return Found(
        train,
        val,
        sampled,
        val_name,
        image_column,
        label_column,
        class_names,
        [
            entry(name, row_count(train), 0 if reading.unlabelled else len(class_names), path, source.left_out),
            entry(val_name, row_count(val), len(class_names), path, Counter()),
        ],
    )


def find_column(rows: Table, column: str | None, feature: type, what: str, path: str) -> str:
    """Find the column of images or labels, by name or by type.

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
    raise ValueError(f"{path} has no {what} column ({feature.__name__}) among {', '.join(rows.features)}; {name_it}")


def _val_table(source: Source, reading: Reading, train_name: str, label_column: str | None) -> str | None:
    """Return the name of the validation split; None if there is none, or none with labels although they are needed."""
    if reading.val_split is not None:
        return source.find_split(reading.val_split)
    for split in val_splits(name for name in source.splits if name != train_name):
        reason = None if label_column is None else why_unlabelled(source.splits[split], label_column)
        if reason is None:
            return split
        warnings.warn(
            f"split {split!r} {reason} and cannot be used for validation; another split is used, or val_fraction"
            " (--val-fraction) of the training images",
            stacklevel=4,
        )
    return None


def _find_val_labels(val: Table, column: str | None, path: str) -> str | None:
    """Return the label column of the validation images, if they have one."""
    found = (
        column is not None
        or "cls" in val.features
        or any(isinstance(value, datasets.ClassLabel) for value in val.features.values())
    )
    return find_column(val, column, datasets.ClassLabel, "label", path) if found else None


def _divide_table(
    rows: datasets.Dataset,
    label_column: str | None,
    fraction: ValFraction,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels = None if label_column is None else label_values(rows, label_column)
    names = [] if label_column is None else rows.features[label_column].names
    kept, held_out = fraction.draw(labels, len(rows), names)
    return rows.select(kept), rows.select(held_out)


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

    A folder of image files is read as in timm: the innermost folder of an image is its class, classes are in natural
    order, and links are followed. Folders in it that are named like a split and hold class folders are splits.

    Args:
        source: a folder (one subfolder per class; parquet or arrow files; WebDataset shards; the output of
            `save_to_disk`; or images with a metadata.csv or metadata.jsonl), a parquet or arrow file, the name of a
            dataset on the Hub, or a `datasets` object. Do not shuffle an `IterableDataset`: the training run does so.
        name: configuration of a Hub dataset.
        train_split, val_split: names of splits, or another common name of the same split ("val" for "validation"). If
            `val_split` is None, the first of "validation", "val", "valid", "test" that has labels is used; without one,
            `val_fraction` of the training split, drawn with `seed` and stratified by class.
        image_column, label_column: None finds them by their feature type, Image and ClassLabel, or in WebDataset shards
            by the name "cls". For a folder of image files `image_column` may hold their extensions, ".webp;.png"; None
            stands for timm's.
        num_classes: K; required for a stream whose labels have no names. It may exceed the number of names.
        streaming: read images one after the other during training, instead of downloading and converting them first.
            This requires a validation split. A folder of image files cannot be streamed, and is never converted.
        unlabelled: the training images need no labels, and existing ones are ignored. Validation images may have
            labels.
        value_range: black and white of images with more than 8 bits, optionally by kind, see `ImageSplits.sample`; None
            is the full range of their type.

    Raises:
        FileNotFoundError: the source does not exist or contains no images.
        PermissionError: a folder is not readable.
        ValueError: a folder is ambiguous, a split or column is missing or ambiguous, there is only one class, a class
            has a single image and is to be divided by `val_fraction`, or a label is out of range.

    Examples:
        >>> from timm_selfdistill import load_images
        >>> images = load_images("examples/data")
        >>> images.num_classes
        10
        >>> images.class_names[:2]
        ['T-shirt/top', 'Trouser']
    """
    if isinstance(value_range, tuple) and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be two increasing values, black and white, got {value_range}")
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
    return _as_splits(pair, described, unlabelled, value_range)


def _as_splits(
    pair: Found, source: ImageSource, unlabelled: bool, value_range: ValueRange | ValueRanges | None
) -> ImageSplits:
    return ImageSplits(
        pair.train,
        pair.val,
        pair.image_column,
        pair.label_column,
        pair.class_names,
        pair.sampled,
        source,
        pair.entries,
        unlabelled,
        value_range,
    )


def load_split(
    source: str | Path,
    split: str | None = None,
    *,
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    value_range: ValueRange | ValueRanges | None = None,
) -> ImageSplits:
    """Load one complete split, to evaluate a model on it; see `load_images`.

    Args:
        split: None is the first of "validation", "val", "valid", "test" that has labels, else the only split.

    Raises:
        ValueError: the choice is ambiguous; or as in `load_images`.
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
        rows,
        rows,
        image_column,
        label_column,
        classes,
        rows,
        _describe(source, name, split),
        [entry(split, len(rows), len(classes), path, left_out)],
        value_range=value_range,
    )


def _measured_split(source: Source, label_column: str | None) -> str:
    for split in val_splits(source.splits):
        rows = source.splits[split]
        if (
            source.is_folder
            or why_unlabelled(rows, find_column(rows, label_column, datasets.ClassLabel, "label", source.name)) is None
        ):
            return split
    if len(source.splits) > 1:
        raise ValueError(
            f"{source.name} has the splits {', '.join(source.splits)}, none of which is a validation or test split with"
            " labels; name one (--val-split)"
        )
    return next(iter(source.splits))


def _describe(source: Any, name: str | None, split: str) -> ImageSource:
    if not isinstance(source, (str, Path)):
        return {"name": "images", "type": "imagefolder", "split": split}
    if Path(source).exists():
        return {"name": Path(source).resolve().name, "type": "imagefolder", "split": split}
    return {"name": str(source), "type": str(source), "config": name, "split": split, "hub_id": str(source)}
