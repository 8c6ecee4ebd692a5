"""Images as files hold them, and as networks take them: the same for training, evaluation and prediction."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import ExifTags, Image

MODES = {1: "L", 3: "RGB"}
"""Of images with so many channels."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
"""What makes an image upright, by its EXIF orientation."""

ValueRange = tuple[float, float]
"""The values of a pixel that are black and white."""


def open_image(path: str | Path, channels: int, value_range: ValueRange | None = None) -> Image.Image:
    """An image file, grey or in colours, upright.

    Args:
        channels: 1 or 3.
        value_range: black and white of an image with more than 8 bits; None is the full range of its type. A warning
            says where its values lie in a small part of that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that Pillow reads, or `channels` is neither 1 nor 3.
    """
    if channels not in MODES:
        raise ValueError(f"this model takes images of {channels} channels; a file's are made into 1 or 3")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an image file")
    image = {"bytes": None, "path": str(path)}
    with named_errors(image):
        decoded = decode_image(image)
        if is_deep(decoded) and value_range is None:
            value_range = usual_range(decoded.mode, *decoded.getextrema(), str(path))
        return to_mode(decoded, MODES[channels], value_range)


def read_image(image: dict[str, Any], mode: str, row: int | None = None,
               value_range: ValueRange | None = None) -> Image.Image:
    """An image of `datasets`, which has bytes or a path, upright and converted.

    Args:
        mode: "L" or "RGB".
        row: which one it is, for the error message.
        value_range: see `open_image`.

    Raises:
        ValueError: it is none that Pillow reads; the message has its path, or the row.
    """
    with named_errors(image, row):
        return to_mode(decode_image(image), mode, value_range)


def undecoded(rows: Any, image_column: str, label_column: str | None = None) -> Any:
    """The two columns of a table of `datasets`, images as bytes or paths."""
    import datasets

    rows = rows.select_columns(list(filter(None, (image_column, label_column))))
    return rows.cast_column(image_column, datasets.Image(decode=False))


@contextmanager
def named_errors(image: dict[str, Any], row: int | None = None) -> Iterator[None]:
    """Whatever Pillow raises at a damaged file becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, struct.error, RuntimeError, ...: there is no list of them
        name = (image and image["path"]) or f"in row {row}"
        raise ValueError(f"cannot read image {name}: {error or type(error).__name__}") from error


def decode_image(image: dict[str, Any]) -> Image.Image:
    """An image of `datasets` as it is, upright."""
    decoded = load_header(image)
    if decoded.format == "TIFF":  # which is turned while it is loaded, unless nothing says so
        turn = _turn(decoded)
        exif = decoded.getexif()
        for tag in list(exif):
            del exif[tag]
        decoded.load()
    else:
        decoded.load()
        turn = _turn(decoded)
    return decoded if turn is None else decoded.transpose(turn)


def load_header(image: dict[str, Any]) -> Image.Image:
    """An image of `datasets` that knows its size and mode, but not yet its pixels."""
    if image["bytes"] is not None:
        return Image.open(BytesIO(image["bytes"]))
    path = image["path"]
    if "://" not in path:
        with open(path, "rb") as file:
            return Image.open(BytesIO(file.read()))
    with fsspec.open(path, "rb") as file:  # streamed folders give an address, such as hf://datasets/user/name/a.png
        return Image.open(BytesIO(file.read()))


def is_deep(image: Image.Image) -> bool:
    """Whether its pixels have 16 or 32 bits, or are floating-point numbers."""
    return image.mode.startswith(("I", "F"))


def to_mode(image: Image.Image, mode: str, value_range: ValueRange | None = None) -> Image.Image:
    """Convert to "L" or "RGB"."""
    if is_deep(image):  # which Pillow would clip to 0..255
        image = Image.fromarray(_to_8_bits(np.asarray(image), value_range or FULL_RANGES[image.mode[0]]))
    return image if image.mode == mode else image.convert(mode)  # which would copy it


FULL_RANGES: dict[str, ValueRange] = {"I": (0, 65535), "F": (0.0, 255.0)}
"""Of integers and floating-point numbers, as Pillow reads 16-bit images and converts to them."""


def usual_range(mode: str, low: float, high: float, name: str) -> ValueRange:
    """What is black and white in images of a mode with these lowest and highest values.

    A warning says what is unusual: integers that fill a small part of their range, or more than it, are taken as they
    are; floating-point numbers up to 1 are taken for a range from 0 to 1.
    """
    full = FULL_RANGES[mode[0]]
    kind = "floating-point numbers" if mode == "F" else "integers of more than 8 bits"
    found = f"the values of {name} lie between {low:g} and {high:g}, in {kind}"
    flag = "give the values of black and white with value_range (--value-range LOW HIGH)"
    if mode == "F" and high <= 1:
        warnings.warn(f"{found}: 0 is taken for black and 1 for white; if they are others, {flag}", stacklevel=3)
        return 0.0, 1.0
    if mode == "F" and high <= 255 and low >= 0:
        return full
    if high <= SMALL_RANGE or high > full[1] or low < full[0]:
        warnings.warn(f"{found}: {full[0]:g} is taken for black and {full[1]:g} for white, so that they are nearly"
                      f" {'black' if high <= SMALL_RANGE else 'white'}; {flag}", stacklevel=3)
    return full


SMALL_RANGE = 4095
"""12 bits, as cameras have them; values up to this one are too dark in the full range."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright; None where its EXIF data do not say, or cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data raise what the file makes Pillow raise; the pixels are what counts
        return None


def _to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    low, high = value_range
    if np.issubdtype(values.dtype, np.integer) and low == int(low) and high == int(high):
        scaled = (values.astype(np.int64) - int(low)) * 256 // (int(high) - int(low) + 1)
    else:
        scaled = np.nan_to_num((values.astype(np.float64) - low) / (high - low) * 255)
    return scaled.clip(0, 255).astype(np.uint8)
