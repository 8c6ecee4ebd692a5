r"""Make two data sets of real designs, letters and digits of free fonts in 32 x 32 grey pixels, as hard as CIFAR-100.

"families": which of a hundred typefaces is it? "characters": which of the 62 letters and digits is it, in typefaces
that training never saw? Each gets a folder with train.parquet, validation.parquet and test.parquet.

    apt-get install $(cat benchmarks/typefaces.txt)      # 100 packages of Debian 12, 36 MB, free licences
    python benchmarks/typefaces.py                       # output/typefaces, 20 MB, half a minute
    python examples/train.py --data-dir output/typefaces/families --model cifar_resnet18 --scale 0.92 1 \
        --ratio 0.97 1.03 --hflip 0 --color-jitter 0     # slant and weight are the signal: augment lightly

Fonts: of each package, in the order of their paths, the first six that have all 62 characters and differ from those
taken before by a root mean square of 8 grey levels or more. Images: the font's own line height fills the image, the
character stands on the font's own baseline, its advance width in the middle.

Split of the families: images in the order of the SHA-256 of "package/file/character"; the first 16,000 are for
training, the next 4,000 for validation, the rest for the test. So the first n images of a file are a random choice of
n. Split of the characters: packages in the order of the SHA-256 of their names; 50 are for training, 10 for validation,
40 for the test; images in the order as above.

Whether these are the images that published figures are of is told by a SHA-256 of all pixels and labels, in
typefaces.json; fonts of other versions, or another FreeType, make others.
"""

import argparse
import hashlib
import json
import string
import subprocess
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from timm_selfdistill.cli import run

PACKAGES = Path(__file__).with_suffix(".txt")
REFERENCE = Path(__file__).with_suffix(".json")
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 32
FONTS_EACH, FONTS = 6, 524
"""At most of one package, and of all."""
COPY = 8
"""Grey levels."""
SPLITS = ("train", "validation", "test")
FAMILY_IMAGES = (16_000, 4_000)
CHARACTER_FAMILIES = (50, 10)
SAMPLE = (1000, 300, 300)


class Glyph(NamedTuple):
    package: str
    font: str
    character: str
    pixels: np.ndarray
    """(SIZE, SIZE), 0 to 255."""

    @property
    def order(self) -> str:
        return _sha256(f"{self.package}/{self.font}/{self.character}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/typefaces"))
    parser.add_argument("--sample", type=Path, help="also write a small part of the families to this folder")
    args = parser.parse_args()
    build(PACKAGES.read_text().split(), FONTS, args.output)
    if read_digests(args.output) != json.loads(REFERENCE.read_text()):
        warnings.warn(
            f"these are not the images of {REFERENCE.name}: figures of them compare with each other, not with"
            " published ones",
            stacklevel=1,
        )
    if args.sample:
        write_sample(args.output / "families", args.sample)
    return 0


def build(packages: list[str], fonts: int, output: Path) -> None:
    """Write both data sets.

    Raises:
        FileNotFoundError: packages are not installed.
        ValueError: their number of usable fonts is another than `fonts`.
    """
    files = {package: font_files(package) for package in packages}
    missing = [package for package, found in files.items() if not found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(packages)} font packages are not installed; apt-get install {' '.join(missing)}"
        )
    glyphs = sorted(
        (glyph for package in packages for glyph in draw_package(package, files[package])),
        key=lambda glyph: glyph.order,
    )
    found = len(glyphs) // len(CHARACTERS)
    if found != fonts:
        raise ValueError(
            f"found {found} fonts with all letters and digits in {len(packages)} packages, expected"
            f" {fonts}; they are of another version than Debian 12's, or files of theirs were removed:"
            " apt-get install --reinstall them"
        )
    write(output / "families", split_images(glyphs), "package", sorted(packages))
    write(output / "characters", split_families(glyphs, packages), "character", list(CHARACTERS))


def font_files(package: str) -> list[Path]:
    """Of an installed Debian package; none where it is not."""
    listing = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=False)
    paths = map(Path, listing.stdout.splitlines())
    return sorted(path for path in paths if path.suffix.lower() in (".ttf", ".otf") and path.is_file())


def draw_package(package: str, files: list[Path]) -> Iterator[Glyph]:
    """All characters of its first fonts that have them all and are no copies of each other."""
    taken: list[np.ndarray] = []
    for path in files:
        with TTFont(path, lazy=True) as font:
            has_all = set(map(ord, CHARACTERS)) <= set(font.getBestCmap() or ())
        if not has_all or len(taken) == FONTS_EACH:
            continue
        images = draw_font(path)
        if all(np.sqrt(np.mean((images - other) ** 2)) >= COPY for other in taken):
            taken.append(images)
            for character, pixels in zip(CHARACTERS, images):
                yield Glyph(package, path.name, character, pixels.astype(np.uint8))


def draw_font(path: Path) -> np.ndarray:
    """Its characters as floats (62, SIZE, SIZE), 0 to 255."""
    height = sum(ImageFont.truetype(path, 100).getmetrics())
    font = ImageFont.truetype(path, SIZE * 100 / height, layout_engine=ImageFont.Layout.BASIC)
    baseline, _ = font.getmetrics()
    images = []
    for character in CHARACTERS:
        image = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(image).text((SIZE / 2, baseline), character, fill=255, font=font, anchor="ms")
        images.append(np.asarray(image, np.float32))
    return np.stack(images)


def split_images(glyphs: list[Glyph]) -> dict[str, list[Glyph]]:
    ends = np.cumsum(FAMILY_IMAGES)
    return dict(zip(SPLITS, (glyphs[: ends[0]], glyphs[ends[0] : ends[1]], glyphs[ends[1] :])))


def split_families(glyphs: list[Glyph], packages: list[str]) -> dict[str, list[Glyph]]:
    ordered, ends = sorted(packages, key=_sha256), np.cumsum(CHARACTER_FAMILIES)
    parts = (ordered[: ends[0]], ordered[ends[0] : ends[1]], ordered[ends[1] :])
    return {name: [glyph for glyph in glyphs if glyph.package in part] for name, part in zip(SPLITS, parts)}


def write(folder: Path, splits: dict[str, list[Glyph]], label: str, class_names: list[str]) -> None:
    """Parquet files of PNGs and class indices.

    Args:
        label: the field of a glyph that is its class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    for name, glyphs in splits.items():
        path = folder / f"{name}.parquet"
        columns = {
            "image": [{"bytes": encode(glyph.pixels)} for glyph in glyphs],
            "label": [getattr(glyph, label) for glyph in glyphs],
        }
        datasets.Dataset.from_dict(columns, features).to_parquet(path)
        print(
            f"{path}: {len(glyphs):,} images of {len(set(columns['label']))} classes,"
            f" {path.stat().st_size / 1e6:.1f} MB"
        )


def write_sample(families: Path, folder: Path) -> None:
    """The first images of each file, under 1 MB in all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(SPLITS, SAMPLE):
        datasets.Dataset.from_parquet(str(families / f"{name}.parquet")).select(range(count)).to_parquet(
            folder / f"{name}.parquet"
        )


def encode(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read_digests(output: Path) -> dict[str, str]:
    """Of each file, the SHA-256 of its pixels and class indices."""
    digests = {}
    for path in sorted(output.glob("*/*.parquet")):
        digest = hashlib.sha256()
        for row in datasets.Dataset.from_parquet(str(path)):
            digest.update(np.asarray(row["image"]).tobytes() + row["label"].to_bytes(1, "big"))
        digests[str(path.relative_to(output))] = digest.hexdigest()
    return digests


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    datasets.disable_progress_bars()
    run(main)
