"""Where images come from: a folder of image files, what `datasets` reads, or its objects."""
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from timm.data.readers import get_img_extensions

from .files import left_out_text
from .layout import find_splits, split_kind
from .tables import find_metadata, find_tables, is_saved, read_metadata_folder, read_table
from .tree import Tree, scan


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        name: of the folder, file or data set, for messages.
        splits: by name, the folders of image files, or the tables.
        left_out: how many of what else lay beside the splits.
    """

    name: str
    splits: Mapping[str, Any]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def is_folder(self) -> bool:
        """Whether the splits are folders of image files."""
        return all(isinstance(split, Tree) for split in self.splits.values())


@dataclass(frozen=True)
class Reading:
    """How a user wants images to be read; see `load_images`."""

    name: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    unlabelled: bool = False

    @property
    def extensions(self) -> set[str] | None:
        """Of image files, where they are given in the place of the image column, as for timm's `ReaderImageFolder`."""
        given = (self.image_column or "").lower().split(";")
        return set(given) if all(ending.startswith(".") for ending in given) else None


def read_source(source: Any, reading: Reading) -> Source:
    """The splits of a source.

    Raises:
        FileNotFoundError: nothing is there, or no images in it.
        ValueError: a folder can be read in two ways, or is a file of another kind.
        TypeError: it is none.
    """
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return Source("the data set", {reading.train_split: source})
    if isinstance(source, Mapping):
        return Source("the data set", source)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a path, the name of a data set or a datasets.Dataset, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        return _read_folder(path, reading)
    return Source(str(source), read_table(source, reading.name, reading.train_split, reading.streaming))


def _read_folder(path: Path, reading: Reading) -> Source:
    root = scan(str(path), reading.extensions or get_img_extensions(as_set=True))
    named = (reading.train_split, *filter(None, [reading.val_split]))
    metadata = find_metadata(root)
    if metadata and reading.label_column:
        return _read_metadata(root, reading)
    splits = find_splits(root, named) if root.has_images else {}
    has_classes = _count_classes(splits or {"": root}) > 1
    labelled = not reading.unlabelled
    if metadata and labelled and not has_classes:
        return _read_metadata(root, reading)
    if metadata and labelled:
        raise ValueError(
            f"the classes of the images in {path} can be its folders, or what {metadata[0]} says; in the first case"
            " rename that file, in the second name its column with label_column (--target-key)")
    tables = find_tables(root, TABLES)
    if tables and root.has_images and (not labelled or (has_classes and any(map(_names_split, tables)))):
        raise ValueError(
            f"{path} holds {root.count} image files as well as {tables[0]}: give a folder with one of them")
    if (tables or find_tables(root, SHARDS)) and not has_classes and (labelled or not root.has_images):
        return Source(str(path), read_table(path, reading.name, reading.train_split, reading.streaming))
    if not root.has_images:
        raise FileNotFoundError(_no_images(root))
    return Source(str(path), splits or {reading.train_split: root}, _beside(root, splits, labelled))


TABLES, SHARDS = (".parquet", ".arrow"), (".tar",)


def _read_metadata(root: Tree, reading: Reading) -> Source:
    splits = read_metadata_folder(root, reading.streaming)
    unnamed = 0 if reading.streaming else root.count - sum(map(len, splits.values()))
    return Source(root.path, splits, Counter({"images that no metadata file names": unnamed}) if unnamed else Counter())


def _count_classes(splits: Mapping[str, Tree]) -> int:
    """The most classes that a split has, as folders."""
    return max(len({folder.name for folder in split if folder.images and folder is not split})
               for split in splits.values())


def _names_split(path: str) -> bool:
    return any(split_kind(word) for word in re.split(r"[^a-zA-Z]+", os.path.basename(path)))


def _beside(root: Tree, splits: Mapping[str, Tree], labelled: bool) -> Counter[str]:
    """What is left out of a folder with splits."""
    if not splits:
        return Counter()
    left_out = root.left_out.copy()
    if root.images:
        left_out["images beside the splits"] += len(root.images)
    for folder in root.folders:
        if folder.name not in splits and folder.has_images:
            left_out[f"images in {folder.name}/"] += folder.count
        elif labelled and folder.has_images and not folder.has_classes:
            left_out[f"images in {folder.name}/ without a class"] += folder.count
        elif not folder.has_images:
            left_out.update(what for part in folder for what in part.left_out.elements())
    return left_out


def _no_images(root: Tree) -> str:
    total = sum((folder.left_out for folder in root), Counter())
    found = f"; it holds {left_out_text(total)}" if total else ""
    extensions = " ".join(sorted(get_img_extensions()))
    return (f"{root.path} holds no images ({extensions}){found}; expected one folder per class with images, parquet or"
            " arrow files, or WebDataset shards; other endings of images are given as input key (--input-key"
            " '.webp;.png')")
