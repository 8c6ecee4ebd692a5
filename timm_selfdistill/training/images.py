"""Images as files hold them, and as networks take them."""
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}


def open_image(path: str | Path, channels: int) -> Image.Image:
    """An image file, grey or in colours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that Pillow reads, or `channels` is neither 1 nor 3.
    """
    if channels not in MODES:
        raise ValueError(f"this model takes images of {channels} channels; a file's are made into 1 or 3")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an image file")
    return to_mode(decode_image({"bytes": None, "path": str(path)}), MODES[channels])


def decode_image(image: dict[str, Any], row: int | None = None) -> Image.Image:
    """An image of `datasets`, which has bytes or a path, turned as its EXIF data say.

    Raises:
        ValueError: it is none that Pillow reads; `row` says which.
    """
    try:
        decoded = Image.open(BytesIO(_content(image)))
        decoded.load()
        ImageOps.exif_transpose(decoded, in_place=True)
        return decoded
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, TypeError, SyntaxError) as error:
        raise ValueError(f"cannot read image {(image and image['path']) or f'in row {row}'}: {error}") from error


def _content(image: dict[str, Any]) -> bytes:
    """The file of an image of `datasets`; streamed folders give an address, such as hf://datasets/user/name/a.png."""
    if image["bytes"] is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to "L" or "RGB"."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert(mode)
