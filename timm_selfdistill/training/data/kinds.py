"""The data sets that a run takes."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypedDict

from PIL import Image
from torch import Tensor

from .streams import StreamedImages

Transform: TypeAlias = Callable[[Image.Image], Tensor]
FoundSplit = TypedDict("FoundSplit", {"split": str, "images": int | None, "classes": int, "from": str, "left_out": str})
"""What a run says of a split, and records."""


class IndexedImages(Protocol):
    """A map-style data set that tells how many samples it has, such as `ImageDataset` or one of torchvision's: (image
    (C, H, W), label), or images alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


RunImages: TypeAlias = IndexedImages | StreamedImages
"""What `Trainer` takes for training and for validation."""
