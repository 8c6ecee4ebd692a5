"""Flags for images, shared by training and evaluation."""

from collections.abc import Mapping
from typing import Any

PREPROCESSING_FLAGS = ("img_size", "mean", "std", "interpolation", "crop_pct")


def add_image_flags(group: Any, defaults: Mapping[str, Any]) -> None:
    """Add the flags for the source of images, their splits and columns.

    Args:
        defaults: defaults by flag name; None for any other flag.
    """
    group.add_argument("--data-dir", metavar="DIR", help="folder of images, parquet or arrow files")
    group.add_argument("--dataset", metavar="NAME", help="dataset on the Hub, instead of --data-dir")
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset on the Hub")
    group.add_argument("--train-split", metavar="NAME", help="training split")
    group.add_argument(
        "--val-split", metavar="NAME", help="validation split (default: the validation split, else the test split)"
    )
    group.add_argument(
        "--val-fraction", type=float, help="fraction of the training split to hold out if there is no validation split"
    )
    group.add_argument(
        "--input-key",
        metavar="COLUMN",
        help="image column (default: found by its type); for a folder of image files, their extensions, e.g."
        " '.webp;.png' (default: timm's)",
    )
    group.add_argument("--target-key", metavar="COLUMN", help="label column (default: found by its type)")
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="pixel values of black and white in images with more than 8 bits (default: the full range of their type)",
    )
    group.set_defaults(**defaults)


def add_preprocessing_flags(group: Any) -> None:
    """Add the flags for preprocessing."""
    group.add_argument(
        "--img-size",
        type=int,
        help="image size in pixels (default: the model's; smaller when training on small images)",
    )
    group.add_argument(
        "--mean", type=float, nargs="+", help="pixel mean, one value or one per channel (default: the model's)"
    )
    group.add_argument(
        "--std",
        type=float,
        nargs="+",
        help="pixel standard deviation, one value or one per channel (default: the model's)",
    )
    group.add_argument("--interpolation", help="bicubic, bilinear, ... (default: the model's)")
    group.add_argument(
        "--crop-pct", type=float, help="center crop for validation, as a fraction of the image (default: the model's)"
    )
