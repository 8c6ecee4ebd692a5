"""What is on the disk, or the Hub, as images and labels: finding them, reading them, dividing them."""
from .dataset import ImageDataset
from .load import load_images
from .splits import ImageSplits

__all__ = ["ImageDataset", "ImageSplits", "load_images"]
