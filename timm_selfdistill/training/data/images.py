"""Reading image files and converting them for networks, in the same way for training, evaluation and prediction."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from PIL import ExifTags, Image

from .folder import EncodedImage, ImageFiles

if TYPE_CHECKING:
    import datasets

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by number of channels."""

UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose operation that makes an image upright, by its EXIF orientation."""

ValueRange = tuple[float, float]
"""Pixel values of black and of white."""

ValueRanges = dict[str, ValueRange]
"""Value ranges by kind of images with more than 8 bits: integers ("I") and floating-point numbers ("F")."""

FULL_RANGES: ValueRanges = {"I": (0, 65535), "F": (0.0, 255.0)}
"""Ranges of Pillow's 16-bit integer images, and of its conversion to floating point."""

SMALL_PART = 1 / 4
"""Images whose values fill at most this fraction of their range, e.g. from a 12-bit camera, would be too dark."""


def open_image(path: str | Path, channels: int, value_range: ValueRange | ValueRanges | None = None) -> Image.Image:
    """Open an image file in grayscale or RGB, upright.

    Args:
        channels: 1 or 3.
        value_range: black and white of an image with more than 8 bits, optionally by kind; None is the full range of
            its type, with a warning if the values fill only a small part of it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: Pillow cannot read the file, or `channels` is neither 1 nor 3.

    Examples:
        >>> from timm_selfdistill.training import open_image
        >>> open_image("examples/ankle_boot.png", channels=3).mode
        'RGB'
    """
    if channels not in MODES:
        raise ValueError(f"this model takes images with {channels} channels, but image files are read with 1 or 3")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an image file")
    image: EncodedImage = {"bytes": None, "path": str(path)}
    with named_errors(image):
        decoded = decode_image(image)
        ranges = value_ranges(value_range)
        kind = deep_kind(decoded)
        if kind and kind not in ranges:
            ranges = {kind: usual_range(kind, *extremes(decoded), str(path))}
        warn_of_pages(decoded, str(path))
        return to_mode(decoded, MODES[channels], ranges)


def value_ranges(value_range: ValueRange | ValueRanges | None) -> ValueRanges:
    """Return value ranges by kind of images; a single range applies to all kinds."""
    if isinstance(value_range, dict):
        return value_range
    if not value_range:
        return {}
    black, white = value_range
    return {"I": (black, white), "F": (black, white)}


def read_image(
    image: EncodedImage, mode: str, row: int | None = None, ranges: ValueRanges | None = None
) -> Image.Image:
    """Decode an image of `datasets` (bytes or a path), make it upright and convert it.

    Args:
        mode: "L" or "RGB".
        row: row number, for the error message.
        ranges: value ranges; None stands for the full ranges.

    Raises:
        ValueError: Pillow cannot read it; the message contains its path or row.
    """
    with named_errors(image, row, "; on_bad_sample='skip' (--on-bad-sample skip) skips such images"):
        return to_mode(decode_image(image), mode, ranges)


def undecoded(rows: Any, image_column: str, label_column: str | None = None) -> Any:
    """Return a `datasets` table reduced to the two columns, with undecoded images."""
    import datasets

    rows = rows.select_columns(list(filter(None, (image_column, label_column))))
    return rows.cast_column(image_column, datasets.Image(decode=False))


@contextmanager
def named_errors(image: EncodedImage, row: int | None = None, way_out: str = "") -> Iterator[None]:
    """Context manager that turns Pillow's errors about a damaged file into a ValueError that names it.

    Args:
        row: row number, for an image without a path.
        way_out: what to do, for the message.
    """
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, struct.error, RuntimeError, ...: there is no complete list
        name = (image and image["path"]) or f"in row {row}"
        reason = re.sub(r" image file (<_io\..*>|'.*')$", " it", str(error)) or type(error).__name__
        raise ValueError(f"cannot read image {name}: {reason}{way_out}") from error


def decode_image(image: EncodedImage) -> Image.Image:
    """Decode an image of `datasets` without converting it, and make it upright."""
    decoded = load_header(image)
    if decoded.format == "TIFF":  # Pillow itself turns it while loading, unless the tags are removed
        turn = _turn(decoded)
        exif = decoded.getexif()
        for tag in list(exif):
            del exif[tag]
        decoded.load()
    else:
        decoded.load()
        turn = _turn(decoded)
    return decoded if turn is None else decoded.transpose(turn)


def load_header(image: EncodedImage) -> Image.Image:
    """Open an image of `datasets` with its size and mode, without decoding its pixels."""
    if image["bytes"] is not None:
        return Image.open(BytesIO(image["bytes"]))
    path = image["path"]
    if path is None:
        raise ValueError("it has neither bytes nor a path")
    if "://" not in path:
        return Image.open(path)
    with fsspec.open(path, "rb") as file:  # streamed folders give URLs such as hf://datasets/user/name/a.png
        return Image.open(BytesIO(file.read()))


def deep_kind(image: Image.Image) -> str | None:
    """Return "I" for integer and "F" for floating-point pixels of 16 or 32 bits; None for 8 bits."""
    return image.mode[0] if image.mode.startswith(("I", "F")) else None


def extremes(image: Image.Image) -> ValueRange:
    """Return the minimum and maximum of the pixels; 0 and 0 if none is finite."""
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def warn_of_pages(image: Image.Image, name: str) -> None:
    """Warn if a TIFF file contains more than one image."""
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages > 1:
        warnings.warn(f"{name} has {pages} pages; only the first is read", stacklevel=3)


def to_mode(image: Image.Image, mode: str, ranges: ValueRanges | None = None) -> Image.Image:
    """Convert an image to "L" or "RGB"."""
    if kind := deep_kind(image):  # Pillow would clip it to 0..255
        image = Image.fromarray(_to_8_bits(np.asarray(image), {**FULL_RANGES, **(ranges or {})}[kind]))
    return image if image.mode == mode else image.convert(mode)  # convert would copy it even so


def usual_range(kind: str, low: float, high: float, name: str) -> ValueRange:
    """Return black and white for images of a kind with values from `low` to `high`.

    This is the full range of the kind, or 0 to 1, with a warning, for floating-point numbers within that range. A
    warning is also issued if values exceed the full range or fill only a small part of it.
    """
    black, white = (0.0, 1.0) if kind == "F" and low >= 0 and high <= 1 else FULL_RANGES[kind]
    if low < black or high > white or high <= SMALL_PART * FULL_RANGES[kind][1]:
        numbers = "floating-point numbers" if kind == "F" else "integers of more than 8 bits"
        warnings.warn(
            f"the values of {name} are {numbers} from {low:g} to {high:g}; {black:g} is read as black and {white:g} as"
            " white: if that is wrong, set value_range (--value-range LOW HIGH)",
            stacklevel=3,
        )
    return black, white


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose operation that makes an image upright; None if its EXIF data do not ask for one or cannot be
    read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:  # damaged EXIF data can raise anything; the pixels may still be fine
        return None


def _to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    low, high = value_range
    if np.issubdtype(values.dtype, np.integer) and low == int(low) and high == int(high):
        scaled = (values.astype(np.int64) - int(low)) * 256 // (int(high) - int(low) + 1)
    else:
        scaled = np.nan_to_num((values.astype(np.float64) - low) / (high - low) * 255)
    return scaled.clip(0, 255).astype(np.uint8)


SAMPLE = 256
"""Number of images in a sample, spread over the dataset; of a stream, the first ones."""

GREY_MODES = ("1", "L", "LA", "I", "F")


@dataclass(frozen=True)
class Sample:
    """Properties of a sample of the training images.

    Attributes:
        size: (height, width) of the median image, by the longer side.
        grey: whether all images are grayscale, whatever their mode.
        ranges: black and white of images with more than 8 bits, by kind.
    """

    size: tuple[int, int]
    grey: bool
    ranges: ValueRanges


def take_sample(
    rows: "ImageFiles | datasets.Dataset | datasets.IterableDataset",
    image_column: str,
    value_range: ValueRange | ValueRanges | None = None,
) -> Sample:
    """Inspect a sample of images; those that cannot be read are skipped.

    Args:
        value_range: black and white, if known.

    Raises:
        ValueError: there are no images, or none that can be read.
    """
    grey, ranges = True, value_ranges(value_range)
    sizes: list[tuple[int, int]] = []
    values: dict[str, list[tuple[float, float, str]]] = {}
    error: ValueError | None = None
    for number, image in _spread(rows, image_column):
        try:
            with named_errors(image, number):
                header = load_header(image)
                if grey and not _has_grey_mode(header):
                    grey = _is_grey(decode_image(image))
                name = image["path"] or f"row {number}"
                if (kind := deep_kind(header)) and kind not in ranges:
                    values.setdefault(kind, []).append((*extremes(decode_image(image)), name))
                if not sizes:
                    warn_of_pages(header, name)
                sizes.append((header.height, header.width))
        except ValueError as reason:  # handled by `on_bad_sample` when the images are loaded
            error = reason
    if not sizes:
        raise error or ValueError("there are no training images")
    found = {kind: _range_of_all(kind, *zip(*files)) for kind, files in values.items()}
    return Sample(sorted(sizes, key=max)[len(sizes) // 2], grey, {**ranges, **found})


def _range_of_all(kind: str, lows: tuple[float, ...], highs: tuple[float, ...], names: tuple[str, ...]) -> ValueRange:
    brightest = names[int(np.argmax(highs))]
    name = brightest if len(names) == 1 else f"{len(names)} images ({brightest} among them)"
    return usual_range(kind, min(lows), max(highs), name)


def _spread(
    rows: "ImageFiles | datasets.Dataset | datasets.IterableDataset", image_column: str
) -> Iterator[tuple[int, EncodedImage]]:
    """Yield the number and the undecoded image of each row in the sample."""
    if isinstance(rows, ImageFiles):
        for index in _indices(len(rows)):
            yield index, rows[index]["image"]
        return
    import datasets

    rows = undecoded(rows, image_column)
    if isinstance(rows, datasets.IterableDataset):
        for index, row in enumerate(islice(rows, SAMPLE)):
            yield index, row[image_column]
    else:
        for index in _indices(len(rows)):
            yield index, rows[index][image_column]


def _indices(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int)).tolist() if count else []


def _has_grey_mode(image: Image.Image) -> bool:
    return image.mode in GREY_MODES or image.mode.startswith("I;")


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.convert("RGB").split()
    return red.tobytes() == green.tobytes() == blue.tobytes()
