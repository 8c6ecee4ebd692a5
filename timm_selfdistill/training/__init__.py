"""Data, the training loop, and what it leaves behind."""
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .preprocessing import model_data_config
from .trainer import Trainer, TrainResult

if TYPE_CHECKING:
    from .data import ImageDataset, ImageSplits, load_images

__all__ = [
    "ImageDataset",
    "ImageSplits",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "load_images",
    "model_data_config",
]


def __getattr__(name: str) -> Any:
    """Import `datasets`, which takes half a second, with the first of the names that need it."""
    if name not in ("ImageDataset", "ImageSplits", "load_images"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import data

    return getattr(data, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
