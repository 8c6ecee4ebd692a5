"""Data loading, the training loop, and the files that a run writes."""

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .data.transforms import model_data_config, own_class_names
from .loop.trainer import Trainer, TrainResult

if TYPE_CHECKING:
    from .data.finding import load_images
    from .data.images import open_image
    from .data.splits import ImageDataset, ImageSplits
    from .outputs.run_directory import print_exits, summary_title

__all__ = [
    "ImageDataset",
    "ImageSplits",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "load_images",
    "model_data_config",
    "open_image",
    "own_class_names",
    "print_exits",
    "summary_title",
]

IMPORTED_LATER = {
    "ImageDataset": ".data.splits",
    "ImageSplits": ".data.splits",
    "load_images": ".data.finding",
    "open_image": ".data.images",
    "print_exits": ".outputs.run_directory",
    "summary_title": ".outputs.run_directory",
}
"""Names that are imported on first use, since they bring in `datasets`, which takes half a second, or rich's tables."""


def __getattr__(name: str) -> Any:
    if name not in IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(IMPORTED_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
