"""Images and labels from anything that `datasets` reads, as tensors that timm's transforms made."""
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn

from .augmentation import create_train_transform
from .images import decode_image, to_mode
from .label_columns import label_splits, label_streams, label_val
from .labels import NO_LABEL
from .preprocessing import takes_other_sizes
from .stream import StreamedImages

VAL_SPLITS = ("validation", "val", "valid", "test")


class ImageDataset(torch.utils.data.Dataset):
    """Rows of a `datasets.Dataset` as (image (C, H, W), class index).

    Args:
        rows: with an image column and perhaps a column of class indices.
        label_column: None gives every image the class index -1.
        transform: PIL image -> tensor, e.g. of `timm.data.create_transform`.
        mode: PIL mode that images are converted to: "L" (one channel) or "RGB".
        source: see `ImageSplits`.
    """

    augmented: bool | None = None
    """Whether an image is another one each time that it is read; None is not known."""

    def __init__(self, rows: datasets.Dataset, image_column: str, label_column: str | None, transform: Any, mode: str,
                 num_classes: int | None, source: dict[str, Any] | None = None):
        self.rows = rows.select_columns(list(filter(None, (image_column, label_column))))
        self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.label_column = image_column, label_column
        self.transform = transform
        self.mode = mode
        self.num_classes = num_classes
        self.source = source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = self.transform(to_mode(decode_image(row[self.image_column], index), self.mode))
        return image, NO_LABEL if self.label_column is None else row[self.label_column]


@dataclass
class ImageSplits:
    """Training and validation images; made by `load_images`."""

    train: datasets.Dataset | datasets.IterableDataset
    val: datasets.Dataset | datasets.IterableDataset
    image_column: str
    label_column: str | None
    """None where the validation images have no labels."""
    class_names: list[str]
    """Empty where there are no labels."""
    in_chans: int
    """1 where the first image is grey, else 3."""
    size: tuple[int, int]
    """(height, width) of the first image."""
    source: dict[str, Any]
    """Where the validation images come from, in the Hub's terms: name, type, config, split, hub_id."""
    unlabelled: bool = False
    """Whether the training images have no labels, or theirs are not used."""

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) or None

    def fitting_labels(self, num_classes: int, class_names: list[str] | None = None) -> "ImageSplits":
        """The same images for a network of K classes that learns without labels; those for validation have none
        either, with a warning, where theirs are of other classes.

        Args:
            class_names: of the network; None is not known.
        """
        if self.num_classes is None or (self.num_classes == num_classes and class_names in (None, self.class_names)):
            return self
        warnings.warn(
            f"the labels of the validation images are of other classes ({self.num_classes}: {self.class_names[0]}, ...)"
            f" than the network's ({num_classes}{': ' + class_names[0] + ', ...' if class_names else ''}): they are not"
            " used, agreement with the deepest classifier is measured", stacklevel=2)
        return replace(self, label_column=None, class_names=[])

    def fitting_size(self, backbone: nn.Module) -> int:
        """Pixels to train a timm model at: its own size, or where the images are smaller and the model takes other
        sizes, the multiple of 32 that holds them."""
        own_size = backbone.pretrained_cfg["input_size"][-1]
        return min(own_size, -(-max(self.size) // 32) * 32) if takes_other_sizes(backbone) else own_size

    def transformed(
            self, data_config: dict[str, Any], **augmentation: Any,
    ) -> tuple[ImageDataset, ImageDataset] | tuple[StreamedImages, StreamedImages]:
        """Training and validation data as tensors.

        Args:
            data_config: input_size (channels, height, width), mean, std, interpolation, crop_pct; of
                `timm.data.resolve_model_data_config` or `model_data_config`.
            augmentation: for training, arguments of `create_train_transform`, e.g. `auto_augment`, `cutout`, or
                `no_aug=True`.

        Raises:
            ValueError: input_size has neither one channel nor three, or a setting is unknown.
        """
        channels = data_config["input_size"][0]
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, but the model takes in_chans={channels}")
        interpolation = augmentation.pop("interpolation", data_config["interpolation"])
        try:
            train = create_train_transform({**data_config, "interpolation": interpolation}, **augmentation)
            val = create_transform(**data_config)
        except (AssertionError, KeyError) as error:  # timm's answer to an unknown policy or interpolation
            raise ValueError(f"timm does not know a setting of the transforms: {error}") from error
        mode = "L" if channels == 1 else "RGB"
        train_labels = None if self.unlabelled else self.label_column
        made = tuple(
            (StreamedImages if isinstance(rows, datasets.IterableDataset) else ImageDataset)(
                rows, self.image_column, labels, transform, mode, self.num_classes, self.source)
            for rows, labels, transform in ((self.train, train_labels, train), (self.val, self.label_column, val)))
        made[0].augmented = not augmentation.get("no_aug", False)
        return made


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
        seed: int = 42,
) -> ImageSplits:
    """Find images, labels, class names and a validation split.

    Args:
        source: a folder (one subfolder per class, or parquet or arrow files, WebDataset shards, or `save_to_disk`'s), a
            parquet or arrow file, the name of a data set on the Hub, or a `datasets` object. `IterableDataset`s must
            not be shuffled: the training run does it.
        name: configuration of a Hub data set.
        val_split: None is the first of "validation", "val", "valid", "test" that exists; where there is none,
            `val_fraction` of the training split, drawn by `seed`, class by class where every class has two images.
        image_column, label_column: None finds them by their feature type, Image and ClassLabel, or in WebDataset shards
            by the name "cls".
        num_classes: K; a stream whose labels have no names must be told. It may be larger than the number of names.
        streaming: read the images one after the other while training, instead of downloading and converting them
            first. There must be a validation split.
        unlabelled: the training images need no labels; those that they have are not used. Validation images may have
            some.

    Raises:
        FileNotFoundError: nothing is there, or no images in it.
        ValueError: a split or column is missing or ambiguous, there is only one class, or a label is out of range.
    """
    named = _named(source)
    splits = _read(source, name, train_split, streaming)
    if train_split not in splits:
        raise ValueError(f"{named} has no split {train_split!r}; it has {', '.join(map(repr, splits))}")
    train = splits[train_split]
    if train.features is None:
        raise ValueError(f"{named} does not tell its columns before it is read; leave out streaming")
    image_column = _find_column(train, image_column, datasets.Image, "image", source)
    if val_split is None:
        val_split = next((split for split in VAL_SPLITS if split in splits and split != train_split), None)
    elif val_split not in splits:
        raise ValueError(f"{named} has no split {val_split!r}; it has {', '.join(map(repr, splits))}")
    val = None if val_split is None else splits[val_split]
    if val is not None and isinstance(val, datasets.IterableDataset) != isinstance(train, datasets.IterableDataset):
        raise TypeError("training and validation images must both be streamed or neither, got"
                        f" {type(train).__name__} and {type(val).__name__}")
    if unlabelled:
        label_column = _find_val_labels(train if val is None else val, label_column, source)
    else:
        label_column = _find_column(train, label_column, datasets.ClassLabel, "label", source)
    if isinstance(train, datasets.IterableDataset):
        if val is None:
            raise ValueError(
                f"{named} has no validation split, and a stream cannot be divided; name one as val_split"
                " (--val-split), or leave out streaming")
        class_names = label_streams(None if unlabelled else train, val, label_column, num_classes, named)
    elif unlabelled:
        if val is None:
            train, val = _split(train, val_fraction, None, seed)
        val, label_column, class_names = label_val(val, label_column, num_classes)
    else:
        train, val = label_splits(train, val, label_column, num_classes, named)
        class_names = train.features[label_column].names
        if val is None:
            train, val = _split(train, val_fraction, label_column, seed)
    first = next(iter(train.cast_column(image_column, datasets.Image(decode=False))), None)
    if first is None:
        raise ValueError(f"the training split of {named} is empty")
    image = decode_image(first[image_column], 0)
    in_chans = 1 if image.mode in ("1", "L", "I", "F", "I;16") else 3
    return ImageSplits(
        train, val, image_column, label_column, class_names, in_chans, image.size[::-1],
        _describe(source, name, val_split or f"{val_fraction:g} of {train_split}"), unlabelled)


def _find_val_labels(val: Any, column: str | None, source: Any) -> str | None:
    """The label column of validation images, if they have one."""
    found = column is not None or "cls" in val.features or any(
        isinstance(value, datasets.ClassLabel) for value in val.features.values())
    return _find_column(val, column, datasets.ClassLabel, "label", source) if found else None


def _read(source: Any, name: str | None, train_split: str, streaming: bool) -> Mapping[str, Any]:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return {train_split: source}
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a path, the name of a data set or a datasets.Dataset, got {type(source).__name__}")
    path = Path(source)
    try:
        if path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            if streaming:
                raise ValueError(f"{path} is read without loading it to memory as it is; leave out streaming")
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            if path.suffix not in (".parquet", ".arrow"):
                raise ValueError(f"{path} is no .parquet or .arrow file; expected one, a folder, or a Hub name")
            loaded = datasets.load_dataset(
                path.suffix.lstrip("."), data_files={train_split: str(path)}, streaming=streaming)
        else:
            loaded = datasets.load_dataset(str(source), name, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        if path.is_dir():
            raise FileNotFoundError(
                f"{path} holds no images; expected one subfolder per class, or parquet or arrow files") from error
        raise FileNotFoundError(f"{source} is no folder or file here, and no data set on the Hub: {error}") from error
    splits = loaded if isinstance(loaded, Mapping) else {train_split: loaded}
    return _without_split_names(splits, path) if path.is_dir() and len(splits) > 1 else splits


def _without_split_names(splits: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Images alone in a folder for each split, of which `datasets` makes class names."""
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    kept = {name: [column for column, feature in (rows.features or {}).items()
                   if not (isinstance(feature, datasets.ClassLabel) and set(feature.names) <= folders)]
            for name, rows in splits.items()}
    return {name: rows.select_columns(kept[name]) if len(kept[name]) < len(rows.features or ()) else rows
            for name, rows in splits.items()}


def _describe(source: Any, name: str | None, split: str) -> dict[str, Any]:
    if not isinstance(source, (str, Path)):
        return {"name": "images", "type": "imagefolder", "split": split}
    if Path(source).exists():
        return {"name": Path(source).resolve().name, "type": "imagefolder", "split": split}
    return {"name": str(source), "type": str(source), "config": name, "split": split, "hub_id": str(source)}


def _find_column(rows: datasets.Dataset, column: str | None, feature: type, what: str, source: Any) -> str:
    if column is not None:
        if column not in rows.features:
            raise ValueError(f"{_named(source)} has no column {column!r}; it has {', '.join(rows.features)}")
        return column
    found = [key for key, value in rows.features.items() if isinstance(value, feature)]
    if what == "label" and not found and "cls" in rows.features:
        return "cls"
    if len(found) == 1:
        return found[0]
    name_it = f"name one as {what}_column ({'--input-key' if what == 'image' else '--target-key'})"
    if found:
        raise ValueError(f"{_named(source)} has several {what} columns: {', '.join(found)}; {name_it}")
    hint = "; a folder needs one subfolder per class, at least 2" if what == "label" else ""
    raise ValueError(
        f"{_named(source)} has no {what} column ({feature.__name__}) among {', '.join(rows.features)};"
        f" {name_it}{hint}"
    )


def _split(
        rows: datasets.Dataset, fraction: float, label_column: str | None, seed: int) -> tuple[datasets.Dataset, ...]:
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {fraction}")
    counts = np.bincount(rows.with_format("numpy")[label_column][:]) if label_column else np.zeros(1)
    stratify = label_column if counts.min() > 1 and min(fraction, 1 - fraction) * len(rows) >= len(counts) else None
    parts = rows.train_test_split(fraction, seed=seed, stratify_by_column=stratify)
    return parts["train"], parts["test"]


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data set"
