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

from .layout import split_kind
from .tree import Tree

SAVED_FILES = ("dataset_dict.json", "state.json")
"""Of `save_to_disk`."""

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""What reads files of an ending."""

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made a folder."""
    return any((folder / file).exists() for file in SAVED_FILES)


def find_metadata(root: Tree) -> list[str]:
    """The files that say which image is which, as `datasets` has them: with a column for the names of files."""
    return [path for folder in root for path in folder.tables
            if os.path.basename(path) in METADATA_FILES and _names_files(path)]


def find_tables(root: Tree, endings: tuple[str, ...]) -> list[str]:
    """The parquet, arrow or tar files in a folder."""
    return [path for folder in root for path in folder.tables if path.endswith(endings)]


def read_metadata_folder(root: Tree, streaming: bool) -> Mapping[str, Any]:
    """Images in folders with metadata files: a split for each folder that has the name of one and a file of its own."""
    parts = {folder.name: folder for folder in root.folders if split_kind(folder.name) and find_metadata(folder)}
    parts = parts or {"train": root}
    files = {name: f"{glob.escape(part.path)}/**" for name, part in parts.items()}
    return datasets.load_dataset("imagefolder", data_files=files, streaming=streaming)


def read_table(source: str | Path, name: str | None, train_split: str, streaming: bool) -> Mapping[str, Any]:
    """The splits of a folder or file of tables, or of a data set on the Hub."""
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
                path.suffix.lstrip("."), data_files={train_split: glob.escape(str(path))}, streaming=streaming)
        else:
            loaded = _load(source, name, streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} is no folder or file here, and no data set on the Hub: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {train_split: loaded}


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
