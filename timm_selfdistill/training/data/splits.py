"""Training and validation images that were found, as data sets of tensors."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...hub import ImageSource
from ...timm_model import as_timm
from .folder import ImageFiles
from .images import Sample, ValueRange, ValueRanges, read_image, take_sample, undecoded
from .labels import NO_LABEL, listed, some_names
from .sources import FoundSplit, Rows
from .streams import StreamedImages
from .transforms import Transform, create_train_transform, normalizing_in_place, own_class_names, takes_other_sizes

if TYPE_CHECKING:
    import datasets


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Rows as (image (C, H, W), class index).

    Args:
        rows: with an image column and perhaps a column of class indices.
        label_column: None gives every image the class index -1.
        transform: PIL image -> tensor, e.g. of `timm.data.create_transform`.
        mode: PIL mode that images are converted to: "L" (one channel) or "RGB".
        source: see `ImageSplits`.
        ranges: black and white of images with more than 8 bits.
        label_map: class index for each label; None leaves them as they are.

    Examples:
        >>> from timm.data import create_transform
        >>> from timm_selfdistill import load_images
        >>> from timm_selfdistill.training import ImageDataset
        >>> rows = load_images("examples/data").val
        >>> data = ImageDataset(rows, "image", "label", create_transform(32), mode="RGB", num_classes=10)
        >>> data[0][0].shape
        torch.Size([3, 32, 32])
    """

    augmented: bool | None = None
    """Whether an image is another one each time that it is read; None is not known."""
    data_config: dict[str, Any] | None = None
    """The preprocessing for validation, see `ImageSplits.transformed`."""
    class_names: Sequence[str] = ()
    """In the order of the class indices; empty where they are not known."""

    def __init__(
        self,
        rows: "ImageFiles | datasets.Dataset",
        image_column: str,
        label_column: str | None,
        transform: Transform,
        mode: str,
        num_classes: int | None,
        source: ImageSource | None = None,
        ranges: ValueRanges | None = None,
        label_map: list[int] | None = None,
    ):
        self.rows = rows if isinstance(rows, ImageFiles) else undecoded(rows, image_column, label_column)
        self.image_column, self.label_column = image_column, label_column
        self.transform = transform
        self.mode, self.ranges = mode, ranges
        self.num_classes, self.label_map = num_classes, label_map
        self.source = source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row: Mapping[str, Any] = self.rows[index]
        image = self.transform(read_image(row[self.image_column], self.mode, index, self.ranges))
        if self.label_column is None:
            return image, NO_LABEL
        label = row[self.label_column]
        return image, label if self.label_map is None else self.label_map[label]


REORDERED = "the classes are in another order than the network's: they are matched by name"


@dataclass
class ImageSplits:
    """Training and validation images; made by `load_images`.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import load_images, model_data_config
        >>> images = load_images("examples/data")
        >>> backbone = timm.create_model("test_resnet", num_classes=images.num_classes)
        >>> train_data, val_data = images.transformed(model_data_config(backbone, img_size=32))
        >>> image, label = val_data[0]
        >>> image.shape
        torch.Size([3, 32, 32])
    """

    train_rows: Rows
    val_rows: Rows
    image_column: str
    label_column: str | None
    """None where the validation images have no labels."""
    class_names: list[str]
    """In the order of the class indices; empty where there are no labels."""
    sampled_rows: Rows = field(repr=False)
    """The training images before any were taken for validation; `sample` is of these."""
    source: ImageSource
    """Where the validation images come from, in the Hub's terms: name, type, config, split, hub_id; where they
    were drawn from the training split val_fraction, seed, and drawn_from, see `fingerprint`."""
    found: list[FoundSplit]
    """For each split its name, images, classes, where they are from, and what was left out."""
    unlabelled: bool = False
    """Whether the training images have no labels, or theirs are not used."""
    value_range: ValueRange | ValueRanges | None = None
    """Black and white of images with more than 8 bits, as they were given."""
    label_map: list[int] | None = field(default=None, repr=False)
    """Class index for each label of the rows, where a network has the classes in another order."""

    @property
    def train(self) -> datasets.Dataset | datasets.IterableDataset:
        """The training images as `datasets` has them, with the labels of the source; those of a folder are made into a
        table of paths for it."""
        return self.train_rows.table if isinstance(self.train_rows, ImageFiles) else self.train_rows

    @train.setter
    def train(self, rows: datasets.Dataset | datasets.IterableDataset) -> None:
        self.train_rows = rows

    @property
    def val(self) -> datasets.Dataset | datasets.IterableDataset:
        """The validation images, likewise."""
        return self.val_rows.table if isinstance(self.val_rows, ImageFiles) else self.val_rows

    @val.setter
    def val(self, rows: datasets.Dataset | datasets.IterableDataset) -> None:
        self.val_rows = rows

    @cached_property
    def sample(self) -> Sample:
        """What some of the training images tell of all; looked at when it is asked for.

        Raises:
            ValueError: none of them can be read.
        """
        return take_sample(self.sampled_rows, self.image_column, self.value_range)

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) or None

    @property
    def in_chans(self) -> int:
        """Channels of a new network: three, as timm's default, also where all images are grey (`sample.grey`)."""
        return 3

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the median image of the sample."""
        return self.sample.size

    def lines(self) -> list[str]:
        """What was found, a line for each split, and one where classes are in another order than the network's."""
        return [*map(_line, self.found), *([REORDERED] if self.is_reordered else [])]

    @property
    def is_reordered(self) -> bool:
        """Whether a network has the classes in another order than the source."""
        return self.label_map is not None and list(self.label_map) != sorted(self.label_map)

    def fitting_labels(self, num_classes: int, class_names: list[str] | None = None) -> "ImageSplits":
        """The same images for a network of K classes that learns without labels; those for validation have none
        either, with a warning, where theirs are of other classes.

        Args:
            class_names: of the network; None is not known.
        """
        if self.num_classes is None or (class_names is None and self.num_classes == num_classes):
            return self
        if class_names is not None and set(self.class_names) <= set(class_names):
            return self.in_order(class_names)
        warnings.warn(
            f"the labels of the validation images are of other classes ({self.num_classes}: {self.class_names[0]}, ...)"
            f" than the network's ({num_classes}{': ' + class_names[0] + ', ...' if class_names else ''}): they are not"
            " used, agreement with the deepest classifier is measured",
            stacklevel=2,
        )
        return self._changed(label_column=None, class_names=[])

    def in_order(self, class_names: list[str], way_out: str = "") -> "ImageSplits":
        """The same images with the class indices of a network.

        Args:
            class_names: of the network, in its order.
            way_out: what to do where the images are of other classes, for the message.

        Raises:
            ValueError: the images are of classes that the network does not have.
        """
        if self.class_names == list(class_names):
            return self
        indices = {name: index for index, name in enumerate(class_names)}
        if unknown := [name for name in self.class_names if name not in indices]:
            raise ValueError(
                f"the network has {listed(class_names)}, and the images have {listed(self.class_names)}: the network"
                f" does not know {some_names(unknown)}" + (way_out and f"; {way_out}")
            )
        before = self.label_map or range(len(self.class_names))
        label_map = [indices[self.class_names[label]] for label in before]
        return self._changed(class_names=list(class_names), label_map=label_map)

    def named(self, class_names: list[str]) -> "ImageSplits":
        """The same images, whose labels are numbers, with names for them."""
        return self._changed(class_names=list(class_names))

    def fitting_size(self, backbone: nn.Module) -> int:
        """Pixels to train a timm model at: its own size, or where the images are smaller and the model takes other
        sizes, the multiple of 32 that holds the median of them."""
        own_size: int = as_timm(backbone).pretrained_cfg["input_size"][-1]
        return min(own_size, -(-max(self.size) // 32) * 32) if takes_other_sizes(backbone) else own_size

    def transformed(
        self,
        data_config: dict[str, Any],
        **augmentation: Any,
    ) -> tuple[ImageDataset | StreamedImages, ImageDataset | StreamedImages]:
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
            val = normalizing_in_place(create_transform(**data_config))
        except (AssertionError, KeyError) as error:  # timm's answer to an unknown policy or interpolation
            raise ValueError(f"timm does not know a setting of the transforms: {error}") from error
        mode = "L" if channels == 1 else "RGB"
        train_labels = None if self.unlabelled else self.label_column
        train_data = self._as_tensors(self.train_rows, train_labels, train, mode, data_config)
        train_data.augmented = not augmentation.get("no_aug", False)
        return train_data, self._as_tensors(self.val_rows, self.label_column, val, mode, data_config)

    def _as_tensors(
        self, rows: Rows, label_column: str | None, transform: Transform, mode: str, data_config: dict[str, Any]
    ) -> ImageDataset | StreamedImages:
        data = (StreamedImages if isinstance(rows, datasets.IterableDataset) else ImageDataset)(
            rows,
            self.image_column,
            label_column,
            transform,
            mode,
            self.num_classes,
            self.source,
            self.sample.ranges,
            self.label_map,
        )
        data.data_config, data.class_names = dict(data_config), self.class_names
        return data

    def _changed(self, **changes: Any) -> "ImageSplits":
        changed = replace(self, **changes)
        if "sample" in self.__dict__:
            changed.__dict__["sample"] = self.sample
        return changed


def _line(split: FoundSplit) -> str:
    """For example "train: 60 images of 3 classes in photos/train; left out: 24 .json"."""
    count = {None: "images", 1: "1 image"}.get(split["images"]) or f"{split['images']:,} images"
    classes = f" of {split['classes']:,} classes" if split["classes"] else " without labels"
    left_out = f"; left out: {split['left_out']}" if split["left_out"] else ""
    return f"{split['split']}: {count}{classes.replace(' 1 classes', ' 1 class')} in {split['from']}{left_out}"


def fit_classes(images: ImageSplits, backbone: nn.Module, frozen: bool) -> ImageSplits:
    """Give images the class indices of a network whose weights were loaded, whatever the order of their folders.

    Where its classifier is new, or it does not name its classes, the images keep their order; a warning says so where
    labels without names must be trusted.

    Args:
        frozen: whether the network stays as it is.

    Raises:
        ValueError: the classes of the classifier are others than those of the images.
    """
    names, new = own_class_names(backbone), has_new_classifier(backbone)
    if new and frozen:
        warnings.warn(
            f"the frozen backbone's classifier for {backbone.num_classes} classes is new, with random weights, and has"
            " nothing to teach the exits; fine-tune the network first",
            stacklevel=2,
        )
    if new or names is None or not images.class_names:
        return images
    return match_classes(
        images,
        names,
        "give images of its classes, or --unlabelled"
        if frozen
        else "to train a new classifier on its weights give --pretrained-path FILE",
    )


def in_mapped_order(
    images: ImageSplits, class_map: str | PathLike, folder: str | PathLike | None, num_classes: int | None = None
) -> ImageSplits:
    """Give images the class indices of a file, as `timm.data.readers.class_map` reads it.

    Args:
        class_map: a text file with the name of a class in each line, itself or in `folder`.
        num_classes: of the network, where they are more than the names; None are as many.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text file, names a class twice, or lacks one of the images'.
    """
    places = [Path(class_map), *([Path(folder) / class_map] if folder else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"class map {class_map} does not exist; expected a text file with a class in each line")
    if path.suffix.lower() != ".txt":
        raise ValueError(
            f"class map {path} must be a text file (.txt) with the name of a class in each line; pickled"
            " ones are not read"
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(set(names)) < len(names):
        raise ValueError(f"class map {path} names {next(name for name in names if names.count(name) > 1)!r} twice")
    if not images.class_names:
        raise ValueError(f"class map {path} orders classes, and the images have none with names; leave it out")
    if unknown := [name for name in images.class_names if name not in set(names)]:
        raise ValueError(
            f"class map {path} has {listed(names)}, and the images have {listed(images.class_names)}: it"
            f" lacks {some_names(unknown)}; add them, or leave their images out"
        )
    if num_classes is not None and num_classes < len(names):
        raise ValueError(f"class map {path} has {len(names)} classes, and num_classes is {num_classes}")
    return images.in_order([*names, *map(str, range(len(names), num_classes or 0))])


def has_new_classifier(backbone: nn.Module) -> bool:
    """Whether a network was made with a classifier of another size than that of its weights."""
    model = as_timm(backbone)
    return model.pretrained_cfg["num_classes"] != model.num_classes


def match_classes(images: ImageSplits, names: list[str], way_out: str) -> ImageSplits:
    """Give images the class indices of a network by the names of its classes; numbers are taken for its indices.

    Args:
        names: of the network's classes, in its order; those of the images may be fewer.
        way_out: what to do where they are others.

    Raises:
        ValueError: the images have a class that the network does not have.
    """
    numbers = list(map(str, range(len(names))))
    if images.class_names != numbers or set(names) == set(numbers):
        return images.in_order(names, way_out)
    warnings.warn(
        f"the labels are numbers; they are taken for the network's classes, 0 for {names[0]!r}, 1 for"
        f" {names[1]!r}, ...",
        stacklevel=3,
    )
    return images.named(names)
