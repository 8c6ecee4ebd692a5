"""Training and validation images, before anything is known of what they show."""
from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets

from .files import ImageFiles, left_out_text

Rows = ImageFiles | datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Found:
    """What `load_images` makes `ImageSplits` of.

    Attributes:
        sampled: the training images before a part of them was taken for validation.
        val_name: of the validation split.
        label_column: None without labels.
        entries: of both splits, see `entry`.
    """

    train: Rows
    val: Rows
    sampled: Rows
    val_name: str
    image_column: str
    label_column: str | None
    class_names: list[str]
    entries: list[dict[str, Any]]


def entry(split: str, images: int | None, classes: int, place: str, left_out: Counter[str]) -> dict[str, Any]:
    """What a run says of a split, and records."""
    return {"split": split, "images": images, "classes": classes, "from": place, "left_out": left_out_text(left_out)}
