"""Images that `datasets` reads: from the Hub, parquet, arrow, `save_to_disk`, WebDataset shards, and folders with a
metadata file."""
import csv
import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from ..images import undecoded
from .layout import names_text, split_kind
from .tree import METADATA_FILES, Tree

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
    return [path for folder in {id(folder): folder for folder in (root, *read)}.values() for path in folder.tables
            if os.path.basename(path) in METADATA_FILES and _names_files(path)]


def read_metadata_folder(root: Tree, streaming: bool) -> Mapping[str, Any]:
    """Images in folders with metadata files: a split for each folder that has the name of one and a file of its own.

    Raises:
        ValueError: there are such folders, but one file for all of them.
    """
    splits = [folder for folder in root.folders if split_kind(folder.name) and folder.has_images]
    own = [folder for folder in splits if find_metadata(folder, {})]
    if splits and own != splits:
        raise ValueError(f"{root.path} holds the splits {names_text(splits)}, but one metadata file for all of them;"
                         " put one into each of them")
    parts = {folder.name: folder for folder in own} or {"train": root}
    files = {name: f"{glob.escape(folder.path)}/**" for name, folder in parts.items()}
    return datasets.load_dataset("imagefolder", data_files=files, streaming=streaming)


def image_paths(rows: datasets.Dataset) -> list[str]:
    """The paths in the image columns of a table."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return [row[column]["path"] for column in columns for row in undecoded(rows, column)]


def read_table(source: str | Path, name: str | None, undivided: str, streaming: bool) -> Mapping[str, Any]:
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
                BUILDERS[path.suffix], data_files={undivided: glob.escape(str(path))}, streaming=streaming)
        else:
            loaded = _load(source, name, streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is no folder or file here, and no data set on the Hub: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {undivided: loaded}


def _load(source: str | Path, name: str | None, streaming: bool) -> Any:
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
        isinstance(column, str) and column.endswith("file_name") for column in columns)
