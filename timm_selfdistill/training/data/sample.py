"""What a sample of the images tells of all of them."""
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..images import (
    ValueRange,
    ValueRanges,
    decode_image,
    deep_kind,
    extremes,
    load_header,
    named_errors,
    undecoded,
    usual_range,
    value_ranges,
    warn_of_pages,
)
from .files import ImageFiles

if TYPE_CHECKING:
    import datasets

SAMPLE = 256
"""Images, spread over the whole set; of a stream the first ones."""

GREY_MODES = ("1", "L", "LA", "I", "F")


@dataclass(frozen=True)
class Sample:
    """Of the training images.

    Attributes:
        size: (height, width) of the median image, by the longer side.
        grey: whether all are grey throughout.
        ranges: black and white of images with more than 8 bits, by their kind.
    """

    size: tuple[int, int]
    grey: bool
    ranges: ValueRanges


def take_sample(
        rows: "ImageFiles | datasets.Dataset | datasets.IterableDataset", image_column: str,
        value_range: ValueRange | ValueRanges | None = None) -> Sample:
    """Look at images; those that cannot be read are passed over.

    Args:
        value_range: black and white, where they are known.

    Raises:
        ValueError: there are none, or none that can be read.
    """
    sizes, grey, values, error, ranges = [], True, {}, None, value_ranges(value_range)
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
                sizes.append(header.size[::-1])
        except ValueError as reason:  # `on_bad_sample` decides about it when the images are loaded
            error = reason
    if not sizes:
        raise error or ValueError("there are no training images")
    found = {kind: _range_of_all(kind, *zip(*files)) for kind, files in values.items()}
    return Sample(sorted(sizes, key=max)[len(sizes) // 2], grey, {**ranges, **found})


def _range_of_all(kind: str, lows: tuple[float, ...], highs: tuple[float, ...], names: tuple[str, ...]) -> ValueRange:
    brightest = names[int(np.argmax(highs))]
    name = brightest if len(names) == 1 else f"{len(names)} images ({brightest} among them)"
    return usual_range(kind, min(lows), max(highs), name)


def _spread(rows: Any, image_column: str) -> Any:
    """Number and undecoded image of each row of the sample."""
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
