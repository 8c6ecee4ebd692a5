"""Sources of images: folders of image files, formats that `datasets` reads, and its objects."""

import csv
import glob
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import datasets
import numpy as np
from datasets.utils.stratify import stratified_shuffle_split_generate_indices
from timm.data.readers import get_img_extensions

from .folder import (
    METADATA_FILES,
    SHARD_ENDINGS,
    SPLIT_KINDS,
    TABLE_ENDINGS,
    ImageFiles,
    Tree,
    find_splits,
    left_out_text,
    names_text,
    pick_split,
    scan,
    split_kind,
)
from .images import undecoded

FoundSplit = TypedDict("FoundSplit", {"split": str, "images": int | None, "classes": int, "from": str, "left_out": str})
"""Description of a split that a run prints and records."""

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Rows: TypeAlias = ImageFiles | Table

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""Builder of `datasets` by file extension."""


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return True
    file = folder / "dataset_dict.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:  # some other file of that name
        return False
    return isinstance(saved, dict) and "splits" in saved


def find_metadata(root: Tree, splits: Mapping[str, Tree]) -> list[str]:
    """Return the metadata files in the format of `datasets`, with a column of file names.

    Args:
        splits: splits of the folder, if any; folders outside the splits with classes are ignored, with their files.
    """
    read = [folder for split in splits.values() if split.has_classes for folder in split] or list(root)
    return [
        path
        for folder in {id(folder): folder for folder in (root, *read)}.values()
        for path in folder.tables
        if os.path.basename(path) in METADATA_FILES and _names_files(path)
    ]


def read_metadata_folder(root: Tree, streaming: bool) -> Mapping[str, Table]:
    """Load images in folders with metadata files; each folder named like a split, with its own file, is a split.

    Raises:
        ValueError: there are such folders, but only one file for all of them.
    """
    splits = [folder for folder in root.folders if split_kind(folder.name) and folder.has_images]
    own = [folder for folder in splits if find_metadata(folder, {})]
    if splits and own != splits:
        raise ValueError(
            f"{root.path} holds the splits {names_text(splits)}, but a single metadata file for all of them;"
            " put one into each folder"
        )
    parts = {folder.name: folder for folder in own} or {"train": root}
    files = {name: f"{glob.escape(folder.path)}/**" for name, folder in parts.items()}
    return datasets.load_dataset("imagefolder", data_files=files, streaming=streaming)


def image_paths(rows: datasets.Dataset) -> list[str]:
    """Return the paths in the image columns of a table."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return [row[column]["path"] for column in columns for row in undecoded(rows, column)]


def read_table(source: str | Path, name: str | None, undivided: str, streaming: bool) -> Mapping[str, Table]:
    """Load the splits of a folder or file of tables, or of a dataset on the Hub.

    Args:
        undivided: split name for a source without splits.
    """
    path = Path(source)
    try:
        if path.is_dir() and is_saved(path):
            if streaming:
                raise ValueError(f"{path} is memory-mapped and not loaded into memory; leave out streaming")
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            if path.suffix not in (".parquet", ".arrow"):
                raise ValueError(f"{path} must be a .parquet or .arrow file, a folder, or a dataset on the Hub")
            loaded = datasets.load_dataset(
                BUILDERS[path.suffix], data_files={undivided: glob.escape(str(path))}, streaming=streaming
            )
        else:
            loaded = _load(source, name, streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is neither a local folder or file nor a dataset on the Hub: {error}"
        ) from error
    return loaded if isinstance(loaded, Mapping) else {undivided: loaded}


def _load(source: str | Path, name: str | None, streaming: bool) -> Table | Mapping[str, Table]:
    """Call `datasets.load_dataset`, which would read characters such as "[" in a path as a pattern."""
    path = Path(source)
    if not (path.is_dir() and glob.has_magic(str(path))):
        return datasets.load_dataset(str(source), name, streaming=streaming)
    kinds = {file.suffix for file in path.rglob("*") if file.suffix in BUILDERS}
    if len(kinds) > 1:
        raise ValueError(f"{path} holds files of several kinds ({', '.join(sorted(kinds))}); give a folder of one kind")
    return datasets.load_dataset(BUILDERS[kinds.pop()], data_dir=glob.escape(str(path)), streaming=streaming)


def _names_files(path: str) -> bool:
    """Whether a metadata file has a column "file_name", or one that ends in it."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        line = file.readline()
    try:
        columns = next(csv.reader([line]), []) if path.endswith(".csv") else json.loads(line)
    except (ValueError, csv.Error):
        return False
    return isinstance(columns, (list, dict)) and any(
        isinstance(column, str) and column.endswith("file_name") for column in columns
    )


@dataclass(frozen=True)
class Found:
    """What `load_images` needs to create `ImageSplits`.

    Attributes:
        sampled: the training images before some were held out for validation.
        val_name: name of the validation split.
        label_column: None without labels.
        entries: descriptions of both splits, see `entry`.
    """

    train: Rows
    val: Rows
    sampled: Rows
    val_name: str
    image_column: str
    label_column: str | None
    class_names: list[str]
    entries: list[FoundSplit]


def entry(split: str, images: int | None, classes: int, place: str, left_out: Counter[str]) -> FoundSplit:
    """Return the description of a split that a run prints and records."""
    return {"split": split, "images": images, "classes": classes, "from": place, "left_out": left_out_text(left_out)}


UNDIVIDED = "train"
"""Split name for a source without splits."""


@dataclass(frozen=True)
class Reading:
    """How to read a source; see `load_images`."""

    name: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    unlabelled: bool = False

    @property
    def extensions(self) -> set[str] | None:
        """Extensions of image files, if given instead of the image column, as for timm's `ReaderImageFolder`."""
        given = {ending.strip().lower() for ending in (self.image_column or "").split(";")} - {""}
        return given if given and all(ending.startswith(".") for ending in given) else None


@dataclass(frozen=True)
class Source:
    """A source that was found.

    Attributes:
        name: name of the folder, file or dataset, for messages.
        splits: folders of image files, or tables, by split name.
        left_out: numbers of other entries beside the splits, by kind.
    """

    name: str
    splits: Mapping[str, Any]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def is_folder(self) -> bool:
        """Whether the splits are folders of image files."""
        return all(isinstance(split, Tree) for split in self.splits.values())

    def find_split(self, name: str, named: bool = True) -> str:
        """Return the split with this name, or another name of the same kind; see `pick_split`.

        Raises:
            ValueError: there is none, or there are several.
        """
        split = pick_split(self.splits, name, named)
        if split is None:
            only = "only " if list(self.splits) == [UNDIVIDED] else ""
            raise ValueError(f"{self.name} has no split {name!r}; it has {only}{', '.join(map(repr, self.splits))}")
        return split


def read_source(source: Any, reading: Reading) -> Source:
    """Find the splits of a source.

    Raises:
        FileNotFoundError: the source does not exist or contains no images.
        ValueError: a folder is ambiguous, or a file is of another kind.
        TypeError: `source` is not a source of images.
    """
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return Source("the dataset", {reading.train_split: source})
    if isinstance(source, Mapping):
        return Source("the dataset", source)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a path, the name of a dataset or a datasets.Dataset, got {type(source).__name__}")
    try:
        str(source).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {str(source)!r} is not valid UTF-8 and cannot be recorded; rename it") from error
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        return _read_folder(path, reading)
    return Source(str(source), read_table(source, reading.name, UNDIVIDED, reading.streaming))


def _read_folder(path: Path, reading: Reading) -> Source:
    """Read a folder of image files, or of files that `datasets` reads."""
    root = scan(str(path), reading.extensions or get_img_extensions(as_set=True))
    splits = find_splits(root, (reading.train_split, *filter(None, [reading.val_split])))
    classes = _count_classes(splits or {UNDIVIDED: root})
    metadata = find_metadata(root, splits)
    if metadata and (reading.label_column or (classes < 2 and not reading.unlabelled)):
        return _read_metadata(root, reading)
    if metadata and not reading.unlabelled:
        raise ValueError(
            f"{path} is ambiguous: its classes could be its folders or a column of {metadata[0]}; in the first case"
            " rename that file, in the second set label_column (--target-key)"
        )
    tables = _find_tables(root)
    if tables and root.has_images and classes > 1:
        raise ValueError(
            f"{path} holds both {root.count} images in class folders and {tables[0]}; give a folder that holds only one"
            " of them"
        )
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
            f"the metadata files in {root.path} list {len(missing)} images that do not exist, such as {missing[0]}"
        )
    unnamed = sum(os.path.abspath(path) not in named for folder in root for path in folder.images)
    return Source(root.path, splits, Counter({"images not listed in metadata files": unnamed} if unnamed else {}))


def _count_classes(splits: Mapping[str, Tree]) -> int:
    """Return the largest number of class folders in a split."""
    return max(
        len({folder.name for folder in split if folder.images and folder is not split}) for split in splits.values()
    )


def _find_tables(root: Tree) -> list[str]:
    """Return the parquet and arrow files and shards that hold the images; beside image files, only those named like a
    split count."""
    found = [path for folder in root if not folder.images or folder is root for path in folder.tables]
    tables = [path for path in found if path.lower().endswith(TABLE_ENDINGS)]
    if not root.has_images:
        return tables + [path for path in found if path.lower().endswith(SHARD_ENDINGS)]
    of_split = re.compile(rf"({'|'.join(SPLIT_KINDS)})([-_.]?\d.*)?\.[^.]+", re.IGNORECASE)
    return [path for path in tables if of_split.fullmatch(os.path.basename(path))]


def _check_columns(path: Path, reading: Reading) -> None:
    """Raise ValueError for columns or streaming, which a folder of image files does not have."""
    if reading.image_column is not None and reading.extensions is None:
        raise ValueError(
            f"{path} is a folder of image files, for which image_column (--input-key) must be their extensions, such"
            f" as '.webp;.png', got {reading.image_column!r}"
        )
    if reading.label_column is not None:
        raise ValueError(
            f"{path} is a folder of image files, whose classes are its folders; it has no column"
            f" {reading.label_column!r} (--target-key)"
        )
    if reading.streaming:
        raise ValueError(f"{path} is a folder of image files, which are read one by one; leave out streaming")


def _beside(root: Tree, splits: Mapping[str, Tree], labelled: bool) -> Counter[str]:
    """Count what is left out of a folder with splits."""
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
    return (
        f"{root.path} contains no images ({extensions}){found}; expected one folder of images per class, parquet or"
        " arrow files, or WebDataset shards; set other image extensions with --input-key '.webp;.png'"
    )


@dataclass(frozen=True)
class ValFraction:
    """The fraction of the training images held out for validation, and the seed of the draw.

    Raises:
        ValueError: the fraction is not between 0 and 1.
    """

    share: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.share}")

    def draw(self, labels: np.ndarray | None, count: int, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Draw indices of training and validation images, the same as `datasets.Dataset.train_test_split`.

        Args:
            labels: class indices (N,), by which the draw is stratified if there is room for each class; None without
                labels.
            count: N.

        Raises:
            ValueError: a class has only one image, or no image is left for training.
        """
        held_out, draw = math.ceil(self.share * count), np.random.default_rng(self.seed)
        if held_out >= count:
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images leaves none for training; use a smaller fraction, or a"
                " validation split"
            )
        if labels is not None:
            classes, counts = np.unique(labels, return_counts=True)
            if counts.min() < 2:
                raise ValueError(
                    f"class {class_names[classes[counts.argmin()]]!r} has only one image, which cannot be used for both"
                    " training and validation: add images, or a validation split"
                )
            if min(count - held_out, held_out) >= len(classes):
                return next(stratified_shuffle_split_generate_indices(labels, count - held_out, held_out, rng=draw))
        order = draw.permutation(count)
        if labels is not None and (lost := set(classes) - set(labels[order[held_out:]])):
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images is too small for {len(classes)} classes and would take"
                f" all images of class {class_names[min(lost)]!r}; use a larger fraction, or a validation split"
            )
        return order[held_out:], order[:held_out]

    def of(self, split: str) -> str:
        """Return the name of the validation part of a split."""
        return f"{self.share:g} of {split}"


def fingerprint(rows: Rows, label_column: str | None) -> str | None:
    """Return a hash of the images that validation images are drawn from: for files, of their paths (with the classes)
    relative to the common folder; for a table, of its labels. None for a stream.

    The draw depends on the order of the images, so renaming a file changes the hash.
    """
    digest = hashlib.sha256()
    if isinstance(rows, ImageFiles):
        root = os.path.commonpath(rows.paths)
        digest.update("\0".join(os.path.relpath(path, root) for path in rows.paths).encode(errors="surrogateescape"))
    elif isinstance(rows, datasets.Dataset):
        labels = rows.select_columns(label_column)[:][label_column] if label_column in rows.column_names else []
        digest.update(repr((len(rows), labels)).encode())
    else:
        return None
    return digest.hexdigest()[:16]
