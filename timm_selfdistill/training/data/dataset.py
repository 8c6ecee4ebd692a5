"""Images and class indices as tensors."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..images import ValueRanges, read_image, undecoded
from ..labels import NO_LABEL
from .files import ImageFiles

if TYPE_CHECKING:
    import datasets


class ImageDataset(torch.utils.data.Dataset):
    """Rows as (image (C, H, W), class index).

    Args:
        rows: with an image column and perhaps a column of class indices.
        label_column: None gives every image the class index -1.
        transform: PIL image -> tensor, e.g. of `timm.data.create_transform`.
        mode: PIL mode that images are converted to: "L" (one channel) or "RGB".
        source: see `ImageSplits`.
        ranges: black and white of images with more than 8 bits.
        label_map: class index for each label; None leaves them as they are.
    """

    augmented: bool | None = None
    """Whether an image is another one each time that it is read; None is not known."""
    data_config: dict[str, Any] | None = None
    """The preprocessing for validation, see `ImageSplits.transformed`."""
    class_names: Sequence[str] = ()
    """In the order of the class indices; empty where they are not known."""

    def __init__(self, rows: "ImageFiles | datasets.Dataset", image_column: str, label_column: str | None,
                 transform: Any, mode: str, num_classes: int | None, source: dict[str, Any] | None = None,
                 ranges: ValueRanges | None = None, label_map: list[int] | None = None):
        self.rows = rows if isinstance(rows, ImageFiles) else undecoded(rows, image_column, label_column)
        self.image_column, self.label_column = image_column, label_column
        self.transform = transform
        self.mode, self.ranges = mode, ranges
        self.num_classes, self.label_map = num_classes, label_map
        self.source = source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = self.transform(read_image(row[self.image_column], self.mode, index, self.ranges))
        if self.label_column is None:
            return image, NO_LABEL
        label = row[self.label_column]
        return image, label if self.label_map is None else self.label_map[label]
