"""A file that somebody drops on the page: a picture as `predict` reads it, or a message for the page."""

from pathlib import Path

from PIL import Image

from ..training.data.images import ValueRange, ValueRanges, load_header, open_image

MOST_MEGAPIXELS = 25.0
"""Of a picture; decoding a larger one takes 100 MB and more, for a network that sees a few hundred pixels of it."""


def read_picture(path: str | Path, channels: int, value_range: ValueRange | ValueRanges | None = None) -> Image.Image:
    """A picture, grey or in colours, upright. Its size is checked before its pixels are decoded.

    Args:
        channels: 1 or 3.
        value_range: see `open_image`.

    Raises:
        ValueError: it is no picture, is damaged, or has more than `MOST_MEGAPIXELS`. The message names the file, but
            not the folder that it was uploaded to.
    """
    name = Path(path).name
    try:
        with load_header({"bytes": None, "path": str(path)}) as header:
            width, height = header.size
    except Exception as error:  # Pillow raises many kinds
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(f"{name} has far too many pixels; {_advice()}") from error
        raise ValueError(f"{name} is not a picture that can be read; drop a JPEG, PNG or WebP file") from error
    megapixels = width * height / 1e6
    if megapixels > MOST_MEGAPIXELS:
        raise ValueError(f"{name} has {megapixels:.1f} megapixels ({width} x {height}); {_advice()}")
    try:
        return open_image(path, channels, value_range)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from error


def _advice() -> str:
    return f"this page takes up to {MOST_MEGAPIXELS:.0f}: make it smaller and drop it again"
