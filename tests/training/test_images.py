"""Image files as they are: whole, damaged, with more than 8 bits, turned."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from timm_selfdistill.training.data.images import open_image, read_image

FORMATS = {
    "PNG": {},
    "JPEG": {},
    "WEBP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "BMP": {},
    "AVIF": {},
    "DDS": {},
    "JPEG2000": {},
}
SIDES = np.linspace(0, 255, 24)[:, None] * np.ones(32)
PICTURE = Image.fromarray(np.stack([SIDES, SIDES[::-1], SIDES.T[:24, :24].repeat(2, 1)[:, :32]], 2).astype(np.uint8))


def encoded(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **FORMATS[format], **settings)
    return file.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut off, with other bytes, with bytes left out or put in."""
    changed = bytearray(data)
    place, length = draw.randrange(len(data)), draw.choice([1, 2, 4, 16, 64])
    kind = draw.choice(["cut", "flip", "flip", "set", "leave out", "put in"])
    if kind == "cut":
        del changed[place:]
    elif kind == "flip":
        for _ in range(length):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "set":
        changed[place : place + length] = draw.choice([b"\0", b"\xff"]) * length
    elif kind == "leave out":
        del changed[place : place + length]
    else:
        changed[place:place] = draw.randbytes(length)
    return bytes(changed)


def check_damaged(format: str, count: int, path) -> None:
    """Each gives an image or the one error."""
    draw, exif = random.Random(format), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "camera"
    plain = [encoded(PICTURE.convert(mode), format) for mode in ("RGB", "L")]
    whole = [*plain, encoded(PICTURE, format, exif=exif)] if format not in ("BMP", "DDS", "GIF") else plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's
        for number in range(count):
            path.write_bytes(damaged(whole[number % len(whole)], draw))
            reason = ""
            try:
                image = read_image({"bytes": None, "path": str(path)}, "RGB")
            except ValueError as error:
                reason = str(error)
            if reason:
                assert reason.startswith(f"cannot read image {path}: ")
            else:
                assert image.mode == "RGB"
                assert np.asarray(image).shape == (*image.size[::-1], 3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_gives_an_image_or_one_error(format, tmp_path):
    check_damaged(format, 40, tmp_path / "picture")


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_thousands_of_damaged_files_give_an_image_or_one_error(format, tmp_path):
    check_damaged(format, 2300, tmp_path / "picture")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_images_are_upright(format, orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(PICTURE, format, exif=exif))
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(open_image(path, 3), expected)
    assert open_image(path, 3).size == ((24, 32) if orientation > 4 else (32, 24))


def exif_of_a_phone(orientation: int) -> bytes:
    """With an exposure of -1/0, which Pillow reads, but cannot write again."""
    tags = struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack(">HHII", 0x9204, 10, 1, 38)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + b"\0" * 4 + struct.pack(">ii", -1, 0)


@pytest.mark.parametrize(
    "exif",
    [
        exif_of_a_phone(6),
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*" + b"\xff" * 40,
        b"",
        b"\0\x08\0\x02",
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_exif_that_cannot_be_read_turns_nothing(format, exif, tmp_path):
    whole = encoded(PICTURE, format)
    if format == "JPEG":
        data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    elif format == "PNG":
        body = b"eXIf" + exif.removeprefix(b"Exif\0\0")
        data = whole[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + whole[33:]
    elif format == "TIFF":  # a tag whose values lie behind the end of the file
        data = encoded(PICTURE, format, tiffinfo={ExifTags.Base.Orientation: 3, ExifTags.Base.ExifOffset: 10**6})
    else:
        try:
            data = encoded(PICTURE, format, exif=exif)
        except (ValueError, OSError, SyntaxError, struct.error):
            pytest.skip("which the writer refuses")
    path = tmp_path / "picture"
    path.write_bytes(data)
    pixels = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    turned = np.rot90(pixels, {"TIFF": 2}.get(format, -1))
    found = np.asarray(open_image(path, 3))
    assert np.array_equal(found, turned if format == "TIFF" or (exif[14:] and found.shape[0] == 32) else pixels)


GREYS = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "ending", "warned", "distinct"),
    [
        ((GREYS * 65535).astype(np.uint16), "png", None, 256),
        ((GREYS * 4095).astype(np.uint16), "png", "from 0 to 4095", 16),
        ((GREYS * 255).astype(np.uint16), "png", "from 0 to 255", 1),
        ((GREYS * 255).astype(np.int32), "tif", "from 0 to 255", 1),
        ((GREYS * 65535).astype(np.int32), "tif", None, 256),
        ((GREYS * 2**31 * 0.9).astype(np.int32), "tif", "from 0 to 1.9", None),
        (GREYS.astype(np.float32), "tif", "0 is read as black and 1 as white", 256),
        ((GREYS * 255).astype(np.float32), "tif", None, 256),
        ((GREYS * 65535).astype(np.float32), "tif", "from 0 to 65535", None),
    ],
)
def test_more_than_8_bits(values, ending, warned, distinct, tmp_path, recwarn):
    path = tmp_path / f"picture.{ending}"
    Image.fromarray(values).save(path)
    pixels = np.asarray(open_image(path, 1))
    assert distinct is None or len(np.unique(pixels)) == distinct
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == bool(warned)
    if warned:
        assert str(path) in said[0]
        assert warned in said[0]
        assert "--value-range LOW HIGH" in said[0]
    low, high = float(values.min()), float(values.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = np.asarray(open_image(path, 1, (low, high)))
    assert (whole.min(), whole.max(), len(np.unique(whole))) == (0, 255, 256)


def test_numbers_of_the_other_byte_order(tmp_path):
    """Which Pillow reads in a mode of their own."""
    values = (GREYS * 65535).astype(">u2")
    header = b"MM\0*\0\0\0\x08"
    tags = [
        (256, 4, 64),
        (257, 4, 64),
        (258, 3, 16 << 16),
        (259, 3, 1 << 16),
        (262, 3, 1 << 16),
        (273, 4, 8 + 2 + 12 * 9 + 4),
        (277, 3, 1 << 16),
        (278, 4, 64),
        (279, 4, values.nbytes),
    ]
    directory = (
        struct.pack(">H", len(tags))
        + b"".join(struct.pack(">HHII", number, kind, 1, value) for number, kind, value in tags)
        + b"\0" * 4
    )
    (tmp_path / "picture.tif").write_bytes(header + directory + values.tobytes())
    assert Image.open(tmp_path / "picture.tif").mode == "I;16B"
    assert np.array_equal(open_image(tmp_path / "picture.tif", 1), (values // 256).astype(np.uint8))


def test_floats_that_are_no_numbers_are_black_and_say_nothing_of_the_range(tmp_path, recwarn):
    values = (GREYS * 255).astype(np.float32)
    values[0, 0] = values[5, 5] = np.nan
    Image.fromarray(values).save(tmp_path / "picture.tif")
    pixels = np.asarray(open_image(tmp_path / "picture.tif", 1))
    assert (pixels[0, 0], pixels[5, 5], pixels[63, 63]) == (0, 0, 255)
    assert not recwarn


def test_ranges_are_those_of_a_kind(tmp_path):
    """What floating-point numbers taught a model says nothing of integers."""
    integers, floats = tmp_path / "a.png", tmp_path / "b.tif"
    Image.fromarray((GREYS * 65535).astype(np.uint16)).save(integers)
    Image.fromarray(GREYS.astype(np.float32)).save(floats)
    ranges = {"F": (0.0, 1.0)}
    for path in (integers, floats):
        assert len(np.unique(open_image(path, 1, ranges))) == 256


@pytest.mark.parametrize("values", [GREYS * 1.3, GREYS * 9000])
def test_values_that_fill_a_small_part_are_said(values, tmp_path):
    Image.fromarray(values.astype(np.float32 if values.max() < 2 else np.uint16)).save(tmp_path / "a.tif")
    with pytest.warns(UserWarning, match=f"a.tif are .* to {values.max():g}; .*--value-range"):
        open_image(tmp_path / "a.tif", 1)


def test_pages_that_are_not_read_are_said(tmp_path):
    PICTURE.save(tmp_path / "a.tif", save_all=True, append_images=[PICTURE] * 3)
    with pytest.warns(UserWarning, match="a.tif has 4 pages; only the first is read"):
        open_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_grey_or_colour(mode):
    from timm_selfdistill.training.data.images import to_mode

    image = Image.new(mode, (3, 2)) if mode in ("PA", "RGBa") else PICTURE.convert(mode)
    assert to_mode(image, "RGB").mode == "RGB"
    assert to_mode(image, "L").mode == "L"
    if mode in ("P", "RGBA", "CMYK", "L", "1"):
        assert np.array_equal(to_mode(image, "RGB"), image.convert("RGB"))  # as timm does
