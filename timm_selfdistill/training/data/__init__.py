"""What is on the disk, or the Hub, as images and labels: finding them, reading them, dividing them."""
from .finding import load_images
from .splits import ImageDataset, ImageSplits

__all__ = ["ImageDataset", "ImageSplits", "load_images"]
