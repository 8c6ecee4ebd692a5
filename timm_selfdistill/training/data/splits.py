"""Training and validation images as datasets of tensors."""

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
    """Map-style dataset of (image (C, H, W), class index).

    Args:
        rows: rows with an image column and optionally a column of class indices.
        label_column: if None, every image has the class index -1.
        transform: PIL image to tensor, e.g. `timm.data.create_transform`.
        mode: PIL mode that images are converted to: "L" (one channel) or "RGB".
        source: see `ImageSplits`.
        ranges: black and white of images with more than 8 bits, by kind.
        label_map: class index for each label; None leaves labels unchanged.

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
    """Whether reading an image twice gives different results; None if unknown."""
    data_config: dict[str, Any] | None = None
    """Preprocessing for validation, see `ImageSplits.transformed`."""
    class_names: Sequence[str] = ()
    """Class names in the order of the class indices; empty if unknown."""

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


REORDERED = "the classes are not in the network's order: they are matched by name"


@dataclass
class ImageSplits:
    """Training and validation images, created by `load_images`.

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
    """Name of the label column; None if the validation images have no labels."""
    class_names: list[str]
    """Class names in the order of the class indices; empty if there are no labels."""
    sampled_rows: Rows = field(repr=False)
    """The training images before some were held out for validation; `sample` is taken from these."""
    source: ImageSource
    """Origin of the validation images, in the Hub's terms: name, type, config, split, hub_id; if they were drawn from
    the training split, also val_fraction, seed and drawn_from, see `fingerprint`."""
    found: list[FoundSplit]
    """For each split its name, number of images and classes, origin, and what was left out."""
    unlabelled: bool = False
    """Whether the training images have no labels, or their labels are ignored."""
    value_range: ValueRange | ValueRanges | None = None
    """Black and white of images with more than 8 bits, as given."""
    label_map: list[int] | None = field(default=None, repr=False)
    """Class index for each label of the rows, if a network has the classes in a different order."""

    @property
    def train(self) -> datasets.Dataset | datasets.IterableDataset:
        """The training images as a `datasets` object, with the source's labels; a folder becomes a table of paths."""
        return self.train_rows.table if isinstance(self.train_rows, ImageFiles) else self.train_rows

    @train.setter
    def train(self, rows: datasets.Dataset | datasets.IterableDataset) -> None:
        self.train_rows = rows

    @property
    def val(self) -> datasets.Dataset | datasets.IterableDataset:
        """The validation images, as in `train`."""
        return self.val_rows.table if isinstance(self.val_rows, ImageFiles) else self.val_rows

    @val.setter
    def val(self, rows: datasets.Dataset | datasets.IterableDataset) -> None:
        self.val_rows = rows

    @cached_property
    def sample(self) -> Sample:
        """Properties of a sample of the training images, read on first use.

        Raises:
            ValueError: none of the images can be read.
        """
        return take_sample(self.sampled_rows, self.image_column, self.value_range)

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) or None

    @property
    def in_chans(self) -> int:
        """Channels of a new network: three, timm's default, even if all images are grayscale (`sample.grey`)."""
        return 3

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the median image of the sample."""
        return self.sample.size

    def lines(self) -> list[str]:
        """Return a description of each split, and a line if the classes are not in the network's order."""
        return [*map(_line, self.found), *([REORDERED] if self.is_reordered else [])]

    @property
    def is_reordered(self) -> bool:
        """Whether the network's classes are in a different order than those of the source."""
        return self.label_map is not None and list(self.label_map) != sorted(self.label_map)

    def fitting_labels(self, num_classes: int, class_names: list[str] | None = None) -> "ImageSplits":
        """Return the same images for a network that trains without labels. If the labels of the validation images do
        not match its classes, they are dropped with a warning.

        Args:
            num_classes: K of the network.
            class_names: class names of the network; None if unknown.
        """
        if self.num_classes is None or (class_names is None and self.num_classes == num_classes):
            return self
        if class_names is not None and set(self.class_names) <= set(class_names):
            return self.in_order(class_names)
        warnings.warn(
            f"the classes of the validation images ({self.num_classes}: {self.class_names[0]}, ...) are not those of"
            f" the network ({num_classes}{': ' + class_names[0] + ', ...' if class_names else ''}): labels are ignored,"
            " and agreement with the deepest exit is measured",
            stacklevel=2,
        )
        return self._changed(label_column=None, class_names=[])

    def in_order(self, class_names: list[str], way_out: str = "") -> "ImageSplits":
        """Return the same images with the class indices of a network.

        Args:
            class_names: class names of the network, in its order.
            way_out: what to do if the classes do not match, for the error message.

        Raises:
            ValueError: the images have a class that the network does not have.
        """
        if self.class_names == list(class_names):
            return self
        indices = {name: index for index, name in enumerate(class_names)}
        if unknown := [name for name in self.class_names if name not in indices]:
            raise ValueError(
                f"the network has {listed(class_names)}, but the images have {listed(self.class_names)}: the network"
                f" does not know {some_names(unknown)}" + (way_out and f"; {way_out}")
            )
        before = self.label_map or range(len(self.class_names))
        label_map = [indices[self.class_names[label]] for label in before]
        return self._changed(class_names=list(class_names), label_map=label_map)

    def named(self, class_names: list[str]) -> "ImageSplits":
        """Return the same images with names for labels that are numbers."""
        return self._changed(class_names=list(class_names))

    def fitting_size(self, backbone: nn.Module) -> int:
        """Return the image size in pixels to train a timm model at: its own, or if the images are smaller and the model
        accepts other sizes, the median image's size rounded up to a multiple of 32."""
        own_size: int = as_timm(backbone).pretrained_cfg["input_size"][-1]
        return min(own_size, -(-max(self.size) // 32) * 32) if takes_other_sizes(backbone) else own_size

    def transformed(
        self,
        data_config: dict[str, Any],
        **augmentation: Any,
    ) -> tuple[ImageDataset | StreamedImages, ImageDataset | StreamedImages]:
        """Return training and validation datasets of tensors.

        Args:
            data_config: input_size (channels, height, width), mean, std, interpolation and crop_pct, from
                `timm.data.resolve_model_data_config` or `model_data_config`.
            augmentation: arguments of `create_train_transform` for training, e.g. `auto_augment`, `cutout`, or
                `no_aug=True`.

        Raises:
            ValueError: input_size has neither one nor three channels, or a setting is unknown.
        """
        channels = data_config["input_size"][0]
        if channels not in (1, 3):
            raise ValueError(f"images are read with 1 or 3 channels, but the model has in_chans={channels}")
        interpolation = augmentation.pop("interpolation", data_config["interpolation"])
        try:
            train = create_train_transform({**data_config, "interpolation": interpolation}, **augmentation)
            val = normalizing_in_place(create_transform(**data_config))
        except (AssertionError, KeyError) as error:  # from timm, for an unknown policy or interpolation
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
    """Return a line such as "train: 60 images of 3 classes in photos/train; left out: 24 .json"."""
    count = {None: "images", 1: "1 image"}.get(split["images"]) or f"{split['images']:,} images"
    classes = f" of {split['classes']:,} classes" if split["classes"] else " without labels"
    left_out = f"; left out: {split['left_out']}" if split["left_out"] else ""
    return f"{split['split']}: {count}{classes.replace(' 1 classes', ' 1 class')} in {split['from']}{left_out}"


def fit_classes(images: ImageSplits, backbone: nn.Module, frozen: bool) -> ImageSplits:
    """Return the images with the class indices of a network whose weights were loaded, matched by class name.

    If its classifier is new, or it has no class names, the images keep their order; a warning is issued if labels are
    numbers and have to be taken as the network's class indices.

    Args:
        frozen: whether the network is frozen.

    Raises:
        ValueError: the images have classes that the classifier does not have.
    """
    names, new = own_class_names(backbone), has_new_classifier(backbone)
    if new and frozen:
        warnings.warn(
            f"the frozen backbone has a new, untrained classifier for {backbone.num_classes} classes, which cannot"
            " teach the exits; fine-tune the network first",
            stacklevel=2,
        )
    if new or names is None or not images.class_names:
        return images
    return match_classes(
        images,
        names,
        "give images of its classes, or --unlabelled"
        if frozen
        else "to train a new classifier on top of its weights, give --pretrained-path FILE",
    )


def in_mapped_order(
    images: ImageSplits, class_map: str | PathLike, folder: str | PathLike | None, num_classes: int | None = None
) -> ImageSplits:
    """Return the images with the class indices of a class map, as read by `timm.data.readers.class_map`.

    Args:
        class_map: path of a text file with one class name per line, possibly relative to `folder`.
        num_classes: number of classes of the network if it exceeds that of the names; None is the same number.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a text file, lists a class twice, or lacks a class of the images.
    """
    places = [Path(class_map), *([Path(folder) / class_map] if folder else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"class map {class_map} does not exist; expected a text file with one class per line")
    if path.suffix.lower() != ".txt":
        raise ValueError(
            f"class map {path} must be a text file (.txt) with one class name per line; pickled class maps are not"
            " supported"
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(set(names)) < len(names):
        raise ValueError(f"class map {path} lists {next(name for name in names if names.count(name) > 1)!r} twice")
    if not images.class_names:
        raise ValueError(f"class map {path} needs named classes, which the images do not have; leave it out")
    if unknown := [name for name in images.class_names if name not in set(names)]:
        raise ValueError(
            f"class map {path} has {listed(names)}, but the images have {listed(images.class_names)}: it"
            f" lacks {some_names(unknown)}; add them, or remove their images"
        )
    if num_classes is not None and num_classes < len(names):
        raise ValueError(f"class map {path} has {len(names)} classes, but num_classes is {num_classes}")
    return images.in_order([*names, *map(str, range(len(names), num_classes or 0))])


def has_new_classifier(backbone: nn.Module) -> bool:
    """Whether a network's classifier is new, since it has a different number of classes than its weights."""
    model = as_timm(backbone)
    return model.pretrained_cfg["num_classes"] != model.num_classes


def match_classes(images: ImageSplits, names: list[str], way_out: str) -> ImageSplits:
    """Return the images with the class indices of a network, matched by class name; labels that are numbers are taken
    as its indices.

    Args:
        names: class names of the network, in its order; the images may have fewer classes.
        way_out: what to do if the classes do not match, for the error message.

    Raises:
        ValueError: the images have a class that the network does not have.
    """
    numbers = list(map(str, range(len(names))))
    if images.class_names != numbers or set(names) == set(numbers):
        return images.in_order(names, way_out)
    warnings.warn(
        f"the labels are numbers; they are taken as the network's class indices, 0 for {names[0]!r}, 1 for"
        f" {names[1]!r}, ...",
        stacklevel=3,
    )
    return images.named(names)
