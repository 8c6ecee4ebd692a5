"""Training and validation images that were found."""
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datasets
from timm.data import create_transform
from torch import nn

from ..augmentation import create_train_transform, normalizing_in_place
from ..class_names import listed, some_names
from ..images import ValueRange, ValueRanges
from ..preprocessing import takes_other_sizes
from ..stream import StreamedImages
from .dataset import ImageDataset
from .files import ImageFiles
from .found import Rows
from .sample import Sample, take_sample

REORDERED = "the classes are in another order than the network's: they are matched by name"


@dataclass
class ImageSplits:
    """Training and validation images; made by `load_images`."""

    train_rows: Rows
    val_rows: Rows
    image_column: str
    label_column: str | None
    """None where the validation images have no labels."""
    class_names: list[str]
    """In the order of the class indices; empty where there are no labels."""
    sampled_rows: Rows = field(repr=False)
    """The training images before any were taken for validation; `sample` is of these."""
    source: dict[str, Any]
    """Where the validation images come from, in the Hub's terms: name, type, config, split, hub_id; where they
    were drawn from the training split val_fraction, seed, and drawn_from, see `fingerprint`."""
    found: list[dict[str, Any]]
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
            " used, agreement with the deepest classifier is measured", stacklevel=2)
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
                f" does not know {some_names(unknown)}" + (way_out and f"; {way_out}"))
        before = self.label_map or range(len(self.class_names))
        label_map = [indices[self.class_names[label]] for label in before]
        return self._changed(class_names=list(class_names), label_map=label_map)

    def named(self, class_names: list[str]) -> "ImageSplits":
        """The same images, whose labels are numbers, with names for them."""
        return self._changed(class_names=list(class_names))

    def fitting_size(self, backbone: nn.Module) -> int:
        """Pixels to train a timm model at: its own size, or where the images are smaller and the model takes other
        sizes, the multiple of 32 that holds the median of them."""
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
            val = normalizing_in_place(create_transform(**data_config))
        except (AssertionError, KeyError) as error:  # timm's answer to an unknown policy or interpolation
            raise ValueError(f"timm does not know a setting of the transforms: {error}") from error
        mode = "L" if channels == 1 else "RGB"
        train_labels = None if self.unlabelled else self.label_column
        made = tuple(
            (StreamedImages if isinstance(rows, datasets.IterableDataset) else ImageDataset)(
                rows, self.image_column, labels, transform, mode, self.num_classes, self.source,
                self.sample.ranges, self.label_map)
            for rows, labels, transform in (
                (self.train_rows, train_labels, train), (self.val_rows, self.label_column, val)))
        made[0].augmented = not augmentation.get("no_aug", False)
        for data in made:
            data.data_config, data.class_names = dict(data_config), self.class_names
        return made

    def _changed(self, **changes: Any) -> "ImageSplits":
        changed = replace(self, **changes)
        if "sample" in self.__dict__:
            changed.__dict__["sample"] = self.sample
        return changed


def _line(split: dict[str, Any]) -> str:
    """For example "train: 60 images of 3 classes in photos/train; left out: 24 .json"."""
    count = {None: "images", 1: "1 image"}.get(split["images"]) or f"{split['images']:,} images"
    classes = f" of {split['classes']:,} classes" if split["classes"] else " without labels"
    left_out = f"; left out: {split['left_out']}" if split["left_out"] else ""
    return f"{split['split']}: {count}{classes.replace(' 1 classes', ' 1 class')} in {split['from']}{left_out}"
