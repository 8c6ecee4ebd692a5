"""Where images come from: a folder of image files, what `datasets` reads, or its objects."""

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
"""What a run says of a split, and records."""

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Rows: TypeAlias = ImageFiles | Table

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""Which part of `datasets` reads files of an ending."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made a folder."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return True
    file = folder / "dataset_dict.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:  # a file of the user's
        return False
    return isinstance(saved, dict) and "splits" in saved


def find_metadata(root: Tree, splits: Mapping[str, Tree]) -> list[str]:
    """The files that say which image is which, as `datasets` has them: with a column for the names of files.

    Args:
        splits: of the folder, if it has any; what lies beside those with classes is left out, and so are its files.
    """
    read = [folder for split in splits.values() if split.has_classes for folder in split] or list(root)
    return [
        path
        for folder in {id(folder): folder for folder in (root, *read)}.values()
        for path in folder.tables
        if os.path.basename(path) in METADATA_FILES and _names_files(path)
    ]


def read_metadata_folder(root: Tree, streaming: bool) -> Mapping[str, Table]:
    """Images in folders with metadata files: a split for each folder that has the name of one and a file of its own.

    Raises:
        ValueError: there are such folders, but one file for all of them.
    """
    splits = [folder for folder in root.folders if split_kind(folder.name) and folder.has_images]
    own = [folder for folder in splits if find_metadata(folder, {})]
    if splits and own != splits:
        raise ValueError(
            f"{root.path} holds the splits {names_text(splits)}, but one metadata file for all of them;"
            " put one into each of them"
        )
    parts = {folder.name: folder for folder in own} or {"train": root}
    files = {name: f"{glob.escape(folder.path)}/**" for name, folder in parts.items()}
    return datasets.load_dataset("imagefolder", data_files=files, streaming=streaming)


def image_paths(rows: datasets.Dataset) -> list[str]:
    """The paths in the image columns of a table."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return [row[column]["path"] for column in columns for row in undecoded(rows, column)]


def read_table(source: str | Path, name: str | None, undivided: str, streaming: bool) -> Mapping[str, Table]:
    """The splits of a folder or file of tables, or of a data set on the Hub.

    Args:
        undivided: name of the only split of what has none.
    """
    path = Path(source)
    try:
        if path.is_dir() and is_saved(path):
            if streaming:
                raise ValueError(f"{path} is read without loading it to memory as it is; leave out streaming")
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            if path.suffix not in (".parquet", ".arrow"):
                raise ValueError(f"{path} is no .parquet or .arrow file; expected one, a folder, or a Hub name")
            loaded = datasets.load_dataset(
                BUILDERS[path.suffix], data_files={undivided: glob.escape(str(path))}, streaming=streaming
            )
        else:
            loaded = _load(source, name, streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is no folder or file here, and no data set on the Hub: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {undivided: loaded}


def _load(source: str | Path, name: str | None, streaming: bool) -> Table | Mapping[str, Table]:
    """`datasets.load_dataset`, which takes characters such as "[" in a path for a pattern."""
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
    """What `load_images` makes `ImageSplits` of.

    Attributes:
        sampled: the training images before a part of them was taken for validation.
        val_name: of the validation split.
        label_column: None without labels.
        entries: of both splits, see `entry`.
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
    """What a run says of a split, and records."""
    return {"split": split, "images": images, "classes": classes, "from": place, "left_out": left_out_text(left_out)}


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
            " rename that file, in the second name its column with label_column (--target-key)"
        )
    tables = _find_tables(root)
    if tables and root.has_images and classes > 1:
        raise ValueError(
            f"{path} holds {root.count} images in folders of classes as well as {tables[0]}: give a folder"
            " with one of them"
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
            f"the metadata files in {root.path} name {len(missing)} images that are not there, such as {missing[0]}"
        )
    unnamed = sum(os.path.abspath(path) not in named for folder in root for path in folder.images)
    return Source(root.path, splits, Counter({"images that no metadata file names": unnamed} if unnamed else {}))


def _count_classes(splits: Mapping[str, Tree]) -> int:
    """The most classes that a split has, as folders."""
    return max(
        len({folder.name for folder in split if folder.images and folder is not split}) for split in splits.values()
    )


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
        raise ValueError(
            f"{path} is a folder of image files, of which image_column (--input-key) names the extensions,"
            f" such as '.webp;.png', got {reading.image_column!r}"
        )
    if reading.label_column is not None:
        raise ValueError(
            f"{path} is a folder of image files, whose classes are its folders; it has no column"
            f" {reading.label_column!r} (--target-key)"
        )
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
    return (
        f"{root.path} holds no images ({extensions}){found}; expected one folder per class with images, parquet or"
        " arrow files, or WebDataset shards; other extensions of images are given as --input-key '.webp;.png'"
    )


@dataclass(frozen=True)
class ValFraction:
    """How large it is, and the seed by which it is drawn.

    Raises:
        ValueError: the share does not lie between 0 and 1.
    """

    share: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.share}")

    def draw(self, labels: np.ndarray | None, count: int, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of training and validation images, the same as those of `datasets.Dataset.train_test_split`.

        Args:
            labels: (N,), class indices, by which they are drawn class by class where there is room for each class;
                None without.
            count: N.

        Raises:
            ValueError: a class has one image only, or none is left to train on.
        """
        held_out, draw = math.ceil(self.share * count), np.random.default_rng(self.seed)
        if held_out >= count:
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images leaves none to train on; take less, or give a"
                " validation split"
            )
        if labels is not None:
            classes, counts = np.unique(labels, return_counts=True)
            if counts.min() < 2:
                raise ValueError(
                    f"class {class_names[classes[counts.argmin()]]!r} has one image, which cannot be both trained on"
                    " and measured: add images of it, or a validation split"
                )
            if min(count - held_out, held_out) >= len(classes):
                return next(stratified_shuffle_split_generate_indices(labels, count - held_out, held_out, rng=draw))
        order = draw.permutation(count)
        if labels is not None and (lost := set(classes) - set(labels[order[held_out:]])):
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images has no room for each of {len(classes)} classes, and"
                f" takes all images of class {class_names[min(lost)]!r}; take more, or give a validation split"
            )
        return order[held_out:], order[:held_out]

    def of(self, split: str) -> str:
        """What the part is called."""
        return f"{self.share:g} of {split}"


def fingerprint(rows: Rows, label_column: str | None) -> str | None:
    """A hash of the images from which a part is drawn: of files their names, below the folder that holds them all, and
    classes; of a table its labels. None for a stream.

    What is drawn depends on the order of the images, so that a renamed file changes it.
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
