"""Images as files hold them, and as networks take them."""
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError


def open_image(path: str | Path, mode: str) -> Image.Image:
    """An image file in a PIL mode: "L" (one channel) or "RGB".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that Pillow reads.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an image file")
    return to_mode(decode_image({"bytes": None, "path": str(path)}), mode)


def decode_image(image: dict[str, Any], row: int | None = None) -> Image.Image:
    """An image of `datasets`, which has bytes or a path.

    Raises:
        ValueError: it is none that Pillow reads; `row` says which.
    """
    try:
        decoded = Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        decoded.load()
        return decoded
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise ValueError(f"cannot read image {(image and image['path']) or f'in row {row}'}: {error}") from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to "L" or "RGB"."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert(mode)
