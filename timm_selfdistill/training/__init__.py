"""Data, the training loop, and what it leaves behind."""
from .config import TrainConfig
from .data import ImageDataset, ImageSplits, load_images
from .preprocessing import model_data_config
from .trainer import Trainer, TrainResult

__all__ = [
    "ImageDataset",
    "ImageSplits",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "load_images",
    "model_data_config",
]
