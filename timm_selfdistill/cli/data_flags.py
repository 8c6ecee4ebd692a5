"""Flags of images, the same for training and for what measures."""

from collections.abc import Mapping
from typing import Any

PREPROCESSING_FLAGS = ("img_size", "mean", "std", "interpolation", "crop_pct")


def add_image_flags(group: Any, defaults: Mapping[str, Any]) -> None:
    """Where images are, and how they are divided and read.

    Args:
        defaults: by the names of flags; None for those that are missing.
    """
    group.add_argument("--data-dir", metavar="DIR", help="folder of images, parquet or arrow files")
    group.add_argument("--dataset", metavar="NAME", help="data set on the Hub, instead of --data-dir")
    group.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    group.add_argument("--train-split", metavar="NAME", help="name of the training split")
    group.add_argument("--val-split", metavar="NAME", help="default: the validation split, else the test split")
    group.add_argument("--val-fraction", type=float, help="of the training split, where there is no other")
    group.add_argument(
        "--input-key",
        metavar="COLUMN",
        help="image column (default: found by its type); of a folder"
        " of image files their extensions, '.webp;.png' (default: timm's)",
    )
    group.add_argument("--target-key", metavar="COLUMN", help="label column (default: found by its type)")
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white of images with more than 8 bits (default: the full range of their type)",
    )
    group.set_defaults(**defaults)


def add_preprocessing_flags(group: Any) -> None:
    """How images become the input of a network."""
    group.add_argument(
        "--img-size", type=int, help="pixels (default: the model's, in training less where the images are small)"
    )
    group.add_argument(
        "--mean", type=float, nargs="+", help="of the pixels, one value or one a channel (default: the model's)"
    )
    group.add_argument("--std", type=float, nargs="+", help="likewise")
    group.add_argument("--interpolation", help="bicubic, bilinear, ... (default: the model's)")
    group.add_argument("--crop-pct", type=float, help="centre crop for validation (default: the model's)")
