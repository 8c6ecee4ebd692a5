"""The data sets of typefaces, built from the fonts that matplotlib brings."""

from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest

from .conftest import ROOT

SAMPLE = ROOT / "tests/data/typefaces"
FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
FILES = {
    "fonts-sans": ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf"],
    "fonts-mono": ["DejaVuSansMono.ttf"],
    "fonts-serif": ["DejaVuSerif.ttf", "STIXSizOneSymReg.ttf"],
}


@pytest.fixture
def typefaces(benchmarks, monkeypatch):
    module = benchmarks("typefaces")
    monkeypatch.setattr(module, "FAMILY_IMAGES", (150, 50))
    monkeypatch.setattr(module, "CHARACTER_FAMILIES", (1, 1))
    return module


@pytest.fixture
def from_matplotlib(typefaces, monkeypatch):
    monkeypatch.setattr(typefaces, "font_files", lambda package: [FONTS / name for name in FILES.get(package, ())])
    return typefaces


def test_every_letter_and_digit_of_every_font_is_in_one_split(from_matplotlib, tmp_path):
    from_matplotlib.build(list(FILES), 4, tmp_path)
    splits = {
        name: datasets.Dataset.from_parquet(str(tmp_path / f"families/{name}.parquet"))
        for name in ("train", "validation", "test")
    }
    assert [len(rows) for rows in splits.values()] == [150, 50, 4 * 62 - 200]
    assert splits["train"].features["label"].names == ["fonts-mono", "fonts-sans", "fonts-serif"]
    labels = np.concatenate([rows["label"] for rows in splits.values()])
    assert np.bincount(labels).tolist() == [62, 124, 62]  # a font of symbols has no letters
    images = [np.asarray(image) for rows in splits.values() for image in rows["image"]]
    assert {image.shape for image in images} == {(32, 32)}
    assert len({image.tobytes() for image in images}) > 240  # some letters look the same, such as O in both weights
    assert all(image.max() > 100 for image in images)


def test_no_family_of_the_characters_is_in_two_splits(from_matplotlib, tmp_path):
    from_matplotlib.build(list(FILES), 4, tmp_path)
    counts = [
        datasets.Dataset.from_parquet(str(tmp_path / f"characters/{name}.parquet")).num_rows
        for name in ("train", "validation", "test")
    ]
    assert sorted(counts) == [62, 62, 124]
    rows = datasets.Dataset.from_parquet(str(tmp_path / "characters/train.parquet"))
    assert rows.features["label"].names[9:12] == ["9", "A", "B"]


def test_two_builds_give_the_same_bytes(from_matplotlib, tmp_path):
    for name in ("one", "two"):
        from_matplotlib.build(list(FILES), 4, tmp_path / name)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*")}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert len(one) == 6
    assert from_matplotlib.read_digests(tmp_path / "one") == from_matplotlib.read_digests(tmp_path / "two")


def test_copies_of_a_font_are_left_out(from_matplotlib, monkeypatch):
    monkeypatch.setitem(FILES, "fonts-sans", ["DejaVuSans.ttf", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"])
    files = from_matplotlib.font_files("fonts-sans")
    fonts = [glyph.font for glyph in from_matplotlib.draw_package("fonts-sans", files)]
    assert (len(fonts), set(fonts)) == (124, {"DejaVuSans.ttf", "DejaVuSans-Bold.ttf"})


def test_packages_that_are_not_installed_are_named(typefaces, tmp_path):
    with pytest.raises(FileNotFoundError, match="^2 of 2 .*apt-get install fonts-no1 fonts-no2$"):
        typefaces.build(["fonts-no1", "fonts-no2"], 4, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fewer_fonts_than_there_should_be_are_refused(from_matplotlib, tmp_path):
    with pytest.raises(ValueError, match="4 fonts .*3 packages, expected 5; .*apt-get install --reinstall"):
        from_matplotlib.build(list(FILES), 5, tmp_path)


def test_the_list_has_a_hundred_packages(typefaces):
    packages = typefaces.PACKAGES.read_text().split()
    assert len(set(packages)) == len(packages) == 100


def test_the_sample_is_a_part_of_the_families():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 1e6
    rows = datasets.Dataset.from_parquet(str(SAMPLE / "train.parquet"))
    assert (len(rows), rows.features["label"].num_classes) == (1000, 100)
