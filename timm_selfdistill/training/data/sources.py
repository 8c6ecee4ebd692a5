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
from .layout import SPLIT_KINDS, find_splits, pick_split
from .tables import find_metadata, image_paths, is_saved, read_metadata_folder, read_table
from .tree import SHARD_ENDINGS, TABLE_ENDINGS, Tree, scan

UNDIVIDED = "train"
"""The name of what has no splits."""


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
        given = {ending.strip().lower() for ending in (self.image_column or "").split(";")} - {""}
        return given if given and all(ending.startswith(".") for ending in given) else None


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

    def find_split(self, name: str, named: bool = True) -> str:
        """The split of this name, or of another name of its kind; see `pick_split`.

        Raises:
            ValueError: there is none, or there are several.
        """
        split = pick_split(self.splits, name, named)
        if split is None:
            has = f"it has {', '.join(map(repr, self.splits))}"
            if list(self.splits) == [UNDIVIDED]:
                has += ", which is the whole"
            raise ValueError(f"{self.name} has no split {name!r}; {has}")
        return split


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
    try:
        str(source).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {str(source)!r} is no UTF-8, in which a run writes it down; rename it") from error
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        return _read_folder(path, reading)
    return Source(str(source), read_table(source, reading.name, UNDIVIDED, reading.streaming))


def _read_folder(path: Path, reading: Reading) -> Source:
    """A folder of image files, or of what `datasets` reads."""
    root = scan(str(path), reading.extensions or get_img_extensions(as_set=True))
    splits = find_splits(root, (reading.train_split, *filter(None, [reading.val_split])))
    classes = _count_classes(splits or {UNDIVIDED: root})
    metadata = find_metadata(root, splits)
    if metadata and (reading.label_column or (classes < 2 and not reading.unlabelled)):
        return _read_metadata(root, reading)
    if metadata and not reading.unlabelled:
        raise ValueError(
            f"the classes of the images in {path} can be its folders, or what {metadata[0]} says; in the first case"
            " rename that file, in the second name its column with label_column (--target-key)")
    tables = _find_tables(root)
    if tables and root.has_images and classes > 1:
        raise ValueError(f"{path} holds {root.count} images in folders of classes as well as {tables[0]}: give a folder"
                         " with one of them")
    if tables:
        left_out = Counter({"images beside the tables": root.count} if root.has_images else {})
        return Source(str(path), read_table(path, reading.name, UNDIVIDED, reading.streaming), left_out)
    if not root.has_images:
        raise FileNotFoundError(_no_images(root))
    _check_columns(path, reading)
    return Source(str(path), splits or {UNDIVIDED: root}, _beside(root, splits, labelled=not reading.unlabelled))


def _read_metadata(root: Tree, reading: Reading) -> Source:
    splits = read_metadata_folder(root, reading.streaming)
    if reading.streaming:
        return Source(root.path, splits)
    named = {path for rows in splits.values() for path in image_paths(rows)}
    if missing := sorted(path for path in named if not os.path.exists(path)):
        raise FileNotFoundError(
            f"the metadata files in {root.path} name {len(missing)} images that are not there, such as {missing[0]}")
    unnamed = sum(os.path.abspath(path) not in named for folder in root for path in folder.images)
    return Source(root.path, splits, Counter({"images that no metadata file names": unnamed} if unnamed else {}))


def _count_classes(splits: Mapping[str, Tree]) -> int:
    """The most classes that a split has, as folders."""
    return max(len({folder.name for folder in split if folder.images and folder is not split})
               for split in splits.values())


def _find_tables(root: Tree) -> list[str]:
    """Parquet and arrow files, and shards, which the folder is made of: beside images they have the name of a split."""
    found = [path for folder in root if not folder.images or folder is root for path in folder.tables]
    tables = [path for path in found if path.lower().endswith(TABLE_ENDINGS)]
    if not root.has_images:
        return tables + [path for path in found if path.lower().endswith(SHARD_ENDINGS)]
    of_split = re.compile(rf"({'|'.join(SPLIT_KINDS)})([-_.]?\d.*)?\.[^.]+", re.IGNORECASE)
    return [path for path in tables if of_split.fullmatch(os.path.basename(path))]


def _check_columns(path: Path, reading: Reading) -> None:
    """Raise ValueError for columns of a folder of image files, which has none."""
    if reading.image_column is not None and reading.extensions is None:
        raise ValueError(f"{path} is a folder of image files, of which image_column (--input-key) names the extensions,"
                         f" such as '.webp;.png', got {reading.image_column!r}")
    if reading.label_column is not None:
        raise ValueError(f"{path} is a folder of image files, whose classes are its folders; it has no column"
                         f" {reading.label_column!r} (--target-key)")
    if reading.streaming:
        raise ValueError(f"{path} is a folder of image files, which are read one by one as it is; leave out streaming")


def _beside(root: Tree, splits: Mapping[str, Tree], labelled: bool) -> Counter[str]:
    """What is left out of a folder with splits."""
    if not splits:
        return Counter()
    left_out = root.left_out.copy()
    if root.images:
        left_out["images beside the splits"] += len(root.images)
    for folder in root.folders:
        if not folder.has_images:
            left_out["folders without an image"] += 1
            for part in folder:
                left_out += part.left_out
        elif folder.name not in splits:
            left_out[f"images in {folder.name}/"] += folder.count
        elif labelled and not folder.has_classes:
            left_out[f"images in {folder.name}/ without a class"] += folder.count
    return left_out


def _no_images(root: Tree) -> str:
    total = sum((folder.left_out for folder in root), Counter())
    found = f"; it holds {left_out_text(total)}" if total else ""
    extensions = " ".join(sorted(get_img_extensions()))
    return (f"{root.path} holds no images ({extensions}){found}; expected one folder per class with images, parquet or"
            " arrow files, or WebDataset shards; other extensions of images are given as --input-key '.webp;.png'")
